"""Holds how gradients are bounded, and how processes leave a training together: none before the one that writes has written."""

from pathlib import Path

import pytest
import torch

from sdxl_pipeline.runtime.stage_runner import StageStopped, StopSignal, UserError
from sdxl_pipeline.training.checkpoint.free_disk_monitor import FreeDiskMonitor
from sdxl_pipeline.training.trainer import Trainer
from tests.support.encoded_datasets import Silent
from tests.support.training_datasets import make_spec


class Hosts:
    """Several processes as one of them sees them, which all ask for what this one is told of."""

    def __init__(self, root: Path, *flags: bool) -> None:
        self.flags, self.root = list(flags), root
        self.found_while_waiting: list[str] = []

    def all_reduce_any(self, *flags: bool) -> list[bool]:
        return self.flags

    def barrier(self) -> None:
        places = self.root.iterdir() if self.root.exists() else ()
        self.found_while_waiting.append(",".join(place.name for place in places))


@pytest.mark.parametrize("is_main", [True, False], ids=["the one that writes", "another"])
@pytest.mark.parametrize(
    ("asked", "disk_is_low", "error"), [(True, False, StageStopped), (False, True, UserError)]
)
def test_no_process_leaves_before_the_checkpoint_is_written(
    tmp_path, monkeypatch, is_main, asked, disk_is_low, error
):
    monkeypatch.setattr(FreeDiskMonitor, "what_is_wrong", lambda self: "the disk is full")
    spec = make_spec(tmp_path, max_train_steps=2, disk_low_threshold="1K")
    trainer = Trainer(spec, "0" * 64, Silent(), StopSignal())
    hosts = Hosts(Path(spec.run_dir) / "checkpoints", asked, disk_is_low)
    trainer.cpu_group, trainer.is_main = hosts, is_main  # type: ignore[assignment]
    with pytest.raises(error):
        trainer.train()
    trainer.close()
    assert hosts.found_while_waiting == ["step-00000000" if is_main else ""]


@pytest.mark.parametrize("bound", [0, 0.02, 1e3])
@pytest.mark.parametrize("method", ["norm", "value"])
def test_gradients_are_bounded_by_their_norm_or_each_by_its_value(tmp_path, method, bound):
    spec = make_spec(tmp_path, max_train_steps=1, grad_clip_method=method, max_grad_norm=bound)
    trainer = Trainer(spec, "0" * 64, Silent(), StopSignal())
    generator = torch.Generator().manual_seed(0)
    own = [0.01 * torch.randn(each.shape, generator=generator) for each in trainer.parameters.values()]
    for parameter, gradient in zip(trainer.parameters.values(), own, strict=True):
        parameter.grad = gradient.clone()
    norm = trainer._clip_gradients()
    trainer.close()
    expected = torch.cat([gradient.flatten() for gradient in own])
    assert norm.item() == pytest.approx(expected.norm().item(), rel=1e-6)
    if bound and method == "norm":
        expected = expected * min(1.0, bound / norm.item())
    elif bound:
        expected = expected.clamp(-bound, bound)
    found = torch.cat([each.grad.flatten() for each in trainer.parameters.values()])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
