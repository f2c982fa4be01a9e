"""Gallery: broken images are detected, files never overwrite each other, and a seed determines the image."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_pipeline.evaluation.gallery import (
    MAX_CAPTION_PROMPTS,
    GalleryColumn,
    GalleryImage,
    GalleryPrompt,
    Pair,
    comparison_grid,
    find_defect,
    generate,
    generate_columns,
    labelled_grid,
    plan_caption_gallery,
    plan_columns,
    plan_gallery,
)
from sdxl_pipeline.models.components import load_pipeline
from sdxl_pipeline.runtime.specs import ValidationPrompt
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.validation.eval_samples import select_eval_samples
from tests.support.evaluation_specs import PROMPTS, tiny_model, tiny_settings
from tests.support.training_datasets import make_dataset


def constant_pixels(value: float) -> np.ndarray:
    return np.full((16, 16, 3), value, dtype=np.float32)


def test_find_defect_of_broken_image_describes_it():
    noise = np.random.default_rng(0).random((16, 16, 3)).astype(np.float32)
    assert find_defect(noise) is None
    assert find_defect(constant_pixels(0.0)) == "black"
    assert find_defect(constant_pixels(0.7)) == "constant: one colour everywhere"
    one_nan = noise.copy()
    one_nan[3, 4, 1] = np.nan
    assert str(find_defect(one_nan)).startswith("not finite")
    assert find_defect(constant_pixels(np.inf)) == "not finite: 100% of its values are NaN or infinite"


def test_find_defect_of_dark_or_pale_image_is_none():
    dark = constant_pixels(0.0)
    dark[5:9, 5:9] = 0.05
    pale = constant_pixels(1.0)
    pale[5:9, 5:9, 0] = 0.9
    assert find_defect(dark) is None
    assert find_defect(pale) is None


@pytest.fixture
def reader(tmp_path: Path) -> BatchReader:
    texts = [text for prompt in PROMPTS for text in (prompt.prompt, prompt.negative_prompt)]
    return BatchReader(
        (make_dataset(tmp_path / "photos", "photos", splits={"a.png": "train"}, prompts=texts),)
    )


def test_plan_gallery_covers_every_size_and_seed(reader: BatchReader):
    settings = tiny_settings(validation_resolution="64x64,96x64", num_validation_images=2)
    gallery = plan_gallery(PROMPTS, settings, reader, zeros_for_empty_prompt=True)
    assert [prompt.name for prompt in gallery[:4]] == [
        "circle_64x64_seed7",
        "circle_64x64_seed8",
        "circle_96x64_seed7",
        "circle_96x64_seed8",
    ]
    assert (gallery[2].height, gallery[2].width) == (64, 96)
    assert len(gallery) == 8
    names = [prompt.name for prompt in plan_gallery(PROMPTS, tiny_settings(), reader, True)]
    assert names == ["circle", "star"]


def test_plan_gallery_makes_file_names_unique(reader: BatchReader):
    names = ["a/b", "a b", "A b", "..", "ünï"]
    prompts = [ValidationPrompt(name=name, prompt="a red circle") for name in names]
    stems = [prompt.name for prompt in plan_gallery(prompts, tiny_settings(), reader, True)]
    assert stems == ["a_b", "a_b_2", "A_b_3", "image", "ünï"]


def test_plan_gallery_empty_negative_prompt_is_zeros_or_encoded(reader: BatchReader):
    with_zeros = plan_gallery(PROMPTS, tiny_settings(), reader, zeros_for_empty_prompt=True)
    encoded = plan_gallery(PROMPTS, tiny_settings(), reader, zeros_for_empty_prompt=False)
    assert with_zeros[1].conditioning.negative_prompt_embeds is None
    expected = reader.prompt_embeds("")[0]
    assert torch.equal(encoded[1].conditioning.negative_prompt_embeds, expected)  # type: ignore[arg-type]
    assert torch.equal(with_zeros[0].conditioning.negative_prompt_embeds, reader.prompt_embeds("blurry")[0])  # type: ignore[arg-type]


def test_plan_gallery_prompt_without_embeddings_raises(reader: BatchReader):
    with pytest.raises(UserError, match="a green square"):
        plan_gallery([ValidationPrompt(name="x", prompt="a green square")], tiny_settings(), reader, True)


def test_plan_caption_gallery_uses_distinct_captions(tmp_path: Path):
    datasets = (
        make_dataset(tmp_path / "photos", "photos", splits={f"{number}.png": "eval" for number in range(6)}),
    )
    settings = tiny_settings()
    _, samples = select_eval_samples(datasets, settings, "original")
    reader = BatchReader(datasets)
    gallery = plan_caption_gallery(samples, datasets, settings, reader, True)
    assert len(gallery) == MAX_CAPTION_PROMPTS
    by_caption = {f"photos {sample.path[0]} 0": sample for sample in samples}
    for prompt in gallery:
        sample = by_caption[prompt.text]
        assert torch.equal(
            prompt.conditioning.prompt_embeds,
            reader.text_embeds([sample], [sample.embed_keys[0]]).prompt_embeds,
        )


def test_generate_is_deterministic_and_detects_nan_weights(reader: BatchReader, tmp_path: Path):
    settings = tiny_settings()
    pipeline = load_pipeline(tiny_model(settings, tmp_path), torch.float32, text_encoders=False)
    circle, star = plan_gallery(PROMPTS, settings, reader, zeros_for_empty_prompt=True)
    steps: list[int] = []
    first = generate(pipeline, circle, settings, lambda: steps.append(1))
    assert len(steps) == settings.validation_num_inference_steps
    torch.manual_seed(5)
    assert np.array_equal(first.pixels, generate(pipeline, circle, settings).pixels)
    assert not np.array_equal(first.pixels, generate(pipeline, star, settings).pixels)
    assert first.pixels.shape == (64, 64, 3)
    path = first.save(tmp_path / "out")
    assert path == tmp_path / "out" / "circle.png"
    with Image.open(path) as saved:
        assert np.abs(np.asarray(saved) / 255 - first.pixels).max() <= 0.5 / 255 + 1e-6

    with torch.no_grad():
        pipeline.unet.conv_out.weight[0, 0] = torch.nan
    broken = generate(pipeline, circle, settings)
    assert str(broken.defect).startswith("not finite")
    assert broken.save(tmp_path / "out").is_file()


def test_comparison_grid_puts_before_left_of_after():
    red, blue = Image.new("RGB", (64, 64), "#c00000"), Image.new("RGB", (64, 64), "#0000c0")
    grid = comparison_grid([Pair(red, blue, "a prompt")] * 3, ("base model", "LoRA"))
    pixels = np.asarray(grid).astype(int)
    is_red = (pixels[..., 0] > 150) & (pixels[..., 2] < 60)
    is_blue = (pixels[..., 2] > 150) & (pixels[..., 0] < 60)
    assert is_red.sum() == is_blue.sum() == 3 * 256 * 256
    assert np.argwhere(is_red)[:, 1].min() < np.argwhere(is_blue)[:, 1].min()
    with pytest.raises(ValueError, match="at least one"):
        comparison_grid([], ("base model", "LoRA"))


def test_gallery_image_nan_pixels_become_black(reader: BatchReader):
    prompt = plan_gallery(PROMPTS, tiny_settings(), reader, True)[0]
    pixels = constant_pixels(1.0)
    pixels[0, 0] = np.nan
    image = GalleryImage(prompt, pixels, "not finite").image
    assert image.getpixel((0, 0)) == (0, 0, 0)
    assert image.getpixel((1, 0)) == (255, 255, 255)


def test_plan_columns_are_base_checkpoints_and_scales():
    selected = GalleryColumn(240, "ema")
    columns = plan_columns(range(40, 481, 40), selected, 3, (1.0, 0.4, 0.0, 1.5))
    assert [(column.step, column.scale) for column in columns] == [
        (0, 1.0),
        *((step, 1.0) for step in (160, 240, 360, 480)),
        (240, 0.4),
        (240, 1.5),
    ]
    assert {column.weights for column in columns[1:]} == {"ema"}
    assert [column.step for column in plan_columns([40], GalleryColumn(40), 4, ())] == [0, 40]
    assert [column.step for column in plan_columns([40, 80], GalleryColumn(40), 0, ())] == [0, 40]
    assert [column.folder for column in (columns[0], columns[2], columns[-1])] == [
        "base",
        "step-00000240-ema",
        "step-00000240-ema-scale-1.5",
    ]


def test_generate_columns_activates_each_column_once_and_writes_its_folder(
    reader: BatchReader, tmp_path: Path
):
    events: list[object] = []

    @contextmanager
    def activate(column: GalleryColumn):
        events.append(column.title)
        yield
        events.append("done")

    def render(prompt: GalleryPrompt) -> GalleryImage:
        return GalleryImage(prompt, constant_pixels(0.0 if events[-1] == "step 40" else 0.5), "black")

    columns = plan_columns([40], GalleryColumn(40), 1, (0.5,))
    progress: list[tuple[int, int]] = []
    written = generate_columns(
        columns,
        activate,
        lambda: plan_gallery(PROMPTS, tiny_settings(), reader, True),
        render,
        tmp_path,
        lambda done, total: progress.append((done, total)),
    )
    assert events == ["base model", "done", "step 40", "done", "step 40 × 0.5", "done"]
    assert progress == [(done, 6) for done in range(7)]
    paths = [Path(image.image.path).relative_to(tmp_path).as_posix() for image in written[2:4]]
    assert paths == ["step-00000040/circle.png", "step-00000040/star.png"]
    assert [(image.image.step, image.image.scale) for image in written] == [
        (column.step, column.scale) for column in columns for _ in PROMPTS
    ]
    assert written[2].defect == "black"


def test_labelled_grid_leaves_gaps_and_rejects_uneven_rows():
    red = Image.new("RGB", (64, 32), "#c00000")
    grid = np.asarray(labelled_grid(["a", "b"], ["one", "two"], [[red, None], [None, red]])).astype(int)
    is_red = (grid[..., 0] > 150) & (grid[..., 1] < 60)
    assert is_red.sum() == 2 * 256 * 128
    columns, rows = np.argwhere(is_red)[:, 1], np.argwhere(is_red)[:, 0]
    assert rows[columns < grid.shape[1] / 2].max() < rows[columns > grid.shape[1] / 2].min()
    with pytest.raises(ValueError, match="needs an image"):
        labelled_grid(["a"], ["one"], [[None]])
    with pytest.raises(ValueError, match="rows as long"):
        labelled_grid(["a"], ["one"], [[red, red]])
