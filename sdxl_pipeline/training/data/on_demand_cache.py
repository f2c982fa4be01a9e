"""Cache modes: entries that the stores lack are encoded on first use, one at a time, so that each is independent of the others, bit for bit."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from threading import RLock
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from sdxl_pipeline.cache.encode.cache_keys import embed_key, latent_key
from sdxl_pipeline.cache.store.tensor_store import StoreWriter, TensorStore
from sdxl_pipeline.config.hardware_profiles import Hardware
from sdxl_pipeline.config.schema.datasets import CacheMode
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.runtime.specs import TrainingDataset
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.samples import Sample

if TYPE_CHECKING:
    from sdxl_pipeline.cache.encode.encoders import CaptionEncoder, LatentEncoder

Tensors = dict[str, Tensor]

FLUSH_ENTRIES = 128
"""Encoded entries buffered before they are written; a killed process loses at most these."""


class OnDemandEncoders:
    """Encodes images and captions exactly as the encode stages would. Each model is loaded on first use."""

    def __init__(self, base_model: ResolvedModel, hardware: Hardware) -> None:
        self._base_model = base_model
        self._hardware = hardware
        self._captions: dict[str, Mapping[str, str]] = {}  # dataset -> embed key -> caption
        self._caption_encoders: dict[int, CaptionEncoder] = {}  # by the number of windows
        self._lock = RLock()

    def latents(self, dataset: TrainingDataset, sample: Sample) -> Tensors:
        """Return `mean` and `logvar` of a sample. Raises UserError if the image cannot be read or has changed."""
        if sample.latent_key is not None:
            crop = SimpleNamespace(key=sample.key, **vars(sample.crop))
            computed = latent_key(crop, self._base_model.vae_digest, self._hardware.vae_dtype)
            _require_same_key(dataset, computed, sample.latent_key, "vae_latents")
        with self._lock:
            return self._latent_encoder.encode(Path(dataset.data_dir) / sample.path, sample.crop, sample.key)

    def text(self, dataset: TrainingDataset, key: str) -> Tensors:
        """Return `prompt_embeds` and `pooled_prompt_embeds` of the caption or prompt with the embed key `key`."""
        caption = self.caption(dataset, key)
        windows = dataset.text_embeds.windows
        computed = embed_key(caption, self._base_model.text_digest, self._hardware.text_precision, windows)
        _require_same_key(dataset, computed, key, "text_embeds")
        with self._lock:
            return self._caption_encoder(windows).encode(caption)

    def caption(self, dataset: TrainingDataset, key: str) -> str:
        """Return the caption or prompt with the embed key `key`."""
        return self._captions_of(dataset)[key]

    @cached_property
    def _latent_encoder(self) -> "LatentEncoder":
        from sdxl_pipeline.cache.encode.encoders import LatentEncoder

        return LatentEncoder(self._base_model, self._hardware)

    def _caption_encoder(self, windows: int) -> "CaptionEncoder":
        from sdxl_pipeline.cache.encode.encoders import CaptionEncoder

        if windows not in self._caption_encoders:
            self._caption_encoders[windows] = CaptionEncoder(self._base_model, self._hardware, windows)
        return self._caption_encoders[windows]

    def _captions_of(self, dataset: TrainingDataset) -> Mapping[str, str]:
        with self._lock:
            if dataset.dataset_id not in self._captions:
                captions = pd.read_parquet(dataset.text_embeds.entries_path, columns=["embed_key", "caption"])
                prompts = pd.read_parquet(dataset.text_embeds.prompts_path, columns=["embed_key", "prompt"])
                self._captions[dataset.dataset_id] = {
                    **dict(zip(captions["embed_key"], captions["caption"], strict=True)),
                    **dict(zip(prompts["embed_key"], prompts["prompt"], strict=True)),
                }
            return self._captions[dataset.dataset_id]


class Cache:
    """A store read under a cache mode. Thread-safe for reading.

    `full`: every entry exists. `ondemand`: a missing entry is encoded and written. `disable`: a missing entry is encoded at each use and
    never written; `memory_keys` are the few that are cached in memory nevertheless, such as the empty prompt.
    """

    def __init__(
        self, store: TensorStore, mode: CacheMode, memory_keys: frozenset[str] = frozenset()
    ) -> None:
        self.store = store
        self.mode = mode
        self._memory_keys = memory_keys
        self._in_memory: dict[str, Tensors] = {}  # encoded, and not (yet) in the store
        self._writer: StoreWriter | None = None
        self._closing = ExitStack()
        self._lock = RLock()

    def read(self, keys: Sequence[str | None], encode: Sequence[Callable[[], Tensors]]) -> Tensors:
        """Return the entries stacked in the order of `keys`, (B, ...) each; `encode[i]` makes the entry of `keys[i]` if it is missing.

        The key None is never cached.
        """
        cacheable = [key for key in keys if key is not None]
        if len(cacheable) == len(keys) and self.mode == "full":
            return self.store.read_batch(cacheable)
        with self._lock:
            # a corrupt entry counts as missing once it has been detected
            self.store.discard_corrupt(cacheable)
            if len(cacheable) == len(keys) and not self.store.missing(cacheable):
                return self.store.read_batch(cacheable)
            missing = set(self.store.missing(cacheable))
            encoded: dict[str, Tensors] = {}
            rows = []
            for key, encode_entry in zip(keys, encode, strict=True):
                if key is None:
                    rows.append(encode_entry())
                elif key not in missing:
                    rows.append(self.store.read(key))
                else:
                    if key not in encoded:
                        encoded[key] = self._encode(key, encode_entry)
                    rows.append(encoded[key])
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def flush(self) -> None:
        """Write the buffered entries."""
        with self._lock:
            if self._writer is not None:
                self._writer.flush()
                self._in_memory.clear()

    def close(self) -> None:
        """Write the buffered entries and close the writer."""
        with self._lock:
            self._writer = None
            self._in_memory.clear()
            self._closing.close()

    def _encode(self, key: str, encode: Callable[[], Tensors]) -> Tensors:
        tensors = self._in_memory.get(key)
        if tensors is not None:
            return tensors
        tensors = encode()
        if self.mode == "ondemand":
            if self._writer is None:
                self._writer = self._closing.enter_context(self.store.writer(FLUSH_ENTRIES))
            self._in_memory[key] = tensors
            self._writer.add(key, tensors)
            if key in self.store:  # a shard was full and has been written
                self._in_memory.clear()
        elif key in self._memory_keys:
            self._in_memory[key] = tensors
        return tensors


def read_batch(
    caches: Sequence[Cache], keys: Sequence[str | None], encode: Sequence[Callable[[], Tensors]]
) -> Tensors:
    """Return the entries `keys[i]` of `caches[i]`, stacked in the order of `keys`."""
    groups: dict[int, list[int]] = {}
    for position, cache in enumerate(caches):
        groups.setdefault(id(cache), []).append(position)
    parts = [
        caches[positions[0]].read(
            [keys[position] for position in positions], [encode[position] for position in positions]
        )
        for positions in groups.values()
    ]
    if len(parts) == 1:
        return parts[0]
    order = torch.argsort(torch.tensor([position for positions in groups.values() for position in positions]))
    return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}


def _require_same_key(dataset: TrainingDataset, computed: str, expected: str, stage: str) -> None:
    """Raise UserError if an entry would be written under another key than its own, which would corrupt a shared store."""
    if computed != expected:
        raise UserError(
            f"dataset {dataset.dataset_id!r}: {stage} was planned with another model, precision or crop plan than the training uses for "
            f"encoding; materialize {stage} again, or remove vae_dtype and mixed_precision from the run config"
        )
