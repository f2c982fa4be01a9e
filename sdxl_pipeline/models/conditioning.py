"""SDXL's conditioning: prompt embeddings, as `StableDiffusionXLPipeline.encode_prompt` makes them, and size and crop time ids."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sdxl_pipeline.models.components import TextEncoders
from sdxl_pipeline.models.prompt_tokens import PromptTokenizer


def encode_prompts(encoders: TextEncoders, prompts: Sequence[str], windows: int = 1) -> tuple[Tensor, Tensor]:
    """Return `prompt_embeds` (B, 77 * windows, C1 + C2) and `pooled_prompt_embeds` (B, C2), on the encoders' device and in their dtype.

    With one window these equal the pipeline's. Tokens beyond a prompt's windows are truncated.
    """
    reader = PromptTokenizer(encoders, windows)
    return encode_tokens(encoders, *reader.to_windows(reader.read(prompts)))


@torch.no_grad()
def encode_tokens(encoders: TextEncoders, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
    """Run `embed_tokens` without gradient."""
    return embed_tokens(encoders, input_ids, input_ids_2)


def embed_tokens(encoders: TextEncoders, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
    """Return `prompt_embeds` (B, 77 * W, C1 + C2) and `pooled_prompt_embeds` (B, C2) for token ids (B, W, 77) of each encoder.

    `prompt_embeds` are the concatenated penultimate hidden states of both encoders, `pooled_prompt_embeds` the second encoder's projected
    output at the end-of-text token (Podell et al. 2023, section 2.1) of the first window. Windows are encoded separately, so no token
    attends to another window, and concatenated. All have 77 tokens, so a prompt's result does not depend on the batch.
    """
    batch, windows, _ = input_ids.shape
    hidden_states = []
    for ids, encoder in ((input_ids, encoders.text_encoder), (input_ids_2, encoders.text_encoder_2)):
        on_device = ids.to(encoder.device, non_blocking=True)
        output = encoder(on_device.flatten(0, 1), output_hidden_states=True)
        hidden_states.append(output.hidden_states[-2])  # (B * W, 77, C)
    prompt_embeds = torch.cat(hidden_states, dim=-1)  # (B * W, 77, C1 + C2)
    pooled_prompt_embeds = output.text_embeds.unflatten(0, (batch, windows))[:, 0]  # (B, C2), of the second
    return prompt_embeds.unflatten(0, (batch, windows)).flatten(1, 2), pooled_prompt_embeds


def time_ids(
    original_hw: Sequence[tuple[int, int]],
    crop_top_left: Sequence[tuple[int, int]],
    target_hw: Sequence[tuple[int, int]],
) -> Tensor:
    """Return `[original_h, original_w, crop_top, crop_left, target_h, target_w]` per image, in pixels: (B, 6) float32.

    SDXL's size and crop conditioning (Podell et al. 2023, section 2.2). float32 for any model precision: bf16 has 8 significant bits, so
    1820 would become 1824. The UNet casts them itself, after its sinusoidal embedding. Raises ValueError for arguments of different
    lengths.
    """
    rows = [
        (*original, *top_left, *target)
        for original, top_left, target in zip(original_hw, crop_top_left, target_hw, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
