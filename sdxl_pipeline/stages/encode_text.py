"""Stage: encode the captions of one dataset and the validation prompts with both text encoders into the text store.

    python -m sdxl_pipeline.stages.encode_text spec.json

A caption of several images, or one encoded before, is encoded once. An entry's key is the digest of the caption, both encoders and
tokenizers, the dtype, the number of windows and the version of the code; as for latents, it does not cover the device and the batch. Under
torchrun several processes share the work; the result does not depend on their number. Torch is imported only when there is something to
encode.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from sdxl_pipeline.cache.encode.cache_keys import EMPTY_PROMPT, embed_key
from sdxl_pipeline.cache.store.store_folder import StoreFolder
from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.data.scan.dataset_fingerprint import frame_digest
from sdxl_pipeline.files.atomic_files import atomic_path
from sdxl_pipeline.files.digest import digest_json
from sdxl_pipeline.runtime.ranks import Ranks
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import EncodeTextSpec, TextEmbedCache
from sdxl_pipeline.runtime.stage_runner import StopSignal, read_finished, run_stage, write_finished

if TYPE_CHECKING:
    from sdxl_pipeline.cache.encode.caption_encoding import EncodedTexts

LISTED_CAPTIONS = 20
"""Truncated captions listed in the manifest."""
_ENTRY_COLUMNS = ["path", "key", "caption", "embed_key"]
_CONTENT_COLUMNS = ("key", "embed_key")


def main(spec: EncodeTextSpec, reporter: Reporter, stop: StopSignal) -> TextEmbedCache | None:
    """Encode the captions missing from the store and write the tables. Return the manifest on the main process, None on the others."""
    started = time.monotonic()
    captions = pd.read_parquet(spec.captions_path, columns=["path", "key", "caption"])
    keys = _embed_keys(spec, captions["caption"])
    ranks = Ranks(Path(spec.entries_path), stop)
    # The lease keeps entries that are in the store now until the manifest refers to them; only the main process takes it.
    lease = StoreFolder(Path(spec.store_root)).lease(keys.values(), purpose="encode text")
    with lease if ranks.is_main and spec.mode == "full" else nullcontext():
        return _encode(spec, captions, keys, ranks, started, reporter, stop)


def _encode(
    spec: EncodeTextSpec,
    captions: pd.DataFrame,
    keys: dict[str, str],
    ranks: Ranks,
    started: float,
    reporter: Reporter,
    stop: StopSignal,
) -> TextEmbedCache | None:
    # sorted by key, so that the batches depend only on the content
    texts = sorted((key, text) for text, key in keys.items())
    if ranks.is_main:
        entries = captions.assign(embed_key=captions["caption"].map(keys).astype("str"))
        identity = _identity(spec, entries)
        cache = _without_encoding(spec, entries, keys, identity, reporter)
        if cache is not None:
            ranks.broadcast(b"")
            write_finished(Path(spec.entries_path), cache)
            return cache.model_copy(update={"seconds": time.monotonic() - started})
        store = TensorStore(spec.store_root)
        missing = set(store.missing(keys.values()))
        reporter.log(f"{len(keys)} captions: {len(missing)} to encode, {len(keys) - len(missing)} cached.")
        is_missing = np.array([key in missing for key, _ in texts])
        ranks.broadcast(np.packbits(is_missing).tobytes())
    else:
        plan = ranks.receive()
        if not plan:
            return None
        is_missing = np.unpackbits(np.frombuffer(plan, np.uint8), count=len(texts)).astype(bool)
        store = TensorStore(spec.store_root)

    from sdxl_pipeline.cache.encode.caption_encoding import EncodedTexts, encode_share

    to_encode = [texts[index] for index in np.flatnonzero(is_missing)]
    share = encode_share(spec, to_encode, ranks.rank, ranks.count, store, reporter, stop)
    results = ranks.gather(share.model_dump_json().encode())
    if results is None:
        return None
    shares = [EncodedTexts.model_validate_json(text) for text in results]
    cache = _finish(spec, entries, keys, to_encode, identity, shares, stop)
    cache = cache.model_copy(update={"seconds": time.monotonic() - started})
    write_finished(Path(spec.entries_path), cache)
    return cache


def _embed_keys(spec: EncodeTextSpec, captions: "pd.Series[str]") -> dict[str, str]:
    """Return the store key of each distinct caption and prompt."""
    texts = dict.fromkeys((EMPTY_PROMPT, *spec.extra_prompts, *captions))
    digest, dtype = spec.base_model.text_digest, spec.hardware.text_precision
    return {text: embed_key(text, digest, dtype, spec.windows) for text in texts}


def _identity(spec: EncodeTextSpec, entries: pd.DataFrame) -> str:
    model = [spec.base_model.text_digest, spec.hardware.text_precision, spec.windows]
    rows = frame_digest(entries, ("path", "key", "embed_key"))
    return digest_json([spec.store_root, model, list(spec.extra_prompts), rows])


def _without_encoding(
    spec: EncodeTextSpec,
    entries: pd.DataFrame,
    keys: Mapping[str, str],
    identity: str,
    reporter: Reporter,
) -> TextEmbedCache | None:
    """Return the manifest if nothing has to be encoded: all is in the store, or deferred to the training. Else return None."""
    if spec.mode != "full":
        return _deferred(spec, entries, keys, identity, reporter)
    finished = read_finished(Path(spec.entries_path), TextEmbedCache, identity)
    if finished is None or finished.deferred:
        return None
    if spec.trust_manifest:
        reporter.log(f"{len(keys)} captions, recorded as encoded; the store is not checked.")
    elif not TensorStore(spec.store_root).missing(keys.values()):
        reporter.log(f"Nothing to encode: all {len(keys)} captions are in the store.")
    else:
        return None
    update = {"encoded": 0, "reused": len(keys), "captions_per_second": None}
    return finished.model_copy(update=update)


def _deferred(
    spec: EncodeTextSpec,
    entries: pd.DataFrame,
    keys: Mapping[str, str],
    identity: str,
    reporter: Reporter,
) -> TextEmbedCache:
    """Return the manifest of captions that the training encodes: missing ones at first use (ondemand), or all at each use."""
    reused, size = 0, 0
    if spec.mode == "ondemand":
        store = TensorStore(spec.store_root)
        missing = set(store.missing(keys.values()))
        reused, size = len(keys) - len(missing), store.entry_nbytes(set(keys.values()) - missing)
    deferred = len(keys) - reused
    reporter.log(
        f"{len(keys)} captions: {reused} cached, {deferred} deferred to the training (mode {spec.mode})."
    )
    _write_tables(spec, entries, keys)
    return TextEmbedCache(
        identity=identity,
        store_root=spec.store_root,
        entries_path=spec.entries_path,
        prompts_path=spec.prompts_path,
        digest=frame_digest(entries, _CONTENT_COLUMNS),
        captions=len(keys),
        encoded=0,
        reused=reused,
        deferred=deferred,
        windows=spec.windows,
        truncated=(),
        truncated_count=None,
        seconds=0.0,
        captions_per_second=None,
        bytes=size,
    )


def _finish(
    spec: EncodeTextSpec,
    entries: pd.DataFrame,
    keys: Mapping[str, str],
    encoded: "Sequence[tuple[str, str]]",
    identity: str,
    shares: "list[EncodedTexts]",
    stop: StopSignal,
) -> TextEmbedCache:
    """Write the tables, find truncated captions, and return the manifest of all processes' work."""
    from sdxl_pipeline.cache.encode.caption_encoding import caption_batches_of_rank, find_truncated

    _write_tables(spec, entries, keys)
    counted: dict[str, int] = {}
    for rank, share in enumerate(shares):
        own = [key for batch in caption_batches_of_rank(spec, encoded, rank, len(shares)) for key, _ in batch]
        counted |= zip(own, share.tokens, strict=True)
    counts = _token_counts(spec, keys, counted, stop)
    truncated, tails = find_truncated(spec, counts, LISTED_CAPTIONS)
    total = sum(share.encoded for share in shares)
    return TextEmbedCache(
        identity=identity,
        store_root=spec.store_root,
        entries_path=spec.entries_path,
        prompts_path=spec.prompts_path,
        digest=frame_digest(entries, _CONTENT_COLUMNS),
        captions=len(keys),
        encoded=total,
        reused=len(keys) - total,
        windows=spec.windows,
        truncated=tuple(truncated[:LISTED_CAPTIONS]),
        truncated_tails=tails,
        truncated_count=len(truncated),
        seconds=0.0,
        captions_per_second=total / max(share.seconds for share in shares) if total else None,
        bytes=TensorStore(spec.store_root).entry_nbytes(keys.values()),
    )


