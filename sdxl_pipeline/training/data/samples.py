"""The images that a run is trained or evaluated on: crop plan, latent entry and caption entries, joined. Imports no torch.

An image is identified by its content. Nothing here depends on file names or on the order in which files were listed: if a dataset
contains the same content several times, the copies are numbered by their captions.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_pipeline.data.buckets.crop_plan import Crop
from sdxl_pipeline.data.scan.dataset_fingerprint import frame_digest
from sdxl_pipeline.runtime.specs import TrainingDataset
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.rng import derive_seed

Split = Literal["train", "eval"]
MicroConditioning = Literal["original", "resized"]

MAX_LISTED_IMAGES = 5
"""Images listed in an error; the rest are counted."""

_GEOMETRY = tuple(Crop.__dataclass_fields__)
_IMAGE = ["dataset_id", "key", "copy"]
# Names of columns are part of the digest, and so of every run's identity: these have been renamed since.
_DIGEST_NAMES = {"original_height": "told_h", "original_width": "told_w"}
_DIGESTED = (
    *_IMAGE,
    "crop_index",
    "latent_key",
    "told_h",
    "told_w",
    "crop_top",
    "crop_left",
    "bucket_h",
    "bucket_w",
    "flipped",
    "embed_keys",
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One crop of one image, with the keys of its cache entries. Sizes and positions are (height, width) in pixels."""

    dataset_id: str
    key: str  # digest of the image's bytes
    copy: int  # index among images of the same content in the dataset
    crop_index: int
    path: str  # relative to the dataset's folder; used only to read the file
    crop: Crop
    latent_key: str | None  # None for a crop that is not cached
    embed_keys: tuple[str, ...]  # one per caption
    original_size: tuple[int, int]  # SDXL's micro-conditioning, see `load_samples`

    @property
    def image(self) -> str:
        """Return the id of the image within its run; random choices about the image are derived from it."""
        return f"{self.dataset_id}/{self.key}" + (f"~{self.copy}" if self.copy else "")

    @property
    def id(self) -> str:
        """Return the id of the sample within its run."""
        return f"{self.image}#{self.crop_index}"

    @property
    def bucket(self) -> tuple[int, int]:
        """Return the size of the crop."""
        return self.crop.bucket_h, self.crop.bucket_w

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """Return (original height, original width, crop top, crop left, target height, target width): SDXL's size conditioning."""
        return (*self.original_size, self.crop.crop_top, self.crop.crop_left, *self.bucket)


