"""Checkpoints: everything a run needs to resume exactly.

A checkpoint is a folder of safetensors and one JSON file, written under a temporary name and renamed: it is complete or absent. It
contains no pickle and no random state, since every random choice is a function of the step (`training.rng`).
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_pipeline.config.schema.checkpoints import CHECKPOINT_STATE
from sdxl_pipeline.files.atomic_files import link_or_copy, sha256_file, write_text_atomic
from sdxl_pipeline.files.disk_space import require_space
from sdxl_pipeline.runtime.specs import RunLineage
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.checkpoint.checkpoint_files import (
    AVERAGE,
    CHECKPOINT_NAME,
    OPTIMIZER,
    PARAMETERS,
    STATE_DIGEST,
    checkpoint_identity,
    checkpoint_step,
    files_in,
    is_intact,
    list_checkpoints,
    state_digest,
    step_in_name,
)
from sdxl_pipeline.training.checkpoint.checkpoint_schedule import CheckpointKind
from sdxl_pipeline.training.checkpoint.free_disk_monitor import CHECKPOINT_ADVICE
from sdxl_pipeline.training.checkpoint.optimizer_state import flatten_optimizer, unflatten_optimizer

FORMAT = 2

_UNFINISHED = re.compile(rf"\.{CHECKPOINT_NAME.pattern}\.\d+\.tmp")
"""The temporary folder of a killed writer."""


@dataclass(frozen=True)
class TrainingState:
    """The mutable state of a run between two optimizer steps."""

    step: int  # completed optimizer steps
    seconds: float  # total duration over all sessions
    training_seconds: float  # of these, in optimizer steps
    parameters: dict[str, Tensor]  # trained parameters, by name
    optimizer: dict[str, Any]  # torch's state_dict
    schedule: dict[str, Any]
    scaler: dict[str, Any] | None  # loss scaling, under fp16
    average: dict[str, Tensor] = field(default_factory=dict)  # the EMA of the parameters, under use_ema
    epochs: float | None = None  # over the training images; None in checkpoints of earlier versions
    samples: int | None = None  # images trained on, counting repeats; likewise
    same_trajectory: bool = True  # False for a warm start; `optimizer` may be empty then


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
    best_step: int | None = None,
) -> Path:
    """Write `root/step-00000500`, or `rolling-...` by its kind, and delete the oldest checkpoints of the kind beyond `limit`.

    The checkpoints of `best_step`, the step of the best eval loss, are retained; those of the kind "best" of earlier steps are not.

    `export` writes the weights in their published format, `export_bytes` in total, into the given folder and returns their path. With
    `exports_parameters` that path is a folder of safetensors with `state.parameters` by name, which are then not written again. `lineage`
    is that of the run, for readers that find the checkpoint elsewhere. An intact checkpoint of the same step is left unchanged, since the
    same step of the same run has the same content; a corrupt one is replaced. Raises DiskFullError before it would fill the disk.
    """
    path = root / f"{kind}-{state.step:08d}"
    if not is_intact(path):
        root.mkdir(parents=True, exist_ok=True)
        require_space(
            root,
            checkpoint_bytes(state, exports_parameters, export_bytes),
            f"the checkpoint of step {state.step}",
            CHECKPOINT_ADVICE,
        )
        if path.exists():
            _delete(path)
        temporary = _temporary_path(path)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            _write(temporary, identity, state, export, exports_parameters, lineage)
        except OSError:  # an incomplete checkpoint would occupy the space that is missing
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        temporary.rename(path)
        _flush(root)
    checkpoints = list_checkpoints(root)
    surplus = (
        [] if limit is None else [other for other in checkpoints if other.name.startswith(kind)][:-limit]
    )
    superseded = [other for other in checkpoints if other.name.startswith("best")]
    for old in {*surplus, *superseded}:
        if step_in_name(old) != best_step:
            _delete(old)
    return path


def checkpoint_bytes(state: TrainingState, exports_parameters: bool, export_bytes: int) -> int:
    """Return the size of a checkpoint of `state` on disk, to within a few kilobytes: export, parameters, their average and optimizer."""
    optimizer, _ = flatten_optimizer(state.optimizer)
    parameters = {} if exports_parameters else state.parameters
    tensors = (*parameters.values(), *state.average.values(), *optimizer.values())
    return export_bytes + sum(tensor.nbytes for tensor in tensors)


def latest_checkpoint(root: Path, identity: str, report: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint whose files are unchanged since they were written; corrupt ones are skipped and logged through `report`.

    Raises UserError if a checkpoint belongs to a run of another identity.
    """
    for path in reversed(list_checkpoints(root)):
        if not is_intact(path):
            report(f"checkpoint {path} is corrupt and is skipped")
            continue
        found = checkpoint_identity(path)
        if found != identity:
            raise UserError(
                f"{path} belongs to another run (identity {found[:12]}, not {identity[:12]}); give each run its own folder"
            )
        return path
    return None


