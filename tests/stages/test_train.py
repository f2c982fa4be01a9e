"""The train stage: manifest, reuse, moved folders, corrupt files, limits and several processes. Killed runs are in test_train_killed.py."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.files.disk_space import DiskFullError
from sdxl_pipeline.runtime.specs import TrainedLora, TrainSpec
from sdxl_pipeline.runtime.stage_runner import StageStopped, StopSignal, UserError
from sdxl_pipeline.stages.train import main
from sdxl_pipeline.training.logging.run_logs import read_metrics
from tests.support.processes import DEAD_PID
from tests.support.train_programs import (
    TWO_PROCESSES,
    RecordingReporter,
    losses,
    on_two_processes,
    run,
    with_settings,
)
from tests.support.training_datasets import SQUARE, WIDE, digest, make_dataset, make_spec

STEPS = 12

# adapter and caption dropout, several captions, posterior sampling, accumulation, a schedule, epochs that end within a step
STOCHASTIC = {
    "max_train_steps": STEPS,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "lora_dropout": 0.2,
    "caption_dropout_probability": 0.3,
    "checkpoint_step_interval": 2,
    "snr_gamma": 5.0,
}
WITH_IMAGES = {"validation_disable": False, "validation_step_interval": 3}


pytestmark = pytest.mark.usefixtures("one_thread")


def stochastic_spec(folder: Path, run: str, **settings) -> TrainSpec:
    folder.mkdir(parents=True, exist_ok=True)
    return make_spec(
        folder, make_dataset(folder / "dataset", captions=3), run=run, **{**STOCHASTIC, **settings}
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[TrainSpec, TrainedLora]:
    spec = stochastic_spec(tmp_path_factory.mktemp("stochastic"), "unbroken")
    return spec, run(spec)


def test_train_manifest_describes_the_run(unbroken):
    spec, manifest = unbroken
    assert (manifest.steps, manifest.samples, manifest.epochs) == (STEPS, 24, 24 / 5)
    assert (manifest.trained_images, manifest.held_out_images) == ({"shapes": 5}, {})
    assert (manifest.reused, manifest.resumed_from_step) == (False, None)
    rows = read_metrics(Path(manifest.metrics_path))
    assert [row.step for row in rows] == list(range(1, STEPS + 1))
    assert all(row.grad_norm and row.grad_norm > 0 for row in rows)
    assert manifest.final_loss == rows[-1].loss
    assert rows[0].lr == 0
    assert rows[2].lr == spec.settings.learning_rate
    weights = Path(manifest.weights_path)
    assert manifest.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    tensors = load_file(weights)
    assert manifest.trainable_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert manifest.adapted_modules == len(tensors) / 2
    assert any(tensor.abs().max() > 1e-4 for name, tensor in tensors.items() if "lora_B" in name)
    assert manifest.peak_memory_bytes > 50e6
    pipeline = StableDiffusionXLPipeline.from_pretrained(spec.base_model.path)
    pipeline.load_lora_weights(weights.parent, weight_name=weights.name)
    assert pipeline.get_list_adapters() == {"unet": ["default_0"]}


@pytest.mark.parametrize("fill", ["partial", pytest.param("wrap", marks=pytest.mark.slow)])
def test_train_two_processes_equal_one_with_double_batch_and_bucket_of_one_image(tmp_path, fill):
    dataset = make_dataset(tmp_path / "dataset", buckets=[SQUARE] * 3 + [WIDE])
    settings = {
        "train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 6,
        "caption_dropout_probability": 0.3,
        "snr_gamma": 5.0,
        "bucket_fill": fill,
    }
    spec = make_spec(tmp_path, dataset, **settings, **WITH_IMAGES)
    reporter = RecordingReporter()
    one = main(with_settings(spec, "one", train_batch_size=2), reporter, StopSignal())
    outcome = {
        "partial": "its last batch has 1 instead of 2 (bucket_fill: partial)",
        "wrap": "1 of them are repeated to fill its last batch (bucket_fill: wrap)",
    }
    assert f"Bucket 96x64 has 1 images an epoch: {outcome[fill]}." in reporter.lines
    two = run(on_two_processes(with_settings(spec, "two")), *TWO_PROCESSES)
    assert two.samples == one.samples == (16 if fill == "partial" else 24)
    assert two.epochs == one.epochs == 4.0
    assert [loss for _, loss in losses(two)] == pytest.approx([loss for _, loss in losses(one)], rel=1e-5)
    assert [image.step for image in two.validation_images] == [0, 3, 6]
    ones, twos = load_file(one.weights_path), load_file(two.weights_path)
    assert ones.keys() == twos.keys()
    for name, tensor in ones.items():
        torch.testing.assert_close(twos[name], tensor, rtol=0, atol=1e-5)


def test_train_finished_run_is_reused(unbroken):
    spec, first = unbroken
    before = Path(first.weights_path).stat().st_mtime_ns
    spec = with_settings(spec, "unbroken", **WITH_IMAGES)  # not part of the identity
    reporter = RecordingReporter()
    again = main(spec, reporter, StopSignal())
    assert again == first.model_copy(update={"reused": True})
    assert Path(first.weights_path).stat().st_mtime_ns == before
    assert any("Nothing to train" in line for line in reporter.lines)


def test_train_moved_run_is_reused_and_corrupt_weights_are_restored_from_checkpoint(unbroken):
    spec, _ = unbroken
    moved = with_settings(spec, "moved")
    shutil.copytree(spec.run_dir, moved.run_dir)
    reused = main(moved, RecordingReporter(), StopSignal())
    assert reused.reused
    assert Path(reused.weights_path).parent == Path(moved.run_dir)

    weights = Path(reused.weights_path)
    expected = weights.read_bytes()
    weights.write_bytes(expected[:-1] + b"x")
    restored = main(moved, RecordingReporter(), StopSignal())
    assert (restored.reused, restored.resumed_from_step) == (False, STEPS)
    assert weights.read_bytes() == expected


def test_train_disk_full_raises_before_writing_final_weights(unbroken, monkeypatch):
    spec, _ = unbroken
    spec = with_settings(spec, "full disk")
    shutil.copytree(Path(spec.run_dir).with_name("unbroken"), spec.run_dir)
    weights = Path(spec.run_dir) / "pytorch_lora_weights.safetensors"
    weights.unlink()
    usage = shutil.disk_usage(spec.run_dir)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    leftover = Path(spec.run_dir) / "ema" / f".pytorch_lora_weights.{DEAD_PID}-0123abcd.tmp.safetensors"
    leftover.parent.mkdir(exist_ok=True)
    leftover.write_bytes(b"half")
    message = r"no space left on the disk of .* for the final weights: .* needed, 1.0 MiB are kept in reserve, and 1.0 MiB are free"
    with pytest.raises(DiskFullError, match=message):
        main(spec, RecordingReporter(), StopSignal())
    assert not weights.exists()
    assert not leftover.exists(), "temporary files of a killed process are removed at the next start"


@pytest.mark.slow
def test_train_stopped_before_first_step_restarts_without_resume(unbroken):
    spec, expected = unbroken
    spec = with_settings(spec, "early")
    stop = StopSignal()
    stop.request()
    with pytest.raises(StageStopped):
        main(spec, RecordingReporter(), stop)
    assert [p.name for p in (Path(spec.run_dir) / "checkpoints").iterdir()] == ["step-00000000"]
    again = main(with_settings(spec, "early", resume_from_checkpoint=None), RecordingReporter(), StopSignal())
    assert again.resumed_from_step is None
    assert again.weights_sha256 == expected.weights_sha256


@pytest.mark.slow
def test_train_gradient_checkpointing_has_same_weights(unbroken):
    spec, expected = unbroken
    checkpointed = main(
        with_settings(spec, "checkpointed", gradient_checkpointing=True), RecordingReporter(), StopSignal()
    )
    assert checkpointed.identity == expected.identity
    assert checkpointed.weights_sha256 == expected.weights_sha256


def test_train_bf16_keeps_float32_adapter(unbroken):
    spec, expected = unbroken
    settings = {"mixed_precision": "bf16", "max_train_steps": 4, **WITH_IMAGES}
    # accelerate keeps one mixed precision per process
    AcceleratorState._reset_state(reset_partial_state=True)
    half = main(with_settings(spec, "half", **settings), RecordingReporter(), StopSignal())
    AcceleratorState._reset_state(reset_partial_state=True)
    assert {tensor.dtype for tensor in load_file(half.weights_path).values()} == {torch.float32}
    for (_, loss), (_, full) in zip(losses(half), losses(expected), strict=False):
        assert loss != full
        assert loss == pytest.approx(full, rel=0.05)


def test_train_folder_of_another_run_raises(unbroken):
    spec, _ = unbroken
    with pytest.raises(UserError, match="contains another run"):
        main(with_settings(spec, "unbroken", seed=1), RecordingReporter(), StopSignal())


def test_train_checkpoints_total_limit_keeps_newest(tmp_path):
    spec = make_spec(tmp_path, max_train_steps=3, checkpoint_step_interval=1, checkpoints_total_limit=2)
    main(spec, RecordingReporter(), StopSignal())
    retained = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert retained == ["step-00000002", "step-00000003"]


def spec_with_nan_latents(folder: Path, broken: set[int], **settings) -> TrainSpec:
    """Return a run over 3 square images and 2 wide ones; those in `broken` have NaN latents."""
    dataset = make_dataset(folder / "dataset")
    store = TensorStore(folder / "broken")
    with store.writer() as writer:
        for index, (height, width) in enumerate([SQUARE] * 3 + [WIDE] * 2):
            mean = torch.full((4, height // 8, width // 8), float("nan") if index in broken else 0.5)
            key = digest("latent", digest("image", "shapes", index))
            writer.add(key, {"mean": mean, "logvar": torch.zeros_like(mean)})
    latents = dataset.latents.model_copy(update={"store_root": str(store.root)})
    return make_spec(folder, dataset.model_copy(update={"latents": latents}), **settings)


def test_train_nonfinite_step_is_skipped_and_logged_without_changing_state(tmp_path):
    settings = {
        "max_train_steps": 10,
        "train_batch_size": 1,
        "checkpoint_step_interval": 1,
        "lr_scheduler": "constant",
    }
    spec, reporter = spec_with_nan_latents(tmp_path, {4}, **settings), RecordingReporter()
    manifest = main(spec, reporter, StopSignal())
    taken = [step for step, _ in losses(manifest)]
    skipped = sorted(set(range(1, 11)) - set(taken))
    assert len(skipped) == manifest.skipped_steps == 2, "the broken image appears once per epoch"
    warnings = [line for line in reporter.lines if "is skipped" in line]
    key = digest("image", "shapes", 4)[:12]
    assert [
        f"step {step} is skipped because its loss is nan. Its images: shapes/image_04.png (key {key})."
        in line
        for step, line in zip(skipped, warnings, strict=True)
    ] == [True, True]
    checkpoints = Path(spec.run_dir) / "checkpoints"
    for step in range(2, 11):
        unchanged = [
            (checkpoints / f"step-{step:08d}" / name).read_bytes()
            == (checkpoints / f"step-{step - 1:08d}" / name).read_bytes()
            for name in ("trainable.safetensors", "optimizer.safetensors")
        ]
        assert unchanged == [step in skipped] * 2
    assert all(tensor.isfinite().all() for tensor in load_file(manifest.weights_path).values())


@pytest.mark.slow
def test_train_only_skipped_steps_raises_and_keeps_initial_parameters(tmp_path):
    valid = spec_with_nan_latents(tmp_path / "valid", set(), max_train_steps=30, checkpoint_step_interval=2)
    stop = StopSignal()
    stop.request()
    with pytest.raises(StageStopped):
        main(valid, RecordingReporter(), stop)
    broken = spec_with_nan_latents(
        tmp_path / "broken", set(range(5)), max_train_steps=30, checkpoint_step_interval=2
    )
    reporter = RecordingReporter()
    with pytest.raises(
        UserError, match=r"steps 1 to 10 were skipped one after the other.*image_0.*learning_rate"
    ):
        main(broken.model_copy(update={"run_dir": valid.run_dir}), reporter, StopSignal())
    assert sum("is skipped" in line for line in reporter.lines) == 9
    retained = sorted((Path(valid.run_dir) / "checkpoints").iterdir())
    first, last = (load_file(path / "trainable.safetensors") for path in (retained[0], retained[-1]))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert not (Path(valid.run_dir) / "finished.json").exists()


def test_train_wrong_number_of_processes_raises(tmp_path):
    with pytest.raises(UserError, match=r"2 processes, but 1 are running.*torchrun"):
        main(make_spec(tmp_path, num_processes=2), RecordingReporter(), StopSignal())


def test_train_num_train_epochs_sets_steps_without_max_train_steps(tmp_path):
    spec = make_spec(tmp_path, max_train_steps=None, num_train_epochs=2, train_batch_size=3)
    manifest = main(spec, RecordingReporter(), StopSignal())
    # 3 square and 2 wide images are two batches per epoch
    assert (manifest.steps, manifest.epochs) == (4, 2.0)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["step"] == 4