class Samples(Sequence[Sample]):
    """Samples stored in columns, since a run may have millions; the samples of one image are adjacent, ordered by crop_index.

    `frame` has a row per sample: dataset_id, key, copy, crop_index, path, latent_key, the fields of Crop, original_height and
    original_width (SDXL's micro-conditioning), and embed_keys, joined by spaces. It is sorted by the first four columns, so that the order
    depends on content alone.
    """

    def __init__(self, frame: pd.DataFrame) -> None:
        by = [*_IMAGE, "crop_index"]
        order = pc.sort_indices(
            pa.table({name: pa.array(frame[name]) for name in by}),
            sort_keys=[(name, "ascending") for name in by],
        )
        self._frame = frame.iloc[order.to_numpy()].reset_index(drop=True)
        self._columns: dict[str, Any] = {
            name: column.array if pd.api.types.is_string_dtype(column) else column.to_numpy()
            for name, column in self._frame.items()
        }

    def __len__(self) -> int:
        return len(self._frame)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[item] for item in range(*index.indices(len(self)))]
        row = {name: values[index] for name, values in self._columns.items()}
        return Sample(
            dataset_id=str(row["dataset_id"]),
            key=str(row["key"]),
            copy=int(row["copy"]),
            crop_index=int(row["crop_index"]),
            path=str(row["path"]),
            crop=Crop(
                **{name: int(row[name]) for name in _GEOMETRY if name != "flipped"},
                flipped=bool(row["flipped"]),
            ),
            latent_key=str(row["latent_key"]),
            embed_keys=tuple(str(row["embed_keys"]).split(" ")),
            original_size=(int(row["original_height"]), int(row["original_width"])),
        )

    @cached_property
    def image_starts(self) -> np.ndarray:
        """Return the index of each image's first sample: int64 of shape (images,)."""
        if not len(self):
            return np.empty(0, np.int64)
        begins = np.zeros(len(self), bool)
        begins[0] = True
        for name in _IMAGE:
            codes, _ = pd.factorize(self._frame[name])
            begins[1:] |= codes[1:] != codes[:-1]
        return np.flatnonzero(begins)

    @cached_property
    def crop_counts(self) -> np.ndarray:
        """Return the number of samples of each image: int64 of shape (images,)."""
        return np.diff(self.image_starts, append=len(self))

    @cached_property
    def datasets(self) -> tuple[np.ndarray, list[str]]:
        """Return the dataset of each image, as its index in the sorted list of names: ((images,), names)."""
        codes, names = pd.factorize(self._frame["dataset_id"].iloc[self.image_starts], sort=True)
        return codes, [str(name) for name in names]

    @cached_property
    def buckets(self) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Return the bucket of each sample, as its index in the sorted list of sizes: ((samples,), sizes)."""
        height, width = (self._columns[name].astype(np.int64) for name in ("bucket_h", "bucket_w"))
        sizes, codes = np.unique(height << 32 | width, return_inverse=True)
        return codes, [(size >> 32, size & (2**32 - 1)) for size in sizes.tolist()]

    @cached_property
    def image_hashes(self) -> np.ndarray:
        """Return a hash below 2**64 for each image, a function of its id alone: uint64 of shape (images,)."""
        images = self._frame.iloc[self.image_starts]
        digests = bytes.fromhex("".join(images["key"].tolist()))
        content = np.frombuffer(digests, ">u8").reshape(len(images), -1)[:, 0].astype(np.uint64)
        codes, names = self.datasets
        copies, number = np.unique(images["copy"].to_numpy(), return_inverse=True)
        salts = np.array(
            [[derive_seed("picture", name, copy) for copy in copies.tolist()] for name in names], np.uint64
        ).reshape(len(names), -1)
        return content ^ salts[codes, number]

    def images_by_dataset(self) -> dict[str, int]:
        """Return the number of images of each dataset."""
        codes, names = self.datasets
        return dict(zip(names, np.bincount(codes, minlength=len(names)).tolist(), strict=True))

    def keys_by_dataset(self) -> dict[str, set[str]]:
        """Return the digests of the images of each dataset."""
        groups = self._frame.groupby("dataset_id", sort=False)["key"]
        return {str(name): set(keys) for name, keys in groups}

    def crops_per_image(self) -> dict[str, float]:
        """Return the mean number of crops per image of each dataset."""
        codes, names = self.datasets
        return {name: float(self.crop_counts[codes == code].mean()) for code, name in enumerate(names)}

    def one_crop_per_image(self) -> "Samples":
        """Return the first crop of each image that is not flipped, or its first crop: the samples of the evaluation."""
        flipped = self._frame["flipped"].to_numpy().astype(bool)
        rank = np.where(flipped, len(self), 0) + np.arange(len(self))
        best = np.minimum.reduceat(rank, self.image_starts) if len(self) else rank
        return Samples(self._frame.iloc[best % max(len(self), 1)])

    def first_by_key(self, count: int, datasets: Collection[str] | None = None) -> "Samples":
        """Return the first `count` samples in the order of their images' digests, of all datasets or the given ones."""
        frame = (
            self._frame if datasets is None else self._frame[self._frame["dataset_id"].isin(list(datasets))]
        )
        return Samples(frame.sort_values(["key", "dataset_id", "copy", "crop_index"]).head(count))

    def digest(self) -> str:
        """Return the hex SHA-256 over everything training reads of the samples: equal digests mean equal latents, embeddings and time ids."""
        return frame_digest(self._frame.rename(columns=_DIGEST_NAMES), _DIGESTED)


def load_samples(
    datasets: Iterable[TrainingDataset], split: Split, micro_conditioning: MicroConditioning = "original"
) -> Samples:
    """Return the samples of one split of all datasets; of the split "eval", one unflipped crop per image.

    `micro_conditioning` selects SDXL's original size: that of the file, or the size after resizing. Images that the latent stage reported
    as failed are skipped, and images that any training dataset holds out are excluded from training in all of them. Raises UserError if
    another image has no latent or no caption embedding, which means that the caches are older than the dataset.
    """
    datasets = list(datasets)
    frame = pd.concat(
        [_load_dataset(dataset, split, micro_conditioning) for dataset in datasets], ignore_index=True
    )
    if split == "eval":
        return Samples(frame).one_crop_per_image()
    held_out = held_out_keys(
        pd.read_parquet(dataset.rows_path, columns=["key", "split"]) for dataset in datasets
    )
    return Samples(frame[~frame["key"].isin(held_out)])


