"""Where a run begins: at step 0, at its own latest checkpoint, or at a checkpoint of another run, which it then makes its own.

Two runs of one *trajectory* take the same steps as far as both of them go; nothing but their length differs. A run without a checkpoint
of its own therefore begins at the furthest one of its trajectory, and ends with the very weights that it would have had by itself: a run
that is made longer or shorter loses nothing. Where the learning rate depends on the length, no other run is of the same trajectory.

A run that is sent to a checkpoint of another trajectory (`resume_from_checkpoint: <path>`) has that checkpoint in its identity.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sdxl_pipeline.protocol.program import StageError
from sdxl_pipeline.protocol.reporter import Reporter
from sdxl_pipeline.protocol.specs import Ancestor, RunLineage, TrainSpec
from sdxl_pipeline.store.files import link_or_copy
from sdxl_pipeline.training.checkpoints import (
    CHECKPOINTS,
    adopt_checkpoint,
    checkpoint_identity,
    checkpoint_step,
    checkpoints,
    is_intact,
)
from sdxl_pipeline.training.identity import CONSTANT_SCHEDULES, RunNames
from sdxl_pipeline.training.lineage import (
    chosen_checkpoint,
    lineage_of_checkpoint,
    read_lineage,
    write_lineage,
)
from sdxl_pipeline.training.trainer_setup import plan_order, planned_steps

PICTURES = "validation"


class _Source(NamedTuple):
    """A checkpoint that a run may begin from, and the lineage of its own run, if that is known."""

    place: Path
    lineage: RunLineage | None

    @property
    def step(self) -> int:
        return checkpoint_step(self.place)

    def is_of_trajectory(self, names: RunNames) -> bool:
        return self.lineage is not None and self.lineage.trajectory == names.trajectory


def begin_run(spec: TrainSpec, names: RunNames, reporter: Reporter) -> None:
    """Record the run's lineage, and give it the checkpoint it begins from unless it has one of its own. For the holder of its lock.

    Raises StageError for a named checkpoint that it cannot begin from.
    """
    run_dir, settings = Path(spec.run_dir), spec.settings
    resumes = settings.resume_from_checkpoint is not None
    if resumes and checkpoints(run_dir / CHECKPOINTS):
        return
    source = _find_source(spec, names, reporter) if resumes else None
    ancestor = None if source is None else _ancestor(source, names, settings.optimizer)
    # the checkpoint last: it says that all this is done
    write_lineage(run_dir, RunLineage(**names._asdict(), optimizer=settings.optimizer, ancestor=ancestor))
    if source is not None and ancestor is not None:
        reporter.log(
            f"This run begins at step {source.step} of the run {ancestor.identity[:12]} and {_how(ancestor)}."
        )
        _take_records(source.place.parent.parent, run_dir)
        adopt_checkpoint(source.place, run_dir / CHECKPOINTS, names.identity, ancestor)


def _find_source(spec: TrainSpec, names: RunNames, reporter: Reporter) -> _Source | None:
    chosen = chosen_checkpoint(spec.settings)
    if chosen is not None:
        source = _Source(chosen, lineage_of_checkpoint(chosen))
        _require_fitting(source, names, _planned_steps(spec))
        return source
    others = list(_beside(Path(spec.run_dir), names))
    if same := [source for source in others if source.is_of_trajectory(names)]:
        end = _planned_steps(spec)
        fitting = [source for source in same if source.step <= end and is_intact(source.place)]
        return max(fitting, key=lambda source: source.step, default=None)
    if family := [source for source in others if source.lineage and source.lineage.family == names.family]:
        furthest = max(family, key=lambda source: source.step)
        reporter.log(
            f"{furthest.place} is of a run that differs from this one in its length alone, but the learning rate of lr_scheduler "
            f"{spec.settings.lr_scheduler} depends on the length: this run begins at step 0. It would have gone on with "
            f"{', '.join(sorted(CONSTANT_SCHEDULES))}."
        )
    return None


def _require_fitting(source: _Source, names: RunNames, end: int) -> None:
    if source.step > end or (source.step == end and not source.is_of_trajectory(names)):
        raise StageError(
            f"config.json: resume_from_checkpoint names {source.place}, after which no step is left of {end}; raise max_train_steps"
        )
    if not is_intact(source.place):
        raise StageError(
            f"config.json: resume_from_checkpoint names {source.place}, which is damaged; name another checkpoint"
        )


def _planned_steps(spec: TrainSpec) -> int:
    order = plan_order(spec, spec.hardware.num_processes, Reporter()).order
    return planned_steps(spec.settings, order)


def _beside(run_dir: Path, names: RunNames) -> Iterator[_Source]:
    """The checkpoints of the other runs whose folders lie beside this one's."""
    for folder in sorted(run_dir.parent.iterdir()):
        lineage = read_lineage(folder)
        if lineage is not None and lineage.identity != names.identity:
            yield from (_Source(place, lineage) for place in checkpoints(folder / CHECKPOINTS))


def _ancestor(source: _Source, names: RunNames, optimizer: str) -> Ancestor:
    same = source.is_of_trajectory(names)
    return Ancestor(
        identity=checkpoint_identity(source.place),
        step=source.step,
        same_trajectory=same,
        takes_optimizer=same or (source.lineage is not None and source.lineage.optimizer == optimizer),
    )


def _how(ancestor: Ancestor) -> str:
    if ancestor.same_trajectory:
        return "goes on as that one would have"
    if ancestor.takes_optimizer:
        return "goes on from its weights and its optimizer's state, under its own settings"
    return "goes on from its weights, with an optimizer that begins anew"


def _take_records(other: Path, run_dir: Path) -> None:
    """Metrics, pictures and their lists. Whoever opens them drops what is past the checkpoint."""
    for record in other.glob("*.jsonl"):
        shutil.copyfile(record, run_dir / record.name)
    if (other / PICTURES).is_dir():
        shutil.copytree(other / PICTURES, run_dir / PICTURES, copy_function=link_or_copy, dirs_exist_ok=True)
