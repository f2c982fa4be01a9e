"""Stage: the captions of one dataset, and the prompts that will be drawn, through both text encoders into the text store.

    python -m sdxl_pipeline.stages.encode_text spec.json

A caption that stands under many pictures, or was embedded before, is encoded once. An entry's key is the digest of the caption, both
encoders and tokenizers, the dtype and the version of the code; as with latents, the device and the batch are not in it. Torch is imported
only when there is something to encode.
"""

import time
from pathlib import Path

import pandas as pd

from sdxl_pipeline.encoding.keys import EMPTY_PROMPT, Row, embed_key
from sdxl_pipeline.protocol.finished import read_finished, write_finished
from sdxl_pipeline.protocol.program import StopSignal, run_stage
from sdxl_pipeline.protocol.reporter import Reporter
from sdxl_pipeline.protocol.specs import EncodeTextSpec, TextEmbedCache
from sdxl_pipeline.store.digest import digest_json
from sdxl_pipeline.store.tensor_store import TensorStore


def main(spec: EncodeTextSpec, reporter: Reporter, stop: StopSignal) -> TextEmbedCache:
    """Embed the captions that the store lacks, and list where each one's embeddings are."""
    started = time.monotonic()
    rows: list[Row] = list(pd.read_parquet(spec.captions_path).itertuples(index=False, name="Row"))
    texts = dict.fromkeys((EMPTY_PROMPT, *spec.extra_prompts, *(row.caption for row in rows)))
    keys = {text: embed_key(text, spec.base_model.text_digest, spec.hardware.text_dtype) for text in texts}
    identity = digest_json(
        [spec.store_root, list(spec.extra_prompts), [[row.path, row.key, keys[row.caption]] for row in rows]]
    )
    finished = read_finished(Path(spec.entries_path), TextEmbedCache, identity)
    if finished is not None and not TensorStore(spec.store_root).missing(keys.values()):
        reporter.log(f"Nothing to encode: all {len(keys)} captions are in the store.")
        update = {"encoded": 0, "reused": len(keys), "captions_per_second": None}
        return finished.model_copy(update=update | {"seconds": time.monotonic() - started})

    from sdxl_pipeline.encoding.text import encode_captions

    cache = encode_captions(spec, rows, keys, identity, reporter, stop)
    write_finished(Path(spec.entries_path), cache)
    return cache


if __name__ == "__main__":
    run_stage(EncodeTextSpec, main)
