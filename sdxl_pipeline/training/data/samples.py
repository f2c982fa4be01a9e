"""The images a run trains or is measured on: crop plan, latent entry and text entries of each, joined. No torch.

An image is known by its content. Nothing here depends on what the files are called, nor on the order they were found in: where one
content stands twice in a dataset, the copies are numbered by their captions.
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
from sdxl_pipeline.data.scan.table_digests import frame_digest
from sdxl_pipeline.runtime.specs import TrainingDataset
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.rng import derive_seed

Split = Literal["train", "eval"]
MicroConditioning = Literal["original", "resized"]

NAMED_IN_ERRORS = 5
"""How many images an error names before it only counts the rest."""

_GEOMETRY = tuple(Crop.__dataclass_fields__)
_IMAGE = ["dataset_id", "key", "copy"]
_DIGESTED = (
    *_IMAGE,
    "crop_index",
    "latent_key",
    "original_height",
    "original_width",
    "crop_top",
    "crop_left",
    "bucket_h",
    "bucket_w",
    "flipped",
    "embed_keys",
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One crop of one image, with the keys of everything that was encoded from it. Sizes and places are (height, width), pixels."""

    dataset_id: str
    key: str  # digest of the image's bytes
    copy: int  # 0, or its number among images of this content in the dataset
    crop_index: int
    path: str  # within the dataset's folder; nothing but reading the file depends on it
    crop: Crop
    latent_key: str | None  # None for a crop that is not kept
    embed_keys: tuple[str, ...]  # one per caption
    original_size: tuple[int, int]  # SDXL's micro-conditioning, see `load_samples`

    @property
    def image(self) -> str:
        """Names the image within its run; random choices about it are drawn from this name."""
        return f"{self.dataset_id}/{self.key}" + (f"~{self.copy}" if self.copy else "")

    @property
    def id(self) -> str:
        """Names the sample within its run."""
        return f"{self.image}#{self.crop_index}"

    @property
    def bucket(self) -> tuple[int, int]:
        """Size of the crop."""
        return self.crop.bucket_h, self.crop.bucket_w

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """(original height, original width, crop top, crop left, target height, target width): SDXL's size conditioning."""
        return (*self.original_size, self.crop.crop_top, self.crop.crop_left, *self.bucket)


class Samples(Sequence[Sample]):
    """Samples in columns, since a run may have millions; those of one image stand together, by their crop_index.

    `frame` has a row per sample: dataset_id, key, copy, crop_index, path, latent_key, the fields of Crop, original_height and original_width (the size
    that SDXL is told), and embed_keys, joined by spaces. It is sorted by the first four, which makes the order a matter of content.
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

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        row = {name: values[place] for name, values in self._columns.items()}
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
    def first(self) -> np.ndarray:
        """Where each image's samples begin: int64 of shape (images,)."""
        if not len(self):
            return np.empty(0, np.int64)
        begins = np.zeros(len(self), bool)
        begins[0] = True
        for name in _IMAGE:
            codes, _ = pd.factorize(self._frame[name])
            begins[1:] |= codes[1:] != codes[:-1]
        return np.flatnonzero(begins)

    @cached_property
    def crops(self) -> np.ndarray:
        """How many samples each image has: int64 of shape (images,)."""
        return np.diff(self.first, append=len(self))

    @cached_property
    def datasets(self) -> tuple[np.ndarray, list[str]]:
        """The dataset of each image, as its number in the sorted list of names: ((images,), names)."""
        codes, names = pd.factorize(self._frame["dataset_id"].iloc[self.first], sort=True)
        return codes, [str(name) for name in names]

    @cached_property
    def buckets(self) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """The bucket of each sample, as its number in the sorted list of sizes: ((samples,), sizes)."""
        height, width = (self._columns[name].astype(np.int64) for name in ("bucket_h", "bucket_w"))
        sizes, codes = np.unique(height << 32 | width, return_inverse=True)
        return codes, [(size >> 32, size & (2**32 - 1)) for size in sizes.tolist()]

    @cached_property
    def random_draws(self) -> np.ndarray:
        """A random number below 2**64 for each image, a function of its name alone: uint64 of shape (images,)."""
        images = self._frame.iloc[self.first]
        digests = bytes.fromhex("".join(images["key"].tolist()))
        content = np.frombuffer(digests, ">u8").reshape(len(images), -1)[:, 0].astype(np.uint64)
        codes, names = self.datasets
        copies, number = np.unique(images["copy"].to_numpy(), return_inverse=True)
        salts = np.array(
            [[derive_seed("picture", name, copy) for copy in copies.tolist()] for name in names], np.uint64
        ).reshape(len(names), -1)
        return content ^ salts[codes, number]

    def images_by_dataset(self) -> dict[str, int]:
        """How many images each dataset has."""
        codes, names = self.datasets
        return dict(zip(names, np.bincount(codes, minlength=len(names)).tolist(), strict=True))

    def keys_by_dataset(self) -> dict[str, set[str]]:
        """The digests of the images of each dataset."""
        groups = self._frame.groupby("dataset_id", sort=False)["key"]
        return {str(name): set(keys) for name, keys in groups}

    def crops_per_image(self) -> dict[str, float]:
        """Mean number of crops of the images of each dataset."""
        codes, names = self.datasets
        return {name: float(self.crops[codes == code].mean()) for code, name in enumerate(names)}

    def one_of_each(self) -> "Samples":
        """Of each image the first crop that is not mirrored: what images are measured by."""
        mirrored = self._frame["flipped"].to_numpy().astype(bool)
        place = np.where(mirrored, len(self), 0) + np.arange(len(self))
        best = np.minimum.reduceat(place, self.first) if len(self) else place
        return Samples(self._frame.iloc[best % max(len(self), 1)])

    def first_by_key(self, count: int, datasets: Collection[str] | None = None) -> "Samples":
        """The first `count` by the digests of their images, of all datasets or some."""
        frame = (
            self._frame if datasets is None else self._frame[self._frame["dataset_id"].isin(list(datasets))]
        )
        return Samples(frame.sort_values(["key", "dataset_id", "copy", "crop_index"]).head(count))

    def digest(self) -> str:
        """Hex SHA-256 over everything training reads of the samples: equal digests mean equal latents, embeddings and time ids."""
        return frame_digest(self._frame, _DIGESTED)


