"""Masks: which image each belongs to, and what a crop of one is worth at each place of the latents.

A mask is an image of the same shape as its own, at any scale: white is learned, black is ignored. It is drawn on the upright image,
as every viewer shows it.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from PIL import Image, ImageChops

from sdxl_pipeline.config.schema.datasets import MaskKind
from sdxl_pipeline.data.buckets.crop_plan import Crop
from sdxl_pipeline.data.decoding.colour import split_alpha, to_srgb
from sdxl_pipeline.data.decoding.image_decoding import unexpected_as_unreadable, upright
from sdxl_pipeline.data.decoding.pixels import crop_window, decoded, load_upright
from sdxl_pipeline.data.scan.file_types import split_suffix
from sdxl_pipeline.data.scan.table_digests import frame_digest

LATENT_SCALE: Final = 8
"""Pixels across a place of the latents, SDXL's VAE being f8."""

NO_MASK: Final = "no mask"
SEVERAL_MASKS: Final = "several masks, none of which has the image's own extension"
OTHER_SHAPE: Final = "the mask has another shape; it must be drawn on the upright image (EXIF orientation)"
OTHER_MASK: Final = "a copy of the same image has another mask, or none"
NO_IMAGE: Final = "mask without image"

_PAIR_COLUMNS = ("path", "key", "mask_path", "mask_key")


@dataclass(frozen=True)
class MaskPairs:
    """The masks of a scanned dataset's kept images."""

    pairs: pd.DataFrame
    """A row per image that has a mask: path and key of the image, mask_path and mask_key of the mask (keys as a scan's)."""
    without: pd.DataFrame
    """path and reason of every kept image that has none."""
    unused: pd.DataFrame
    """path and reason of every mask that is no kept image's."""

    @property
    def refused(self) -> pd.DataFrame:
        """Those of `without` that have a mask which cannot be theirs."""
        return self.without[self.without["reason"] != NO_MASK]

    def digest(self) -> str:
        """Hex digest of which content is masked by which, in any order and under any names."""
        return frame_digest(self.pairs, ("key", "mask_key"))


def pair_masks(images: pd.DataFrame, masks: pd.DataFrame) -> MaskPairs:
    """Give each kept image its mask, of the kept files of a scan of masks.

    A mask has the path of its image within its own folder, the extension aside: of several the one with the image's extension, too.
    Accents may be encoded either way (Unicode's normal forms). Its shape must be the image's, up to the rounding of a smaller copy.
    Copies of one image under several names must have one mask, since they are told apart by nothing but their captions.
    """
    kept = images.loc[images["status"] == "kept", ["path", "key", "height", "width"]].reset_index(drop=True)
    usable = masks[masks["status"] == "kept"].reset_index(drop=True)
    found = [_mask_of(path, candidates) for path, candidates in _candidates(kept, usable)]
    reasons = np.array([place if isinstance(place, str) else "" for place in found], dtype=object)
    paired = reasons == ""
    places = [place for place in found if not isinstance(place, str)]
    pairs = kept[paired].reset_index(drop=True)
    for name in ("path", "key", "height", "width"):
        pairs[f"mask_{name}"] = usable[name].iloc[places].to_numpy()
    wrong = np.where(_same_shape(pairs), "", OTHER_SHAPE).astype(object)
    different = (pairs.groupby("key")["mask_key"].transform("nunique") > 1) | pairs["key"].isin(
        kept["key"][~paired]
    )
    wrong[(wrong == "") & different.to_numpy(bool)] = OTHER_MASK
    reasons[paired] = wrong
    used = set(pairs["mask_path"])
    unused = masks.loc[(masks["status"] == "kept") & ~masks["path"].isin(used), ["path"]].assign(
        reason=NO_IMAGE
    )
    dropped = masks.loc[masks["status"] != "kept", ["path", "reason"]]
    return MaskPairs(
        pairs=pairs.loc[wrong == "", list(_PAIR_COLUMNS)].astype("str").reset_index(drop=True),
        without=_reasons(kept["path"][reasons != ""], reasons[reasons != ""]),
        unused=pd.concat([unused, dropped], ignore_index=True).astype("str"),
    )


