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
from sdxl_pipeline.training.optimizer_state import flatten_optimizer, unflatten_optimizer

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
    export: Callable[[Path], Path],
    limit: int | None = None,
    exports_parameters: bool = False,
) -> Path:
    """Write `root/step-00000500` and delete the oldest checkpoints beyond `limit`.

    `export` writes the weights as users load them into the folder it is given, and gives their place. With `exports_parameters` this
    is a folder whose safetensors hold `state.parameters` by name, which then are not written a second time. An existing checkpoint of
    the same step is left alone, since the same step of the same run has the same content.
    """
    place = root / f"step-{state.step:08d}"
    if not place.exists():
        unfinished = root / f".{place.name}.{os.getpid()}.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _write(unfinished, identity, state, export, exports_parameters)
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
        parameters=_read_parameters(place / state.get("parameters", PARAMETERS)),
        optimizer=unflatten_optimizer(load_file(place / OPTIMIZER), state["optimizer"]),
        schedule=state["schedule"],
        scaler=state["scaler"],
    )


def clear_checkpoints(root: Path, unfinished_only: bool) -> None:
    """Delete what a killed writer left half done, or all checkpoints. Only for the holder of the run's lock."""
    if root.exists():
        for place in root.iterdir():
            if not unfinished_only or place.name.startswith("."):
                shutil.rmtree(place)


def _write(
    folder: Path,
    identity: str,
    state: TrainingState,
    export: Callable[[Path], Path],
    exports_parameters: bool,
) -> None:
    exported = export(folder)
    parameters = exported if exports_parameters else folder / PARAMETERS
    if not exports_parameters:
        save_file(_on_cpu(state.parameters), parameters)
    tensors, rest = flatten_optimizer(state.optimizer)
    save_file(_on_cpu(tensors), folder / OPTIMIZER)
    content = {
        "format": FORMAT,
        "identity": identity,
        "step": state.step,
        "seconds": state.seconds,
        "training_seconds": state.training_seconds,
        "parameters": parameters.name,
        "optimizer": rest,
        "schedule": state.schedule,
        "scaler": state.scaler,
        "sha256": {file.relative_to(folder).as_posix(): sha256_file(file) for file in _files(folder)},
    }
    (folder / STATE).write_text(json.dumps(content, indent=1))
    for place in (*_files(folder), *(path for path in folder.rglob("*") if path.is_dir()), folder):
        _flush(place)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _read_parameters(place: Path) -> dict[str, Tensor]:
    """Of a file, or of all the safetensors of a folder. Mapped into memory, and not read before they are used."""
    shards = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def _is_intact(place: Path) -> bool:
    try:
        digests: Mapping[str, str] = json.loads((place / STATE).read_bytes())["sha256"]
        return all(sha256_file(place / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, KeyError):
        return False


def _checkpoints(root: Path) -> list[Path]:
    """Oldest first: the names sort by step."""
    return sorted(root.glob("step-*")) if root.exists() else []


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
