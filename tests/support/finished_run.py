"""The manifest and weights of a finished run, without a training."""

from pathlib import Path
from typing import Any

from sdxl_pipeline.files.atomic_files import sha256_path
from sdxl_pipeline.runtime.specs import TrainedLora
from sdxl_pipeline.training.checkpoint.finished_runs import FINISHED

WEIGHTS = "pytorch_lora_weights.safetensors"


def write_finished_run(run_dir: Path, identity: str = "a" * 64, **changes: Any) -> TrainedLora:
    """Write weights, plot and manifest of a run of 12 steps into `run_dir`, and return the manifest with `changes`."""
    weights = run_dir / changes.pop("weights", WEIGHTS)
    weights.parent.mkdir(parents=True, exist_ok=True)
    if not weights.exists():
        weights.write_bytes(b"final weights")
    manifest = TrainedLora(
        **{
            "identity": identity,
            "run_dir": str(run_dir),
            "weights_path": str(weights),
            "weights_sha256": sha256_path(weights),
            "steps": 12,
            "epochs": 3.0,
            "samples": 24,
            "resumed_from_step": None,
            "reused": False,
            "final_loss": 0.1,
            "seconds": 1.0,
            "steps_per_second": 12.0,
            "peak_memory_bytes": 1,
            "trainable_parameters": 1,
            "adapted_modules": 1,
            "metrics_path": str(run_dir / "metrics.jsonl"),
            "loss_curve_path": str(run_dir / "loss_curve.png"),
            "validation_sheet_path": None,
            "validation_images": (),
            **changes,
        }
    )
    (run_dir / FINISHED).write_text(manifest.model_dump_json(), encoding="utf-8")
    return manifest
