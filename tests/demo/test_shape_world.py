"""Tests of the shape world: images match their specs, and held-out combinations are not sampled for training."""

import random

import pytest
import torch

from sdxl_pipeline.demo.render import render, render_art
from sdxl_pipeline.demo.shape_captions import canonical_caption, sample_caption
from sdxl_pipeline.demo.shape_measurement import agreement, measure
from sdxl_pipeline.demo.shape_world import (
    BUCKETS,
    COLORS,
    RESERVED_WORDS,
    SHAPES,
    FreeForm,
    Mark,
    Spec,
    held_out_specs,
    invented_word,
    is_held_out,
    sample_frame,
    sample_plain,
    sample_rich,
    sample_world,
)


@pytest.mark.parametrize("size", BUCKETS)
def test_agreement_rendered_specs_is_complete(size: tuple[int, int]) -> None:
    rng = random.Random(3)
    specs = [sample_plain(rng, None) for _ in range(60)]
    images = list(render(specs, size, rng))
    shares = agreement(images, specs)
    assert shares == {"background": 1.0, "color": 1.0, "shape": 1.0, "size": 1.0, "place": 1.0}


@pytest.mark.parametrize("shape", SHAPES)
def test_measure_ideal_shape_matches_spec(shape: str) -> None:
    measurement = measure(render([Spec(shape, "red", "blue", "large", "centre")], (128, 128), None)[0])
    assert (
        measurement.shape,
        measurement.color,
        measurement.background,
        measurement.size,
        measurement.place,
    ) == (
        shape,
        "red",
        "blue",
        "large",
        "centre",
    )
    assert measurement.overlap > 0.9


def test_measure_empty_image_gives_background() -> None:
    measurement = measure(torch.full((3, 128, 128), 1.0))
    assert (measurement.background, measurement.shape, measurement.color) == ("white", None, None)


def test_agreement_different_image_is_zero() -> None:
    rendered_spec = Spec("circle", "red", "blue", "large", "left")
    expected_spec = Spec("square", "green", "yellow", "small", "right")
    shares = agreement([render([rendered_spec], (128, 128), None)[0]], [expected_spec])
    assert set(shares.values()) == {0.0}


def test_sample_world_excludes_held_out_triples() -> None:
    rng = random.Random(0)
    specs = [sample_world(rng, 0.5) for _ in range(5000)]
    assert not any(is_held_out(s.shape, s.color, s.background) for s in specs if s.shape != "freeform")
    held_out = held_out_specs(256, seed=7)
    assert all(is_held_out(s.shape, s.color, s.background) for s in held_out)
    assert len(set(held_out)) == 256


def test_is_held_out_share_is_about_a_twelfth() -> None:
    triples = [(s, c, b) for s in SHAPES for c in COLORS for b in COLORS if c != b]
    share = sum(is_held_out(*triple) for triple in triples) / len(triples)
    assert 1 / 18 < share < 1 / 8


def test_held_out_specs_count_too_large_raises() -> None:
    with pytest.raises(ValueError, match="held-out split has"):
        held_out_specs(10_000, seed=0)


def test_sample_rich_captions_describe_extras() -> None:
    rng = random.Random(1)
    for _ in range(300):
        spec = sample_rich(rng)
        caption = canonical_caption(spec)
        assert (spec.outline is None) or f"{spec.outline} outline" in caption
        assert (spec.pattern != "striped") or f"{spec.color} and {spec.second_color} striped" in caption
        assert (spec.pattern != "dotted") or f"{spec.second_color} dots" in caption
        assert spec.mark is None or spec.size == "large"
        if spec.freeform is not None:
            assert spec.noun is not None
            assert spec.noun in caption


def test_invented_word_is_never_reserved() -> None:
    rng = random.Random(2)
    words = {invented_word(rng) for _ in range(20_000)}
    assert not words & (RESERVED_WORDS | set(COLORS) | set(SHAPES))


