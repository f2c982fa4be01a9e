"""Checkpoints: everything a run needs to go on as if nothing had happened.

A checkpoint is a folder of safetensors and one JSON file, made beside its place and renamed into it: it is whole or absent. There is
no pickle in it and no random state, since every random choice is a function of the step (`training.draws`).
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_pipeline.protocol.program import StageError
from sdxl_pipeline.protocol.specs import Ancestor
from sdxl_pipeline.store.files import link_or_copy, sha256_file, write_text_atomic
from sdxl_pipeline.training.checkpoint_times import CheckpointKind
from sdxl_pipeline.training.disk import require_room
from sdxl_pipeline.training.lineage import STATE
from sdxl_pipeline.training.optimizer_state import flatten_optimizer, unflatten_optimizer

CHECKPOINTS = "checkpoints"
"""The folder of a run's checkpoints in the run's own."""

FORMAT = 1
PARAMETERS = "trainable.safetensors"
OPTIMIZER = "optimizer.safetensors"
AVERAGE = "average.safetensors"


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
    average: dict[str, Tensor] = field(default_factory=dict)  # of the parameters, under use_ema
    same_trajectory: bool = (
        True  # False where another run's checkpoint was taken over; its optimizer may be empty
    )


def save_checkpoint(
    root: Path,
    identity: str,
    state: TrainingState,
    export: Callable[[Path], Path],
    limit: int | None = None,
    exports_parameters: bool = False,
    kind: CheckpointKind = "step",
) -> Path:
    """Write `root/step-00000500`, or `rolling-...` by its kind, and delete the oldest checkpoints of the kind beyond `limit`.

    `export` writes the weights as users load them into the folder it is given, and gives their place. With `exports_parameters` this
    is a folder whose safetensors hold `state.parameters` by name, which then are not written a second time. An existing checkpoint of
    the same step is left alone, since the same step of the same run has the same content. Raises StageError before it would fill the disk.
    """
    place = root / f"{kind}-{state.step:08d}"
    if not place.exists():
        root.mkdir(parents=True, exist_ok=True)
        require_room(
            root, checkpoint_bytes(state, exports_parameters), f"the checkpoint of step {state.step}"
        )
        unfinished = root / f".{place.name}.{os.getpid()}.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            _write(unfinished, identity, state, export, exports_parameters)
        except OSError:  # half a checkpoint would keep the room that is lacking
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        unfinished.rename(place)
        _flush(root)
    if limit is not None:
        for old in [other for other in checkpoints(root) if other.name.startswith(kind)][:-limit]:
            # renamed first: half a deletion must not look like a checkpoint
            doomed = old.rename(root / f".{old.name}.{os.getpid()}.tmp")
            shutil.rmtree(doomed)
    return place


def checkpoint_bytes(state: TrainingState, exports_parameters: bool = False) -> int:
    """What a checkpoint of `state` takes on the disk, but for a few kilobytes: parameters, their export, and the optimizer's state."""
    tensors, _ = flatten_optimizer(state.optimizer)
    parameters = sum(tensor.nbytes for tensor in state.parameters.values())
    average = 2 * sum(tensor.nbytes for tensor in state.average.values())
    optimizer = sum(tensor.nbytes for tensor in tensors.values())
    return parameters * (1 if exports_parameters else 2) + average + optimizer


def latest_checkpoint(root: Path, identity: str, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are what they were when written; a damaged one is named through `report` and passed over.

    Raises StageError when a checkpoint belongs to a run of another identity.
    """
    for place in reversed(checkpoints(root)):
        if not is_intact(place):
            report(f"checkpoint {place} is damaged and is passed over")
            continue
        found = checkpoint_identity(place)
        if found != identity:
            raise StageError(
                f"{place} belongs to another run (identity {found[:12]}, not {identity[:12]}); give each run a folder of its own"
            )
        return place
    return None


def checkpoints(root: Path) -> list[Path]:
    """Oldest first; of one step the rolling one."""
    places = (place for kind in get_args(CheckpointKind) for place in root.glob(f"{kind}-*"))
    return sorted(places, key=lambda place: (checkpoint_step(place), place.name))


def is_intact(place: Path) -> bool:
    """Whether a checkpoint's files are what they were when written."""
    try:
        digests: Mapping[str, str] = json.loads((place / STATE).read_bytes())["sha256"]
        return all(sha256_file(place / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, KeyError):
        return False


def checkpoint_step(place: Path) -> int:
    """The step in a checkpoint's name."""
    return int(place.name.partition("-")[2])


def checkpoint_identity(place: Path) -> str:
    """The identity of the run that a checkpoint belongs to."""
    identity: str = json.loads((place / STATE).read_bytes())["identity"]
    return identity


def adopt_checkpoint(source: Path, root: Path, identity: str, ancestor: Ancestor) -> None:
    """Make the intact checkpoint `source` of another run one of the run `identity`, whose checkpoints lie in `root`.

    What is not taken over is left out. Of another trajectory, it says so, for `load_checkpoint` to tell.
    """
    unfinished = root / f".{source.name}.{os.getpid()}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, unfinished, copy_function=link_or_copy)
    state = json.loads((unfinished / STATE).read_bytes())
    state |= {"identity": identity, "same_trajectory": ancestor.same_trajectory}
    if not ancestor.takes_optimizer:
        (unfinished / OPTIMIZER).unlink()
        del state["optimizer"], state["sha256"][OPTIMIZER]
    write_text_atomic(unfinished / STATE, json.dumps(state, indent=1))
    unfinished.rename(root / f"step-{state['step']:08d}")
    _flush(root)


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
        optimizer=unflatten_optimizer(load_file(place / OPTIMIZER), state["optimizer"])
        if "optimizer" in state
        else {},
        schedule=state["schedule"],
        scaler=state["scaler"],
        same_trajectory=state.get("same_trajectory", True),
        average=load_file(place / AVERAGE) if (place / AVERAGE).exists() else {},
    )


def require_same_parameters(state: TrainingState, parameters: Mapping[str, Tensor]) -> None:
    """Raise StageError unless `state` is of parameters of these names and shapes."""
    theirs, ours = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for tensors in (state.parameters, parameters)
    )
    if theirs == ours:
        return
    name = min(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    raise StageError(
        f"the checkpoint of step {state.step} holds other parameters than this run trains: {name} is {theirs.get(name, 'not there')}, and "
        f"not {ours.get(name, 'trained')}. Name a checkpoint of the same adapter in resume_from_checkpoint, or delete it to train from the start"
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
    if state.average:
        save_file(_on_cpu(state.average), folder / AVERAGE)
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


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
