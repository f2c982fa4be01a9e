"""The UNet's conditions: prompt tokens, embeddings, pooled embedding and time ids."""

import json
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sdxl_pipeline.models.components import TextEncoders, Tokenizers

Tokens = list[list[int]]
"""Token ids per prompt, of any length, without start and end tokens."""


class PromptTokenizer:
    """Tokenizes prompts for both encoders into `windows` windows of 77 tokens."""

    def __init__(self, tokenizers: Tokenizers, windows: int = 1) -> None:
        self._tokenizers = (tokenizers.tokenizer, tokenizers.tokenizer_2)
        self._windows = windows
        self._differing_tokens = _differing_tokens(*self._tokenizers)

    @property
    def capacity(self) -> int:
        """Number of encoded tokens of a prompt without start and end tokens: 75 per window for CLIP. The rest is truncated."""
        return (min(tokenizer.model_max_length for tokenizer in self._tokenizers) - 2) * self._windows

    def read(self, prompts: Sequence[str]) -> tuple[Tokens, Tokens]:
        """Return all token ids of prompts for either tokenizer.

        SDXL's tokenizers differ only for prompts with a "!", the second one's padding token; other prompts are tokenized once.
        """
        first = _tokenize(self._tokenizers[0], prompts)
        if self._differing_tokens is None:
            return first, _tokenize(self._tokenizers[1], prompts)
        second = list(first)
        other = [
            i for i, text in enumerate(prompts) if any(token in text for token in self._differing_tokens)
        ]
        for index, tokens in zip(
            other, _tokenize(self._tokenizers[1], [prompts[i] for i in other]), strict=True
        ):
            second[index] = tokens
        return first, second

    def to_windows(self, tokens: tuple[Tokens, Tokens]) -> tuple[Tensor, Tensor]:
        """Return token ids for each encoder, int64 (B, windows, 77): 75 per window between its start and end tokens, then padding."""
        first, second = (
            _pad_windows(tokenizer, ids, self._windows)
            for tokenizer, ids in zip(self._tokenizers, tokens, strict=True)
        )
        return first, second

    def truncated_tail(self, prompt: str) -> str:
        """Return the text of a prompt that is truncated because its windows are full; empty if nothing is."""
        end = len(prompt)
        for tokenizer in self._tokenizers:
            read = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            offsets: list[tuple[int, int]] = read["offset_mapping"]
            if len(offsets) > self.capacity:
                end = min(end, offsets[self.capacity][0])
        return prompt[end:].strip()


def _tokenize(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Tokens:
    if not prompts:
        return []
    tokens: Tokens = tokenizer(
        list(prompts), add_special_tokens=False, return_attention_mask=False, verbose=False
    ).input_ids
    return tokens


def _differing_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> tuple[str, ...] | None:
    """Return the strings without which both tokenizers give the same ids for a prompt; None if they may differ for any prompt."""
    rules, other_rules = (json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (one, other))
    for read in (rules, other_rules):
        read |= {"padding": None, "truncation": None, "post_processor": None}  # not used by `_tokenize`
    tokens_by_text, other_tokens_by_text = (
        {token["content"]: token for token in read.pop("added_tokens")} for read in (rules, other_rules)
    )
    differing = [
        content
        for content in tokens_by_text.keys() | other_tokens_by_text.keys()
        if tokens_by_text.get(content) != other_tokens_by_text.get(content)
    ]
    # a token that is matched in normalized text may be written differently in the prompt
    matched_literally = all(
        not token["normalized"]
        for content in differing
        for token in (tokens_by_text.get(content), other_tokens_by_text.get(content))
        if token
    )
    return tuple(sorted(differing)) if rules == other_rules and matched_literally else None


def _pad_windows(tokenizer: PreTrainedTokenizerBase, tokens: Tokens, windows: int) -> Tensor:
    length, start, end = tokenizer.model_max_length, tokenizer.bos_token_id, tokenizer.eos_token_id
    window_tokens, padding = length - 2, [tokenizer.pad_token_id] * length
    rows = [
        [start, *part, end, *padding[: window_tokens - len(part)]]
        for prompt in tokens
        for part in (
            prompt[window * window_tokens : (window + 1) * window_tokens] for window in range(windows)
        )
    ]
    return torch.tensor(rows, dtype=torch.int64).view(len(tokens), windows, length)


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
