"""Release folder: exactly the published files, weights that load, no local path or secret, and an identical upload to the Hub."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors.torch import load_file, save_file

from sdxl_pipeline.config.paths import LOCAL_PATH_KEYS, NAME_OR_PATH_KEYS
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.files.disk_space import DiskFullError
from sdxl_pipeline.models.adapters.adapter import adapted_module_names, add_lora, save_adapter
from sdxl_pipeline.models.base_model import SDXL_BASE_CONFIGS
from sdxl_pipeline.models.components import load_pipeline, load_text_encoders
from sdxl_pipeline.release.export import (
    CARD_FILE,
    REPORT_FILE,
    SETTINGS_FILE,
    WEIGHTS_FILE,
    ExportError,
    verify_export,
)
from sdxl_pipeline.release.release_inputs import (
    LINEAGE_FILE,
    ReleaseError,
    portable_name,
    portable_settings,
    require_portable,
)
from tests.models.adapted_unets import shared_unet
from tests.support.hub_server import HubServer


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_build_release_writes_all_files(release, inputs):
    folder = release()
    assert files_in(folder) == {
        WEIGHTS_FILE,
        CARD_FILE,
        SETTINGS_FILE,
        REPORT_FILE,
        LINEAGE_FILE,
        "gallery.png",
        "loss_by_timestep.png",
        "training_loss.png",
        "images/circle.png",
        "images/star.png",
        "demo.safetensors",
        "demo.json",
        "demo.png",
    }
    assert (folder / "demo.safetensors").read_bytes() == Path(inputs["lora"].kohya_path).read_bytes()
    assert (folder / WEIGHTS_FILE).read_bytes() == Path(inputs["lora"].weights_path).read_bytes()
    star = next(image for image in inputs["report"].images if image.name == "star" and image.step > 0)
    assert (folder / "images" / "star.png").read_bytes() == Path(star.path).read_bytes()
    settings = json.loads((folder / SETTINGS_FILE).read_text())
    assert settings["lora_rank"] == 4
    assert settings["pretrained_model_name_or_path"] == "bundled:tiny-sdxl"
    assert not {"output_dir", "logging_dir", "data_backend_config"} & settings.keys()
    lineage = json.loads((folder / LINEAGE_FILE).read_text())
    assert lineage["images"] == {
        "validation": {"trained": 0, "held_out": 3},
        "more": {"trained": 1000, "held_out": 0},
        "shapes": {"trained": 24, "held_out": 6},
    }
    assert lineage["data_versions"] == inputs["lineage"]["data_versions"]
    assert json.loads((folder / REPORT_FILE).read_text())["figures"]["lora_loss"] == 0.1


def test_sidecars_describe_and_preview_the_weights(release, inputs):
    folder = release()
    assert json.loads((folder / "demo.json").read_text()) == {
        "description": "demo: a LoRA of rank 4 for bundled:tiny-sdxl, 40 steps.",
        "notes": "Made for a test.",
        "sd version": "SDXL",
        "activation text": "a zorp, zorpy style",
        "preferred weight": 1.0,
        "negative text": "blurry",
    }
    first = next(image for image in inputs["report"].images if image.step > 0)
    with Image.open(folder / "demo.png") as preview, Image.open(first.path) as image:
        assert preview.format == "PNG"
        assert preview.tobytes() == image.tobytes()


def test_sidecars_with_reserved_name_are_not_written(release, inputs, tmp_path: Path):
    kohya = tmp_path / "run" / "lineage.safetensors"
    kohya.write_bytes(b"kohya's format")
    folder = release(lora=inputs["lora"].model_copy(update={"kohya_path": str(kohya)}))
    assert "images" in json.loads((folder / LINEAGE_FILE).read_text())
    assert "lineage.json` and" not in (folder / CARD_FILE).read_text()


@pytest.mark.parametrize(
    ("lora_format", "kohya", "files"),
    [
        ("both", True, {WEIGHTS_FILE, "demo.safetensors"}),
        ("comfyui", True, {"demo.safetensors"}),
        ("diffusers", False, {WEIGHTS_FILE}),
    ],
)
def test_lora_format_selects_weights_files(release, inputs, lora_format, kohya, files):
    settings = inputs["settings"].model_copy(update={"lora_format": lora_format})
    lora = inputs["lora"] if kohya else inputs["lora"].model_copy(update={"kohya_path": None})
    folder = release(settings=settings, lora=lora)
    assert {name for name in files_in(folder) if name.endswith(".safetensors")} == files
    text = (folder / CARD_FILE).read_text()
    mentioned = {name for name in (WEIGHTS_FILE, "demo.safetensors") if name in text}
    assert mentioned == files
    stem = "demo" if kohya else "pytorch_lora_weights"
    assert {f"{stem}.json", f"{stem}.png"} <= files_in(folder)


def test_build_release_replaces_previous_release_completely(release, inputs, tmp_path: Path):
    folder = release()
    (folder / "images" / "stale.png").write_bytes(b"")
    assert release(lineage={"training_identity": "another"}) == folder
    assert "images/stale.png" not in files_in(folder)
    assert json.loads((folder / LINEAGE_FILE).read_text())["training_identity"] == "another"
    assert [path.name for path in folder.parent.iterdir()] == ["release"]


def test_build_release_failure_keeps_previous_release(release, inputs):
    folder = release()
    before = {name: (folder / name).read_bytes() for name in files_in(folder)}
    Path(inputs["report"].gallery_path).unlink()
    with pytest.raises(FileNotFoundError):
        release()
    assert {name: (folder / name).read_bytes() for name in files_in(folder)} == before
    assert [path.name for path in folder.parent.iterdir()] == ["release"]


def test_build_release_into_foreign_folder_raises(release, tmp_path: Path):
    thesis = tmp_path / "output" / "release" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    with pytest.raises(ReleaseError, match="not a release"):
        release()
    assert thesis.read_text() == "years of work"


def test_build_release_of_unevaluated_weights_raises(release, inputs):
    with pytest.raises(ReleaseError, match="differs from the evaluated weights"):
        release(report=inputs["report"].model_copy(update={"lora_sha256": "0" * 64}))
    with Path(inputs["lora"].weights_path).open("ab") as weights:
        weights.write(b"!")
    with pytest.raises(ReleaseError, match="differs from the evaluated weights"):
        release()


def test_build_release_writes_no_local_path(release, inputs, tmp_path: Path):
    local = inputs["base_model"].model_copy(update={"source": str(tmp_path / "models" / "mine.safetensors")})
    lineage = inputs["lineage"] | {
        "base_model": local.source,
        "folders": [str(tmp_path / "data"), {"nested": "C:\\data\\images"}],
    }
    settings = inputs["settings"].model_copy(update={"pretrained_model_name_or_path": local.source})
    folder = release(base_model=local, lineage=lineage, settings=settings)
    for name in files_in(folder):
        content = (folder / name).read_bytes()
        assert str(tmp_path).encode() not in content, name
        assert b"/tmp" not in content, name
    published = json.loads((folder / LINEAGE_FILE).read_text())
    assert published["base_model"] == "mine.safetensors"
    assert published["folders"] == ["data", {"nested": "images"}]


def test_build_release_with_local_path_or_token_in_note_raises(release, inputs, monkeypatch, tmp_path: Path):
    note = inputs["settings"].model_copy(
        update={"model_card_note": f"See {inputs['lora'].run_dir}/metrics.jsonl"}
    )
    with pytest.raises(ReleaseError, match="local path"):
        release(settings=note)
    monkeypatch.setenv("HF_TOKEN", "hf_verySecretToken")
    leaked = inputs["settings"].model_copy(update={"model_card_note": "hf_verySecretToken"})
    with pytest.raises(ReleaseError, match="Hub token") as error:
        release(settings=leaked)
    assert "hf_verySecretToken" not in str(error.value)
    assert not (tmp_path / "output" / "release").exists()


def test_require_portable_ignores_empty_secrets_and_short_paths(tmp_path: Path):
    (tmp_path / "README.md").write_text("/ and /root are no secrets")
    require_portable(tmp_path, [""], [Path("/"), Path("/root")])
    with pytest.raises(ReleaseError):
        require_portable(tmp_path, ["no secrets"], [])


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("bundled:tiny-sdxl", "bundled:tiny-sdxl"),
        ("/home/me/models/xl", "xl"),
        ("../models/xl", "xl"),
        ("~/xl", "xl"),
        ("models/mine.safetensors", "mine.safetensors"),
        ("models/MINE.SAFETENSORS", "MINE.SAFETENSORS"),
        ("C:\\models\\xl", "xl"),
        ("/", "local model"),
    ],
)
def test_portable_name_shortens_local_paths(source: str, name: str):
    assert portable_name(source) == name


def test_portable_settings_contains_no_local_path(tmp_path: Path):
    local = str(tmp_path / "it.safetensors")
    settings = TrainingSettings.model_validate(dict.fromkeys((*LOCAL_PATH_KEYS, *NAME_OR_PATH_KEYS), local))
    published = portable_settings(settings)
    assert str(tmp_path) not in json.dumps(published)
    assert {key: published[key] for key in NAME_OR_PATH_KEYS} == dict.fromkeys(
        NAME_OR_PATH_KEYS, "it.safetensors"
    )
    assert not published.keys() & {*LOCAL_PATH_KEYS}


def test_verify_export_returns_layer_count(inputs):
    lora = inputs["lora"]
    assert verify_export(Path(lora.weights_path), inputs["base_model"]) == lora.adapted_modules


def test_verify_export_of_sdxl_base_adapter_needs_no_base_weights(inputs, tmp_path: Path):
    """SDXL-base's UNet has 70 transformer blocks with two attentions of four projections each."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(SDXL_BASE_CONFIGS, subfolder="unet")
        )
        add_lora(unet, 1, 1.0, 0.0, ("to_k", "to_q", "to_v", "to_out.0"), seed=0)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            owner, _, leaf = name.rpartition(".")
            setattr(unet.get_submodule(owner), leaf, torch.nn.Parameter(torch.full(parameter.shape, 0.01)))
    path = tmp_path / "xl.safetensors"
    save_adapter({"unet": unet}, path)
    model = inputs["base_model"].model_copy(update={"config_path": str(SDXL_BASE_CONFIGS)})
    assert verify_export(path, model) == len(adapted_module_names(unet)) == 70 * 2 * 4
    with pytest.raises(ExportError):
        verify_export(path, inputs["base_model"])


