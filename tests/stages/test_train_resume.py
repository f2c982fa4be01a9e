"""Holds where a run begins: a longer or shorter run goes on from its like and equals one by itself to the bit; a named checkpoint of another run is taken over under the run's own settings."""

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
from sdxl_pipeline.training.checkpoint.run_identity import run_fingerprints
from sdxl_pipeline.training.checkpoint.run_lineage import SPEC_FILE, write_lineage
from sdxl_pipeline.training.logging.run_logs import read_metrics
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


class Listener(Reporter):
    """Keeps what was said."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def _show_log(self, message: str) -> None:
        self.lines.append(message)


@cache
def dataset_of(folder: Path) -> TrainingDataset:
    return make_dataset(folder / "dataset")


def spec_of(runs: Path, run: str, **settings: object) -> TrainSpec:
    """A run in `runs`, beside the others there."""
    runs.mkdir(parents=True, exist_ok=True)
    spec = make_spec(runs.parent, dataset_of(runs.parent), **{**CONSTANT, **settings})
    return spec.model_copy(update={"run_dir": str(runs / run)})


def train(spec: TrainSpec, listener: Reporter | None = None) -> TrainedLora:
    return main(spec, listener or Reporter(), StopSignal())


def losses(manifest: TrainedLora) -> list[tuple[int, float]]:
    return [(row.step, row.loss) for row in read_metrics(Path(manifest.metrics_path))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of four steps."""
    folder = tmp_path_factory.mktemp("beginning") / "runs"
    train(spec_of(folder, "four"))
    return folder


@pytest.fixture(scope="module")
def alone(runs: Path) -> TrainedLora:
    """Six steps without any other run beside them."""
    return train(spec_of(runs.with_name("alone"), "six", max_train_steps=6))


def test_a_finished_run_made_longer_goes_on_from_its_end_and_equals_one_by_itself(runs, alone):
    listener = Listener()
    spec = spec_of(runs, "six", max_train_steps=6, validation_disable=False, validation_step_interval=3)
    longer = train(spec, listener)
    assert longer.resumed_from_step == 4
    assert longer.ancestor is not None
    assert longer.ancestor.same_trajectory
    assert longer.ancestor.identity == run_fingerprints(spec_of(runs, "four")).identity
    assert longer.identity == alone.identity
    assert longer.weights_sha256 == alone.weights_sha256
    assert losses(longer) == losses(alone)
    assert longer.skipped_steps == 0
    assert any(
        "starts at step 4 of the run" in line and "continues it exactly" in line for line in listener.lines
    )


def test_a_run_made_shorter_is_cut_from_a_longer_one(runs, alone):
    shorter = train(spec_of(runs, "two", max_train_steps=2))
    assert (shorter.resumed_from_step, shorter.steps) == (2, 2)
    expected = train(spec_of(runs.with_name("alone two"), "two", max_train_steps=2))
    assert expected.resumed_from_step is None
    assert shorter.weights_sha256 == expected.weights_sha256
    assert losses(shorter) == losses(expected)


def test_epochs_are_a_length_too(runs):
    spec = spec_of(runs, "epoch", max_train_steps=None, num_train_epochs=1)
    manifest = train(spec)
    assert (manifest.steps, manifest.resumed_from_step) == (5, 4)


def test_where_the_learning_rate_depends_on_the_length_a_run_begins_anew_and_says_so(runs):
    folder, cosine = runs.with_name("cosine"), {"lr_scheduler": "cosine", "max_train_steps": 2}
    train(spec_of(folder, "short", **cosine))
    listener = Listener()
    longer = train(spec_of(folder, "long", **{**cosine, "max_train_steps": 3}), listener)
    assert longer.resumed_from_step is None
    assert longer.ancestor is None
    (line,) = [line for line in listener.lines if "only in length" in line]
    assert "lr_scheduler cosine depends on the length: this run starts at step 0" in line
    assert "constant_with_warmup" in line


def test_none_begins_anew_beside_any_run(runs):
    spec = spec_of(runs, "anew", max_train_steps=3, resume_from_checkpoint=None)
    assert train(spec).resumed_from_step is None


