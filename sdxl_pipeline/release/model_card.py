"""The model card: what the Hub shows and searches by, and what a person needs to use the weights and to know where they came from."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from sdxl_pipeline.config.schema.adapter import AdapterSettings
from sdxl_pipeline.config.schema.key_facts import keys_with
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.release.adapter_labels import adapter_name, adapter_tags, is_shown
from sdxl_pipeline.release.sanitize import portable_name, portable_settings
from sdxl_pipeline.release.snippet import hub_id
from sdxl_pipeline.release.usage import usage
from sdxl_pipeline.runtime.specs import KIND_LABELS, TrainedLora, ValidationPrompt, WeightsKind

LICENCES = {"stabilityai/stable-diffusion-xl-base-1.0": "openrail++"}
"""Licences of base models that pass on to what is derived from them, by Hub id."""

_RELATIONS: Mapping[WeightsKind, str] = {"lora": "adapter", "unet": "finetune"}

SHOWN_SETTINGS = keys_with(TrainingSettings, lambda key: key.on_card)
"""The settings that say most about a training; all of them are in a file of the release."""


def model_card(
    *,
    project: str,
    base_model: ResolvedModel,
    settings: TrainingSettings,
    lora: TrainedLora,
    report: Mapping[str, Any],
    prompts: Sequence[ValidationPrompt],
    images: Mapping[str, str],
    trigger_words: Sequence[str],
    lineage: Mapping[str, Any],
    files: Mapping[str, str],
) -> str:
    """Return the text of README.md.

    `report` is an evaluation's report.json; `images` maps a prompt to its image's path in the release; `files` names the other files
    by role: gallery, settings, evaluation, lineage, and where there is one weights, single_file, sidecar, loss_plot and loss_curve.
    """
    sections = [
        f"# {project}",
        settings.model_card_note or "",
        _opening(project, base_model, settings, lora),
        "<Gallery />" if images else "",  # the Hub shows the images of the front matter in its place
        f"![base model beside {KIND_LABELS[lora.weights_kind]}]({files['gallery']})",
        "## Use",
        usage(base_model, settings, lora, prompts, trigger_words, files),
        "## Evaluation",
        _evaluation(report, files),
        "## Training",
        _training(settings, lora, files),
        "## Lineage",
        _lineage(base_model, lora, lineage, files),
    ]
    body = "\n\n".join(section for section in sections if section)
    return str(
        ModelCard(
            f"---\n{_front_matter(base_model, settings, lora, prompts, images, trigger_words).to_yaml()}\n---\n\n{body}\n"
        )
    )


def _front_matter(
    base_model: ResolvedModel,
    settings: TrainingSettings,
    lora: TrainedLora,
    prompts: Sequence[ValidationPrompt],
    images: Mapping[str, str],
    trigger_words: Sequence[str],
) -> ModelCardData:
    base = hub_id(base_model)
    widget = []
    for prompt in prompts:
        if prompt.prompt in images:
            entry: dict[str, Any] = {"text": prompt.prompt, "output": {"url": images[prompt.prompt]}}
            if prompt.negative_prompt:
                entry["parameters"] = {"negative_prompt": prompt.negative_prompt}
            widget.append(entry)
    tags = adapter_tags(settings) if lora.weights_kind == "lora" else ()
    return ModelCardData(
        base_model=base,
        base_model_relation=_RELATIONS[lora.weights_kind] if base else None,
        library_name="diffusers",
        license=LICENCES.get(base) if base else None,
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", *tags, "sdxl", "stable-diffusion-xl"],
        instance_prompt=trigger_words[0] if trigger_words else None,
        widget=widget or None,
    )


def _opening(project: str, base_model: ResolvedModel, settings: TrainingSettings, lora: TrainedLora) -> str:
    base = hub_id(base_model)
    name = f"[{base}](https://huggingface.co/{base})" if base else f"`{portable_name(base_model.source)}`"
    if lora.weights_kind == "unet":
        which = "the biases" if settings.layer_freeze_strategy == "bitfit" else "all weights"
        what = f"the UNet of {name} with {which} trained further"
        change = "The text encoders and the VAE are the base model's."
    else:
        what = f"{adapter_name(settings)} for {name}, trained"
        texts = "of both text encoders" if settings.train_text_encoder else "leaves the text encoders alone"
        change = f"It changes {lora.adapted_modules} layers of the UNet and {texts}."
    return f"{project} is {what} for {lora.steps:,} steps ({lora.samples:,} samples){_images(lora)}. {change}"


def _images(lora: TrainedLora) -> str:
    """Return how many images were trained on and held out; empty for a run of an earlier version, which did not record it."""
    if not lora.trained_images:
        return ""
    trained, held_out = sum(lora.trained_images.values()), sum(lora.held_out_images.values())
    others = f"{held_out:,} others were held out for the evaluation" if held_out else "none was held out"
    return f" on {trained:,} captioned images; {others}"


def _evaluation(report: Mapping[str, Any], files: Mapping[str, str]) -> str:
    found, names = report["figures"], report["figure_names"]
    if not found:
        return "Neither an eval loss nor a CLIP score was measured."
    changes = report["change_since_release"]
    header = ("figure", "value", "change since the last release") if changes else ("figure", "value")
    rows = [
        (
            names[name],
            f"{value:.4g}",
            *([f"{changes[name]:+.3g}" if name in changes else ""] if changes else []),
        )
        for name, value in found.items()
    ]
    parts = [_table(header, rows), report["measurement"]]
    if "loss_plot" in files:
        parts.append(f"![eval loss by timestep]({files['loss_plot']})")
    return "\n\n".join(parts)


def _training(settings: TrainingSettings, lora: TrainedLora, files: Mapping[str, str]) -> str:
    values = portable_settings(settings) | {"lora_alpha": settings.effective_lora_alpha}
    if settings.lora_type == "lycoris":
        values["lycoris_config"] = settings.lycoris.model_dump_json(exclude_defaults=True)
    rows = [
        ("steps", f"{lora.steps:,}"),
        ("passes over the images", f"{lora.epochs:.3g}"),
        ("trainable parameters", f"{lora.trainable_parameters:,}"),
        *(
            (f"`{name}`", _shown(values[name]))
            for name in dict.fromkeys((*SHOWN_SETTINGS, *settings.changed_objective))
            if values[name] is not None and _is_informative(name, settings, lora)
        ),
    ]
    parts = [_table(("setting", "value"), rows), f"All settings: [{files['settings']}]({files['settings']})."]
    if "loss_curve" in files:
        parts.append(f"![training loss]({files['loss_curve']})")
    return "\n\n".join(parts)


def _is_informative(name: str, settings: TrainingSettings, lora: TrainedLora) -> bool:
    if lora.weights_kind == "lora":
        return is_shown(name, settings)
    return name not in AdapterSettings.model_fields


def _lineage(
    base_model: ResolvedModel, lora: TrainedLora, lineage: Mapping[str, Any], files: Mapping[str, str]
) -> str:
    rows = [("base model", f"`{portable_name(base_model.source)}`")]
    if base_model.revision is not None:
        rows.append(("base model's revision", f"`{base_model.revision}`"))
    rows += [(f"base model, {name}", f"`{digest}`") for name, digest in base_model.digests.items()]
    rows += [
        (f"dataset `{dataset}`", f"{counts['trained']:,} images trained, {counts['held_out']:,} held out")
        for dataset, counts in image_counts(lora).items()
    ]
    rows += [(f"`{asset}`", f"`{value}`") for asset, value in lineage.get("data_versions", {}).items()]
    rows += [
        (name.replace("_", " "), f"`{lineage[name]}`")
        for name in ("training_identity", "weights_sha256")
        if name in lineage
    ]
    text = "Every value is a digest of content or a commit: equal values mean equal data. "
    return f"{text}As data: [{files['lineage']}]({files['lineage']}).\n\n{_table(('what', 'which'), rows)}"


def image_counts(lora: TrainedLora) -> dict[str, dict[str, int]]:
    """Return by dataset how many images were trained on and how many held out."""
    datasets = sorted(lora.trained_images.keys() | lora.held_out_images.keys())
    return {
        dataset: {
            "trained": lora.trained_images.get(dataset, 0),
            "held_out": lora.held_out_images.get(dataset, 0),
        }
        for dataset in datasets
    }


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    )
