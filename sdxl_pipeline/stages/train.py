"""Stage: train a LoRA or a UNet.

    python -m sdxl_pipeline.stages.train spec.json

Run it under torchrun for several processes. A run's folder belongs to one identity: a finished run is reused, an unfinished one resumes
from its latest checkpoint.
"""

import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.files.atomic_files import remove_unfinished, sha256_path, write_text_atomic
from sdxl_pipeline.files.disk_space import require_space
from sdxl_pipeline.release.formats import FormatError
from sdxl_pipeline.release.formats.kohya_file import KohyaFile, ensure_kohya_file
from sdxl_pipeline.runtime.reporter import Reporter, is_main_process
from sdxl_pipeline.runtime.specs import EMA_FOLDER, TrainedLora, TrainSpec
from sdxl_pipeline.runtime.stage_runner import StopSignal, run_stage
from sdxl_pipeline.runtime.store_leases import leased_datasets
from sdxl_pipeline.training.checkpoint.finished_runs import FINISHED, finished_run
from sdxl_pipeline.training.checkpoint.run_identity import (
    read_lineage,
    run_fingerprints,
    settings_affecting_weights,
)
from sdxl_pipeline.training.checkpoint.run_lock import run_lock
from sdxl_pipeline.training.data.samples import Split, load_samples
from sdxl_pipeline.training.logging.run_logs import (
    EVAL_LOSS_FILE,
    METRICS_FILE,
    VALIDATION_FILE,
    final_loss,
    read_eval_losses,
    read_metrics,
    read_validation_images,
)

if TYPE_CHECKING:
    from sdxl_pipeline.training.logging.observers import RunObserver
    from sdxl_pipeline.training.trainer import Trainer


def main(spec: TrainSpec, reporter: Reporter, stop: StopSignal) -> TrainedLora:
    """Return the manifest of the finished run with the spec's identity, or train."""
    fingerprints = run_fingerprints(spec)
    identity, run_dir = fingerprints.identity, Path(spec.run_dir)
    with run_lock(run_dir, stop) if is_main_process() else nullcontext():
        if is_main_process():
            remove_unfinished(run_dir)
        finished = finished_run(run_dir, identity)
        finished = finished and _released(finished, spec.settings)
        if finished is not None:
            reporter.log(
                f"Nothing to train: the run {identity[:12]} is finished and its weights are unchanged."
            )
            # held-out images are not part of the identity and may have changed since the run
            finished = finished.model_copy(
                update={"reused": True, "held_out_images": _count_images(spec, "eval")}
            )
            return _with_kohya_file(finished, spec, reporter) if is_main_process() else finished

        from sdxl_pipeline.training.checkpoint.resume import report_nearest_run, resume_run
        from sdxl_pipeline.training.trainer import Trainer

        observer = _build_observer(spec, identity, reporter) if is_main_process() else None
        with ExitStack() as stack, observer or nullcontext():
            if is_main_process():
                resume_run(spec, fingerprints, reporter)
                stack.enter_context(leased_datasets(spec.datasets, f"train {spec.project}"))
            trainer = Trainer(spec, identity, reporter, stop, observer)
            stack.callback(trainer.close)
            if trainer.is_main and trainer.resumed_from is None:
                shapes = {name: tuple(parameter.shape) for name, parameter in trainer.parameters.items()}
                report_nearest_run(spec, fingerprints, shapes, trainer.total_steps, reporter)
            trainer.train()
            return _finish(trainer)


def _build_observer(spec: TrainSpec, identity: str, reporter: Reporter) -> "RunObserver":
    from sdxl_pipeline.runtime.webhook import Origin
    from sdxl_pipeline.training.logging.observers import RunObserver
    from sdxl_pipeline.training.logging.tracker_logging import Trackers

    # only settings without local paths and addresses go to the trackers
    config = settings_affecting_weights(spec.settings)
    trackers = Trackers(spec.settings, spec.project, identity, Path(spec.run_dir), config)
    return RunObserver(spec.settings, Origin(spec.project, identity[:12]), trackers, reporter)


def _with_kohya_file(manifest: TrainedLora, spec: TrainSpec, reporter: Reporter) -> TrainedLora:
    """Write the missing kohya files of the run's weights if `lora_format` includes them, and return the manifest with the released one.

    An adapter that the format cannot represent gets no file; the training is complete, and the check before the release fails.
    """
    written: dict[str, KohyaFile] = {}
    if manifest.weights_kind == "lora" and spec.settings.lora_format != "diffusers":
        name = Path(manifest.weights_path).name
        for folder in (Path(manifest.run_dir), Path(manifest.run_dir) / EMA_FOLDER):
            if not (folder / name).is_file():
                continue
            try:
                thumbnail = _last_image(manifest, averaged=folder.name == EMA_FOLDER)
                file = ensure_kohya_file(spec, manifest, folder / name, thumbnail)
            except FormatError as error:
                reporter.log(f"No file for ComfyUI, A1111 and kohya is written for {folder / name}: {error}")
                continue
            written[str(folder / name)] = file
            if file.dora_approximation is not None:
                reporter.log(
                    f"{file.path.name} contains a plain LoRA of rank {file.dora_approximation['rank']} that approximates the trained weight-"
                    f"decomposed adapter, relative error {file.dora_approximation['relative_error']:.3g}."
                )
    released = written.get(manifest.weights_path)
    return manifest.model_copy(
        update={
            "kohya_path": released and str(released.path),
            "kohya_sha256": released and released.sha256,
            "kohya_dtype": released and released.dtype,
            "dora_approximation": released and released.dora_approximation,
        }
    )


