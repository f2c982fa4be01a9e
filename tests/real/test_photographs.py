"""The complete asset graph on real photographs: those in scikit-image's wheel, and kinds of files that users have."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from skimage import data as photographs

from sdxl_pipeline.definitions import build_definitions
from sdxl_pipeline.models.base_model import BUNDLED_MODEL
from tests.support.asset_graph import InProcessStageClient

pytestmark = pytest.mark.real

SAMPLE_IMAGES = Path(photographs.__file__).parent
CAPTIONS = {
    "astronaut.png": "a portrait of an astronaut in an orange suit before a flag",
    "camera.png": "a black and white photo of a man behind a camera on a tripod",
    "chelsea.png": "a close photo of a tabby cat looking to the side",
    "coffee.png": "a cup of coffee on a saucer with a spoon, on a wooden table",
    "hubble_deep_field.jpg": "many small galaxies on a black sky",
    "motorcycle_left.png": "a motorcycle in a workshop",
    "retina.jpg": "the retina of an eye with its blood vessels",
    "rocket.jpg": "a rocket on its launch pad at night, lit by floodlights",
}


def write_dataset(folder: Path) -> None:
    """Write photographs of several aspect ratios, and files that are rotated, transparent, CMYK, truncated, empty or not images."""
    folder.mkdir(parents=True)
    for name, caption in CAPTIONS.items():
        shutil.copy(SAMPLE_IMAGES / name, folder / name)
        (folder / name).with_suffix(".txt").write_text(caption)
    upright = Image.open(folder / "coffee.png").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated camera: stored in landscape, displayed in portrait
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "rotated.jpg", exif=exif)
    transparent = upright.convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
    transparent.save(folder / "transparent.png")
    # The images of the wheel are square or landscape.
    Image.open(SAMPLE_IMAGES / "astronaut.png").crop((80, 0, 400, 512)).save(folder / "portrait.jpg")
    upright.convert("CMYK").save(folder / "print.jpg")
    encoded = io.BytesIO()
    upright.save(encoded, "JPEG")
    (folder / "truncated.jpg").write_bytes(encoded.getvalue()[: len(encoded.getvalue()) // 2])
    (folder / "not_an_image.jpg").write_text("This is a text file.")
    (folder / "empty.jpg").write_bytes(b"")
    for name in ("portrait", "rotated", "transparent", "print", "truncated", "not_an_image", "empty"):
        (folder / f"{name}.txt").write_text(f"a photo, {name}")


@pytest.mark.slow
def test_graph_trains_lora_on_photographs(
    tmp_path: Path, instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    folder = make_project(
        "photos",
        images=0,
        config={
            "max_train_steps": 20,
            "eval_holdout_share": 0.1,
            "validation_prompt": CAPTIONS["coffee.png"],
        },
        dataset={"resolution": 128, "crop_style": "center"},
    )
    write_dataset(folder / "data")
    definitions = build_definitions(folder.parent)
    result = dg.materialize(
        list(definitions.assets or []),
        resources={**(definitions.resources or {}), "launcher": InProcessStageClient()},
        instance=instance,
    )
    assert result.success

    scanned = result.output_for_node("photos__shapes_dataset", "result").set_index("path")
    images = scanned[[Path(path).suffix != ".txt" for path in scanned.index]]
    retained, dropped = images[images.status == "kept"], images[images.status == "dropped"]
    assert len(images) == len(CAPTIONS) + 7
    assert len(retained) + len(dropped) == len(images)
    assert set(dropped.index) == {"truncated.jpg", "not_an_image.jpg", "empty.jpg"}
    assert dropped.reason.nunique() == 3
    assert {"rotated.jpg", "transparent.png", "print.jpg"} <= set(retained.index)
    upright = retained.loc["coffee.png"]
    assert (retained.loc["rotated.jpg"].width, retained.loc["rotated.jpg"].height) == (
        upright.width,
        upright.height,
    )

    rows = result.output_for_node("photos__shapes_aspect_buckets", "result")
    assert len(rows[["bucket_h", "bucket_w"]].drop_duplicates()) >= 3
    latents = result.output_for_node("photos__shapes_vae_latents", "result")
    assert latents.planned == len(rows) == len(retained)
    assert latents.encoded == len(retained)

    lora = result.output_for_node("photos__lora", "result")
    assert lora.steps == 20
    lines = [json.loads(line) for line in Path(lora.metrics_path).read_text().splitlines()]
    assert lines[-1]["step"] == 20
    pipeline = StableDiffusionXLPipeline.from_pretrained(BUNDLED_MODEL, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    base_image = _generate(pipeline)
    release = result.output_for_node("photos__hub_release", "result").folder
    pipeline.load_lora_weights(release)
    lora_image = _generate(pipeline)
    assert np.abs(lora_image - base_image).mean() > 1e-3
    pipeline.unload_lora_weights()
    assert np.abs(_generate(pipeline) - base_image).max() < 1e-4


def _generate(pipeline: StableDiffusionXLPipeline) -> np.ndarray:
    """Return an image (1, 128, 128, 3) in [0, 1] from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    output = pipeline(
        CAPTIONS["coffee.png"],
        num_inference_steps=6,
        height=128,
        width=128,
        generator=generator,
        output_type="np",
    )
    return np.asarray(output.images)
