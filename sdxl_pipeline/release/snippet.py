"""The program in a model card, which runs as it stands."""

import json
from collections.abc import Sequence

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.models.base_model import BUNDLED_NAME, ResolvedModel
from sdxl_pipeline.models.sampling import scheduler_changes
from sdxl_pipeline.release.sanitize import portable_name
from sdxl_pipeline.runtime.specs import ValidationPrompt, WeightsKind


def hub_id(base_model: ResolvedModel) -> str | None:
    """The base model's name on the Hub; None for a local or bundled one."""
    return base_model.source if base_model.revision is not None else None


def snippet(
    base_model: ResolvedModel,
    settings: TrainingSettings,
    prompts: Sequence[ValidationPrompt],
    kind: WeightsKind,
    weights: str,
) -> str:
    """A Python block that draws the first prompt with the validation settings; `weights` is a file or folder of the release."""
    height, width = settings.validation_sizes[0]
    lines = [f"    height={height},", f"    width={width},"]
    if prompts and prompts[0].negative_prompt:
        lines.insert(0, f"    negative_prompt={_literal(prompts[0].negative_prompt)},")
    if settings.validation_guidance_rescale:
        lines.append(f"    guidance_rescale={settings.validation_guidance_rescale:g},")
    call = "\n".join(lines)
    scheduler = ""
    if changes := scheduler_changes(base_model, settings):
        written = ", ".join(
            f"{key}={_literal(value) if isinstance(value, str) else value}" for key, value in changes.items()
        )
        scheduler = (
            f"\npipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, {written})"
        )
    imported = "StableDiffusionXLPipeline" + (", UNet2DConditionModel" if kind == "unet" else "")
    base_import = (
        "from sdxl_pipeline.models.base_model import BUNDLED_MODEL\n"
        if base_model.source == BUNDLED_NAME
        else ""
    )
    lycoris = kind == "lora" and settings.lora_type == "lycoris"
    lycoris_import = (
        "from huggingface_hub import hf_hub_download\n"
        if lycoris and settings.push_to_hub and settings.hub_model_id
        else ""
    ) + ("from lycoris import create_lycoris_from_weights  # pip install lycoris-lora\n" if lycoris else "")
    return f"""```python
import torch
from diffusers import {imported}
{lycoris_import}{base_import}
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
{_loading(base_model, settings, kind, weights)}{scheduler}
image = pipeline(
    {_literal(prompts[0].prompt if prompts else "your prompt")},
{call}
    num_inference_steps={settings.validation_num_inference_steps},
    guidance_scale={settings.validation_guidance:g},
    generator=torch.Generator("cpu").manual_seed({settings.effective_validation_seed}),
).images[0]
image.save("image.png")
```"""


def _loading(base_model: ResolvedModel, settings: TrainingSettings, kind: WeightsKind, weights: str) -> str:
    """The lines that make `pipeline` of the base model and what was trained."""
    bundled = base_model.source == BUNDLED_NAME
    base = "BUNDLED_MODEL" if bundled else _literal(hub_id(base_model) or portable_name(base_model.source))
    loader = "from_single_file" if base_model.kind == "single_file" else "from_pretrained"
    published = settings.hub_model_id if settings.push_to_hub else None
    source, where = (_literal(published), "") if published else ('"."', "  # the folder of this file")
    if kind == "unet":
        return (
            f"unet = UNet2DConditionModel.from_pretrained({source}, subfolder={_literal(weights)}, torch_dtype=dtype){where}\n"
            f"pipeline = StableDiffusionXLPipeline.{loader}({base}, unet=unet, torch_dtype=dtype).to(device)"
        )
    if settings.lora_type == "lycoris":
        # not merge_to: with lycoris-lora 4.1 it applies alpha / rank of a LoKr or LoHa twice
        file = f"hf_hub_download({source}, {_literal(weights)})" if published else _literal(weights)
        return (
            f"pipeline = StableDiffusionXLPipeline.{loader}({base}, torch_dtype=dtype).to(device)\n"
            f"adapter, _ = create_lycoris_from_weights(1.0, {file}, pipeline.unet){where}\n"
            "adapter.apply_to()\n"
            "adapter.to(device, dtype)"
        )
    return (
        f"pipeline = StableDiffusionXLPipeline.{loader}({base}, torch_dtype=dtype).to(device)\n"
        f"pipeline.load_lora_weights({source}, weight_name={_literal(weights)}){where}"
    )


def _literal(text: str) -> str:
    """A Python string literal in double quotes, as JSON's are."""
    return json.dumps(text, ensure_ascii=False)
