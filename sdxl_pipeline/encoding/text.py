"""The captions of a dataset, and the prompts that will be drawn, through both text encoders into the text store."""

import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sdxl_pipeline.encoding.keys import EMPTY_PROMPT, Row
from sdxl_pipeline.protocol.program import StageError, StopSignal
from sdxl_pipeline.protocol.reporter import Reporter
from sdxl_pipeline.protocol.specs import EncodeTextSpec, TextEmbedCache
from sdxl_pipeline.sdxl.components import load_text_encoders, load_tokenizers
from sdxl_pipeline.sdxl.model_files import BaseModelError
from sdxl_pipeline.sdxl.precision import dtype_from_name
from sdxl_pipeline.sdxl.text_encoding import encode_prompts, max_tokens, token_counts
from sdxl_pipeline.store.digest import digest_json
from sdxl_pipeline.store.files import atomic_path
from sdxl_pipeline.store.tensor_store import TensorStore


def encode_captions(
    spec: EncodeTextSpec,
    rows: list[Row],
    keys: dict[str, str],
    identity: str,
    reporter: Reporter,
    stop: StopSignal,
) -> TextEmbedCache:
    """Embed the captions that the store lacks, and list where each one's embeddings are.

    `keys` gives the store key of every caption and prompt. Raises StageError when the encoders cannot be had, or overflow.
    """
    started = time.monotonic()
    captions = list(keys)
    store = TensorStore(spec.store_root)
    missing = set(store.missing(keys.values()))
    to_encode = [caption for caption in captions if keys[caption] in missing]
    reporter.log(
        f"{len(captions)} captions: {len(to_encode)} to encode, {len(captions) - len(to_encode)} cached."
    )

    encoding_seconds = _encode(spec, to_encode, keys, store, reporter, stop) if to_encode else 0.0

    _write_table(
        Path(spec.entries_path),
        ["path", "key", "caption", "embed_key"],
        [(row.path, row.key, row.caption, keys[row.caption]) for row in rows],
    )
    prompts = list(dict.fromkeys((EMPTY_PROMPT, *spec.extra_prompts)))
    _write_table(
        Path(spec.prompts_path), ["prompt", "embed_key"], [(prompt, keys[prompt]) for prompt in prompts]
    )
    return TextEmbedCache(
        identity=identity,
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
    captions: list[str],
    keys: dict[str, str],
    store: TensorStore,
    reporter: Reporter,
    stop: StopSignal,
) -> float:
    """Embed captions into the store and give the seconds it took, loading apart. What is finished when a stop comes is kept."""
    try:
        encoders = load_text_encoders(spec.base_model, dtype_from_name(spec.hardware.text_dtype)).to(
            spec.hardware.device
        )
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
                        f"the text encoders gave NaN or infinite embeddings in {spec.hardware.text_dtype} for the caption {caption!r}. "
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
