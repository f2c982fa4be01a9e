"""Reads batches from the caches: latents, text embeddings and time ids of the same images, and the noise they are trained with."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from sdxl_pipeline.cache.store.tensor_store import DamagedEntryError, TensorStore
from sdxl_pipeline.config.schema.datasets import CacheMode
from sdxl_pipeline.data.buckets.crop_plan import fresh_place
from sdxl_pipeline.models.conditioning import time_ids
from sdxl_pipeline.models.sampling import Conditioning
from sdxl_pipeline.models.vae import sample_latents
from sdxl_pipeline.runtime.specs import TrainingDataset
from sdxl_pipeline.runtime.stage_runner import UserError, finished_path
from sdxl_pipeline.training.data.bucket_sampler import BucketBatchSampler, SampleRef
from sdxl_pipeline.training.data.loss_weights import ALL_ALIKE, LossWeights
from sdxl_pipeline.training.data.on_demand_cache import Cache, OnDemandEncoders, Tensors, read_from
from sdxl_pipeline.training.data.samples import NAMED_IN_ERRORS, Sample
from sdxl_pipeline.training.diffusion.forward_process import ForwardProcess
from sdxl_pipeline.training.diffusion.scheduled_sampling import Rollout
from sdxl_pipeline.training.rng import derive_seed, uniform
from sdxl_pipeline.training.text_encoder_training import OnlineTextEncoder

PREFETCHED_BATCHES = 2
ALL = slice(None)


class MismatchedBatchError(AssertionError):
    """Tensors of different images met in one batch: a defect of this program, never of the data."""


@dataclass(frozen=True)
class Posteriors:
    """What the VAE said of some images: a Gaussian per latent value, not yet scaled."""

    keys: tuple[str, ...]
    mean: Tensor  # (B, 4, H/8, W/8) float32
    logvar: Tensor  # (B, 4, H/8, W/8) float32


@dataclass(frozen=True)
class TextEmbeds:
    """The encoded captions of some images."""

    keys: tuple[str, ...]
    prompt_embeds: Tensor  # (B, 77 * windows, C1 + C2), in the dtype of the cache
    pooled_prompt_embeds: Tensor  # (B, C2), in the dtype of the cache


@dataclass(frozen=True)
class CaptionTokens:
    """The captions of some images, not encoded yet."""

    keys: tuple[str, ...]
    input_ids: Tensor  # (B, 2, windows, 77) int64


@dataclass(frozen=True)
class Batch:
    """One forward pass: everything about image `keys[i]` at index i."""

    keys: tuple[str, ...]
    latents: Tensor  # (B, 4, H/8, W/8) float32, scaled
    noise: Tensor  # (B, 4, H/8, W/8) float32, standard normal
    timesteps: Tensor  # (B,) int64
    time_ids: Tensor  # (B, 6) float32
    prompt_embeds: Tensor | None = None  # (B, 77 * windows, C1 + C2); None with input_ids
    pooled_prompt_embeds: Tensor | None = None  # (B, C2); None with input_ids
    input_ids: Tensor | None = None  # (B, 2, windows, 77) int64: tokens, where text encoders are trained
    loss_weights: Tensor | None = None  # (B, 1, H/8, W/8) or (B, 1, 1, 1): what each place counts
    prior: tuple[bool, ...] = ()  # whether the target is the base model's prediction; (): of none
    perturbed_noise: Tensor | None = None  # (B, 4, H/8, W/8) float32: what the UNet sees in place of `noise`
    rollouts: tuple[Rollout, ...] = ()  # the items that the model itself brings to their timesteps
    share: float = (
        1.0  # weight of the mean loss in the optimizer step, so that all of the step's images weigh the same
    )
    images: int = 0  # in the global batch

    @property
    def input_noise(self) -> Tensor:
        """The noise that the UNet sees, (B, 4, H/8, W/8); `noise` is what it is asked for."""
        return self.noise if self.perturbed_noise is None else self.perturbed_noise

    def conditioning(self, dtype: torch.dtype, items: Tensor | slice = ALL) -> dict[str, Any]:
        """What the UNet is told beside latents and timesteps, as its keyword arguments, for these items of the batch.

        Embeddings are cast to `dtype`, and time ids stay in float32: in bf16 an original width of 1820 would read as 1824.
        """
        told = {"time_ids": self.time_ids[items]}
        if self.input_ids is not None:
            return {"encoder_hidden_states": self.input_ids[items], "added_cond_kwargs": told}
        if self.prompt_embeds is None or self.pooled_prompt_embeds is None:
            raise ValueError("a batch has either embeddings or tokens")
        return {
            "encoder_hidden_states": self.prompt_embeds[items].to(dtype),
            "added_cond_kwargs": {"text_embeds": self.pooled_prompt_embeds[items].to(dtype), **told},
        }

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device. From pinned memory the copy overlaps with what the device is computing."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def pinned(self) -> "Batch":
        """The batch in page-locked memory."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        changed: dict[str, Any] = {name: change(value) for name, value in values if isinstance(value, Tensor)}
        return replace(self, **changed)


