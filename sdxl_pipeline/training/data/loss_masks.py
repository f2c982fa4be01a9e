"""Masks of training images, cut as the images are and brought to the size of the latents, where a batch needs them."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from sdxl_pipeline.data.buckets.crop_plan import Crop
from sdxl_pipeline.data.decoding.image_decoding import UnreadableImage
from sdxl_pipeline.data.masks.mask_pairs import LATENT_SCALE, mask_crop
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.mask_tables import MaskTable
from sdxl_pipeline.training.data.samples import Sample

REMEMBERED_BYTES = 256 << 20
"""Memory for masks that were cut before: about 4,000 crops of a megapixel."""


@dataclass(frozen=True)
class Masks:
    """What each place of some images' latents counts in the loss."""

    keys: tuple[str, ...]
    weights: Tensor  # (B, 1, H/8, W/8) float32, from 0 (ignored) to 1


class MaskReader:
    """Reads the masks of samples. Nothing is kept on disk: a mask is a thousandth of its image once it is cut.

    The latest ones stay in memory, so that a dataset of usual size is decoded once. Not for several threads.
    """

    def __init__(self, tables: Mapping[str, MaskTable]) -> None:
        self._tables = tables
        self._cut: OrderedDict[tuple[str, Crop], Tensor] = OrderedDict()
        self._bytes = 0

    def read(self, samples: Sequence[Sample], masked: Sequence[bool]) -> Masks:
        """The masks of samples of one bucket; ones for an image that has none, or is not `masked`.

        Raises UserError naming a mask that cannot be read, or has changed since it was scanned.
        """
        return Masks(
            keys=tuple(sample.key for sample in samples),
            weights=torch.stack(
                [self._mask(sample, wanted) for sample, wanted in zip(samples, masked, strict=True)]
            ),
        )

    def _mask(self, sample: Sample, masked: bool) -> Tensor:
        table = self._tables.get(sample.dataset_id)
        file = table.files.get(sample.key) if table is not None and masked else None
        if table is None or file is None:
            return torch.ones(1, sample.crop.bucket_h // LATENT_SCALE, sample.crop.bucket_w // LATENT_SCALE)
        name = (file[1] + table.kind, sample.crop)
        if name in self._cut:
            self._cut.move_to_end(name)
            return self._cut[name]
        cut = _cut(table, *file, sample.crop)
        self._cut[name] = cut
        self._bytes += cut.nbytes
        while self._bytes > REMEMBERED_BYTES:
            self._bytes -= self._cut.popitem(last=False)[1].nbytes
        return cut


def _cut(table: MaskTable, path: str, key: str, crop: Crop) -> Tensor:
    place = table.folder / path
    try:
        data = place.read_bytes()
        if sha256(data).hexdigest() != key:
            raise UnreadableImage("changed since it was scanned")
        return torch.from_numpy(mask_crop(data, crop, table.kind))[None]
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    except UnreadableImage as error:
        reason = error.reason
    raise UserError(f"the mask {place}: {reason}. Mend it, and materialize the dataset's masks again")
