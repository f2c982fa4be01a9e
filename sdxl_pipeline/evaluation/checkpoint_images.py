"""Images of the checkpoints: the gallery, samples of training captions, and what is measured of them.

A checkpoint is refused if an image of it is broken, or if it copies training images. Nothing is generated or embedded twice, and the
device holds either the UNet or the scoring models.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from sdxl_pipeline.evaluation.caption_samples import captioned_images, plan_caption_samples, sample_captions
from sdxl_pipeline.evaluation.clip_score import summarize
from sdxl_pipeline.evaluation.embeddings import ScoringModels, load_scoring_models
from sdxl_pipeline.evaluation.evaluation_context import EvaluationContext
from sdxl_pipeline.evaluation.gallery import (
    ColumnImage,
    GalleryColumn,
    GalleryImage,
    GalleryPrompt,
    generate,
    generate_columns,
    plan_caption_gallery,
    plan_gallery,
    read_image,
)
from sdxl_pipeline.evaluation.image_features import (
    MAX_TRAINING_CROPS,
    ImageFeatures,
    SourceImage,
    cosine,
    measure_features,
    read_images,
)
from sdxl_pipeline.evaluation.memorisation import check_memorisation
from sdxl_pipeline.evaluation.report import describe_checkpoint
from sdxl_pipeline.evaluation.scores import (
    MATCHING_PAIRS,
    CaptionFeatures,
    GalleryPair,
    measure_scores,
    score_gallery,
)
from sdxl_pipeline.evaluation.scoring_model import (
    ScoringModelFolders,
    scoring_model_name,
    similarity_model_name,
)
from sdxl_pipeline.runtime.evaluation_report import ClipSummary, Memorisation, Scores
from sdxl_pipeline.runtime.specs import CheckpointWeights, FailedItem

BASE = GalleryColumn(0)

T = TypeVar("T")


def column_of(weights: CheckpointWeights) -> GalleryColumn:
    """Return the gallery's column of a checkpoint."""
    return GalleryColumn(weights.step, weights.weights)