def held_out_keys(plans: Iterable[pd.DataFrame]) -> set[str]:
    """Return the content keys of the images that a training dataset holds out, given the crop plans of all datasets.

    Such an image is trained in no dataset, even if a second one contains the same file, because the LoRA is evaluated on it. An eval
    dataset, which has no images to train on, holds none out.
    """
    keys: set[str] = set()
    for plan in plans:
        if (plan["split"] == "train").any():
            keys.update(plan.loc[plan["split"] == "eval", "key"])
    return keys


def _load_dataset(
    dataset: TrainingDataset, split: Split, micro_conditioning: MicroConditioning
) -> pd.DataFrame:
    rows = pd.read_parquet(dataset.rows_path, columns=["path", "key", "crop_index", *_GEOMETRY, "split"])
    rows = rows[rows["split"] == split].drop(columns="split").reset_index(drop=True)
    rows["copy"] = rows.groupby(["key", "crop_index"], sort=False).cumcount()
    entries = pd.read_parquet(dataset.latents.entries_path, columns=["key", "crop_index", "latent_key"])
    entries = entries.drop_duplicates(["key", "crop_index"])
    rows = rows.merge(entries, on=["key", "crop_index"], how="left", sort=False)
    missing = rows["latent_key"].isna()
    if missing.any():
        failed = {item.name for item in dataset.latents.failed}
        _require(dataset, "latent", [path for path in rows.loc[missing, "path"] if path not in failed])
        rows = rows[~missing]
    captions = _captions_by_copy(dataset)
    rows = rows.merge(captions, on=["key", "copy"], how="left", sort=False)
    _require(dataset, "caption embedding", rows.loc[rows["embed_keys"].isna(), "path"].tolist())
    _require_matching_copies(dataset, rows, captions)
    size_source = "original" if micro_conditioning == "original" else "resized"
    rows["original_height"], rows["original_width"] = rows[f"{size_source}_h"], rows[f"{size_source}_w"]
    rows["dataset_id"] = pd.Series(dataset.dataset_id, index=rows.index, dtype="str")
    return rows


def _captions_by_copy(dataset: TrainingDataset) -> pd.DataFrame:
    """Return key, copy and embed_keys (joined by spaces) of every image; copies of the same content are numbered in this order."""
    texts = pd.read_parquet(dataset.text_embeds.entries_path, columns=["path", "key", "embed_key"])
    path_codes, _ = pd.factorize(texts["path"])
    if (np.bincount(path_codes) > 1).any() if len(path_codes) else False:
        images = texts.groupby(["path", "key"], sort=False)["embed_key"].agg(" ".join).reset_index()
    else:
        images = texts
    images = images.drop(columns="path").rename(columns={"embed_key": "embed_keys"}, errors="ignore")
    if images["key"].duplicated().any():
        images = images.sort_values(["key", "embed_keys"])
    images["copy"] = images.groupby("key", sort=False).cumcount()
    return images


def _require_matching_copies(dataset: TrainingDataset, rows: pd.DataFrame, captions: pd.DataFrame) -> None:
    """Raise UserError if captions exist for a copy that the plan lacks: the remaining copies could only be paired by guessing."""
    if captions["copy"].any():
        copies = captions[captions["copy"] > 0]
        planned = set(zip(rows["key"], rows["copy"], strict=True))
        planned_keys = set(rows["key"])
        _require(
            dataset,
            "row for each caption of their copies",
            [
                key
                for key, copy in zip(copies["key"], copies["copy"], strict=True)
                if key in planned_keys and (key, copy) not in planned
            ],
        )


def _require(dataset: TrainingDataset, what: str, missing: list[str]) -> None:
    if missing:
        unique = list(dict.fromkeys(missing))
        names = ", ".join(unique[:MAX_LISTED_IMAGES]) + (", ..." if len(unique) > MAX_LISTED_IMAGES else "")
        raise UserError(
            f"dataset {dataset.dataset_id!r}: {len(unique)} images of the crop plan have no {what} ({names}); "
            "materialize the dataset's vae_latents and text_embeds again"
        )
