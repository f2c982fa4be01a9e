"""Prompts to embeddings, as `StableDiffusionXLPipeline.encode_prompt` makes them; longer ones in several windows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sdxl_pipeline.models.components import TextEncoders
from sdxl_pipeline.models.prompt_tokens import PromptReader


def encode_prompts(encoders: TextEncoders, prompts: Sequence[str], windows: int = 1) -> tuple[Tensor, Tensor]:
    """`prompt_embeds` (B, 77 * windows, C1 + C2) and `pooled_prompt_embeds` (B, C2), on the encoders' device and in their dtype.

    With one window these are the pipeline's own. What a prompt has beyond its windows is cut.
    """
    reader = PromptReader(encoders, windows)
    return encode_tokens(encoders, *reader.in_windows(reader.read(prompts)))


@torch.no_grad()
def encode_tokens(encoders: TextEncoders, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
    """`embed_tokens` without gradient."""
    return embed_tokens(encoders, input_ids, input_ids_2)


def embed_tokens(encoders: TextEncoders, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
    """`prompt_embeds` (B, 77 * W, C1 + C2) and `pooled_prompt_embeds` (B, C2) of `PromptReader.in_windows`, (B, W, 77) for each encoder.

    The former are the penultimate hidden states of both encoders side by side, the latter the second encoder's projected output at the
    end-of-text token (Podell et al. 2023, section 2.1) of the first window. Each window is encoded by itself, so no token sees those
    of another, and they stand one after the other. All have 77 tokens, so a prompt's result does not depend on its neighbours.
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
