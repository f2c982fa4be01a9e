"""`init_lora`: the adapter starts with the file's values for any format and alpha, or an error gives the reason and the fix."""

from pathlib import Path

import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file

from sdxl_pipeline.config.paths import check_init_lora
from sdxl_pipeline.models.adapters.adapter import (
    UNET,
    AdapterError,
    add_adapter,
    add_lora,
    load_adapter,
    save_adapter,
)
from sdxl_pipeline.models.adapters.init_adapter import load_init_adapter
from sdxl_pipeline.models.adapters.init_adapter_source import find_initial_adapter, initial_adapter_digest
from sdxl_pipeline.models.adapters.lora import lora_tensors
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import load_text_encoders, load_unet
from tests.models.adapted_unets import EVERY_KIND, lycoris, output, settings_of, shared_unet
from tests.support.hub_server import HubServer


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "first.safetensors"


def load_unet_from(model: ResolvedModel, path: Path, kind: str, dtype: torch.dtype = torch.float32, **more):
    unet = load_unet(model, dtype)
    add_adapter(unet, settings_of(kind, **more), seed=1)
    load_init_adapter({UNET: unet}, path)
    return unet


@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_upper_case_suffix_is_accepted(random_filled: ResolvedModel, tmp_path: Path, kind: str):
    file = tmp_path / "FIRST.SAFETENSORS"
    unet = shared_unet(random_filled, kind)
    save_adapter({UNET: unet}, file)
    assert list(check_init_lora(str(file), tmp_path)) == []
    assert initial_adapter_digest(str(find_initial_adapter(file.name, tmp_path)))
    assert torch.equal(output(load_unet_from(random_filled, file, kind)), output(unet))
    loaded = load_unet(random_filled, torch.float32)
    load_adapter({UNET: loaded}, file)
    torch.testing.assert_close(output(loaded), output(unet), rtol=0, atol=5e-6)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_init_adapter_equals_the_saved_adapter(random_filled: ResolvedModel, file: Path, kind: str):
    unet = shared_unet(random_filled, kind)
    save_adapter({UNET: unet}, file)
    reloaded = load_unet_from(random_filled, file, kind)
    if "scalar" in kind:  # the scale is multiplied into the file, and is initialized with one
        torch.testing.assert_close(output(reloaded), output(unet), rtol=0, atol=5e-6)
    else:
        assert torch.equal(output(reloaded), output(unet))
    save_adapter({UNET: reloaded}, file.with_name("again.safetensors"))
    assert file.with_name("again.safetensors").read_bytes() == file.read_bytes()


def test_init_adapter_preserves_strength_for_another_lora_alpha(random_filled: ResolvedModel, file: Path):
    unet = shared_unet(random_filled, "lora, alpha above rank")
    save_adapter({UNET: unet}, file)
    reloaded = load_unet_from(random_filled, file, "lora, alpha above rank", lora_alpha=3)
    torch.testing.assert_close(output(reloaded), output(unet), rtol=0, atol=5e-6)


def test_init_adapter_keeps_float32_values_on_a_bf16_base(random_filled: ResolvedModel, file: Path):
    unet = shared_unet(random_filled, "dora")
    save_adapter({UNET: unet}, file)
    tensors = lora_tensors(load_unet_from(random_filled, file, "dora", torch.bfloat16), UNET)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in load_file(file).items())


def test_init_adapter_of_a_dora_from_a_lora(random_filled: ResolvedModel, file: Path):
    unet = shared_unet(random_filled, "lora")
    save_adapter({UNET: unet}, file)
    reloaded = load_unet_from(random_filled, file, "lora", use_dora=True)
    torch.testing.assert_close(output(reloaded), output(unet), rtol=0, atol=5e-6)


def kohya_file(unet: torch.nn.Module, path: Path, alpha: float) -> None:
    """Write a LoRA with kohya's names."""
    tensors = {
        name.replace("unet.", "base_model.model.", 1): tensor
        for name, tensor in lora_tensors(unet, UNET).items()
    }
    named = {
        name.replace("lora_te", "lora_unet").replace("base_model_model_", "lora_unet_"): tensor
        for name, tensor in convert_state_dict_to_kohya(tensors).items()
    }
    for name in [name for name in named if name.endswith(".alpha")]:
        named[name] = torch.tensor(alpha)
    save_file({name: tensor.contiguous() for name, tensor in named.items()}, path)


def test_init_adapter_reads_kohya_files_with_their_alpha(random_filled: ResolvedModel, file: Path):
    unet = shared_unet(random_filled, "lora, alpha above rank")
    kohya_file(unet, file, alpha=10)
    assert torch.equal(output(load_unet_from(random_filled, file, "lora, alpha above rank")), output(unet))


def test_init_adapter_reads_lycoris_files_of_kohyas_trainer(random_filled: ResolvedModel, file: Path):
    unet = shared_unet(random_filled, "loha")
    save_adapter({UNET: unet}, file)
    save_file({name.replace("lycoris_", "lora_unet_", 1): t for name, t in load_file(file).items()}, file)
    assert torch.equal(output(load_unet_from(random_filled, file, "loha")), output(unet))


