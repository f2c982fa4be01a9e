"""Captions and prompts through both text encoders into the text store."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from time import perf_counter

from torch import Tensor

from sdxl_pipeline.cache.encode.crop_batches import own_share
from sdxl_pipeline.cache.encode.encoder_devices import Computed, load_encoders
from sdxl_pipeline.cache.encode.encoder_overflow import explain_embeds
from sdxl_pipeline.cache.store.tensor_store import StorageError, StoreWriter, TensorStore
from sdxl_pipeline.models.components import load_tokenizers
from sdxl_pipeline.models.prompt_encoding import encode_tokens
from sdxl_pipeline.models.prompt_tokens import PromptReader, Tokens
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import EncodeTextSpec, StageModel
from sdxl_pipeline.runtime.stage_runner import StopSignal, UserError

_COUNTED_AT_A_TIME = 4096

Text = tuple[str, str]
"""A key of the store, and the caption or prompt that belongs there."""


class EncodedTexts(StageModel):
    """What one process did."""

    encoded: int
    seconds: float
    """From the first caption to the last entry, loading of the encoders apart."""
    tokens: tuple[int, ...]
    """Of each caption of its batches (`own_texts`), as `token_counts` gives them."""


def encode_share(
    spec: EncodeTextSpec,
    texts: Sequence[Text],
    rank: int,
    processes: int,
    store: TensorStore,
    reporter: Reporter,
    stop: StopSignal,
) -> EncodedTexts:
    """Encode this process's share of some (key, caption) into the store, in batches that are the same for any number of processes.

    Raises UserError when the encoders cannot be had, give what is not finite, or the store's disk is full. What was encoded before
    any end is kept.
    """
    own = own_texts(spec, texts, rank, processes)
    total = sum(map(len, own))
    if not own:
        return EncodedTexts(encoded=0, seconds=0.0, tokens=())
    encoders = load_encoders(spec.base_model, spec.hardware)

    def explain(caption: str) -> str:
        return explain_embeds(encoders, spec.hardware.text_dtype, spec.base_model, caption)

    reader = PromptReader(encoders, spec.windows)
    device = encoders.text_encoder.device
    started, taken = perf_counter(), 0
    tokens: list[int] = []
    try:
        with (
            store.writer(spec.shard_rows) as writer,
            ThreadPoolExecutor(1, thread_name_prefix="store") as storing,
        ):
            # The last batch is copied back and stored while the encoders have the next one.
            last: Future[None] | None = None
            for batch, ids, counts in _read_ahead(own, reader):
                stop.raise_if_requested()
                embeds = Computed(device, partial(encode_tokens, encoders, *ids))
                if last is not None:
                    last.result()
                    reporter.progress("encode text", taken, total, "captions")
                last = storing.submit(_store, writer, batch, embeds, explain)
                taken += len(batch)
                tokens += counts
            if last is not None:
                last.result()
    except StorageError as error:
        raise UserError(str(error)) from error
    reporter.progress("encode text", taken, total, "captions")
    return EncodedTexts(encoded=taken, seconds=perf_counter() - started, tokens=tuple(tokens))


def token_counts(spec: EncodeTextSpec, captions: Sequence[str], stop: StopSignal) -> list[int]:
    """Tokens of each caption, start and end apart; the larger number where the two tokenizers differ."""
    reader = PromptReader(load_tokenizers(spec.base_model), spec.windows)
    counts: list[int] = []
    for start in range(0, len(captions), _COUNTED_AT_A_TIME):
        stop.raise_if_requested()
        counts += _lengths(reader.read(captions[start : start + _COUNTED_AT_A_TIME]))
    return counts


def lost_tails(
    spec: EncodeTextSpec, counts: Mapping[str, int], named: int
) -> tuple[list[str], tuple[str, ...]]:
    """The captions with more tokens than their windows hold, and what the first `named` of them lose."""
    reader = PromptReader(load_tokenizers(spec.base_model), spec.windows)
    truncated = [caption for caption, count in counts.items() if count > reader.capacity]
    return truncated, tuple(reader.lost_tail(caption) for caption in truncated[:named])


def own_texts(spec: EncodeTextSpec, texts: Sequence[Text], rank: int, processes: int) -> list[Sequence[Text]]:
    """The batches of some texts that one of several processes takes; they are planned for all at once, so all get the same bits."""
    size = spec.hardware.text_encoder_batch_size
    batches = [texts[start : start + size] for start in range(0, len(texts), size)]
    return [batches[number] for number in own_share([len(batch) for batch in batches], rank, processes)]


def _read_ahead(
    batches: Sequence[Sequence[Text]], reader: PromptReader
) -> Iterator[tuple[Sequence[Text], tuple[Tensor, Tensor], list[int]]]:
    """Each batch with its tokens in windows, and how many they were; a thread tokenizes the next one meanwhile."""

    def read(batch: Sequence[Text]) -> tuple[tuple[Tensor, Tensor], list[int]]:
        tokens = reader.read([caption for _, caption in batch])
        return reader.in_windows(tokens), _lengths(tokens)

    with ThreadPoolExecutor(1, thread_name_prefix="tokenize") as pool:
        coming = pool.submit(read, batches[0])
        for batch, following in zip(batches, [*batches[1:], None], strict=True):
            ids, counts = coming.result()
            if following is not None:
                coming = pool.submit(read, following)
            yield batch, ids, counts


def _lengths(tokens: tuple[Tokens, Tokens]) -> list[int]:
    return [max(len(one), len(other)) for one, other in zip(*tokens, strict=True)]


def _store(
    writer: StoreWriter, batch: Sequence[Text], embeds: Computed, explain: Callable[[str], str]
) -> None:
    (prompt_embeds, pooled_prompt_embeds), _ = embeds.result()
    finite = (prompt_embeds.isfinite().flatten(1).all(1) & pooled_prompt_embeds.isfinite().all(1)).tolist()
    for index, (key, caption) in enumerate(batch):
        if not finite[index]:
            raise UserError(explain(caption))
        writer.add(
            key, {"prompt_embeds": prompt_embeds[index], "pooled_prompt_embeds": pooled_prompt_embeds[index]}
        )
