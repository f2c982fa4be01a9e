"""Stage: the crops of one dataset through the VAE into the latent store.

    python -m sdxl_pipeline.stages.encode_latents spec.json

What an entry holds is decided by its key: the picture's content, the crop's geometry, the VAE's weights, the dtype, and the version of
the code. Not in the key are the device and the crops that shared a batch: they choose between kernels that round differently, so latents
made elsewhere may differ in the last bits of their dtype, far below the posterior's own noise. Torch is imported only when there is
something to encode or to show.
"""

import time
from pathlib import Path

import pandas as pd

from sdxl_pipeline.encoding.keys import Row, latent_key
from sdxl_pipeline.protocol.finished import read_finished, write_finished
from sdxl_pipeline.protocol.program import StopSignal, run_stage
from sdxl_pipeline.protocol.reporter import Reporter
from sdxl_pipeline.protocol.specs import EncodeLatentsSpec, LatentCache
from sdxl_pipeline.store.digest import digest_json
from sdxl_pipeline.store.tensor_store import TensorStore


def main(spec: EncodeLatentsSpec, reporter: Reporter, stop: StopSignal) -> LatentCache:
    """Encode the crops that the store lacks, and list where each crop's latents are."""
    started = time.monotonic()
    rows: list[Row] = list(pd.read_parquet(spec.rows_path).itertuples(index=False, name="Row"))
    keys = [latent_key(row, spec.base_model.vae_digest, spec.hardware.vae_dtype) for row in rows]
    identity = digest_json(
        [spec.store_root, [[row.path, int(row.crop_index), key] for row, key in zip(rows, keys, strict=True)]]
    )
    finished = read_finished(Path(spec.entries_path), LatentCache, identity)
    if finished is not None and not finished.failed and not TensorStore(spec.store_root).missing(keys):
        reporter.log(f"Nothing to encode: all {len(rows)} crops are in the store.")
        update = {"encoded": 0, "reused": len(rows), "images_per_second": None}
        return finished.model_copy(update=update | {"seconds": time.monotonic() - started})

    from sdxl_pipeline.encoding.latents import encode_crops

    cache = encode_crops(spec, rows, keys, identity, reporter, stop)
    write_finished(Path(spec.entries_path), cache)
    return cache


if __name__ == "__main__":
    run_stage(EncodeLatentsSpec, main)
