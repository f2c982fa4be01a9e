"""The release: one folder that holds exactly what is, or would be, published, and the check that its weights can be used."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.files.atomic_files import sha256_path, write_text_atomic
from sdxl_pipeline.files.disk_space import require_space
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.release.sanitize import ReleaseError, portable_lineage, portable_settings, require_portable
from sdxl_pipeline.runtime.specs import EvaluationReport, TrainedLora, ValidationImage, ValidationPrompt

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
UNET_FOLDER = "unet"
CARD_FILE = "README.md"
SETTINGS_FILE = "training_config.json"  # not config.json: the Hub takes that for a transformers model
REPORT_FILE = "eval.json"
LINEAGE_FILE = "lineage.json"
GALLERY_FILE = "gallery.png"
LOSS_PLOT_FILE = "loss_by_timestep.png"
LOSS_CURVE_FILE = "training_loss.png"
IMAGES_FOLDER = "images"
_STEMS = {
    Path(name).stem
    for name in (SETTINGS_FILE, REPORT_FILE, LINEAGE_FILE, GALLERY_FILE, LOSS_PLOT_FILE, LOSS_CURVE_FILE)
}
"""A project of such a name gets no sidecars: they would take the place of these files."""


class ExportError(Exception):
    """Weights that their users could not use; the message says why."""


def build_release(
    folder: Path,
    *,
    project: str,
    base_model: ResolvedModel,
    settings: TrainingSettings,
    lora: TrainedLora,
    report: EvaluationReport,
    prompts: Sequence[ValidationPrompt],
    trigger_words: Sequence[str],
    lineage: Mapping[str, Any],
) -> Path:
    """Put the release together beside `folder` and rename it there, in the place of an earlier one; gives `folder`.

    `lineage` is plain data that goes into lineage.json as it is, but for local paths. Raises ReleaseError when the weights are not those
    that were evaluated, when a local path or the Hub token would be published, or when `folder` holds something that is no release;
    ExportError and UserError when the checkpoint of a trained UNet cannot be written.
    """
    if (
        report.lora_sha256 != lora.weights_sha256
        or sha256_path(Path(lora.weights_path)) != lora.weights_sha256
    ):
        raise ReleaseError(
            f"{lora.weights_path} is not what was evaluated. Materialize lora and evaluation again"
        )
    if folder.exists() and any(folder.iterdir()) and not (folder / LINEAGE_FILE).is_file():
        raise ReleaseError(
            f"{folder} holds files that are no release, and would be replaced by one. Move them, or change output_dir"
        )
    require_space(folder, _size(lora, report), "the release")
    staged = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        _fill(
            staged,
            project,
            base_model,
            settings,
            lora,
            report,
            prompts,
            trigger_words,
            portable_lineage(lineage),
        )
        require_portable(staged, _secrets(), _places(base_model, lora, report))
        _replace(folder, staged)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return folder


def verify_export(path: Path, base_model: ResolvedModel) -> int:
    """Raise ExportError unless the file of an adapter, or the folder of a UNet, loads back and every tensor finds its place in the base model.

    Nothing is loaded of the base model but its architecture. Numbers must be finite, and some update of an adapter must not be zero. Gives the number of layers that the file changes, or of weights in the folder.
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
    """Return what the files hold, in one sentence. Raise ExportError unless the programs that `lora_format` names load all of them."""
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

    from sdxl_pipeline.release.unet_folder import misfits, non_finite_weights

    try:
        astray = misfits(folder, base_model)
        weights, broken = non_finite_weights(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise ExportError(f"{folder} does not load back: {error}") from error
    if astray:
        raise ExportError(
            f"{folder} does not fit the UNet of {base_model.source}: {len(astray)} weights are astray, as {astray[0]}"
        )
    if broken:
        raise ExportError(
            f"{folder}: {len(broken)} weights hold NaN or infinity, as {broken[0]}. The training diverged"
        )
    return weights


def _fill(
    folder: Path,
    project: str,
    base_model: ResolvedModel,
    settings: TrainingSettings,
    lora: TrainedLora,
    report: EvaluationReport,
    prompts: Sequence[ValidationPrompt],
    trigger_words: Sequence[str],
    lineage: Mapping[str, Any],
) -> None:
    # The Hub's client is imported for the card only, and not with this module: the asset graph imports it.
    from sdxl_pipeline.release.model_card import image_counts, model_card
    from sdxl_pipeline.release.sidecars import write_sidecars

    images = _copy_images(folder, [image for image in report.images if image.step > 0])
    preview = folder / next(iter(images.values())) if images else None
    files = _write_weights(folder, project, base_model, settings, lora, trigger_words, preview)
    main_file = folder / files.get("single_file", WEIGHTS_FILE)
    if main_file.stem not in _STEMS:
        write_sidecars(main_file, project, base_model, settings, lora, trigger_words, prompts, preview)
        files["sidecar"] = main_file.with_suffix(".json").name
    files |= {
        "gallery": GALLERY_FILE,
        "settings": SETTINGS_FILE,
        "evaluation": REPORT_FILE,
        "lineage": LINEAGE_FILE,
    }
    shutil.copyfile(report.gallery_path, folder / GALLERY_FILE)
    plots = (
        ("loss_plot", report.loss_plot_path, LOSS_PLOT_FILE),
        ("loss_curve", lora.loss_curve_path, LOSS_CURVE_FILE),
    )
    for role, source, name in plots:
        if source is not None and Path(source).is_file():
            shutil.copyfile(source, folder / name)
            files[role] = name
    published_report = json.loads(Path(report.report_path).with_suffix(".json").read_text(encoding="utf-8"))
    for name, value in (
        (SETTINGS_FILE, portable_settings(settings)),
        (REPORT_FILE, published_report),
        (LINEAGE_FILE, {**lineage, "images": image_counts(lora)}),
    ):
        write_text_atomic(folder / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    card = model_card(
        project=project,
        base_model=base_model,
        settings=settings,
        lora=lora,
        report=published_report,
        prompts=prompts or [ValidationPrompt(name=prompt, prompt=prompt) for prompt in images],
        images=images,
        trigger_words=trigger_words,
        lineage=lineage,
        files=files,
    )
    write_text_atomic(folder / CARD_FILE, card)


def _write_weights(
    folder: Path,
    project: str,
    base_model: ResolvedModel,
    settings: TrainingSettings,
    lora: TrainedLora,
    trigger_words: Sequence[str],
    preview: Path | None,
) -> dict[str, str]:
    """Write the weights in every format of the release; gives the names of diffusers' (weights) and of the others' (single_file)."""
    if lora.weights_kind == "unet":
        # not imported with this module, which the asset graph imports: it takes torch
        from sdxl_pipeline.release.single_file import (
            checkpoint_metadata,
            require_loadable,
            write_checkpoint,
        )

        name = f"{project}.safetensors"
        metadata = checkpoint_metadata(project, base_model, settings, lora, trigger_words, preview)
        write_checkpoint(folder / name, Path(lora.weights_path), base_model, settings, metadata)
        require_loadable(folder / name, Path(lora.weights_path), base_model)
        shutil.copytree(lora.weights_path, folder / UNET_FOLDER)
        return {"weights": UNET_FOLDER, "single_file": name}
    files = {}
    if lora.kohya_path is not None and settings.lora_format != "diffusers":
        files["single_file"] = Path(lora.kohya_path).name
        shutil.copyfile(lora.kohya_path, folder / files["single_file"])
    if settings.lora_format != "comfyui" or not files:
        files["weights"] = WEIGHTS_FILE
        shutil.copyfile(lora.weights_path, folder / WEIGHTS_FILE)
    return files


def _copy_images(folder: Path, images: Sequence[ValidationImage]) -> dict[str, str]:
    """Copy the trained model's images into the release; gives prompt -> path in the release of its first image."""
    (folder / IMAGES_FOLDER).mkdir()
    first_by_prompt: dict[str, str] = {}
    for image in images:
        name = f"{IMAGES_FOLDER}/{Path(image.path).name}"
        shutil.copyfile(image.path, folder / name)
        first_by_prompt.setdefault(image.prompt, name)
    return first_by_prompt


def _size(lora: TrainedLora, report: EvaluationReport) -> int:
    """Bytes of what a release copies."""
    copied = [
        Path(lora.weights_path),
        Path(report.gallery_path),
        *(Path(image.path) for image in report.images),
    ]
    files = [file for path in copied for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in files if file.is_file())


def _replace(folder: Path, staged: Path) -> None:
    """Rename `staged` to `folder`. A kill in between leaves the earlier release under its old name beside it."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    staged.rename(folder)
    for left in folder.parent.glob(f".{folder.name}.*.old"):
        shutil.rmtree(left, ignore_errors=True)


def _secrets() -> list[str]:
    from huggingface_hub import get_token

    return [get_token() or ""]


def _places(base_model: ResolvedModel, lora: TrainedLora, report: EvaluationReport) -> list[Path]:
    places = [Path(lora.run_dir), Path(report.report_path).parent, Path(base_model.path).parent, Path.cwd()]
    return [*places, *(place.parent for place in places), Path.home()]
