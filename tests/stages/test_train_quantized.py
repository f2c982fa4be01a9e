"""Holds that weights in few bits, state in few bits and averaged weights train on two processes, to the adapter that one comes near."""

import pytest
import torch
from safetensors.torch import load_file

from tests.lanes import make_lane, make_spec
from tests.train_programs import run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("precision", "optimizer", "package"),
    [
        ("int8-torchao", "ao-adamw8bit", "torchao"),
        ("nf4-bnb", "bnb-adamw8bit", "bitsandbytes"),
    ],
)
def test_two_processes_train_what_one_does(precision, optimizer, package, tmp_path):
    pytest.importorskip(package, reason="needs the extras `quantization` and `optimizers`")
    lane = make_lane(tmp_path / "lane", captions=1)
    asked = {
        "max_train_steps": 3,
        "base_model_precision": precision,
        "optimizer": optimizer,
        "use_ema": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_interval": 2,
    }
    one = run(make_spec(tmp_path, lane, run="one", train_batch_size=2, **asked))
    two = run(
        make_spec(tmp_path, lane, run="two", train_batch_size=1, num_processes=2, **asked),
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
    )
    alone, together = load_file(one.weights_path), load_file(two.weights_path)
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, atol=2e-4, rtol=0)