def test_a_named_checkpoint_of_the_same_trajectory_changes_no_bit(runs, alone):
    place = runs / "four" / "checkpoints" / "step-00000002"
    spec = spec_of(runs.with_name("named"), "six", max_train_steps=6, resume_from_checkpoint=str(place))
    manifest = train(spec)
    assert manifest.resumed_from_step == 2
    assert (manifest.identity, manifest.weights_sha256) == (alone.identity, alone.weights_sha256)


def other_settings(runs: Path, run: str, place: Path, **settings: object) -> TrainSpec:
    settings = {"learning_rate": 5e-4, "lr_scheduler": "cosine", "max_train_steps": 7, **settings}
    return spec_of(runs.with_name("others"), run, resume_from_checkpoint=str(place), **settings)


def test_a_checkpoint_under_other_settings_hands_on_weights_moments_and_step_and_is_in_the_identity(runs):
    place = runs / "four" / "checkpoints" / "step-00000004"
    listener = Listener()
    spec = other_settings(runs, "unbroken", place)
    manifest = train(spec, listener)
    assert any("its optimizer's state, under the settings of this run" in line for line in listener.lines)
    assert manifest.ancestor is not None
    assert (manifest.ancestor.step, manifest.ancestor.same_trajectory) == (4, False)
    rows = read_metrics(Path(manifest.metrics_path))
    assert [row.step for row in rows] == list(range(1, 8))
    by_itself = train(
        spec_of(
            runs.with_name("by itself"), "run", learning_rate=5e-4, lr_scheduler="cosine", max_train_steps=7
        )
    )
    assert manifest.identity != by_itself.identity
    rates = {row.step: row.lr for row in read_metrics(Path(by_itself.metrics_path))}
    assert [row.lr for row in rows[4:]] == [rates[step] for step in (5, 6, 7)]
    # one step on, the count of AdamW's steps has gone on, and the weights have moved from the ancestor's by about one learning rate
    before = load_checkpoint(place)
    after = load_checkpoint(Path(spec.run_dir) / "checkpoints" / "step-00000006")
    assert after.optimizer["state"][0]["step"].item() == before.optimizer["state"][0]["step"].item() + 2
    assert after.optimizer["param_groups"][0]["initial_lr"] == 5e-4
    moved = max((after.parameters[name] - before.parameters[name]).abs().max() for name in before.parameters)
    assert 0 < moved < 2.5 * max(rates.values())

    # and it resumes to the bit like any other
    stop = StopSignal()
    broken = other_settings(runs, "broken", place)
    stop.request()
    with pytest.raises(StageStopped):
        main(broken, Reporter(), stop)
    assert train(broken).weights_sha256 == manifest.weights_sha256


def test_another_optimizer_begins_anew_on_the_weights(runs):
    place = runs / "four" / "checkpoints" / "step-00000004"
    listener = Listener()
    spec = other_settings(runs, "lion", place, optimizer="optimi-lion", max_train_steps=5, learning_rate=1e-5)
    manifest = train(spec, listener)
    assert any("a new optimizer state" in line for line in listener.lines)
    assert manifest.ancestor is not None
    assert not manifest.ancestor.takes_optimizer
    before = load_checkpoint(place).parameters
    after = load_checkpoint(Path(spec.run_dir) / "checkpoints" / "step-00000005").parameters
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=2e-5) for name in before)


def test_an_optimizer_that_keeps_something_else_begins_anew_on_the_weights(runs):
    place = runs / "four" / "checkpoints" / "step-00000004"
    listener = Listener()
    spec = other_settings(runs, "amsgrad", place, optimizer_config="amsgrad=true", max_train_steps=5)
    manifest = train(spec, listener)
    assert any("different layout" in line for line in listener.lines)
    assert manifest.ancestor is not None
    assert not manifest.ancestor.takes_optimizer
    after = load_checkpoint(Path(spec.run_dir) / "checkpoints" / "step-00000005").optimizer
    assert after["state"][0]["step"].item() == 1
    assert after["state"][0]["max_exp_avg_sq"].any()


