"""Model card: front matter as the Hub reads it, links to existing files, and code that runs unchanged."""

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.files.atomic_files import sha256_path
from sdxl_pipeline.models.adapters.adapter import save_adapter
from sdxl_pipeline.release.release_inputs import hub_id
from tests.models.adapted_unets import KINDS, adapted_unet, output

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def front_matter(folder: Path) -> dict:
    return ModelCard.load(folder / "README.md").data.to_dict()


def snippet(folder: Path) -> str:
    match = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert match is not None
    return match[1]


def test_front_matter_describes_the_lora(release):
    data = front_matter(release())
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "text-to-image"
    assert {"lora", "sdxl", "text-to-image"} <= set(data["tags"])
    assert data["instance_prompt"] == "a zorp"
    assert data["widget"][0] == {
        "text": "a red circle",
        "output": {"url": "images/circle.png"},
        "parameters": {"negative_prompt": "blurry"},
    }
    assert "base_model" not in data, "a bundled model has no page on the Hub to link to"


def test_front_matter_of_hub_base_model_has_its_licence(release, inputs):
    model = inputs["base_model"].model_copy(update={"source": SDXL, "revision": "ab" * 20})
    folder = release(base_model=model)
    data = front_matter(folder)
    assert (data["base_model"], data["base_model_relation"], data["license"]) == (
        SDXL,
        "adapter",
        "openrail++",
    )
    text = (folder / "README.md").read_text()
    assert f'from_pretrained("{SDXL}"' in text
    assert "ab" * 20 in text
    assert hub_id(inputs["base_model"]) is None


