"""StepLog writes completed steps, logs skipped ones with their batches, and does not log fp16 overflows under loss scaling."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sdxl_pipeline.training.data.bucket_sampler import BucketBatchSampler
from sdxl_pipeline.training.data.samples import load_samples
from sdxl_pipeline.training.logging import step_log
from sdxl_pipeline.training.logging.run_logs import METRICS_FILE, StepMetrics, metrics_log, read_metrics
from sdxl_pipeline.training.logging.step_log import StepLog, StepRecord
from tests.support.train_programs import RecordingReporter
from tests.support.training_datasets import SQUARE, make_dataset

NAN = float("nan")


class SingleProcessAccelerator(SimpleNamespace):
    """The part of an accelerator that StepLog uses."""

    @staticmethod
    def reduce(tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        return tensor

    gather = staticmethod(lambda tensor: tensor)


def scaler_with(scale: float) -> SimpleNamespace:
    return SimpleNamespace(get_scale=lambda: scale)


@pytest.fixture
def report(tmp_path: Path):
    """Return a function that reports steps of (losses, gradient norm) and returns (written rows, log lines, sampler)."""
    dataset = make_dataset(tmp_path / "dataset", buckets=[SQUARE] * 4)
    sampler = BucketBatchSampler(
        load_samples([dataset], "train"), {dataset.dataset_id: 1.0}, seed=3, batch_size=1
    )

    def report_steps(steps, scaler=None):
        reporter, metrics = RecordingReporter(), metrics_log(tmp_path, 0)
        observer = SimpleNamespace(on_steps=lambda rows: None)
        log = StepLog(SingleProcessAccelerator(scaler=scaler), reporter, sampler, 100, 0.0, metrics, observer)
        for number, (losses, norm) in enumerate(steps, start=1):
            log.add(StepRecord(number, torch.tensor(losses), torch.tensor(norm), 1e-3, images=2))
        log.report()
        rows = [(row.step, row.loss, row.grad_norm) for row in read_metrics(tmp_path / METRICS_FILE)]
        return rows, reporter.lines, sampler

    return report_steps


def test_step_log_nan_in_one_micro_batch_logs_that_batch_only(report):
    rows, lines, sampler = report([((0.5, 0.25), 1.0), ((0.5, NAN), NAN), ((0.25, 0.25), 2.0)])
    assert rows == [(1, 0.75, 1.0), (3, 0.5, 2.0)]
    (line,) = lines
    (suspect,), (other,) = sampler.batch(3, 0), sampler.batch(2, 0)
    assert "step 2 is skipped because its loss is nan" in line
    assert suspect.sample.key[:12] in line
    assert other.sample.key[:12] not in line


def test_step_log_eta_includes_remaining_validations(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(step_log, "time", SimpleNamespace(monotonic=lambda: now[0]))
    dataset = make_dataset(tmp_path / "dataset", buckets=[SQUARE] * 4)
    sampler = BucketBatchSampler(
        load_samples([dataset], "train"), {dataset.dataset_id: 1.0}, seed=3, batch_size=1
    )
    reported: list[StepMetrics] = []
    observer = SimpleNamespace(on_steps=reported.extend)
    validator = SimpleNamespace(remaining_seconds=lambda step: 7.0 * step)
    log = StepLog(
        SingleProcessAccelerator(scaler=None),
        RecordingReporter(),
        sampler,
        100,
        0.0,
        None,
        observer,
        validator,
    )
    for number in (1, 2):
        log.add(StepRecord(number, torch.ones(1), torch.tensor(1.0), 1e-3, images=2))
    now[0] += 4.0
    log.report()
    assert [row.eta_seconds for row in reported] == [99 * 2.0 + 7.0, 98 * 2.0 + 14.0]
    assert [row.samples_per_second for row in reported] == [1.0, 1.0]


def test_step_log_nonfinite_gradients_with_finite_losses_logs_all_batches(report):
    rows, (line,), sampler = report([((0.5, 0.25), float("inf"))])
    assert rows == []
    assert "its gradients are not finite" in line
    for index in (0, 1):
        assert sampler.batch(index, 0)[0].sample.key[:12] in line


def test_step_log_overflow_under_loss_scaling_is_not_logged_until_scale_below_one(report):
    step = ((0.5, 0.5), float("inf"))
    assert report([step] * 12, scaler_with(64.0))[:2] == ([(n, 1.0, None) for n in range(1, 13)], [])
    rows, lines, _ = report([step], scaler_with(0.5))
    assert rows == []
    assert "step 1 is skipped" in lines[0]
