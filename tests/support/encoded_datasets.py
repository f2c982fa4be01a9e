"""Datasets of real images, prepared by the scan, plan and encode stages with any cache mode."""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from sdxl_pipeline.config.hardware_profiles import PRESETS
from sdxl_pipeline.config.schema.datasets import CacheMode, ImageDataset
from sdxl_pipeline.data.buckets.crop_plan import plan_crops
from sdxl_pipeline.data.buckets.holdout import hold_out
from sdxl_pipeline.data.scan.dataset_scan import scan_dataset
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import EncodeLatentsSpec, EncodeTextSpec, TrainingDataset
from sdxl_pipeline.runtime.stage_runner import StopSignal
from sdxl_pipeline.stages import encode_latents, encode_text
from tests.support.training_datasets import NEGATIVE, PROMPT

HARDWARE = PRESETS["cpu"]


class SilentReporter(Reporter):
    """Discards log lines."""

    def _show_log(self, message: str) -> None:
        pass


def write_images(folder: Path, count: int = 6, size: tuple[int, int] = (128, 96)) -> None:
    """Write `count` different captioned images of `size` (width, height), every second one in portrait orientation."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(5)
    for number in range(count):
        width, height = size if number % 2 else size[::-1]
        image = Image.new("RGB", (width, height), tuple(random.integers(0, 255, 3).tolist()))
        x, y = random.integers(0, 60, 2).tolist()
        ImageDraw.Draw(image).ellipse((x, y, x + 30, y + 40), fill=tuple(random.integers(0, 255, 3).tolist()))
        image.save(folder / f"image_{number}.png")
        (folder / f"image_{number}.txt").write_text(f"a drawing, number {number}, of an ellipse\n")


def prepare_dataset(
    folder: Path,
    images: Path,
    model: ResolvedModel,
    *,
    latent_cache: CacheMode = "full",
    text_cache: CacheMode = "full",
    holdout: float = 0.0,
    windows: int = 1,
    repeats: int = 0,
    fresh_crops: bool = False,
    **settings: object,
) -> TrainingDataset:
    """Scan, plan and encode a dataset in `folder`, with the stores `folder`/latents and `folder`/texts."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset = ImageDataset.model_validate(
        {
            "id": "drawings",
            "type": "local",
            "instance_data_dir": str(images),
            "caption_strategy": "textfile",
            "resolution": 64,
            "resolution_type": "pixel_area",
            "aspect_bucket_alignment": 16,
            "crop": False,
        }
        | settings
    )
    scanned = scan_dataset(dataset, images)
    accepted = scanned[scanned["status"] == "kept"]
    held_out = hold_out(accepted, holdout, folder / "held_out.json")
    rows, _ = plan_crops(dataset, scanned, 42, held_out, is_eval=dataset.dataset_type == "eval")
    rows.to_parquet(folder / "rows.parquet")
    captions = (
        accepted[["path", "key", "captions"]].explode("captions").rename(columns={"captions": "caption"})
    )
    captions.astype("str").to_parquet(folder / "captions.parquet")
    latents = encode_latents.main(
        EncodeLatentsSpec(
            base_model=model,
            hardware=HARDWARE,
            data_dir=str(images),
            rows_path=str(folder / "rows.parquet"),
            store_root=str(folder / "latents"),
            entries_path=str(folder / "latents.parquet"),
            sample_path=str(folder / "sample.png"),
            mode=latent_cache,
        ),
        SilentReporter(),
        StopSignal(),
    )
    texts = encode_text.main(
        EncodeTextSpec(
            base_model=model,
            hardware=HARDWARE,
            captions_path=str(folder / "captions.parquet"),
            extra_prompts=(PROMPT, NEGATIVE),
            store_root=str(folder / "texts"),
            entries_path=str(folder / "texts.parquet"),
            prompts_path=str(folder / "prompts.parquet"),
            windows=windows,
            mode=text_cache,
        ),
        SilentReporter(),
        StopSignal(),
    )
    assert latents is not None
    assert texts is not None
    return TrainingDataset(
        dataset_id=dataset.id,
        data_dir=str(images),
        rows_path=str(folder / "rows.parquet"),
        latents=latents,
        text_embeds=texts,
        repeats=repeats,
        latent_cache=latent_cache,
        text_cache=text_cache,
        fresh_crops=fresh_crops,
    )


def list_files(root: Path) -> dict[str, tuple[int, int]]:
    """Return every file under `root` with its size and modification time."""
    files = [path for path in root.rglob("*") if path.is_file()] if root.exists() else []
    return {str(path.relative_to(root)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def read_crop_plan(dataset: TrainingDataset) -> pd.DataFrame:
    """Read the dataset's crop plan."""
    return pd.read_parquet(dataset.rows_path)
