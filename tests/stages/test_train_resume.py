"""Where a run starts: a longer or shorter run resumes from its equivalent bit-exactly; a checkpoint of another run is imported (warm start)."""

import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import RunLineage, TrainedLora, TrainingDataset, TrainSpec
from sdxl_pipeline.runtime.stage_runner import StageStopped, StopSignal, UserError
from sdxl_pipeline.stages.train import main
from sdxl_pipeline.training.checkpoint.checkpoints import load_checkpoint
from sdxl_pipeline.training.checkpoint.resume import resume_run
from sdxl_pipeline.training.checkpoint.run_identity import SPEC_FILE, run_fingerprints, write_lineage
from sdxl_pipeline.training.logging.run_logs import read_metrics
from tests.support.train_programs import RecordingReporter, losses
from tests.support.training_datasets import make_dataset, make_spec

pytestmark = pytest.mark.usefixtures("one_thread")

CONSTANT = {
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 3,
    "max_train_steps": 4,
    "checkpoint_step_interval": 2,
    "lora_dropout": 0.2,
    "caption_dropout_probability": 0.3,
    "train_batch_size": 1,
}


@cache
def dataset_of(folder: Path) -> TrainingDataset:
    return make_dataset(folder / "dataset")


def spec_of(runs: Path, run: str, **settings: object) -> TrainSpec:
    """Return a run whose folder is in `runs`."""
    runs.mkdir(parents=True, exist_ok=True)
    spec = make_spec(runs.parent, dataset_of(runs.parent), **{**CONSTANT, **settings})
    return spec.model_copy(update={"run_dir": str(runs / run)})


