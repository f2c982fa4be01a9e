"""Digests cover values rather than their formatting, and stay the same across versions."""

import math

import pytest

from sdxl_pipeline.files.digest import digest_json


def test_digest_json_matches_golden_digest():
    # echo -n '{"a":[1,2.5,"ü",null,true]}' | sha256sum
    assert (
        digest_json({"a": [1, 2.5, "ü", None, True]})
        == "60ccd85dff29e124c2a05887624664dff788a4e8a49bfa43ad85bd6164778b8f"
    )


def test_digest_json_ignores_key_order_and_sequence_type():
    assert digest_json({"a": 1, "b": (2, 3)}) == digest_json({"b": [2, 3], "a": 1})


@pytest.mark.parametrize(
    "other", [{"a": 1.0}, {"a": "1"}, {"a": True}, {"a": [1]}, {"b": 1}, {"a": 1, "b": None}]
)
def test_digest_json_of_different_values_differs(other):
    assert digest_json({"a": 1}) != digest_json(other)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_digest_json_of_non_finite_numbers_raises(value):
    with pytest.raises(ValueError, match="JSON compliant"):
        digest_json([value])


@pytest.mark.parametrize("value", [{1: "a"}, [{"b": {None: 1}}], {"a": {1, 2}}, object()])
def test_digest_json_of_other_types_raises(value):
    with pytest.raises(TypeError):
        digest_json(value)
