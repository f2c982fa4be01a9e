"""Crops of a dataset through the VAE into the latent store."""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL

from sdxl_pipeline.cache.encode.cache_keys import Row
from sdxl_pipeline.cache.encode.crop_batches import crop_batches, crop_costs, own_share
from sdxl_pipeline.cache.encode.crop_table import read_crops, require_folder
from sdxl_pipeline.cache.encode.encoder_devices import Computed, load_latent_encoder, sent
from sdxl_pipeline.cache.encode.encoder_overflow import explain_latents
from sdxl_pipeline.cache.store.tensor_store import StorageError, StoreWriter, TensorStore
from sdxl_pipeline.data.decoding.image_decoding import UnreadableImage
from sdxl_pipeline.models.vae import encode_moments, pixels_from_bytes
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import EncodeLatentsSpec, StageModel
from sdxl_pipeline.runtime.stage_runner import StopSignal, UserError

# Enough that decoding does not hold up a fast GPU, few enough that images of 100 megapixels do not fill the memory.
_MOST_DECODING_THREADS = 16
_BATCHES_AHEAD = 2


class EncodedShare(StageModel):
    """What one process did."""

    encoded: int
    reasons: dict[str, str]
    """Of each latent key that could not be had, why."""
    seconds: float
    """From the first image to the last entry, loading of the VAE apart."""
    busy_seconds: float
    """Of these, inside the VAE."""


def encode_share(
    spec: EncodeLatentsSpec,
    crops: pd.DataFrame,
    wanted: np.ndarray,
    rank: int,
    processes: int,
    store: TensorStore,
    reporter: Reporter,
    stop: StopSignal,
) -> EncodedShare:
    """Encode this process's share of the wanted crops (bool, (N,)) into the store.

    `crops` are rows of the plan with their `latent_key`. An image that cannot be read is named in the result. Raises UserError when
    the VAE cannot be had, the images' folder is gone, or the store's disk is full. What was encoded before any end is kept.
    """
    batches = crop_batches(crops, wanted, spec.hardware.vae_batch_size)
    costs = crop_costs(crops)
    own = [batches[i] for i in own_share([int(costs[rows].sum()) for rows in batches], rank, processes)]
    work = _Work(total=sum(map(len, own)))
    if not own:
        return work.share(0.0)
    vae = load_latent_encoder(spec.base_model, spec.hardware)
    explain = partial(explain_latents, vae, spec.hardware.vae_dtype, spec.base_model)
    started = time.perf_counter()
    try:
        with store.writer() as writer, ThreadPoolExecutor(1, thread_name_prefix="store") as storing:
            # The last batch is copied back and stored while the encoder has the next one.
            last: Future[None] | None = None
            for rows, loaded in _load_ahead(own, crops, Path(spec.data_dir), processes):
                stop.raise_if_requested()
                done = work.taken
                keys, moments = work.take(vae, rows, loaded, crops, Path(spec.data_dir))
                if last is not None:
                    last.result()
                    reporter.progress("encode latents", done, work.total, "crops")
                last = storing.submit(work.store, keys, moments, writer, explain)
            if last is not None:
                last.result()
    except StorageError as error:
        raise UserError(str(error)) from error
    reporter.progress("encode latents", work.taken, work.total, "crops")
    return work.share(time.perf_counter() - started)


@dataclass
class _Work:
    """What has been done so far."""

    total: int
    taken: int = 0
    busy_seconds: float = 0.0
    reasons: dict[str, str] = field(default_factory=dict)

    def take(
        self,
        vae: AutoencoderKL,
        rows: np.ndarray,
        loaded: Sequence[np.ndarray | str],
        crops: pd.DataFrame,
        data_dir: Path,
    ) -> tuple[list[str], Computed | None]:
        """Start encoding a batch without those that could not be loaded: the latent keys, and their moments to come."""
        self.taken += len(rows)
        keys = crops["latent_key"].iloc[rows].tolist()
        failed = {k: crop for k, crop in zip(keys, loaded, strict=True) if isinstance(crop, str)}
        sound = {k: crop for k, crop in zip(keys, loaded, strict=True) if not isinstance(crop, str)}
        if failed:
            require_folder(data_dir)
            self.reasons |= failed
        if not sound:
            return [], None
        pixels = pixels_from_bytes(sent(torch.from_numpy(np.stack(list(sound.values()))), vae.device))
        return list(sound), Computed(vae.device, lambda: encode_moments(vae, pixels))

    def store(
        self, keys: list[str], moments: Computed | None, writer: StoreWriter, explain: Callable[[], str]
    ) -> None:
        """Store a batch once it is encoded; `explain` gives the reason for latents that are not finite."""
        if moments is None:
            return
        (mean, logvar), busy_seconds = moments.result()
        self.busy_seconds += busy_seconds
        finite = (mean.isfinite() & logvar.isfinite()).flatten(1).all(1).tolist()
        for index, key in enumerate(keys):
            if finite[index]:
                writer.add(key, {"mean": mean[index], "logvar": logvar[index]})
            else:
                self.reasons[key] = explain()

    def share(self, seconds: float) -> EncodedShare:
        """The whole of it."""
        return EncodedShare(
            encoded=self.taken - len(self.reasons),
            reasons=self.reasons,
            seconds=seconds,
            busy_seconds=self.busy_seconds,
        )


def _load_ahead(
    batches: Sequence[np.ndarray], crops: pd.DataFrame, data_dir: Path, processes: int
) -> Iterator[tuple[np.ndarray, list[np.ndarray | str]]]:
    """Each batch with its crops, or the reason where there is none; the next batches are decoded in threads meanwhile.

    Threads, since Pillow leaves the interpreter to the others while it decodes and resamples, and their results need not be copied.
    """
    threads = min(_MOST_DECODING_THREADS, max(1, _cores() // processes))
    ahead = _BATCHES_AHEAD + math.ceil(threads / len(batches[0]))
    elsewhere = _copies(crops)
    waiting: deque[tuple[np.ndarray, list[Future[list[np.ndarray | str]]]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:

        def first_of_waiting() -> tuple[np.ndarray, list[np.ndarray | str]]:
            rows, futures = waiting.popleft()
            return rows, [crop for future in futures for crop in future.result()]

        try:
            for batch in batches:
                rows: list[Row] = list(crops.iloc[batch].itertuples(index=False, name="Row"))
                images = [list(group) for _, group in groupby(rows, key=lambda row: (row.key, row.path))]
                waiting.append((batch, [pool.submit(_load, data_dir, same, elsewhere) for same in images]))
                if len(waiting) > ahead:
                    yield first_of_waiting()
            while waiting:
                yield first_of_waiting()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _load(
    data_dir: Path, rows: Sequence[Row], elsewhere: Mapping[str, Sequence[str]]
) -> list[np.ndarray | str]:
    """The crops of one image, or why there are none; where it lies in several places, from the first at which it still does."""
    reason = ""
    for path in dict.fromkeys((rows[0].path, *elsewhere.get(rows[0].key, ()))):
        try:
            return [*read_crops(data_dir / path, rows[0].key, rows)]
        except UnreadableImage as error:
            reason = reason or error.reason
    return [reason] * len(rows)


def _copies(crops: pd.DataFrame) -> dict[str, list[str]]:
    """The paths of images that lie in several places, by key."""
    images = crops[["key", "path"]].drop_duplicates()
    copies = images[images["key"].duplicated(keep=False)]
    return {str(key): paths.tolist() for key, paths in copies.groupby("key")["path"]}


def _cores() -> int:
    """Cores that this process may use, of which a container may have fewer than its machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