@pytest.mark.parametrize(
    "kind", ["dora", "lokr", pytest.param("lokr, norms", marks=pytest.mark.slow), "loha, tucker", "locon"]
)
def test_verify_export_handles_every_kind_of_adapter(inputs, tmp_path: Path, kind: str):
    unet = shared_unet(inputs["base_model"], kind)
    path = tmp_path / "adapter.safetensors"
    save_adapter({"unet": unet}, path)
    assert verify_export(path, inputs["base_model"]) == len(adapted_module_names(unet))
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if tensors[name].ndim >= 1)
    save_file({**tensors, name: torch.zeros(3, 5)}, path)
    with pytest.raises(ExportError, match="does not load back"):
        verify_export(path, inputs["base_model"])
    save_file({name: tensor * 0 if tensor.ndim else tensor for name, tensor in tensors.items()}, path)
    with pytest.raises(ExportError, match="changes nothing"):
        verify_export(path, inputs["base_model"])


def test_verify_export_checks_text_encoder_layers(inputs, tmp_path: Path):
    unet = shared_unet(inputs["base_model"], "lora")
    encoder = load_text_encoders(inputs["base_model"], torch.float32).text_encoder_2
    add_lora(encoder, 2, 2.0, 0.0, ("q_proj",), seed=0)
    path = tmp_path / "adapter.safetensors"
    save_adapter({"unet": unet, "text_encoder_2": encoder}, path)
    changed = len(adapted_module_names(unet)) + len(adapted_module_names(encoder))
    assert verify_export(path, inputs["base_model"]) == changed
    tensors = load_file(path)
    tensors["text_encoder_2.text_model.nowhere.q_proj.lora_A.weight"] = torch.ones(2, 2)
    save_file(tensors, path)
    with pytest.raises(ExportError, match="does not load back"):
        verify_export(path, inputs["base_model"])


