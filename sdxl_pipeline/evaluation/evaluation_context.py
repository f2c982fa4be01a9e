"""What every part of an evaluation needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sdxl_pipeline.evaluation.eval_models import EvalModel
from sdxl_pipeline.runtime.evaluation_report import EvaluateSpec
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import KIND_LABELS, CheckpointWeights
from sdxl_pipeline.runtime.stage_runner import StopSignal
from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.data.samples import Samples, load_samples
from sdxl_pipeline.training.validation.eval_samples import EvalSource


@dataclass(frozen=True)
class EvaluationContext:
    """The spec, the models and the images of an evaluation."""

    spec: EvaluateSpec
    folder: Path
    """Of this evaluation's files."""
    eval_model: EvalModel
    reader: BatchReader
    source: EvalSource
    samples: Samples
    """Images of the eval loss."""
    probe: Samples
    """Training images of the train probe; may be empty."""
    reporter: Reporter
    stop: StopSignal

    @property
    def label(self) -> str:
        """The trained model's name in texts."""
        return KIND_LABELS[self.spec.lora.weights_kind]

    @property
    def held_out(self) -> Samples:
        """Images of the eval loss that were not trained on; may be empty."""
        return self.samples.first_by_key(0) if self.source == "training images" else self.samples

    @cached_property
    def training(self) -> Samples:
        """All crops of the training images, without regularisation datasets."""
        samples = load_samples(self.spec.datasets, "train", self.spec.settings.micro_conditioning)
        trained = [dataset.dataset_id for dataset in self.spec.datasets if not dataset.is_regularisation]
        return samples.first_by_key(len(samples), trained)

    def load(self, weights: CheckpointWeights) -> None:
        """Put the weights of a checkpoint into the pipeline. Raises the errors of `EvalModel.load`."""
        try:
            self.eval_model.load(weights)
        finally:
            self.reader.online_text_encoder = self.eval_model.online_text_encoder

    @contextmanager
    def active(self, weights: CheckpointWeights | None, scale: float = 1.0) -> Iterator[None]:
        """Run the block with the weights in the pipeline, at a scale; None is the base model."""
        if weights is None:
            with self.eval_model.base():
                yield
            return
        self.load(weights)
        with self.eval_model.scaled(scale):
            yield
