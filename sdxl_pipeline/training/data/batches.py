"""Training batches: cached latents, text embeddings and time ids of the same images, with the noise of the forward process."""

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

from sdxl_pipeline.cache.store.tensor_store import CorruptEntryError, TensorStore
from sdxl_pipeline.config.schema.datasets import CacheMode
from sdxl_pipeline.data.buckets.crop_plan import crop_offset
from sdxl_pipeline.models.conditioning import time_ids
from sdxl_pipeline.models.sampling import Conditioning
from sdxl_pipeline.models.vae import sample_latents
from sdxl_pipeline.runtime.specs import TrainingDataset
from sdxl_pipeline.runtime.stage_runner import UserError, finished_path
from sdxl_pipeline.training.data.bucket_sampler import BucketBatchSampler, SampleRef
from sdxl_pipeline.training.data.loss_masks import UNIFORM_LOSS, LossWeights
from sdxl_pipeline.training.data.on_demand_cache import Cache, OnDemandEncoders, Tensors, read_batch
from sdxl_pipeline.training.data.samples import MAX_LISTED_IMAGES, Sample
from sdxl_pipeline.training.diffusion.forward_process import ForwardProcess
from sdxl_pipeline.training.diffusion.scheduled_sampling import Rollout
from sdxl_pipeline.training.rng import derive_seed, uniform
from sdxl_pipeline.training.text_encoder_training import OnlineTextEncoder

PREFETCHED_BATCHES = 2
ALL = slice(None)


class MismatchedBatchError(AssertionError):
    """A batch contains tensors of different images: a defect of this program, never of the data."""


@dataclass(frozen=True)
class Posteriors:
    """The VAE posteriors of some images: a Gaussian per latent value, not yet scaled."""

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
    """The tokenized captions of some images."""

    keys: tuple[str, ...]
    input_ids: Tensor  # (B, 2, windows, 77) int64


@dataclass(frozen=True)
class Batch:
    """One forward pass: all tensors at index i belong to image `keys[i]`."""

    keys: tuple[str, ...]
    latents: Tensor  # (B, 4, H/8, W/8) float32, scaled
    noise: Tensor  # (B, 4, H/8, W/8) float32, standard normal
    timesteps: Tensor  # (B,) int64
    time_ids: Tensor  # (B, 6) float32
    prompt_embeds: Tensor | None = None  # (B, 77 * windows, C1 + C2); None with input_ids
    pooled_prompt_embeds: Tensor | None = None  # (B, C2); None with input_ids
    input_ids: Tensor | None = None  # (B, 2, windows, 77) int64: tokens, if text encoders are trained
    loss_weights: Tensor | None = None  # (B, 1, H/8, W/8) or (B, 1, 1, 1)
    prior: tuple[bool, ...] = ()  # whether the target is the base model's prediction; (): for none
    perturbed_noise: Tensor | None = None  # (B, 4, H/8, W/8) float32: replaces `noise` in the UNet's input
    rollouts: tuple[Rollout, ...] = ()  # the items that the model denoises to their timesteps
    step_weight: float = (
        1.0  # weight of the mean loss, so that all images of an optimizer step have equal weight
    )
    images: int = 0  # images in the global batch

    @property
    def input_noise(self) -> Tensor:
        """Return the noise in the UNet's input, (B, 4, H/8, W/8); `noise` is that of the target."""
        return self.noise if self.perturbed_noise is None else self.perturbed_noise

    def conditioning(self, dtype: torch.dtype, items: Tensor | slice = ALL) -> dict[str, Any]:
        """Return the UNet's keyword arguments beside latents and timesteps, for these items of the batch.

        Embeddings are cast to `dtype`, and time ids stay in float32: bf16 would round an original width of 1820 to 1824.
        """
        time_ids = {"time_ids": self.time_ids[items]}
        if self.input_ids is not None:
            return {"encoder_hidden_states": self.input_ids[items], "added_cond_kwargs": time_ids}
        if self.prompt_embeds is None or self.pooled_prompt_embeds is None:
            raise ValueError("a batch needs either prompt embeddings or input_ids")
        return {
            "encoder_hidden_states": self.prompt_embeds[items].to(dtype),
            "added_cond_kwargs": {"text_embeds": self.pooled_prompt_embeds[items].to(dtype), **time_ids},
        }

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device. From pinned memory the copy overlaps with the device's computation."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory."""
        return self._map_tensors(Tensor.pin_memory)

    def _map_tensors(self, transform: Callable[[Tensor], Tensor]) -> "Batch":
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        changed: dict[str, Any] = {
            name: transform(value) for name, value in values if isinstance(value, Tensor)
        }
        return replace(self, **changed)


