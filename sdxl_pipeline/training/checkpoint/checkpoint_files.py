"""The files of a run's checkpoints, without reading their tensors, and the published weights among them. Imports no torch."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal, get_args

from sdxl_pipeline.config.schema.checkpoints import CHECKPOINT_STATE
from sdxl_pipeline.files.atomic_files import sha256_file, sha256_path
from sdxl_pipeline.runtime.specs import EMA_FOLDER, CheckpointWeights, TrainedLora
from sdxl_pipeline.training.checkpoint.checkpoint_schedule import CheckpointKind

CHECKPOINTS = "checkpoints"
"""Subfolder of a run with its checkpoints."""

STATE_DIGEST = "state_sha256"
"""Key in state.json: the digest of all other keys."""
PARAMETERS = "trainable.safetensors"
OPTIMIZER = "optimizer.safetensors"
AVERAGE = "average.safetensors"

CHECKPOINT_NAME = re.compile(rf"({'|'.join(get_args(CheckpointKind))})-\d{{8,}}")
"""Names of the folders of checkpoints, such as step-00000500."""

_FOLDERS: Final[Mapping[Literal["trained", "ema"], str]] = {"trained": "", "ema": EMA_FOLDER}


def list_checkpoints(root: Path) -> list[Path]:
    """Return the checkpoints in `root`, oldest first; for the same step the rolling one first. Other files and folders are ignored."""
    paths = root.iterdir() if root.is_dir() else ()
    found = (path for path in paths if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=lambda path: (step_in_name(path), path.name))


def is_intact(path: Path) -> bool:
    """Return whether all files of a checkpoint, including state.json, are unchanged since they were written, and no weights were added."""
    try:
        digests: Mapping[str, str] = _read_state(path)["sha256"]
        weights = {file.relative_to(path).as_posix() for file in path.rglob("*.safetensors")}
        return weights <= digests.keys() and all(
            sha256_file(path / name) == digest for name, digest in digests.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def exported_files(path: Path) -> list[Path]:
    """Return the files of a checkpoint in the published format, without those that only this trainer reads."""
    return [
        file for file in files_in(path) if file.name not in (CHECKPOINT_STATE, PARAMETERS, OPTIMIZER, AVERAGE)
    ]


def step_in_name(path: Path) -> int:
    """Return the step in the name of one of `list_checkpoints`."""
    return int(path.name.partition("-")[2])


def checkpoint_step(path: Path) -> int:
    """Return the step of an intact checkpoint, whatever the name of its folder."""
    step: int = json.loads((path / CHECKPOINT_STATE).read_bytes())["step"]
    return step


def checkpoint_identity(path: Path) -> str:
    """Return the identity of the run that a checkpoint belongs to."""
    identity: str = json.loads((path / CHECKPOINT_STATE).read_bytes())["identity"]
    return identity


def run_checkpoints(lora: TrainedLora) -> tuple[CheckpointWeights, ...]:
    """Return the published weights of a finished run's checkpoints by step, trained and EMA; those of `lora.weights_path` last.

    Only state.json of a checkpoint is read: verify `sha256` before loading the weights. Checkpoints of other runs are left out, also
    one that was imported from another trajectory, since its weights are a result of other settings. For a checkpoint of an earlier
    version epochs and samples are estimated from its step.
    """
    name = Path(lora.weights_path).name
    by_key: dict[tuple[int, str], CheckpointWeights] = {}
    for path in list_checkpoints(Path(lora.run_dir) / CHECKPOINTS):
        try:
            state = _read_state(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # corrupt
            continue
        own = state["identity"] == lora.identity and state.get("same_trajectory", True)
        if own and state["step"] < lora.steps:
            by_key |= {
                (found.step, found.weights): found for found in _exported_weights(path, name, state, lora)
            }
    final = list(_final_weights(lora, name))
    return (
        *sorted(by_key.values(), key=lambda each: (each.step, each.weights == lora.released_weights)),
        *final,
    )


def _exported_weights(
    path: Path, name: str, state: Mapping[str, Any], lora: TrainedLora
) -> Iterator[CheckpointWeights]:
    step, share = state["step"], state["step"] / lora.steps
    for weights, folder in _FOLDERS.items():
        digest = _exported_digest(state["sha256"], (PurePosixPath(folder) / name).as_posix())
        if digest is not None and (path / folder / name).exists():
            yield CheckpointWeights(
                step=step,
                epochs=state.get("epochs", lora.epochs * share),
                samples=state.get("samples", round(lora.samples * share)),
                weights=weights,
                path=str(path / folder / name),
                sha256=digest,
                is_final=False,
            )


def _exported_digest(digests: Mapping[str, str], name: str) -> str | None:
    """Return what `sha256_path` gives for a file or folder of a checkpoint, from the digests in its state.json; None if it has none."""
    if name in digests:
        return digests[name]
    paths = sorted(
        PurePosixPath(file) for file in digests if PurePosixPath(name) in PurePosixPath(file).parents
    )
    lines = [f"{digests[path.as_posix()]}  {path.relative_to(name).as_posix()}\n" for path in paths]
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else None


def _final_weights(lora: TrainedLora, name: str) -> Iterator[CheckpointWeights]:
    """Yield the weights at the end of the run: those of `lora.weights_path` last, before them the others of trained and EMA."""
    for weights in sorted(_FOLDERS, key=lambda each: each == lora.released_weights):
        is_released = weights == lora.released_weights
        path = Path(lora.weights_path) if is_released else Path(lora.run_dir) / _FOLDERS[weights] / name
        if is_released or path.exists():
            yield CheckpointWeights(
                step=lora.steps,
                epochs=lora.epochs,
                samples=lora.samples,
                weights=weights,
                path=str(path),
                sha256=lora.weights_sha256 if is_released else sha256_path(path),
                is_final=True,
            )


def _read_state(path: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint; raise an error of reading or ValueError if it has changed since it was written."""
    state: dict[str, Any] = json.loads((path / CHECKPOINT_STATE).read_bytes())
    if state.pop(STATE_DIGEST) != state_digest(state):
        raise ValueError(f"{path / CHECKPOINT_STATE} has changed")
    return state


def state_digest(content: Any) -> str:
    """Return the hex SHA-256 of the parsed content of state.json, independent of its formatting."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def files_in(folder: Path) -> list[Path]:
    """Return all files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
