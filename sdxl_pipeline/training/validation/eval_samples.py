"""Selection of the images for the eval loss. Does not import torch."""

from collections.abc import Sequence
from typing import Literal

from sdxl_pipeline.config.schema.evaluation import EvaluationSettings
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.specs import TrainingDataset
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.samples import MicroConditioning, Samples, load_samples

EvalSource = Literal["eval dataset", "held-out share", "training images"]

DEFAULT_IMAGES = 32
"""Images used when num_eval_images is not set. Each costs eval_timesteps forward passes, twice."""


def select_eval_samples(
    datasets: Sequence[TrainingDataset], settings: EvaluationSettings, micro_conditioning: MicroConditioning
) -> tuple[EvalSource, Samples]:
    """Return the samples of the eval loss and their source: eval datasets, else the held-out share, else the training images.

    An eval dataset is one without training images; eval_dataset_id selects one of them. At most num_eval_images are returned, the first by
    key: keys are digests, so the selection is uniform and reproducible. Raise UserError if eval_dataset_id names no eval dataset.
    """
    training = load_samples(datasets, "train", micro_conditioning)
    held_out = load_samples(datasets, "eval", micro_conditioning)
    eval_datasets = held_out.images_by_dataset().keys() - training.images_by_dataset().keys()
    if settings.eval_dataset_id is not None:
        if settings.eval_dataset_id not in eval_datasets:
            raise UserError(
                f"config.json: eval_dataset_id: {settings.eval_dataset_id!r} has no images to evaluate on"
            )
        eval_datasets = {settings.eval_dataset_id}
    count = settings.num_eval_images or DEFAULT_IMAGES
    source: EvalSource
    if eval_datasets:
        source, samples = "eval dataset", held_out.first_by_key(count, eval_datasets)
    elif held_out:
        source, samples = "held-out share", held_out.first_by_key(count)
    else:
        trained = [dataset.dataset_id for dataset in datasets if not dataset.is_regularisation]
        source, samples = "training images", training.one_crop_per_image().first_by_key(count, trained)
    return source, samples


def select_probe_samples(datasets: Sequence[TrainingDataset], settings: TrainingSettings) -> Samples:
    """Return the samples of the train probe: `num_probe_images` training images, one crop of each, the first by key.

    Regularisation datasets are left out: the model is not to learn their images.
    """
    training = load_samples(datasets, "train", settings.micro_conditioning)
    trained = [dataset.dataset_id for dataset in datasets if not dataset.is_regularisation]
    return training.one_crop_per_image().first_by_key(settings.num_probe_images, trained)
