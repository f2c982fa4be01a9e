"""Training on quantized weights: validation runs on them, and two processes equal one."""

import itertools
import math

import pytest
import torch
from safetensors.torch import load_file

from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.stage_runner import StopSignal
from sdxl_pipeline.stages.train import main
from tests.models.test_precision import BY_DEFAULT, EXPECTED, require
from tests.support.train_programs import run
from tests.support.training_datasets import make_dataset, make_spec

PRECISIONS = [
    pytest.param(name, mixed, marks=() if name in BY_DEFAULT and mixed == "bf16" else pytest.mark.slow)
    for name, mixed in itertools.product(EXPECTED, ("no", "bf16"))
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"), splits=["train"] * 4 + ["eval"])


@pytest.mark.usefixtures("one_thread", "fresh_accelerator")
@pytest.mark.parametrize(("precision", "mixed_precision"), PRECISIONS)
def test_train_quantized_runs_validation_between_steps(precision, mixed_precision, dataset, tmp_path):
    require(precision)
    spec = make_spec(
        tmp_path,
        dataset,
        base_model_precision=precision,
        mixed_precision=mixed_precision,
        max_train_steps=2,
        validation_disable=False,
        validation_step_interval=1,
        eval_steps_interval=1,
        num_eval_images=1,
        eval_timesteps=2,
    )
    manifest = main(spec, Reporter(), StopSignal())
    assert [image.step for image in manifest.validation_images] == [0, 1, 2]
    assert [step for step, _ in manifest.eval_losses] == [0, 1, 2]
    assert all(math.isfinite(loss) for _, loss in manifest.eval_losses)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "optimizer", "package"),
    [
        ("int8-torchao", "ao-adamw8bit", "torchao"),
        ("nf4-bnb", "bnb-adamw8bit", "bitsandbytes"),
    ],
)
def test_train_quantized_two_processes_equal_one(precision, optimizer, package, tmp_path):
    pytest.importorskip(package, reason="needs the extras `quantization` and `optimizers`")
    dataset = make_dataset(tmp_path / "dataset", captions=1)
    settings = {
        "max_train_steps": 3,
        "base_model_precision": precision,
        "optimizer": optimizer,
        "use_ema": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_interval": 2,
    }
    one = run(make_spec(tmp_path, dataset, run="one", train_batch_size=2, **settings))
    two = run(
        make_spec(tmp_path, dataset, run="two", train_batch_size=1, num_processes=2, **settings),
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
    )
    actual_one, actual_two = load_file(one.weights_path), load_file(two.weights_path)
    assert actual_one.keys() == actual_two.keys()
    for name, tensor in actual_one.items():
        torch.testing.assert_close(actual_two[name], tensor, atol=2e-4, rtol=0)