class CheckpointImages:
    """The images of the base model and of checkpoints, each generated when it is first asked for."""

    def __init__(
        self,
        context: EvaluationContext,
        candidates: Iterable[CheckpointWeights],
        folders: ScoringModelFolders | None,
    ) -> None:
        self._context, self._folders = context, folders
        self._weights: Mapping[GalleryColumn, CheckpointWeights | None] = {
            BASE: None,
            **{column_of(weights): weights for weights in candidates},
        }
        settings = context.spec.settings
        self._plan = (
            plan_caption_samples(context.training, context.spec.datasets, settings)
            if settings.num_caption_samples
            else []
        )
        self._models: ScoringModels | None = None
        self._galleries: dict[GalleryColumn, list[ColumnImage]] = {}
        self._samples: dict[GalleryColumn, tuple[list[SourceImage], list[FailedItem]]] = {}
        self._features: dict[GalleryColumn, ImageFeatures] = {}
        self._memorisation: dict[GalleryColumn, Memorisation | None] = {}

    def gallery(self, column: GalleryColumn) -> list[ColumnImage]:
        """Return the images of the gallery's prompts: the validation prompts, or captions if there are none."""
        if column not in self._galleries:
            context = self._context

            def render(prompt: GalleryPrompt) -> GalleryImage:
                return generate(
                    context.eval_model.pipeline,
                    prompt,
                    context.spec.settings,
                    context.stop.raise_if_requested,
                )

            def on_image(done: int, total: int) -> None:
                context.reporter.progress(f"gallery, {column.title}", done, total, "images")

            self._galleries[column] = generate_columns(
                [column], self._activate, self._prompts, render, context.folder / "images", on_image
            )
        return self._galleries[column]

    def broken(self, column: GalleryColumn) -> tuple[FailedItem, ...]:
        """Return the broken images of a checkpoint, in the gallery and among the samples of training captions."""
        gallery = [
            FailedItem(name=each.image.name, reason=each.defect)
            for each in self.gallery(column)
            if each.defect is not None
        ]
        return (*gallery, *self._caption_samples(column)[1])

    def memorisation(self, column: GalleryColumn) -> Memorisation | None:
        """Return how many samples of training captions are copies; None without samples or readable training images."""
        if column not in self._memorisation:
            settings = self._context.spec.settings
            found = None
            if self._plan and len(self._training):
                found = check_memorisation(
                    self.features(column),
                    self._training,
                    self._held_out,
                    settings.memorisation_limit,
                    self._samples_folder(column),
                )
            self._memorisation[column] = found
        return self._memorisation[column]

    def refusal(self, column: GalleryColumn) -> str | None:
        """Return why a checkpoint must not be published; None if nothing was found."""
        if broken := self.broken(column):
            others = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
            return f"its image {broken[0].name} is broken ({broken[0].reason}){others}"
        memorisation = self.memorisation(column)
        if memorisation is not None and memorisation.is_over_limit:
            return (
                f"{memorisation.flagged} of {memorisation.samples} samples are copies of training images, more than "
                f"memorisation_limit {memorisation.limit:g}"
            )
        return None

    def features(self, column: GalleryColumn) -> ImageFeatures:
        """Return the features of the samples of training captions."""
        if column not in self._features:
            samples, _ = self._caption_samples(column)
            title = f"comparing samples, {column.title}"
            with self._scoring_models() as models:
                self._features[column] = measure_features(self._counted(samples, len(samples), title), models)
        return self._features[column]

    def similarities(self, column: GalleryColumn) -> list[float] | None:
        """Return the mean cosine of each sample with the training images of its dataset; None without a similarity model."""
        if not self._plan or self._folders is None or not len(self._training):
            return None
        images = self.features(column)
        cosines = cosine(images, self._training)
        assert cosines is not None
        return [
            float(cosines[row, self._training.of_dataset(dataset_id)].mean())
            for row, dataset_id in enumerate(images.dataset_ids)
        ]

    def scores(self, column: GalleryColumn) -> tuple[Scores, ClipSummary | None, ClipSummary | None] | None:
        """Return the scores, and those of CLIP of the base model and of the checkpoint; None without scoring models.

        A CLIP score that means nothing for these images is None.
        """
        if self._folders is None:
            return None
        spec = self._context.spec
        captions = None
        if self._plan:
            captions = CaptionFeatures(
                [planned.caption for planned in self._plan],
                self.features(BASE),
                self.features(column),
                self._training,
            )
        pairs = [
            GalleryPair(before.image.prompt, read_image(before.image.path), read_image(after.image.path))
            for before, after in zip(self.gallery(BASE), self.gallery(column), strict=True)
        ]
        clip_name = scoring_model_name(spec.settings, spec.base_model)
        similarity_name = similarity_model_name(spec.settings, spec.base_model)
        names = {
            "clip": clip_name,
            "cmmd": clip_name,
            "fidelity": similarity_name,
            "diversity": similarity_name,
        }
        with self._scoring_models() as models:
            assert models is not None
            clip = score_gallery(models.clip, pairs)
            known = captioned_images(self._context.training, spec.datasets, MATCHING_PAIRS)
            scores = measure_scores(models.clip, clip, known, captions, names)
        if scores.clip is None:
            return scores, None, None
        return scores, summarize(clip.base), summarize(clip.lora)

    def _activate(self, column: GalleryColumn) -> AbstractContextManager[None]:
        weights = self._weights[GalleryColumn(column.step, column.weights) if column.step else BASE]
        return self._context.active(weights, column.scale)

    def _prompts(self) -> list[GalleryPrompt]:
        """Return the prompts as the model in the pipeline encodes them."""
        context, spec = self._context, self._context.spec
        zeros = bool(context.eval_model.pipeline.config.force_zeros_for_empty_prompt)
        if spec.prompts:
            return plan_gallery(spec.prompts, spec.settings, context.reader, zeros)
        return plan_caption_gallery(context.samples, spec.datasets, spec.settings, context.reader, zeros)

    def _samples_folder(self, column: GalleryColumn) -> Path:
        return self._context.folder / "caption_samples" / column.folder

    def _caption_samples(self, column: GalleryColumn) -> tuple[list[SourceImage], list[FailedItem]]:
        """Return the written samples of training captions, and the broken ones."""
        if column not in self._samples:
            context, images, broken = self._context, [], []

            def on_image(done: int, total: int) -> None:
                context.reporter.progress(
                    f"samples of training captions, {column.title}", done, total, "images"
                )

            if self._plan:
                with self._activate(column):
                    generated = sample_captions(
                        self._plan,
                        context.eval_model.pipeline,
                        context.reader,
                        context.spec.settings,
                        on_image,
                        context.stop.raise_if_requested,
                    )
                on_image(len(generated), len(generated))
                for planned, image in zip(self._plan, generated, strict=True):
                    path = image.save(self._samples_folder(column))
                    pixels = np.asarray(image.image)
                    images.append(SourceImage(planned.sample.dataset_id, planned.name, path, (pixels,)))
                    if image.defect is not None:
                        broken.append(FailedItem(name=f"caption {planned.name}", reason=image.defect))
            self._samples[column] = images, broken
        return self._samples[column]

    @cached_property
    def _training(self) -> ImageFeatures:
        samples = self._context.training.first_by_key(MAX_TRAINING_CROPS)
        images = read_images(samples, self._context.spec.datasets)
        with self._scoring_models() as models:
            count = len(samples.image_starts)
            return measure_features(self._counted(images, count, "comparing training images"), models)

    @cached_property
    def _held_out(self) -> ImageFeatures:
        images = read_images(self._context.held_out, self._context.spec.datasets)
        with self._scoring_models() as models:
            return measure_features(images, models)

    @contextmanager
    def _scoring_models(self) -> Iterator[ScoringModels | None]:
        """Run the block with the scoring models on the device instead of the UNet."""
        if self._folders is None:
            yield None
            return
        device = self._context.spec.hardware.device
        with self._context.eval_model.offloaded():
            if self._models is None:
                self._models = load_scoring_models(self._folders, device)
            models = [self._models.clip.model, self._models.similarity.model]
            for model in models:
                model.to(device)
            try:
                yield self._models
            finally:
                for model in models:
                    model.to("cpu")

    def _counted(self, items: Iterable[T], total: int, task: str) -> Iterator[T]:
        for done, item in enumerate(items):
            self._context.reporter.progress(task, done, total, "images")
            self._context.stop.raise_if_requested()
            yield item
        self._context.reporter.progress(task, total, total, "images")


def describe_refusal(weights: CheckpointWeights, reason: str) -> str:
    """Return the log line of a refused checkpoint."""
    return f"The checkpoint of {describe_checkpoint(weights)} is refused: {reason}."
