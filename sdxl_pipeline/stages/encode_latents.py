"""Stage: encode the crops of one dataset with the VAE into the latent store.

    python -m sdxl_pipeline.stages.encode_latents spec.json

An entry's key covers the image's content, the crop's geometry, the VAE's weights, the dtype and the version of the code. It does not cover
the device and the other crops of the batch: they select kernels that round differently, so latents from another device may differ in the
last bits of their dtype, far below the noise of the posterior. Under torchrun several processes share the work; the result does not depend
on their number. Torch is imported only when there is something to encode or to preview.
"""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from sdxl_pipeline.cache.encode.cache_keys import latent_keys
from sdxl_pipeline.cache.store.store_folder import StoreFolder
from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.data.scan.dataset_fingerprint import frame_digest
from sdxl_pipeline.files.atomic_files import atomic_path
from sdxl_pipeline.files.digest import digest_json
from sdxl_pipeline.runtime.ranks import Ranks
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import EncodeLatentsSpec, FailedItem, LatentCache
from sdxl_pipeline.runtime.stage_runner import StopSignal, read_finished, run_stage, write_finished

if TYPE_CHECKING:
    from sdxl_pipeline.cache.encode.latent_encoding import EncodedShare

_ENTRY_COLUMNS = ["path", "crop_index", "key", "latent_key"]
_IDENTITY_COLUMNS = ("path", "crop_index", "key", "latent_key")
_CONTENT_COLUMNS = ("key", "crop_index", "latent_key")


def main(spec: EncodeLatentsSpec, reporter: Reporter, stop: StopSignal) -> LatentCache | None:
    """Encode the crops missing from the store and write the table of entries. Return the manifest on the main process, None on the others."""
    started = time.monotonic()
    crops = pd.read_parquet(spec.rows_path)
    crops["latent_key"] = latent_keys(crops, spec.base_model.vae_digest, spec.hardware.vae_dtype)
    ranks = Ranks(Path(spec.entries_path), stop)
    # The lease keeps entries that are in the store now until the manifest refers to them; only the main process takes it.
    lease = StoreFolder(Path(spec.store_root)).lease(crops["latent_key"], purpose="encode latents")
    with lease if ranks.is_main and spec.mode == "full" else nullcontext():
        return _encode(spec, crops, ranks, started, reporter, stop)


def _encode(
    spec: EncodeLatentsSpec,
    crops: pd.DataFrame,
    ranks: Ranks,
    started: float,
    reporter: Reporter,
    stop: StopSignal,
) -> LatentCache | None:
    if ranks.is_main:
        identity = digest_json([spec.store_root, frame_digest(crops, _IDENTITY_COLUMNS)])
        cache = _without_encoding(spec, crops, identity, reporter)
        if cache is not None:
            ranks.broadcast(b"")
            write_finished(Path(spec.entries_path), cache)
            return cache.model_copy(update={"seconds": time.monotonic() - started})
        store = TensorStore(spec.store_root)
        is_missing = crops["latent_key"].isin(store.missing(crops["latent_key"])).to_numpy()
        new = crops["latent_key"][is_missing].nunique()
        reporter.log(f"{len(crops)} crops: {new} to encode, {len(crops) - new} cached.")
        ranks.broadcast(np.packbits(is_missing).tobytes())
    else:
        plan = ranks.receive()
        if not plan:
            return None
        is_missing = np.unpackbits(np.frombuffer(plan, np.uint8), count=len(crops)).astype(bool)
        store = TensorStore(spec.store_root)

    from sdxl_pipeline.cache.encode.latent_encoding import EncodedShare, encode_share

    share = encode_share(spec, crops, is_missing, ranks.rank, ranks.count, store, reporter, stop)
    shares = ranks.gather(share.model_dump_json().encode())
    if shares is None:
        return None
    cache = _finish(
        spec, crops, identity, [EncodedShare.model_validate_json(text) for text in shares], reporter, stop
    )
    cache = cache.model_copy(update={"seconds": time.monotonic() - started})
    write_finished(Path(spec.entries_path), cache)
    return cache