def test_canonical_caption_has_expected_wording() -> None:
    plain = Spec("arrow", "orange", "white", "small", "centre")
    assert canonical_caption(plain) == "a small orange arrow on a white background"
    assert (
        canonical_caption(plain, include_centre=True)
        == "a small orange arrow in the centre on a white background"
    )
    rich = Spec("heart", "red", "blue", "large", "left", "black", "striped", "white", Mark(eyes=2))
    assert (
        canonical_caption(rich)
        == "a large red and white striped heart with a black outline and two eyes on the left on a blue background"
    )


def test_sample_caption_varies_with_all_properties() -> None:
    rng = random.Random(0)
    spec = Spec("ring", "green", "black", "large", "top")
    captions = {sample_caption(spec, rng) for _ in range(200)}
    assert len(captions) > 8
    assert all("at the top" in caption and "green" in caption and "black" in caption for caption in captions)


def test_render_outline_eyes_and_pattern_have_expected_colours() -> None:
    body = Spec("square", "red", "blue", "large", "centre")
    outlined = Spec("square", "red", "blue", "large", "centre", outline="yellow")
    eyed = Spec("square", "red", "blue", "large", "centre", mark=Mark(eyes=1))
    striped = Spec("square", "red", "blue", "large", "centre", pattern="striped", second_color="white")
    plain, rim, eye, stripes = (render([s], (128, 128), None)[0] for s in (body, outlined, eyed, striped))
    black, white, yellow = (
        torch.tensor(COLORS[c])[:, None, None] / 127.5 - 1 for c in ("black", "white", "yellow")
    )
    assert torch.allclose(eye[:, 63:65, 63:65], black, atol=1e-3)  # the pupil

    def pixels_of(image: torch.Tensor, color: torch.Tensor) -> int:
        return int(((image - color).abs().amax(0) < 0.01).sum())

    assert pixels_of(plain, yellow) == 0
    assert pixels_of(rim, yellow) > 300
    half = pixels_of(stripes, white) / pixels_of(
        plain, torch.tensor(COLORS["red"])[:, None, None] / 127.5 - 1
    )
    assert 0.35 < half < 0.65


def test_render_freeform_without_depth_is_a_circle() -> None:
    round_form = FreeForm(lobes=5, depth=0.0, phase=0.0, pointed=False, dents=(0.0, 0.0, 0.0, 0.0))
    spec = Spec("freeform", "red", "blue", "large", "centre", freeform=round_form, noun="shape")
    assert measure(render([spec], (128, 128), None)[0]).shape == "circle"


def test_render_frame_crops_at_its_offsets() -> None:
    spec = Spec("circle", "red", "blue", "large", "centre")
    full_image = render([spec], (128, 192), None)[0]
    cropped = render([spec], (128, 128), None, [(128, 192, 0, 40)])[0]
    assert torch.allclose(cropped, full_image[:, :, 40:168], atol=1e-4)


def test_sample_frame_crop_is_inside_resized_original() -> None:
    rng = random.Random(5)
    for bucket in BUCKETS:
        for _ in range(300):
            original_h, original_w, top, left = sample_frame(rng, bucket)
            scale = max(bucket[0] / original_h, bucket[1] / original_w)
            assert 0 <= top <= original_h * scale - bucket[0] + 1
            assert 0 <= left <= original_w * scale - bucket[1] + 1


def test_render_equal_seeds_give_equal_images() -> None:
    rng = random.Random(9)
    specs = [sample_world(rng, 0.7) for _ in range(16)]
    first = render(specs, (96, 160), random.Random(4))
    assert torch.equal(first, render(specs, (96, 160), random.Random(4)))
    assert not torch.equal(first, render(specs, (96, 160), random.Random(5)))
    assert first.shape == (16, 3, 96, 160)
    assert first.abs().max() <= 1


def test_render_art_is_reproducible_and_in_range() -> None:
    art = render_art(6, (64, 96), torch.Generator().manual_seed(1))
    assert torch.equal(art, render_art(6, (64, 96), torch.Generator().manual_seed(1)))
    assert art.shape == (6, 3, 64, 96)
    assert art.min() >= -1
    assert art.max() <= 1
    assert art.flatten(1).std(1).min() > 0.01
