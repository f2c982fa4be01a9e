"""Encoding captions through the stage, against the encoders alone on tokens in memory, in batches and one by one."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from benchmarks.measurements import Measurement, Options
from sdxl_pipeline.config.hardware_profiles import PRESETS
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.models.base_model import BUNDLED_NAME, resolve_base_model
from sdxl_pipeline.runtime.specs import EncodeTextSpec

REPOSITORY = Path(__file__).resolve().parents[2]
REFERENCE_CAPTIONS_PER_SECOND = 106.0
REFERENCE_SINGLE, REFERENCE_BATCHED = 513.0, 1131.0
BATCH = 32
RATIO = 0.9
CAPTIONS = 2048
SINGLE_CAPTIONS = 256
WORDS = (
    "a large small red green blue circle star on beside under wooden table in soft morning light with clouds"
)


def measure(options: Options) -> list[Measurement]:
    """Return captions/s of the stage, its ratio to a bare loop over the encoders with the same batches, and single captions.

    Each repeat is a process of its own, which encodes all captions into a new store and then runs the bare loops.
    """
    root = Path(options.workdir) / "text"
    root.mkdir(parents=True, exist_ok=True)
    count = 64 if options.quick else CAPTIONS
    spec = _spec(root, count)
    runs = [_in_a_process(spec, root / f"store-{number}") for number in range(options.repeats)]
    stage, batched, single = (
        statistics.median(run[name] for run in runs) for name in ("stage", "batched", "single")
    )
    ratio = statistics.median(run["stage"] / run["batched"] for run in runs)
    part, note = "text", f"{count} different captions, one thread, median of {options.repeats}"
    return [
        Measurement(
            part, "captions embedded", stage, "/s",
            f"above {REFERENCE_CAPTIONS_PER_SECOND:g}", stage > REFERENCE_CAPTIONS_PER_SECOND, note,
        ),
        Measurement(
            part, f"encoders alone, batches of {BATCH}", batched, "/s",
            note=f"tokens in memory; the reference's bare loop: {REFERENCE_BATCHED:g}",
        ),
        Measurement(
            part, "encoders alone, single captions", single, "/s",
            note=f"the reference's bare loop: {REFERENCE_SINGLE:g}",
        ),
        Measurement(part, "embedding / encoders alone", ratio, "", f"at least {RATIO}", ratio >= RATIO),
    ]  # fmt: skip


def _spec(root: Path, count: int) -> Path:
    """Write a spec of the stage for so many different captions, and return its path."""
    words = WORDS.split()
    captions = [
        (f"{n}.jpg", f"{n:08x}", " ".join(words[(n * step) % len(words)] for step in range(1, 21)) + f" {n}")
        for n in range(count)
    ]
    table = root / "captions.parquet"
    pd.DataFrame(captions, columns=["path", "key", "caption"]).to_parquet(table)
    spec = EncodeTextSpec(
        base_model=resolve_base_model(TrainingSettings(pretrained_model_name_or_path=BUNDLED_NAME), root),
        hardware=PRESETS["cpu"].model_copy(update={"text_encoder_batch_size": BATCH, "cpu_threads": 1}),
        captions_path=str(table),
        extra_prompts=(),
        store_root="",
        entries_path="",
        prompts_path="",
    )
    path = root / "spec.json"
    path.write_text(spec.model_dump_json())
    return path


def _in_a_process(spec: Path, store: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.data_parts.text", str(spec), str(store)],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _embed(spec_path: Path, root: Path) -> dict[str, float]:
    import torch

    from sdxl_pipeline.runtime.reporter import Reporter
    from sdxl_pipeline.runtime.stage_runner import StopSignal
    from sdxl_pipeline.stages.encode_text import main

    torch.set_num_threads(1)
    spec = EncodeTextSpec.model_validate_json(spec_path.read_text()).model_copy(
        update={
            "store_root": str(root),
            "entries_path": str(root / "entries.parquet"),
            "prompts_path": str(root / "prompts.parquet"),
        }
    )
    cache = main(spec, Reporter(), StopSignal())
    assert cache is not None
    assert cache.captions_per_second is not None
    captions = pd.read_parquet(spec.captions_path)["caption"].tolist()
    return {
        "stage": cache.captions_per_second,
        "batched": _bare(spec, captions, BATCH),
        "single": _bare(spec, captions[:SINGLE_CAPTIONS], 1),
    }


def _bare(spec: EncodeTextSpec, captions: list[str], batch_size: int) -> float:
    """Return captions/s of both encoders, on tokens made in advance: nothing is tokenized, copied or stored meanwhile."""
    from sdxl_pipeline.cache.encode.encoders import load_encoders
    from sdxl_pipeline.models.conditioning import PromptTokenizer, encode_tokens

    encoders = load_encoders(spec.base_model, spec.hardware)
    reader = PromptTokenizer(encoders)
    batches = [
        reader.to_windows(reader.read(captions[start : start + batch_size]))
        for start in range(0, len(captions), batch_size)
    ]
    started = time.perf_counter()
    for ids in batches:
        encode_tokens(encoders, *ids)
    return len(captions) / (time.perf_counter() - started)


if __name__ == "__main__":
    print(json.dumps(_embed(Path(sys.argv[1]), Path(sys.argv[2]))))
