"""Rollouts of 0 steps equal plain training bit for bit, and all objective settings together resume bit-exactly."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdxl_pipeline.models.components import latent_scaling_factor
from sdxl_pipeline.runtime.specs import TrainedLora, TrainSpec
from sdxl_pipeline.runtime.stage_runner import StageStopped, StopSignal, UserError
from sdxl_pipeline.stages.train import main
from sdxl_pipeline.training.data.batches import BatchReader, TrainingBatches
from sdxl_pipeline.training.data.bucket_sampler import BucketBatchSampler
from sdxl_pipeline.training.data.samples import load_samples
from sdxl_pipeline.training.diffusion.forward_process import build_forward_process
from sdxl_pipeline.training.diffusion.scheduled_sampling import RolloutSampler
from tests.support.train_programs import RecordingReporter, StoppingReporter, losses, run, with_settings
from tests.support.training_datasets import make_spec

pytestmark = pytest.mark.usefixtures("one_thread")

ALL_OBJECTIVES = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "diff2flow_enabled": True,
    "diff2flow_loss": True,
    "offset_noise": True,
    "noise_offset_probability": 0.5,
    "input_perturbation": 0.1,
    "input_perturbation_steps": 4,
    "timestep_bias_strategy": "later",
    "timestep_bias_multiplier": 2.0,
    "disable_segmented_timestep_sampling": False,
    "scheduled_sampling_max_step_offset": 3,
    "scheduled_sampling_ramp_steps": 3,
    "scheduled_sampling_prob_end": 1.0,
}


def train(spec: TrainSpec, stop: StopSignal | None = None) -> TrainedLora:
    return main(spec, RecordingReporter(), stop or StopSignal())


def batches_of(spec: TrainSpec) -> TrainingBatches:
    samples = load_samples(spec.datasets, "train")
    (dataset,) = spec.datasets
    settings = spec.settings
    return TrainingBatches(
        BucketBatchSampler(samples, {dataset.dataset_id: 1.0}, settings.seed, settings.train_batch_size, 1),
        BatchReader(spec.datasets),
        latent_scaling_factor(spec.base_model),
        build_forward_process(settings, settings, 1000, settings.gradient_accumulation_steps),
    )


def test_train_scheduled_sampling_with_zero_offset_equals_plain_training(tmp_path: Path, monkeypatch):
    settings = {"max_train_steps": 2, "lora_dropout": 0.2, "snr_gamma": 5.0}
    spec = make_spec(tmp_path, run="plain", **settings)
    plain = train(spec)
    rollouts = {"scheduled_sampling_max_step_offset": 4, "scheduled_sampling_probability": 1.0}
    rolled = train(with_settings(spec, "rolled", **rollouts))
    assert losses(rolled) != losses(plain)

    monkeypatch.setattr(RolloutSampler, "_offset", lambda *_: 0)
    zero_offset = train(with_settings(spec, "zero_offset", **rollouts))
    assert losses(zero_offset) == losses(plain)
    ones, others = load_file(plain.weights_path), load_file(zero_offset.weights_path)
    assert all(torch.equal(tensor, others[name]) for name, tensor in ones.items())


def test_train_all_objectives_stopped_and_resumed_equals_unbroken_run(tmp_path: Path):
    settings = {"max_train_steps": 5, "train_batch_size": 2, "gradient_accumulation_steps": 2}
    spec = make_spec(tmp_path, run="unbroken", lora_dropout=0.2, **settings, **ALL_OBJECTIVES)
    batches = [batches_of(spec).read(index) for index in range(10)]
    assert any(batch.rollouts for batch in batches)
    assert [batch.perturbed_noise is not None for batch in batches] == [True] * 8 + [False] * 2

    unbroken = train(spec)
    stop = StopSignal()
    with pytest.raises(StageStopped):
        main(with_settings(spec, "stopped"), StoppingReporter(stop, 2), stop)
    resumed = train(with_settings(spec, "stopped"))
    assert resumed.resumed_from_step == 2
    assert losses(resumed) == losses(unbroken)
    assert Path(resumed.weights_path).read_bytes() == Path(unbroken.weights_path).read_bytes()


@pytest.mark.slow
def test_train_all_objectives_two_processes_equal_one(tmp_path: Path):
    settings = {"max_train_steps": 3, "train_batch_size": 2}
    spec = make_spec(tmp_path, run="one", **settings, **ALL_OBJECTIVES)
    one = train(spec)
    two_spec = with_settings(spec, "two", train_batch_size=1)
    two_spec = two_spec.model_copy(
        update={"hardware": two_spec.hardware.model_copy(update={"num_processes": 2})}
    )
    two = run(two_spec, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert [loss for _, loss in losses(two)] == pytest.approx([loss for _, loss in losses(one)], rel=1e-5)
    ones, twos = load_file(one.weights_path), load_file(two.weights_path)
    for name, tensor in ones.items():
        torch.testing.assert_close(twos[name], tensor, rtol=0, atol=1e-5)


def test_train_zero_terminal_snr_with_epsilon_prediction_raises(tmp_path: Path):
    with pytest.raises(UserError, match="v_prediction"):
        train(make_spec(tmp_path, max_train_steps=1, rescale_betas_zero_snr=True))
