"""What the stores lack, made when the training first asks for it: one image or caption at a time, so that no other changes its bits."""

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
    from sdxl_pipeline.cache.encode.on_demand_encoders import CaptionEncoder, LatentEncoder

Tensors = dict[str, Tensor]

WRITTEN_TOGETHER = 128
"""Entries that are made before they are written; a process that is killed loses at most these."""


class OnDemandEncoders:
    """Encodes images and captions as the stages before would have. Each model is loaded when first needed."""

    def __init__(self, base_model: ResolvedModel, hardware: Hardware) -> None:
        self._base_model = base_model
        self._hardware = hardware
        self._captions: dict[str, Mapping[str, str]] = {}  # dataset -> embed key -> caption
        self._caption_encoders: dict[int, CaptionEncoder] = {}  # by the number of windows
        self._lock = RLock()

    def latents(self, dataset: TrainingDataset, sample: Sample) -> Tensors:
        """`mean` and `logvar` of a sample. Raises UserError naming the image when it cannot be read, or is another one by now."""
        if sample.latent_key is not None:
            crop = SimpleNamespace(key=sample.key, **vars(sample.crop))
            made = latent_key(crop, self._base_model.vae_digest, self._hardware.vae_dtype)
            _require_same_name(dataset, made, sample.latent_key, "vae_latents")
        with self._lock:
            return self._latent_encoder.encode(Path(dataset.data_dir) / sample.path, sample.crop, sample.key)

    def text(self, dataset: TrainingDataset, key: str) -> Tensors:
        """`prompt_embeds` and `pooled_prompt_embeds` of the caption or prompt whose embeddings go by `key`."""
        caption = self.caption(dataset, key)
        windows = dataset.text_embeds.windows
        made = embed_key(caption, self._base_model.text_digest, self._hardware.text_precision, windows)
        _require_same_name(dataset, made, key, "text_embeds")
        with self._lock:
            return self._caption_encoder(windows).encode(caption)

    def caption(self, dataset: TrainingDataset, key: str) -> str:
        """The caption or prompt whose embeddings go by `key`."""
        return self._captions_of(dataset)[key]

    @cached_property
    def _latent_encoder(self) -> "LatentEncoder":
        from sdxl_pipeline.cache.encode.on_demand_encoders import LatentEncoder

        return LatentEncoder(self._base_model, self._hardware)

    def _caption_encoder(self, windows: int) -> "CaptionEncoder":
        from sdxl_pipeline.cache.encode.on_demand_encoders import CaptionEncoder

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
    """A store as the training reads it under a cache mode. Threads may read from one.

    `full`: every entry is there. `ondemand`: one that is not there is made, and written. `disable`: it is made at each use, and nothing
    is written; `remembered` names the few that are kept in memory nevertheless, such as the empty prompt.
    """

    def __init__(self, store: TensorStore, mode: CacheMode, remembered: frozenset[str] = frozenset()) -> None:
        self.store = store
        self.mode = mode
        self._remembered = remembered
        self._in_memory: dict[str, Tensors] = {}  # made, and not in the store (yet)
        self._writer: StoreWriter | None = None
        self._closing = ExitStack()
        self._lock = RLock()

    def read(self, keys: Sequence[str | None], make: Sequence[Callable[[], Tensors]]) -> Tensors:
        """The entries stacked in the order of `keys`, (B, ...) each; `make[i]` gives the one of `keys[i]` if there is none.

        The key None is that of nothing the store could have.
        """
        named = [key for key in keys if key is not None]
        if len(named) == len(keys) and self.mode == "full":
            return self.store.read_batch(named)
        with self._lock:
            # a damaged entry counts as missing once it has been found
            self.store.discard_damaged(named)
            if len(named) == len(keys) and not self.store.missing(named):
                return self.store.read_batch(named)
            missing = set(self.store.missing(named))
            made: dict[str, Tensors] = {}
            rows = []
            for key, make_it in zip(keys, make, strict=True):
                if key is None:
                    rows.append(make_it())
                elif key not in missing:
                    rows.append(self.store.read(key))
                else:
                    if key not in made:
                        made[key] = self._made(key, make_it)
                    rows.append(made[key])
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def flush(self) -> None:
        """Write what was made, where it is to be kept."""
        with self._lock:
            if self._writer is not None:
                self._writer.flush()
                self._in_memory.clear()

    def close(self) -> None:
        """Write what was made, and end writing."""
        with self._lock:
            self._writer = None
            self._in_memory.clear()
            self._closing.close()

    def _made(self, key: str, make: Callable[[], Tensors]) -> Tensors:
        tensors = self._in_memory.get(key)
        if tensors is not None:
            return tensors
        tensors = make()
        if self.mode == "ondemand":
            if self._writer is None:
                self._writer = self._closing.enter_context(self.store.writer(WRITTEN_TOGETHER))
            self._in_memory[key] = tensors
            self._writer.add(key, tensors)
            if key in self.store:  # that filled a shard
                self._in_memory.clear()
        elif key in self._remembered:
            self._in_memory[key] = tensors
        return tensors


def read_from(
    caches: Sequence[Cache], keys: Sequence[str | None], make: Sequence[Callable[[], Tensors]]
) -> Tensors:
    """The entries `keys[i]` of `caches[i]`, stacked in the order of `keys`."""
    groups: dict[int, list[int]] = {}
    for position, cache in enumerate(caches):
        groups.setdefault(id(cache), []).append(position)
    parts = [
        caches[positions[0]].read(
            [keys[position] for position in positions], [make[position] for position in positions]
        )
        for positions in groups.values()
    ]
    if len(parts) == 1:
        return parts[0]
    order = torch.argsort(torch.tensor([position for positions in groups.values() for position in positions]))
    return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}


def _require_same_name(dataset: TrainingDataset, made: str, expected: str, stage: str) -> None:
    """Refuse to write under a name what it does not stand for: the store would be wrong for everyone who shares it."""
    if made != expected:
        raise UserError(
            f"dataset {dataset.dataset_id!r}: {stage} was planned with another model, precision or crop plan than the training encodes "
            f"with; materialize {stage} again, or leave vae_dtype and mixed_precision out of the launchpad"
        )
