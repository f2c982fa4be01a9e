"""Holds: a UNet divided between two processes trains, draws, is saved and goes on as an undivided one."""

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
from sdxl_pipeline.training.logging.metrics_log import read_metrics
from tests.support.training_datasets import make_dataset, make_spec

STEPS = 4

SETTINGS = {
    "model_type": "full",
    "lora_rank": 16,
    "learning_rate": 1e-4,
    "optimizer_config": "eps=1e-5",  # so that gradients of almost nothing are not blown up to steps by their last bits
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


def run_two(spec: TrainSpec) -> TrainedLora:
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
def test_two_processes_with_half_a_unet_each_train_as_one_with_a_whole(tmp_path):
    one = train.main(spec_of(tmp_path, "one", 1), Reporter(), StopSignal())
    divided_spec = spec_of(tmp_path, "divided", 2, fsdp_enable=True)
    divided = run_two(divided_spec)
    losses = [[row.loss for row in read_metrics(Path(made.metrics_path))] for made in (one, divided)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    ones, parts = weights(one), weights(divided)
    assert ones.keys() == parts.keys()
    for name, tensor in ones.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-5)
    assert divided.trainable_parameters == one.trainable_parameters
    assert [image.step for image in divided.validation_images] == [0, STEPS]

    # as if it had been killed after its first checkpoint
    broken = spec_of(tmp_path, "broken", 2, fsdp_enable=True)
    shutil.copytree(divided.run_dir, broken.run_dir)
    for lost in ("finished.json", "checkpoints/step-00000004", "unet"):
        path = Path(broken.run_dir) / lost
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = run_two(broken)
    assert resumed.resumed_from_step == 2
    assert resumed.weights_sha256 == divided.weights_sha256

    # a checkpoint is whole: an undivided training goes on from it
    plain = spec_of(tmp_path, "plain", 2)
    shutil.copytree(broken.run_dir, plain.run_dir)
    for lost in ("finished.json", "checkpoints/step-00000004", "unet"):
        path = Path(plain.run_dir) / lost
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    undivided = run_two(plain)
    assert undivided.resumed_from_step == 2
    for name, tensor in weights(undivided).items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-5)
    state = json.loads((Path(divided.run_dir) / "checkpoints/step-00000004/state.json").read_text())
    assert state["parameters"] == "unet"


def test_one_process_has_nothing_to_divide(tmp_path):
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
def test_what_cannot_be_divided_is_refused(settings, key):
    plain = {"model_type": "full", "fsdp_enable": "true", "fsdp_version": "2"}
    assert not list(check_training(TrainingSettings.model_validate(plain)))
    found = check_training(TrainingSettings.model_validate(plain | settings))
    assert key in {finding.key for finding in found}
