"""Encoding of a dataset's crops by the VAE into the latent store."""

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
from sdxl_pipeline.cache.encode.crop_batches import (
    batches_of_rank,
    crop_batches,
    crop_costs,
    read_crops,
    require_folder,
)
from sdxl_pipeline.cache.encode.encoders import DeviceResult, explain_latents, load_latent_encoder, to_device
from sdxl_pipeline.cache.store.tensor_store import StorageError, StoreWriter, TensorStore
from sdxl_pipeline.data.decoding.image_decoding import UnreadableImage
from sdxl_pipeline.models.vae import encode_moments, pixels_from_bytes
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import EncodeLatentsSpec, StageModel
from sdxl_pipeline.runtime.stage_runner import StopSignal, UserError

# Enough to keep a fast GPU busy, few enough that images of 100 megapixels fit into memory.
_MAX_DECODING_THREADS = 16
_BATCHES_AHEAD = 2


class EncodedShare(StageModel):
    """Result of one process."""

    encoded: int
    reasons: dict[str, str]
    """Latent key -> why it could not be encoded."""
    seconds: float
    """From the first image to the last entry, without loading the VAE."""
    busy_seconds: float
    """The part of `seconds` spent in the VAE."""


def encode_share(
    spec: EncodeLatentsSpec,
    crops: pd.DataFrame,
    selected: np.ndarray,
    rank: int,
    processes: int,
    store: TensorStore,
    reporter: Reporter,
    stop: StopSignal,
) -> EncodedShare:
    """Encode this process's share of the selected crops (bool, (N,)) into the store.

    `crops` are rows of the plan with their `latent_key`. Unreadable images are listed in the result. Raises UserError when the VAE cannot
    be loaded, the image folder is missing, or the store's disk is full. Entries encoded before that are retained.
    """
    batches = crop_batches(crops, selected, spec.hardware.vae_batch_size)
    costs = crop_costs(crops)
    batches = [
        batches[i] for i in batches_of_rank([int(costs[rows].sum()) for rows in batches], rank, processes)
    ]
    progress = _EncodeProgress(total=sum(map(len, batches)))
    if not batches:
        return progress.result_of_process(0.0)
    vae = load_latent_encoder(spec.base_model, spec.hardware)
    explain = partial(explain_latents, vae, spec.hardware.vae_dtype, spec.base_model)
    started = time.perf_counter()
    try:
        with store.writer() as writer, ThreadPoolExecutor(1, thread_name_prefix="store") as storing:
            # The previous batch is copied back and stored while the VAE encodes the next one.
            pending: Future[None] | None = None
            for rows, loaded in _load_ahead(batches, crops, Path(spec.data_dir), processes):
                stop.raise_if_requested()
                before = progress.submitted
                keys, moments = progress.submit(vae, rows, loaded, crops, Path(spec.data_dir))
                if pending is not None:
                    pending.result()
                    reporter.progress("encode latents", before, progress.total, "crops")
                pending = storing.submit(progress.store, keys, moments, writer, explain)
            if pending is not None:
                pending.result()
    except StorageError as error:
        raise UserError(str(error)) from error
    reporter.progress("encode latents", progress.submitted, progress.total, "crops")
    return progress.result_of_process(time.perf_counter() - started)


@dataclass
class _EncodeProgress:
    """Progress and results so far."""

    total: int
    submitted: int = 0
    busy_seconds: float = 0.0
    reasons: dict[str, str] = field(default_factory=dict)

    def submit(
        self,
        vae: AutoencoderKL,
        rows: np.ndarray,
        loaded: Sequence[np.ndarray | str],
        crops: pd.DataFrame,
        data_dir: Path,
    ) -> tuple[list[str], DeviceResult | None]:
        """Start encoding the loadable crops of a batch; return their latent keys and pending moments (None if there are none)."""
        self.submitted += len(rows)
        keys = crops["latent_key"].iloc[rows].tolist()
        failed = {k: crop for k, crop in zip(keys, loaded, strict=True) if isinstance(crop, str)}
        readable = {k: crop for k, crop in zip(keys, loaded, strict=True) if not isinstance(crop, str)}
        if failed:
            require_folder(data_dir)
            self.reasons |= failed
        if not readable:
            return [], None
        pixels = pixels_from_bytes(to_device(torch.from_numpy(np.stack(list(readable.values()))), vae.device))
        return list(readable), DeviceResult(vae.device, lambda: encode_moments(vae, pixels))

    def store(
        self, keys: list[str], moments: DeviceResult | None, writer: StoreWriter, explain: Callable[[], str]
    ) -> None:
        """Store an encoded batch; `explain` returns the reason for non-finite latents."""
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

    def result_of_process(self, seconds: float) -> EncodedShare:
        """Return the result of this process."""
        return EncodedShare(
            encoded=self.submitted - len(self.reasons),
            reasons=self.reasons,
            seconds=seconds,
            busy_seconds=self.busy_seconds,
        )


def _load_ahead(
    batches: Sequence[np.ndarray], crops: pd.DataFrame, data_dir: Path, processes: int
) -> Iterator[tuple[np.ndarray, list[np.ndarray | str]]]:
    """Yield each batch with its crops, or the reason a crop has none; threads decode the next batches meanwhile.

    Threads rather than processes: Pillow releases the GIL while it decodes and resamples, and results need no copy.
    """
    threads = min(_MAX_DECODING_THREADS, max(1, _available_cores() // processes))
    ahead = _BATCHES_AHEAD + math.ceil(threads / len(batches[0]))
    other_paths = _duplicate_paths(crops)
    queue: deque[tuple[np.ndarray, list[Future[list[np.ndarray | str]]]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:

        def next_batch() -> tuple[np.ndarray, list[np.ndarray | str]]:
            rows, futures = queue.popleft()
            return rows, [crop for future in futures for crop in future.result()]

        try:
            for batch in batches:
                rows: list[Row] = list(crops.iloc[batch].itertuples(index=False, name="Row"))
                images = [list(group) for _, group in groupby(rows, key=lambda row: (row.key, row.path))]
                queue.append(
                    (batch, [pool.submit(_load, data_dir, image_rows, other_paths) for image_rows in images])
                )
                if len(queue) > ahead:
                    yield next_batch()
            while queue:
                yield next_batch()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _load(
    data_dir: Path, rows: Sequence[Row], other_paths: Mapping[str, Sequence[str]]
) -> list[np.ndarray | str]:
    """Return the crops of one image, or for each the reason it has none; an image with several paths is read from the first readable one."""
    reason = ""
    for path in dict.fromkeys((rows[0].path, *other_paths.get(rows[0].key, ()))):
        try:
            return [*read_crops(data_dir / path, rows[0].key, rows)]
        except UnreadableImage as error:
            reason = reason or error.reason
    return [reason] * len(rows)


def _duplicate_paths(crops: pd.DataFrame) -> dict[str, list[str]]:
    """Return the paths of images that have several, by key."""
    images = crops[["key", "path"]].drop_duplicates()
    duplicates = images[images["key"].duplicated(keep=False)]
    return {str(key): paths.tolist() for key, paths in duplicates.groupby("key")["path"]}


def _available_cores() -> int:
    """Return the number of cores available to this process, which a container may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
