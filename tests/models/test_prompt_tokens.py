"""Tokenization equals each tokenizer's own, in windows, and truncated text is reported."""

import pytest

from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import Tokenizers, load_tokenizers
from sdxl_pipeline.models.conditioning import PromptTokenizer

PROMPTS = [
    "a red circle",
    "",
    "stop! now !!",
    "<|endoftext|> inside",
    "Ünï  絵 ! \n tab\t",
    "circle " * 200,
    "!" * 300,
]


@pytest.fixture(scope="module")
def tokenizers(bundled: ResolvedModel) -> Tokenizers:
    return load_tokenizers(bundled)


def test_one_window_equals_each_tokenizers_output(tokenizers: Tokenizers):
    reader = PromptTokenizer(tokenizers)
    ids_per_encoder = reader.to_windows(reader.read(PROMPTS))
    for ids, tokenizer in zip(ids_per_encoder, (tokenizers.tokenizer, tokenizers.tokenizer_2), strict=True):
        expected = tokenizer(
            PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        assert ids[:, 0].equal(expected)


def test_prompts_without_exclamation_marks_are_tokenized_once(tokenizers: Tokenizers):
    first, second = PromptTokenizer(tokenizers).read(["a red circle", "stop!"])
    assert first[0] is second[0]
    assert first[1] != second[1]


@pytest.mark.parametrize("windows", [1, 2, 3])
def test_lost_tail_is_the_text_beyond_the_windows(tokenizers: Tokenizers, windows: int):
    reader = PromptTokenizer(tokenizers, windows)
    assert reader.capacity == 75 * windows
    words = ["circle"] * reader.capacity
    assert len(reader.read([" ".join(words)])[0][0]) == reader.capacity
    assert reader.truncated_tail(" ".join(words)) == ""
    assert reader.truncated_tail(" ".join([*words, "a", "star"])) == "a star"
    assert reader.truncated_tail("") == ""