def test_a_checkpoint_that_was_put_elsewhere_is_the_same_and_brings_nothing_of_its_neighbours(
    runs, alone, tmp_path
):
    home = tmp_path / "home"
    kept = shutil.copytree(runs / "four" / "checkpoints" / "step-00000004", home / "backup" / "good")
    (home / "chat.jsonl").write_text("{}\n")
    (home / "metrics.jsonl").write_text('{"epoch": 3}\n')
    (home / "validation").mkdir()
    (home / "validation" / "mine").write_text("x")
    listener = Listener()
    same = train(
        spec_of(runs.with_name("put"), "six", max_train_steps=6, resume_from_checkpoint=str(kept)), listener
    )
    assert any(
        "starts at step 4 of the run" in line and "continues it exactly" in line for line in listener.lines
    )
    assert (same.identity, same.weights_sha256) == (alone.identity, alone.weights_sha256)
    assert [step for step, _ in losses(same)] == [5, 6]
    assert same.skipped_steps == 0
    assert not {"chat.jsonl", "validation"} & {path.name for path in Path(same.run_dir).iterdir()}

    names, listener = run_fingerprints(spec := other_settings(runs, tmp_path.name, kept)), Listener()
    resume_run(spec, names, listener)
    assert any("its optimizer's state, under the settings of this run" in line for line in listener.lines)
    assert {path.name for path in Path(spec.run_dir).iterdir()} == {"checkpoints", "lineage.json"}


def test_the_same_training_on_other_devices_is_named_with_the_way_to_go_on_from_it(runs):
    place = runs.with_name("devices") / "four" / "checkpoints" / "step-00000004"
    shutil.copytree(runs / "four", place.parents[1])
    spec = spec_of(runs.with_name("devices"), "two")
    spec = spec.model_copy(update={"hardware": spec.hardware.model_copy(update={"num_processes": 2})})
    listener = Listener()
    resume_run(spec, run_fingerprints(spec), listener)
    (line,) = listener.lines
    assert "The run four is at step 4 of the same training with another number of processes" in line
    assert line.endswith(f"resume_from_checkpoint: {place}")
    assert not (Path(spec.run_dir) / "checkpoints").exists()


@pytest.fixture(scope="module")
def beside(runs: Path) -> Path:
    """A folder with the run of four steps and its spec, as the asset leaves it, and a damaged one that is even more alike."""
    folder = runs.with_name("beside")
    for run, settings in (("four", {}), ("damaged", {"learning_rate": 5e-4, "max_train_steps": 3})):
        shutil.copytree(runs / "four", folder / run)
        spec = spec_of(folder, run, **settings)
        (folder / run / SPEC_FILE).write_text(spec.model_dump_json())
        lineage = RunLineage(**run_fingerprints(spec)._asdict(), optimizer="adamw", ancestor=None)
        write_lineage(folder / run, lineage)
    for checkpoint in (folder / "damaged" / "checkpoints").iterdir():
        (checkpoint / "trainable.safetensors").write_bytes(b"x")
    return folder


def nearest_line(beside: Path, run: str, **settings: object) -> str:
    listener = Listener()
    train(spec_of(beside, run, validation_disable=True, **settings), listener)
    (line,) = [line for line in listener.lines if "This run starts at step 0" in line]
    shutil.rmtree(beside / run)
    return line


def test_latest_with_other_settings_logs_the_nearest_run_and_the_path_to_continue_it(beside):
    place = beside / "four" / "checkpoints" / "step-00000004"
    line = nearest_line(beside, "rate", learning_rate=5e-4, train_batch_size=2, max_train_steps=5)
    assert "The nearest is four, at step 4." in line
    changes = re.search(r"It differs in (.*?)\. To continue", line)
    assert changes is not None
    assert set(changes[1].split("; ")) == {
        "max_train_steps: 4 -> 5",
        "learning_rate: 0.001 -> 0.0005",
        "train_batch_size: 1 -> 2",
    }
    assert line.endswith(f'write "resume_from_checkpoint": "{place}" in config.json.')

    continued = train(
        spec_of(beside, "on", learning_rate=5e-4, max_train_steps=5, resume_from_checkpoint=str(place))
    )
    assert continued.resumed_from_step == 4
    shutil.rmtree(beside / "on")

    line = nearest_line(beside, "ended", seed=1)
    assert line.endswith("in config.json, and raise max_train_steps above 4: this run ends at step 4.")