def _token_counts(
    spec: EncodeTextSpec, keys: Mapping[str, str], counted: dict[str, int], stop: StopSignal
) -> dict[str, int]:
    """Return the number of tokens of each caption and prompt, from this run, the recorded counts or the tokenizer, and record all."""
    from sdxl_pipeline.cache.encode.caption_encoding import token_counts

    path = Path(spec.entries_path).with_suffix(".tokens.parquet")
    if path.exists():
        recorded = pd.read_parquet(path)
        counted = dict(zip(recorded["embed_key"], recorded["tokens"], strict=True)) | counted
    unread = [text for text, key in keys.items() if key not in counted]
    counted |= {
        keys[text]: count for text, count in zip(unread, token_counts(spec, unread, stop), strict=True)
    }
    table = pd.DataFrame(
        {"embed_key": list(keys.values()), "tokens": [int(counted[key]) for key in keys.values()]}
    )
    _write(table, path)
    return dict(zip(keys, table["tokens"].tolist(), strict=True))


def _write_tables(spec: EncodeTextSpec, entries: pd.DataFrame, keys: Mapping[str, str]) -> None:
    _write(entries[_ENTRY_COLUMNS].astype("str"), Path(spec.entries_path))
    prompts = list(dict.fromkeys((EMPTY_PROMPT, *spec.extra_prompts)))
    table = pd.DataFrame({"prompt": prompts, "embed_key": [keys[prompt] for prompt in prompts]}, dtype="str")
    _write(table, Path(spec.prompts_path))


def _write(table: pd.DataFrame, path: Path) -> None:
    with atomic_path(path) as temporary:
        table.to_parquet(temporary, index=False)


if __name__ == "__main__":
    run_stage(EncodeTextSpec, main)
