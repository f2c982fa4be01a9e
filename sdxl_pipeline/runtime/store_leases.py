"""What a stage that reads the caches of its datasets says to a prune: these entries are in use."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyarrow.parquet as pq

from sdxl_pipeline.cache.store.store_folder import StoreFolder
from sdxl_pipeline.runtime.specs import TrainingDataset


@contextmanager
def leased_datasets(datasets: Sequence[TrainingDataset], purpose: str) -> Iterator[None]:
    """Keep the entries of these datasets from being pruned while the block runs, those that are encoded in it included.

    Open the stores inside the block: what they find then stays.
    """
    keys: dict[Path, list[str]] = {}
    for dataset in datasets:
        latents, texts = dataset.latents, dataset.text_embeds
        for mode, folder, tables, column in (
            (dataset.latent_cache, latents.store_root, (latents.entries_path,), "latent_key"),
            (dataset.text_cache, texts.store_root, (texts.entries_path, texts.prompts_path), "embed_key"),
        ):
            if mode != "disable" or Path(folder).exists():
                named = keys.setdefault(Path(folder), [])
                for table in tables:
                    named += _column(table, column)
    with ExitStack() as leases:
        for root, entries in keys.items():
            leases.enter_context(StoreFolder(root).lease(entries, purpose=purpose))
        yield


def _column(table: str, name: str) -> list[str]:
    """A table that is not there holds no keys: whoever reads it next says so better."""
    try:
        column: list[str] = pq.read_table(table, columns=[name])[name].to_pylist()
    except FileNotFoundError:
        return []
    return column
