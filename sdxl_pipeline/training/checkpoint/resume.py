"""Where a run begins: at step 0, at its own latest checkpoint, or at a checkpoint of another run, which it then makes its own.

Two runs of one *trajectory* take the same steps as far as both of them go; nothing but their length differs. A run without a checkpoint
of its own therefore begins at the furthest one of its trajectory, and ends with the very weights that it would have had by itself: a run
that is made longer or shorter loses nothing. Where the learning rate depends on the length, no other run is of the same trajectory.

A run that is sent to a checkpoint of another trajectory (`resume_from_checkpoint: <path>`) has that checkpoint in its identity.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from safetensors import SafetensorError

from sdxl_pipeline.files.atomic_files import link_or_copy
from sdxl_pipeline.models.adapters.init_adapter_source import USUAL_NAME
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import Ancestor, RunLineage, TrainingDataset, TrainSpec
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.checkpoint.checkpoints import (
    CHECKPOINTS,
    checkpoint_identity,
    checkpoint_step,
    checkpoints,
    import_checkpoint,
    is_intact,
    load_checkpoint,
    parameter_shapes,
    step_in_name,
)
from sdxl_pipeline.training.checkpoint.run_identity import (
    CONSTANT_SCHEDULES,
    RunFingerprints,
    decides_weights,
    setting_changes,
)
from sdxl_pipeline.training.checkpoint.run_lineage import (
    chosen_checkpoint,
    lineage_of_checkpoint,
    read_lineage,
    read_spec,
    run_of_checkpoint,
    write_lineage,
)
from sdxl_pipeline.training.checkpoint.warm_start import optimizer_fits
from sdxl_pipeline.training.data.bucket_sampler import total_planned_steps
from sdxl_pipeline.training.trainer_setup import plan_order

IMAGES = "validation"
DORA_NORMS: Final = "lora_magnitude_vector"


class _Source(NamedTuple):
    """A checkpoint that a run may begin from, its step, and the lineage of its own run, if that is known."""

    place: Path
    step: int
    lineage: RunLineage | None

    def is_of_trajectory(self, names: RunFingerprints) -> bool:
        return self.lineage is not None and self.lineage.trajectory == names.trajectory


def resume_run(spec: TrainSpec, names: RunFingerprints, reporter: Reporter) -> None:
    """Record the run's lineage, and give it the checkpoint it begins from unless it has one of its own. For the holder of its lock.

    Raises UserError for a named checkpoint that it cannot begin from.
    """
    run_dir, settings = Path(spec.run_dir), spec.settings
    resumes = settings.resume_from_checkpoint is not None
    if resumes and any(map(is_intact, reversed(checkpoints(run_dir / CHECKPOINTS)))):
        return
    source = _find_source(spec, names, reporter) if resumes else None
    ancestor = None if source is None else _ancestor(source, names, spec)
    lineage = RunLineage(**names._asdict(), optimizer=settings.optimizer, ancestor=ancestor)
    # the checkpoint last: it says that all this is done
    write_lineage(run_dir, lineage)
    if source is not None and ancestor is not None:
        reporter.log(
            f"This run begins at step {source.step} of the run {ancestor.identity[:12]} and {_how(ancestor)}."
        )
        if (run := run_of_checkpoint(source.place)) is not None:
            _take_records(run, run_dir)
        import_checkpoint(source.place, run_dir / CHECKPOINTS, lineage)


def report_nearest_run(
    spec: TrainSpec,
    names: RunFingerprints,
    shapes: Mapping[str, tuple[int, ...]],
    total_steps: int,
    reporter: Reporter,
) -> None:
    """Log which other run is nearest to one that starts at step 0 although it resumes from the latest checkpoint, and how to continue it.

    `shapes` are those of the parameters that this run trains. A run of the same family or kin is logged by `resume_run`.
    """
    if spec.settings.resume_from_checkpoint is None:
        return
    newest: dict[Path, _Source] = {}
    for source in _beside(Path(spec.run_dir), names):
        if source.lineage and (
            source.lineage.any_length == names.any_length
            or source.lineage.any_length_or_world_size == names.any_length_or_world_size
        ):
            return
        newest[source.place.parent.parent] = source
    found = [
        (differences(other, spec), source)
        for run, source in newest.items()
        if (other := read_spec(run)) is not None
    ]
    for changes, source in sorted(found, key=lambda each: (len(each[0]), -each[1].step)):
        try:
            theirs = parameter_shapes(source.place)
        except (OSError, ValueError, KeyError, SafetensorError):  # damaged: not to be recommended
            continue
        text = "; ".join(changes) or "the version of the trainer, or the checkpoint that it began from"
        reporter.log(
            f"This run starts at step 0: no other run is of the same settings and data. The nearest is {source.place.parent.parent.name}, "
            f"at step {source.step}. It differs in {text}. {_advice(source, theirs, shapes, total_steps)}"
        )
        return


def differences(other: TrainSpec, spec: TrainSpec) -> list[str]:
    """Return in words what makes the weights of `spec` other than those of `other`, as "name: old -> new"."""
    changes = [
        f"{key}: {json.dumps(old)} -> {json.dumps(new)}"
        for key, (old, new) in setting_changes(other, spec).items()
        if decides_weights(key)
    ]
    if other.base_model.digest != spec.base_model.digest:
        changes.append(f"base model: {other.base_model.source} -> {spec.base_model.source}")
    theirs, ours = (
        {dataset.dataset_id: _data_of(dataset) for dataset in each.datasets} for each in (other, spec)
    )
    for dataset_id in sorted(theirs.keys() | ours.keys()):
        if theirs.get(dataset_id) != ours.get(dataset_id):
            changes.append(f"images, captions or settings of the dataset {dataset_id}")
    return changes


def _data_of(dataset: TrainingDataset) -> tuple[object, ...]:
    """Return what decides the samples of a dataset; the names of its tables hold their digests."""
    return (
        *(Path(dataset.rows_path).name, dataset.latents.digest, dataset.text_embeds.digest),
        *(dataset.repeats, dataset.probability, dataset.fresh_crops, dataset.is_regularisation),
        dataset.masks and (dataset.masks.kind, Path(dataset.masks.pairs_path).name),
    )


def _advice(
    source: _Source,
    theirs: Mapping[str, tuple[int, ...]],
    ours: Mapping[str, tuple[int, ...]],
    total_steps: int,
) -> str:
    if theirs == ours:
        longer = (
            f", and raise max_train_steps above {source.step}: this run ends at step {total_steps}"
            if source.step >= total_steps
            else ""
        )
        return (
            f'To continue from it, write "resume_from_checkpoint": "{source.place}" in config.json{longer}.'
        )
    weights = source.place / USUAL_NAME
    if (
        theirs == {name: shape for name, shape in ours.items() if DORA_NORMS not in name}
        and weights.is_file()
    ):
        return f'It has no DoRA norms, so it cannot be continued. To start from its weights, write "init_lora": "{weights}" in config.json.'
    name = min(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    return (
        f"It cannot be continued, nor be the start of this run (init_lora), since its weights have other shapes: {name} is "
        f"{theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here. To continue from it, set what differs in the adapter back."
    )


def _find_source(spec: TrainSpec, names: RunFingerprints, reporter: Reporter) -> _Source | None:
    chosen = chosen_checkpoint(spec.settings)
    if chosen is not None:
        if not is_intact(chosen):
            raise UserError(
                f"config.json: resume_from_checkpoint names {chosen}, which is damaged; name another checkpoint"
            )
        source = _Source(chosen, checkpoint_step(chosen), lineage_of_checkpoint(chosen))
        _require_steps_left(source, names, _planned_steps(spec))
        return source
    others = list(_beside(Path(spec.run_dir), names))
    if same := [source for source in others if source.is_of_trajectory(names)]:
        end = _planned_steps(spec)
        for source in sorted(same, key=lambda source: source.step, reverse=True):
            if source.step > end:
                continue
            if is_intact(source.place):
                return source
            reporter.log(f"checkpoint {source.place} is damaged and is passed over")
        return None
    if any_length := [
        source for source in others if source.lineage and source.lineage.any_length == names.any_length
    ]:
        furthest = max(any_length, key=lambda source: source.step)
        reporter.log(
            f"{furthest.place} is of a run that differs from this one in its length alone, but the learning rate of lr_scheduler "
            f"{spec.settings.lr_scheduler} depends on the length: this run begins at step 0. It would have gone on with "
            f"{', '.join(sorted(CONSTANT_SCHEDULES))}."
        )
    elif any_length_or_world_size := [
        source
        for source in others
        if source.lineage and source.lineage.any_length_or_world_size == names.any_length_or_world_size
    ]:
        furthest = max(any_length_or_world_size, key=lambda source: source.step)
        reporter.log(
            f"The run {furthest.place.parent.parent.name} is at step {furthest.step} of this training on another number of processes, "
            "which makes its batches, and so its steps, others: this run begins at step 0. It would go on from there with "
            f"resume_from_checkpoint: {furthest.place}"
        )
    return None


def _require_steps_left(source: _Source, names: RunFingerprints, end: int) -> None:
    if source.step > end or (source.step == end and not source.is_of_trajectory(names)):
        raise UserError(
            f"config.json: resume_from_checkpoint names {source.place}, after which no step is left of {end}; raise max_train_steps"
        )


def _planned_steps(spec: TrainSpec) -> int:
    order = plan_order(spec, spec.hardware.num_processes, Reporter()).order
    return total_planned_steps(spec.settings, order)


def _beside(run_dir: Path, names: RunFingerprints) -> Iterator[_Source]:
    """The checkpoints of the other runs whose folders lie beside this one's."""
    for folder in sorted(run_dir.parent.iterdir()):
        lineage = read_lineage(folder)
        if lineage is not None and lineage.identity != names.identity:
            yield from (
                _Source(place, step_in_name(place), lineage) for place in checkpoints(folder / CHECKPOINTS)
            )


def _ancestor(source: _Source, names: RunFingerprints, spec: TrainSpec) -> Ancestor:
    same = source.is_of_trajectory(names)
    of_same_name = source.lineage is not None and source.lineage.optimizer == spec.settings.optimizer
    return Ancestor(
        identity=checkpoint_identity(source.place),
        step=source.step,
        same_trajectory=same,
        takes_optimizer=same
        or (
            of_same_name
            and optimizer_fits(load_checkpoint(source.place), spec.settings, spec.hardware.device)
        ),
    )


def _how(ancestor: Ancestor) -> str:
    if ancestor.same_trajectory:
        return "goes on as that one would have"
    if ancestor.takes_optimizer:
        return "goes on from its weights and its optimizer's state, under its own settings"
    return "goes on from its weights, with an optimizer that begins anew: what the one there kept is not what this one keeps"


def _take_records(other: Path, run_dir: Path) -> None:
    """Metrics, images and their lists. Whoever opens them drops what is past the checkpoint."""
    for record in other.glob("*.jsonl"):
        shutil.copyfile(record, run_dir / record.name)
    if (other / IMAGES).is_dir():
        shutil.copytree(other / IMAGES, run_dir / IMAGES, copy_function=link_or_copy, dirs_exist_ok=True)
