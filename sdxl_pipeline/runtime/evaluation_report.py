"""Spec and report of the evaluation, the history of evaluations, and the record of a release. Imports no torch."""

from typing import Any, Literal

from pydantic import Field

from sdxl_pipeline.config.hardware_profiles import Hardware
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.runtime.specs import (
    CheckpointWeights,
    FailedItem,
    StageModel,
    TrainedLora,
    TrainingDataset,
    ValidationImage,
    ValidationPrompt,
    WeightsKind,
)


class EvaluateSpec(StageModel):
    """Input of `sdxl_pipeline.stages.evaluate`."""

    base_model: ResolvedModel
    hardware: Hardware
    settings: TrainingSettings
    lora: TrainedLora
    datasets: tuple[TrainingDataset, ...]
    prompts: tuple[ValidationPrompt, ...]
    output_dir: str
    checkpoints: tuple[CheckpointWeights, ...] = Field(
        default=(),
        description="The weights to evaluate and select from, by step; empty: only those of `lora`.",
    )
    previous_report_path: str | None = Field(
        default=None, description="report.json of the last release, to compare with."
    )


class LossSummary(StageModel):
    """Fixed-noise eval loss of one model."""

    mean: float
    by_timestep: tuple[tuple[int, float], ...] = Field(description="(timestep, mean squared error).")
    by_image: tuple[tuple[str, float], ...] = Field(
        default=(),
        description="(image, mean squared error); equal names mean the same content, crop, caption, timesteps and noise.",
    )


class PairedDifference(StageModel):
    """Eval loss of one model minus that of another, over their common images."""

    images: int
    mean: float
    standard_error: float | None = Field(description="Of the mean, over images; None for fewer than two.")

    @property
    def is_lower(self) -> bool:
        """Whether the mean is below zero by more than two standard errors."""
        return self.standard_error is not None and self.mean < -2 * self.standard_error

    @property
    def is_higher(self) -> bool:
        """Whether the mean is above zero by more than two standard errors."""
        return self.standard_error is not None and self.mean > 2 * self.standard_error


class ClipSummary(StageModel):
    """CLIP score, 100 * max(cosine, 0) (Hessel et al. 2021), over the gallery images."""

    min: float
    max: float
    mean: float
    std: float


class ProbeGap(StageModel):
    """Held-out minus training eval loss of a model, minus the same of the base model: what the training images gained more."""

    mean: float
    standard_error: float | None = Field(description="Of the mean; None for fewer than two images of either.")


class CheckpointLoss(StageModel):
    """Eval losses of one checkpoint."""

    step: int
    weights: Literal["trained", "ema"]
    sha256: str
    held_out: LossSummary
    probe: LossSummary | None = Field(description="Of training images; None with num_probe_images 0.")
    to_base: PairedDifference = Field(description="Held-out loss minus the base model's.")
    to_best: PairedDifference | None = Field(
        default=None,
        description="Held-out loss minus that of the checkpoint of the lowest; None where there are no held-out images.",
    )
    gap: ProbeGap | None = Field(default=None, description="None without probe.")


class Overfitting(StageModel):
    """Whether later checkpoints improve on training images only."""

    conclusive: bool = Field(description="False with too few held-out images.")
    from_step: int | None = Field(description="First step of over-fitting; None if there is none.")
    gap: ProbeGap | None = Field(description="Of the last checkpoint.")
    text: str


class Veto(StageModel):
    """A checkpoint that must not be selected."""

    step: int
    reason: str


class Selection(StageModel):
    """The checkpoint that is evaluated and published, and why."""

    requested: str = Field(description="released_checkpoint.")
    step: int
    weights: Literal["trained", "ema"]
    best_step: int | None = Field(description="Step of the lowest held-out loss; None without one.")
    within_one_error: tuple[int, ...] = Field(
        default=(), description="Steps whose held-out loss is within one standard error of the lowest."
    )
    vetoes: tuple[Veto, ...] = ()
    vetoed: bool = Field(
        default=False, description="Whether the selected step has a veto too, because every one has."
    )
    text: str


class Cmmd(StageModel):
    """CMMD (Jayasumana et al. 2024) between generated images and training images, times 1000."""

    value: float | None = Field(description="None if there are too few images.")
    interval: tuple[float, float] | None = Field(default=None, description="95 percent, by bootstrap.")
    p_value: float | None = Field(
        default=None, description="Of the permutation test that both are of one distribution."
    )
    images: tuple[int, int] = Field(description="Generated images and training images.")
    status: Literal["measured", "uncertain", "refused"]
    text: str


class ScorePair(StageModel):
    """A score of images of the base model and of the selected checkpoint, of equal prompts and seeds."""

    base: float
    lora: float
    difference: PairedDifference = Field(description="Selected checkpoint minus base model.")
    ceiling: float | None = Field(
        default=None, description="The score of training images among themselves; None if there is none."
    )