def train(spec: TrainSpec, reporter: Reporter | None = None) -> TrainedLora:
    return main(spec, reporter or Reporter(), StopSignal())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that contains a finished run of four steps."""
    folder = tmp_path_factory.mktemp("resume") / "runs"
    train(spec_of(folder, "four"))
    return folder


@pytest.fixture(scope="module")
def standalone(runs: Path) -> TrainedLora:
    """Train six steps in a folder without other runs."""
    return train(spec_of(runs.with_name("alone"), "six", max_train_steps=6))


def test_train_longer_run_resumes_finished_run_and_equals_standalone_run(runs, standalone):
    reporter = RecordingReporter()
    spec = spec_of(runs, "six", max_train_steps=6, validation_disable=False, validation_step_interval=3)
    longer = train(spec, reporter)
    assert longer.resumed_from_step == 4
    assert longer.ancestor is not None
    assert longer.ancestor.same_trajectory
    assert longer.ancestor.identity == run_fingerprints(spec_of(runs, "four")).identity
    assert longer.identity == standalone.identity
    assert longer.weights_sha256 == standalone.weights_sha256
    assert losses(longer) == losses(standalone)
    assert longer.skipped_steps == 0
    assert any(
        "starts at step 4 of the run" in line and "continues it exactly" in line for line in reporter.lines
    )


def test_train_shorter_run_resumes_checkpoint_of_longer_run(runs, standalone):
    shorter = train(spec_of(runs, "two", max_train_steps=2))
    assert (shorter.resumed_from_step, shorter.steps) == (2, 2)
    expected = train(spec_of(runs.with_name("alone two"), "two", max_train_steps=2))
    assert expected.resumed_from_step is None
    assert shorter.weights_sha256 == expected.weights_sha256
    assert losses(shorter) == losses(expected)


def test_train_num_train_epochs_resumes_run_with_max_train_steps(runs):
    spec = spec_of(runs, "epoch", max_train_steps=None, num_train_epochs=1)
    manifest = train(spec)
    assert (manifest.steps, manifest.resumed_from_step) == (5, 4)


@pytest.mark.slow
def test_train_length_dependent_lr_schedule_starts_at_zero_and_logs_reason(runs):
    folder, cosine = runs.with_name("cosine"), {"lr_scheduler": "cosine", "max_train_steps": 2}
    train(spec_of(folder, "short", **cosine))
    reporter = RecordingReporter()
    longer = train(spec_of(folder, "long", **{**cosine, "max_train_steps": 3}), reporter)
    assert longer.resumed_from_step is None
    assert longer.ancestor is None
    (line,) = [line for line in reporter.lines if "only in length" in line]
    assert "lr_scheduler cosine depends on the length: this run starts at step 0" in line
    assert "constant_with_warmup" in line


def test_train_resume_none_starts_at_zero(runs):
    spec = spec_of(runs, "restarted", max_train_steps=3, resume_from_checkpoint=None)
    assert train(spec).resumed_from_step is None


def test_train_checkpoint_path_of_same_trajectory_equals_standalone_run(runs, standalone):
    checkpoint = runs / "four" / "checkpoints" / "step-00000002"
    spec = spec_of(runs.with_name("named"), "six", max_train_steps=6, resume_from_checkpoint=str(checkpoint))
    manifest = train(spec)
    assert manifest.resumed_from_step == 2
    assert (manifest.identity, manifest.weights_sha256) == (standalone.identity, standalone.weights_sha256)


def other_settings(runs: Path, run: str, checkpoint: Path, **settings: object) -> TrainSpec:
    settings = {"learning_rate": 5e-4, "lr_scheduler": "cosine", "max_train_steps": 7, **settings}
    return spec_of(runs.with_name("others"), run, resume_from_checkpoint=str(checkpoint), **settings)


def test_train_warm_start_imports_weights_moments_and_step_and_changes_identity(runs):
    checkpoint = runs / "four" / "checkpoints" / "step-00000004"
    reporter = RecordingReporter()
    spec = other_settings(runs, "unbroken", checkpoint)
    manifest = train(spec, reporter)
    assert any("its optimizer's state, under the settings of this run" in line for line in reporter.lines)
    assert manifest.ancestor is not None
    assert (manifest.ancestor.step, manifest.ancestor.same_trajectory) == (4, False)
    rows = read_metrics(Path(manifest.metrics_path))
    assert [row.step for row in rows] == list(range(1, 8))
    cold_start = train(
        spec_of(
            runs.with_name("cold start"), "run", learning_rate=5e-4, lr_scheduler="cosine", max_train_steps=7
        )
    )
    assert manifest.identity != cold_start.identity
    learning_rates = {row.step: row.lr for row in read_metrics(Path(cold_start.metrics_path))}
    assert [row.lr for row in rows[4:]] == [learning_rates[step] for step in (5, 6, 7)]
    # AdamW's step count continues, and the weights differ from the ancestor's by about one learning rate per step
    before = load_checkpoint(checkpoint)
    after = load_checkpoint(Path(spec.run_dir) / "checkpoints" / "step-00000006")
    assert after.optimizer["state"][0]["step"].item() == before.optimizer["state"][0]["step"].item() + 2
    assert after.optimizer["param_groups"][0]["initial_lr"] == 5e-4
    change = max((after.parameters[name] - before.parameters[name]).abs().max() for name in before.parameters)
    assert 0 < change < 2.5 * max(learning_rates.values())

    # resume of a warm start is bit-exact
    stop = StopSignal()
    stopped = other_settings(runs, "stopped", checkpoint)
    stop.request()
    with pytest.raises(StageStopped):
        main(stopped, Reporter(), stop)
    assert train(stopped).weights_sha256 == manifest.weights_sha256


def test_train_warm_start_with_other_optimizer_imports_weights_only(runs):
    checkpoint = runs / "four" / "checkpoints" / "step-00000004"
    reporter = RecordingReporter()
    spec = other_settings(
        runs, "lion", checkpoint, optimizer="optimi-lion", max_train_steps=5, learning_rate=1e-5
    )
    manifest = train(spec, reporter)
    assert any("a new optimizer state" in line for line in reporter.lines)
    assert manifest.ancestor is not None
    assert not manifest.ancestor.takes_optimizer
    before = load_checkpoint(checkpoint).parameters
    after = load_checkpoint(Path(spec.run_dir) / "checkpoints" / "step-00000005").parameters
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=2e-5) for name in before)


def test_train_warm_start_with_incompatible_optimizer_state_imports_weights_only(runs):
    checkpoint = runs / "four" / "checkpoints" / "step-00000004"
    reporter = RecordingReporter()
    spec = other_settings(runs, "amsgrad", checkpoint, optimizer_config="amsgrad=true", max_train_steps=5)
    manifest = train(spec, reporter)
    assert any("different layout" in line for line in reporter.lines)
    assert manifest.ancestor is not None
    assert not manifest.ancestor.takes_optimizer
    after = load_checkpoint(Path(spec.run_dir) / "checkpoints" / "step-00000005").optimizer
    assert after["state"][0]["step"].item() == 1
    assert after["state"][0]["max_exp_avg_sq"].any()


def test_train_copied_checkpoint_resumes_without_neighbouring_files(runs, standalone, tmp_path):
    home = tmp_path / "home"
    copied = shutil.copytree(runs / "four" / "checkpoints" / "step-00000004", home / "backup" / "good")
    (home / "chat.jsonl").write_text("{}\n")
    (home / "metrics.jsonl").write_text('{"epoch": 3}\n')
    (home / "validation").mkdir()
    (home / "validation" / "mine").write_text("x")
    reporter = RecordingReporter()
    same = train(
        spec_of(runs.with_name("copied"), "six", max_train_steps=6, resume_from_checkpoint=str(copied)),
        reporter,
    )
    assert any(
        "starts at step 4 of the run" in line and "continues it exactly" in line for line in reporter.lines
    )
    assert (same.identity, same.weights_sha256) == (standalone.identity, standalone.weights_sha256)
    assert [step for step, _ in losses(same)] == [5, 6]
    assert same.skipped_steps == 0
    assert not {"chat.jsonl", "validation"} & {path.name for path in Path(same.run_dir).iterdir()}

    fingerprints, reporter = (
        run_fingerprints(spec := other_settings(runs, tmp_path.name, copied)),
        RecordingReporter(),
    )
    resume_run(spec, fingerprints, reporter)
    assert any("its optimizer's state, under the settings of this run" in line for line in reporter.lines)
    assert {path.name for path in Path(spec.run_dir).iterdir()} == {"checkpoints", "lineage.json"}


def test_resume_run_other_number_of_processes_logs_checkpoint_to_resume(runs):
    checkpoint = runs.with_name("devices") / "four" / "checkpoints" / "step-00000004"
    shutil.copytree(runs / "four", checkpoint.parents[1])
    spec = spec_of(runs.with_name("devices"), "two")
    spec = spec.model_copy(update={"hardware": spec.hardware.model_copy(update={"num_processes": 2})})
    reporter = RecordingReporter()
    resume_run(spec, run_fingerprints(spec), reporter)
    (line,) = reporter.lines
    assert "The run four is at step 4 of the same training with another number of processes" in line
    assert line.endswith(f"resume_from_checkpoint: {checkpoint}")
    assert not (Path(spec.run_dir) / "checkpoints").exists()


@pytest.fixture(scope="module")
def neighbours(runs: Path) -> Path:
    """Return a folder with the run of four steps and its spec, as the asset writes it, and a more similar one with corrupt checkpoints."""
    folder = runs.with_name("neighbours")
    for run, settings in (("four", {}), ("corrupt", {"learning_rate": 5e-4, "max_train_steps": 3})):
        shutil.copytree(runs / "four", folder / run)
        spec = spec_of(folder, run, **settings)
        (folder / run / SPEC_FILE).write_text(spec.model_dump_json())
        lineage = RunLineage(**run_fingerprints(spec)._asdict(), optimizer="adamw", ancestor=None)
        write_lineage(folder / run, lineage)
    for checkpoint in (folder / "corrupt" / "checkpoints").iterdir():
        (checkpoint / "trainable.safetensors").write_bytes(b"x")
    return folder


def nearest_line(neighbours: Path, run: str, **settings: object) -> str:
    reporter = RecordingReporter()
    train(spec_of(neighbours, run, validation_disable=True, **settings), reporter)
    (line,) = [line for line in reporter.lines if "This run starts at step 0" in line]
    shutil.rmtree(neighbours / run)
    return line


@pytest.mark.slow
def test_train_latest_with_other_settings_logs_nearest_run_and_checkpoint(neighbours):
    checkpoint = neighbours / "four" / "checkpoints" / "step-00000004"
    line = nearest_line(neighbours, "rate", learning_rate=5e-4, train_batch_size=2, max_train_steps=5)
    assert "The nearest is four, at step 4." in line
    changes = re.search(r"It differs in (.*?)\. To continue", line)
    assert changes is not None
    assert set(changes[1].split("; ")) == {
        "max_train_steps: 4 -> 5",
        "learning_rate: 0.001 -> 0.0005",
        "train_batch_size: 1 -> 2",
    }
    assert line.endswith(f'write "resume_from_checkpoint": "{checkpoint}" in config.json.')

    continued = train(
        spec_of(
            neighbours, "on", learning_rate=5e-4, max_train_steps=5, resume_from_checkpoint=str(checkpoint)
        )
    )
    assert continued.resumed_from_step == 4
    shutil.rmtree(neighbours / "on")

    line = nearest_line(neighbours, "ended", seed=1)
    assert line.endswith("in config.json, and raise max_train_steps above 4: this run ends at step 4.")


def test_train_latest_with_other_rank_logs_that_nearest_run_cannot_be_continued(neighbours):
    line = nearest_line(neighbours, "rank", lora_rank=3, max_train_steps=1)
    assert "lora_rank: 2 -> 3; lora_alpha: 2.0 -> 3.0" in line
    assert re.search(r"It cannot be continued.*lora_A\S+ is \(2, \d+.*\) there and \(3, \d+.*\) here", line)
    assert '"resume_from_checkpoint"' not in line


def test_train_latest_with_dora_logs_init_lora(neighbours):
    line = nearest_line(neighbours, "dora", use_dora=True, max_train_steps=1, lora_dropout=0.0)
    weights = neighbours / "four" / "checkpoints" / "step-00000004" / "pytorch_lora_weights.safetensors"
    assert line.endswith(f'write "init_lora": "{weights}" in config.json.')
    started = train(spec_of(neighbours, "started", use_dora=True, max_train_steps=1, init_lora=str(weights)))
    assert started.steps == 1
    shutil.rmtree(neighbours / "started")


def test_train_latest_with_other_images_logs_the_dataset(neighbours):
    spec = spec_of(neighbours, "images", max_train_steps=1)
    more = spec.datasets[0].model_copy(update={"repeats": 1})
    reporter = RecordingReporter()
    train(spec.model_copy(update={"datasets": (more,)}), reporter)
    (line,) = [line for line in reporter.lines if "This run starts at step 0" in line]
    assert "images, captions or settings of the dataset shapes" in line
    shutil.rmtree(neighbours / "images")


def test_resume_run_own_checkpoints_corrupt_imports_again(runs):
    checkpoint = runs / "four" / "checkpoints" / "step-00000004"
    spec = other_settings(runs, "corrupt", checkpoint)
    resume_run(spec, run_fingerprints(spec), RecordingReporter())
    own = Path(spec.run_dir) / "checkpoints" / "step-00000004"
    (own / "trainable.safetensors").unlink()  # it may be a hard link to the file of the other run
    (own / "trainable.safetensors").write_bytes(b"x")
    resume_run(spec, run_fingerprints(spec), RecordingReporter())
    assert load_checkpoint(own).step == 4
    assert load_checkpoint(checkpoint).step == 4


@pytest.mark.parametrize(
    ("step", "settings", "message"),
    [
        (
            4,
            {"max_train_steps": 4},
            "which leaves no steps before the last one \\(4\\); increase max_train_steps",
        ),
        (4, {"lora_rank": 3}, "holds other parameters than this run trains.*resume_from_checkpoint"),
        (3, {}, "which is not a checkpoint; write the path of a folder such as"),
    ],
)
def test_train_incompatible_checkpoint_raises(runs, tmp_path, step, settings, message):
    checkpoint = runs / "four" / "checkpoints" / f"step-{step:08d}"
    spec = other_settings(runs, tmp_path.name, checkpoint, **settings)
    with pytest.raises(UserError, match=message):
        train(spec)


@pytest.mark.slow
def test_train_corrupt_checkpoint_raises_if_given_by_path_and_is_skipped_otherwise(runs, tmp_path):
    folder = tmp_path / "runs"
    train(spec_of(folder, "four"))
    newest = folder / "four" / "checkpoints" / "step-00000004"
    weights = newest / "trainable.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="which is corrupt"):
        train(other_settings(tmp_path / "runs", "named", newest))
    assert train(spec_of(folder, "five", max_train_steps=5)).resumed_from_step == 2


def test_resume_run_logs_each_corrupt_checkpoint(runs, tmp_path):
    shutil.copytree(runs / "four", tmp_path / "four")
    for step, start in ((4, "starts at step 2"), (2, None)):
        corrupt = tmp_path / "four" / "checkpoints" / f"step-{step:08d}"
        (corrupt / "trainable.safetensors").unlink()
        (corrupt / "trainable.safetensors").write_bytes(b"x")
        reporter, spec = RecordingReporter(), spec_of(tmp_path, f"five_{step}", max_train_steps=5)
        resume_run(spec, run_fingerprints(spec), reporter)
        assert f"checkpoint {corrupt} is corrupt and is skipped" in reporter.lines
        assert start is None or any(start in line for line in reporter.lines)
        shutil.rmtree(spec.run_dir)


@pytest.mark.slow
def test_train_resumed_longer_run_does_not_change_ancestor_files(runs, tmp_path):
    folder = tmp_path / "runs"
    train(spec_of(folder, "two", max_train_steps=2))
    files = sorted(path for path in (folder / "two").rglob("*") if path.is_file())
    before = {path: path.read_bytes() for path in files}
    train(spec_of(folder, "three", max_train_steps=3))
    assert {path: path.read_bytes() for path in files} == before
    assert load_file(folder / "three" / "checkpoints" / "step-00000002" / "trainable.safetensors")
