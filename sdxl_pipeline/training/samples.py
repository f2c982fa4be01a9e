"""The pictures a run trains or is measured on: crop plan, latent entry and text entries of each, joined. No torch."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from sdxl_pipeline.protocol.program import StageError
from sdxl_pipeline.protocol.specs import TrainingLane
from sdxl_pipeline.store.digest import digest_json

Split = Literal["train", "eval"]
MicroConditioning = Literal["original", "resized"]

NAMED_IN_ERRORS = 5
"""How many pictures an error names before it only counts the rest."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One crop of one picture, with the keys of everything that was encoded from it. Sizes and places are (height, width), pixels."""

    dataset_id: str
    path: str
    crop_index: int
    key: str  # digest of the picture's bytes
    latent_key: str
    embed_keys: tuple[str, ...]  # one per caption
    bucket: tuple[int, int]
    original_size: tuple[int, int]  # SDXL's micro-conditioning, see `load_samples`
    crop_top_left: tuple[int, int]

    @property
    def id(self) -> str:
        """Names the sample within its run; every random choice about it is drawn from this name."""
        return f"{self.dataset_id}/{self.path}#{self.crop_index}"

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """(original height, original width, crop top, crop left, target height, target width): SDXL's size conditioning."""
        return (*self.original_size, *self.crop_top_left, *self.bucket)


def load_samples(
    lanes: Sequence[TrainingLane], split: Split, micro_conditioning: MicroConditioning = "original"
) -> list[Sample]:
    """The samples of one split of all lanes, ordered by dataset, path and crop.

    `micro_conditioning` says what SDXL is told as the picture's original size: the file's own, or the size it was resized to.
    Pictures that the latent stage reported as failed are left out. Raises StageError when a picture has no latent or no caption
    embedding otherwise, or when the stages saw different bytes under one path: the caches are then older than the dataset.
    """
    return [sample for lane in lanes for sample in _load_lane(lane, split, micro_conditioning)]


def samples_digest(samples: Sequence[Sample]) -> str:
    """Hex SHA-256 over everything training reads of the samples: equal digests mean equal latents, embeddings and time ids."""
    return digest_json([[s.id, s.key, s.latent_key, s.embed_keys, s.time_ids] for s in samples])


def _load_lane(lane: TrainingLane, split: Split, micro_conditioning: MicroConditioning) -> list[Sample]:
    rows = pd.read_parquet(lane.rows_path)
    rows = rows[rows["split"] == split].sort_values(["path", "crop_index"])
    latents = {
        (path, crop_index): (key, latent_key)
        for path, crop_index, key, latent_key in _read(
            lane.latents.entries_path, "path", "crop_index", "key", "latent_key"
        )
    }
    captions: dict[str, list[tuple[str, str]]] = {}
    for path, key, embed_key in _read(lane.text_embeds.entries_path, "path", "key", "embed_key"):
        captions.setdefault(path, []).append((key, embed_key))

    failed = {item.name for item in lane.latents.failed}
    crops = [
        row
        for row in rows.to_dict("records")
        if (row["path"], row["crop_index"]) in latents or row["path"] not in failed
    ]
    _require(
        lane, "latent", [row["path"] for row in crops if (row["path"], row["crop_index"]) not in latents]
    )
    _require(lane, "caption embedding", [row["path"] for row in crops if row["path"] not in captions])
    return [
        _join(lane, row, latents[row["path"], row["crop_index"]], captions[row["path"]], micro_conditioning)
        for row in crops
    ]


def _join(
    lane: TrainingLane,
    row: Mapping[Hashable, Any],
    latent: tuple[str, str],
    captions: Sequence[tuple[str, str]],
    micro_conditioning: MicroConditioning,
) -> Sample:
    """One sample of a row of the crop plan and of the (picture's key, tensors' key) pairs that go by the same path."""
    if {row["key"]} != {latent[0], *(key for key, _ in captions)}:
        raise StageError(
            f"dataset {lane.dataset_id!r}: the crop plan, the latents and the caption embeddings of {row['path']!r} come from "
            "different versions of the picture; materialize the dataset's aspect_buckets, vae_latents and text_embeds again"
        )
    size = "original" if micro_conditioning == "original" else "resized"
    return Sample(
        dataset_id=lane.dataset_id,
        path=row["path"],
        crop_index=int(row["crop_index"]),
        key=row["key"],
        latent_key=latent[1],
        embed_keys=tuple(embed_key for _, embed_key in captions),
        bucket=(int(row["bucket_h"]), int(row["bucket_w"])),
        original_size=(int(row[f"{size}_h"]), int(row[f"{size}_w"])),
        crop_top_left=(int(row["crop_top"]), int(row["crop_left"])),
    )


def _read(path: str, *columns: str) -> Iterator[tuple[Any, ...]]:
    return pd.read_parquet(path, columns=list(columns)).itertuples(index=False, name=None)


def _require(lane: TrainingLane, what: str, missing: list[str]) -> None:
    if missing:
        names = ", ".join(missing[:NAMED_IN_ERRORS]) + (", ..." if len(missing) > NAMED_IN_ERRORS else "")
        raise StageError(
            f"dataset {lane.dataset_id!r}: {len(missing)} pictures of the crop plan have no {what} ({names}); "
            "materialize the dataset's vae_latents and text_embeds again"
        )