class Scores(StageModel):
    """Scores of generated images; None where one was not measured."""

    clip: ScorePair | None = None
    cmmd_base: Cmmd | None = None
    cmmd_lora: Cmmd | None = None
    fidelity: ScorePair | None = Field(
        default=None, description="Mean cosine of generated and training images."
    )
    diversity: ScorePair | None = Field(
        default=None, description="1 - mean pairwise cosine of the images of one prompt."
    )
    models: dict[str, str] = Field(default={}, description="The model of each score, by the score's name.")
    omitted: dict[str, str] = Field(
        default={}, description="Why a score is not reported, by the score's name."
    )
    notes: dict[str, str] = Field(
        default={}, description="What limits a reported score, by the score's name."
    )


class MemorisedPair(StageModel):
    """A generated image and the training image that it resembles most."""

    image_path: str
    nearest: str = Field(description="Dataset and path of the training image.")
    similarity: float | None = Field(description="Cosine of the embeddings; None without a scoring model.")
    correlation: float = Field(description="Normalized correlation of the luma.")
    flagged: bool = Field(description="Whether the image counts as a copy.")


class Memorisation(StageModel):
    """Generated images that are copies of training images."""

    samples: int
    flagged: int
    limit: float = Field(description="memorisation_limit.")
    calibrated_on: int = Field(
        description="Training images that the alarm is calibrated on; 0: absolute limits."
    )
    pairs: tuple[MemorisedPair, ...] = Field(
        description="Images with their nearest training image, the flagged ones first."
    )
    sheet_path: str | None = Field(description="PNG: the pairs side by side; it is never published.")
    text: str

    @property
    def share(self) -> float:
        """Return the share of the samples that are flagged; 0 without samples."""
        return self.flagged / self.samples if self.samples else 0.0

    @property
    def is_over_limit(self) -> bool:
        """Whether more samples are flagged than memorisation_limit allows."""
        return self.share > self.limit


class EvaluationReport(StageModel):
    """Output of `evaluate`. Losses, scores and images of "lora" are those of the selected checkpoint."""

    identity: str = Field(description="Digest of everything the metrics and images depend on.")
    reused: bool = Field(description="True when a finished evaluation of this identity was reused.")
    run_identity: str = Field(default="", description="Of the run; empty in reports of earlier versions.")
    step: int = Field(default=0, description="Step of the selected checkpoint.")
    weights: Literal["trained", "ema"] = Field(default="trained", description="Of the selected checkpoint.")
    weights_kind: WeightsKind = "lora"
    lora_sha256: str
    eval_source: Literal["eval dataset", "held-out share", "training images"]
    eval_images: int
    base_loss: LossSummary | None = Field(description="None only when eval_loss_disable is set.")
    lora_loss: LossSummary | None
    base_probe: LossSummary | None = Field(
        default=None, description="The base model's eval loss on training images."
    )
    checkpoints: tuple[CheckpointLoss, ...] = Field(default=(), description="By step.")
    selected: Selection | None = None
    selected_weights: CheckpointWeights | None = None
    overfitting: Overfitting | None = None
    scores: Scores | None = None
    memorisation: Memorisation | None = None
    base_clip: ClipSummary | None = Field(description="None when evaluation_type is none.")
    lora_clip: ClipSummary | None
    gallery_path: str = Field(
        description="PNG: per prompt the base model's image beside the trained model's."
    )
    images: tuple[ValidationImage, ...]
    broken_images: tuple[FailedItem, ...] = Field(
        description="LoRA images that are black, constant or not finite."
    )
    loss_plot_path: str | None
    loss_by_step_path: str | None = Field(default=None, description="PNG: eval losses by step.")
    report_path: str = Field(description="report.md beside report.json in output_dir.")
    html_path: str | None = Field(default=None, description="report.html: gallery, curves and settings.")
    blind_ab_path: str | None = Field(default=None, description="HTML page of the blind comparison.")
    difference_to_base: PairedDifference | None = Field(
        default=None, description="Trained model minus base model; None with eval_loss_disable."
    )
    difference_to_release: PairedDifference | None = Field(
        default=None,
        description="This model minus the last release; None without one.",
    )
    change_since_release: dict[str, float] = Field(
        description="This model minus the last release, for each common metric."
    )
    seconds: float


class HistoryRow(StageModel):
    """A row of evaluations.jsonl, the history of a project's evaluations."""

    identity: str = Field(description="Of the evaluation.")
    run_identity: str
    date: str = Field(description="ISO 8601, UTC.")
    step: int
    differs: tuple[str, ...] = Field(description="What its run changes against that of the previous row.")
    base_loss: float | None
    lora_loss: float | None
    difference: PairedDifference | None
    gap: ProbeGap | None
    scores: dict[str, float]
    verdict: tuple[str, ...] = Field(description="Names of the failed checks; empty: passed.")
    released: str | None = Field(
        default=None, description="Tag of the release that was made of it; None if none was."
    )


class HubRelease(StageModel):
    """Value of the hub_release asset."""

    folder: str = Field(description="Local folder with exactly the files that are, or would be, published.")
    files: tuple[str, ...]
    model_card_path: str
    pushed: bool
    repo_id: str | None
    commit: str | None
    url: str | None
    tag: str | None = Field(default=None, description="Git tag of the release; None if it was not pushed.")
    run_identity: str | None = None
    step: int | None = Field(default=None, description="Step of the released checkpoint.")
    lineage: dict[str, Any]
