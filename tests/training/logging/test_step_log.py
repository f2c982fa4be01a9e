"""Holds what is reported of steps: those taken are written, those skipped are named by the batch to blame, and overflows under loss scaling are neither."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sdxl_pipeline.training.data.bucket_sampler import BucketBatchSampler
from sdxl_pipeline.training.data.samples import load_samples
from sdxl_pipeline.training.logging import step_log
from sdxl_pipeline.training.logging.metrics_log import METRICS_FILE, MetricsLog, StepMetrics, read_metrics
from sdxl_pipeline.training.logging.step_log import StepLog, StepRecord
from tests.support.train_programs import Listener
from tests.support.training_datasets import SQUARE, make_dataset

NAN = float("nan")


class OneProcess(SimpleNamespace):
    """As much of an accelerator as a report asks for."""

    @staticmethod
    def reduce(tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        return tensor

    gather = staticmethod(lambda tensor: tensor)


def scaled(scale: float) -> SimpleNamespace:
    return SimpleNamespace(get_scale=lambda: scale)


@pytest.fixture
def reported(tmp_path: Path):
    dataset = make_dataset(tmp_path / "dataset", buckets=[SQUARE] * 4)
    order = BucketBatchSampler(
        load_samples([dataset], "train"), {dataset.dataset_id: 1.0}, seed=3, batch_size=1
    )

    def report(steps, scaler=None):
        listener, metrics = Listener(), MetricsLog(tmp_path / METRICS_FILE, 0)
        watch = SimpleNamespace(steps=lambda rows: None)
        log = StepLog(OneProcess(scaler=scaler), listener, order, 100, 0.0, metrics, watch)
        for number, (losses, norm) in enumerate(steps, start=1):
            log.add(StepRecord(number, torch.tensor(losses), torch.tensor(norm), 1e-3, images=2))
        log.report()
        rows = [(row.step, row.loss, row.grad_norm) for row in read_metrics(tmp_path / METRICS_FILE)]
        return rows, listener.lines, order

    return report


def test_the_part_of_an_accumulated_step_that_is_not_finite_is_named_and_no_other(reported):
    rows, lines, order = reported([((0.5, 0.25), 1.0), ((0.5, NAN), NAN), ((0.25, 0.25), 2.0)])
    assert rows == [(1, 0.75, 1.0), (3, 0.5, 2.0)]
    (line,) = lines
    (blamed,), (other,) = order.batch(3, 0), order.batch(2, 0)
    assert "step 2 is skipped because its loss is nan" in line
    assert blamed.sample.key[:12] in line
    assert other.sample.key[:12] not in line


def test_the_time_to_the_end_is_that_of_the_steps_and_of_the_looks(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(step_log, "time", SimpleNamespace(monotonic=lambda: now[0]))
    dataset = make_dataset(tmp_path / "dataset", buckets=[SQUARE] * 4)
    order = BucketBatchSampler(
        load_samples([dataset], "train"), {dataset.dataset_id: 1.0}, seed=3, batch_size=1
    )
    seen: list[StepMetrics] = []
    watch, validator = (
        SimpleNamespace(steps=seen.extend),
        SimpleNamespace(seconds_to_come=lambda step: 7.0 * step),
    )
    log = StepLog(OneProcess(scaler=None), Listener(), order, 100, 0.0, None, watch, validator)
    for number in (1, 2):
        log.add(StepRecord(number, torch.ones(1), torch.tensor(1.0), 1e-3, images=2))
    now[0] += 4.0
    log.report()
    assert [row.eta_seconds for row in seen] == [99 * 2.0 + 7.0, 98 * 2.0 + 14.0]
    assert [row.samples_per_second for row in seen] == [1.0, 1.0]


def test_of_gradients_alone_the_whole_step_is_named(reported):
    rows, (line,), order = reported([((0.5, 0.25), float("inf"))])
    assert rows == []
    assert "its gradients are not finite" in line
    for index in (0, 1):
        assert order.batch(index, 0)[0].sample.key[:12] in line


def test_an_overflow_belongs_to_loss_scaling_until_its_scale_is_gone(reported):
    step = ((0.5, 0.5), float("inf"))
    assert reported([step] * 12, scaled(64.0))[:2] == ([(n, 1.0, None) for n in range(1, 13)], [])
    rows, lines, _ = reported([step], scaled(0.5))
    assert rows == []
    assert "step 1 is skipped" in lines[0]
