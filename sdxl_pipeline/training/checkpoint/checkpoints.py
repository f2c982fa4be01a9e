"""Checkpoints: everything a run needs to go on as if nothing had happened.

A checkpoint is a folder of safetensors and one JSON file, made beside its place and renamed into it: it is whole or absent. There is
no pickle in it and no random state, since every random choice is a function of the step (`training.draws`).
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_pipeline.config.schema.checkpoints import CHECKPOINT_STATE
from sdxl_pipeline.files.atomic_files import link_or_copy, sha256_file, write_text_atomic
from sdxl_pipeline.files.disk_space import require_space
from sdxl_pipeline.runtime.specs import RunLineage
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.checkpoint.checkpoint_schedule import CheckpointKind
from sdxl_pipeline.training.checkpoint.free_disk_monitor import CHECKPOINT_ADVICE
from sdxl_pipeline.training.checkpoint.optimizer_state import flatten_optimizer, unflatten_optimizer

CHECKPOINTS = "checkpoints"
"""The folder of a run's checkpoints in the run's own."""

FORMAT = 2
STATE_DIGEST = "state_sha256"
"""The key in state.json of the digest of all its other keys."""
PARAMETERS = "trainable.safetensors"
OPTIMIZER = "optimizer.safetensors"
AVERAGE = "average.safetensors"

_KINDS = "|".join(get_args(CheckpointKind))
_NAME = re.compile(rf"({_KINDS})-\d{{8,}}")
_UNFINISHED = re.compile(rf"\.{_NAME.pattern}\.\d+\.tmp")
"""What a writer leaves that was killed."""


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
    export_bytes: int = 0,
    kind: CheckpointKind = "step",
    lineage: RunLineage | None = None,
) -> Path:
    """Write `root/step-00000500`, or `rolling-...` by its kind, and delete the oldest checkpoints of the kind beyond `limit`.

    `export` writes the weights as users load them, `export_bytes` in all, into the folder it is given, and gives their place. With
    `exports_parameters` this is a folder whose safetensors hold `state.parameters` by name, which then are not written a second time.
    `lineage` is that of the run, for whoever finds the checkpoint elsewhere. An intact checkpoint of the same step is left alone, since
    the same step of the same run has the same content; a damaged one is replaced. Raises DiskFullError before it would fill the disk.
    """
    place = root / f"{kind}-{state.step:08d}"
    if not is_intact(place):
        root.mkdir(parents=True, exist_ok=True)
        require_space(
            root,
            checkpoint_bytes(state, exports_parameters, export_bytes),
            f"the checkpoint of step {state.step}",
            CHECKPOINT_ADVICE,
        )
        if place.exists():
            _delete(place)
        unfinished = _unfinished(place)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            _write(unfinished, identity, state, export, exports_parameters, lineage)
        except OSError:  # half a checkpoint would keep the room that is lacking
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        unfinished.rename(place)
        _flush(root)
    if limit is not None:
        for old in [other for other in checkpoints(root) if other.name.startswith(kind)][:-limit]:
            _delete(old)
    return place


def checkpoint_bytes(state: TrainingState, exports_parameters: bool, export_bytes: int) -> int:
    """What a checkpoint of `state` takes on the disk, but for a few kilobytes: the export, parameters, their average, and the optimizer."""
    optimizer, _ = flatten_optimizer(state.optimizer)
    parameters = {} if exports_parameters else state.parameters
    held = (*parameters.values(), *state.average.values(), *optimizer.values())
    return export_bytes + sum(tensor.nbytes for tensor in held)


def latest_checkpoint(root: Path, identity: str, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are what they were when written; a damaged one is named through `report` and passed over.

    Raises UserError when a checkpoint belongs to a run of another identity.
    """
    for place in reversed(checkpoints(root)):
        if not is_intact(place):
            report(f"checkpoint {place} is damaged and is passed over")
            continue
        found = checkpoint_identity(place)
        if found != identity:
            raise UserError(
                f"{place} belongs to another run (identity {found[:12]}, not {identity[:12]}); give each run a folder of its own"
            )
        return place
    return None


def checkpoints(root: Path) -> list[Path]:
    """Oldest first; of one step the rolling one. What else lies there, a copy under another name say, is none."""
    places = root.iterdir() if root.is_dir() else ()
    found = (place for place in places if _NAME.fullmatch(place.name) and place.is_dir())
    return sorted(found, key=lambda place: (step_in_name(place), place.name))


