"""The model card: README.md with the metadata that the Hub indexes, instructions for use, evaluation, training settings and lineage."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from sdxl_pipeline.config.schema.adapter import AdapterSettings
from sdxl_pipeline.config.schema.key_facts import key_of, keys_with
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.release.release_inputs import ReleaseInputs, adapter_name, hub_id, portable_settings
from sdxl_pipeline.release.usage import usage
from sdxl_pipeline.runtime.specs import KIND_LABELS, TrainedLora, WeightsKind

LICENCES = {"stabilityai/stable-diffusion-xl-base-1.0": "openrail++"}
"""Licences of base models that also apply to derived models, by Hub id."""

_RELATIONS: Mapping[WeightsKind, str] = {"lora": "adapter", "unet": "finetune"}

CARD_SETTINGS = keys_with(TrainingSettings, lambda key: key.on_card)
"""The most informative settings of a training; a separate file of the release has all of them."""


def model_card(
    inputs: ReleaseInputs, report: Mapping[str, Any], images: Mapping[str, str], files: Mapping[str, str]
) -> str:
    """Return the text of README.md.

    `report` is an evaluation's report.json; `images` maps a prompt to the path of its image in the release; `files` maps a role to a file
    name: gallery, settings, evaluation, lineage, and where present weights, single_file, sidecar, loss_plot and loss_curve.
    """
    settings, lora = inputs.settings, inputs.lora
    sections = [
        f"# {inputs.project}",
        settings.model_card_note or "",
        _introduction(inputs),
        "<Gallery />" if images else "",  # the Hub replaces it by the images of the front matter's widget
        f"![base model beside {KIND_LABELS[lora.weights_kind]}]({files['gallery']})",
        "## Use",
        usage(inputs, files),
        "## Evaluation",
        _evaluation(report, files),
        "## Training",
        _training(settings, lora, files),
        "## Lineage",
        _lineage(inputs, files),
    ]
    body = "\n\n".join(section for section in sections if section)
    return str(ModelCard(f"---\n{_front_matter(inputs, images).to_yaml()}\n---\n\n{body}\n"))


def _front_matter(inputs: ReleaseInputs, images: Mapping[str, str]) -> ModelCardData:
    base, kind = hub_id(inputs.base_model), inputs.lora.weights_kind
    widget = []
    for prompt in inputs.prompts:
        if prompt.prompt in images:
            entry: dict[str, Any] = {"text": prompt.prompt, "output": {"url": images[prompt.prompt]}}
            if prompt.negative_prompt:
                entry["parameters"] = {"negative_prompt": prompt.negative_prompt}
            widget.append(entry)
    tags = _adapter_tags(inputs.settings) if kind == "lora" else ()
    return ModelCardData(
        base_model=base,
        base_model_relation=_RELATIONS[kind] if base else None,
        library_name="diffusers",
        license=LICENCES.get(base) if base else None,
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", *tags, "sdxl", "stable-diffusion-xl"],
        instance_prompt=inputs.trigger_words[0] if inputs.trigger_words else None,
        widget=widget or None,
    )


def _adapter_tags(settings: TrainingSettings) -> tuple[str, ...]:
    """Return the tags by which the Hub's users find this kind of adapter."""
    if settings.lora_type == "lycoris":
        return ("lycoris", *sorted(settings.lycoris.algorithms))
    return ("lora", "dora") if settings.use_dora else ("lora",)


def _introduction(inputs: ReleaseInputs) -> str:
    settings, lora, base = inputs.settings, inputs.lora, hub_id(inputs.base_model)
    base_link = f"[{base}](https://huggingface.co/{base})" if base else f"`{inputs.base_model_name}`"
    if lora.weights_kind == "unet":
        weights = "the biases" if settings.layer_freeze_strategy == "bitfit" else "all weights"
        what = f"the UNet of {base_link} with {weights} trained further"
        change = "The text encoders and the VAE are those of the base model."
    else:
        what = f"{adapter_name(settings)} for {base_link}, trained"
        change = f"It changes {lora.adapted_modules} layers of the UNet" + (
            " and of both text encoders."
            if settings.train_text_encoder
            else ". The text encoders are unchanged."
        )
    return f"{inputs.project} is {what} for {lora.steps:,} steps ({lora.samples:,} samples){_image_total(lora)}. {change}"