def _last_image(manifest: TrainedLora, averaged: bool) -> Path | None:
    """Return the last validation image of the trained weights, or of their EMA if `averaged`; None if there is none."""
    from sdxl_pipeline.training.optim.ema import EMA_LABEL

    images = [image for image in manifest.validation_images if image.name.endswith(EMA_LABEL) == averaged]
    last = max(images, key=lambda image: image.step, default=None)
    return None if last is None or not Path(last.path).is_file() else Path(last.path)


def _finish(trainer: "Trainer") -> TrainedLora:
    """Write the weights and plots on the main process, and return the manifest."""
    import torch

    from sdxl_pipeline.training.checkpoint.free_disk_monitor import CHECKPOINT_ADVICE
    from sdxl_pipeline.training.logging.loss_plot import plot_loss_curve
    from sdxl_pipeline.training.validation.validation_images import write_validation_grid

    spec, run_dir = trainer.spec, trainer.run_dir
    rows = read_metrics(run_dir / METRICS_FILE)
    eval_losses = tuple((row.step, row.loss.mean) for row in read_eval_losses(run_dir / EVAL_LOSS_FILE))
    images = tuple(read_validation_images(run_dir / VALIDATION_FILE))
    lineage = read_lineage(run_dir)
    ancestor = lineage and lineage.ancestor
    # steps of an ancestor without metrics
    unrecorded = ancestor.step if ancestor and not any(row.step <= ancestor.step for row in rows) else 0
    weights, loss_curve, grid = (
        run_dir / trainer.trainable.weights_name,
        run_dir / "loss_curve.png",
        run_dir / "validation.png",
    )
    with trainer.trainable.summon_full_params(torch.device("cpu")):
        if trainer.is_main:
            num_formats = 2 if trainer.trainable.kind == "lora" else 1  # diffusers and kohya
            require_space(run_dir, num_formats * trainer.export_bytes, "the final weights", CHECKPOINT_ADVICE)
            trainer.export(run_dir)
    if trainer.is_main:
        plot_loss_curve(
            rows, loss_curve, title=f"{spec.project}: {trainer.step} steps", eval_losses=eval_losses
        )
        if images:
            write_validation_grid(images, grid)
    trainer.cpu_group.barrier()
    if trainer.uploads is not None:
        trainer.uploads.finish()
    manifest = TrainedLora(
        identity=trainer.identity,
        run_dir=str(run_dir),
        weights_kind=trainer.trainable.kind,
        weights_path=str(weights),
        weights_sha256=sha256_path(weights),
        steps=trainer.step,
        planned_steps=trainer.total_steps,
        stopped_early=trainer.stopped_early,
        epochs=trainer.epochs_at(trainer.step),
        samples=trainer.images_trained,
        trained_images=trainer.sampler.samples.images_by_dataset(),
        held_out_images=_count_images(spec, "eval"),
        images_per_epoch=trainer.samplers.images_per_epoch,
        appearances=trainer.sampler.appearances(),
        crops_per_image=trainer.sampler.samples.crops_per_image(),
        raised_repeats=dict(trainer.samplers.sampling_weights.raised_repeats),
        resumed_from_step=trainer.resumed_from,
        reused=False,
        ancestor=ancestor,
        skipped_steps=trainer.step - unrecorded - len(rows),
        final_loss=final_loss(rows),
        eval_losses=eval_losses,
        seconds=trainer.seconds,
        steps_per_second=trainer.step / trainer.log.training_seconds,
        peak_memory_bytes=peak_memory_bytes(spec.hardware.device),
        memory_estimate=trainer.memory.parts(),
        estimated_memory_bytes=trainer.memory.total,
        trainable_parameters=sum(parameter.numel() for parameter in trainer.parameters.values()),
        adapted_modules=trainer.trainable.num_trained_modules,
        metrics_path=str(run_dir / METRICS_FILE),
        loss_curve_path=str(loss_curve),
        validation_sheet_path=str(grid) if images else None,
        validation_images=images,
    )
    manifest = _released(manifest, spec.settings) or manifest
    if trainer.is_main:
        manifest = _with_kohya_file(manifest, spec, trainer.reporter)
        write_text_atomic(run_dir / FINISHED, manifest.model_dump_json(indent=2) + "\n")
    if trainer.observer is not None:
        trainer.observer.on_train_end(manifest)
    return manifest


def _count_images(spec: TrainSpec, split: Split) -> dict[str, int]:
    """Return the number of images of one split, by dataset."""
    return load_samples(spec.datasets, split, spec.settings.micro_conditioning).images_by_dataset()


def _released(manifest: TrainedLora, settings: TrainingSettings) -> TrainedLora | None:
    """Return the manifest with the weights that `released_weights` selects; None if they do not exist."""
    if not settings.use_ema:
        return manifest
    folder = Path(manifest.run_dir) / (EMA_FOLDER if settings.released_weights == "ema" else "")
    weights = folder / Path(manifest.weights_path).name
    if not weights.exists():
        return None
    return manifest.model_copy(
        update={
            "weights_path": str(weights),
            "weights_sha256": sha256_path(weights),
            "released_weights": settings.released_weights,
        }
    )


def peak_memory_bytes(device: str) -> int:
    """Return the peak memory of this process: on the GPU if `device` is cuda, else the resident set size."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource  # not on every platform

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes everywhere but on macOS


if __name__ == "__main__":
    run_stage(TrainSpec, main)
