"""The model card: README.md with the metadata that the Hub indexes, instructions for use, evaluation, training settings and lineage."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard

from sdxl_pipeline.config.schema.adapter import AdapterSettings
from sdxl_pipeline.config.schema.key_facts import key_of, keys_with
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.release.card_metadata import card_metadata
from sdxl_pipeline.release.lineage import datasets_without_location
from sdxl_pipeline.release.release_inputs import ReleaseInputs, adapter_name, hub_id, portable_settings
from sdxl_pipeline.release.usage import published_id, usage
from sdxl_pipeline.runtime.specs import KIND_LABELS, TrainedLora

CARD_SETTINGS = keys_with(TrainingSettings, lambda key: key.on_card)
"""The most informative settings of a training; a separate file of the release has all of them."""

_SCORES = {"clip": "CLIP score", "fidelity": "Subject fidelity", "diversity": "Diversity"}


def model_card(
    inputs: ReleaseInputs, report: Mapping[str, Any], images: Mapping[str, str], files: Mapping[str, str]
) -> str:
    """Return the text of README.md.

    `report` is the published report of the evaluation; `images` maps an image's path in the release to its prompt, which is empty for one
    that is not published; `files` maps a role to a file name: settings, evaluation, lineage, and where present gallery, weights,
    single_file, sidecar, loss_plot and loss_curve.
    """
    settings, lora = inputs.settings, inputs.lora
    sections = [
        f"# {inputs.project}",
        settings.model_card_note or "",
        "<Gallery />" if images else "",  # the Hub replaces it by the images of the front matter's widget
        f"![base model beside {KIND_LABELS[lora.weights_kind]}]({files['gallery']})"
        if "gallery" in files
        else "",
        _introduction(inputs),
        *_trigger_words(inputs),
        "## Use",
        usage(inputs, files),
        "## Training",
        _training(settings, lora, files),
        "## Data lineage",
        _lineage(inputs, files),
        "## Evaluation",
        _evaluation(report, files),
        "## Known weaknesses",
        "\n".join(f"- {text}" for text in _weaknesses(report, lora)),
        "## Reproduce",
        _reproduce(inputs, files),
    ]
    body = "\n\n".join(section for section in sections if section)
    metadata = card_metadata(inputs, report, report["figures"], images).to_yaml()
    return str(ModelCard(f"---\n{metadata}\n---\n\n{body}\n"))


def _trigger_words(inputs: ReleaseInputs) -> list[str]:
    if not inputs.trigger_words:
        return []
    words = ", ".join(f"`{words}`" for words in inputs.trigger_words)
    return ["## Trigger words", f"Write {words} in the prompt."]


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
    if scores := list(_score_rows(report.get("scores") or {})):
        parts.append(_table(("score", "base model", "trained", "difference ± standard error"), scores))
    parts += [text for text in (_text(report, "selected"), *_notes(report)) if text]
    if "loss_plot" in files:
        parts.append(f"![eval loss by timestep]({files['loss_plot']})")
    return "\n\n".join(parts)


def _score_rows(scores: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for name, label in _SCORES.items():
        if pair := scores.get(name):
            yield label, f"{pair['base']:.4g}", f"{pair['lora']:.4g}", _with_error(pair["difference"])
    base, lora = scores.get("cmmd_base"), scores.get("cmmd_lora")
    if base and lora and None not in (base["value"], lora["value"]):
        yield "CMMD", f"{base['value']:.4g}{_interval(base)}", f"{lora['value']:.4g}{_interval(lora)}", ""


def _notes(report: Mapping[str, Any]) -> Iterator[str]:
    """Return sentences on the scores: of CMMD its limits, of the others what they mean."""
    scores = report.get("scores") or {}
    if scores.get("cmmd_lora"):
        yield scores["cmmd_lora"]["text"]
    yield from scores.get("notes", {}).values()


def _interval(cmmd: Mapping[str, Any]) -> str:
    interval = cmmd.get("interval")
    return f" (95 %: {interval[0]:.3g} to {interval[1]:.3g})" if interval else ""


def _with_error(difference: Mapping[str, Any]) -> str:
    error = difference["standard_error"]
    return f"{difference['mean']:+.3g}" + ("" if error is None else f" ± {error:.2g}")


def _text(report: Mapping[str, Any], name: str) -> str:
    """Return the sentence of one part of the report; empty if it was not measured."""
    return str((report.get(name) or {}).get("text", ""))


def _weaknesses(report: Mapping[str, Any], lora: TrainedLora) -> Iterator[str]:
    """Yield what the evaluation found against the weights, and what it could not find out."""
    difference = report.get("difference_to_base")
    if report["eval_source"] == "training images":
        yield "No image was held out: the eval loss is of trained images and shows neither a gain on new ones nor over-fitting."
    if difference is None:
        yield "No eval loss was measured."
    elif difference["standard_error"] is None or difference["mean"] >= -2 * difference["standard_error"]:
        yield f"The eval loss is not lower than the base model's by more than two standard errors ({_with_error(difference)})."
    yield f"Over-fitting: {_text(report, 'overfitting') or 'not measured.'}"
    if gap := (report.get("overfitting") or {}).get("gap"):
        yield (
            f"Over-fitting gap {_with_error(gap)}: eval loss of held-out minus trained images, compared with the base model's. Above 0, the "
            "training images gained more."
        )
    yield f"Memorisation: {_text(report, 'memorisation') or 'not measured.'}"
    for name, reason in (report.get("scores") or {}).get("omitted", {}).items():
        yield f"{_SCORES.get(name, name.upper())}: not reported. {reason}"
    for item in report.get("broken_images", ()):
        yield f"The image {item['name']} is broken: {item['reason']}"
    if lora.skipped_steps:
        yield f"{lora.skipped_steps:,} of {lora.steps:,} steps were skipped because their loss or gradients were not finite."


def _reproduce(inputs: ReleaseInputs, files: Mapping[str, str]) -> str:
    command = ["sdxl-pipeline reproduce", published_id(inputs) or "."]
    command += [f"--data {name}=LOCATION" for name in datasets_without_location(inputs.lineage)]
    return (
        f"```bash\n{' '.join(command)}\n```\n\n"
        f"The command makes a project from [{files['settings']}]({files['settings']}) and [{files['lineage']}]({files['lineage']}), compares the "
        "digests of the datasets and the base model with this release, reports what is missing or different, and trains. The images are not "
        "part of the release. On a CPU, equal inputs and versions give the same bytes; other devices differ in rounding."
    )


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