class BatchReader:
    """Reads the encoded forms of images and prompts from the stores of all datasets, and has encoded what these leave to the training.

    Threads may read from one. `encoders` makes what a dataset's cache mode leaves out; without them every entry must be there. With
    `online_text_encoder` no text is read from a store: it is encoded at each use, by encoders that are trained.
    """

    def __init__(
        self,
        datasets: Sequence[TrainingDataset],
        encoders: OnDemandEncoders | None = None,
        online_text_encoder: OnlineTextEncoder | None = None,
    ) -> None:
        self.online_text_encoder = online_text_encoder
        self._datasets = {dataset.dataset_id: dataset for dataset in datasets}
        self.fresh_crops = frozenset(dataset.dataset_id for dataset in datasets if dataset.fresh_crops)
        """The datasets whose crops are drawn anew at each appearance."""
        self._encoders = encoders
        self._prompts: dict[str, tuple[str, str]] = {}  # prompt -> dataset, embed key
        self._empty_prompts: dict[str, str] = {}  # dataset -> embed key
        for dataset in datasets:
            table = pd.read_parquet(dataset.text_embeds.prompts_path, columns=["prompt", "embed_key"])
            keys = dict(zip(table["prompt"], table["embed_key"], strict=True))
            if "" not in keys:
                raise UserError(
                    f"dataset {dataset.dataset_id!r}: {dataset.text_embeds.prompts_path} lacks the empty prompt; materialize text_embeds again"
                )
            self._empty_prompts[dataset.dataset_id] = keys[""]
            for prompt, key in keys.items():
                self._prompts.setdefault(prompt, (dataset.dataset_id, key))
        prompts = frozenset((*self._empty_prompts.values(), *(key for _, key in self._prompts.values())))
        caches: dict[tuple[str, CacheMode], Cache] = {}
        stores: dict[str, TensorStore] = {}

        def cache(root: str, mode: CacheMode, remembered: frozenset[str] = frozenset()) -> Cache:
            if root not in stores:
                stores[root] = TensorStore(Path(root))
            return caches.setdefault((root, mode), Cache(stores[root], mode, remembered))

        self._latents = {
            dataset.dataset_id: cache(dataset.latents.store_root, dataset.latent_cache)
            for dataset in datasets
        }
        self._texts = {
            dataset.dataset_id: cache(dataset.text_embeds.store_root, dataset.text_cache, prompts)
            for dataset in datasets
        }
        self._caches = list(caches.values())

    def posteriors(self, samples: Sequence[Sample]) -> Posteriors:
        """The latents of samples of one bucket, as mean and log-variance. Raises UserError for an image that cannot be encoded."""
        read = self._read_from(
            [self._latents[sample.dataset_id] for sample in samples],
            [sample.latent_key for sample in samples],
            [partial(self._encode_crop, sample) for sample in samples],
        )
        return Posteriors(
            keys=tuple(sample.key for sample in samples),
            mean=read["mean"].float(),
            logvar=read["logvar"].float(),
        )

    def text_embeds(self, samples: Sequence[Sample], embed_keys: Sequence[str]) -> TextEmbeds:
        """The embeddings `embed_keys[i]` as the text of `samples[i]`."""
        datasets = [sample.dataset_id for sample in samples]
        read = self._read_texts(datasets, embed_keys)
        return TextEmbeds(
            keys=tuple(sample.key for sample in samples),
            prompt_embeds=read["prompt_embeds"],
            pooled_prompt_embeds=read["pooled_prompt_embeds"],
        )

    def tokens(self, samples: Sequence[Sample], embed_keys: Sequence[str]) -> CaptionTokens:
        """The caption that `embed_keys[i]` stands for as the text of `samples[i]`, for text encoders that are trained."""
        if self.online_text_encoder is None:
            raise ValueError("captions are tokenized where text encoders are trained")
        captions = self._captions([sample.dataset_id for sample in samples], embed_keys)
        return CaptionTokens(
            tuple(sample.key for sample in samples), self.online_text_encoder.input_ids(captions)
        )

    def flush(self) -> None:
        """Write what was encoded on demand and is to be kept."""
        for cache in self._caches:
            cache.flush()

    def close(self) -> None:
        """Write what was encoded on demand, and end writing."""
        for cache in self._caches:
            cache.close()

    def _encode_crop(self, sample: Sample) -> Tensors:
        dataset = self._datasets[sample.dataset_id]
        return self._require_encoders(dataset).latents(dataset, sample)

    def _encode_text(self, dataset_id: str, embed_key: str) -> Tensors:
        dataset = self._datasets[dataset_id]
        return self._require_encoders(dataset).text(dataset, embed_key)

    def _require_encoders(self, dataset: TrainingDataset) -> OnDemandEncoders:
        if self._encoders is None:
            raise ValueError(f"dataset {dataset.dataset_id!r} is encoded on demand, which takes encoders")
        return self._encoders

    def _captions(self, dataset_ids: Sequence[str], embed_keys: Sequence[str]) -> list[str]:
        datasets = [self._datasets[dataset_id] for dataset_id in dataset_ids]
        return [
            self._require_encoders(dataset).caption(dataset, key)
            for dataset, key in zip(datasets, embed_keys, strict=True)
        ]

    def _read_texts(self, dataset_ids: Sequence[str], embed_keys: Sequence[str]) -> Tensors:
        if self.online_text_encoder is not None:
            return self.online_text_encoder.encode(self._captions(dataset_ids, embed_keys))
        return self._read_from(
            [self._texts[dataset_id] for dataset_id in dataset_ids],
            embed_keys,
            [partial(self._encode_text, *named) for named in zip(dataset_ids, embed_keys, strict=True)],
        )

    def _read_from(
        self, caches: Sequence[Cache], keys: Sequence[str | None], make: Sequence[Callable[[], Tensors]]
    ) -> Tensors:
        try:
            return read_from(caches, keys, make)
        except DamagedEntryError as error:
            raise UserError(self._report_damage(error.keys)) from error

    def _report_damage(self, found: Sequence[str]) -> str:
        """Verify every entry that these datasets use, so that one more run of the encode stages replaces all damaged ones."""
        parts = []
        for dataset in self._datasets.values():
            rows = pd.read_parquet(dataset.rows_path, columns=["path", "key", "crop_index"])
            latents = pd.read_parquet(
                dataset.latents.entries_path, columns=["key", "crop_index", "latent_key"]
            )
            texts = pd.read_parquet(dataset.text_embeds.entries_path, columns=["path", "embed_key"])
            prompts = pd.read_parquet(dataset.text_embeds.prompts_path, columns=["prompt", "embed_key"])
            texts = pd.concat([texts, prompts.rename(columns={"prompt": "path"})])
            for asset, manifest, cache, named, column in (
                ("vae_latents", dataset.latents, self._latents, rows.merge(latents), "latent_key"),
                ("text_embeds", dataset.text_embeds, self._texts, texts, "embed_key"),
            ):
                store = cache[dataset.dataset_id].store
                broken = {*found, *store.discard_damaged(named[column])}
                names = list(dict.fromkeys(named["path"][named[column].isin(broken)]))
                if names:
                    # the next run of the stage has to look into the store
                    finished_path(Path(manifest.entries_path)).unlink(missing_ok=True)
                    parts.append(
                        f"{asset} of {', '.join(map(repr, names[:NAMED_IN_ERRORS]))} ({len(names)} in all)"
                    )
        return (
            f"damaged cache entries (a checksum did not match): {'; '.join(parts)}. They were removed from the cache. Materialize "
            "vae_latents and text_embeds again: only these are encoded, and the training resumes from its last checkpoint. If this "
            "happens again, check the disk."
        )

    def empty_prompt_key(self, dataset_id: str) -> str:
        """Key of the encoded empty prompt in the store of a dataset's text embeddings."""
        return self._empty_prompts[dataset_id]

    def prompt_embeds(self, prompt: str) -> tuple[Tensor, Tensor]:
        """(prompt_embeds (1, 77 * windows, C1 + C2), pooled_prompt_embeds (1, C2)) of the empty prompt or one of the extra prompts.

        Raises UserError for a prompt that the text stage was not asked to encode.
        """
        if prompt not in self._prompts:
            raise UserError(f"the prompt {prompt!r} has not been encoded; materialize text_embeds again")
        dataset_id, key = self._prompts[prompt]
        tensors = self._read_texts([dataset_id], [key])
        return tensors["prompt_embeds"], tensors["pooled_prompt_embeds"]

    def conditioning(self, prompt: str, negative_prompt: str, zeros_for_empty_prompt: bool) -> Conditioning:
        """What the pipeline needs to draw a prompt. Raises UserError for prompts that were not encoded.

        `zeros_for_empty_prompt` is the base model's `force_zeros_for_empty_prompt`: without a negative prompt its pipeline takes zeros,
        else the encoded empty prompt.
        """
        prompt_embeds, pooled = self.prompt_embeds(prompt)
        if not negative_prompt and zeros_for_empty_prompt:
            return Conditioning(prompt_embeds, pooled)
        return Conditioning(prompt_embeds, pooled, *self.prompt_embeds(negative_prompt))