def test_latest_with_another_rank_logs_that_the_nearest_run_cannot_be_continued(beside):
    line = nearest_line(beside, "rank", lora_rank=3, max_train_steps=1)
    assert "lora_rank: 2 -> 3; lora_alpha: 2.0 -> 3.0" in line
    assert re.search(r"It cannot be continued.*lora_A\S+ is \(2, \d+.*\) there and \(3, \d+.*\) here", line)
    assert '"resume_from_checkpoint"' not in line


def test_latest_with_dora_logs_the_lora_to_start_from(beside):
    line = nearest_line(beside, "dora", use_dora=True, max_train_steps=1, lora_dropout=0.0)
    weights = beside / "four" / "checkpoints" / "step-00000004" / "pytorch_lora_weights.safetensors"
    assert line.endswith(f'write "init_lora": "{weights}" in config.json.')
    started = train(spec_of(beside, "started", use_dora=True, max_train_steps=1, init_lora=str(weights)))
    assert started.steps == 1
    shutil.rmtree(beside / "started")


def test_other_images_of_the_nearest_run_are_logged(beside):
    spec = spec_of(beside, "images", max_train_steps=1)
    more = spec.datasets[0].model_copy(update={"repeats": 1})
    listener = Listener()
    train(spec.model_copy(update={"datasets": (more,)}), listener)
    (line,) = [line for line in listener.lines if "This run starts at step 0" in line]
    assert "images, captions or settings of the dataset shapes" in line
    shutil.rmtree(beside / "images")


def test_a_run_whose_own_checkpoints_are_damaged_begins_where_it_began(runs):
    place = runs / "four" / "checkpoints" / "step-00000004"
    spec = other_settings(runs, "damaged", place)
    resume_run(spec, run_fingerprints(spec), Listener())
    own = Path(spec.run_dir) / "checkpoints" / "step-00000004"
    (own / "trainable.safetensors").unlink()  # which may be the very file of the other run
    (own / "trainable.safetensors").write_bytes(b"x")
    resume_run(spec, run_fingerprints(spec), Listener())
    assert load_checkpoint(own).step == 4
    assert load_checkpoint(place).step == 4


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
def test_a_checkpoint_that_does_not_fit_is_refused(runs, tmp_path, step, settings, message):
    place = runs / "four" / "checkpoints" / f"step-{step:08d}"
    spec = other_settings(runs, tmp_path.name, place, **settings)
    with pytest.raises(UserError, match=message):
        train(spec)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_by_name_and_passed_over_among_others(runs, tmp_path):
    folder = tmp_path / "runs"
    train(spec_of(folder, "four"))
    newest = folder / "four" / "checkpoints" / "step-00000004"
    weights = newest / "trainable.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="which is corrupt"):
        train(other_settings(tmp_path / "runs", "named", newest))
    assert train(spec_of(folder, "five", max_train_steps=5)).resumed_from_step == 2


def test_begin_run_names_each_damaged_checkpoint_of_the_other_run(runs, tmp_path):
    shutil.copytree(runs / "four", tmp_path / "four")
    for step, begins_at in ((4, "starts at step 2"), (2, None)):
        damaged = tmp_path / "four" / "checkpoints" / f"step-{step:08d}"
        (damaged / "trainable.safetensors").unlink()
        (damaged / "trainable.safetensors").write_bytes(b"x")
        listener, spec = Listener(), spec_of(tmp_path, f"five_{step}", max_train_steps=5)
        resume_run(spec, run_fingerprints(spec), listener)
        assert f"checkpoint {damaged} is corrupt and is skipped" in listener.lines
        assert begins_at is None or any(begins_at in line for line in listener.lines)
        shutil.rmtree(spec.run_dir)


@pytest.mark.slow
def test_nothing_of_the_ancestor_changes(runs, tmp_path):
    folder = tmp_path / "runs"
    train(spec_of(folder, "two", max_train_steps=2))
    files = sorted(path for path in (folder / "two").rglob("*") if path.is_file())
    before = {path: path.read_bytes() for path in files}
    train(spec_of(folder, "three", max_train_steps=3))
    assert {path: path.read_bytes() for path in files} == before
    assert load_file(folder / "three" / "checkpoints" / "step-00000002" / "trainable.safetensors")
