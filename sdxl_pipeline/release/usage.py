"""The section of a model card on how to use the released files in each program."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.release.sanitize import portable_name
from sdxl_pipeline.release.snippet import snippet
from sdxl_pipeline.runtime.specs import TrainedLora, ValidationPrompt

_COMFYUI_SAMPLING = {"epsilon": "eps", "v_prediction": "v_prediction", "sample": "x0"}
"""Prediction type -> what ComfyUI's node ModelSamplingDiscrete calls it."""


def usage(
    base_model: ResolvedModel,
    settings: TrainingSettings,
    lora: TrainedLora,
    prompts: Sequence[ValidationPrompt],
    trigger_words: Sequence[str],
    files: Mapping[str, str],
) -> str:
    """Return the section: diffusers, ComfyUI, A1111 and Forge, each with the file it loads.

    `files` names diffusers' file or folder as `weights` and the file for the other programs as `single_file`; one of them may be absent.
    """
    single_file = files.get("single_file")
    lycoris = lora.weights_kind == "lora" and settings.lora_type == "lycoris"
    parts = []
    # diffusers reads kohya's files too, but none of LyCORIS
    if loaded := files.get("weights") or (None if lycoris else single_file):
        title = "lycoris-lora with diffusers" if lycoris else "diffusers"
        parts += [f"### {title}", snippet(base_model, settings, prompts, lora.weights_kind, loaded)]
        if loaded != single_file:
            parts.append(_alpha_note(settings, lora))
    if single_file is None:
        parts += [
            "### ComfyUI, A1111 and Forge",
            f"This release has no file for them. `{files['weights']}` is in another format, of which they load some layers or none. "
            "A release made with `lora_format: both` has one.",
        ]
    else:
        parts += [
            "### ComfyUI",
            _approximation_note(lora, files),
            _comfyui(base_model, settings, lora, single_file),
            _prompt_note(trigger_words),
            "### A1111 and Forge",
            _a1111(lora, single_file, files.get("sidecar")),
            _prompt_note(trigger_words),
        ]
    return "\n\n".join(part for part in parts if part)


def _comfyui(
    base_model: ResolvedModel, settings: TrainingSettings, lora: TrainedLora, single_file: str
) -> str:
    if lora.weights_kind == "unet":
        text = (
            f"Copy `{single_file}` to `models/checkpoints` and select it in *Load Checkpoint*. It holds the UNet, both text encoders "
            "and the VAE in float16."
        )
    else:
        text = (
            f"Copy `{single_file}` to `models/loras` and select it in *Load LoRA*, between *Load Checkpoint* with "
            f"{portable_name(base_model.source)} and the sampler, with strength 1: the file holds the alpha of every layer."
        )
    prediction = settings.prediction_type
    # the checkpoint has a marker for v, by which ComfyUI recognizes it
    if prediction and not (lora.weights_kind == "unet" and prediction != "sample"):
        text += (
            f" The model was trained with `prediction_type: {prediction}`: add *ModelSamplingDiscrete* with sampling "
            f"`{_COMFYUI_SAMPLING[prediction]}`"
            + (" and zsnr on." if settings.rescale_betas_zero_snr else ".")
        )
    return text


def _a1111(lora: TrainedLora, single_file: str, sidecar: str | None) -> str:
    stem = Path(single_file).stem
    shown = (
        f" With `{sidecar}` and `{stem}.png` beside it they show its description and a preview."
        if sidecar
        else ""
    )
    if lora.weights_kind == "unet":
        return f"Copy `{single_file}` to `models/Stable-diffusion` and select it as checkpoint.{shown}"
    return f"Copy `{single_file}` to `models/Lora` and write `<lora:{stem}:1>` in the prompt.{shown}"


def _prompt_note(trigger_words: Sequence[str]) -> str:
    if not trigger_words:
        return ""
    words = ", ".join(f"`{words}`" for words in trigger_words)
    return f"Trigger words for the prompt: {words}."


def _alpha_note(settings: TrainingSettings, lora: TrainedLora) -> str:
    """Return what a user of diffusers needs to know of an alpha that only the header of a file holds; empty where they need not."""
    alpha, rank = settings.effective_lora_alpha, settings.lora_rank
    if lora.weights_kind == "unet" or settings.lora_type == "lycoris" or alpha == rank:
        return ""
    return (
        f"The updates are scaled by `lora_alpha` / `lora_rank` = {alpha:g} / {rank} = {alpha / rank:.3g}, which the file's header holds "
        "and diffusers reads from 0.34 on."
    )


def _approximation_note(lora: TrainedLora, files: Mapping[str, str]) -> str:
    approximation = lora.dora_approximation
    if approximation is None:
        return ""
    exact = f" `{files['weights']}` is exact, for diffusers." if "weights" in files else ""
    return (
        "ComfyUI, A1111 and Forge do not compute a weight-decomposed adapter (DoRA) as it was trained. "
        f"`{files['single_file']}` is a plain LoRA of rank {approximation['rank']:g} that approximates it, with a relative error of "
        f"{approximation['relative_error']:.3g} (Frobenius norm, over all weights it changes).{exact}"
    )
