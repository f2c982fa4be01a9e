"""Shuffled captions: the same ones everywhere, each tag there once, and the first ones where they were."""

import pytest

from sdxl_pipeline.config.schema.datasets import CaptionShuffle
from sdxl_pipeline.data.captions.caption_shuffle import shuffled_captions

TAGS = "dog, running, park, sunny day"


def shuffle(caption: str, **settings) -> list[str]:
    return shuffled_captions(caption, CaptionShuffle(enable=True, **settings))


def test_variants_hold_every_tag_once_and_keep_the_first():
    made = shuffle(TAGS, count=5, seed=42, position_start=1)
    assert made[0] == TAGS
    assert len(made) == len(set(made)) == 6
    for caption in made:
        assert caption.startswith("dog, ")
        assert sorted(caption.split(", ")) == sorted(TAGS.split(", "))


def test_variants_are_the_same_on_every_machine_and_differ_by_seed_and_caption():
    assert shuffle(TAGS, count=2, seed=42) == shuffle(TAGS, count=2, seed=42)
    assert shuffle(TAGS, count=2, seed=42) == [TAGS, *shuffle(TAGS, count=2, seed=42, include_original=False)]
    assert shuffle(TAGS, count=3, seed=42)[:3] == shuffle(TAGS, count=2, seed=42)
    many = ", ".join(f"tag {number}" for number in range(20))
    assert shuffle(many, seed=1)[1] != shuffle(many, seed=2)[1]
    golden = ["b, a, c, d", "a, c, d, b"]
    assert shuffle("a, b, c, d", count=2, seed=0, include_original=False) == golden


def test_few_tags_give_as_many_orders_as_there_are():
    assert shuffle("a, b", count=9) == ["a, b", "b, a"]
    assert len(shuffle("a, b, c", count=9)) == 6
    for caption in ("alone", "same, same", "", "fixed, alone"):
        assert shuffle(caption, position_start=1 if "fixed" in caption else 0, include_original=False) == [
            caption
        ]
    assert shuffled_captions(TAGS, CaptionShuffle(enable=False, count=3)) == [TAGS]


@pytest.mark.parametrize(
    ("caption", "split_on", "other"),
    [
        ("a  ,b,, ", "comma", "b, a"),
        ("red  fox", "space", "fox red"),
        ("A fox. It runs.", "period", "It runs. A fox."),
        ("A fox. It runs", "period", "It runs. A fox"),
        ("A screw of 3.5 mm. It is v1.0.2", "period", "It is v1.0.2. A screw of 3.5 mm"),
        ("See example.com. It is new.", "period", "It is new. See example.com."),
    ],
)
def test_tags_are_split_and_joined_by_their_separator(caption, split_on, other):
    assert shuffle(caption, split_on=split_on) == [caption, other]
