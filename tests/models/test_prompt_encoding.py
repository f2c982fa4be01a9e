"""Prompt embeddings equal those of diffusers' pipeline, and do not depend on the batch."""

import pytest
import torch

from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import TextEncoders, load_pipeline, load_text_encoders
from sdxl_pipeline.models.conditioning import PromptTokenizer, encode_prompts

PROMPTS = [
    "a red circle",
    "",
    "a large blue star on a yellow background",
    "Ünïcödé 絵, (weights:1.2) & punctuation!",
    "a very long caption " * 40,
    "exclamation! marks!! are padding!!! of the second encoder",
]


@pytest.fixture(scope="module")
def encoders(bundled: ResolvedModel) -> TextEncoders:
    return load_text_encoders(bundled, torch.float32)


def test_encode_prompts_equals_the_pipeline(bundled: ResolvedModel, encoders: TextEncoders):
    pipeline = load_pipeline(bundled, torch.float32, text_encoders=encoders)
    expected, _, expected_pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    prompt_embeds, pooled = encode_prompts(encoders, PROMPTS)
    assert prompt_embeds.shape == (len(PROMPTS), 77, 128)
    assert pooled.shape == (len(PROMPTS), 64)
    assert torch.equal(prompt_embeds, expected)
    assert torch.equal(pooled, expected_pooled)


def test_encode_prompts_equals_the_pipelines_negative_prompt(bundled: ResolvedModel, encoders: TextEncoders):
    pipeline = load_pipeline(bundled, torch.float32, text_encoders=encoders)
    _, negative, _, negative_pooled = pipeline.encode_prompt("a circle", negative_prompt="blurry")
    prompt_embeds, pooled = encode_prompts(encoders, ["blurry"])
    assert torch.equal(prompt_embeds, negative)
    assert torch.equal(pooled, negative_pooled)


def test_encode_prompts_is_independent_of_order_and_batch(encoders: TextEncoders):
    together, pooled_together = encode_prompts(encoders, PROMPTS)
    backwards, pooled_backwards = encode_prompts(encoders, PROMPTS[::-1])
    torch.testing.assert_close(together, backwards.flip(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled_together, pooled_backwards.flip(0), atol=1e-5, rtol=0)
    for index, prompt in enumerate(PROMPTS):
        alone, pooled_alone = encode_prompts(encoders, [prompt])
        torch.testing.assert_close(alone[0], together[index], atol=1e-5, rtol=0)
        torch.testing.assert_close(pooled_alone[0], pooled_together[index], atol=1e-5, rtol=0)
    assert not torch.allclose(together[0], together[2], atol=1e-2), (
        "different prompts have different embeddings"
    )


def test_encode_prompts_has_no_gradient(encoders: TextEncoders):
    assert not encode_prompts(encoders, ["a"])[0].requires_grad


def test_encode_prompts_encodes_each_window_separately(encoders: TextEncoders):
    words = [f"circle{'!' * (index % 3 == 0)}" for index in range(200)]
    reader = PromptTokenizer(encoders)
    lengths = [len(reader.read([" ".join(words[:count])])[1][0]) for count in range(len(words))]
    first = lengths.index(75)
    second = next(count for count in range(first, 200) if lengths[count] == 150)
    text = " ".join(words)
    embeds, pooled = encode_prompts(encoders, [text, "a star"], windows=2)
    assert embeds.shape == (2, 154, 128)
    parts = [" ".join(words[:first]), " ".join(words[first:second])]
    alone, pooled_alone = encode_prompts(encoders, parts)
    torch.testing.assert_close(embeds[0], alone.flatten(0, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled[0], pooled_alone[0], atol=1e-5, rtol=0)
    short, _ = encode_prompts(encoders, ["a star", ""])
    torch.testing.assert_close(embeds[1], short.flatten(0, 1), atol=1e-5, rtol=0)
