"""Holds the first steps of the demo, at its own settings, to the losses they had when they were written down: a change of the numbers is seen.

After a change that is meant to move them, `GOLDEN_WRITE=1 python -m pytest tests/stages/test_train_golden.py` writes them anew.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from sdxl_pipeline.project.hardware import PRESETS
from sdxl_pipeline.project.precedence import resolve_hardware, resolve_settings
from sdxl_pipeline.project.project import DEFAULT_ROOT, load_project
from sdxl_pipeline.protocol.program import StageStopped, StopSignal
from sdxl_pipeline.protocol.specs import TrainSpec
from sdxl_pipeline.sdxl.base_model import resolve_base_model
from sdxl_pipeline.sdxl.tiny.demo import generate_if_asked
from sdxl_pipeline.stages.train import main
from sdxl_pipeline.training.metrics import METRICS_FILE, read_metrics
from tests.encoded_lanes import Silent, prepare_lane
from tests.training.conftest import one_thread  # noqa: F401 (a fixture)

GOLDEN = Path(__file__).with_name("golden_demo_losses.json")
STEPS = 20


def tolerance(step: int) -> float:
    """Relative, of the loss of a step; norms have ten times as much.

    Measured on one machine under other instruction sets (AVX2, none), losses differ by 1e-7 at first and, since early steps of Adam
    go by the gradients' signs, by half as much again at each step: 1e-6 at step 10, 2e-4 at step 20. Another seed, crop or weight is seen
    at step 1 by some 1e-2.
    """
    return 1e-5 * 1.5**step


class StopAfter(Silent):
    """Asks to stop when so many steps are taken."""

    def __init__(self, steps: int, stop: StopSignal) -> None:
        super().__init__()
        self._steps, self._stop = steps, stop

    def progress(self, task: str, done: int, total: int, unit: str = "") -> None:
        if task == "train" and done >= self._steps:
            self._stop.request()


def demo_spec(folder: Path) -> TrainSpec:
    """The demo as its graph would train it, but for validation pictures."""
    place = shutil.copytree(
        DEFAULT_ROOT / "demo", folder / "demo", ignore=shutil.ignore_patterns("data", "output")
    )
    generate_if_asked(place)
    project, hardware = load_project(place), PRESETS["cpu"]
    settings, _ = resolve_settings(project.training, hardware, {"validation_disable": True})
    model = resolve_base_model(settings, place, cache_dir=folder / "digests")
    lanes = [
        prepare_lane(
            folder / dataset.id, place / dataset.instance_data_dir, model, **dataset.model_dump()
        ).model_copy(update={"repeats": dataset.repeats, "probability": dataset.probability})
        for dataset in project.datasets
    ]
    return TrainSpec(
        base_model=model,
        hardware=resolve_hardware(settings, hardware),
        settings=settings,
        lanes=tuple(lanes),
        prompts=(),
        run_dir=str(folder / "run"),
        project=project.name,
    )


@pytest.mark.usefixtures("one_thread")
def test_the_demos_first_losses_are_what_they_were(tmp_path: Path):
    spec, stop = demo_spec(tmp_path), StopSignal()
    with pytest.raises(StageStopped):
        main(spec, StopAfter(STEPS, stop), stop)
    rows = read_metrics(tmp_path / "run" / METRICS_FILE)
    found = {"loss": [row.loss for row in rows], "grad_norm": [row.grad_norm for row in rows]}
    assert len(rows) == STEPS
    if "GOLDEN_WRITE" in os.environ:
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    for name, factor in (("loss", 1), ("grad_norm", 10)):
        for step, (value, expected) in enumerate(zip(found[name], golden[name], strict=True), start=1):
            assert value == pytest.approx(expected, rel=factor * tolerance(step)), f"{name} of step {step}"
