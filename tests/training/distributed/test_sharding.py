"""A UNet sharded over two processes trains, generates images, saves and resumes like a full one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.validators.settings_rules import check_training
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import TrainedLora, TrainSpec
from sdxl_pipeline.runtime.stage_runner import StopSignal, UserError
from sdxl_pipeline.stages import train
from sdxl_pipeline.training.logging.run_logs import read_metrics
from tests.support.training_datasets import make_dataset, make_spec

STEPS = 4

SETTINGS = {
    "model_type": "full",
    "lora_rank": 16,
    "learning_rate": 1e-4,
    "optimizer_config": "eps=1e-5",  # keeps the rounding errors of near-zero gradients from being amplified to full steps
    "max_train_steps": STEPS,
    "lr_warmup_steps": 0,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "checkpoint_step_interval": 2,
    "validation_disable": False,
    "validation_step_interval": STEPS,
}


def spec_of(folder: Path, run: str, processes: int, **settings: object) -> TrainSpec:
    dataset = make_dataset(folder / "dataset")
    values = {**SETTINGS, "train_batch_size": 2 // processes, **settings}
    return make_spec(folder, dataset, num_processes=processes, run=run, **values)


def run_on_two_processes(spec: TrainSpec) -> TrainedLora:
    path = Path(spec.run_dir).with_suffix(".json")
    path.write_text(spec.model_dump_json())
    manifest = path.with_suffix(".manifest.json")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = ["-m", "sdxl_pipeline.stages.train", str(path), "--manifest", str(manifest)]
    done = subprocess.run(
        [sys.executable, *torchrun, *program],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return TrainedLora.model_validate_json(manifest.read_bytes())


def weights(manifest: TrainedLora) -> dict[str, torch.Tensor]:
    (shard,) = Path(manifest.weights_path).glob("*.safetensors")
    return load_file(shard)


@pytest.mark.slow
def test_sharded_training_on_two_processes_equals_full_training_on_one(tmp_path):
    one = train.main(spec_of(tmp_path, "one", 1), Reporter(), StopSignal())
    sharded_spec = spec_of(tmp_path, "sharded", 2, fsdp_enable=True)
    sharded = run_on_two_processes(sharded_spec)
    losses = [[row.loss for row in read_metrics(Path(manifest.metrics_path))] for manifest in (one, sharded)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    full_weights, sharded_weights = weights(one), weights(sharded)
    assert full_weights.keys() == sharded_weights.keys()
    for name, tensor in full_weights.items():
        torch.testing.assert_close(sharded_weights[name], tensor, rtol=0, atol=1e-5)
    assert sharded.trainable_parameters == one.trainable_parameters
    assert [image.step for image in sharded.validation_images] == [0, STEPS]

    # simulates a run killed after its first checkpoint
    broken = spec_of(tmp_path, "broken", 2, fsdp_enable=True)
    shutil.copytree(sharded.run_dir, broken.run_dir)
    for path in ("finished.json", "checkpoints/step-00000004", "unet"):
        file = Path(broken.run_dir) / path
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    resumed = run_on_two_processes(broken)
    assert resumed.resumed_from_step == 2
    assert resumed.weights_sha256 == sharded.weights_sha256

    # checkpoints contain full weights: a training without sharding resumes from one
    plain = spec_of(tmp_path, "plain", 2)
    shutil.copytree(broken.run_dir, plain.run_dir)
    for path in ("finished.json", "checkpoints/step-00000004", "unet"):
        file = Path(plain.run_dir) / path
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    full = run_on_two_processes(plain)
    assert full.resumed_from_step == 2
    for name, tensor in weights(full).items():
        torch.testing.assert_close(sharded_weights[name], tensor, rtol=0, atol=1e-5)
    state = json.loads((Path(sharded.run_dir) / "checkpoints/step-00000004/state.json").read_text())
    assert state["parameters"] == "unet"


def test_sharded_training_on_one_process_raises(tmp_path):
    with pytest.raises(UserError, match="there is one"):
        train.main(spec_of(tmp_path, "one", 1, fsdp_enable=True), Reporter(), StopSignal())


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"model_type": "lora"}, "fsdp_enable"),
        ({"optimizer": "optimi-lion"}, "optimizer"),
        ({"mixed_precision": "fp16"}, "mixed_precision"),
        ({"layer_freeze_strategy": "bitfit"}, "layer_freeze_strategy"),
        ({"use_ema": True}, "use_ema"),
        ({"dynamo_backend": "inductor"}, "dynamo_backend"),
        ({"scheduled_sampling_max_step_offset": 5}, "scheduled_sampling_max_step_offset"),
    ],
)
def test_check_training_settings_incompatible_with_sharding_are_reported(settings, key):
    plain = {"model_type": "full", "fsdp_enable": "true", "fsdp_version": "2"}
    assert not list(check_training(TrainingSettings.model_validate(plain)))
    found = check_training(TrainingSettings.model_validate(plain | settings))
    assert key in {finding.key for finding in found}
