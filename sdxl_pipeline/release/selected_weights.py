"""The files of the selected checkpoint, as those of a finished run that ended with it. Imports no torch unless a file must be written."""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Final

from sdxl_pipeline.files.atomic_files import link_or_copy, sha256_path
from sdxl_pipeline.release.formats import FormatError
from sdxl_pipeline.release.formats.kohya_file import ensure_kohya_file
from sdxl_pipeline.release.release_inputs import ReleaseError
from sdxl_pipeline.runtime.specs import EMA_FOLDER, CheckpointWeights, TrainedLora, TrainSpec

SELECTED: Final = "selected"
"""Subfolder of a run with the files of its selected checkpoints."""


def selected_lora(lora: TrainedLora, weights: CheckpointWeights | None, spec: TrainSpec) -> TrainedLora:
    """Return the manifest of a run as if it had ended with the weights of one of its checkpoints; None selects the final weights.

    The files are in `<run_dir>/selected/step-00000240`, with `-ema` for the average: a checkpoint's own folder must not change, and is
    deleted with checkpoints_total_limit. Raises ReleaseError if the weights are not those that the evaluation recorded.
    """
    if weights is None or (weights.is_final and weights.weights == lora.released_weights):
        return lora
    suffix = f"-{EMA_FOLDER}" if weights.weights == "ema" else ""
    folder = Path(lora.run_dir) / SELECTED / f"step-{weights.step:08d}{suffix}"
    path = folder / Path(weights.path).name
    if not path.exists() or sha256_path(path) != weights.sha256:
        _copy_weights(weights, folder)
    selected = lora.model_copy(
        update={
            "weights_path": str(path),
            "weights_sha256": weights.sha256,
            "released_weights": weights.weights,
            "steps": weights.step,
            "epochs": weights.epochs,
            "samples": weights.samples,
            **dict.fromkeys(("kohya_path", "kohya_sha256", "kohya_dtype", "dora_approximation")),
        }
    )
    if lora.weights_kind == "unet" or spec.settings.lora_format == "diffusers":
        return selected
    with suppress(FormatError):  # no file, as after the training: the check of the formats fails and says why
        file = ensure_kohya_file(spec, selected, path, _image_of(lora, weights))
        return selected.model_copy(
            update={
                "kohya_path": str(file.path),
                "kohya_sha256": file.sha256,
                "kohya_dtype": file.dtype,
                "dora_approximation": file.dora_approximation,
            }
        )
    return selected


def _copy_weights(weights: CheckpointWeights, folder: Path) -> None:
    source = Path(weights.path)
    if not source.exists() or sha256_path(source) != weights.sha256:
        raise ReleaseError(
            f"{source} is missing, or is not the checkpoint that was evaluated. Materialize evaluation again; if the checkpoint was deleted, it "
            "selects another one"
        )
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        if source.is_dir():
            shutil.copytree(source, staging / source.name, copy_function=link_or_copy)
        else:
            link_or_copy(source, staging / source.name)
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _image_of(lora: TrainedLora, weights: CheckpointWeights) -> Path | None:
    """Return a validation image of the checkpoint's weights; None if none was generated at its step."""
    from sdxl_pipeline.training.optim.ema import EMA_LABEL

    averaged = weights.weights == "ema"
    paths = [
        Path(image.path)
        for image in lora.validation_images
        if image.step == weights.step and image.name.endswith(EMA_LABEL) == averaged
    ]
    return next((path for path in paths if path.is_file()), None)
