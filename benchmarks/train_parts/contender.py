"""One of the compared loops as a process: `python -m benchmarks.train_parts.contender trainer|bare|example SPEC`; see `interleaved`."""

import sys
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.train_parts.interleaved import Stopwatch, allowances, report_peak, serve
from benchmarks.train_parts.loops import BareLoop, ExampleLoop, ExampleModels, Tensors
from sdxl_pipeline.models.components import load_noise_scheduler, load_text_encoders, load_vae
from sdxl_pipeline.runtime.reporter import PlainReporter
from sdxl_pipeline.runtime.specs import TrainSpec
from sdxl_pipeline.runtime.stage_runner import StopSignal
from sdxl_pipeline.training.checkpoint.run_identity import run_identity
from sdxl_pipeline.training.trainer import Trainer

BATCHES_IN_MEMORY = 16


class Gate(PlainReporter):
    """A reporter that pauses the training after each allowance of steps."""

    def __init__(self) -> None:
        super().__init__()
        self._allowances = allowances()
        self._allowed, self._watch = 0, Stopwatch()

    def progress(self, task: str, done: int, total: int, unit: str = "") -> None:
        """Report progress; wait for the next allowance when the current one is used up."""
        super().progress(task, done, total, unit)
        if task != "train" or done != self._allowed:
            return
        if done:
            self._watch.report()
        more = next(self._allowances, None)
        if more is None:
            raise _NoMoreSteps
        self._allowed += more
        self._watch = Stopwatch()


class _NoMoreSteps(Exception):  # noqa: N818  # not an error
    """There are no more allowances."""


def serve_trainer(spec: TrainSpec) -> None:
    """Run the Trainer's own `train`, with batches from the caches, reports, metrics.jsonl and stop signals."""
    Path(spec.run_dir).mkdir(parents=True, exist_ok=True)
    trainer = Trainer(spec, run_identity(spec), Gate(), StopSignal())
    try:
        trainer.train()
    except _NoMoreSteps:
        report_peak()


def bare_loop(spec: TrainSpec) -> BareLoop:
    """Return the bare loop on the Trainer's UNet and first batches."""
    trainer = Trainer(spec, run_identity(spec), PlainReporter(sys.stderr), StopSignal())
    batches = [trainer.batches.read(index) for index in range(BATCHES_IN_MEMORY)]
    scheduler = load_noise_scheduler(spec.base_model)
    return BareLoop(
        trainer.unet_module,
        list(trainer.parameters.values()),
        scheduler.alphas_cumprod,
        [Tensors(**{name: getattr(batch, name) for name in Tensors._fields}) for batch in batches],
        torch.float32,
    )


def example_loop(spec: TrainSpec) -> ExampleLoop:
    """Return the example's loop on the Trainer's images."""
    trainer = Trainer(spec, run_identity(spec), PlainReporter(sys.stderr), StopSignal())
    encoders = load_text_encoders(spec.base_model, torch.float32)
    models = ExampleModels(
        unet=trainer.unet_module,
        vae=load_vae(spec.base_model, torch.float32),
        tokenizers=(encoders.tokenizer, encoders.tokenizer_2),
        text_encoders=(encoders.text_encoder, encoders.text_encoder_2),
        scheduler=load_noise_scheduler(spec.base_model),
    )
    loader = _images(Path(spec.datasets[0].data_dir), spec.settings.train_batch_size, _bucket(trainer))
    return ExampleLoop(models, loader, Accelerator(cpu=True), torch.float32)


def _bucket(trainer: Trainer) -> int:
    return 8 * trainer.batches.read(0).latents.shape[-1]


def _images(folder: Path, batch_size: int, size: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Yield (pixels (B, 3, H, W), captions), read from the files each time, as the example's dataset does."""
    loader = DataLoader(
        [(path, size) for path in sorted(folder.glob("*.jpg"))],
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=_read,
    )
    for _ in cycle([None]):
        yield from loader


def _read(items: list[tuple[Path, int]]) -> tuple[Tensor, list[str]]:
    pixels, captions = [], []
    for path, size in items:
        image = Image.open(path).convert("RGB")
        scale = size / min(image.size)
        resized = image.resize((round(image.width * scale), round(image.height * scale)))
        left, top = (resized.width - size) // 2, (resized.height - size) // 2
        crop = np.asarray(resized.crop((left, top, left + size, top + size)), np.float32)
        pixels.append(torch.from_numpy(crop).permute(2, 0, 1) / 127.5 - 1)
        captions.append(path.with_suffix(".txt").read_text())
    return torch.stack(pixels).contiguous(), captions


def main(name: str, spec_path: str) -> NoReturn:
    """Take steps on request until stdin ends."""
    torch.set_num_threads(1)
    spec = TrainSpec.model_validate_json(Path(spec_path).read_text())
    spec = spec.model_copy(update={"run_dir": f"{spec.run_dir}-{name}"})
    if name == "trainer":
        serve_trainer(spec)
    else:
        serve({"bare": bare_loop, "example": example_loop}[name](spec).take)
    sys.exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
