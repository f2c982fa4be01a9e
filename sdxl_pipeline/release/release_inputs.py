"""What a release is made of, without local paths and secrets."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from sdxl_pipeline.config.paths import NAME_OR_PATH_KEYS
from sdxl_pipeline.config.schema.key_facts import keys_with
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.runtime.evaluation_report import EvaluationReport
from sdxl_pipeline.runtime.specs import KIND_LABELS, TrainedLora, ValidationPrompt

UNPUBLISHED_KEYS = frozenset(keys_with(TrainingSettings, lambda key: not key.is_published))
"""Settings with paths or schedules of this machine; they do not affect the weights."""

LINEAGE_FILE = "lineage.json"

_PRIVATE_KEYS = frozenset({"path", "pairs"})
"""Keys of a report at any depth that are not published: files of this machine, and training images beside generated ones."""

TEXT_SUFFIXES = frozenset({".md", ".json", ".txt"})


class ReleaseError(Exception):
    """A release that must not be published; the message describes why."""


def portable_settings(settings: TrainingSettings) -> dict[str, Any]:
    """Return the effective settings as plain data without local paths."""
    values = settings.model_dump(mode="json", exclude=set(UNPUBLISHED_KEYS))
    return values | {
        key: portable_name(values[key]) for key in NAME_OR_PATH_KEYS if isinstance(values[key], str)
    }


def portable_lineage(value: Any) -> Any:
    """Return plain data in which every string that is a local path is shortened to its last part."""
    if isinstance(value, Mapping):
        return {key: portable_lineage(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable_lineage(item) for item in value]
    return portable_name(value) if isinstance(value, str) else value


def portable_evaluation(report: Mapping[str, Any], with_prompts: bool) -> dict[str, Any]:
    """Return a report.json as it is published: without paths, training images, and prompts that are captions of them.

    `with_prompts` is False when the images were generated from captions that must not be published.
    """
    kept = {}
    for key, value in report.items():
        hidden = (
            key in _PRIVATE_KEYS or key.endswith(("_path", "_dir")) or (key == "prompt" and not with_prompts)
        )
        if not hidden:
            items = value if isinstance(value, list | tuple) else [value]
            plain = [
                portable_evaluation(item, with_prompts) if isinstance(item, Mapping) else item
                for item in items
            ]
            kept[key] = plain if isinstance(value, list | tuple) else plain[0]
    return kept


def portable_name(source: str) -> str:
    """Return a Hub id or a bundled model's name unchanged, and of a local path only the last part."""
    windows = PureWindowsPath(source)
    if windows.is_absolute():
        return windows.name
    is_path = source.startswith(("/", "~", "./", "../")) or source in (".", "..")
    if is_path or source.lower().endswith(".safetensors"):
        return PurePosixPath(source).name or "local model"
    return source


def require_portable(folder: Path, secrets: Iterable[str], local_paths: Iterable[Path]) -> None:
    """Raise ReleaseError when a text file under `folder` contains one of the secrets or local paths.

    The texts come from settings and lineage, which users can fill with anything, and a published token cannot be withdrawn. Paths of
    fewer than three parts, such as `/root`, are ignored.
    """
    forbidden_paths = {str(path) for path in local_paths if len(path.parts) > 2}
    forbidden = {secret for secret in secrets if secret}
    for path in sorted(folder.rglob("*")):
        if path.suffix not in TEXT_SUFFIXES:
            continue
        text = path.read_text(encoding="utf-8")
        if any(secret in text for secret in forbidden):
            raise ReleaseError(
                f"{path.name} of the release contains the Hub token. Remove it from the project's settings and prompts"
            )
        if found := next((local for local in forbidden_paths if local in text), None):
            raise ReleaseError(
                f"{path.name} of the release contains the local path {found}. Remove it from the project's settings and prompts"
            )


_ALGORITHMS = {"lokr": "LoKr", "loha": "LoHa", "lora": "LoRA", "locon": "LoCon"}


class ExportError(Exception):
    """Weights that their users could not use; the message describes why."""


@dataclass(frozen=True)
class ReleaseInputs:
    """Everything that a release is made of."""

    project: str
    base_model: ResolvedModel
    settings: TrainingSettings
    """The settings of the training run."""
    lora: TrainedLora
    report: EvaluationReport
    prompts: Sequence[ValidationPrompt]
    trigger_words: Sequence[str]
    lineage: Mapping[str, Any]
    """Plain data, written to lineage.json without local paths."""

    @property
    def is_lycoris(self) -> bool:
        """Whether the weights are a LyCORIS adapter."""
        return self.lora.weights_kind == "lora" and self.settings.lora_type == "lycoris"

    @property
    def base_model_name(self) -> str:
        """The base model's name without local folders."""
        return portable_name(self.base_model.source)

    @property
    def description(self) -> str:
        """One sentence on what the weights are, without markup."""
        is_adapter = self.lora.weights_kind == "lora"
        what = adapter_name(self.settings) if is_adapter else f"a {KIND_LABELS['unet']}"
        return f"{self.project}: {what} for {self.base_model_name}, {self.lora.steps:,} steps."


def adapter_name(settings: TrainingSettings) -> str:
    """Return the kind of adapter with its article, such as "a DoRA of rank 16" or "a LoKr (LyCORIS)"."""
    if settings.lora_type == "lycoris":
        algorithms = sorted(
            settings.lycoris.algorithms, key=lambda algo: (algo != settings.lycoris.algo, algo)
        )
        return f"a {' and '.join(_ALGORITHMS[algo] for algo in algorithms)} (LyCORIS)"
    return f"a {'DoRA' if settings.use_dora else 'LoRA'} of rank {settings.lora_rank}"


def hub_id(base_model: ResolvedModel) -> str | None:
    """Return the base model's id on the Hub; None for a local or bundled model."""
    return base_model.source if base_model.revision is not None else None
