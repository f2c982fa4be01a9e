"""Checkpoints: everything a run needs to go on as if nothing had happened.

A checkpoint is a folder of safetensors and one JSON file, made beside its place and renamed into it: it is whole or absent. There is
no pickle in it and no random state, since every random choice is a function of the step (`training.draws`).
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_pipeline.protocol.program import StageError
from sdxl_pipeline.store.files import sha256_file

FORMAT = 1
STATE = "state.json"
PARAMETERS = "trainable.safetensors"
OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class TrainingState:
    """What changes while a run trains, between two optimizer steps."""

    step: int  # optimizer steps taken
    seconds: float  # spent so far, over all sessions
    training_seconds: float  # of these, in optimizer steps
    parameters: dict[str, Tensor]  # trainable ones, by name
    optimizer: dict[str, Any]  # torch's state_dict
    schedule: dict[str, Any]
    scaler: dict[str, Any] | None  # loss scaling, under fp16


def save_checkpoint(
    root: Path,
    identity: str,
    state: TrainingState,
    export: Callable[[Path], None],
    limit: int | None = None,
) -> Path:
    """Write `root/step-00000500` and delete the oldest checkpoints beyond `limit`.

    `export` writes the weights as users load them into the folder it is given. An existing checkpoint of the same step is left alone,
    since the same step of the same run has the same content.
    """
    place = root / f"step-{state.step:08d}"
    if not place.exists():
        unfinished = root / f".{place.name}.{os.getpid()}.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _write(unfinished, identity, state, export)
        unfinished.rename(place)
        _flush(root)
    if limit is not None:
        for old in _checkpoints(root)[:-limit]:
            # renamed first: half a deletion must not look like a checkpoint
            doomed = old.rename(root / f".{old.name}.{os.getpid()}.tmp")
            shutil.rmtree(doomed)
    return place


def latest_checkpoint(root: Path, identity: str, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are what they were when written; a damaged one is named through `report` and passed over.

    Raises StageError when a checkpoint belongs to a run of another identity.
    """
    for place in reversed(_checkpoints(root)):
        if not _is_intact(place):
            report(f"checkpoint {place} is damaged and is passed over")
            continue
        found = json.loads((place / STATE).read_bytes())["identity"]
        if found != identity:
            raise StageError(
                f"{place} belongs to another run (identity {found[:12]}, not {identity[:12]}); give each run a folder of its own"
            )
        return place
    return None


def load_checkpoint(place: Path) -> TrainingState:
    """Read a checkpoint, tensors on the CPU."""
    state = json.loads((place / STATE).read_bytes())
    if state["format"] != FORMAT:
        raise StageError(
            f"{place} was written in format {state['format']}, this version reads {FORMAT}; delete it to train from the start"
        )
    return TrainingState(
        step=state["step"],
        seconds=state["seconds"],
        training_seconds=state["training_seconds"],
        parameters=load_file(place / PARAMETERS),
        optimizer=_unflatten_optimizer(load_file(place / OPTIMIZER), state["optimizer"]),
        schedule=state["schedule"],
        scaler=state["scaler"],
    )


def clear_checkpoints(root: Path, unfinished_only: bool) -> None:
    """Delete what a killed writer left half done, or all checkpoints. Only for the holder of the run's lock."""
    if root.exists():
        for place in root.iterdir():
            if not unfinished_only or place.name.startswith("."):
                shutil.rmtree(place)


def _write(folder: Path, identity: str, state: TrainingState, export: Callable[[Path], None]) -> None:
    save_file(_on_cpu(state.parameters), folder / PARAMETERS)
    tensors, rest = _flatten_optimizer(state.optimizer)
    save_file(_on_cpu(tensors), folder / OPTIMIZER)
    export(folder)
    content = {
        "format": FORMAT,
        "identity": identity,
        "step": state.step,
        "seconds": state.seconds,
        "training_seconds": state.training_seconds,
        "optimizer": rest,
        "schedule": state.schedule,
        "scaler": state.scaler,
        "sha256": {file.name: sha256_file(file) for file in sorted(folder.iterdir())},
    }
    (folder / STATE).write_text(json.dumps(content, indent=1))
    for file in folder.iterdir():
        _flush(file)
    _flush(folder)


def _is_intact(place: Path) -> bool:
    try:
        digests: Mapping[str, str] = json.loads((place / STATE).read_bytes())["sha256"]
        return all(sha256_file(place / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, KeyError):
        return False


def _checkpoints(root: Path) -> list[Path]:
    """Oldest first: the names sort by step."""
    return sorted(root.glob("step-*")) if root.exists() else []


def _flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Torch's optimizer state as tensors named "state.<parameter index>.<name>" or "group.<index>.<name>", and the rest as plain data."""
    tensors: dict[str, Tensor] = {}

    def plain(kind: str, index: int, entries: Mapping[str, Any]) -> dict[str, Any]:
        tensors.update(
            {f"{kind}.{index}.{name}": value for name, value in entries.items() if isinstance(value, Tensor)}
        )
        return {name: value for name, value in entries.items() if not isinstance(value, Tensor)}

    values = {str(index): plain("state", index, entries) for index, entries in state["state"].items()}
    groups = [plain("group", index, group) for index, group in enumerate(state["param_groups"])]
    return tensors, {"values": values, "param_groups": groups}


def _unflatten_optimizer(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in rest["values"].items()}
    groups = [
        # JSON knows no tuples; torch's options are tuples where they are sequences, but for the parameter indices
        {
            key: tuple(value) if isinstance(value, list) and key != "params" else value
            for key, value in group.items()
        }
        for group in rest["param_groups"]
    ]
    for full_name, tensor in tensors.items():
        kind, index, name = full_name.split(".", 2)
        (state if kind == "state" else groups)[int(index)][name] = tensor
    return {"state": state, "param_groups": groups}


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
