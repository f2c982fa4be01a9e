"""The section of a model card on how to use the released files in each program, with a complete Python program for diffusers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdxl_pipeline.models.base_model import BUNDLED_NAME
from sdxl_pipeline.models.sampling import scheduler_changes
from sdxl_pipeline.release.release_inputs import ReleaseInputs, hub_id
from sdxl_pipeline.runtime.specs import TrainedLora

_COMFYUI_SAMPLING = {"epsilon": "eps", "v_prediction": "v_prediction", "sample": "x0"}
"""Prediction type -> its name in ComfyUI's node ModelSamplingDiscrete."""


def usage(inputs: ReleaseInputs, files: Mapping[str, str]) -> str:
    """Return the section: diffusers, ComfyUI, A1111 and Forge, each with the file it loads.

    `files` has diffusers' file or folder as `weights` and the file for the other programs as `single_file`; one of them may be absent.
    """
    lora = inputs.lora
    single_file = files.get("single_file")
    parts = []
    # diffusers also reads kohya's files, except for LyCORIS adapters
    if weights := files.get("weights") or (None if inputs.is_lycoris else single_file):
        title = "lycoris-lora with diffusers" if inputs.is_lycoris else "diffusers"
        parts += [f"### {title}", snippet(inputs, weights)]
        if weights != single_file:
            parts.append(_alpha_note(inputs))
    if single_file is None:
        parts += [
            "### ComfyUI, A1111 and Forge",
            f"This release has no file for these programs. They load `{files['weights']}`, which is in another format, only in part or "
            "not at all. A release made with `lora_format: both` includes a file for them.",
        ]
    else:
        prompt_note = _prompt_note(inputs.trigger_words)
        parts += [
            "### ComfyUI",
            _approximation_note(lora, files),
            _comfyui(inputs, single_file),
            prompt_note,
            "### A1111 and Forge",
            _a1111(lora, single_file, files.get("sidecar")),
            prompt_note,
        ]
    return "\n\n".join(part for part in parts if part)


def snippet(inputs: ReleaseInputs, weights: str) -> str:
    """Return a Python block that generates the first prompt with the validation settings; `weights` is a file or folder of the release."""
    base_model, settings, prompts = inputs.base_model, inputs.settings, inputs.prompts
    height, width = settings.validation_sizes[0]
    lines = [f"    height={height},", f"    width={width},"]
    if prompts and prompts[0].negative_prompt:
        lines.insert(0, f"    negative_prompt={_literal(prompts[0].negative_prompt)},")
    if settings.validation_guidance_rescale:
        lines.append(f"    guidance_rescale={settings.validation_guidance_rescale:g},")
    arguments = "\n".join(lines)
    scheduler = ""
    if changes := scheduler_changes(base_model, settings, settings.scheduler_changes):
        config = ", ".join(
            f"{key}={_literal(value) if isinstance(value, str) else value}" for key, value in changes.items()
        )
        scheduler = (
            f"\npipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, {config})"
        )
    classes = "StableDiffusionXLPipeline"
    imports = ""
    if inputs.lora.weights_kind == "unet":
        classes += ", UNet2DConditionModel"
    if inputs.is_lycoris:
        if published_id(inputs):
            imports += "from huggingface_hub import hf_hub_download\n"
        imports += "from lycoris import create_lycoris_from_weights  # pip install lycoris-lora\n"
    if base_model.source == BUNDLED_NAME:
        imports += "from sdxl_pipeline.models.base_model import BUNDLED_MODEL\n"
    return f"""```python
import torch
from diffusers import {classes}
{imports}
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
{_loading_code(inputs, weights)}{scheduler}
image = pipeline(
    {_literal(_example_prompt(inputs))},
{arguments}
    num_inference_steps={settings.validation_num_inference_steps},
    guidance_scale={settings.validation_guidance:g},
    generator=torch.Generator("cpu").manual_seed({settings.effective_validation_seed}),
).images[0]
image.save("image.png")
```"""


def _example_prompt(inputs: ReleaseInputs) -> str:
    return next(
        (text for text in (*(each.prompt for each in inputs.prompts), *inputs.trigger_words)), "your prompt"
    )