def test_links_refer_to_existing_files(release):
    folder = release()
    text = (folder / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    assert {
        "gallery.png",
        "loss_by_timestep.png",
        "training_loss.png",
        "training_config.json",
        "lineage.json",
    } <= set(links)
    for link in links:
        assert (folder / link).is_file(), link
    for entry in front_matter(folder)["widget"]:
        assert (folder / entry["output"]["url"]).is_file()


def test_card_contains_metrics_and_lineage(release, inputs):
    text = (release() / "README.md").read_text()
    assert "Made for a test." in text
    assert "| Eval loss, LoRA | 0.1 | -0.02 |" in text
    assert "held out from the training" in text
    assert (
        "trained for 40 steps (120 samples) on 1,024 captioned images; 9 others were held out for the evaluation."
        in text
    )
    assert "| dataset `more` | 1,000 images trained, 0 held out |" in text
    assert "| dataset `shapes` | 24 images trained, 6 held out |" in text
    assert "| dataset `validation` | 0 images trained, 3 held out |" in text
    assert "| `demo/shapes_dataset` | `d1` |" in text
    for digest in inputs["base_model"].digests.values():
        assert digest in text


def test_special_characters_in_prompts_are_escaped(release, inputs):
    special = "a \"quoted\": | piped\n- prompt --- 'é' # no comment"
    prompts = (inputs["prompts"][0].model_copy(update={"prompt": special}),)
    images = tuple(image.model_copy(update={"prompt": special}) for image in inputs["report"].images)
    folder = release(prompts=prompts, report=inputs["report"].model_copy(update={"images": images}))
    assert front_matter(folder)["widget"][0]["text"] == special
    compile(snippet(folder), "snippet", "exec")


def test_widget_without_prompts_uses_gallery_captions(release):
    data = front_matter(release(prompts=()))
    assert [entry["text"] for entry in data["widget"]] == [
        "a red circle",
        "a blue star on a green background",
    ]


def test_snippet_runs_unchanged(release, inputs, monkeypatch: pytest.MonkeyPatch):
    folder = release()
    monkeypatch.chdir(folder)
    exec(compile(snippet(folder), "snippet", "exec"), {})
    with Image.open(folder / "image.png") as image:
        assert image.size == (64, 64)


def test_snippet_of_published_lora_uses_hub_id(release, inputs):
    published = inputs["settings"].model_copy(update={"push_to_hub": True})
    assert 'load_lora_weights("someone/zorp", weight_name="pytorch_lora_weights.safetensors")' in snippet(
        release(settings=published)
    )


def test_snippet_sets_prediction_type_and_spacing(release, inputs):
    settings = inputs["settings"].model_copy(update={"prediction_type": "v_prediction"})
    code = snippet(release(settings=settings))
    assert 'from_config(pipeline.scheduler.config, prediction_type="v_prediction")' in code
    compile(code, "snippet", "exec")
    settings = settings.model_copy(update={"rescale_betas_zero_snr": True})
    assert (
        'config, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")'
        in snippet(release(settings=settings))
    )


def test_card_of_run_without_image_counts_omits_them(release, inputs):
    lora = inputs["lora"].model_copy(update={"trained_images": {}, "held_out_images": {}})
    text = (release(lora=lora) / "README.md").read_text()
    assert "trained for 40 steps (120 samples). It changes" in text
    assert "| dataset `" not in text


def test_card_of_full_unet_loads_its_folder(release, inputs, unet_inputs, monkeypatch):
    model = inputs["base_model"].model_copy(update={"source": SDXL, "revision": "ab" * 20})
    hub = release(**unet_inputs, base_model=model)
    assert front_matter(hub)["base_model_relation"] == "finetune"
    assert "lora" not in front_matter(hub)["tags"]

    folder = release(**unet_inputs)
    assert sha256_path(folder / "unet") == unet_inputs["lora"].weights_sha256
    text = (folder / "README.md").read_text()
    assert "with all weights trained further for 40 steps" in text
    assert "lora_rank" not in text
    assert "Copy `demo.safetensors` to `models/checkpoints`" in text
    assert "Copy `demo.safetensors` to `models/Stable-diffusion`" in text
    assert "<lora:" not in text
    monkeypatch.chdir(folder)
    exec(compile(snippet(folder), "snippet", "exec"), {})
    with Image.open(folder / "image.png") as image:
        assert image.size == (64, 64)


def use_section(folder: Path) -> str:
    text = (folder / "README.md").read_text()
    return text[text.index("## Use") : text.index("## Evaluation")]


def test_use_section_has_instructions_for_each_program(release, inputs):
    text = use_section(release())
    titles = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert titles == ["diffusers", "ComfyUI", "A1111 and Forge"]
    diffusers, comfyui, a1111 = text.split("### ")[1:]
    assert 'weight_name="pytorch_lora_weights.safetensors"' in diffusers
    assert "Copy `demo.safetensors` to `models/loras`" in comfyui
    assert "with strength 1" in comfyui
    assert "Copy `demo.safetensors` to `models/Lora` and write `<lora:demo:1>`" in a1111
    assert "With `demo.json` and `demo.png` in the same folder" in a1111
    for part in (comfyui, a1111):
        assert "Trigger words for the prompt: `a zorp`, `zorpy style`." in part
    assert "DoRA" not in text
    assert "ModelSamplingDiscrete" not in text
    assert "Trigger words" not in use_section(release(trigger_words=[]))


def test_use_section_recommends_strength_1_for_any_alpha(release, inputs):
    settings = inputs["settings"].model_copy(update={"lora_rank": 4, "lora_alpha": 10.0})
    text = use_section(release(settings=settings))
    assert "`lora_alpha` / `lora_rank` = 10 / 4 = 2.5. The scale is stored in the file's header" in text
    assert re.findall(r"strength ([\d.]*\d)", text) == ["1"]
    assert "<lora:demo:1>" in text


def test_use_section_of_single_format_omits_the_other(release, inputs):
    settings = inputs["settings"].model_copy(update={"lora_format": "comfyui"})
    text = use_section(release(settings=settings))
    assert 'weight_name="demo.safetensors"' in text
    lora = inputs["lora"].model_copy(update={"kohya_path": None})
    settings = inputs["settings"].model_copy(update={"lora_format": "diffusers"})
    text = use_section(release(settings=settings, lora=lora))
    assert "This release has no file for these programs" in text
    assert "models/loras" not in text


def test_use_section_of_dora_identifies_exact_file(release, inputs):
    settings = inputs["settings"].model_copy(update={"use_dora": True})
    lora = inputs["lora"].model_copy(update={"dora_approximation": {"rank": 32, "relative_error": 0.01234}})
    text = use_section(release(settings=settings, lora=lora))
    assert "plain LoRA of rank 32 that approximates it, with a relative error of 0.0123" in text
    assert "The exact adapter is `pytorch_lora_weights.safetensors`, for diffusers." in text


@pytest.mark.parametrize(
    ("kind", "prediction", "node"),
    [
        ("lora", None, None),
        ("lora", "v_prediction", "sampling `v_prediction`."),
        ("lora", "sample", "sampling `x0`."),
        ("unet", "v_prediction", None),
        ("unet", "sample", "sampling `x0`."),
    ],
)
def test_use_section_names_prediction_type_that_comfyui_cannot_detect(
    release, inputs, unet_inputs, kind, prediction, node
):
    changes = unet_inputs if kind == "unet" else {"settings": inputs["settings"]}
    settings = changes["settings"].model_copy(update={"prediction_type": prediction})
    text = use_section(release(**{**changes, "settings": settings}))
    assert ("ModelSamplingDiscrete" in text) == (node is not None)
    assert node is None or node in text


@pytest.mark.parametrize(
    ("kind", "description", "tags"),
    [
        ("dora", "a DoRA of rank 4 for", {"lora", "dora"}),
        ("lokr, whole matrices", "a LoKr (LyCORIS) for", {"lycoris", "lokr"}),
        ("loha and lokr", "a LoHa and LoKr (LyCORIS) for", {"lycoris", "loha", "lokr"}),
    ],
)
def test_snippet_loads_every_kind_of_adapter(
    release,
    inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    description: str,
    tags: set[str],
):
    settings = TrainingSettings.model_validate({**inputs["settings"].model_dump(), **KINDS[kind]})
    path = tmp_path / "run" / "adapter.safetensors"
    unet = adapted_unet(inputs["base_model"], settings, steps=1)
    save_adapter({"unet": unet}, path)
    digest = sha256_path(path)
    lora = inputs["lora"].model_copy(update={"weights_path": str(path), "weights_sha256": digest})
    report = inputs["report"].model_copy(update={"lora_sha256": digest})
    folder = release(lora=lora, report=report, settings=settings)
    text = (folder / "README.md").read_text()
    assert description in text
    assert tags <= set(front_matter(folder)["tags"])
    assert ("| `lora_rank` |" in text) == (kind == "dora")
    assert ("`lycoris_config`" in text) == (kind != "dora")
    assert ("`lora_alpha` / `lora_rank` = 2 / 4 = 0.5" in text) == (kind == "dora")

    monkeypatch.chdir(folder)
    namespace: dict = {}
    exec(compile(snippet(folder), "snippet", "exec"), namespace)
    expected = output(unet)
    torch.testing.assert_close(output(namespace["pipeline"].unet), expected, rtol=0, atol=1e-4)
    published = snippet(
        release(lora=lora, report=report, settings=settings.model_copy(update={"push_to_hub": True}))
    )
    assert "someone/zorp" in published
    compile(published, "snippet", "exec")
