"""Tests of caption shuffling: determinism, complete tags, and fixed leading tags."""

import pytest

from sdxl_pipeline.config.schema.datasets import CaptionShuffle
from sdxl_pipeline.data.captions.caption_rules import shuffled_captions

TAGS = "dog, running, park, sunny day"


def shuffle(caption: str, **settings) -> list[str]:
    return shuffled_captions(caption, CaptionShuffle(enable=True, **settings))


def test_shuffled_captions_permute_tags_after_position_start():
    variants = shuffle(TAGS, count=5, seed=42, position_start=1)
    assert variants[0] == TAGS
    assert len(variants) == len(set(variants)) == 6
    for caption in variants:
        assert caption.startswith("dog, ")
        assert sorted(caption.split(", ")) == sorted(TAGS.split(", "))


def test_shuffled_captions_are_deterministic_by_seed_and_caption():
    assert shuffle(TAGS, count=2, seed=42) == shuffle(TAGS, count=2, seed=42)
    assert shuffle(TAGS, count=2, seed=42) == [TAGS, *shuffle(TAGS, count=2, seed=42, include_original=False)]
    assert shuffle(TAGS, count=3, seed=42)[:3] == shuffle(TAGS, count=2, seed=42)
    many = ", ".join(f"tag {number}" for number in range(20))
    assert shuffle(many, seed=1)[1] != shuffle(many, seed=2)[1]
    golden = ["b, a, c, d", "a, c, d, b"]
    assert shuffle("a, b, c, d", count=2, seed=0, include_original=False) == golden


def test_shuffled_captions_few_tags_give_all_orders():
    assert shuffle("a, b", count=9) == ["a, b", "b, a"]
    assert len(shuffle("a, b, c", count=9)) == 6
    for caption in ("alone", "same, same", "", "fixed, alone"):
        assert shuffle(caption, position_start=1 if "fixed" in caption else 0, include_original=False) == [
            caption
        ]
    assert shuffled_captions(TAGS, CaptionShuffle(enable=False, count=3)) == [TAGS]


@pytest.mark.parametrize(
    ("caption", "split_on", "variant"),
    [
        ("a  ,b,, ", "comma", "b, a"),
        ("red  fox", "space", "fox red"),
        ("A fox. It runs.", "period", "It runs. A fox."),
        ("A fox. It runs", "period", "It runs. A fox"),
        ("A screw of 3.5 mm. It is v1.0.2", "period", "It is v1.0.2. A screw of 3.5 mm"),
        ("See example.com. It is new.", "period", "It is new. See example.com."),
    ],
)
def test_shuffled_captions_split_and_join_by_separator(caption, split_on, variant):
    assert shuffle(caption, split_on=split_on) == [caption, variant]
