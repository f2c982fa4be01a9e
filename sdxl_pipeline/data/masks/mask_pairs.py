"""Masks: their pairing with images, and the loss weights of a mask's crop at the resolution of the latents.

A mask is an image with the aspect of its image, at any scale: white is learned, black is ignored. It refers to the upright image, as
displayed by every viewer.
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
from sdxl_pipeline.data.decoding.image_decoding import unexpected_as_unreadable, upright
from sdxl_pipeline.data.decoding.pixels import crop_window, decode_file, load_upright, split_alpha, to_srgb
from sdxl_pipeline.data.scan.dataset_fingerprint import frame_digest
from sdxl_pipeline.data.scan.file_listing import split_suffix

LATENT_SCALE: Final = 8
"""Pixels per latent position along an edge (SDXL's VAE is f8)."""

NO_MASK: Final = "no mask"
SEVERAL_MASKS: Final = "several masks, none of which has the image's own extension"
OTHER_SHAPE: Final = "the mask has another shape; it must be made for the upright image (EXIF orientation)"
OTHER_MASK: Final = "a copy of the same image has another mask, or none"
NO_IMAGE: Final = "mask without image"

_PAIR_COLUMNS = ("path", "key", "mask_path", "mask_key")


@dataclass(frozen=True)
class MaskPairs:
    """The masks of a scanned dataset's kept images."""

    pairs: pd.DataFrame
    """A row per image with a mask: path and key of the image, mask_path and mask_key of the mask (content keys of the scan)."""
    unmasked: pd.DataFrame
    """path and reason of every kept image without a usable mask."""
    unused: pd.DataFrame
    """path and reason of every mask that belongs to no kept image."""

    @property
    def rejected(self) -> pd.DataFrame:
        """Rows of `unmasked` whose mask was rejected."""
        return self.unmasked[self.unmasked["reason"] != NO_MASK]


def pairs_digest(pairs: pd.DataFrame) -> str:
    """Return the hex digest of the (image, mask) content pairs, independent of row order and file names."""
    return frame_digest(pairs, ("key", "mask_key"))


def pair_masks(images: pd.DataFrame, masks: pd.DataFrame) -> MaskPairs:
    """Return the pairs of each kept image and its mask, from the scans of images and masks.

    A mask has the relative path of its image except for the extension; of several the one with the image's extension is used. Unicode
    normal forms of accents do not matter. The mask must have the image's aspect, up to the rounding of a smaller copy. Copies of one
    image under several names must have the same mask, since only their captions differ.
    """
    kept = images.loc[images["status"] == "kept", ["path", "key", "height", "width"]].reset_index(drop=True)
    kept_masks = masks[masks["status"] == "kept"].reset_index(drop=True)
    matches = [_mask_of(path, candidates) for path, candidates in _candidates(kept, kept_masks)]
    reasons = np.array([match if isinstance(match, str) else "" for match in matches], dtype=object)
    paired = reasons == ""
    mask_positions = [match for match in matches if not isinstance(match, str)]
    pairs = kept[paired].reset_index(drop=True)
    for name in ("path", "key", "height", "width"):
        pairs[f"mask_{name}"] = kept_masks[name].iloc[mask_positions].to_numpy()
    mismatches = np.where(_same_shape(pairs), "", OTHER_SHAPE).astype(object)
    different = (pairs.groupby("key")["mask_key"].transform("nunique") > 1) | pairs["key"].isin(
        kept["key"][~paired]
    )
    mismatches[(mismatches == "") & different.to_numpy(bool)] = OTHER_MASK
    reasons[paired] = mismatches
    used = set(pairs["mask_path"])
    unused = masks.loc[(masks["status"] == "kept") & ~masks["path"].isin(used), ["path"]].assign(
        reason=NO_IMAGE
    )
    dropped = masks.loc[masks["status"] != "kept", ["path", "reason"]]
    return MaskPairs(
        pairs=pairs.loc[mismatches == "", list(_PAIR_COLUMNS)].astype("str").reset_index(drop=True),
        unmasked=_reasons(kept["path"][reasons != ""], reasons[reasons != ""]),
        unused=pd.concat([unused, dropped], ignore_index=True).astype("str"),
    )


@unexpected_as_unreadable()
def mask_crop(mask: Path | bytes, crop: Crop, kind: MaskKind) -> np.ndarray:
    """Return the loss weights of a mask's crop, from 0 (ignored) to 1: float32 of shape (bucket_h / 8, bucket_w / 8).

    The mask is cropped, resized and mirrored like the image in `load_crop`; each weight is the mean of 8 x 8 pixels. The resampling is
    bilinear, whose kernel has no negative lobes, so that a white region does not affect a black one more than a pixel away. For the kind
    `segmentation` the weight is 1 unless all 8 x 8 pixels are black. Raises UnreadableImage.
    """
    grey = _grey(mask, kind)
    window = crop_window(crop, grey.height, grey.width)
    cut = np.asarray(grey.resize((crop.bucket_w, crop.bucket_h), Image.Resampling.BILINEAR, box=window))
    if crop.flipped:
        cut = cut[:, ::-1]
    height, width = crop.bucket_h // LATENT_SCALE, crop.bucket_w // LATENT_SCALE
    patches = cut.reshape(height, LATENT_SCALE, width, LATENT_SCALE)
    if kind == "segmentation":
        return np.asarray(patches.any(axis=(1, 3)), dtype=np.float32)
    # an integer sum, so that white gives exactly 1
    total = patches.sum(axis=(1, 3), dtype=np.int64)
    return np.asarray(total / (255 * LATENT_SCALE**2), dtype=np.float32)


@unexpected_as_unreadable()
def mask_overlay(image: Path, mask: Path, kind: MaskKind, longest_edge: int = 448) -> Image.Image:
    """Return the upright image with the ignored regions of its mask tinted dark red. Raise UnreadableImage if one cannot be read."""
    image_pixels = load_upright(image, longest_edge)
    learned = _grey(mask, kind).resize(image_pixels.size, Image.Resampling.BILINEAR)
    if kind == "segmentation":
        learned = learned.point(lambda value: 255 if value else 0)
    ignored = Image.blend(image_pixels, Image.new("RGB", image_pixels.size, (170, 0, 40)), 0.7)
    return Image.composite(image_pixels, ignored, learned)


def _grey(mask: Path | bytes, kind: MaskKind) -> Image.Image:
    """Return the upright mask in mode L: the red channel of a coloured mask, as in SimpleTuner; the maximum for a segmentation.

    Transparent pixels are ignored, that is black.
    """
    with decode_file(mask) as image:
        flat, alpha = split_alpha(upright(image))
    bands = to_srgb(flat, None).split()
    grey = bands[0] if kind == "mask" else reduce(ImageChops.lighter, bands)
    return grey if alpha is None else ImageChops.multiply(grey, alpha)


def _candidates(images: pd.DataFrame, masks: pd.DataFrame) -> list[tuple[str, Sequence[tuple[str, int]]]]:
    """Return for each image its path and the (path, position) of each mask with its stem."""
    by_stem: dict[str, list[tuple[str, int]]] = {}
    for position, path in enumerate(masks["path"].tolist()):
        by_stem.setdefault(_stem(path), []).append((_nfc(path), position))
    return [(_nfc(path), by_stem.get(_stem(path), ())) for path in images["path"].tolist()]


def _mask_of(path: str, candidates: Sequence[tuple[str, int]]) -> int | str:
    """Return the position of the image's mask, or the reason why it has none."""
    if not candidates:
        return NO_MASK
    same_extension = [position for name, position in candidates if name == path]
    if len(same_extension) == 1:
        return same_extension[0]
    return candidates[0][1] if len(candidates) == 1 else SEVERAL_MASKS


def _same_shape(pairs: pd.DataFrame) -> Any:
    """Return whether each mask has the size of its image at some scale, both edges to within a pixel."""
    skew = pairs["mask_height"] * pairs["width"] - pairs["mask_width"] * pairs["height"]
    return (skew.abs() <= pairs["height"] + pairs["width"]).to_numpy(bool)


def _reasons(paths: "pd.Series[str]", reasons: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(
        {"path": paths.tolist(), "reason": reasons.tolist()}, columns=["path", "reason"], dtype="str"
    )


def _stem(path: str) -> str:
    return _nfc(split_suffix(path)[0])


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)
