"""The crops of a dataset through the VAE into the latent store."""

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL
from PIL import Image, PngImagePlugin

from sdxl_pipeline.encoding.keys import Row
from sdxl_pipeline.images.decoding import UnreadableImage
from sdxl_pipeline.images.pictures import contact_sheet
from sdxl_pipeline.images.pixels import load_crop
from sdxl_pipeline.protocol.program import StageError, StopSignal
from sdxl_pipeline.protocol.reporter import Reporter
from sdxl_pipeline.protocol.specs import EncodeLatentsSpec, FailedItem, LatentCache
from sdxl_pipeline.sdxl.components import latent_scaling_factor, load_vae
from sdxl_pipeline.sdxl.latents import decode, encode_moments, pixels_from_crops
from sdxl_pipeline.sdxl.model_files import BaseModelError
from sdxl_pipeline.sdxl.precision import dtype_from_name
from sdxl_pipeline.store.digest import digest_json
from sdxl_pipeline.store.files import atomic_path, sha256_file
from sdxl_pipeline.store.tensor_store import TensorStore

SAMPLE_CROPS = 4
_DECODING_THREADS = min(4, os.cpu_count() or 1)
_BATCHES_AHEAD = 2
_SAMPLE_DIGEST = "latents"


def encode_crops(
    spec: EncodeLatentsSpec,
    rows: list[Row],
    keys: list[str],
    identity: str,
    reporter: Reporter,
    stop: StopSignal,
) -> LatentCache:
    """Encode the crops that the store lacks, and list where each crop's latents are.

    `keys` are the rows' store keys. Raises StageError when the VAE cannot be had; a picture that cannot be read is named in the result.
    """
    started = time.monotonic()
    store = TensorStore(spec.store_root)
    missing = set(store.missing(keys))
    to_encode: dict[str, Row] = {}
    for row, key in zip(rows, keys, strict=True):
        if key in missing:
            to_encode.setdefault(key, row)  # one picture twice is encoded once
    reporter.log(f"{len(rows)} crops: {len(to_encode)} to encode, {len(rows) - len(to_encode)} cached.")

    vae = _load_vae(spec) if to_encode else None
    encoding_started = time.monotonic()
    reasons = _encode(vae, spec, to_encode, store, reporter, stop) if vae is not None else {}
    encoding_seconds = time.monotonic() - encoding_started

    failed = tuple(
        FailedItem(name=row.path, reason=reasons[key])
        for row, key in zip(rows, keys, strict=True)
        if key in reasons
    )
    kept = [(row, key) for row, key in zip(rows, keys, strict=True) if key not in reasons]
    kept_keys = [key for _, key in kept]
    _write_entries(Path(spec.entries_path), kept)
    mean, std = _channel_statistics(store, kept_keys, latent_scaling_factor(spec.base_model), stop)
    _write_sample(vae, spec, kept, store, reporter)
    encoded = len(to_encode) - len(reasons)
    return LatentCache(
        identity=identity,
        store_root=spec.store_root,
        entries_path=spec.entries_path,
        digest=digest_json(kept_keys),
        planned=len(rows),
        encoded=encoded,
        reused=len(kept) - encoded,
        failed=failed,
        seconds=time.monotonic() - started,
        images_per_second=encoded / encoding_seconds if encoded else None,
        bytes=store.entry_nbytes(kept_keys),
        latent_mean=mean,
        latent_std=std,
        sample_path=spec.sample_path if kept else None,
    )


def _load_vae(spec: EncodeLatentsSpec) -> AutoencoderKL:
    try:
        vae = load_vae(spec.base_model, dtype_from_name(spec.hardware.vae_dtype))
    except BaseModelError as error:
        raise StageError(str(error)) from error
    return vae.to(spec.hardware.device)


def _encode(
    vae: AutoencoderKL,
    spec: EncodeLatentsSpec,
    to_encode: dict[str, Row],
    store: TensorStore,
    reporter: Reporter,
    stop: StopSignal,
) -> dict[str, str]:
    """Encode crops into the store; for those that could not be, give the reason by key.

    Whatever is finished when the stop signal comes is kept.
    """
    reasons: dict[str, str] = {}
    done = 0
    with store.writer() as writer:
        batches = _batches_of_one_size(to_encode, spec.hardware.vae_batch_size)
        for batch_keys, loaded in _load_ahead(batches, to_encode, Path(spec.data_dir)):
            stop.raise_if_requested()
            reasons |= {k: crop for k, crop in zip(batch_keys, loaded, strict=True) if isinstance(crop, str)}
            crops = {k: crop for k, crop in zip(batch_keys, loaded, strict=True) if not isinstance(crop, str)}
            if crops:
                moments = encode_moments(vae, pixels_from_crops(list(crops.values())))
                mean, logvar = (moment.cpu() for moment in moments)  # one transfer a batch
                finite = (mean.isfinite() & logvar.isfinite()).flatten(1).all(1).tolist()
                for index, key in enumerate(crops):
                    if finite[index]:
                        writer.add(key, {"mean": mean[index], "logvar": logvar[index]})
                    else:
                        reasons[key] = (
                            f"the VAE gave NaN or infinite latents in {spec.hardware.vae_dtype}; set vae_dtype to fp32"
                        )
            done += len(batch_keys)
            reporter.progress("encode latents", done, len(to_encode), "crops")
    return reasons


