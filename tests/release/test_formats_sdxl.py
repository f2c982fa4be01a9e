"""Kohya's key grammar on SDXL-base's architecture. Base weights are views of a single zero and take no memory; only adapters have values.

The files are read by diffusers itself, and by reimplementations of the key rules of ComfyUI, A1111 and kohya that raise for a skipped key.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_pipeline.models.adapters.lora import add_lora, lora_header, lora_layers, lora_tensors
from sdxl_pipeline.models.base_model import BUNDLED_MODEL, SDXL_BASE_CONFIGS
from sdxl_pipeline.models.sgm_names import sgm_name, sgm_prefixes
from sdxl_pipeline.release.formats import FormatError
from sdxl_pipeline.release.formats.kohya import kohya_layers, kohya_tensors
from sdxl_pipeline.release.formats.layers import (
    ALPHA,
    DOWN,
    UP,
    LayerTable,
    layer_table,
    read_diffusers,
    read_kohya,
)
from sdxl_pipeline.release.formats.weight_updates import update_of
from tests.release.key_readers import (
    UnmatchedKeysError,
    read_as_a1111,
    read_as_comfyui,
    read_as_kohya,
    sgm_modules,
)

ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
TRANSFORMER = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
RESNETS = ["conv1", "conv2", "time_emb_proj", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
ENDS = ["conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"]
ENDS += ["add_embedding.linear_1", "add_embedding.linear_2"]
TARGETS = {
    560: ATTENTION,
    722: TRANSFORMER,
    788: [*TRANSFORMER, *RESNETS],
    794: [*TRANSFORMER, *RESNETS, *ENDS],
}
RANK = 2

M = TypeVar("M", bound=nn.Module)


@pytest.fixture(scope="module")
def table() -> LayerTable:
    return layer_table(SDXL_BASE_CONFIGS)


def without_weights(make: Callable[[], M]) -> M:
    """Return a model on the CPU in which each weight is a view of a single zero."""
    with torch.device("meta"):
        model = make()
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        zeros = nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, zeros)
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.zeros(buffer.shape, dtype=buffer.dtype))
    return model


def base_unet(folder: Path = SDXL_BASE_CONFIGS) -> UNet2DConditionModel:
    config = UNet2DConditionModel.load_config(folder, subfolder="unet")
    return without_weights(lambda: UNet2DConditionModel.from_config(config))


@pytest.fixture(scope="module")
def plain() -> UNet2DConditionModel:
    """Return SDXL-base's UNet for its names; tests must not load anything into it."""
    return base_unet()


def base_encoders() -> dict[str, nn.Module]:
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    configs = {prefix: CLIPTextConfig.from_pretrained(SDXL_BASE_CONFIGS / prefix) for prefix in kinds}
    return {prefix: without_weights(lambda: kind(configs[prefix])) for prefix, kind in kinds.items()}  # noqa: B023


@torch.no_grad()
def add_random_lora(model: M, targets: list[str]) -> M:
    """Add a LoRA with random factors and alpha = rank / 2 to the target layers."""
    add_lora(model, RANK, RANK / 2, 0.0, targets, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def to_kohya_tensors(
    models: Mapping[str, nn.Module], table: LayerTable, dtype: str = "float32"
) -> dict[str, Tensor]:
    """Return the tensors of the kohya file, converted from those of diffusers' file."""
    tensors = {
        name: tensor.detach()
        for prefix, model in models.items()
        for name, tensor in lora_tensors(model, prefix).items()
    }
    trained = read_diffusers(tensors, lora_header(models), table)
    layers, approximation = kohya_layers(trained, base=None)  # type: ignore[arg-type] - no weight is decomposed
    assert approximation is None
    return kohya_tensors(layers, dtype)


def load_with_diffusers(path: Path, unet: UNet2DConditionModel) -> dict[str, LoraLayer]:
    """Load a file into a UNet with diffusers' loader and return the adapted layers."""
    state, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
        str(path.parent), weight_name=path.name, unet_config=unet.config, return_lora_metadata=True
    )
    StableDiffusionXLPipeline.load_lora_into_unet(
        state,
        network_alphas=alphas,
        unet=unet,
        adapter_name="loaded",
        metadata=metadata,
        low_cpu_mem_usage=True,
    )
    return lora_layers(unet)


def modules_of(tensors: Mapping[str, Tensor]) -> set[str]:
    return {name.partition(".")[0] for name in tensors}


