"""Which pictures the eval loss is measured on, and their tensors out of the stores."""

from collections.abc import Iterable, Sequence
from typing import Literal

from sdxl_pipeline.evaluation.eval_loss import EvalPicture
from sdxl_pipeline.project.training import TrainingSettings
from sdxl_pipeline.protocol.specs import TrainingLane
from sdxl_pipeline.training.batches import BatchReader
from sdxl_pipeline.training.samples import Sample, load_samples

EvalSource = Literal["eval dataset", "held-out share", "training pictures"]

DEFAULT_PICTURES = 32
"""Pictures used when num_eval_images is not set. Each costs eval_timesteps forward passes, twice."""


def choose_samples(
    lanes: Sequence[TrainingLane], settings: TrainingSettings
) -> tuple[EvalSource, list[Sample]]:
    """The samples of the eval loss and where they come from: eval datasets, else the held-out share, else the training pictures.

    An eval dataset is a lane with no picture to train on. Of more than num_eval_images the first by key are taken: keys are digests,
    so that is an even choice, and the same one every time.
    """
    training = load_samples(lanes, "train", settings.micro_conditioning)
    held_out = load_samples(lanes, "eval", settings.micro_conditioning)
    trained_on = {sample.dataset_id for sample in training}
    eval_datasets = [sample for sample in held_out if sample.dataset_id not in trained_on]
    source: EvalSource
    if eval_datasets:
        source, samples = "eval dataset", eval_datasets
    elif held_out:
        source, samples = "held-out share", held_out
    else:
        source, samples = "training pictures", training
    samples = sorted(samples, key=lambda sample: (sample.key, sample.id))
    return source, samples[: settings.num_eval_images or DEFAULT_PICTURES]


def read_pictures(samples: Iterable[Sample], reader: BatchReader, scaling_factor: float) -> list[EvalPicture]:
    """The samples with the posterior mean as latents and the first caption as prompt."""
    pictures = []
    for sample in samples:
        posteriors = reader.posteriors([sample])
        texts = reader.text_embeds([sample], [sample.embed_keys[0]])
        pictures.append(
            EvalPicture(
                key=sample.key,
                latents=posteriors.mean[0] * scaling_factor,
                prompt_embeds=texts.prompt_embeds[0].float(),
                pooled_prompt_embeds=texts.pooled_prompt_embeds[0].float(),
                time_ids=sample.time_ids,
            )
        )
    return pictures