def _batches_of_one_size(to_encode: dict[str, Row], batch_size: int) -> list[list[str]]:
    """Keys in batches that share a bucket, buckets in the order they first appear."""
    buckets: dict[tuple[int, int], list[str]] = {}
    for key, row in to_encode.items():
        buckets.setdefault((row.bucket_h, row.bucket_w), []).append(key)
    return [
        bucket[start : start + batch_size]
        for bucket in buckets.values()
        for start in range(0, len(bucket), batch_size)
    ]


def _load_ahead(
    batches: list[list[str]], rows: dict[str, Row], data_dir: Path
) -> Iterator[tuple[list[str], list[np.ndarray | str]]]:
    """Each batch with its crops, or the reason where there is none; the next batches are decoded in threads meanwhile."""
    waiting: deque[tuple[list[str], list[Future[np.ndarray | str]]]] = deque()
    pool = ThreadPoolExecutor(_DECODING_THREADS, thread_name_prefix="decode")
    try:
        for batch in batches:
            waiting.append((batch, [pool.submit(_load_crop, data_dir, rows[key]) for key in batch]))
            if len(waiting) > _BATCHES_AHEAD:
                keys, futures = waiting.popleft()
                yield keys, [future.result() for future in futures]
        for keys, futures in waiting:
            yield keys, [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


def _load_crop(data_dir: Path, row: Row) -> np.ndarray | str:
    """The crop, or why there is none."""
    path = data_dir / row.path
    try:
        # an edited picture must not be stored under the old one's key, where it would stay
        if sha256_file(path) != row.key:
            return "changed since the dataset was scanned; materialize the dataset again"
        return load_crop(path, row)
    except UnreadableImage as error:
        return error.reason
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _write_entries(path: Path, kept: Sequence[tuple[Row, str]]) -> None:
    entries = pd.DataFrame(
        [(row.path, int(row.crop_index), row.key, key) for row, key in kept],
        columns=["path", "crop_index", "key", "latent_key"],
    ).astype({"path": "str", "crop_index": "int64", "key": "str", "latent_key": "str"})
    with atomic_path(path) as temporary:
        entries.to_parquet(temporary, index=False)


def _channel_statistics(
    store: TensorStore, keys: list[str], scaling_factor: float, stop: StopSignal
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of the scaled posterior means: near 0 and 1 for pictures the VAE knows."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for key in keys:
        stop.raise_if_requested()
        channels = store.read(key)["mean"].double().flatten(1) * scaling_factor  # (4, h * w)
        count += channels.shape[1]
        total = total + channels.sum(1)
        squares = squares + channels.square().sum(1)
    if not count:
        return (), ()
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def _write_sample(
    vae: AutoencoderKL | None,
    spec: EncodeLatentsSpec,
    kept: list[tuple[Row, str]],
    store: TensorStore,
    reporter: Reporter,
) -> None:
    """Draw some crops, spread over the dataset, beside what their latents decode to."""
    path = Path(spec.sample_path)
    count = min(SAMPLE_CROPS, len(kept))
    chosen = [kept[index * len(kept) // count] for index in range(count)]
    digest = digest_json([[row.path, key] for row, key in chosen])
    if not chosen or _sample_digest(path) == digest:
        return
    vae = vae if vae is not None else _load_vae(spec)
    scaling_factor = latent_scaling_factor(spec.base_model)
    pictures, labels = [], []
    for row, key in chosen:
        crop = _load_crop(Path(spec.data_dir), row)
        if isinstance(crop, str):  # it was readable when its latents were made
            continue
        decoded = decode(vae, store.read(key)["mean"][None] * scaling_factor)[0]  # (3, H, W)
        decoded_pixels = decoded.permute(1, 2, 0).mul(255).round().byte().cpu().numpy()
        pictures += [Image.fromarray(crop), Image.fromarray(decoded_pixels)]
        labels += [f"{row.path} {row.bucket_w}x{row.bucket_h}", "decoded from its latents"]
    if not pictures:
        return
    about = PngImagePlugin.PngInfo()
    about.add_text(_SAMPLE_DIGEST, digest)
    with atomic_path(path) as temporary:
        contact_sheet(pictures, labels, columns=min(4, len(pictures)), tile=256).save(
            temporary, pnginfo=about
        )
    reporter.image("decoded latents", path, "crops beside their decoded latents")


def _sample_digest(path: Path) -> str | None:
    """Which crops an existing sample shows."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get(_SAMPLE_DIGEST)
