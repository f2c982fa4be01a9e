"""Loss masks and regularisation weights of a batch: cropped like the images, at the resolution of the latents."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from sdxl_pipeline.config.schema.masks import MaskSettings
from sdxl_pipeline.data.buckets.crop_plan import Crop
from sdxl_pipeline.data.decoding.image_decoding import UnreadableImage
from sdxl_pipeline.data.masks.mask_pairs import LATENT_SCALE, mask_crop
from sdxl_pipeline.runtime.specs import TrainingDataset
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.mask_tables import MaskTable, mask_tables
from sdxl_pipeline.training.data.samples import Sample
from sdxl_pipeline.training.rng import uniform

MASK_CACHE_BYTES = 256 << 20
"""Memory for cropped masks: about 4,000 crops of a megapixel."""


@dataclass(frozen=True)
class LossMask:
    """The loss weights of some images, and which of them are regularisation images."""

    keys: tuple[str, ...]
    weights: Tensor | None  # (B, 1, H/8, W/8) or (B, 1, 1, 1) float32; None: 1 everywhere
    prior: tuple[bool, ...] = ()  # whether the target is the base model's prediction; (): for none


class MaskReader:
    """Reads the masks of samples. Nothing is cached on disk: a cropped mask has a thousandth of its image's size.

    The most recently used crops are cached in memory, so that a dataset of typical size is decoded once. Not thread-safe.
    """

    def __init__(self, tables: Mapping[str, MaskTable]) -> None:
        self._tables = tables
        self._cache: OrderedDict[tuple[str, Crop], Tensor] = OrderedDict()
        self._bytes = 0

    def read(self, samples: Sequence[Sample], masked: Sequence[bool]) -> LossMask:
        """Return the masks of samples of one bucket, with weights (B, 1, H/8, W/8) from 0 (ignored) to 1.

        Images without a mask, and those that are not `masked`, get ones. Raises UserError with the path of a mask that cannot be read, or
        has changed since it was scanned.
        """
        masks = [self._mask(sample, is_masked) for sample, is_masked in zip(samples, masked, strict=True)]
        return LossMask(tuple(sample.key for sample in samples), torch.stack(masks))

    def _mask(self, sample: Sample, masked: bool) -> Tensor:
        table = self._tables.get(sample.dataset_id)
        file = table.files.get(sample.key) if table is not None and masked else None
        if table is None or file is None:
            return torch.ones(1, sample.crop.bucket_h // LATENT_SCALE, sample.crop.bucket_w // LATENT_SCALE)
        cache_key = (file[1] + table.kind, sample.crop)
        if cache_key in self._cache:
            self._cache.move_to_end(cache_key)
            return self._cache[cache_key]
        mask = _read_crop(table, *file, sample.crop)
        self._cache[cache_key] = mask
        self._bytes += mask.nbytes
        while self._bytes > MASK_CACHE_BYTES:
            self._bytes -= self._cache.popitem(last=False)[1].nbytes
        return mask


def _read_crop(table: MaskTable, name: str, key: str, crop: Crop) -> Tensor:
    path = table.folder / name
    try:
        data = path.read_bytes()
        if sha256(data).hexdigest() != key:
            raise UnreadableImage("changed since it was scanned")
        return torch.from_numpy(mask_crop(data, crop, table.kind))[None]
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    except UnreadableImage as error:
        reason = error.reason
    raise UserError(f"the mask {path}: {reason}. Fix the file, and materialize the dataset's masks again")


@dataclass(frozen=True)
class LossWeights:
    """The loss weights of the images of each batch: a pure function of (seed, batch, slot) and the image."""

    masks: MaskReader | None = None
    """None if no dataset has masks."""
    mask_probability: float = 1.0
    """Share of the appearances of masked images to which the mask is applied."""
    prior: frozenset[str] = frozenset()
    """The datasets of regularisation images."""
    prior_weight: float = 1.0
    """Weight of regularisation images; all others have 1."""
    use_base_prediction: bool = True
    """Whether their target is the base model's prediction; False where the base model's own weights are trained."""

    def for_batch(self, samples: Sequence[Sample], seed: int, index: int, slots: Sequence[int]) -> LossMask:
        """Return the loss weights of samples of one bucket that have these slots in the global batch `index`."""
        keys = tuple(sample.key for sample in samples)
        prior = tuple(sample.dataset_id in self.prior for sample in samples)
        weights = None
        if self.masks is not None:
            masked = [uniform(seed, "masked loss", index, slot) < self.mask_probability for slot in slots]
            read = self.masks.read(samples, masked)
            keys, weights = read.keys, read.weights
        if self.prior and self.prior_weight != 1.0:
            per_image = torch.tensor([self.prior_weight if is_prior else 1.0 for is_prior in prior])
            per_image = per_image[:, None, None, None]
            weights = per_image if weights is None else weights * per_image
        return LossMask(keys, weights, prior if self.prior and self.use_base_prediction else ())


def build_loss_weights(
    datasets: Sequence[TrainingDataset], settings: MaskSettings, *, use_base_prediction: bool
) -> LossWeights:
    """Return the loss weights of the datasets."""
    tables = mask_tables(datasets)
    return LossWeights(
        masks=MaskReader(tables) if tables else None,
        mask_probability=settings.masked_loss_probability,
        prior=frozenset(dataset.dataset_id for dataset in datasets if dataset.is_regularisation),
        prior_weight=settings.prior_loss_weight,
        use_base_prediction=use_base_prediction,
    )


UNIFORM_LOSS = LossWeights()
"""The loss weights of runs without masks and regularisation images."""
