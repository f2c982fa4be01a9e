"""Every change of images, captions or settings costs exactly the encodings that depend on it, and going back costs none.

The stages' programs are called inside the test's process, which spares each of the many runs the import of torch; what they are told
and what they return is what the launcher would hand over.
"""

import importlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from resources.stage_client import LocalStageClient
from sdxl_pipeline.config.hardware_profiles import Hardware
from sdxl_pipeline.definitions import build_definitions
from sdxl_pipeline.models.base_model import BUNDLED_MODEL
from sdxl_pipeline.runtime.reporter import PlainReporter
from sdxl_pipeline.runtime.stage_runner import StopSignal
from tests.conftest import draw_image


class InProcessLauncher(LocalStageClient):
    def run(
        self,
        context: dg.AssetExecutionContext,
        stage: str,
        spec: BaseModel,
        manifest_type: type[Any],
        work_dir: Path,
        hardware: Hardware,
        environment: Mapping[str, str] | None = None,
    ) -> Any:
        module = importlib.import_module(f"sdxl_pipeline.stages.{stage}")
        sent = type(spec).model_validate_json(spec.model_dump_json())
        returned = module.main(sent, PlainReporter(), StopSignal())
        return manifest_type.model_validate_json(returned.model_dump_json())


class Dataset:
    """One project, materialized up to its caches or its LoRA again and again."""

    def __init__(self, instance: dg.DagsterInstance, folder: Path) -> None:
        self.instance, self.folder, self.data = instance, folder, folder / "data"

    def run(self, *, train: bool = False) -> dict[str, Any]:
        """(latents encoded, captions encoded) and what the lora asset says of its training, by name."""
        definitions = build_definitions(self.folder.parent)
        stages = [
            ["base_model"],
            *(["shapes", stage] for stage in ("dataset", "aspect_buckets", "vae_latents", "text_embeds")),
        ]
        selection = dg.AssetSelection.assets(
            *(dg.AssetKey(["small", *stage]) for stage in [*stages, *([["lora"]] if train else [])])
        )
        result = dg.materialize(
            list(definitions.assets or []),
            selection=selection,
            resources={**(definitions.resources or {}), "launcher": InProcessLauncher()},
            instance=self.instance,
        )
        assert result.success

        def shown(node: str, name: str) -> Any:
            return result.asset_materializations_for_node(node)[0].metadata[name].value

        told = {
            "latents": shown("small__shapes__vae_latents", "encoded"),
            "captions": shown("small__shapes__text_embeds", "encoded"),
        }
        return told | ({"training": shown("small__lora", "summary")} if train else {})

    def cost(self) -> tuple[int, int]:
        told = self.run()
        return told["latents"], told["captions"]

    def configure(self, **settings: Any) -> None:
        path = self.folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    def configure_dataset(self, **settings: Any) -> None:
        path = self.folder / "multidatabackend.json"
        path.write_text(json.dumps([{**json.loads(path.read_text())[0], **settings}]))


@pytest.fixture
def dataset(instance: dg.DagsterInstance, make_project: Callable[..., Path]) -> Dataset:
    # no image is held out, so that every one has mirrored crops where these are asked for
    return Dataset(instance, make_project(config={"eval_holdout_share": 0, "evaluation_type": "none"}))


def test_changes_of_files_cost_exactly_their_encodings(dataset: Dataset) -> None:
    # Eight captions, the validation prompt, the negative prompt and the empty prompt.
    assert dataset.cost() == (8, 11)
    assert dataset.cost() == (0, 0)

    added = draw_image(dataset.data, 8)
    assert dataset.cost() == (1, 1)

    draw_image(dataset.data, 15).replace(dataset.data / "image_03.png")  # other pixels under an old name
    (dataset.data / "image_15.txt").unlink()
    assert dataset.cost() == (1, 0)

    (dataset.data / "image_03.txt").write_text("an image with another caption")
    assert dataset.cost() == (0, 1)

    for suffix in (".png", ".txt"):
        (dataset.data / f"image_02{suffix}").rename(dataset.data / f"another name{suffix}")
        (dataset.data / "sub").mkdir(exist_ok=True)
        (dataset.data / f"image_04{suffix}").rename(dataset.data / "sub" / f"image_04{suffix}")
    assert dataset.cost() == (0, 0)

    kept = added.read_bytes()
    added.unlink()
    assert dataset.cost() == (0, 0)
    added.write_bytes(kept)
    assert dataset.cost() == (0, 0)


def test_renamed_and_moved_images_are_the_same_training(dataset: Dataset) -> None:
    assert "3 steps" in dataset.run(train=True)["training"]
    (dataset.data / "moved").mkdir()
    for path in sorted(dataset.data.glob("image_*")):
        path.rename(dataset.data / "moved" / path.name.replace("image", "renamed"))
    told = dataset.run(train=True)
    assert (told["latents"], told["captions"]) == (0, 0)
    assert "reused, nothing trained" in told["training"]


def test_changes_of_settings_cost_what_depends_on_them_and_going_back_costs_nothing(dataset: Dataset) -> None:
    dataset.cost()
    for there, cost in [
        ({"resolution": 96}, (8, 0)),
        ({"resolution": 128, "caption_strategy": "filename"}, (0, 8)),
        ({"caption_strategy": "textfile", "repeats": 3}, (0, 0)),
        ({"repeats": 0, "random_flip": True}, (8, 0)),
        ({"random_flip": False}, (0, 0)),
    ]:
        dataset.configure_dataset(**there)
        assert dataset.cost() == cost, there

    dataset.configure(vae_dtype="bf16")
    assert dataset.cost() == (8, 0)
    dataset.configure(vae_dtype="fp32", tokenizer_max_length=154)
    assert dataset.cost() == (0, 11)
    dataset.configure(tokenizer_max_length=77)
    assert dataset.cost() == (0, 0)


def test_another_text_encoder_encodes_the_captions_and_no_image(dataset: Dataset, tmp_path: Path) -> None:
    dataset.cost()
    other = tmp_path / "other"
    shutil.copytree(BUNDLED_MODEL, other)
    weights = next((other / "text_encoder").glob("*.safetensors"))
    tensors = load_file(weights)
    name = next(iter(sorted(tensors)))
    save_file(tensors | {name: tensors[name] + 0.01}, weights, metadata={"format": "pt"})
    dataset.configure(pretrained_model_name_or_path=str(other))
    assert dataset.cost() == (0, 11)
    dataset.configure(pretrained_model_name_or_path="bundled:tiny-sdxl")
    assert dataset.cost() == (0, 0)
