"""Images generated from training captions, by the base model and by the trained model from equal noise.

They serve CMMD, subject fidelity, diversity and the check for memorised images: copies of training images appear first under their own
captions (Somepalli et al. 2023).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path

import pandas as pd
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.data.decoding.image_decoding import UnreadableImage
from sdxl_pipeline.data.decoding.pixels import load_crop
from sdxl_pipeline.evaluation.gallery import GalleryImage, GalleryPrompt, generate
from sdxl_pipeline.models.sampling import Conditioning
from sdxl_pipeline.runtime.specs import TrainingDataset
from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.data.samples import Sample, Samples

CANDIDATES_PER_CAPTION = 8
"""Images searched for each caption to find a new one; datasets often repeat their captions."""


@dataclass(frozen=True)
class CaptionSample:
    """One image to generate: a training image's first caption at the size of its crop."""

    sample: Sample
    caption: str
    seed: int
    name: str
    """Stem of the image's file."""


def plan_caption_samples(
    training: Samples, datasets: Sequence[TrainingDataset], settings: TrainingSettings
) -> list[CaptionSample]:
    """Return `num_caption_samples` images to generate: captions of all datasets in turn, each with `caption_sample_seeds` seeds.

    With fewer captions than needed, each gets more seeds.
    """
    count = settings.num_caption_samples
    if not count:
        return []
    captioned = captioned_samples(training, datasets, math.ceil(count / settings.caption_sample_seeds))
    if not captioned:
        return []
    seeds = max(settings.caption_sample_seeds, math.ceil(count / len(captioned)))
    first = settings.effective_validation_seed
    return [
        CaptionSample(sample, caption, seed, f"{number:02d}_seed{seed}")
        for number, (sample, caption) in enumerate(captioned)
        for seed in range(first, first + seeds)
    ][:count]


def captioned_samples(
    training: Samples, datasets: Sequence[TrainingDataset], count: int
) -> list[tuple[Sample, str]]:
    """Return up to `count` training images with different captions, one crop each: of all datasets in turn, each in the order of its keys.

    Regularisation datasets are left out: they teach nothing.
    """
    one_crop = training.one_crop_per_image()
    candidates = CANDIDATES_PER_CAPTION * count

    def of_dataset(dataset: TrainingDataset) -> Iterator[tuple[Sample, str]]:
        captions = _captions(dataset)
        for sample in one_crop.first_by_key(candidates, [dataset.dataset_id]):
            yield sample, captions[sample.embed_keys[0]]

    in_turn = zip_longest(*(of_dataset(dataset) for dataset in datasets if not dataset.is_regularisation))
    distinct: dict[str, Sample] = {}
    for sample, caption in filter(None, chain.from_iterable(in_turn)):
        distinct.setdefault(caption, sample)
    return [(sample, caption) for caption, sample in islice(distinct.items(), count)]


def captioned_images(
    training: Samples, datasets: Sequence[TrainingDataset], count: int
) -> list[tuple[Image.Image, str]]:
    """Return up to `count` training images with different captions; those that cannot be read any more are left out."""
    folders = {dataset.dataset_id: Path(dataset.data_dir) for dataset in datasets}
    pairs = []
    for sample, caption in captioned_samples(training, datasets, count):
        with suppress(UnreadableImage):
            pixels = load_crop(folders[sample.dataset_id] / sample.path, sample.crop)
            pairs.append((Image.fromarray(pixels), caption))
    return pairs


def _captions(dataset: TrainingDataset) -> Mapping[str, str]:
    """Return the captions of a dataset by their embed keys."""
    table = pd.read_parquet(dataset.text_embeds.entries_path, columns=["embed_key", "caption"])
    return dict(zip(table["embed_key"], table["caption"], strict=True))


def sample_captions(
    plan: Sequence[CaptionSample],
    pipeline: StableDiffusionXLPipeline,
    reader: BatchReader,
    settings: TrainingSettings,
    on_image: Callable[[int, int], None] | None = None,
    on_step: Callable[[], None] | None = None,
) -> list[GalleryImage]:
    """Generate the planned images with the model in `pipeline`, without a negative prompt; equal plans give equal noise.

    `on_image` is called with (images done, images) before each image, `on_step` after every denoising step. To be called once per model,
    since each may have its own text encoders, which `reader` uses.
    """
    zeros = bool(pipeline.config.force_zeros_for_empty_prompt)
    images = []
    for done, planned in enumerate(plan):
        if on_image is not None:
            on_image(done, len(plan))
        embeds = reader.text_embeds([planned.sample], [planned.sample.embed_keys[0]])
        negative = () if zeros else reader.prompt_embeds("")
        conditioning = Conditioning(embeds.prompt_embeds, embeds.pooled_prompt_embeds, *negative)
        prompt = GalleryPrompt(
            planned.name, planned.caption, *planned.sample.bucket, planned.seed, conditioning
        )
        images.append(generate(pipeline, prompt, settings, on_step))
    return images
