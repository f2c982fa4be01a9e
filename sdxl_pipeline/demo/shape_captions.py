"""Captions of the world's images: varied ones for training, one canonical wording for prompts."""

import random
from collections.abc import Sequence

from sdxl_pipeline.demo.shape_world import Spec

ART_CAPTIONS = (
    "abstract art",
    "an abstract picture",
    "an abstract painting with many colours",
    "abstract shapes and patterns",
)
_PLACE_PHRASES: dict[str, Sequence[str]] = {
    "left": ("on the left",),
    "right": ("on the right",),
    "centre": ("in the centre", "in the center", "in the middle"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
}
_EYE_PHRASES = {1: "one eye", 2: "two eyes"}


def article(phrase: str) -> str:
    """Return the indefinite article for `phrase`."""
    return "an" if phrase[0] in "aeiou" else "a"


def canonical_caption(spec: Spec, *, include_centre: bool = False) -> str:
    """Return the canonical caption of `spec`. The place is omitted for the centre unless `include_centre`."""
    place = "" if spec.place == "centre" and not include_centre else " " + _PLACE_PHRASES[spec.place][0]
    noun_phrase = _noun_phrase(spec, spec.size, None)
    return f"{article(noun_phrase)} {noun_phrase}{place} on {article(spec.background)} {spec.background} background"


def sample_caption(spec: Spec, rng: random.Random) -> str:
    """Return a random caption of `spec`, with synonyms, an optional size and several word orders."""
    size = (
        ("small" if spec.size == "small" else rng.choice(("large", "large", "big")))
        if rng.random() < 0.88
        else ""
    )
    place = rng.choice(_PLACE_PHRASES[spec.place])
    if spec.place == "centre" and rng.random() < 0.65:
        place = ""
    noun_phrase = _noun_phrase(spec, size, rng)
    indefinite, ground = (
        f"{article(noun_phrase)} {noun_phrase}",
        f"{article(spec.background)} {spec.background} background",
    )
    place_suffix, place_with_comma = (f" {place}", f", {place}") if place else ("", "")
    form = rng.randrange(8)
    if form < 4:
        return f"{indefinite}{place_suffix} on {ground}"
    if form == 4:
        return f"{ground} with {indefinite}{place_suffix}"
    if form == 5:
        return f"{noun_phrase}{place_with_comma}, {spec.background} background"
    if form == 6:
        medium = rng.choice(("an image", "a drawing", "a picture"))
        return f"{medium} of {indefinite}{place_suffix} on {ground}"
    return f"{indefinite}{place_suffix} on {spec.background}"


def _noun_phrase(spec: Spec, size: str, rng: random.Random | None) -> str:
    """Return the noun phrase without article: size, colours, name, and details."""
    colors = spec.color
    noun = spec.noun or spec.shape
    details = []
    if spec.pattern == "striped":
        colors, noun = f"{spec.color} and {spec.second_color}", f"striped {noun}"
    elif spec.pattern == "dotted":
        details.append(f"{spec.second_color} dots")
    if spec.outline:
        details.append(f"{article(spec.outline)} {spec.outline} outline")
    if spec.mark and spec.mark.eyes:
        details.append(_EYE_PHRASES[spec.mark.eyes])
    elif spec.mark:
        details.append(f"a small {spec.mark.color} {spec.mark.shape} inside")
    if rng is not None:
        rng.shuffle(details)
    words = [word for word in (size, colors, noun) if word]
    if details:
        words += ["with", " and ".join(details)]
    return " ".join(words)
