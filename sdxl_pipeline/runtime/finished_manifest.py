"""What a stage found finished, it need not do again: manifests kept beside their results, found by identity."""

from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from sdxl_pipeline.files.atomic_files import write_text_atomic
from sdxl_pipeline.runtime.specs import EvaluationReport, LatentCache, StageModel, TextEmbedCache

ManifestT = TypeVar("ManifestT", LatentCache, TextEmbedCache, EvaluationReport)


def finished_path(result: Path) -> Path:
    """Where the manifest of a result is kept."""
    return result.with_suffix(".finished.json")


def read_finished(result: Path, manifest_type: type[ManifestT], identity: str) -> ManifestT | None:
    """The manifest kept beside `result` if it is of this identity and every file it names is still there; else None."""
    try:
        manifest = manifest_type.model_validate_json(finished_path(result).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    named = manifest.model_dump(
        include={name for name in manifest_type.model_fields if name.endswith("_path")}
    )
    there = all(Path(path).exists() for path in named.values() if path is not None)
    return manifest if there and manifest.identity == identity else None


def write_finished(result: Path, manifest: StageModel) -> None:
    """Keep a manifest beside its result."""
    write_text_atomic(finished_path(result), manifest.model_dump_json(indent=1) + "\n")
