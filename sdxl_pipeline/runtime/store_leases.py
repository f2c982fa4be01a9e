"""Leases on the cache entries that a stage reads, so that a concurrent prune retains them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyarrow.parquet as pq

from sdxl_pipeline.cache.store.store_folder import StoreFolder
from sdxl_pipeline.runtime.specs import TrainingDataset


@contextmanager
def leased_datasets(datasets: Sequence[TrainingDataset], purpose: str) -> Iterator[None]:
    """Protect the entries of these datasets from being pruned while the block runs, including those encoded in it.

    Open the stores inside the block: the entries they find then stay.
    """
    keys: dict[Path, list[str]] = {}
    for dataset in datasets:
        latents, texts = dataset.latents, dataset.text_embeds
        for mode, folder, tables, column in (
            (dataset.latent_cache, latents.store_root, (latents.entries_path,), "latent_key"),
            (dataset.text_cache, texts.store_root, (texts.entries_path, texts.prompts_path), "embed_key"),
        ):
            if mode != "disable" or Path(folder).exists():
                keys_of_store = keys.setdefault(Path(folder), [])
                for table in tables:
                    keys_of_store += _column(table, column)
    with ExitStack() as leases:
        for root, entries in keys.items():
            leases.enter_context(StoreFolder(root).lease(entries, purpose=purpose))
        yield


def _column(table: str, name: str) -> list[str]:
    """Return a column of a table; an absent table has no keys, and its next reader reports it."""
    try:
        column: list[str] = pq.read_table(table, columns=[name])[name].to_pylist()
    except FileNotFoundError:
        return []
    return column
