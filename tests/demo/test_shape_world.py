"""Holds that the world's images show what their specs say, and that held-out combinations stay out of training."""

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
def test_a_rendered_spec_is_measured_as_itself(size: tuple[int, int]) -> None:
    rng = random.Random(3)
    specs = [sample_plain(rng, None) for _ in range(60)]
    images = list(render(specs, size, rng))
    shares = agreement(images, specs)
    assert shares == {"background": 1.0, "color": 1.0, "shape": 1.0, "size": 1.0, "place": 1.0}


@pytest.mark.parametrize("shape", SHAPES)
def test_ideal_shapes_overlap_their_own_outline_only(shape: str) -> None:
    seen = measure(render([Spec(shape, "red", "blue", "large", "centre")], (128, 128), None)[0])
    assert (seen.shape, seen.color, seen.background, seen.size, seen.place) == (
        shape,
        "red",
        "blue",
        "large",
        "centre",
    )
    assert seen.overlap > 0.9


def test_an_empty_image_shows_only_its_background() -> None:
    seen = measure(torch.full((3, 128, 128), 1.0))
    assert (seen.background, seen.shape, seen.color) == ("white", None, None)


def test_measuring_tells_a_wrong_image() -> None:
    drawn = Spec("circle", "red", "blue", "large", "left")
    said = Spec("square", "green", "yellow", "small", "right")
    shares = agreement([render([drawn], (128, 128), None)[0]], [said])
    assert set(shares.values()) == {0.0}


def test_training_images_never_show_a_held_out_triple() -> None:
    rng = random.Random(0)
    specs = [sample_world(rng, 0.5) for _ in range(5000)]
    assert not any(is_held_out(s.shape, s.color, s.background) for s in specs if s.shape != "freeform")
    held_out = held_out_specs(256, seed=7)
    assert all(is_held_out(s.shape, s.color, s.background) for s in held_out)
    assert len(set(held_out)) == 256


def test_about_a_twelfth_of_the_triples_is_held_out() -> None:
    triples = [(s, c, b) for s in SHAPES for c in COLORS for b in COLORS if c != b]
    share = sum(is_held_out(*triple) for triple in triples) / len(triples)
    assert 1 / 18 < share < 1 / 8


def test_asking_for_more_held_out_images_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="held-out split holds"):
        held_out_specs(10_000, seed=0)


def test_rich_images_differ_from_plain_ones_and_say_so() -> None:
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


def test_reserved_words_are_never_invented() -> None:
    rng = random.Random(2)
    words = {invented_word(rng) for _ in range(20_000)}
    assert not words & (RESERVED_WORDS | set(COLORS) | set(SHAPES))


def test_the_canonical_caption() -> None:
    plain = Spec("arrow", "orange", "white", "small", "centre")
    assert canonical_caption(plain) == "a small orange arrow on a white background"
    assert (
        canonical_caption(plain, say_centre=True)
        == "a small orange arrow in the centre on a white background"
    )
    rich = Spec("heart", "red", "blue", "large", "left", "black", "striped", "white", Mark(eyes=2))
    assert (
        canonical_caption(rich)
        == "a large red and white striped heart with a black outline and two eyes on the left on a blue background"
    )


def test_captions_vary_and_an_unsaid_place_means_the_centre() -> None:
    rng = random.Random(0)
    spec = Spec("ring", "green", "black", "large", "top")
    captions = {sample_caption(spec, rng) for _ in range(200)}
    assert len(captions) > 8
    assert all("at the top" in caption and "green" in caption and "black" in caption for caption in captions)


def test_outline_eyes_and_pattern_are_drawn_in_their_colours() -> None:
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


def test_free_forms_follow_their_parameters() -> None:
    round_form = FreeForm(lobes=5, depth=0.0, phase=0.0, pointed=False, dents=(0.0, 0.0, 0.0, 0.0))
    spec = Spec("freeform", "red", "blue", "large", "centre", freeform=round_form, noun="shape")
    assert measure(render([spec], (128, 128), None)[0]).shape == "circle"


def test_a_crop_frame_moves_the_image_by_its_offsets() -> None:
    spec = Spec("circle", "red", "blue", "large", "centre")
    whole = render([spec], (128, 192), None)[0]
    cropped = render([spec], (128, 128), None, [(128, 192, 0, 40)])[0]
    assert torch.allclose(cropped, whole[:, :, 40:168], atol=1e-4)


def test_frames_stay_within_the_resized_original() -> None:
    rng = random.Random(5)
    for bucket in BUCKETS:
        for _ in range(300):
            original_h, original_w, top, left = sample_frame(rng, bucket)
            scale = max(bucket[0] / original_h, bucket[1] / original_w)
            assert 0 <= top <= original_h * scale - bucket[0] + 1
            assert 0 <= left <= original_w * scale - bucket[1] + 1


def test_rendering_is_a_pure_function_of_its_seed() -> None:
    rng = random.Random(9)
    specs = [sample_world(rng, 0.7) for _ in range(16)]
    first = render(specs, (96, 160), random.Random(4))
    assert torch.equal(first, render(specs, (96, 160), random.Random(4)))
    assert not torch.equal(first, render(specs, (96, 160), random.Random(5)))
    assert first.shape == (16, 3, 96, 160)
    assert first.abs().max() <= 1


def test_art_is_reproducible_and_in_range() -> None:
    art = render_art(6, (64, 96), torch.Generator().manual_seed(1))
    assert torch.equal(art, render_art(6, (64, 96), torch.Generator().manual_seed(1)))
    assert art.shape == (6, 3, 64, 96)
    assert art.min() >= -1
    assert art.max() <= 1
    assert art.flatten(1).std(1).min() > 0.01
