"""Checkpoints: complete or absent, of their own run, and limited in number."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdxl_pipeline.runtime.specs import Ancestor, RunLineage
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.checkpoint.checkpoint_files import checkpoint_step, is_intact
from sdxl_pipeline.training.checkpoint.checkpoint_schedule import CheckpointKind
from sdxl_pipeline.training.checkpoint.checkpoints import (
    TrainingState,
    checkpoint_bytes,
    clear_checkpoints,
    import_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from sdxl_pipeline.training.checkpoint.run_identity import (
    lineage_of_checkpoint,
    read_lineage,
    run_of_checkpoint,
    write_lineage,
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


def export(folder: Path, content: bytes = b"exported") -> Path:
    (folder / "weights.safetensors").write_bytes(content)
    return folder / "weights.safetensors"


def save(root: Path, step: int, limit: int | None = None, kind: CheckpointKind = "step") -> Path:
    return save_checkpoint(root, "me", make_state(step), export, limit, kind=kind)


def test_load_checkpoint_returns_the_saved_state(tmp_path):
    checkpoint = save(tmp_path, 7)
    loaded, expected = load_checkpoint(checkpoint), make_state(7)
    assert torch.equal(loaded.parameters["layer.lora_A.weight"], expected.parameters["layer.lora_A.weight"])
    assert loaded.optimizer["param_groups"] == expected.optimizer["param_groups"]
    assert loaded.optimizer["state"].keys() == expected.optimizer["state"].keys() == {0}
    for name, tensor in expected.optimizer["state"][0].items():
        assert torch.equal(loaded.optimizer["state"][0][name], tensor)
    for name in ("step", "seconds", "training_seconds", "schedule", "scaler"):
        assert getattr(loaded, name) == getattr(expected, name)


def test_save_checkpoint_writes_only_safetensors_and_json(tmp_path):
    assert {file.suffix for file in save(tmp_path, 7).iterdir()} == {".safetensors", ".json"}


def test_save_checkpoint_deletes_the_oldest_beyond_the_limit(tmp_path):
    for step in (2, 4, 10, 100):
        save(tmp_path, step, limit=2)
    assert sorted(checkpoint.name for checkpoint in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    assert latest_checkpoint(tmp_path, "me", print) == tmp_path / "step-00000100"


def test_save_checkpoint_rolling_has_its_own_limit_and_is_resumed_from(tmp_path):
    save(tmp_path, 2)
    for step in (3, 4, 5):
        save(tmp_path, step, limit=1, kind="rolling")
    assert sorted(checkpoint.name for checkpoint in tmp_path.iterdir()) == [
        "rolling-00000005",
        "step-00000002",
    ]
    assert latest_checkpoint(tmp_path, "me", print) == tmp_path / "rolling-00000005"
    save(tmp_path, 6, limit=1)
    assert sorted(checkpoint.name for checkpoint in tmp_path.iterdir()) == [
        "rolling-00000005",
        "step-00000006",
    ]
    assert latest_checkpoint(tmp_path, "me", print) == tmp_path / "step-00000006"


def test_save_checkpoint_retains_the_best_step_beyond_the_limit(tmp_path):
    def names_after(step: int, best_step: int | None, kind: CheckpointKind = "step") -> list[str]:
        limit = None if kind == "best" else 1
        save_checkpoint(tmp_path, "me", make_state(step), export, limit, kind=kind, best_step=best_step)
        return sorted(path.name for path in tmp_path.iterdir())

    assert names_after(2, None) == ["step-00000002"]
    assert names_after(4, 2) == ["step-00000002", "step-00000004"]
    assert names_after(6, 2) == ["step-00000002", "step-00000006"]
    assert names_after(7, 7, "best") == ["best-00000007", "step-00000002", "step-00000006"]
    assert latest_checkpoint(tmp_path, "me", print) == tmp_path / "best-00000007"
    assert names_after(8, 7) == ["best-00000007", "step-00000008"]
    assert names_after(9, 9, "best") == ["best-00000009", "step-00000008"]
    assert names_after(10, 8) == ["step-00000008", "step-00000010"]


def test_checkpoint_bytes_equals_the_written_size(tmp_path):
    weight = torch.nn.Parameter(torch.ones(500, 1000))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = replace(make_state(1), parameters={"weight": weight.detach()}, optimizer=optimizer.state_dict())
    checkpoint = save_checkpoint(tmp_path, "me", state, lambda folder: export(folder, bytes(weight.nbytes)))
    written = sum(file.stat().st_size for file in checkpoint.iterdir())
    predicted = checkpoint_bytes(state, exports_parameters=False, export_bytes=weight.nbytes)
    assert predicted == 4 * weight.nbytes + 4  # and the step counter
    assert written == pytest.approx(predicted, abs=8192)


def test_save_checkpoint_failed_write_leaves_nothing(tmp_path):
    def fail(folder: Path) -> Path:
        (folder / "weights").write_bytes(bytes(1000))
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, "me", make_state(2), fail)
    assert list(tmp_path.iterdir()) == []


def test_latest_checkpoint_corrupt_one_is_reported_and_skipped(tmp_path):
    save(tmp_path, 2)
    newest = save(tmp_path, 4)
    with (newest / "optimizer.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    reported: list[str] = []
    assert latest_checkpoint(tmp_path, "me", reported.append) == tmp_path / "step-00000002"
    assert len(reported) == 1
    assert str(newest) in reported[0]


def test_save_checkpoint_replaces_a_corrupt_one_of_the_same_step(tmp_path):
    checkpoint = save(tmp_path, 4)
    weights = checkpoint / "trainable.safetensors"
    intact = weights.read_bytes()
    inode = weights.stat().st_ino
    save(tmp_path, 4)
    assert weights.stat().st_ino == inode  # an intact checkpoint is not rewritten
    weights.write_bytes(intact[:-1] + b"x")
    save(tmp_path, 4)
    assert weights.read_bytes() == intact
    assert latest_checkpoint(tmp_path, "me", print) == checkpoint
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_clear_checkpoints_leaves_other_files_alone(tmp_path):
    newest = save(tmp_path, 4)
    other_folders = [tmp_path / name for name in ("step-00000009-backup", "step-last", ".mine")]
    for other_folder in other_folders:
        shutil.copytree(newest, other_folder)
    other_files = [tmp_path / name for name in (".DS_Store", "step-00000007", "notes.txt")]
    for other_file in other_files:
        other_file.write_text("x")
    (tmp_path / ".step-00000006.123.tmp").mkdir()
    (tmp_path / ".rolling-00000006.123.tmp").mkdir()
    save(tmp_path, 6, limit=1)
    assert latest_checkpoint(tmp_path, "me", print) == tmp_path / "step-00000006"
    clear_checkpoints(tmp_path, unfinished_only=True)
    assert set(tmp_path.iterdir()) == {tmp_path / "step-00000006", *other_folders, *other_files}
    clear_checkpoints(tmp_path, unfinished_only=False)
    assert set(tmp_path.iterdir()) == {*other_folders, *other_files}


def test_lineage_of_checkpoint_is_independent_of_its_location(tmp_path):
    lineage = RunLineage(identity="me", trajectory="t", any_length="f", optimizer="adamw", ancestor=None)
    run = tmp_path / "run"
    inside = save_checkpoint(run / "checkpoints", "me", make_state(4), export, lineage=lineage)
    elsewhere = shutil.copytree(inside, tmp_path / "copies" / "good")
    assert lineage_of_checkpoint(elsewhere) == lineage
    assert checkpoint_step(elsewhere) == 4
    assert run_of_checkpoint(inside) is None  # the folder has no lineage yet
    write_lineage(run, lineage)
    assert run_of_checkpoint(inside) == run
    foreign = shutil.copytree(inside, tmp_path / "other" / "checkpoints" / "step-00000004")
    write_lineage(tmp_path / "other", lineage.model_copy(update={"identity": "somebody else"}))
    assert run_of_checkpoint(foreign) is None


def test_lineage_of_checkpoint_of_an_earlier_version_is_read_from_the_run(tmp_path):
    lineage = RunLineage(identity="me", trajectory="t", any_length="f", optimizer="adamw", ancestor=None)
    checkpoint = save(tmp_path / "run" / "checkpoints", 4)
    state = json.loads((checkpoint / "state.json").read_text())
    del state["lineage"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert lineage_of_checkpoint(checkpoint) is None
    write_lineage(tmp_path / "run", lineage)
    assert lineage_of_checkpoint(checkpoint) == lineage
    assert load_checkpoint(checkpoint).step == 4
    (checkpoint / "state.json").write_text("no JSON")
    assert lineage_of_checkpoint(checkpoint) is None


def test_read_lineage_accepts_the_field_names_of_an_earlier_version(tmp_path):
    lineage = RunLineage(
        identity="me",
        trajectory="t",
        any_length="f",
        any_length_or_world_size="w",
        optimizer="adamw",
        ancestor=None,
    )
    write_lineage(tmp_path, lineage)
    current = (tmp_path / "lineage.json").read_text()
    earlier = current.replace("any_length_or_world_size", "kin").replace("any_length", "family")
    (tmp_path / "lineage.json").write_text(earlier)
    assert read_lineage(tmp_path) == lineage


def test_latest_checkpoint_ignores_an_unfinished_one(tmp_path):
    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, "me", make_state(2), killed)
    assert any(tmp_path.iterdir())
    assert latest_checkpoint(tmp_path, "me", print) is None
    clear_checkpoints(tmp_path, unfinished_only=True)
    assert list(tmp_path.iterdir()) == []


def test_latest_checkpoint_of_another_run_raises(tmp_path):
    save(tmp_path, 2)
    with pytest.raises(UserError, match="belongs to another run"):
        latest_checkpoint(tmp_path, "somebody else", print)


def test_load_checkpoint_of_another_format_raises(tmp_path):
    checkpoint = save(tmp_path, 2)
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        load_checkpoint(checkpoint)


def test_is_intact_detects_a_flipped_byte_in_any_file(tmp_path):
    save(tmp_path, 1)
    checkpoint = save(tmp_path, 2)
    for file in checkpoint.iterdir():
        intact = file.read_bytes()
        for position in range(0, len(intact), 41):
            data = bytearray(intact)
            data[position] ^= 1
            file.write_bytes(data)
            assert not is_intact(checkpoint), (file.name, position)
        file.write_bytes(intact)
        assert is_intact(checkpoint)


def test_latest_checkpoint_with_modified_state_is_skipped(tmp_path):
    save(tmp_path, 1)
    checkpoint = save(tmp_path, 2)
    state = (checkpoint / "state.json").read_text()
    (checkpoint / "state.json").write_text(state.replace('"step": 2', '"step": 3'))
    reported: list[str] = []
    assert latest_checkpoint(tmp_path, "me", reported.append) == tmp_path / "step-00000001"
    assert "corrupt" in reported[0]


def test_is_intact_detects_added_weights(tmp_path):
    checkpoint = save(tmp_path, 2)
    shutil.copyfile(checkpoint / "weights.safetensors", checkpoint / "more.safetensors")
    assert not is_intact(checkpoint)


def test_import_checkpoint_result_is_intact(tmp_path):
    ancestor = Ancestor(identity="me", step=2, same_trajectory=False, takes_optimizer=False)
    lineage = RunLineage(
        identity="you",
        trajectory="t",
        any_length="f",
        any_length_or_world_size="k",
        optimizer="adamw",
        ancestor=ancestor,
    )
    import_checkpoint(save(tmp_path / "me", 2), tmp_path / "you", lineage)
    assert latest_checkpoint(tmp_path / "you", "you", pytest.fail) == tmp_path / "you" / "step-00000002"