def import_checkpoint(source: Path, root: Path, lineage: RunLineage) -> None:
    """Copy an intact checkpoint `source` of the run's ancestor into `root`, the checkpoints of the run of `lineage`.

    The optimizer state is left out if the ancestor's is not compatible. A checkpoint of another trajectory is marked as such for
    `load_checkpoint`.
    """
    ancestor = lineage.ancestor
    if ancestor is None:
        raise ValueError(f"the lineage of {lineage.identity} has no ancestor to import {source} from")
    path = root / f"step-{checkpoint_step(source):08d}"
    root.mkdir(parents=True, exist_ok=True)
    if path.exists():  # corrupt, otherwise the run would have resumed from it
        _delete(path)
    temporary = _temporary_path(path)
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=link_or_copy)
    state = json.loads((temporary / CHECKPOINT_STATE).read_bytes())
    state |= {
        "identity": lineage.identity,
        "lineage": lineage.model_dump(mode="json"),
        "same_trajectory": ancestor.same_trajectory,
    }
    if not ancestor.takes_optimizer:
        (temporary / OPTIMIZER).unlink()
        del state["optimizer"], state["sha256"][OPTIMIZER]
    del state[STATE_DIGEST]
    write_text_atomic(temporary / CHECKPOINT_STATE, _state_json(state))
    temporary.rename(path)
    _flush(root)


def load_checkpoint(path: Path) -> TrainingState:
    """Read a checkpoint, with tensors on the CPU. Raises UserError for another format version."""
    state = json.loads((path / CHECKPOINT_STATE).read_bytes())
    if state["format"] != FORMAT:
        raise UserError(
            f"{path} was written in format {state['format']}, this version reads {FORMAT}; delete it to train from the start"
        )
    return TrainingState(
        step=state["step"],
        seconds=state["seconds"],
        training_seconds=state["training_seconds"],
        parameters=_read_parameters(path / state.get("parameters", PARAMETERS)),
        optimizer=unflatten_optimizer(load_file(path / OPTIMIZER), state["optimizer"])
        if "optimizer" in state
        else {},
        schedule=state["schedule"],
        scaler=state["scaler"],
        same_trajectory=state.get("same_trajectory", True),
        average=load_file(path / AVERAGE) if (path / AVERAGE).exists() else {},
        epochs=state.get("epochs"),
        samples=state.get("samples"),
    )


def parameter_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's trained parameters by name, read from the headers of its files.

    Raises OSError, ValueError, KeyError or SafetensorError for a corrupt one.
    """
    stored = path / json.loads((path / CHECKPOINT_STATE).read_bytes()).get("parameters", PARAMETERS)
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in _shards(stored):
        with safe_open(shard, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def require_same_parameters(state: TrainingState, parameters: Mapping[str, Tensor]) -> None:
    """Raise UserError unless `state` has parameters of these names and shapes."""
    checkpoint, trained = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for tensors in (state.parameters, parameters)
    )
    if checkpoint == trained:
        return
    name = min(
        name for name in checkpoint.keys() | trained.keys() if checkpoint.get(name) != trained.get(name)
    )
    raise UserError(
        f"the checkpoint of step {state.step} holds other parameters than this run trains: {name} has shape {checkpoint.get(name, 'absent')} "
        f"there and {trained.get(name, 'absent')} here. Set resume_from_checkpoint to a checkpoint of the same adapter, or delete it to train from the start"
    )


def clear_checkpoints(root: Path, unfinished_only: bool) -> None:
    """Delete the temporary folders of killed writers, or all checkpoints. Only for the holder of the run's lock.

    Other files in the folder are left alone.
    """
    if root.is_dir():
        for path in list(root.iterdir()):
            if _UNFINISHED.fullmatch(path.name):
                shutil.rmtree(path)
    for path in () if unfinished_only else list_checkpoints(root):
        _delete(path)


def _temporary_path(path: Path) -> Path:
    """Return the path at which this process writes or deletes the checkpoint at `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _delete(path: Path) -> None:
    # renamed first, so that an interrupted deletion does not leave an apparent checkpoint
    shutil.rmtree(path.rename(_temporary_path(path)))


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
    tensors, metadata = flatten_optimizer(state.optimizer)
    save_file(_on_cpu(tensors), folder / OPTIMIZER)
    if state.average:
        save_file(_on_cpu(state.average), folder / AVERAGE)
    content = {
        "format": FORMAT,
        "identity": identity,
        "lineage": lineage and lineage.model_dump(mode="json"),
        "step": state.step,
        **({} if state.epochs is None else {"epochs": state.epochs, "samples": state.samples}),
        "seconds": state.seconds,
        "training_seconds": state.training_seconds,
        "parameters": parameters.name,
        "optimizer": metadata,
        "schedule": state.schedule,
        "scaler": state.scaler,
        "sha256": {file.relative_to(folder).as_posix(): sha256_file(file) for file in files_in(folder)},
    }
    (folder / CHECKPOINT_STATE).write_text(_state_json(content))
    for path in (*files_in(folder), *(each for each in folder.rglob("*") if each.is_dir()), folder):
        _flush(path)


def _state_json(content: Mapping[str, Any]) -> str:
    return json.dumps({**content, STATE_DIGEST: state_digest(json.loads(json.dumps(content)))}, indent=1)


def _read_parameters(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, or of all safetensors in a folder, memory-mapped until they are used."""
    return {name: tensor for shard in _shards(path) for name, tensor in load_file(shard).items()}


def _shards(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
