"""The front matter of a model card: the metadata that the Hub validates and indexes.

Keys and their meaning: huggingface/hub-docs, modelcard.md and models-widgets.md.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.release.release_inputs import ReleaseInputs, hub_id
from sdxl_pipeline.runtime.specs import KIND_LABELS, WeightsKind

LICENCES = {"stabilityai/stable-diffusion-xl-base-1.0": "openrail++"}
"""Licences of base models that also apply to derived models, by Hub id."""

_LICENCE_KEYS = ("license", "license_name", "license_link")
_RELATIONS: Mapping[WeightsKind, str] = {"lora": "adapter", "unet": "finetune"}
_UNTITLED = "-"
"""Text of an image whose prompt is not published; the Hub requires one."""


def card_metadata(
    inputs: ReleaseInputs,
    report: Mapping[str, Any],
    metrics: Mapping[str, float],
    images: Mapping[str, str],
) -> ModelCardData:
    """Return the front matter. `report` is the published report, with its scalar `metrics`; `images` maps an image's path in the release to its prompt."""
    base = hub_id(inputs.base_model)
    results = list(_eval_results(inputs, report, metrics))
    return ModelCardData(
        base_model=base,
        base_model_relation=_RELATIONS[inputs.lora.weights_kind] if base else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=_tags(inputs),
        instance_prompt=inputs.trigger_words[0] if inputs.trigger_words else None,
        widget=[_widget(inputs, path, prompt) for path, prompt in images.items()] or None,
        model_name=inputs.project if results else None,
        eval_results=results or None,
        **base_licence(inputs),
    )


def base_licence(inputs: ReleaseInputs) -> dict[str, str]:
    """Return license, license_name and license_link of the base model: of a known one, or of the README.md in its folder; else nothing."""
    if licence := LICENCES.get(hub_id(inputs.base_model) or ""):
        return {"license": licence}
    readme = Path(inputs.base_model.path) / "README.md"
    if not readme.is_file():
        return {}
    parts = readme.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    try:
        metadata = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        return {}
    if not isinstance(metadata, dict):
        return {}
    # a link relative to the base model's repository would be broken in this one
    return {
        key: metadata[key]
        for key in _LICENCE_KEYS
        if isinstance(metadata.get(key), str)
        and (key != "license_link" or metadata[key].startswith("https://"))
    }


def _tags(inputs: ReleaseInputs) -> list[str]:
    tags = ["text-to-image", "diffusers", "diffusers-training"]
    if inputs.lora.weights_kind == "lora":
        tags += _adapter_tags(inputs.settings)
    if inputs.lora.weights_kind == "lora" and not inputs.is_lycoris:
        tags.append("template:sd-lora")  # the Hub's LoRA page, whose code loads the file with diffusers
    return [*tags, "sdxl", "stable-diffusion-xl", "stable-diffusion-xl-diffusers"]


def _adapter_tags(settings: TrainingSettings) -> tuple[str, ...]:
    """Return the tags by which the Hub's users find this kind of adapter."""
    if settings.lora_type == "lycoris":
        return ("lycoris", *sorted(settings.lycoris.algorithms))
    return ("lora", "dora") if settings.use_dora else ("lora",)


def _widget(inputs: ReleaseInputs, path: str, prompt: str) -> dict[str, Any]:
    settings = inputs.settings
    negative = next((each.negative_prompt for each in inputs.prompts if each.prompt == prompt), "")
    parameters = {
        **({"negative_prompt": negative} if negative else {}),
        "num_inference_steps": settings.validation_num_inference_steps,
        "guidance_scale": settings.validation_guidance,
    }
    return {"text": prompt or _UNTITLED, "parameters": parameters, "output": {"url": path}}


def _eval_results(
    inputs: ReleaseInputs, report: Mapping[str, Any], metrics: Mapping[str, float]
) -> Iterator[EvalResult]:
    trained = KIND_LABELS[inputs.lora.weights_kind]
    images = "training images" if report["eval_source"] == "training images" else "held-out images"
    difference = (report.get("difference_to_base") or {}).get("mean")
    measured = (
        ("eval_loss", f"Eval loss, {trained}", metrics.get("lora_loss")),
        ("eval_loss_difference", f"Eval loss, {trained} minus base model", difference),
        ("clip_score", f"CLIP score, {trained}", metrics.get("lora_clip_mean")),
    )
    for kind, name, value in measured:
        if value is not None:
            of_prompts = kind == "clip_score"
            yield EvalResult(
                task_type="text-to-image",
                dataset_type="prompts" if of_prompts else "image-folder",
                dataset_name="validation prompts" if of_prompts else images,
                metric_type=kind,
                metric_name=name,
                metric_value=round(value, 6),
            )
