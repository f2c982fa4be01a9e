"""The finished runs of a project: their manifests in `<output_dir>/lora/<first characters of the identity>`. Imports no torch."""

from pathlib import Path
from typing import Final

from pydantic import ValidationError

from sdxl_pipeline.files.atomic_files import sha256_path
from sdxl_pipeline.runtime.specs import TrainedLora
from sdxl_pipeline.runtime.stage_runner import UserError

RUNS: Final = "lora"
"""Subfolder of `output_dir` with the folders of the runs."""

FINISHED: Final = "finished.json"

MIN_PREFIX_LENGTH: Final = 8
"""Characters of an identity that `find_run` needs at least."""


def list_runs(output_dir: Path) -> list[TrainedLora]:
    """Return the manifests of all finished runs, the earliest finished first. Their weights are not verified."""
    runs = sorted((output_dir / RUNS).glob(f"*/{FINISHED}"), key=lambda path: (path.stat().st_mtime, path))
    found = (_read_manifest(path.parent) for path in runs)
    return [manifest for manifest in found if manifest is not None]


def find_run(output_dir: Path, prefix: str) -> TrainedLora:
    """Return the finished run whose identity begins with `prefix`.

    Raises UserError if no run or several do, if the prefix is too short, or if the run's weights have changed.
    """
    runs = list_runs(output_dir)
    known = ", ".join(run.identity[:16] for run in runs) or "there is none yet: materialize lora"
    if len(prefix) < MIN_PREFIX_LENGTH:
        raise UserError(
            f"{prefix!r} is too short for a run; write at least {MIN_PREFIX_LENGTH} characters of its identity. Finished runs: {known}"
        )
    found = [run for run in runs if run.identity.startswith(prefix)]
    if len(found) != 1:
        problem = "several runs begin" if found else "no finished run begins"
        raise UserError(f"{problem} with {prefix!r} in {output_dir / RUNS}. Finished runs: {known}")
    run = finished_run(Path(found[0].run_dir), found[0].identity)
    if run is None:
        raise UserError(
            f"{found[0].weights_path} is not what the training wrote. Materialize lora again with the settings of this run"
        )
    return run


def finished_run(run_dir: Path, identity: str) -> TrainedLora | None:
    """Return the manifest of the finished run in `run_dir` if its weights are unchanged, else None.

    Raise UserError if the folder contains a finished run with another identity.
    """
    manifest = _read_manifest(run_dir)
    if manifest is None:
        return None
    if manifest.identity != identity:
        raise UserError(
            f"{run_dir} contains another run (identity {manifest.identity[:12]}, not {identity[:12]}); give each run its own folder"
        )
    weights = Path(manifest.weights_path)
    if not weights.exists() or sha256_path(weights) != manifest.weights_sha256:
        return None
    return manifest


def relocated(manifest: TrainedLora, run_dir: Path) -> TrainedLora:
    """Return the manifest with its paths under `run_dir`, because the folder may have been moved."""
    old = Path(manifest.run_dir)

    def relocate(path: str) -> str:
        return str(run_dir / Path(path).relative_to(old))

    return manifest.model_copy(
        update={
            "run_dir": str(run_dir),
            "weights_path": relocate(manifest.weights_path),
            "kohya_path": manifest.kohya_path and relocate(manifest.kohya_path),
            "metrics_path": relocate(manifest.metrics_path),
            "loss_curve_path": relocate(manifest.loss_curve_path),
            "validation_sheet_path": manifest.validation_sheet_path
            and relocate(manifest.validation_sheet_path),
            "validation_images": tuple(
                image.model_copy(update={"path": relocate(image.path)})
                for image in manifest.validation_images
            ),
        }
    )


def _read_manifest(run_dir: Path) -> TrainedLora | None:
    try:
        manifest = TrainedLora.model_validate_json((run_dir / FINISHED).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    return relocated(manifest, run_dir)