@pytest.mark.parametrize(
    ("corruption", "message"),
    [
        ("nan", "NaN or infinity"),
        ("zero", "changes nothing"),
        ("missing tensor", "missing, unexpected"),
        ("unknown layer", "missing, unexpected"),
        ("wrong shape", "does not load back"),
        ("no LoRA", "does not load back"),
        ("half a file", "does not load back"),
    ],
)
def test_verify_export_of_corrupt_file_raises(inputs, tmp_path: Path, corruption: str, message: str):
    tensors = load_file(inputs["lora"].weights_path)
    last = max(name for name in tensors if name.endswith("lora_B.weight"))
    if corruption == "nan":
        tensors[last][0, 0] = torch.nan
    elif corruption == "zero":
        tensors = {name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}
    elif corruption == "missing tensor":
        del tensors[last]
    elif corruption == "unknown layer":
        tensors |= {f"unet.nowhere.to_q.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    elif corruption == "wrong shape":
        tensors[last] = tensors[last][:-1].contiguous()
    elif corruption == "no LoRA":
        tensors = {"weight": torch.ones(3)}
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    if corruption == "half a file":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ExportError, match=message):
        verify_export(path, inputs["base_model"])


def test_uploaded_release_loads_from_hub(release, inputs, monkeypatch, tmp_path: Path):
    folder = release()
    with HubServer() as hub:
        hub.adopt_process(monkeypatch, tmp_path / "hf_home")
        api = HfApi(endpoint=hub.endpoint)
        api.create_repo("someone/zorp", private=True)
        api.upload_folder(repo_id="someone/zorp", folder_path=folder, commit_message="Release")
        assert hub.files("someone/zorp") == {name: (folder / name).read_bytes() for name in files_in(folder)}
        assert ModelCard.load("someone/zorp").data.library_name == "diffusers"

        pipeline: StableDiffusionXLPipeline = load_pipeline(
            inputs["base_model"], torch.float32, text_encoders=False
        )
        pipeline.load_lora_weights("someone/zorp", weight_name=WEIGHTS_FILE)
        assert len(adapted_module_names(pipeline.unet)) == inputs["lora"].adapted_modules


def test_upload_with_invalid_token_raises(release, monkeypatch, tmp_path: Path):
    folder = release()
    with HubServer() as hub:
        hub.adopt_process(monkeypatch, tmp_path / "hf_home", token="hf_revoked")
        hub.add_repo("someone/zorp")
        with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
            HfApi(endpoint=hub.endpoint).upload_folder(repo_id="someone/zorp", folder_path=folder)
        assert hub.files("someone/zorp") == {}


def test_build_release_on_full_disk_writes_nothing(
    release, inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "output").mkdir(exist_ok=True)
    before = files_in(tmp_path / "output")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(DiskFullError, match=r"for the release: .* are needed, 1\.0 MiB are kept in reserve"):
        release()
    assert files_in(tmp_path / "output") == before