class BatchReader:
    """Reads the encoded images and prompts of all datasets, and encodes what their cache modes leave out.

    Thread-safe. `encoders` encode missing entries; without them every entry must exist. With `online_text_encoder` no text is read from a
    store: it is encoded at each use by the text encoders being trained.
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
        """The datasets whose images are cropped at a new random position at each appearance."""
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

        def cache(root: str, mode: CacheMode, memory_keys: frozenset[str] = frozenset()) -> Cache:
            if root not in stores:
                stores[root] = TensorStore(Path(root))
            return caches.setdefault((root, mode), Cache(stores[root], mode, memory_keys))

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
        """Return the posteriors of samples of one bucket. Raises UserError for an image that cannot be encoded."""
        read = self._read_batch(
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
        """Return the embeddings `embed_keys[i]` for `samples[i]`."""
        datasets = [sample.dataset_id for sample in samples]
        read = self._read_texts(datasets, embed_keys)
        return TextEmbeds(
            keys=tuple(sample.key for sample in samples),
            prompt_embeds=read["prompt_embeds"],
            pooled_prompt_embeds=read["pooled_prompt_embeds"],
        )

    def tokens(self, samples: Sequence[Sample], embed_keys: Sequence[str]) -> CaptionTokens:
        """Return the tokenized caption of `embed_keys[i]` for `samples[i]`, for text encoders that are trained."""
        if self.online_text_encoder is None:
            raise ValueError("captions are tokenized only if text encoders are trained")
        captions = self._captions([sample.dataset_id for sample in samples], embed_keys)
        return CaptionTokens(
            tuple(sample.key for sample in samples), self.online_text_encoder.input_ids(captions)
        )

    def flush(self) -> None:
        """Write the entries that were encoded on demand."""
        for cache in self._caches:
            cache.flush()

    def close(self) -> None:
        """Write the entries that were encoded on demand, and close the writers."""
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
            raise ValueError(f"dataset {dataset.dataset_id!r} is encoded on demand, which needs `encoders`")
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
        return self._read_batch(
            [self._texts[dataset_id] for dataset_id in dataset_ids],
            embed_keys,
            [partial(self._encode_text, *each) for each in zip(dataset_ids, embed_keys, strict=True)],
        )

    def _read_batch(
        self, caches: Sequence[Cache], keys: Sequence[str | None], encode: Sequence[Callable[[], Tensors]]
    ) -> Tensors:
        try:
            return read_batch(caches, keys, encode)
        except CorruptEntryError as error:
            raise UserError(self._describe_corruption(error.keys)) from error

    def _describe_corruption(self, corrupt_keys: Sequence[str]) -> str:
        """Discard every corrupt entry that these datasets use and return an error message.

        Verifying all entries lets one further run of the encode stages replace all corrupt ones.
        """
        parts = []
        for dataset in self._datasets.values():
            rows = pd.read_parquet(dataset.rows_path, columns=["path", "key", "crop_index"])
            latents = pd.read_parquet(
                dataset.latents.entries_path, columns=["key", "crop_index", "latent_key"]
            )
            texts = pd.read_parquet(dataset.text_embeds.entries_path, columns=["path", "embed_key"])
            prompts = pd.read_parquet(dataset.text_embeds.prompts_path, columns=["prompt", "embed_key"])
            texts = pd.concat([texts, prompts.rename(columns={"prompt": "path"})])
            for asset, manifest, cache, table, column in (
                ("vae_latents", dataset.latents, self._latents, rows.merge(latents), "latent_key"),
                ("text_embeds", dataset.text_embeds, self._texts, texts, "embed_key"),
            ):
                store = cache[dataset.dataset_id].store
                corrupt = {*corrupt_keys, *store.discard_corrupt(table[column])}
                paths = list(dict.fromkeys(table["path"][table[column].isin(corrupt)]))
                if paths:
                    # makes the next run of the stage check the store
                    finished_path(Path(manifest.entries_path)).unlink(missing_ok=True)
                    parts.append(
                        f"{asset} of {', '.join(map(repr, paths[:MAX_LISTED_IMAGES]))} ({len(paths)} in all)"
                    )
        return (
            f"corrupt cache entries (a checksum did not match): {'; '.join(parts)}. They were removed from the cache. Materialize "
            "vae_latents and text_embeds again: only these are encoded, and the training resumes from its last checkpoint. If this "
            "happens again, check the disk."
        )

    def empty_prompt_key(self, dataset_id: str) -> str:
        """Return the key of the encoded empty prompt in a dataset's text embedding store."""
        return self._empty_prompts[dataset_id]

    def prompt_embeds(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Return (prompt_embeds (1, 77 * windows, C1 + C2), pooled_prompt_embeds (1, C2)) of the empty prompt or one of the extra prompts.

        Raises UserError for a prompt that the text stage did not encode.
        """
        if prompt not in self._prompts:
            raise UserError(f"the prompt {prompt!r} has not been encoded; materialize text_embeds again")
        dataset_id, key = self._prompts[prompt]
        tensors = self._read_texts([dataset_id], [key])
        return tensors["prompt_embeds"], tensors["pooled_prompt_embeds"]

    def conditioning(self, prompt: str, negative_prompt: str, zeros_for_empty_prompt: bool) -> Conditioning:
        """Return the pipeline's inputs for a prompt. Raises UserError for prompts that were not encoded.

        `zeros_for_empty_prompt` is the base model's `force_zeros_for_empty_prompt`: without a negative prompt its pipeline uses zeros instead
        of the encoded empty prompt.
        """
        prompt_embeds, pooled = self.prompt_embeds(prompt)
        if not negative_prompt and zeros_for_empty_prompt:
            return Conditioning(prompt_embeds, pooled)
        return Conditioning(prompt_embeds, pooled, *self.prompt_embeds(negative_prompt))


@dataclass(frozen=True)
class TrainingBatches:
    """The batches of one process: `order` selects the images, and this reads them and samples everything random about them.

    Every image of a global batch has a *slot*, its index over all processes. Noise, timestep and caption dropout are functions of
    (seed, batch, slot), so they depend neither on the number of processes nor on earlier batches.

    A process without an image in a global batch gets the batch's first image with `step_weight` 0: all processes must run a forward and a
    backward pass, since they synchronize gradients.
    """

    order: BucketBatchSampler
    reader: BatchReader
    scaling_factor: float
    forward_process: ForwardProcess
    caption_dropout_probability: float = 0.0
    rank: int = 0
    loss_weights: LossWeights = UNIFORM_LOSS

    def read(self, index: int) -> Batch:
        """Return the batch of this process in the global batch `index`, in pageable memory."""
        global_batch, slots = self.order.global_batch(index), self.order.slots(index, self.rank)
        step_weight = self._step_weight(index, len(slots))
        slots = slots or range(1)
        refs = global_batch[slots.start : slots.stop]
        samples = [self._crop(ref) for ref in refs]
        embed_keys = [
            self.reader.empty_prompt_key(ref.sample.dataset_id)
            if self._drops_caption(index, slot)
            else ref.embed_key
            for ref, slot in zip(refs, slots, strict=True)
        ]
        posteriors = self.reader.posteriors(samples)
        read_texts = (
            self.reader.text_embeds if self.reader.online_text_encoder is None else self.reader.tokens
        )
        texts = read_texts(samples, embed_keys)
        loss_mask = self.loss_weights.for_batch(samples, self.order.seed, index, slots)
        keys = tuple(sample.key for sample in samples)
        if not keys == posteriors.keys == texts.keys == loss_mask.keys:
            raise MismatchedBatchError(
                f"batch {index}: crops of {keys}, latents of {posteriors.keys}, captions of {texts.keys}, masks of {loss_mask.keys}"
            )
        shape = posteriors.mean.shape[1:]
        noise_sample = self.forward_process.sample(shape, self.order.seed, index, slots, len(global_batch))
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
            loss_weights=loss_mask.weights,
            prior=loss_mask.prior,
            step_weight=step_weight,
            images=len(global_batch),
        )

    def _step_weight(self, index: int, count: int) -> float:
        """Return the weight of this process's mean loss over `count` images in its optimizer step.

        Data parallelism averages the gradients over the processes, hence the factor `num_processes`.
        """
        accumulation = self.forward_process.accumulation
        first = index - index % accumulation
        images = sum(map(self.order.size, range(first, first + accumulation)))
        return count * self.order.num_processes / images

    def _crop(self, ref: SampleRef) -> Sample:
        """Return the sample, with a new crop position if its dataset uses fresh crops."""
        sample, crop = ref.sample, ref.sample.crop
        if sample.dataset_id not in self.reader.fresh_crops:
            return sample
        top, left = crop_offset(
            "random",
            crop.resized_h - crop.bucket_h,
            crop.resized_w - crop.bucket_w,
            self.order.seed,
            sample.key,
            f"fresh/{ref.epoch}/{ref.occurrence}/{sample.copy}",
        )
        return replace(sample, crop=replace(crop, crop_top=top, crop_left=left), latent_key=None)

    def _drops_caption(self, index: int, slot: int) -> bool:
        return uniform(self.order.seed, "caption dropout", index, slot) < self.caption_dropout_probability

    def _generator(self, purpose: str, index: int, slot: int) -> torch.Generator:
        # on the CPU, so that all devices sample the same values
        return torch.Generator().manual_seed(derive_seed(self.order.seed, purpose, index, slot))


def prefetch(batches: TrainingBatches, first: int, last: int, pin: bool) -> Generator[Batch, None, None]:
    """Yield the batches first, first + 1, ..., last - 1, read ahead by a thread. Close the generator to end the thread."""

    def read(index: int) -> Batch:
        batch = batches.read(index)
        return batch.pin_memory() if pin else batch

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-batches") as reader:
        pending: deque[Future[Batch]] = deque()
        try:
            for index in range(first, last):
                pending.append(reader.submit(read, index))
                if len(pending) > PREFETCHED_BATCHES:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
