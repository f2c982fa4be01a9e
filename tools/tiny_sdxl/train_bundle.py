"""Training of the bundled tiny SDXL from scratch: `python -m tools.tiny_sdxl.train_bundle`.

About 80 minutes on two CPU cores. Parts, in order: tokenizer; VAE and then the tiny decoder beside CLIP with both
text encoders; UNet, in two processes; bundle (the shipped folders); card (held-out metrics). A part
whose record is in the work directory is not trained again; `--only PART` trains that part again.
"""

import argparse
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tools.tiny_sdxl.budget import Budget
from tools.tiny_sdxl.bundle import BUNDLE, assemble
from tools.tiny_sdxl.bundle_card import measure_bundle, write_model_card
from tools.tiny_sdxl.train_clip import train_clip
from tools.tiny_sdxl.train_taesd import train_taesd
from tools.tiny_sdxl.train_tokenizer import train_tokenizer
from tools.tiny_sdxl.train_unet import train_unet
from tools.tiny_sdxl.train_vae import train_vae

_LOGGER = logging.getLogger(__name__)
PARTS = ("tokenizer", "vae", "taesd", "clip", "unet", "bundle", "card")
# Seconds of wall time on two cores, and the largest number of steps.
_BUDGETS = {"vae": (1400, 6000), "taesd": (240, 3000), "clip": (1100, 6000), "unet": (3000, 8000)}
_UNET_PROCESSES = 2

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all missing parts, or the one given by `--only`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, help="train this part again, and no other")
    parser.add_argument("--work-dir", type=Path, default=Path("build/tiny-sdxl"), help="folder of the parts")
    parser.add_argument(
        "--bundle", type=Path, default=BUNDLE, help="folder in which model/, clip/ and taesd/ are written"
    )
    parser.add_argument("--pace", type=float, default=1.0, help="factor of the time limit of each training")
    options = parser.parse_args(arguments)
    _start_logging()
    parts: Path = options.work_dir
    parts.mkdir(parents=True, exist_ok=True)
    _set_up_children()
    if options.only:
        _make(options.only, parts, options.bundle, options.pace)
        return
    missing = [part for part in PARTS if not _record_file(parts, part).exists()]
    if "tokenizer" in missing:
        _make("tokenizer", parts, options.bundle, options.pace)
    groups: list[list[str]] = [
        [part for part in group if part in missing] for group in (("vae", "taesd"), ("clip",))
    ]
    _train_in_parallel([group for group in groups if group], parts, options.bundle, options.pace)
    for part in ("unet", "bundle", "card"):
        if part in missing:
            _make(part, parts, options.bundle, options.pace)


def _make(part: str, parts: Path, bundle: Path, pace: float) -> None:
    """Train one part and write its record: steps, seconds and metrics."""
    torch.set_num_threads(1)
    makers: dict[str, Callable[[], Record]] = {
        "tokenizer": lambda: _without_record(train_tokenizer, parts),
        "vae": lambda: dict(train_vae(parts / "vae", _budget("vae", pace))),
        "taesd": lambda: dict(train_taesd(parts, _budget("taesd", pace))),
        "clip": lambda: dict(train_clip(parts, _budget("clip", pace))),
        "unet": lambda: _train_unet_in_parallel(parts, pace),
        "bundle": lambda: _without_record(assemble, parts, bundle),
        "card": lambda: _make_card(parts, bundle),
    }
    record = makers[part]()
    _LOGGER.info(f"{part}: {record}")
    _record_file(parts, part).write_text(json.dumps(record) + "\n")


def _train_in_parallel(groups: list[list[str]], parts: Path, bundle: Path, pace: float) -> None:
    """Train the parts of each group in order, every group in a process of its own. Raise SystemExit if one fails."""
    spawn = multiprocessing.get_context("spawn")
    children = [spawn.Process(target=_make_all, args=(group, parts, bundle, pace)) for group in groups]
    for child in children:
        child.start()
    for child in children:
        child.join()
    failed = [group for group, child in zip(groups, children, strict=True) if child.exitcode]
    if failed:
        raise SystemExit(f"training failed in {failed}; run again to continue after the last complete part")


def _make_all(group: list[str], parts: Path, bundle: Path, pace: float) -> None:
    _start_logging()
    for part in group:
        _make(part, parts, bundle, pace)


def _train_unet_in_parallel(parts: Path, pace: float) -> Record:
    seconds, steps = _BUDGETS["unet"]
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29617")
    torch.multiprocessing.spawn(
        _unet_process, args=(parts, seconds * pace, steps), nprocs=_UNET_PROCESSES, join=True
    )
    record: Record = json.loads((parts / "unet-steps.json").read_text())
    return record


def _unet_process(rank: int, parts: Path, seconds: float, steps: int) -> None:
    _start_logging()
    torch.set_num_threads(1)
    done, spent = train_unet(parts, seconds, steps, rank, _UNET_PROCESSES)
    if rank == 0:
        (parts / "unet-steps.json").write_text(json.dumps({"steps": done, "seconds": round(spent)}))


def _set_up_children() -> None:
    """Set the environment of the child processes.

    One thread each, since there are as many processes as cores. glibc keeps freed memory: otherwise it returns
    large activations to the system at every step, and page faults take up to a fifth of the time.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(8 * 2**30))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(8 * 2**30))


def _start_logging() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")


def _make_card(parts: Path, bundle: Path) -> Record:
    metrics = measure_bundle(bundle)
    trainings = {
        part: json.loads(_record_file(parts, part).read_text())
        for part in _BUDGETS
        if _record_file(parts, part).exists()
    }
    write_model_card(bundle, metrics, trainings)
    return dict(metrics)


def _without_record(function: Callable[..., None], *arguments: Path) -> Record:
    function(*arguments)
    return {}


def _budget(part: str, pace: float) -> Budget:
    seconds, steps = _BUDGETS[part]
    return Budget(seconds * pace, steps)


def _record_file(parts: Path, part: str) -> Path:
    return parts / f"{part}.json"


if __name__ == "__main__":
    main()
