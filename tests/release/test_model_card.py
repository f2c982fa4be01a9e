"""Model card: front matter as the Hub reads it, links to existing files, and code that runs unchanged."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.evaluation.report import write_report
from sdxl_pipeline.files.atomic_files import sha256_path
from sdxl_pipeline.models.adapters.adapter import save_adapter
from sdxl_pipeline.release.card_metadata import base_licence
from sdxl_pipeline.release.card_validation import validate_card
from sdxl_pipeline.release.release_inputs import ReleaseError, ReleaseInputs, hub_id
from sdxl_pipeline.runtime.evaluation_report import Overfitting, PairedDifference, ProbeGap, ScorePair, Scores
from sdxl_pipeline.runtime.specs import FailedItem
from tests.models.adapted_unets import KINDS, adapted_unet, output
from tests.support.hub_server import HubServer

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
    assert {"lora", "sdxl", "text-to-image", "template:sd-lora", "diffusers-training"} <= set(data["tags"])
    assert data["instance_prompt"] == "a zorp"
    assert data["widget"][0] == {
        "text": "a red circle",
        "output": {"url": "images/circle.png"},
        "parameters": {"negative_prompt": "blurry", "num_inference_steps": 2, "guidance_scale": 7.5},
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


def test_captions_are_published_only_on_request(release, inputs):
    """Without validation prompts the gallery is generated from captions, which the grid shows as text."""
    captions = [b"a red circle", b"a blue star on a green background"]
    folder = release(prompts=(), trigger_words=[])
    for path in folder.rglob("*"):
        assert path.is_dir() or not any(caption in path.read_bytes() for caption in captions), path
    assert not (folder / "gallery.png").exists()
    assert [entry["text"] for entry in front_matter(folder)["widget"]] == ["-", "-"]
    assert '"your prompt"' in snippet(folder)

    asked = inputs["settings"].model_copy(update={"metadata_include_captions": True})
    folder = release(prompts=(), settings=asked)
    assert [entry["text"].encode() for entry in front_matter(folder)["widget"]] == captions
    assert (folder / "gallery.png").exists()
    assert json.loads((folder / "eval.json").read_text())["images"][0]["prompt"] == captions[0].decode()


def test_front_matter_has_a_model_index(release):
    (model,) = front_matter(release())["model-index"]
    (result, of_prompts) = model["results"]
    assert model["name"] == "demo"
    assert result["task"] == {"type": "text-to-image"}
    assert result["dataset"] == {"type": "image-folder", "name": "held-out images"}
    assert of_prompts["dataset"]["name"] == "validation prompts"
    assert [(each["type"], each["value"]) for each in result["metrics"]] == [("eval_loss", 0.1)]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (
            "license: other\nlicense_name: fair\nlicense_link: https://example.org/fair",
            {"license": "other", "license_name": "fair", "license_link": "https://example.org/fair"},
        ),
        (
            "license: other\nlicense_name: fair\nlicense_link: LICENSE.md",
            {"license": "other", "license_name": "fair"},
        ),
        ("license: [mit", {}),
        ("- a list", {}),
        ("tags: [a]", {}),
    ],
)
def test_base_licence_is_read_from_the_models_folder(inputs, tmp_path, metadata, expected):
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n# Model\n")
    model = inputs["base_model"].model_copy(update={"path": str(tmp_path)})
    assert base_licence(ReleaseInputs(**(inputs | {"base_model": model}))) == expected


def test_sections_are_in_the_order_of_interest(release):
    text = (release() / "README.md").read_text()
    sections = [
        "Trigger words",
        "Use",
        "Training",
        "Data lineage",
        "Evaluation",
        "Known weaknesses",
        "Reproduce",
    ]
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == sections
    assert text.index("<Gallery />") < text.index("](gallery.png)") < text.index("## ")
    assert "sdxl-pipeline reproduce .\n" in text


def test_reproduce_command_asks_for_the_images_that_no_release_contains(release, inputs):
    datasets = [
        {"id": "zorp", "type": "local", "dataset_type": "image"},
        {"id": "unseen", "type": "aws", "dataset_type": "eval"},
        {"id": "hub", "type": "huggingface", "dataset_type": "image"},
        {"id": "made", "type": "local", "dataset_type": "image", "generated_folder": "data"},
        {"id": "captions", "type": "local", "dataset_type": "text_embeds"},
    ]
    folder = release(lineage={**inputs["lineage"], "datasets": datasets})
    command = "sdxl-pipeline reproduce . --data zorp=LOCATION --data unseen=LOCATION\n"
    assert command in section(folder, "Reproduce")


def section(folder: Path, title: str) -> str:
    text = (folder / "README.md").read_text()
    return text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def evaluated(inputs, **changes):
    """Return the release's inputs with another report, written to report.json."""
    report = inputs["report"].model_copy(update=changes)
    write_report(report, "demo", "bundled:tiny-clip")
    return {"report": report}