def _loading_code(inputs: ReleaseInputs, weights: str) -> str:
    """Return the lines that create `pipeline` from the base model and the trained weights."""
    base_model = inputs.base_model
    bundled = base_model.source == BUNDLED_NAME
    base = "BUNDLED_MODEL" if bundled else _literal(hub_id(base_model) or inputs.base_model_name)
    loader = "from_single_file" if base_model.kind == "single_file" else "from_pretrained"
    published = published_id(inputs)
    source, comment = (_literal(published), "") if published else ('"."', "  # the folder of this file")
    if inputs.lora.weights_kind == "unet":
        return (
            f"unet = UNet2DConditionModel.from_pretrained({source}, subfolder={_literal(weights)}, torch_dtype=dtype){comment}\n"
            f"pipeline = StableDiffusionXLPipeline.{loader}({base}, unet=unet, torch_dtype=dtype).to(device)"
        )
    if inputs.is_lycoris:
        # not merge_to: lycoris-lora 4.1 applies alpha / rank of a LoKr or LoHa twice there
        file = f"hf_hub_download({source}, {_literal(weights)})" if published else _literal(weights)
        return (
            f"pipeline = StableDiffusionXLPipeline.{loader}({base}, torch_dtype=dtype).to(device)\n"
            f"adapter, _ = create_lycoris_from_weights(1.0, {file}, pipeline.unet){comment}\n"
            "adapter.apply_to()\n"
            "adapter.to(device, dtype)"
        )
    return (
        f"pipeline = StableDiffusionXLPipeline.{loader}({base}, torch_dtype=dtype).to(device)\n"
        f"pipeline.load_lora_weights({source}, weight_name={_literal(weights)}){comment}"
    )


def published_id(inputs: ReleaseInputs) -> str | None:
    """Return the repository "owner/name" that the release is pushed to; None for a release that stays local, and without a known owner."""
    repo_id = inputs.settings.hub_model_id
    return repo_id if inputs.settings.push_to_hub and repo_id and "/" in repo_id else None


def _literal(text: str) -> str:
    """Return a Python string literal in double quotes; JSON's strings are valid ones."""
    return json.dumps(text, ensure_ascii=False)


def _comfyui(inputs: ReleaseInputs, single_file: str) -> str:
    is_unet = inputs.lora.weights_kind == "unet"
    if is_unet:
        text = (
            f"Copy `{single_file}` to `models/checkpoints` and select it in *Load Checkpoint*. It contains the UNet, both text encoders "
            "and the VAE in float16."
        )
    else:
        text = (
            f"Copy `{single_file}` to `models/loras` and select it in *Load LoRA*, between *Load Checkpoint* with "
            f"{inputs.base_model_name} and the sampler, with strength 1: the file contains the alpha of every layer."
        )
    prediction = inputs.settings.prediction_type
    # a v-prediction checkpoint has a marker that ComfyUI recognizes
    if prediction and not (is_unet and prediction != "sample"):
        text += (
            f" The model was trained with `prediction_type: {prediction}`: add *ModelSamplingDiscrete* with sampling "
            f"`{_COMFYUI_SAMPLING[prediction]}`"
            + (" and zsnr on." if inputs.settings.rescale_betas_zero_snr else ".")
        )
    return text


def _a1111(lora: TrainedLora, single_file: str, sidecar: str | None) -> str:
    stem = Path(single_file).stem
    preview = (
        f" With `{sidecar}` and `{stem}.png` in the same folder, both programs show a description and a preview."
        if sidecar
        else ""
    )
    if lora.weights_kind == "unet":
        return f"Copy `{single_file}` to `models/Stable-diffusion` and select it as the checkpoint.{preview}"
    return f"Copy `{single_file}` to `models/Lora` and write `<lora:{stem}:1>` in the prompt.{preview}"


def _prompt_note(trigger_words: Sequence[str]) -> str:
    if not trigger_words:
        return ""
    words = ", ".join(f"`{words}`" for words in trigger_words)
    return f"Trigger words for the prompt: {words}."


def _alpha_note(inputs: ReleaseInputs) -> str:
    """Return a note for diffusers' users on an alpha that only the file's header holds; empty if alpha equals the rank or there is none."""
    alpha, rank = inputs.settings.effective_lora_alpha, inputs.settings.lora_rank
    if inputs.lora.weights_kind == "unet" or inputs.is_lycoris or alpha == rank:
        return ""
    return (
        f"The updates are scaled by `lora_alpha` / `lora_rank` = {alpha:g} / {rank} = {alpha / rank:.3g}. The scale is stored in the "
        "file's header, which diffusers reads from version 0.34 on."
    )


def _approximation_note(lora: TrainedLora, files: Mapping[str, str]) -> str:
    approximation = lora.dora_approximation
    if approximation is None:
        return ""
    exact = f" The exact adapter is `{files['weights']}`, for diffusers." if "weights" in files else ""
    return (
        "ComfyUI, A1111 and Forge compute a weight-decomposed adapter (DoRA) differently from how it was trained. "
        f"`{files['single_file']}` is a plain LoRA of rank {approximation['rank']:g} that approximates it, with a relative error of "
        f"{approximation['relative_error']:.3g} (Frobenius norm, over all weights it changes).{exact}"
    )