def load_samples(
    datasets: Iterable[TrainingDataset], split: Split, micro_conditioning: MicroConditioning = "original"
) -> Samples:
    """The samples of one split of all datasets. Of images to be measured by, one that is not mirrored.

    `micro_conditioning` says what SDXL is told as the image's original size: the file's own, or the size it was resized to.
    Images that the latent stage reported as failed are left out, and so is from training what another dataset holds out. Raises
    UserError when an image has no latent or no caption embedding otherwise: the caches are then older than the dataset.
    """
    datasets = list(datasets)
    frame = pd.concat(
        [_load_dataset(dataset, split, micro_conditioning) for dataset in datasets], ignore_index=True
    )
    if split == "eval":
        return Samples(frame).one_of_each()
    held_out = held_out_keys(
        pd.read_parquet(dataset.rows_path, columns=["key", "split"]) for dataset in datasets
    )
    return Samples(frame[~frame["key"].isin(held_out)])


def held_out_keys(plans: Iterable[pd.DataFrame]) -> set[str]:
    """Return the content keys of the images that a training dataset holds out, given the crop plans of all datasets.

    Such an image trains in no dataset, also where a second one holds the same file and would train it: the LoRA is judged by it. An eval
    dataset, which has no image to train on, holds none out.
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
    lacking = rows["latent_key"].isna()
    if lacking.any():
        failed = {item.name for item in dataset.latents.failed}
        _require(dataset, "latent", [path for path in rows.loc[lacking, "path"] if path not in failed])
        rows = rows[~lacking]
    captions = _captions_by_copy(dataset)
    rows = rows.merge(captions, on=["key", "copy"], how="left", sort=False)
    _require(dataset, "caption embedding", rows.loc[rows["embed_keys"].isna(), "path"].tolist())
    _require_as_many(dataset, rows, captions)
    told = "original" if micro_conditioning == "original" else "resized"
    rows["original_height"], rows["original_width"] = rows[f"{told}_h"], rows[f"{told}_w"]
    rows["dataset_id"] = pd.Series(dataset.dataset_id, index=rows.index, dtype="str")
    return rows


def _captions_by_copy(dataset: TrainingDataset) -> pd.DataFrame:
    """key, copy and embed_keys (joined by spaces) of every image; copies of one content are numbered by them."""
    texts = pd.read_parquet(dataset.text_embeds.entries_path, columns=["path", "key", "embed_key"])
    places, _ = pd.factorize(texts["path"])
    if (np.bincount(places) > 1).any() if len(places) else False:
        images = texts.groupby(["path", "key"], sort=False)["embed_key"].agg(" ".join).reset_index()
    else:
        images = texts
    images = images.drop(columns="path").rename(columns={"embed_key": "embed_keys"}, errors="ignore")
    if images["key"].duplicated().any():
        images = images.sort_values(["key", "embed_keys"])
    images["copy"] = images.groupby("key", sort=False).cumcount()
    return images


def _require_as_many(dataset: TrainingDataset, rows: pd.DataFrame, captions: pd.DataFrame) -> None:
    """Raise UserError when captions are known of a copy that is not in the plan: the rest would be paired by guessing."""
    if captions["copy"].any():
        further = captions[captions["copy"] > 0]
        known = set(zip(rows["key"], rows["copy"], strict=True))
        kept = set(rows["key"])
        _require(
            dataset,
            "place for each caption of their copies",
            [
                key
                for key, copy in zip(further["key"], further["copy"], strict=True)
                if key in kept and (key, copy) not in known
            ],
        )


def _require(dataset: TrainingDataset, what: str, missing: list[str]) -> None:
    if missing:
        distinct = list(dict.fromkeys(missing))
        names = ", ".join(distinct[:NAMED_IN_ERRORS]) + (", ..." if len(distinct) > NAMED_IN_ERRORS else "")
        raise UserError(
            f"dataset {dataset.dataset_id!r}: {len(distinct)} images of the crop plan have no {what} ({names}); "
            "materialize the dataset's vae_latents and text_embeds again"
        )
