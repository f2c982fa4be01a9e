"""Stage: the crops of one dataset through the VAE into the latent store.

    python -m sdxl_pipeline.stages.encode_latents spec.json

What an entry holds is decided by its key: the image's content, the crop's geometry, the VAE's weights, the dtype, and the version of
the code. Not in the key are the device and the crops that shared a batch: they choose between kernels that round differently, so latents
made elsewhere may differ in the last bits of their dtype, far below the posterior's own noise. Under torchrun several processes share the
work; their number changes no bit. Torch is imported only when there is something to encode or to show.
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
from sdxl_pipeline.data.scan.table_digests import frame_digest
from sdxl_pipeline.files.atomic_files import atomic_path
from sdxl_pipeline.files.digest import digest_json
from sdxl_pipeline.runtime.ranks import Ranks
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import EncodeLatentsSpec, FailedItem, LatentCache
from sdxl_pipeline.runtime.stage_runner import StopSignal, read_finished, run_stage, write_finished

if TYPE_CHECKING:
    from sdxl_pipeline.cache.encode.latent_encoding import EncodedShare

_ENTRY_COLUMNS = ["path", "crop_index", "key", "latent_key"]
_IDENTIFIED_BY = ("path", "crop_index", "key", "latent_key")
_CONTENT = ("key", "crop_index", "latent_key")


def main(spec: EncodeLatentsSpec, reporter: Reporter, stop: StopSignal) -> LatentCache | None:
    """Encode the crops that the store lacks, and list where each crop's latents are. None from all processes but the first."""
    started = time.monotonic()
    crops = pd.read_parquet(spec.rows_path)
    crops["latent_key"] = latent_keys(crops, spec.base_model.vae_digest, spec.hardware.vae_dtype)
    ranks = Ranks(Path(spec.entries_path), stop)
    # What is found in the store now must be there when the manifest names it; the first process's word is enough.
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
        identity = digest_json([spec.store_root, frame_digest(crops, _IDENTIFIED_BY)])
        cache = _without_encoding(spec, crops, identity, reporter)
        if cache is not None:
            ranks.broadcast(b"")
            write_finished(Path(spec.entries_path), cache)
            return cache.model_copy(update={"seconds": time.monotonic() - started})
        store = TensorStore(spec.store_root)
        wanted = crops["latent_key"].isin(store.missing(crops["latent_key"])).to_numpy()
        new = crops["latent_key"][wanted].nunique()
        reporter.log(f"{len(crops)} crops: {new} to encode, {len(crops) - new} cached.")
        ranks.broadcast(np.packbits(wanted).tobytes())
    else:
        plan = ranks.receive()
        if not plan:
            return None
        wanted = np.unpackbits(np.frombuffer(plan, np.uint8), count=len(crops)).astype(bool)
        store = TensorStore(spec.store_root)

    from sdxl_pipeline.cache.encode.latent_encoding import EncodedShare, encode_share

    share = encode_share(spec, crops, wanted, ranks.rank, ranks.count, store, reporter, stop)
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
    """The manifest where nothing is to be encoded: all is in the store, or left to the training. None where something is."""
    if spec.mode != "full":
        return _deferred(spec, crops, identity, reporter)
    finished = read_finished(Path(spec.entries_path), LatentCache, identity)
    if finished is None or finished.failed or finished.deferred:
        return None
    if spec.trust_recorded:
        reporter.log(f"{len(crops)} crops, recorded as encoded; the store is not looked at.")
    elif not TensorStore(spec.store_root).missing(crops["latent_key"]):
        reporter.log(f"Nothing to encode: all {len(crops)} crops are in the store.")
    else:
        return None
    update = {"encoded": 0, "reused": len(crops), "images_per_second": None, "vae_busy": None}
    return finished.model_copy(update=update)


def _deferred(spec: EncodeLatentsSpec, crops: pd.DataFrame, identity: str, reporter: Reporter) -> LatentCache:
    """The manifest of a plan whose crops the training encodes: at first use those that the store lacks, or at each use all."""
    reused, held = 0, 0
    if spec.mode == "ondemand":
        store = TensorStore(spec.store_root)
        there = crops["latent_key"][~crops["latent_key"].isin(store.missing(crops["latent_key"]))]
        reused, held = len(there), store.entry_nbytes(there)
    deferred = len(crops) - reused
    reporter.log(f"{len(crops)} crops: {reused} cached, {deferred} left to the training (mode {spec.mode}).")
    _write_entries(spec, crops)
    return LatentCache(
        identity=identity,
        store_root=spec.store_root,
        entries_path=spec.entries_path,
        digest=frame_digest(crops, _CONTENT),
        planned=len(crops),
        encoded=0,
        reused=reused,
        deferred=deferred,
        failed=(),
        seconds=0.0,
        images_per_second=None,
        bytes=held,
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
    """Write the table of entries, and tell what all processes did."""
    from sdxl_pipeline.cache.encode.latent_preview import channel_statistics, write_sample
    from sdxl_pipeline.models.components import latent_scaling_factor

    reasons = {key: reason for share in shares for key, reason in share.reasons.items()}
    lost = crops["latent_key"].isin(list(reasons))
    kept = crops[~lost]
    _write_entries(spec, kept)
    store = TensorStore(spec.store_root)
    mean, std, measured = channel_statistics(
        store, kept["latent_key"], latent_scaling_factor(spec.base_model), stop
    )
    encoded = sum(share.encoded for share in shares)
    seconds = max(share.seconds for share in shares)
    return LatentCache(
        identity=identity,
        store_root=spec.store_root,
        entries_path=spec.entries_path,
        digest=frame_digest(kept, _CONTENT),
        planned=len(crops),
        encoded=encoded,
        reused=len(kept) - encoded,
        failed=tuple(
            FailedItem(name=path, reason=reasons[key])
            for path, key in zip(crops["path"][lost], crops["latent_key"][lost], strict=True)
        ),
        seconds=0.0,
        images_per_second=encoded / seconds if encoded else None,
        vae_busy=sum(share.busy_seconds for share in shares) / sum(share.seconds for share in shares)
        if encoded
        else None,
        bytes=store.entry_nbytes(kept["latent_key"]),
        latent_mean=mean,
        latent_std=std,
        measured=measured,
        sample_path=write_sample(spec, kept, store, reporter),
    )


def _write_entries(spec: EncodeLatentsSpec, crops: pd.DataFrame) -> None:
    entries = crops[_ENTRY_COLUMNS].astype(
        {"path": "str", "crop_index": "int64", "key": "str", "latent_key": "str"}
    )
    with atomic_path(Path(spec.entries_path)) as temporary:
        entries.to_parquet(temporary, index=False)


if __name__ == "__main__":
    run_stage(EncodeLatentsSpec, main)