def _image_total(lora: TrainedLora) -> str:
    """Return the number of training and held-out images; empty for a run of an earlier version, which did not record them."""
    if not lora.trained_images:
        return ""
    trained, held_out = sum(lora.trained_images.values()), sum(lora.held_out_images.values())
    others = f"{held_out:,} others were held out for the evaluation" if held_out else "none was held out"
    return f" on {trained:,} captioned images; {others}"


def _evaluation(report: Mapping[str, Any], files: Mapping[str, str]) -> str:
    metrics, labels = report["figures"], report["figure_names"]
    if not metrics:
        return "Neither an eval loss nor a CLIP score was measured."
    changes = report["change_since_release"]
    header = ("metric", "value", "change since the last release") if changes else ("metric", "value")
    rows = [
        (
            labels[name],
            f"{value:.4g}",
            *([f"{changes[name]:+.3g}" if name in changes else ""] if changes else []),
        )
        for name, value in metrics.items()
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
        ("epochs", f"{lora.epochs:.3g}"),
        ("trainable parameters", f"{lora.trainable_parameters:,}"),
        *(
            (f"`{name}`", _value_text(values[name]))
            for name in dict.fromkeys((*CARD_SETTINGS, *settings.changed_objective))
            if values[name] is not None and _is_relevant(name, settings, lora)
        ),
    ]
    parts = [_table(("setting", "value"), rows), f"All settings: [{files['settings']}]({files['settings']})."]
    if "loss_curve" in files:
        parts.append(f"![training loss]({files['loss_curve']})")
    return "\n\n".join(parts)


def _is_relevant(name: str, settings: TrainingSettings, lora: TrainedLora) -> bool:
    """Return whether a setting applies to these weights: PEFT's settings do not apply to LyCORIS, nor any adapter's to a full UNet."""
    if lora.weights_kind == "unet":
        return name not in AdapterSettings.model_fields
    only = key_of(TrainingSettings.model_fields[name]).lora_type
    return only in (None, settings.lora_type) and (name != "use_dora" or settings.use_dora)


def _lineage(inputs: ReleaseInputs, files: Mapping[str, str]) -> str:
    base_model, lineage = inputs.base_model, inputs.lineage
    rows = [("base model", f"`{inputs.base_model_name}`")]
    if base_model.revision is not None:
        rows.append(("base model's revision", f"`{base_model.revision}`"))
    rows += [(f"base model, {name}", f"`{digest}`") for name, digest in base_model.digests.items()]
    rows += [
        (f"dataset `{dataset}`", f"{counts['trained']:,} images trained, {counts['held_out']:,} held out")
        for dataset, counts in image_counts(inputs.lora).items()
    ]
    rows += [(f"`{asset}`", f"`{value}`") for asset, value in lineage.get("data_versions", {}).items()]
    rows += [
        (name.replace("_", " "), f"`{lineage[name]}`")
        for name in ("training_identity", "weights_sha256")
        if name in lineage
    ]
    text = "Digests and data versions identify content, and a revision is a commit: equal values mean equal data. "
    link = f"[{files['lineage']}]({files['lineage']})"
    return f"{text}The same as JSON: {link}.\n\n{_table(('item', 'value'), rows)}"


def image_counts(lora: TrainedLora) -> dict[str, dict[str, int]]:
    """Return by dataset how many images were trained on and how many were held out."""
    datasets = sorted(lora.trained_images.keys() | lora.held_out_images.keys())
    return {
        dataset: {
            "trained": lora.trained_images.get(dataset, 0),
            "held_out": lora.held_out_images.get(dataset, 0),
        }
        for dataset in datasets
    }


def _value_text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    )