@pytest.mark.parametrize(
    ("first", "then", "more", "message"),
    [
        ("lora", "lora", {"lora_rank": 8}, r"another rank.*Set lora_rank to 4"),
        ("lora", "lora", {"lora_target_modules": ["to_q"]}, r"not trained here.*lora_target_modules"),
        (
            "lora",
            "lora",
            {"lora_target_modules": ["to_k", "to_q", "to_v", "to_out.0", "conv1"]},
            "contains nothing for",
        ),
        ("dora", "lora", {}, "is a DoRA. Set use_dora to true"),
        ("lora", "lokr", {}, "no LyCORIS adapter. Set lora_type to standard"),
        ("lokr", "lora", {}, "a LyCORIS adapter. Set lora_type to lycoris"),
        ("lokr", "lokr", lycoris("lokr", factor=4, linear_alpha=2), r"alpha of .* is 1, and 2 here"),
        ("lokr", "lokr", lycoris("lokr", factor=2), "another rank"),
        ("loha", "lokr", {}, "contains nothing for"),
    ],
)
def test_init_adapter_of_another_shape_raises_with_the_fix(
    random_filled: ResolvedModel, file: Path, first, then, more, message
):
    save_adapter({UNET: shared_unet(random_filled, first)}, file)
    with pytest.raises(AdapterError, match=f"(?s)init_lora.*{message}"):
        load_unet_from(random_filled, file, then, **more)


def test_init_adapter_with_untrained_text_encoder_raises(random_filled: ResolvedModel, file: Path):
    encoder = load_text_encoders(random_filled, torch.float32).text_encoder
    add_lora(encoder, 4, 4, 0.0, ["q_proj"], seed=0)
    unet = shared_unet(random_filled, "lora")
    save_adapter({UNET: unet, "text_encoder": encoder}, file)
    with pytest.raises(
        AdapterError,
        match="adapter of the text encoder, which is not trained; set train_text_encoder to true",
    ):
        load_unet_from(random_filled, file, "lora")
    reloaded = load_text_encoders(random_filled, torch.float32).text_encoder
    add_lora(reloaded, 4, 4, 0.0, ["q_proj"], seed=2)
    fresh = load_unet(random_filled, torch.float32)
    add_adapter(fresh, settings_of("lora"), seed=1)
    load_init_adapter({UNET: fresh, "text_encoder": reloaded}, file)
    one, other = lora_tensors(encoder, "text_encoder"), lora_tensors(reloaded, "text_encoder")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_init_adapter_of_kohyas_dora_raises(random_filled: ResolvedModel, file: Path):
    kohya_file(shared_unet(random_filled, "lora"), file, alpha=4)
    tensors = load_file(file)
    name = next(iter(tensors)).split(".")[0]
    save_file({**tensors, f"{name}.dora_scale": torch.ones(4, 1)}, file)
    with pytest.raises(AdapterError, match="DoRA in kohya's format"):
        load_unet_from(random_filled, file, "lora", use_dora=True)


def test_init_adapter_opens_only_existing_safetensors(tmp_path: Path):
    (tmp_path / "lora.bin").write_bytes(b"x")
    with pytest.raises(AdapterError, match="they could run code"):
        initial_adapter_digest(str(tmp_path / "lora.bin"))
    (tmp_path / "lora.safetensors").write_bytes(b"x")
    with pytest.raises(AdapterError, match="cannot be read as safetensors"):
        initial_adapter_digest(str(tmp_path / "lora.safetensors"))
    with pytest.raises(AdapterError, match="does not exist"):
        find_initial_adapter(str(tmp_path / "absent.safetensors"), tmp_path)
    with pytest.raises(AdapterError, match="does not exist"):
        find_initial_adapter("loras/absent.safetensors", tmp_path)


def test_find_initial_adapter_on_the_hub_by_name_or_as_the_only_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, files in {"one": ["zorp"], "two": ["a", "b"]}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"# {name}")
        for file in files:
            save_file(
                {f"unet.{file}.lora_A.weight": torch.ones(1, 1)}, tmp_path / name / f"{file}.safetensors"
            )
    with HubServer() as hub:
        hub.adopt_process(monkeypatch, tmp_path / "hf_home")
        for name in ("one", "two"):
            hub.add_repo(f"someone/{name}", tmp_path / name)
        only = find_initial_adapter("someone/one", tmp_path)
        assert only.read_bytes() == (tmp_path / "one" / "zorp.safetensors").read_bytes()
        named = find_initial_adapter("someone/two/b.safetensors", tmp_path)
        assert named.read_bytes() == (tmp_path / "two" / "b.safetensors").read_bytes()
        with pytest.raises(AdapterError, match=r"has no pytorch_lora.*Its \.safetensors files: a.*, b"):
            find_initial_adapter("someone/two", tmp_path)
        with pytest.raises(AdapterError, match="init_lora: someone/none is not a repository"):
            find_initial_adapter("someone/none", tmp_path)
