"""The complete asset graph on SDXL-base's architecture with random weights, without a GPU and without a download.

    python benchmarks/real_architecture.py FOLDER [--resolution 512] [--steps 2]

Writes 7 GB of random bf16 weights into FOLDER (once), a project with a few photographs next to them, materializes every asset, and prints
the time and the peak memory of each stage. Needs about 16 GB of memory. The generated images are noise; the run tests the real
module names, sizes and file formats.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from skimage import data as photographs
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_pipeline.models.base_model import BUNDLED_MODEL, SDXL_BASE_CONFIGS

REPOSITORY = Path(__file__).resolve().parents[1]
STAGES = {
    "encode latents": "photos_vae_latents",
    "encode text": "photos_text_embeds",
    "train": "lora",
    "evaluate": "evaluation",
}


def write_model(folder: Path) -> None:
    """Write a diffusers folder with SDXL-base's configurations, random bf16 weights and the bundled model's tokenizers."""
    if (folder / "model_index.json").is_file():
        return
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        kind.from_config(kind.load_config(SDXL_BASE_CONFIGS / name)).save_pretrained(folder / name)
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        config = CLIPTextConfig.from_pretrained(SDXL_BASE_CONFIGS / name)
        kind(config).to(torch.bfloat16).save_pretrained(folder / name)
    torch.set_default_dtype(torch.float32)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(BUNDLED_MODEL / name, folder / name)
    shutil.copytree(SDXL_BASE_CONFIGS / "scheduler", folder / "scheduler")
    shutil.copy(SDXL_BASE_CONFIGS / "model_index.json", folder / "model_index.json")


def write_project(folder: Path, model: Path, resolution: int, steps: int) -> None:
    """Write a project with four photographs."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"):
        shutil.copy(Path(photographs.__file__).parent / name, data / name)
        (data / name).with_suffix(".txt").write_text(f"a photo of {Path(name).stem}")
    config = {
        "model_type": "lora",
        "model_family": "sdxl",
        "pretrained_model_name_or_path": str(model),
        "mixed_precision": "bf16",
        "vae_dtype": "bf16",
        "gradient_checkpointing": True,
        "train_batch_size": 1,
        "max_train_steps": steps,
        "learning_rate": 1e-4,
        "lora_rank": 16,
        "validation_prompt": "a photo of an astronaut",
        "validation_resolution": f"{resolution}x{resolution}",
        "validation_num_inference_steps": 1,
        "validation_step_interval": 1000,
        "evaluation_type": "none",
        "eval_timesteps": 1,
        "num_eval_images": 1,
        "eval_holdout_share": 0,
    }
    dataset = {
        "id": "photos",
        "type": "local",
        "instance_data_dir": "data",
        "caption_strategy": "textfile",
        "resolution": resolution,
        "resolution_type": "pixel_area",
        "crop": True,
        "crop_aspect": "square",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "multidatabackend.json").write_text(json.dumps([dataset], indent=1))


def main() -> None:
    """Write missing files, run the graph, print time and memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    arguments = parser.parse_args()
    root = arguments.folder.resolve()
    write_model(root / "model")
    project = root / "projects" / "real_architecture"
    write_project(project, root / "model", arguments.resolution, arguments.steps)

    environment = {
        **os.environ,
        "SDXL_PIPELINE_PROJECTS": str(project.parent),
        "SDXL_PIPELINE_STORAGE": str(root / "storage"),
        "SDXL_HARDWARE": "cpu",
    }
    command = [sys.executable, "-m", "dagster", "asset", "materialize", "-m", "sdxl_pipeline.definitions"]
    started = time.monotonic()
    # The evaluation's check may fail: a random model does not improve. The stages before it are measured.
    graph = subprocess.run([*command, "--select", "*"], env=environment, cwd=REPOSITORY, check=False)
    seconds = time.monotonic() - started

    values = root / "storage" / "values" / "real_architecture"
    print(
        f"\ncomplete graph: {seconds:.0f} s, exit code {graph.returncode}, {torch.get_num_threads()} thread(s)"
    )
    print(f"largest process: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9:.1f} GB")
    for stage, key in STAGES.items():
        path = values / f"{key}.json"
        if path.is_file():
            print(f"{stage}: {json.loads(path.read_text())['seconds']:.1f} s")
    lora = json.loads((values / "lora.json").read_text())
    print(
        f"train: {lora['steps_per_second']:.3f} steps/s, peak memory {lora['peak_memory_bytes'] / 1e9:.1f} GB"
    )
    with safe_open(lora["weights_path"], "pt") as weights:
        modules = {name.rpartition(".lora")[0] for name in weights.keys()}  # noqa: SIM118 - safe_open is no mapping
    kinds = Counter(name.rpartition(".attn")[2][2:] for name in modules)
    print(f"adapted modules: {len(modules)} {dict(kinds)}")


if __name__ == "__main__":
    main()
