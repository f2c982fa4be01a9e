"""Training steps of SDXL-base's architecture on a GPU: `python -m benchmarks.train --gpu [options]`.

Needs torch, diffusers, transformers, peft and accelerate, and this repository; no network. The cached loop is the arithmetic of this
project's step on a batch on the device, the effect of its caches and its prefetching; the trainer itself needs more
packages. It is compared with the loop of diffusers' example, which includes the VAE and both text encoders.

`--device cpu --tiny` tests that it runs.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0

from benchmarks.measurements import Measurement, as_json, show
from benchmarks.train_parts import sdxl_base
from benchmarks.train_parts.loops import BareLoop, ExampleLoop
from sdxl_pipeline.models.unet_execution import AttentionKernelError, compile_unet, use_attention_backend

KERNELS = ("_native_flash", "_native_efficient", "_native_cudnn", "xformers", "flash")
"""diffusers' names; the first three are PyTorch's, which selects one of them by default."""


class Bench:
    """One UNet on one device, and its measurements."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
        self.configs: Path = sdxl_base.TINY_CONFIGS if options.tiny else sdxl_base.CONFIGS
        self.unet: UNet2DConditionModel = sdxl_base.random_unet(self.configs, self.device, self.dtype)
        self.peak = sdxl_base.peak_flops(self.device)
        self.flops: dict[int, int] = {}
        self.measurements: list[Measurement] = []

    def cached_loop(self, batch_size: int, unet: UNet2DConditionModel | None = None) -> BareLoop:
        """Return the loop on a batch on the device of `unet`, by default this bench's UNet."""
        unet = self.unet if unet is None else unet
        dtype = unet.conv_in.weight.dtype
        batch = sdxl_base.random_batch(unet, batch_size, self.options.resolution, unet.device, dtype)
        alphas_cumprod = sdxl_base.scheduler(self.configs).alphas_cumprod
        return BareLoop(unet, sdxl_base.trained_parameters(unet), alphas_cumprod, [batch], dtype)

    def count_flops(self) -> None:
        """Count the FLOPs of an image at batch 1, on the meta device."""
        meta = torch.device("meta")
        unet = sdxl_base.random_unet(self.configs, meta, torch.float32)
        loop = self.cached_loop(1, unet)
        counted = sdxl_base.flops_per_step(loop, next(loop.batches))
        self.flops = {size: size * counted for size in self.options.batches}
        self.add("model FLOPs of an image", counted / 1e12, "TFLOP", "forward and backward")

    def variant(self, name: str, batch_size: int, note: str = "") -> None:
        """Measure the cached loop on the UNet in its current state. A failure is recorded, and the next variant runs."""
        self.free()
        label = f"{name}, batch {batch_size}"
        try:
            loop = self.cached_loop(batch_size)
            started = time.perf_counter()
            self.timed(loop.take, 1)
            first = time.perf_counter() - started
            seconds = [self.timed(loop.take, self.options.steps) for _ in range(self.options.rounds)]
        except (RuntimeError, ValueError) as error:
            self.add_failure(label, error)
            return
        per_step = statistics.median(seconds) / self.options.steps
        self.add(label, 1 / per_step, "steps/s", note)
        self.add(label, batch_size / per_step, "images/s", f"first step after {first:.1f} s")
        if self.device.type == "cuda":
            self.add(label, torch.cuda.max_memory_allocated(self.device) / 1e9, "GB", "peak memory")
        if self.peak is not None:
            used = self.flops[batch_size] / per_step / self.peak
            self.add(label, used, "", f"model FLOPs utilisation of {self.peak / 1e12:.0f} TFLOP/s")

    def against_example(self, name: str, batch_size: int) -> None:
        """Measure the cached loop and the example's in alternation, on the same UNet."""
        self.free()
        label = f"{name}, cached loop, of the example's speed, batch {batch_size}"
        try:
            cached = self.cached_loop(batch_size)
            accelerator = Accelerator(
                cpu=self.device.type == "cpu",
                mixed_precision="no" if self.dtype == torch.float32 else "bf16",
            )
            models = sdxl_base.example_models(self.unet, self.configs, self.device, self.dtype)
            images = sdxl_base.random_images(batch_size, self.options.resolution)
            example = ExampleLoop(models, images, accelerator, self.dtype)
            self.timed(cached.take, 1)
            self.timed(example.take, 1)
            ratios = []
            for _ in range(self.options.rounds):
                seconds = self.timed(cached.take, self.options.steps)
                ratios.append(self.timed(example.take, self.options.steps) / seconds)
        except RuntimeError as error:
            self.add_failure(label, error)
            return
        finally:
            # remove accelerate's wrapper of the UNet's forward before the next variant
            self.unet.__dict__.pop("forward", None)
        self.add(label, statistics.median(ratios), "", "VAE in float32 and text encoders in the loop")

    def timed(self, take: Callable[[int], None], steps: int) -> float:
        """Return the seconds until the device has finished `steps` steps."""
        self.wait()
        started = time.perf_counter()
        take(steps)
        self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        """Wait until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Free the last variant's memory."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def add(self, name: str, value: float, unit: str, note: str = "") -> None:
        """Record a measurement and print it immediately, since a later variant may crash the process."""
        self.measurements.append(Measurement("gpu", name, value, unit, note=note))
        print(f"{name}: {value:.4g} {unit} {note}".rstrip(), flush=True)

    def add_failure(self, name: str, error: Exception) -> None:
        """Record why there is no measurement: out of memory, no kernel for this device or dtype, no compiler."""
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        reason = "out of memory" if out_of_memory else (str(error).splitlines() or [type(error).__name__])[0]
        self.add(name, float("nan"), "", reason[:100])


def measure(options: argparse.Namespace) -> list[Measurement]:
    """Measure every variant of the options."""
    bench = Bench(options)
    bench.count_flops()
    for checkpointing in (True, False):
        name = "checkpointing" if checkpointing else "no checkpointing"
        _switch(bench.unet.enable_gradient_checkpointing, bench.unet.disable_gradient_checkpointing, checkpointing)  # fmt: skip
        for size in options.batches:
            bench.variant(name, size)
        for size in options.batches:
            bench.against_example(name, size)
    if options.kernels:
        _measure_kernels(bench, options)
    # one graph per batch size: the dynamic graph that torch would compile for all of them is slower
    compile_unet(bench.unet, options.compiler, regional=True, dynamic=False)
    for size in options.batches if options.compiler != "no" else ():
        bench.variant(f"compiled blocks ({options.compiler}), no checkpointing", size)
    return bench.measurements


def _measure_kernels(bench: Bench, options: argparse.Namespace) -> None:
    size = options.batches[min(1, len(options.batches) - 1)]
    for kernel in options.kernels:
        try:
            use_attention_backend(bench.unet, kernel)
        except AttentionKernelError as error:
            bench.add_failure(f"attention {kernel}", error)
            continue
        bench.variant(f"attention {kernel}", size, "no checkpointing")
    bench.unet.set_attn_processor(AttnProcessor2_0())


def _switch(on: Callable[[], None], off: Callable[[], None], enabled: bool) -> None:
    (on if enabled else off)()


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train --gpu", description=__doc__.splitlines()[0]
    )
    add = partial(parser.add_argument, metavar="")
    add("--device", default="cuda", help="cuda (default) or cpu")
    parser.add_argument("--tiny", action="store_true", help="the bundled model's architecture")
    add("--batches", type=int, nargs="+", default=[1, 4, 8], help="images per step (default 1 4 8)")
    add("--resolution", type=int, default=1024, help="pixels (default 1024)")
    add("--rounds", type=int, default=5, help="timed rounds of a variant (default 5)")
    add("--steps", type=int, default=5, help="steps in a round (default 5)")
    add("--kernels", nargs="*", default=list(KERNELS), help="diffusers' attention backends")
    add("--compiler", default="inductor", help="inductor (default), eager or no")
    add("--json", type=Path, help="also write the measurements to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Measure and print."""
    options = _parsed(arguments)
    torch.manual_seed(0)
    measurements = measure(options)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {options.resolution} px")
    show(measurements)
    if options.json:
        options.json.write_text(as_json(measurements) + "\n")
