"""The release: one folder with exactly what is, or would be, published, and the checks that its weights can be used."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.files.atomic_files import atomic_path, sha256_path, write_text_atomic
from sdxl_pipeline.files.disk_space import require_space
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.release.release_inputs import (
    LINEAGE_FILE,
    ExportError,
    ReleaseError,
    ReleaseInputs,
    portable_evaluation,
    portable_lineage,
    portable_settings,
    require_portable,
)
from sdxl_pipeline.runtime.evaluation_report import EvaluationReport
from sdxl_pipeline.runtime.specs import TrainedLora, ValidationImage, ValidationPrompt

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
UNET_FOLDER = "unet"
CARD_FILE = "README.md"
SETTINGS_FILE = "training_config.json"  # the Hub takes a config.json for that of a transformers model
REPORT_FILE = "eval.json"
GALLERY_FILE = "gallery.png"
LOSS_PLOT_FILE = "loss_by_timestep.png"
LOSS_CURVE_FILE = "training_loss.png"
IMAGES_FOLDER = "images"
_RESERVED_STEMS = {
    Path(name).stem
    for name in (SETTINGS_FILE, REPORT_FILE, LINEAGE_FILE, GALLERY_FILE, LOSS_PLOT_FILE, LOSS_CURVE_FILE)
}
"""Weights of such a name get no sidecar files, which would overwrite these files."""


def build_release(folder: Path, inputs: ReleaseInputs) -> Path:
    """Build the release in a temporary folder, rename it to `folder`, which replaces an earlier release, and return `folder`.

    Raises ReleaseError when the weights are not the evaluated ones, when a local path or the Hub token would be published, or when
    `folder` holds files that are not a release; ExportError and UserError when the checkpoint of a trained UNet cannot be written.
    """
    weights, digest = Path(inputs.lora.weights_path), inputs.lora.weights_sha256
    if inputs.report.lora_sha256 != digest or sha256_path(weights) != digest:
        raise ReleaseError(
            f"{weights} differs from the evaluated weights. Materialize lora and evaluation again"
        )
    if folder.exists() and any(folder.iterdir()) and not (folder / LINEAGE_FILE).is_file():
        raise ReleaseError(
            f"{folder} holds files that are not a release (it has no {LINEAGE_FILE}) and would be replaced. Move them, or change output_dir"
        )
    require_space(folder, _required_bytes(inputs.lora, inputs.report), "the release")
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        _write_files(staging, replace(inputs, lineage=portable_lineage(inputs.lineage)))
        require_portable(staging, _secrets(), _local_paths(inputs))
        _replace(folder, staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def verify_export(path: Path, base_model: ResolvedModel) -> int:
    """Return the number of layers that an adapter file changes, or of weights in a UNet folder.

    Raises ExportError unless `path` loads, every tensor belongs to a layer of the base model, all values are finite, and an adapter has
    some update that is not zero. Only the base model's architecture is loaded.
    """
    if path.is_dir():
        return _verify_unet(path, base_model)
    from sdxl_pipeline.models.adapters.adapter_files import AdapterError
    from sdxl_pipeline.release.adapter_check import count_changed_layers

    try:
        return count_changed_layers(path, base_model)
    except AdapterError as error:
        raise ExportError(str(error)) from error


def verify_formats(lora: TrainedLora, base_model: ResolvedModel, settings: TrainingSettings) -> str:
    """Return in one sentence what the files contain. Raise ExportError unless the programs of `lora_format` load them completely."""
    if lora.weights_kind == "unet":
        return f"{_verify_unet(Path(lora.weights_path), base_model)} weights fit the base model's UNet."
    from sdxl_pipeline.release.formats import FormatError
    from sdxl_pipeline.release.formats.format_check import check_files

    try:
        return check_files(lora, base_model, settings.lora_format)
    except FormatError as error:
        raise ExportError(str(error)) from error


def _verify_unet(folder: Path, base_model: ResolvedModel) -> int:
    from safetensors import SafetensorError

    from sdxl_pipeline.release.unet_folder import mismatched_weights, non_finite_weights

    try:
        mismatched = mismatched_weights(folder, base_model)
        weights, non_finite = non_finite_weights(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise ExportError(f"{folder} does not load back: {error}") from error
    if mismatched:
        raise ExportError(
            f"{folder} does not fit the UNet of {base_model.source}: {len(mismatched)} missing, unexpected or misshapen weights, such as "
            f"{mismatched[0]}"
        )
    if non_finite:
        raise ExportError(
            f"{folder}: {len(non_finite)} weights hold NaN or infinity, such as {non_finite[0]}. The training diverged"
        )
    return weights


def _write_files(folder: Path, inputs: ReleaseInputs) -> None:
    # model_card imports the Hub's client, which is too slow to import with the asset graph
    from sdxl_pipeline.release.model_card import image_counts, model_card

    report, lora = inputs.report, inputs.lora
    # without validation prompts the gallery was generated from captions
    with_prompts = bool(inputs.prompts) or inputs.settings.metadata_include_captions
    images = _copy_images(folder, released_images(report))
    preview = folder / next(iter(images)) if images else None
    files = _write_weights(folder, inputs, preview)
    main_file = folder / files.get("single_file", WEIGHTS_FILE)
    if main_file.stem not in _RESERVED_STEMS:
        _write_sidecars(main_file, inputs, preview)
        files["sidecar"] = main_file.with_suffix(".json").name
    files |= {
        "settings": SETTINGS_FILE,
        "evaluation": REPORT_FILE,
        "lineage": LINEAGE_FILE,
    }
    if with_prompts:  # the grid shows the prompts
        shutil.copyfile(report.gallery_path, folder / GALLERY_FILE)
        files["gallery"] = GALLERY_FILE
    plots = (
        ("loss_plot", report.loss_plot_path, LOSS_PLOT_FILE),
        ("loss_curve", lora.loss_curve_path, LOSS_CURVE_FILE),
    )
    for role, source, name in plots:
        if source is not None and Path(source).is_file():
            shutil.copyfile(source, folder / name)
            files[role] = name
    full_report = json.loads(Path(report.report_path).with_suffix(".json").read_text(encoding="utf-8"))
    published_report = portable_evaluation(full_report, with_prompts)
    _write_json(folder / SETTINGS_FILE, portable_settings(inputs.settings))
    _write_json(folder / REPORT_FILE, published_report)
    if with_prompts:
        prompts = inputs.prompts or [
            ValidationPrompt(name=text, prompt=text) for text in dict.fromkeys(images.values())
        ]
    else:
        prompts, images = (), dict.fromkeys(images, "")
    card = model_card(replace(inputs, prompts=prompts), published_report, images, files)
    write_text_atomic(folder / CARD_FILE, card)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} | {
        LINEAGE_FILE
    }
    # the next release deletes those of these files that it lacks
    lineage = {**inputs.lineage, "images": image_counts(lora), "files": sorted(names)}
    _write_json(folder / LINEAGE_FILE, lineage)


def released_images(report: EvaluationReport) -> list[ValidationImage]:
    """Return the images of the selected checkpoint at full strength."""
    trained = [image for image in report.images if image.step > 0 and image.scale == 1]
    return [image for image in trained if image.step == report.step] or trained


def _write_weights(folder: Path, inputs: ReleaseInputs, preview: Path | None) -> dict[str, str]:
    """Write the weights in every format of the release; return the names of diffusers' (weights) and the other programs' (single_file)."""
    lora, lora_format = inputs.lora, inputs.settings.lora_format
    weights = Path(lora.weights_path)
    if lora.weights_kind == "unet":
        # single_file imports torch, which is too slow to import with the asset graph
        from sdxl_pipeline.release.single_file import (
            checkpoint_metadata,
            require_loadable,
            write_checkpoint,
        )

        name = f"{inputs.project}.safetensors"
        metadata = checkpoint_metadata(inputs, preview)
        write_checkpoint(folder / name, weights, inputs.base_model, inputs.settings, metadata)
        require_loadable(folder / name, weights, inputs.base_model)
        shutil.copytree(weights, folder / UNET_FOLDER)
        return {"weights": UNET_FOLDER, "single_file": name}
    files = {}
    if lora.kohya_path is not None and lora_format != "diffusers":
        files["single_file"] = Path(lora.kohya_path).name
        shutil.copyfile(lora.kohya_path, folder / files["single_file"])
    if lora_format != "comfyui" or not files:
        files["weights"] = WEIGHTS_FILE
        shutil.copyfile(weights, folder / WEIGHTS_FILE)
    return files


def _write_sidecars(weights: Path, inputs: ReleaseInputs, preview: Path | None) -> None:
    """Write `<name>.json` and, if there is a preview image, `<name>.png` beside the weights file `<name>.safetensors`.

    A1111, Forge and InvokeAI show them as the description, trigger words and preview of the weights.
    """
    entries: dict[str, Any] = {
        "description": inputs.description,
        "notes": inputs.settings.model_card_note or "",
        "sd version": "SDXL",
        "activation text": ", ".join(inputs.trigger_words),
        "preferred weight": 1.0,
        "negative text": next((p.negative_prompt for p in inputs.prompts if p.negative_prompt), ""),
    }
    if inputs.lora.weights_kind == "unet":
        del entries["preferred weight"]  # a checkpoint has none
    _write_json(weights.with_suffix(".json"), entries)
    if preview is not None:
        with Image.open(preview) as image, atomic_path(weights.with_suffix(".png")) as temporary:
            image.save(temporary, format="PNG")


def _write_json(path: Path, value: Any) -> None:
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _copy_images(folder: Path, images: Sequence[ValidationImage]) -> dict[str, str]:
    """Copy the trained model's images; return the prompt of each prompt's first image by its path in the release."""
    (folder / IMAGES_FOLDER).mkdir()
    first_by_prompt: dict[str, str] = {}
    for image in images:
        name = f"{IMAGES_FOLDER}/{Path(image.path).name}"
        shutil.copyfile(image.path, folder / name)
        first_by_prompt.setdefault(image.prompt, name)
    return {name: prompt for prompt, name in first_by_prompt.items()}


def _required_bytes(lora: TrainedLora, report: EvaluationReport) -> int:
    """Return the size of the files that the release copies."""
    copied = [
        Path(lora.weights_path),
        Path(report.gallery_path),
        *(Path(image.path) for image in report.images),
    ]
    files = [file for path in copied for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in files if file.is_file())


def _replace(folder: Path, staging: Path) -> None:
    """Rename `staging` to `folder`. A process killed in between leaves the previous release in a hidden folder beside it."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    staging.rename(folder)
    for previous in folder.parent.glob(f".{folder.name}.*.old"):
        shutil.rmtree(previous, ignore_errors=True)


def _secrets() -> list[str]:
    from huggingface_hub import get_token

    return [get_token() or ""]


def _local_paths(inputs: ReleaseInputs) -> list[Path]:
    paths = [
        Path(inputs.lora.run_dir),
        Path(inputs.report.report_path).parent,
        Path(inputs.base_model.path).parent,
        Path.cwd(),
    ]
    return [*paths, *(path.parent for path in paths), Path.home()]
