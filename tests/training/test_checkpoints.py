"""Checkpoints: whole or absent, of their own run, and as many as asked for."""

import json
import os
from pathlib import Path

import pytest
import torch

from sdxl_pipeline.protocol.program import StageError
from sdxl_pipeline.training.checkpoints import (
    TrainingState,
    clear_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)


def make_state(step: int) -> TrainingState:
    weight = torch.nn.Parameter(torch.full((3, 2), float(step)))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, betas=(0.8, 0.95))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return TrainingState(
        step=step,
        seconds=1.5 * step,
        training_seconds=step,
        parameters={"layer.lora_A.weight": weight.detach()},
        optimizer=optimizer.state_dict(),
        schedule={"last_epoch": step, "_last_lr": [0.1 + 0.2], "lr_lambdas": [None]},
        scaler={"scale": 1024.0, "_growth_tracker": 3},
    )


def export(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(b"for users")


def save(root: Path, step: int, limit: int | None = None) -> Path:
    return save_checkpoint(root, "me", make_state(step), export, limit)


def test_a_state_comes_back_as_it_was(tmp_path):
    place = save(tmp_path, 7)
    loaded, expected = load_checkpoint(place), make_state(7)
    assert torch.equal(loaded.parameters["layer.lora_A.weight"], expected.parameters["layer.lora_A.weight"])
    assert loaded.optimizer["param_groups"] == expected.optimizer["param_groups"]
    assert loaded.optimizer["state"].keys() == expected.optimizer["state"].keys() == {0}
    for name, tensor in expected.optimizer["state"][0].items():
        assert torch.equal(loaded.optimizer["state"][0][name], tensor)
    for name in ("step", "seconds", "training_seconds", "schedule", "scaler"):
        assert getattr(loaded, name) == getattr(expected, name)


def test_nothing_in_a_checkpoint_can_run_code(tmp_path):
    assert {file.suffix for file in save(tmp_path, 7).iterdir()} == {".safetensors", ".json"}


def test_the_oldest_go_beyond_the_limit(tmp_path):
    for step in (2, 4, 10, 100):
        save(tmp_path, step, limit=2)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    assert latest_checkpoint(tmp_path, "me", print) == tmp_path / "step-00000100"


def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path):
    save(tmp_path, 2)
    newest = save(tmp_path, 4)
    with (newest / "optimizer.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    said: list[str] = []
    assert latest_checkpoint(tmp_path, "me", said.append) == tmp_path / "step-00000002"
    assert len(said) == 1
    assert str(newest) in said[0]


def test_an_unfinished_checkpoint_is_none(tmp_path):
    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, "me", make_state(2), killed)
    assert any(tmp_path.iterdir())
    assert latest_checkpoint(tmp_path, "me", print) is None
    clear_checkpoints(tmp_path, unfinished_only=True)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    save(tmp_path, 2)
    with pytest.raises(StageError, match="belongs to another run"):
        latest_checkpoint(tmp_path, "somebody else", print)


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    place = save(tmp_path, 2)
    state = json.loads((place / "state.json").read_text())
    (place / "state.json").write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(StageError, match="format 99"):
        load_checkpoint(place)
