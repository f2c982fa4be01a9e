"""Stage: the captions of one dataset, and the prompts that will be drawn, through both text encoders into the text store.

    python -m sdxl_pipeline.stages.encode_text spec.json

A caption that stands under many pictures, or was embedded before, is encoded once. An entry's key is the digest of the caption, both
encoders and tokenizers, the dtype and `TEXT_VERSION`; as with latents, the device and the batch are not in it.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sdxl_pipeline.sdxl.components import load_text_encoders, load_tokenizers
from sdxl_pipeline.sdxl.model_files import BaseModelError
from sdxl_pipeline.sdxl.precision import dtype_from_name, dtype_name
from sdxl_pipeline.sdxl.text_encoding import encode_prompts, max_tokens, token_counts
from sdxl_pipeline.stages.program import StageError, StopSignal, run_stage
from sdxl_pipeline.stages.reporter import Reporter
from sdxl_pipeline.stages.specs import EncodeTextSpec, TextEmbedCache
from sdxl_pipeline.store.digest import digest_json
from sdxl_pipeline.store.files import atomic_path
from sdxl_pipeline.store.tensor_store import TensorStore

TEXT_VERSION = 1
"""Raise it when the encoding changes, so that older entries are no longer found."""

EMPTY_PROMPT = ""


def embed_key(caption: str, text_digest: str, dtype: str) -> str:
    """The store's key for the embeddings of one caption."""
    return digest_json({"caption": caption, "text": text_digest, "dtype": dtype, "version": TEXT_VERSION})


def main(spec: EncodeTextSpec, reporter: Reporter, stop: StopSignal) -> TextEmbedCache:
    """Embed the captions that the store lacks, and list where each one's embeddings are."""
    started = time.monotonic()
    rows: list[Any] = list(pd.read_parquet(spec.captions_path).itertuples(index=False, name="Row"))
    dtype = dtype_name(dtype_from_name(spec.hardware.mixed_precision))
    prompts = list(dict.fromkeys((EMPTY_PROMPT, *spec.extra_prompts)))
    captions = list(dict.fromkeys([*prompts, *(row.caption for row in rows)]))
    keys = {caption: embed_key(caption, spec.base_model.text_digest, dtype) for caption in captions}
    store = TensorStore(spec.store_root)
    missing = set(store.missing(keys.values()))
    to_encode = [caption for caption in captions if keys[caption] in missing]
    reporter.log(
        f"{len(captions)} captions: {len(to_encode)} to encode, {len(captions) - len(to_encode)} cached."
    )

    encoding_seconds = _encode(spec, dtype, to_encode, keys, store, reporter, stop) if to_encode else 0.0

    _write_table(
        Path(spec.entries_path),
        ["path", "key", "caption", "embed_key"],
        [(row.path, row.key, row.caption, keys[row.caption]) for row in rows],
    )
    _write_table(
        Path(spec.prompts_path), ["prompt", "embed_key"], [(prompt, keys[prompt]) for prompt in prompts]
    )
    return TextEmbedCache(
        store_root=spec.store_root,
        entries_path=spec.entries_path,
        prompts_path=spec.prompts_path,
        digest=digest_json([[row.key, keys[row.caption]] for row in rows]),
        captions=len(captions),
        encoded=len(to_encode),
        reused=len(captions) - len(to_encode),
        truncated=_truncated(spec, captions),
        seconds=time.monotonic() - started,
        captions_per_second=len(to_encode) / encoding_seconds if to_encode else None,
        bytes=store.entry_nbytes(keys.values()),
    )


def _encode(
    spec: EncodeTextSpec,
    dtype: str,
    captions: list[str],
    keys: dict[str, str],
    store: TensorStore,
    reporter: Reporter,
    stop: StopSignal,
) -> float:
    """Embed captions into the store and give the seconds it took, loading apart. What is finished when a stop comes is kept."""
    try:
        encoders = load_text_encoders(spec.base_model, dtype_from_name(dtype)).to(spec.hardware.device)
    except BaseModelError as error:
        raise StageError(str(error)) from error
    started = time.monotonic()
    batch_size = spec.hardware.text_encoder_batch_size
    with store.writer(spec.shard_rows) as writer:
        for start in range(0, len(captions), batch_size):
            stop.raise_if_requested()
            batch = captions[start : start + batch_size]
            prompt_embeds, pooled_prompt_embeds = (embeds.cpu() for embeds in encode_prompts(encoders, batch))
            finite = (
                prompt_embeds.isfinite().flatten(1).all(1) & pooled_prompt_embeds.isfinite().all(1)
            ).tolist()
            for index, caption in enumerate(batch):
                if not finite[index]:
                    raise StageError(
                        f"the text encoders gave NaN or infinite embeddings in {dtype} for the caption {caption!r}. "
                        "Set mixed_precision to bf16 or no."
                    )
                writer.add(
                    keys[caption],
                    {
                        "prompt_embeds": prompt_embeds[index],
                        "pooled_prompt_embeds": pooled_prompt_embeds[index],
                    },
                )
            reporter.progress("encode text", start + len(batch), len(captions), "captions")
    return time.monotonic() - started


def _truncated(spec: EncodeTextSpec, captions: list[str]) -> tuple[str, ...]:
    """The captions that lose their tail, whether they were encoded now or before."""
    tokenizers = load_tokenizers(spec.base_model)
    limit = max_tokens(tokenizers)
    counts = token_counts(tokenizers, captions)
    return tuple(caption for caption, count in zip(captions, counts, strict=True) if count > limit)


def _write_table(path: Path, columns: list[str], rows: Sequence[tuple[str, ...]]) -> None:
    table = pd.DataFrame(rows, columns=columns).astype("str")
    with atomic_path(path) as temporary:
        table.to_parquet(temporary, index=False)


if __name__ == "__main__":
    run_stage(EncodeTextSpec, main)