@unexpected_as_unreadable()
def mask_crop(mask: Path | bytes, crop: Crop, kind: MaskKind) -> np.ndarray:
    """What a crop of a mask is worth at each place of the latents, from 0 (ignored) to 1: float32, (bucket_h / 8, bucket_w / 8).

    The crop is cut, resized and mirrored as `load_crop` does it with the image; each value is the mean of its place's 8 x 8 pixels.
    The resampling is bilinear, whose kernel has no negative lobes, so that no light falls on a black place from a white one further off
    than a pixel. Of kind `segmentation`, every place that is not black all over counts in full. Raises UnreadableImage.
    """
    grey = _grey(mask, kind)
    window = crop_window(crop, grey.height, grey.width)
    cut = np.asarray(grey.resize((crop.bucket_w, crop.bucket_h), Image.Resampling.BILINEAR, box=window))
    if crop.flipped:
        cut = cut[:, ::-1]
    height, width = crop.bucket_h // LATENT_SCALE, crop.bucket_w // LATENT_SCALE
    places = cut.reshape(height, LATENT_SCALE, width, LATENT_SCALE)
    if kind == "segmentation":
        return np.asarray(places.any(axis=(1, 3)), dtype=np.float32)
    # a sum of integers: all white gives exactly 1
    total = places.sum(axis=(1, 3), dtype=np.int64)
    return np.asarray(total / (255 * LATENT_SCALE**2), dtype=np.float32)


@unexpected_as_unreadable()
def overlaid(image: Path, mask: Path, kind: MaskKind, longest_edge: int = 448) -> Image.Image:
    """The upright image, with what its mask ignores darkened towards red. Raises UnreadableImage."""
    shown = load_upright(image, longest_edge)
    learned = _grey(mask, kind).resize(shown.size, Image.Resampling.BILINEAR)
    if kind == "segmentation":
        learned = learned.point(lambda value: 255 if value else 0)
    ignored = Image.blend(shown, Image.new("RGB", shown.size, (170, 0, 40)), 0.7)
    return Image.composite(shown, ignored, learned)


def _grey(mask: Path | bytes, kind: MaskKind) -> Image.Image:
    """The upright mask in mode L. A coloured mask counts by its red, as in SimpleTuner; a coloured segmentation by any colour.

    What is transparent is not there, and so ignored.
    """
    with decoded(mask) as image:
        flat, alpha = split_alpha(upright(image))
    bands = to_srgb(flat, None).split()
    grey = bands[0] if kind == "mask" else reduce(ImageChops.lighter, bands)
    return grey if alpha is None else ImageChops.multiply(grey, alpha)


def _candidates(images: pd.DataFrame, masks: pd.DataFrame) -> list[tuple[str, Sequence[tuple[str, int]]]]:
    """Per image, its path and the masks of its stem: (path, position) each."""
    by_stem: dict[str, list[tuple[str, int]]] = {}
    for position, path in enumerate(masks["path"].tolist()):
        by_stem.setdefault(_stem(path), []).append((_composed(path), position))
    return [(_composed(path), by_stem.get(_stem(path), ())) for path in images["path"].tolist()]


def _mask_of(path: str, candidates: Sequence[tuple[str, int]]) -> int | str:
    """The position of the image's mask, or why it has none."""
    if not candidates:
        return NO_MASK
    same = [position for name, position in candidates if name == path]
    if len(same) == 1:
        return same[0]
    return candidates[0][1] if len(candidates) == 1 else SEVERAL_MASKS


def _same_shape(pairs: pd.DataFrame) -> Any:
    """Whether some scale takes each image to its mask, both edges to within a pixel."""
    skew = pairs["mask_height"] * pairs["width"] - pairs["mask_width"] * pairs["height"]
    return (skew.abs() <= pairs["height"] + pairs["width"]).to_numpy(bool)


def _reasons(paths: "pd.Series[str]", reasons: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(
        {"path": paths.tolist(), "reason": reasons.tolist()}, columns=["path", "reason"], dtype="str"
    )


def _stem(path: str) -> str:
    return _composed(split_suffix(path)[0])


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
