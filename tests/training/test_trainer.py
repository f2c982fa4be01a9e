"""Gradient clipping, and the order of checkpoint and barrier when a run with several processes stops."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sdxl_pipeline.runtime.stage_runner import StageStopped, StopSignal, UserError
from sdxl_pipeline.training.checkpoint.free_disk_monitor import FreeDiskMonitor
from sdxl_pipeline.training.data.batches import Batch
from sdxl_pipeline.training.trainer import Trainer
from tests.support.encoded_datasets import SilentReporter
from tests.support.training_datasets import make_spec


class FakeCpuGroup:
    """A process group whose reductions return fixed flags, and which records the checkpoints that exist at a barrier."""

    def __init__(self, root: Path, *flags: bool) -> None:
        self.flags, self.root = list(flags), root
        self.checkpoints_at_barrier: list[str] = []

    def all_reduce_any(self, *flags: bool) -> list[bool]:
        return self.flags

    def barrier(self) -> None:
        checkpoints = self.root.iterdir() if self.root.exists() else ()
        self.checkpoints_at_barrier.append(",".join(checkpoint.name for checkpoint in checkpoints))


@pytest.mark.parametrize("is_main", [True, False], ids=["main process", "other process"])
@pytest.mark.parametrize(
    ("stop_requested", "disk_is_low", "error"), [(True, False, StageStopped), (False, True, UserError)]
)
def test_train_stop_waits_at_barrier_until_checkpoint_is_saved(
    tmp_path, monkeypatch, is_main, stop_requested, disk_is_low, error
):
    monkeypatch.setattr(FreeDiskMonitor, "describe_shortage", lambda self: "the disk is full")
    spec = make_spec(tmp_path, max_train_steps=2, disk_low_threshold="1K")
    trainer = Trainer(spec, "0" * 64, SilentReporter(), StopSignal())
    cpu_group = FakeCpuGroup(Path(spec.run_dir) / "checkpoints", stop_requested, disk_is_low)
    trainer.cpu_group, trainer.is_main = cpu_group, is_main  # type: ignore[assignment]
    with pytest.raises(error):
        trainer.train()
    trainer.close()
    assert cpu_group.checkpoints_at_barrier == ["step-00000000" if is_main else ""]


@pytest.mark.parametrize(("interval", "saved"), [(1, "rolling-00000001"), (2, "step-00000001")])
def test_train_stop_after_rolling_checkpoint_of_the_step_saves_no_other(
    tmp_path, monkeypatch, interval, saved
):
    spec = make_spec(tmp_path, max_train_steps=3, checkpointing_rolling_steps=interval)
    stop, original = StopSignal(), Trainer.train_step

    def take_one_step(self: Trainer, batches: Iterator[Batch]) -> None:
        original(self, batches)
        stop.request()

    monkeypatch.setattr(Trainer, "train_step", take_one_step)
    for _ in range(2):  # the second session resumes from the checkpoint and stops before a step
        trainer = Trainer(spec, "0" * 64, SilentReporter(), stop)
        with pytest.raises(StageStopped):
            trainer.train()
        trainer.close()
        assert [path.name for path in (trainer.run_dir / "checkpoints").iterdir()] == [saved]
    assert trainer.resumed_from == 1


@pytest.mark.parametrize("bound", [0, 0.02, 1e3])
@pytest.mark.parametrize("method", ["norm", "value"])
def test_clip_gradients_by_norm_or_value_and_returns_norm(tmp_path, method, bound):
    spec = make_spec(tmp_path, max_train_steps=1, grad_clip_method=method, max_grad_norm=bound)
    trainer = Trainer(spec, "0" * 64, SilentReporter(), StopSignal())
    generator = torch.Generator().manual_seed(0)
    gradients = [0.01 * torch.randn(each.shape, generator=generator) for each in trainer.parameters.values()]
    for parameter, gradient in zip(trainer.parameters.values(), gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = trainer._clip_gradients()
    trainer.close()
    expected = torch.cat([gradient.flatten() for gradient in gradients])
    assert norm.item() == pytest.approx(expected.norm().item(), rel=1e-6)
    if bound and method == "norm":
        expected = expected * min(1.0, bound / norm.item())
    elif bound:
        expected = expected.clamp(-bound, bound)
    actual = torch.cat([each.grad.flatten() for each in trainer.parameters.values()])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)


def test_trainer_refuses_to_compile_the_whole_unet_on_a_cpu(tmp_path):
    spec = make_spec(tmp_path, dynamo_backend="inductor", dynamo_use_regional_compilation=False)
    with pytest.raises(UserError, match=r'wrong gradients.*write "dynamo_backend": "no"'):
        Trainer(spec, "me", SilentReporter(), StopSignal())