def is_intact(place: Path) -> bool:
    """Return whether all files of a checkpoint, its state.json included, are what they were when written, and no weights were added."""
    try:
        state: dict[str, Any] = json.loads((place / CHECKPOINT_STATE).read_bytes())
        digests: Mapping[str, str] = state["sha256"]
        weights = {file.relative_to(place).as_posix() for file in place.rglob("*.safetensors")}
        return (
            state.pop(STATE_DIGEST) == _state_digest(state)
            and weights <= digests.keys()
            and all(sha256_file(place / name) == digest for name, digest in digests.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def exported_files(place: Path) -> list[Path]:
    """Return the files of a checkpoint that are the weights as users load them, and not what only this trainer reads."""
    return [
        file for file in _files(place) if file.name not in (CHECKPOINT_STATE, PARAMETERS, OPTIMIZER, AVERAGE)
    ]


def step_in_name(place: Path) -> int:
    """The step in the name of one of `checkpoints`."""
    return int(place.name.partition("-")[2])


def checkpoint_step(place: Path) -> int:
    """The step of an intact checkpoint, whatever its folder is called."""
    step: int = json.loads((place / CHECKPOINT_STATE).read_bytes())["step"]
    return step


def checkpoint_identity(place: Path) -> str:
    """The identity of the run that a checkpoint belongs to."""
    identity: str = json.loads((place / CHECKPOINT_STATE).read_bytes())["identity"]
    return identity


def import_checkpoint(source: Path, root: Path, lineage: RunLineage) -> None:
    """Make the intact checkpoint `source` of its ancestor one of the run of `lineage`, whose checkpoints lie in `root`.

    What is not taken over is left out. Of another trajectory, it says so, for `load_checkpoint` to tell.
    """
    ancestor = lineage.ancestor
    if ancestor is None:
        raise ValueError(f"{source} is no ancestor's")
    place = root / f"step-{ancestor.step:08d}"
    root.mkdir(parents=True, exist_ok=True)
    if place.exists():  # damaged, or the run would go on from it
        _delete(place)
    unfinished = _unfinished(place)
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(source, unfinished, copy_function=link_or_copy)
    state = json.loads((unfinished / CHECKPOINT_STATE).read_bytes())
    state |= {
        "identity": lineage.identity,
        "lineage": lineage.model_dump(mode="json"),
        "same_trajectory": ancestor.same_trajectory,
    }
    if not ancestor.takes_optimizer:
        (unfinished / OPTIMIZER).unlink()
        del state["optimizer"], state["sha256"][OPTIMIZER]
    del state[STATE_DIGEST]
    write_text_atomic(unfinished / CHECKPOINT_STATE, _state_json(state))
    unfinished.rename(place)
    _flush(root)


def load_checkpoint(place: Path) -> TrainingState:
    """Read a checkpoint, tensors on the CPU."""
    state = json.loads((place / CHECKPOINT_STATE).read_bytes())
    if state["format"] != FORMAT:
        raise UserError(
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


def parameter_shapes(place: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's trained parameters by name, read from its files' headers.

    Raises OSError, ValueError, KeyError or SafetensorError for a damaged one.
    """
    stored = place / json.loads((place / CHECKPOINT_STATE).read_bytes()).get("parameters", PARAMETERS)
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in _shards(stored):
        with safe_open(shard, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def require_same_parameters(state: TrainingState, parameters: Mapping[str, Tensor]) -> None:
    """Raise UserError unless `state` is of parameters of these names and shapes."""
    theirs, ours = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for tensors in (state.parameters, parameters)
    )
    if theirs == ours:
        return
    name = min(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    raise UserError(
        f"the checkpoint of step {state.step} holds other parameters than this run trains: {name} is {theirs.get(name, 'not there')}, and "
        f"not {ours.get(name, 'trained')}. Name a checkpoint of the same adapter in resume_from_checkpoint, or delete it to train from the start"
    )


def clear_checkpoints(root: Path, unfinished_only: bool) -> None:
    """Delete what a killed writer left half done, or all checkpoints. Only for the holder of the run's lock.

    What else lies in the folder is not the run's, and stays.
    """
    if root.is_dir():
        for place in list(root.iterdir()):
            if _UNFINISHED.fullmatch(place.name):
                shutil.rmtree(place)
    for place in () if unfinished_only else checkpoints(root):
        _delete(place)


def _unfinished(place: Path) -> Path:
    """Where this process makes or takes apart what is whole under the name of `place`."""
    return place.with_name(f".{place.name}.{os.getpid()}.tmp")


def _delete(place: Path) -> None:
    # renamed first: half a deletion must not look like a checkpoint
    shutil.rmtree(place.rename(_unfinished(place)))


def _write(
    folder: Path,
    identity: str,
    state: TrainingState,
    export: Callable[[Path], Path],
    exports_parameters: bool,
    lineage: RunLineage | None,
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
        "lineage": lineage and lineage.model_dump(mode="json"),
        "step": state.step,
        "seconds": state.seconds,
        "training_seconds": state.training_seconds,
        "parameters": parameters.name,
        "optimizer": rest,
        "schedule": state.schedule,
        "scaler": state.scaler,
        "sha256": {file.relative_to(folder).as_posix(): sha256_file(file) for file in _files(folder)},
    }
    (folder / CHECKPOINT_STATE).write_text(_state_json(content))
    for place in (*_files(folder), *(path for path in folder.rglob("*") if path.is_dir()), folder):
        _flush(place)


def _state_json(content: Mapping[str, Any]) -> str:
    return json.dumps({**content, STATE_DIGEST: _state_digest(json.loads(json.dumps(content)))}, indent=1)


def _state_digest(content: Any) -> str:
    """Return the hex SHA-256 of state.json's content as it was parsed, whatever its spelling."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _read_parameters(place: Path) -> dict[str, Tensor]:
    """Of a file, or of all the safetensors of a folder. Mapped into memory, and not read before they are used."""
    return {name: tensor for shard in _shards(place) for name, tensor in load_file(shard).items()}


def _shards(place: Path) -> list[Path]:
    return sorted(place.glob("*.safetensors")) if place.is_dir() else [place]


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
