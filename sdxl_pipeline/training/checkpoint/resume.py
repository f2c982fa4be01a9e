"""Where a run starts: at step 0, at its own latest checkpoint, or at a checkpoint of another run, which it imports.

Two runs of the same *trajectory* take identical steps as far as both of them go; only their length differs. A run without a checkpoint
of its own therefore starts at the latest one of its trajectory, and ends with exactly the weights that it would have had without it:
changing the length of a run loses nothing. If the learning rate depends on the length, no two lengths share a trajectory.

A run that is configured with a checkpoint of another trajectory (`resume_from_checkpoint: <path>`) has that checkpoint in its identity.

A run with early stopping ends at a step that depends on its eval losses. It imports a checkpoint only of a run that would stop at the
same step, with its eval losses and the checkpoint of the best one; a run without early stopping continues a stopped one.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from safetensors import SafetensorError

from sdxl_pipeline.files.atomic_files import link_or_copy
from sdxl_pipeline.models.adapters.init_adapter_source import DEFAULT_ADAPTER_FILE
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import Ancestor, RunLineage, TrainSpec
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.checkpoint.checkpoint_files import (
    CHECKPOINTS,
    checkpoint_identity,
    checkpoint_step,
    is_intact,
    list_checkpoints,
    step_in_name,
)
from sdxl_pipeline.training.checkpoint.checkpoints import (
    import_checkpoint,
    load_checkpoint,
    parameter_shapes,
)
from sdxl_pipeline.training.checkpoint.run_differences import differences
from sdxl_pipeline.training.checkpoint.run_identity import (
    CONSTANT_SCHEDULES,
    RunFingerprints,
    configured_checkpoint,
    lineage_of_checkpoint,
    read_lineage,
    read_spec,
    run_of_checkpoint,
    write_lineage,
)
from sdxl_pipeline.training.checkpoint.warm_start import optimizer_fits
from sdxl_pipeline.training.data.bucket_sampler import total_planned_steps
from sdxl_pipeline.training.trainer_setup import build_samplers, build_validation_schedule, trained_dtype
from sdxl_pipeline.training.validation.early_stopping import decide_for_run

IMAGES = "validation"
DORA_NORMS: Final = "lora_magnitude_vector"


class _Candidate(NamedTuple):
    """A checkpoint that a run may start from, its step, and the lineage of its run, if known."""

    path: Path
    step: int
    lineage: RunLineage | None

    def has_trajectory(self, fingerprints: RunFingerprints) -> bool:
        return self.lineage is not None and self.lineage.trajectory == fingerprints.trajectory

    def precedes(self, fingerprints: RunFingerprints) -> bool:
        """Return whether an uninterrupted run of `fingerprints` passes through the checkpoint, if it is that long."""
        stops_alike = self.lineage is not None and fingerprints.early_stopping in (
            None,
            self.lineage.early_stopping,
        )
        return stops_alike and self.has_trajectory(fingerprints)


def resume_run(spec: TrainSpec, fingerprints: RunFingerprints, reporter: Reporter) -> None:
    """Record the run's lineage, and import the checkpoint it starts from unless it has one of its own. Call it with the run's lock held.

    Raises UserError for a configured checkpoint that it cannot start from.
    """
    run_dir, settings = Path(spec.run_dir), spec.settings
    resumes = settings.resume_from_checkpoint is not None
    if resumes and any(map(is_intact, reversed(list_checkpoints(run_dir / CHECKPOINTS)))):
        return
    source = _find_source(spec, fingerprints, reporter) if resumes else None
    ancestor = None if source is None else _ancestor(source, fingerprints, spec)
    lineage = RunLineage(**fingerprints._asdict(), optimizer=settings.optimizer, ancestor=ancestor)
    # the checkpoint is imported last: its presence marks the import as complete
    write_lineage(run_dir, lineage)
    if source is not None and ancestor is not None:
        reporter.log(
            f"This run starts at step {source.step} of the run {ancestor.identity[:12]} and {_describe_continuation(ancestor)}."
        )
        if (run := run_of_checkpoint(source.path)) is not None:
            _copy_records(run, run_dir)
            if source.precedes(fingerprints):
                for checkpoint in _best_checkpoints(spec, run, source.step):
                    import_checkpoint(checkpoint, run_dir / CHECKPOINTS, lineage)
        import_checkpoint(source.path, run_dir / CHECKPOINTS, lineage)


def report_nearest_run(
    spec: TrainSpec,
    fingerprints: RunFingerprints,
    shapes: Mapping[str, tuple[int, ...]],
    total_steps: int,
    reporter: Reporter,
) -> None:
    """Log the most similar other run, and how to continue it, if this run starts at step 0 although it resumes from the latest checkpoint.

    `shapes` are those of this run's trained parameters. A run that differs only in length or number of processes is logged by `resume_run`.
    """
    if spec.settings.resume_from_checkpoint is None:
        return
    newest: dict[Path, _Candidate] = {}
    for source in _sibling_checkpoints(Path(spec.run_dir), fingerprints):
        if source.lineage and (
            source.lineage.any_length == fingerprints.any_length
            or source.lineage.any_length_or_world_size == fingerprints.any_length_or_world_size
        ):
            return
        newest[source.path.parent.parent] = source
    found = [
        (differences(other, spec), source)
        for run, source in newest.items()
        if (other := read_spec(run)) is not None
    ]
    for changes, source in sorted(found, key=lambda each: (len(each[0]), -each[1].step)):
        try:
            source_shapes = parameter_shapes(source.path)
        except (OSError, ValueError, KeyError, SafetensorError):  # corrupt: not recommended
            continue
        unknown = "the eval losses of early stopping, " if fingerprints.early_stopping else ""
        difference = (
            "; ".join(changes)
            or f"{unknown}the version of the trainer, or the checkpoint that it started from"
        )
        reporter.log(
            f"This run starts at step 0: no other run has the same settings and data. The nearest is {source.path.parent.parent.name}, "
            f"at step {source.step}. It differs in {difference}. {_continuation_hint(source, source_shapes, shapes, total_steps)}"
        )
        return


def _continuation_hint(
    source: _Candidate,
    source_shapes: Mapping[str, tuple[int, ...]],
    run_shapes: Mapping[str, tuple[int, ...]],
    total_steps: int,
) -> str:
    if source_shapes == run_shapes:
        extension = (
            f", and raise max_train_steps above {source.step}: this run ends at step {total_steps}"
            if source.step >= total_steps
            else ""
        )
        return (
            f'To continue from it, write "resume_from_checkpoint": "{source.path}" in config.json{extension}.'
        )
    weights = source.path / DEFAULT_ADAPTER_FILE
    if (
        source_shapes == {name: shape for name, shape in run_shapes.items() if DORA_NORMS not in name}
        and weights.is_file()
    ):
        return f'It has no DoRA norms, so it cannot be continued. To start from its weights, write "init_lora": "{weights}" in config.json.'
    name = min(
        name
        for name in source_shapes.keys() | run_shapes.keys()
        if source_shapes.get(name) != run_shapes.get(name)
    )
    return (
        f"It cannot be continued or used as init_lora, because its weights have other shapes: {name} is "
        f"{source_shapes.get(name, 'absent')} there and {run_shapes.get(name, 'absent')} here. To continue from it, revert the adapter settings."
    )


def _find_source(spec: TrainSpec, fingerprints: RunFingerprints, reporter: Reporter) -> _Candidate | None:
    configured = configured_checkpoint(spec.settings)
    if configured is not None:
        if not is_intact(configured):
            raise UserError(
                f"config.json: resume_from_checkpoint is {configured}, which is corrupt; set it to another checkpoint"
            )
        source = _Candidate(configured, checkpoint_step(configured), lineage_of_checkpoint(configured))
        _require_steps_left(source, fingerprints, _planned_steps(spec))
        return source
    others = list(_sibling_checkpoints(Path(spec.run_dir), fingerprints))
    if same := [source for source in others if source.precedes(fingerprints)]:
        end = _planned_steps(spec)
        for source in sorted(same, key=lambda source: source.step, reverse=True):
            if source.step > end:
                continue
            if is_intact(source.path):
                return source
            reporter.log(f"checkpoint {source.path} is corrupt and is skipped")
        return None
    if any_length := [
        source for source in others if source.lineage and source.lineage.any_length == fingerprints.any_length
    ]:
        furthest = max(any_length, key=lambda source: source.step)
        reporter.log(
            f"{furthest.path} belongs to a run that differs from this one only in length, but the learning rate of lr_scheduler "
            f"{spec.settings.lr_scheduler} depends on the length: this run starts at step 0. With "
            f"{', '.join(sorted(CONSTANT_SCHEDULES))} it would have resumed."
        )
    elif any_length_or_world_size := [
        source
        for source in others
        if source.lineage and source.lineage.any_length_or_world_size == fingerprints.any_length_or_world_size
    ]:
        furthest = max(any_length_or_world_size, key=lambda source: source.step)
        reporter.log(
            f"The run {furthest.path.parent.parent.name} is at step {furthest.step} of the same training with another number of processes. "
            "A different number of processes changes the batches, so this run starts at step 0. To continue from there, set "
            f"resume_from_checkpoint: {furthest.path}"
        )
    return None


def _best_checkpoints(spec: TrainSpec, run: Path, step: int) -> Iterator[Path]:
    """Yield the checkpoint of the best eval loss of another run that precedes this one up to a step, if it is an earlier one."""
    sampler = build_samplers(spec, spec.hardware.num_processes, Reporter()).sampler
    schedule = build_validation_schedule(spec, sampler, total_planned_steps(spec.settings, sampler))
    best_step = decide_for_run(run, spec.settings, step, schedule.eval_loss_is_due).best_step
    for path in list_checkpoints(run / CHECKPOINTS):
        if step_in_name(path) == best_step and best_step < step and is_intact(path):
            yield path
            return


def _require_steps_left(source: _Candidate, fingerprints: RunFingerprints, end: int) -> None:
    if source.step > end or (source.step == end and not source.has_trajectory(fingerprints)):
        raise UserError(
            f"config.json: resume_from_checkpoint is {source.path}, which leaves no steps before the last one ({end}); increase max_train_steps"
        )


def _planned_steps(spec: TrainSpec) -> int:
    sampler = build_samplers(spec, spec.hardware.num_processes, Reporter()).sampler
    return total_planned_steps(spec.settings, sampler)


def _sibling_checkpoints(run_dir: Path, fingerprints: RunFingerprints) -> Iterator[_Candidate]:
    """Yield the checkpoints of the other runs in the same output folder."""
    for folder in sorted(run_dir.parent.iterdir()):
        lineage = read_lineage(folder)
        if lineage is not None and lineage.identity != fingerprints.identity:
            yield from (
                _Candidate(path, step_in_name(path), lineage)
                for path in list_checkpoints(folder / CHECKPOINTS)
            )


def _ancestor(source: _Candidate, fingerprints: RunFingerprints, spec: TrainSpec) -> Ancestor:
    same_trajectory = source.has_trajectory(fingerprints)
    same_optimizer = source.lineage is not None and source.lineage.optimizer == spec.settings.optimizer
    return Ancestor(
        identity=checkpoint_identity(source.path),
        step=source.step,
        same_trajectory=same_trajectory,
        takes_optimizer=same_trajectory
        or (
            same_optimizer
            and optimizer_fits(
                load_checkpoint(source.path),
                spec.settings,
                trained_dtype(spec.settings),
                spec.hardware.device,
            )
        ),
    )


def _describe_continuation(ancestor: Ancestor) -> str:
    if ancestor.same_trajectory:
        return "continues it exactly (same trajectory)"
    if ancestor.takes_optimizer:
        return "continues from its weights and its optimizer's state, under the settings of this run"
    return "continues from its weights with a new optimizer state, because the checkpoint's has a different layout"


def _copy_records(other: Path, run_dir: Path) -> None:
    """Copy metrics, images and their logs. Their readers drop entries past the checkpoint."""
    for record in other.glob("*.jsonl"):
        shutil.copyfile(record, run_dir / record.name)
    if (other / IMAGES).is_dir():
        shutil.copytree(other / IMAGES, run_dir / IMAGES, copy_function=link_or_copy, dirs_exist_ok=True)