@pytest.mark.parametrize("folder", [SDXL_BASE_CONFIGS, BUNDLED_MODEL], ids=["SDXL-base", "bundled"])
def test_sgm_name_equals_checkpoint_name(folder: Path):
    unet = base_unet(folder)
    prefixes = sgm_prefixes(unet.config)
    expected = sgm_modules(unet)
    assert {name: sgm_name(name, prefixes) for name in expected} == expected
    assert sgm_name("conv_inner", prefixes) is None
    assert sgm_name("down_blocks.1.resnets.01.conv1", prefixes) is None


def test_sgm_name_of_sdxl_base_equals_specification():
    prefixes = sgm_prefixes(UNet2DConditionModel.load_config(SDXL_BASE_CONFIGS, subfolder="unet"))
    for name, expected in {
        "down_blocks.0.resnets.1.conv2": "input_blocks.2.0.out_layers.3",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0": "input_blocks.4.1.transformer_blocks.0.attn1.to_out.0",
        "down_blocks.2.resnets.0.conv_shortcut": "input_blocks.7.0.skip_connection",
        "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
        "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
        "up_blocks.1.attentions.2.proj_out": "output_blocks.5.1.proj_out",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.2.resnets.2.conv1": "output_blocks.8.0.in_layers.2",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_out": "out.2",
    }.items():
        assert sgm_name(name, prefixes) == expected


@pytest.mark.parametrize(
    "count",
    [pytest.param(count, marks=[pytest.mark.slow] if count in (722, 788) else []) for count in TARGETS],
)
def test_kohya_tensors_are_loaded_completely_by_every_program(table: LayerTable, tmp_path: Path, count: int):
    unet = add_random_lora(base_unet(), TARGETS[count])
    trained = lora_layers(unet)
    tensors = to_kohya_tensors({"unet": unet}, table)
    assert len(trained) == len(modules_of(tensors)) == count
    assert {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")} == {RANK / 2}
    assert all(tensor.shape == () for name, tensor in tensors.items() if name.endswith(".alpha"))

    plain = base_unet()
    names = sgm_modules(plain)
    expected = {names[name] for name in trained}
    assert set(read_as_comfyui(tensors, plain).values()) == expected
    assert len(set(read_as_a1111(tensors, plain).values())) == count
    if count <= 788:  # kohya's trainer does not adapt the other six layers
        assert set(read_as_kohya(tensors, plain).values()) == expected

    path = tmp_path / "kohya.safetensors"
    save_file(tensors, path)
    loaded = load_with_diffusers(path, plain)
    assert loaded.keys() == trained.keys()
    for name, layer in loaded.items():
        assert layer.scaling["loaded"] == trained[name].scaling["default"] == 0.5
        # equal factors imply equal updates; the updates of some layers are compared below
        for factor in ("lora_A", "lora_B"):
            expected_factor = getattr(trained[name], factor)["default"]
            actual_factor = getattr(layer, factor)["loaded"]
            assert torch.equal(expected_factor.weight, actual_factor.weight)
    for name in sorted(trained)[::40]:
        update = trained[name].get_delta_weight("default")
        assert torch.equal(loaded[name].get_delta_weight("loaded"), update)
        layer = table.diffusers[f"unet.{name}"]
        parts = {part: tensors[f"{layer.kohya}.{part}"] for part in (DOWN, UP, ALPHA)}
        error = (update_of(layer, parts) - update).norm() / update.norm()
        assert error <= 1e-5


def test_diffusers_file_names_are_unknown_to_other_programs(plain: UNet2DConditionModel):
    """ComfyUI loads no attention layer of diffusers' file, which is why the kohya file exists."""
    names = list(lora_tensors(add_random_lora(base_unet(), ATTENTION), "unet"))
    for read in (read_as_comfyui, read_as_a1111, read_as_kohya):
        with pytest.raises(UnmatchedKeysError, match="1120 keys"):
            read(names, plain)


def test_text_encoder_layers_are_loaded_by_every_program(
    table: LayerTable, plain: UNet2DConditionModel, tmp_path: Path
):
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    models = {prefix: add_random_lora(model, targets) for prefix, model in base_encoders().items()}
    tensors = to_kohya_tensors(models, table)
    modules = modules_of(tensors)
    assert sum(name.startswith("lora_te1_") for name in modules) == 12 * 6 == 72
    assert sum(name.startswith("lora_te2_") for name in modules) == 32 * 6 == 192
    assert "lora_te2_text_model_encoder_layers_31_mlp_fc2" in modules
    for read in (read_as_comfyui, read_as_a1111, read_as_kohya):
        assert read(tensors, plain).keys() == modules

    path = tmp_path / "kohya.safetensors"
    save_file(tensors, path)
    state, alphas, _ = StableDiffusionXLPipeline.lora_state_dict(
        str(path.parent), weight_name=path.name, return_lora_metadata=True
    )
    for prefix, fresh in base_encoders().items():
        StableDiffusionXLPipeline.load_lora_into_text_encoder(
            state, alphas, fresh, prefix=prefix, adapter_name="loaded"
        )
        trained, loaded = lora_layers(models[prefix]), lora_layers(fresh)
        assert loaded.keys() == trained.keys()
        for name, layer in loaded.items():
            assert torch.equal(layer.get_delta_weight("loaded"), trained[name].get_delta_weight("default"))


def test_kohya_tensors_keep_rank_and_alpha_of_each_layer(table: LayerTable, tmp_path: Path):
    generator = torch.Generator().manual_seed(1)
    chosen = [layer for layer in table.layers if layer.model == "unet"][::97]
    tensors, alphas = {}, {}
    for index, layer in enumerate(chosen):
        rank, kernel = index % 3 + 1, layer.shape[2:]
        name = f"unet.{layer.module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, layer.shape[1], *kernel, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(
            layer.shape[0], rank, *[1] * len(kernel), generator=generator
        )
        alphas[layer.module] = 0.3 + index
    header: dict[str, Any] = {"unet.r": 2, "unet.lora_alpha": 7.0, "unet.alpha_pattern": alphas}
    mixed = read_diffusers(tensors, {"lora_adapter_metadata": json.dumps(header)}, table)
    for dtype in ("float32", "float16"):
        layers = read_kohya(kohya_tensors(mixed, dtype), table)
        assert {layer.module: pytest.approx(float(parts[ALPHA])) for layer, parts in layers.items()} == alphas
    # diffusers 0.42 replaces an attention layer's alpha by the most common one, so it is tested with a single alpha
    del header["unet.alpha_pattern"]
    trained = read_diffusers(tensors, {"lora_adapter_metadata": json.dumps(header)}, table)
    for dtype in ("float32", "float16"):
        written = kohya_tensors(trained, dtype)
        layers = read_kohya(written, table)
        ranks = [parts[DOWN].shape[0] for parts in layers.values()]
        assert ranks == [index % 3 + 1 for index in range(len(chosen))]
        path = tmp_path / f"{dtype}.safetensors"
        save_file(written, path)
        loaded = load_with_diffusers(path, base_unet())
        for layer, parts in layers.items():
            update = loaded[layer.module].get_delta_weight("loaded").float()
            error = (update_of(layer, parts) - update).norm() / update.norm()
            assert error <= (1e-5 if dtype == "float32" else 2e-3)  # PEFT multiplies in the file's precision