@dataclass(frozen=True)
class TrainingBatches:
    """The batches of one process: `BucketBatchSampler` says which images, this reads them and draws what is random about them.

    Every image of a global batch has a *slot*, its index over all processes. Noise, timestep and caption dropout are drawn from
    (seed, batch, slot), so they depend neither on the number of processes nor on what was drawn before.

    A process that has no image in a global batch gets its first one, with `share` 0: all processes must do a forward and a backward
    pass, since they exchange their gradients.
    """

    order: BucketBatchSampler
    reader: BatchReader
    scaling_factor: float
    forward_process: ForwardProcess
    caption_dropout_probability: float = 0.0
    rank: int = 0
    loss_weights: LossWeights = ALL_ALIKE

    def read(self, index: int) -> Batch:
        """The batch of this process in the global batch `index`, in ordinary memory."""
        everyone, slots = self.order.draws(index), self.order.slots(index, self.rank)
        share = self._share(index, len(slots))
        slots = slots or range(1)
        draws = everyone[slots.start : slots.stop]
        samples = [self._drawn(draw) for draw in draws]
        embed_keys = [
            self.reader.empty_prompt_key(draw.sample.dataset_id)
            if self._drops_caption(index, slot)
            else draw.embed_key
            for draw, slot in zip(draws, slots, strict=True)
        ]
        posteriors = self.reader.posteriors(samples)
        reads = self.reader.text_embeds if self.reader.online_text_encoder is None else self.reader.tokens
        texts = reads(samples, embed_keys)
        weighed = self.loss_weights.of(samples, self.order.seed, index, slots)
        keys = tuple(sample.key for sample in samples)
        if not keys == posteriors.keys == texts.keys == weighed.keys:
            raise MismatchedBatchError(
                f"batch {index}: crops of {keys}, latents of {posteriors.keys}, captions of {texts.keys}, masks of {weighed.keys}"
            )
        shape = posteriors.mean.shape[1:]
        noise_sample = self.forward_process.draw(shape, self.order.seed, index, slots, len(everyone))
        return Batch(
            keys=keys,
            latents=torch.cat(
                [
                    sample_latents(
                        posteriors.mean[i : i + 1],
                        posteriors.logvar[i : i + 1],
                        self.scaling_factor,
                        self._generator("posterior", index, slot),
                    )
                    for i, slot in enumerate(slots)
                ]
            ),
            noise=noise_sample.noise,
            perturbed_noise=noise_sample.perturbed_noise,
            timesteps=noise_sample.timesteps,
            rollouts=noise_sample.rollouts,
            **{name: value for name, value in vars(texts).items() if name != "keys"},
            time_ids=time_ids(
                [sample.original_size for sample in samples],
                [(sample.crop.crop_top, sample.crop.crop_left) for sample in samples],
                [sample.bucket for sample in samples],
            ),
            loss_weights=weighed.weights,
            prior=weighed.prior,
            share=share,
            images=len(everyone),
        )

    def _share(self, index: int, count: int) -> float:
        """Return the weight of the mean loss of `count` images of this process in its optimizer step.

        Data parallelism averages the gradients of the processes, hence the number of processes.
        """
        parts = self.forward_process.accumulation
        first = index - index % parts
        images = sum(map(self.order.size, range(first, first + parts)))
        return count * self.order.num_processes / images

    def _drawn(self, draw: SampleRef) -> Sample:
        """The sample, cut anew where its dataset says so."""
        sample, crop = draw.sample, draw.sample.crop
        if sample.dataset_id not in self.reader.fresh_crops:
            return sample
        top, left = fresh_place(
            "random",
            crop.resized_h - crop.bucket_h,
            crop.resized_w - crop.bucket_w,
            self.order.seed,
            sample.key,
            f"fresh/{draw.epoch}/{draw.occurrence}/{sample.copy}",
        )
        return replace(sample, crop=replace(crop, crop_top=top, crop_left=left), latent_key=None)

    def _drops_caption(self, index: int, slot: int) -> bool:
        return uniform(self.order.seed, "caption dropout", index, slot) < self.caption_dropout_probability

    def _generator(self, purpose: str, index: int, slot: int) -> torch.Generator:
        # on the CPU, so that every device trains on the same noise
        return torch.Generator().manual_seed(derive_seed(self.order.seed, purpose, index, slot))


def prefetched(batches: TrainingBatches, first: int, last: int, pin: bool) -> Generator[Batch, None, None]:
    """The batches first, first + 1, ..., last - 1, read by a thread that stays a few ahead. Close it to end the thread."""

    def read(index: int) -> Batch:
        batch = batches.read(index)
        return batch.pinned() if pin else batch

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-batches") as reader:
        coming: deque[Future[Batch]] = deque()
        try:
            for index in range(first, last):
                coming.append(reader.submit(read, index))
                if len(coming) > PREFETCHED_BATCHES:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()
