"""Training with masks and regularisation images: white masks equal no masks, resume is bit-exact, and two processes equal one."""

from hashlib import sha256
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdxl_pipeline.runtime.specs import TrainedLora, TrainSpec
from sdxl_pipeline.runtime.stage_runner import StageStopped, StopSignal
from sdxl_pipeline.stages.train import main
from tests.support.encoded_datasets import SilentReporter
from tests.support.train_programs import (
    TWO_PROCESSES,
    StoppingReporter,
    losses,
    on_two_processes,
    run,
    with_settings,
)
from tests.support.training_datasets import SQUARE, WIDE, make_dataset, make_spec
from tests.training.data.test_loss_masks import masked_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4
SETTINGS = {
    "max_train_steps": STEPS,
    "train_batch_size": 2,
    "lr_warmup_steps": 0,
    "masked_loss_probability": 0.8,
    "prior_loss_weight": 0.5,
    "lora_dropout": 0.2,
}


def spec_of(folder: Path, run: str = "run") -> TrainSpec:
    """Return a run over four masked images and three regularisation images in the same buckets."""
    folder.mkdir(parents=True, exist_ok=True)
    buckets = [SQUARE, SQUARE, WIDE, WIDE]
    subject = masked_dataset(make_dataset(folder / "subject", "subject", buckets), folder / "masks")
    people = make_dataset(folder / "people", "people", buckets[:3])
    people = people.model_copy(update={"is_regularisation": True})
    return make_spec(folder, subject, people, run=run, **SETTINGS)


def train(spec: TrainSpec) -> TrainedLora:
    return main(spec, SilentReporter(), StopSignal())


def weights(manifest: TrainedLora) -> dict[str, torch.Tensor]:
    return load_file(manifest.weights_path)


def test_train_masked_stopped_and_resumed_has_same_weights(tmp_path):
    unbroken = train(spec_of(tmp_path))
    stop = StopSignal()

    stopped = spec_of(tmp_path, run="stopped")
    with pytest.raises(StageStopped):
        main(stopped, StoppingReporter(stop, 2), stop)
    resumed = train(stopped)
    assert resumed.resumed_from_step == 2
    assert resumed.weights_sha256 == unbroken.weights_sha256


def test_train_white_masks_equal_no_masks(tmp_path):
    dataset = make_dataset(tmp_path / "dataset", buckets=[SQUARE, SQUARE, WIDE])
    settings = {"max_train_steps": 2, "lr_warmup_steps": 0}
    plain = train(make_spec(tmp_path, dataset, run="plain", **settings))
    masked = masked_dataset(dataset, tmp_path / "masks")
    white = _white(tmp_path / "white.png")
    pairs = pd.read_parquet(masked.masks.pairs_path)
    pairs[["mask_path", "mask_key"]] = [white.name, _digest(white)]
    pairs.to_parquet(tmp_path / "pairs.parquet")
    update = {"data_dir": str(tmp_path), "pairs_path": str(tmp_path / "pairs.parquet")}
    masked = masked.model_copy(update={"masks": masked.masks.model_copy(update=update)})
    white_masks = train(make_spec(tmp_path, masked, run="white", **settings))
    assert white_masks.identity != plain.identity
    assert all(torch.equal(tensor, weights(white_masks)[name]) for name, tensor in weights(plain).items())


@pytest.mark.slow
def test_train_masked_two_processes_equal_one_with_double_batch(tmp_path):
    # Adam would amplify rounding in gradients close to 0, such as those of prior preservation in the first steps
    deterministic = {"lora_dropout": 0.0, "optimizer_config": {"eps": 1e-6}}
    spec = with_settings(spec_of(tmp_path), "one", **deterministic)
    one = train(spec)
    two = run(on_two_processes(with_settings(spec, "two", train_batch_size=1)), *TWO_PROCESSES)
    assert [loss for _, loss in losses(two)] == pytest.approx(
        [loss for _, loss in losses(one)], rel=1e-5, abs=1e-8
    )
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=0, atol=1e-5)


def _white(path: Path) -> Path:
    Image.new("L", (50, 50), 255).save(path)
    return path


def _digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()