def test_read_diffusers_converts_rank_stabilized_alpha(table: LayerTable):
    layer = table.diffusers["unet.mid_block.attentions.0.proj_in"]
    tensors = {f"unet.{layer.module}.lora_A.weight": torch.ones(4, 1280)}
    tensors[f"unet.{layer.module}.lora_B.weight"] = torch.ones(1280, 4)
    header = {"unet.lora_alpha": 3.0, "unet.use_rslora": True}
    (parts,) = read_diffusers(tensors, {"lora_adapter_metadata": json.dumps(header)}, table).values()
    assert float(parts[ALPHA]) / 4 == 3 / 4**0.5


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda t, name: t.pop(f"{name}.alpha"), r"\(alpha\): a tensor is missing"),
        (lambda t, name: t.pop(f"{name}.lora_up.weight"), r"\(lora_up.weight\): a tensor is missing"),
        (lambda t, name: t.update({f"{name}x.alpha": torch.ones(())}), "no layer of the base model"),
        (
            lambda t, name: t.update({f"{name}.lora_sideways.weight": torch.ones(1)}),
            "no layer of the base model",
        ),
        (
            lambda t, name: t.update({"unet.conv_in.lora_A.weight": torch.ones(1)}),
            "no layer of the base model",
        ),
        (
            lambda t, name: t.update({"lora_unet_conv_in.alpha": torch.ones(())}),  # diffusers' spelling
            "no layer of the base model",
        ),
    ],
)
def test_read_kohya_with_missing_or_unknown_key_raises(table: LayerTable, corrupt, message: str):
    name = "lora_unet_middle_block_1_proj_in"
    tensors = {
        f"{name}.{DOWN}": torch.ones(2, 1280),
        f"{name}.{UP}": torch.ones(1280, 2),
        f"{name}.{ALPHA}": torch.tensor(1.0),
    }
    assert len(read_kohya(tensors, table)) == 1
    corrupt(tensors, name)
    with pytest.raises(FormatError, match=message):
        read_kohya(tensors, table)