def _without_encoding(
    spec: EncodeLatentsSpec, crops: pd.DataFrame, identity: str, reporter: Reporter
) -> LatentCache | None:
    """Return the manifest if nothing has to be encoded: all is in the store, or deferred to the training. Else return None."""
    if spec.mode != "full":
        return _deferred(spec, crops, identity, reporter)
    finished = read_finished(Path(spec.entries_path), LatentCache, identity)
    if finished is None or finished.failed or finished.deferred:
        return None
    if spec.trust_manifest:
        reporter.log(f"{len(crops)} crops, recorded as encoded; the store is not checked.")
    elif not TensorStore(spec.store_root).missing(crops["latent_key"]):
        reporter.log(f"Nothing to encode: all {len(crops)} crops are in the store.")
    else:
        return None
    update = {"encoded": 0, "reused": len(crops), "images_per_second": None, "vae_busy": None}
    return finished.model_copy(update=update)


def _deferred(spec: EncodeLatentsSpec, crops: pd.DataFrame, identity: str, reporter: Reporter) -> LatentCache:
    """Return the manifest of a plan whose crops the training encodes: missing ones at first use (ondemand), or all at each use."""
    reused, size = 0, 0
    if spec.mode == "ondemand":
        store = TensorStore(spec.store_root)
        cached = crops["latent_key"][~crops["latent_key"].isin(store.missing(crops["latent_key"]))]
        reused, size = len(cached), store.entry_nbytes(cached)
    deferred = len(crops) - reused
    reporter.log(
        f"{len(crops)} crops: {reused} cached, {deferred} deferred to the training (mode {spec.mode})."
    )
    _write_entries(spec, crops)
    return LatentCache(
        identity=identity,
        store_root=spec.store_root,
        entries_path=spec.entries_path,
        digest=frame_digest(crops, _CONTENT_COLUMNS),
        planned=len(crops),
        encoded=0,
        reused=reused,
        deferred=deferred,
        failed=(),
        seconds=0.0,
        images_per_second=None,
        bytes=size,
        latent_mean=(),
        latent_std=(),
        sample_path=None,
    )


def _finish(
    spec: EncodeLatentsSpec,
    crops: pd.DataFrame,
    identity: str,
    shares: "list[EncodedShare]",
    reporter: Reporter,
    stop: StopSignal,
) -> LatentCache:
    """Write the table of entries and return the manifest of all processes' work."""
    from sdxl_pipeline.cache.encode.latent_preview import channel_statistics, write_sample
    from sdxl_pipeline.models.components import latent_scaling_factor

    reasons = {key: reason for share in shares for key, reason in share.reasons.items()}
    failed = crops["latent_key"].isin(list(reasons))
    entries = crops[~failed]
    _write_entries(spec, entries)
    store = TensorStore(spec.store_root)
    mean, std, measured = channel_statistics(
        store, entries["latent_key"], latent_scaling_factor(spec.base_model), stop
    )
    encoded = sum(share.encoded for share in shares)
    seconds = max(share.seconds for share in shares)
    return LatentCache(
        identity=identity,
        store_root=spec.store_root,
        entries_path=spec.entries_path,
        digest=frame_digest(entries, _CONTENT_COLUMNS),
        planned=len(crops),
        encoded=encoded,
        reused=len(entries) - encoded,
        failed=tuple(
            FailedItem(name=path, reason=reasons[key])
            for path, key in zip(crops["path"][failed], crops["latent_key"][failed], strict=True)
        ),
        seconds=0.0,
        images_per_second=encoded / seconds if encoded else None,
        vae_busy=sum(share.busy_seconds for share in shares) / sum(share.seconds for share in shares)
        if encoded
        else None,
        bytes=store.entry_nbytes(entries["latent_key"]),
        latent_mean=mean,
        latent_std=std,
        measured=measured,
        sample_path=write_sample(spec, entries, store, reporter),
    )


def _write_entries(spec: EncodeLatentsSpec, crops: pd.DataFrame) -> None:
    entries = crops[_ENTRY_COLUMNS].astype(
        {"path": "str", "crop_index": "int64", "key": "str", "latent_key": "str"}
    )
    with atomic_path(Path(spec.entries_path)) as temporary:
        entries.to_parquet(temporary, index=False)


if __name__ == "__main__":
    run_stage(EncodeLatentsSpec, main)
