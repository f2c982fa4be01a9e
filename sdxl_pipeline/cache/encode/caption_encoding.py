"""Encoding of captions and prompts by both text encoders into the text store."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from time import perf_counter

from torch import Tensor

from sdxl_pipeline.cache.encode.crop_batches import batches_of_rank
from sdxl_pipeline.cache.encode.encoders import DeviceResult, explain_embeds, load_encoders
from sdxl_pipeline.cache.store.tensor_store import StorageError, StoreWriter, TensorStore
from sdxl_pipeline.models.components import load_tokenizers
from sdxl_pipeline.models.conditioning import PromptTokenizer, Tokens, encode_tokens
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import EncodeTextSpec, StageModel
from sdxl_pipeline.runtime.stage_runner import StopSignal, UserError

_TOKENIZER_BATCH = 4096

Text = tuple[str, str]
"""A store key, and the caption or prompt whose embeddings it identifies."""


class EncodedTexts(StageModel):
    """Result of one process."""

    encoded: int
    seconds: float
    """From the first caption to the last entry, without loading the encoders."""
    tokens: tuple[int, ...]
    """Token count of each caption in this process's batches (`caption_batches_of_rank`), as returned by `token_counts`."""


def encode_share(
    spec: EncodeTextSpec,
    texts: Sequence[Text],
    rank: int,
    processes: int,
    store: TensorStore,
    reporter: Reporter,
    stop: StopSignal,
) -> EncodedTexts:
    """Encode this process's share of (key, caption) pairs into the store, in batches that do not depend on the number of processes.

    Raises UserError when the encoders cannot be loaded, give non-finite embeddings, or the store's disk is full. Entries encoded before
    that are retained.
    """
    batches = caption_batches_of_rank(spec, texts, rank, processes)
    total = sum(map(len, batches))
    if not batches:
        return EncodedTexts(encoded=0, seconds=0.0, tokens=())
    encoders = load_encoders(spec.base_model, spec.hardware)

    def explain(caption: str) -> str:
        return explain_embeds(encoders, spec.hardware.text_dtype, spec.base_model, caption)

    reader = PromptTokenizer(encoders, spec.windows)
    device = encoders.text_encoder.device
    started, encoded = perf_counter(), 0
    tokens: list[int] = []
    try:
        with (
            store.writer(spec.shard_rows) as writer,
            ThreadPoolExecutor(1, thread_name_prefix="store") as storing,
        ):
            # The previous batch is copied back and stored while the encoders process the next one.
            pending: Future[None] | None = None
            for batch, ids, counts in _tokenize_ahead(batches, reader):
                stop.raise_if_requested()
                embeds = DeviceResult(device, partial(encode_tokens, encoders, *ids))
                if pending is not None:
                    pending.result()
                    reporter.progress("encode text", encoded, total, "captions")
                pending = storing.submit(_store, writer, batch, embeds, explain)
                encoded += len(batch)
                tokens += counts
            if pending is not None:
                pending.result()
    except StorageError as error:
        raise UserError(str(error)) from error
    reporter.progress("encode text", encoded, total, "captions")
    return EncodedTexts(encoded=encoded, seconds=perf_counter() - started, tokens=tuple(tokens))


def token_counts(spec: EncodeTextSpec, captions: Sequence[str], stop: StopSignal) -> list[int]:
    """Return the token count of each caption without start and end tokens; the larger one where the two tokenizers differ."""
    reader = PromptTokenizer(load_tokenizers(spec.base_model), spec.windows)
    counts: list[int] = []
    for start in range(0, len(captions), _TOKENIZER_BATCH):
        stop.raise_if_requested()
        counts += _token_counts(reader.read(captions[start : start + _TOKENIZER_BATCH]))
    return counts


def find_truncated(
    spec: EncodeTextSpec, counts: Mapping[str, int], limit: int
) -> tuple[list[str], tuple[str, ...]]:
    """Return the captions with more tokens than their windows hold, and the truncated tails of the first `limit` of them."""
    reader = PromptTokenizer(load_tokenizers(spec.base_model), spec.windows)
    truncated = [caption for caption, count in counts.items() if count > reader.capacity]
    return truncated, tuple(reader.truncated_tail(caption) for caption in truncated[:limit])


def caption_batches_of_rank(
    spec: EncodeTextSpec, texts: Sequence[Text], rank: int, processes: int
) -> list[Sequence[Text]]:
    """Return the batches of this process. Batches are planned for all processes at once, so that every caption gets the same bits."""
    size = spec.hardware.text_encoder_batch_size
    batches = [texts[start : start + size] for start in range(0, len(texts), size)]
    return [batches[number] for number in batches_of_rank([len(batch) for batch in batches], rank, processes)]


def _tokenize_ahead(
    batches: Sequence[Sequence[Text]], reader: PromptTokenizer
) -> Iterator[tuple[Sequence[Text], tuple[Tensor, Tensor], list[int]]]:
    """Yield each batch with its token ids in windows and its token counts; a thread tokenizes the next batch meanwhile."""

    def read(batch: Sequence[Text]) -> tuple[tuple[Tensor, Tensor], list[int]]:
        tokens = reader.read([caption for _, caption in batch])
        return reader.to_windows(tokens), _token_counts(tokens)

    with ThreadPoolExecutor(1, thread_name_prefix="tokenize") as pool:
        pending = pool.submit(read, batches[0])
        for batch, following in zip(batches, [*batches[1:], None], strict=True):
            ids, counts = pending.result()
            if following is not None:
                pending = pool.submit(read, following)
            yield batch, ids, counts


def _token_counts(tokens: tuple[Tokens, Tokens]) -> list[int]:
    return [max(len(one), len(other)) for one, other in zip(*tokens, strict=True)]


def _store(
    writer: StoreWriter, batch: Sequence[Text], embeds: DeviceResult, explain: Callable[[str], str]
) -> None:
    (prompt_embeds, pooled_prompt_embeds), _ = embeds.result()
    finite = (prompt_embeds.isfinite().flatten(1).all(1) & pooled_prompt_embeds.isfinite().all(1)).tolist()
    for index, (key, caption) in enumerate(batch):
        if not finite[index]:
            raise UserError(explain(caption))
        writer.add(
            key, {"prompt_embeds": prompt_embeds[index], "pooled_prompt_embeds": pooled_prompt_embeds[index]}
        )