def test_known_weaknesses_of_a_plain_report_list_what_was_not_measured(release, inputs):
    text = section(release(), "Known weaknesses")
    assert "No eval loss was measured" in text
    assert "Over-fitting: not measured." in text
    assert "Memorisation: not measured." in text
    changes = evaluated(inputs, eval_source="training images")
    assert "No image was held out" in section(release(**changes), "Known weaknesses")


def test_evaluation_and_weaknesses_report_uncertainty(release, inputs):
    difference = PairedDifference(images=12, mean=-0.01, standard_error=0.02)
    clip = ScorePair(
        base=20.0, lora=21.0, difference=PairedDifference(images=6, mean=1.0, standard_error=0.5)
    )
    changes = evaluated(
        inputs,
        difference_to_base=difference,
        overfitting=Overfitting(
            conclusive=True, from_step=30, gap=ProbeGap(mean=0.05, standard_error=0.01), text="From step 30."
        ),
        scores=Scores(clip=clip, omitted={"fidelity": "Too few images."}),
        broken_images=(FailedItem(name="circle", reason="black"),),
    )
    folder = release(**changes, lora=inputs["lora"].model_copy(update={"skipped_steps": 2}))
    assert "| CLIP score | 20 | 21 | +1 ± 0.5 |" in section(folder, "Evaluation")
    text = section(folder, "Known weaknesses")
    assert "not lower than the base model's by more than two standard errors (-0.01 ± 0.02)" in text
    assert "Over-fitting: From step 30." in text
    assert "Over-fitting gap +0.05 ± 0.01" in text
    assert "Subject fidelity: not reported. Too few images." in text
    assert "The image circle is broken: black" in text
    assert "2 of 40 steps were skipped" in text


def test_card_is_accepted_by_the_hubs_validation(release, inputs, tmp_path, monkeypatch):
    model = inputs["base_model"].model_copy(update={"source": SDXL, "revision": "ab" * 20})
    card, log = (release(base_model=model) / "README.md").read_text(), []
    with HubServer() as hub:
        hub.adopt_process(monkeypatch, tmp_path / "home")
        ModelCard(card).validate()
        validate_card(card, hub.endpoint, log.append)
        assert not log
        for wrong in (
            "license: mitt",
            "base_model: /home/model",
            "base_model_relation: child",
            "model-index: [{}]",
        ):
            with pytest.raises(ReleaseError, match=wrong.partition(":")[0]):
                validate_card(f"---\n{wrong}\n---\n", hub.endpoint)
        validate_card("# No metadata", hub.endpoint, log.append)
        assert "empty or missing yaml metadata" in log.pop()
        hub.fail_next(status=503, path="/validate-yaml")
        validate_card(card, hub.endpoint, log.append)
        assert "was not validated: HTTP 503" in log.pop()
    validate_card(card, "http://127.0.0.1:9", log.append)
    assert "was not validated: ConnectError" in log.pop()


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
    unknown = published.model_copy(update={"hub_model_id": "zorp"})
    assert 'load_lora_weights(".", ' in snippet(release(settings=unknown))


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
    return text[text.index("## Use") : text.index("## Training")]


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
        pytest.param(
            "lokr, whole matrices", "a LoKr (LyCORIS) for", {"lycoris", "lokr"}, marks=pytest.mark.slow
        ),
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
