"""Prompts to the tokens of both text encoders, in one or several windows of 77."""

import json
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sdxl_pipeline.models.components import Tokenizers

Tokens = list[list[int]]
"""Token ids of some prompts without start and end, however many they are."""


class PromptReader:
    """Tokenizes prompts for both encoders, to be read in `windows` windows of 77 tokens."""

    def __init__(self, tokenizers: Tokenizers, windows: int = 1) -> None:
        self._tokenizers = (tokenizers.tokenizer, tokenizers.tokenizer_2)
        self._windows = windows
        self._told_apart_by = _told_apart_by(*self._tokenizers)

    @property
    def capacity(self) -> int:
        """Tokens of a prompt that are encoded, start and end apart: 75 a window for CLIP. What lies beyond is cut."""
        return (min(tokenizer.model_max_length for tokenizer in self._tokenizers) - 2) * self._windows

    def read(self, prompts: Sequence[str]) -> tuple[Tokens, Tokens]:
        """All tokens of prompts, by either tokenizer.

        SDXL's two differ only in prompts with a "!", which the second pads with; the others are read once.
        """
        first = _read(self._tokenizers[0], prompts)
        if self._told_apart_by is None:
            return first, _read(self._tokenizers[1], prompts)
        second = list(first)
        other = [i for i, text in enumerate(prompts) if any(mark in text for mark in self._told_apart_by)]
        for index, tokens in zip(other, _read(self._tokenizers[1], [prompts[i] for i in other]), strict=True):
            second[index] = tokens
        return first, second

    def in_windows(self, tokens: tuple[Tokens, Tokens]) -> tuple[Tensor, Tensor]:
        """Tokens as each encoder takes them, int64 (B, windows, 77): 75 a window between its own start and end, the rest padded."""
        first, second = (
            _in_windows(tokenizer, ids, self._windows)
            for tokenizer, ids in zip(self._tokenizers, tokens, strict=True)
        )
        return first, second

    def lost_tail(self, prompt: str) -> str:
        """What of a prompt is cut because its windows are full; empty when nothing is."""
        end = len(prompt)
        for tokenizer in self._tokenizers:
            read = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            offsets: list[tuple[int, int]] = read["offset_mapping"]
            if len(offsets) > self.capacity:
                end = min(end, offsets[self.capacity][0])
        return prompt[end:].strip()


def _read(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Tokens:
    if not prompts:
        return []
    tokens: Tokens = tokenizer(
        list(prompts), add_special_tokens=False, return_attention_mask=False, verbose=False
    ).input_ids
    return tokens


def _told_apart_by(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> tuple[str, ...] | None:
    """The texts that a prompt must contain for the two to read it differently; None when it may be any prompt."""
    rules, other_rules = (json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (one, other))
    for read in (rules, other_rules):
        read |= {"padding": None, "truncation": None, "post_processor": None}  # none of them used by `_read`
    marks, other_marks = (
        {token["content"]: token for token in read.pop("added_tokens")} for read in (rules, other_rules)
    )
    differing = [
        content
        for content in marks.keys() | other_marks.keys()
        if marks.get(content) != other_marks.get(content)
    ]
    # one that is looked for in the normalized text may be spelled otherwise in the prompt
    found_as_spelled = all(
        not token["normalized"]
        for content in differing
        for token in (marks.get(content), other_marks.get(content))
        if token
    )
    return tuple(sorted(differing)) if rules == other_rules and found_as_spelled else None


def _in_windows(tokenizer: PreTrainedTokenizerBase, tokens: Tokens, windows: int) -> Tensor:
    length, start, end = tokenizer.model_max_length, tokenizer.bos_token_id, tokenizer.eos_token_id
    room, padding = length - 2, [tokenizer.pad_token_id] * length
    rows = [
        [start, *part, end, *padding[: room - len(part)]]
        for prompt in tokens
        for part in (prompt[window * room : (window + 1) * room] for window in range(windows))
    ]
    return torch.tensor(rows, dtype=torch.int64).view(len(tokens), windows, length)
