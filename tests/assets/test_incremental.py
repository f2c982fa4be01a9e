"""Every change of images, captions or settings encodes exactly what depends on it, and reverting it encodes nothing.

The stages run inside the test's process, which saves the import of torch in each of the many runs.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from safetensors.torch import load_file, save_file

from sdxl_pipeline.definitions import build_definitions
from sdxl_pipeline.models.base_model import BUNDLED_MODEL
from tests.conftest import draw_image
from tests.support.asset_graph import DATASET_STAGES, InProcessStageClient, stage_key


class Dataset:
    """One project, for repeated materializations of its caches or its LoRA."""

    def __init__(self, instance: dg.DagsterInstance, folder: Path) -> None:
        self.instance, self.folder, self.data = instance, folder, folder / "data"

    def run(self, *, train: bool = False) -> dict[str, Any]:
        """Return the numbers of latents and captions encoded, and the summary of the lora asset, by name."""
        definitions = build_definitions(self.folder.parent)
        stages = ["base_model", *DATASET_STAGES, *(["training_set", "lora"] if train else [])]
        selection = dg.AssetSelection.assets(*(stage_key("small", stage) for stage in stages))
        result = dg.materialize(
            list(definitions.assets or []),
            selection=selection,
            resources={**(definitions.resources or {}), "launcher": InProcessStageClient()},
            instance=self.instance,
        )
        assert result.success

        def entry(node: str, name: str) -> Any:
            return result.asset_materializations_for_node(node)[0].metadata[name].value

        counts = {
            "latents": entry("small__shapes_vae_latents", "encoded"),
            "captions": entry("small__shapes_text_embeds", "encoded"),
        }
        return counts | ({"training": entry("small__lora", "summary")} if train else {})

    def encoded(self) -> tuple[int, int]:
        """Run, and return the numbers of latents and captions encoded."""
        counts = self.run()
        return counts["latents"], counts["captions"]

    def configure(self, **settings: Any) -> None:
        path = self.folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    def configure_dataset(self, **settings: Any) -> None:
        path = self.folder / "multidatabackend.json"
        path.write_text(json.dumps([{**json.loads(path.read_text())[0], **settings}]))


@pytest.fixture
def dataset(instance: dg.DagsterInstance, make_project: Callable[..., Path]) -> Dataset:
    # no image is held out, so that random_flip applies to all of them
    return Dataset(instance, make_project(config={"eval_holdout_share": 0, "evaluation_type": "none"}))


def test_encoding_changed_files_encodes_only_their_entries(dataset: Dataset) -> None:
    # Eight captions, the validation prompt, the negative prompt and the empty prompt.
    assert dataset.encoded() == (8, 11)
    assert dataset.encoded() == (0, 0)

    added = draw_image(dataset.data, 8)
    assert dataset.encoded() == (1, 1)

    draw_image(dataset.data, 15).replace(dataset.data / "image_03.png")  # other pixels under an existing name
    (dataset.data / "image_15.txt").unlink()
    assert dataset.encoded() == (1, 0)

    (dataset.data / "image_03.txt").write_text("an image with another caption")
    assert dataset.encoded() == (0, 1)

    for suffix in (".png", ".txt"):
        (dataset.data / f"image_02{suffix}").rename(dataset.data / f"another name{suffix}")
        (dataset.data / "sub").mkdir(exist_ok=True)
        (dataset.data / f"image_04{suffix}").rename(dataset.data / "sub" / f"image_04{suffix}")
    assert dataset.encoded() == (0, 0)

    content = added.read_bytes()
    added.unlink()
    assert dataset.encoded() == (0, 0)
    added.write_bytes(content)
    assert dataset.encoded() == (0, 0)


@pytest.mark.slow
def test_lora_renamed_and_moved_images_reuse_the_training(dataset: Dataset) -> None:
    assert "3 steps" in dataset.run(train=True)["training"]
    (dataset.data / "moved").mkdir()
    for path in sorted(dataset.data.glob("image_*")):
        path.rename(dataset.data / "moved" / path.name.replace("image", "renamed"))
    second = dataset.run(train=True)
    assert (second["latents"], second["captions"]) == (0, 0)
    assert "reused, nothing trained" in second["training"]


@pytest.mark.slow
def test_encoding_changed_settings_encode_dependent_entries_and_reverting_encodes_nothing(
    dataset: Dataset,
) -> None:
    dataset.encoded()
    for settings, expected in [
        ({"resolution": 96}, (8, 0)),
        ({"resolution": 128, "caption_strategy": "filename"}, (0, 8)),
        ({"caption_strategy": "textfile", "repeats": 3}, (0, 0)),
        ({"repeats": 0, "random_flip": True}, (8, 0)),
        ({"random_flip": False}, (0, 0)),
    ]:
        dataset.configure_dataset(**settings)
        assert dataset.encoded() == expected, settings

    dataset.configure(vae_dtype="bf16")
    assert dataset.encoded() == (8, 0)
    dataset.configure(vae_dtype="fp32", tokenizer_max_length=154)
    assert dataset.encoded() == (0, 11)
    dataset.configure(tokenizer_max_length=77)
    assert dataset.encoded() == (0, 0)


@pytest.mark.slow
def test_encoding_another_text_encoder_encodes_captions_only(dataset: Dataset, tmp_path: Path) -> None:
    dataset.encoded()
    other = tmp_path / "other"
    shutil.copytree(BUNDLED_MODEL, other)
    weights = next((other / "text_encoder").glob("*.safetensors"))
    tensors = load_file(weights)
    name = next(iter(sorted(tensors)))
    save_file(tensors | {name: tensors[name] + 0.01}, weights, metadata={"format": "pt"})
    dataset.configure(pretrained_model_name_or_path=str(other))
    assert dataset.encoded() == (0, 11)
    dataset.configure(pretrained_model_name_or_path="bundled:tiny-sdxl")
    assert dataset.encoded() == (0, 0)
