"""Prompts to embeddings, as `StableDiffusionXLPipeline.encode_prompt` makes them."""

import torch
from torch import Tensor

from sdxl_pipeline.sdxl.components import TextEncoders, Tokenizers


@torch.no_grad()
def encode_prompts(encoders: TextEncoders, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """`prompt_embeds` (B, 77, C1 + C2) and `pooled_prompt_embeds` (B, C2) of prompts, on the encoders' device and in their dtype.

    The former are the penultimate hidden states of both encoders side by side, the latter the second encoder's projected output at the
    end-of-text token (Podell et al. 2023, section 2.1). Every prompt is padded or cut to 77 tokens, so a prompt's result does not depend
    on its neighbours.
    """
    hidden_states = []
    for tokenizer, encoder in (
        (encoders.tokenizer, encoders.text_encoder),
        (encoders.tokenizer_2, encoders.text_encoder_2),
    ):
        input_ids = tokenizer(
            prompts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids  # (B, 77)
        output = encoder(input_ids.to(encoder.device), output_hidden_states=True)
        hidden_states.append(output.hidden_states[-2])  # (B, 77, C)
    pooled_prompt_embeds = output.text_embeds  # (B, C2), of the second encoder
    return torch.cat(hidden_states, dim=-1), pooled_prompt_embeds


def token_counts(tokenizers: Tokenizers, prompts: list[str]) -> list[int]:
    """Tokens of each prompt before it is cut, start and end included; the larger count where the two tokenizers differ."""
    if not prompts:
        return []
    counts = [
        [len(ids) for ids in tokenizer(prompts, truncation=False, verbose=False).input_ids]
        for tokenizer in (tokenizers.tokenizer, tokenizers.tokenizer_2)
    ]
    return [max(pair) for pair in zip(*counts, strict=True)]


def max_tokens(tokenizers: Tokenizers) -> int:
    """Tokens an encoder reads, 77 for CLIP; what lies beyond is cut."""
    return min(tokenizers.tokenizer.model_max_length, tokenizers.tokenizer_2.model_max_length)
