"""Merge, extract and resize on the bundled model: equal to PEFT's and LyCORIS' own results, and the printed error is that of the file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from sdxl_pipeline.files.atomic_files import sha256_file
from sdxl_pipeline.models.adapters.adapter import UNET, add_lora, save_adapter
from sdxl_pipeline.models.adapters.adapter_files import AdapterError
from sdxl_pipeline.models.base_model import BUNDLED_MODEL
from sdxl_pipeline.models.components import load_pipeline, load_text_encoders, load_unet, load_vae
from sdxl_pipeline.release.adapter_sources import AdapterSource, read_adapter, resolve_named_model
from sdxl_pipeline.release.formats import FormatError
from sdxl_pipeline.release.formats.layers import DOWN, layer_table, read_kohya
from sdxl_pipeline.release.formats.weight_updates import BaseWeights, updates
from sdxl_pipeline.release.low_rank_tools import (
    product_svd,
    rank_for_error,
    write_extracted,
    write_resized,
    write_sum,
)
from sdxl_pipeline.release.merge import merge_into
from tests.models.adapted_unets import adapted_unet, output, settings_of
from tests.models.original_layout import (
    first_text_tensors,
    second_text_tensors,
    unet_tensors,
    vae_tensors,
    write_checkpoint,
)

KINDS = ("lora, alpha above rank", "lora, gaussian, convolutions", "dora", "lokr")


class Files:
    """The bundled model in float32 as a folder and as a single file, and an adapter of each kind with the output of its UNet."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder, self.single = root, root / "base", root / "single.safetensors"
        shutil.copytree(BUNDLED_MODEL, self.folder, ignore=shutil.ignore_patterns(UNET))
        bundled = resolve_named_model(str(BUNDLED_MODEL))
        load_unet(bundled, torch.float32).save_pretrained(self.folder / UNET)
        self.model = resolve_named_model(str(self.folder))
        self.table = layer_table(self.model.config_path)
        encoders = load_text_encoders(self.model, torch.float32)
        write_checkpoint(
            self.single,
            unet_tensors(load_unet(self.model, torch.float32))
            | vae_tensors(load_vae(self.model, torch.float32))
            | first_text_tensors(encoders.text_encoder)
            | second_text_tensors(encoders.text_encoder_2),
        )
        self.single.with_suffix("").symlink_to(BUNDLED_MODEL)
        self.outputs = {"base": output(load_unet(self.model, torch.float32))}
        for kind in KINDS:
            unet = adapted_unet(self.model, settings_of(kind))
            self.outputs[kind] = output(unet)
            save_adapter({UNET: unet}, self.path(kind))

    def path(self, kind: str) -> Path:
        return self.root / f"{kind.replace(', ', '-').replace(' ', '_')}.safetensors"

    def source(self, kind: str, scale: float = 1.0) -> AdapterSource:
        return read_adapter(self.path(kind), scale, self.table)

    def deltas(self, *kinds: tuple[str, float]) -> dict[str, torch.Tensor]:
        """Return scale * update of each layer, summed over the adapters."""
        total: dict[str, torch.Tensor] = {}
        with BaseWeights(self.model) as base:
            for kind, scale in kinds:
                for layer, update in updates(self.source(kind).layers, base):
                    total[layer.module] = total.get(layer.module, 0) + scale * update
        return total


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tools"))


def read_updates(path: Path, files: Files) -> dict[str, torch.Tensor]:
    layers = read_kohya(load_file(path), files.table)
    return {layer.module: update for layer, update in updates(layers)}


def relative_error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    squared = sum(float((found[name] - exact[name]).norm()) ** 2 for name in exact)
    return (squared / sum(float(update.norm()) ** 2 for update in exact.values())) ** 0.5


@pytest.mark.parametrize("kind", ["lora, alpha above rank", "dora", "lokr"])
def test_merged_folder_equals_the_adapted_model(files: Files, tmp_path: Path, kind: str):
    changed = merge_into(tmp_path / "merged", [files.source(kind)], files.model)
    merged = resolve_named_model(str(tmp_path / "merged"))
    assert changed == len(files.source(kind).layers)
    actual = output(load_unet(merged, torch.float32))
    torch.testing.assert_close(actual, files.outputs[kind], rtol=0, atol=1e-4)
    assert (actual - files.outputs["base"]).abs().max() > 1e-3
    assert merged.text_digest == files.model.text_digest
    assert merged.vae_digest == files.model.vae_digest


def test_merged_single_files_equal_the_adapted_model(files: Files, tmp_path: Path):
    kind = "lora, gaussian, convolutions"
    for name, base in (("of_file", resolve_named_model(str(files.single))), ("of_folder", files.model)):
        path = tmp_path / f"{name}.safetensors"
        path.with_suffix("").symlink_to(BUNDLED_MODEL)
        merge_into(path, [files.source(kind)], base)
        merged = resolve_named_model(str(path))
        actual = output(load_unet(merged, torch.float32))
        torch.testing.assert_close(actual, files.outputs[kind], rtol=0, atol=1e-4)
    before, after = load_file(files.single), load_file(tmp_path / "of_file.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == len(files.source(kind).layers)
    assert all(before[name].dtype == after[name].dtype for name in before)


def test_merge_with_scales_adds_the_weighted_updates(files: Files, tmp_path: Path):
    kinds = (("lora, alpha above rank", 0.5), ("dora", -0.25), ("lokr", 2.0))
    merge_into(tmp_path / "merged", [files.source(kind, scale) for kind, scale in kinds], files.model)
    expected = files.deltas(*kinds)
    before, after = (
        UNet2DConditionModel.from_pretrained(folder / UNET).state_dict()
        for folder in (files.folder, tmp_path / "merged")
    )
    for name, weight in before.items():
        delta = expected.get(name.removesuffix(".weight"), torch.zeros(()))
        torch.testing.assert_close(after[name], weight + delta, rtol=1e-6, atol=1e-6)


def text_lora(files: Files, path: Path) -> dict[str, torch.Tensor]:
    """Save a LoRA of both text encoders; return the hidden states that PEFT's own merge gives."""
    encoders = load_text_encoders(files.model, torch.float32)
    models = {"text_encoder": encoders.text_encoder, "text_encoder_2": encoders.text_encoder_2}
    unet = load_unet(files.model, torch.float32)
    add_lora(
        unet, 1, 1.0, 0.0, ["mid_block.attentions.0.proj_in"], seed=0
    )  # untrained, so it changes nothing
    for seed, model in enumerate(models.values()):
        add_lora(model, 4, 8.0, 0.0, ["q_proj", "v_proj", "out_proj", "fc1"], seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_adapter({UNET: unet, **models}, path)
    return hidden_states(encoders)


@torch.no_grad()
def hidden_states(encoders) -> dict[str, torch.Tensor]:
    ids = encoders.tokenizer("a red circle", padding="max_length", return_tensors="pt").input_ids
    models = (encoders.text_encoder, encoders.text_encoder_2)
    return {str(i): model.eval()(ids).last_hidden_state for i, model in enumerate(models)}


def test_merged_text_encoders_equal_the_adapted_ones(files: Files, tmp_path: Path):
    expected = text_lora(files, tmp_path / "text.safetensors")
    source = read_adapter(tmp_path / "text.safetensors", 1.0, files.table)
    (tmp_path / "file").symlink_to(BUNDLED_MODEL)
    merge_into(tmp_path / "file.safetensors", [source], resolve_named_model(str(files.single)))
    merge_into(tmp_path / "folder", [source], files.model)
    base = hidden_states(load_text_encoders(files.model, torch.float32))
    for name in ("file.safetensors", "folder"):
        merged = hidden_states(load_text_encoders(resolve_named_model(str(tmp_path / name)), torch.float32))
        for key, state in expected.items():
            # the bundled text encoders are stored in float16
            torch.testing.assert_close(merged[key], state, rtol=0, atol=0.02)
            assert (merged[key] - base[key]).abs().max() > 0.2


def test_merge_overflow_of_the_stored_type_is_refused(files: Files, tmp_path: Path):
    with pytest.raises(FormatError, match=r"not finite in torch\.float16; lower the adapters' scales"):
        merge_into(tmp_path / "merged", [files.source("lokr", 1e9)], resolve_named_model(str(BUNDLED_MODEL)))
    assert not list(tmp_path.iterdir())


def test_merge_never_overwrites(files: Files, tmp_path: Path):
    source, digest = files.source("lokr"), sha256_file(files.single)
    for target in (files.single, files.folder):
        with pytest.raises(FormatError, match="exists and is not overwritten"):
            merge_into(target, [source], files.model)
    assert sha256_file(files.single) == digest
    with pytest.raises(FormatError, match="from which no folder is written"):
        merge_into(tmp_path / "folder", [source], resolve_named_model(str(files.single)))


def test_sum_of_plain_loras_is_exact(files: Files, tmp_path: Path):
    kinds = (("lora, alpha above rank", 0.7), ("lora, gaussian, convolutions", -0.3))
    path = tmp_path / "sum.safetensors"
    sources = [files.source(kind, scale) for kind, scale in kinds]
    result = write_sum(path, sources, files.table, None, None, "float32")
    exact = files.deltas(*kinds)
    found = read_updates(path, files)
    assert found.keys() == exact.keys()
    assert relative_error(found, exact) < 1e-6
    assert result.relative_error < 1e-6
    assert result.rank == 8
    # diffusers reads the file as the sum too
    unet = load_unet(files.model, torch.float32)
    pipeline = load_pipeline(files.model, torch.float32, unet=unet, text_encoders=False)
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    merge_into(tmp_path / "merged", sources, files.model)
    merged = load_unet(resolve_named_model(str(tmp_path / "merged")), torch.float32)
    torch.testing.assert_close(output(unet), output(merged), rtol=0, atol=1e-4)


def test_sum_of_few_loras_is_not_written_over_an_input(files: Files):
    digest = sha256_file(files.path("lokr"))
    with pytest.raises(FormatError, match="exists and is not overwritten"):
        write_sum(files.path("lokr"), [files.source("lokr")], files.table, None, 4, "auto")
    assert sha256_file(files.path("lokr")) == digest


def test_sum_with_other_kinds_needs_rank_and_base(files: Files, tmp_path: Path):
    path = tmp_path / "sum.safetensors"
    kinds = (("dora", 0.5), ("lokr", 1.0), ("lora, alpha above rank", 1.0))
    sources = [files.source(kind, scale) for kind, scale in kinds]
    with pytest.raises(FormatError, match="add --base with the base model"):
        write_sum(path, sources, files.table, None, 8, "auto")
    with BaseWeights(files.model) as base:
        with pytest.raises(FormatError, match="add --rank"):
            write_sum(path, sources, files.table, base, None, "auto")
        assert not path.exists()
        result = write_sum(path, sources, files.table, base, 8, "float32")
    measured = relative_error(read_updates(path, files), files.deltas(*kinds))
    assert measured == pytest.approx(result.relative_error, rel=1e-4)
    assert 0 < measured < 1


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("lora, gaussian, convolutions", "float16"), ("dora", "float32"), ("lokr", "float32")],
)
def test_resize_to_rank_reports_the_error_of_the_file(files: Files, tmp_path: Path, kind: str, dtype: str):
    path = tmp_path / "small.safetensors"
    with BaseWeights(files.model) as base:
        result = write_resized(path, files.source(kind), files.table, base, 2, None, dtype)
    exact, found = files.deltas((kind, 1.0)), read_updates(path, files)
    measured = relative_error(found, exact)
    assert measured == pytest.approx(result.relative_error, rel=1e-3)
    # no rank-2 update is nearer: Eckart and Young
    best = {}
    for name, update in exact.items():
        left, values, rows = torch.linalg.svd(update.flatten(1), full_matrices=False)
        best[name] = ((left[:, :2] * values[:2]) @ rows[:2]).reshape(update.shape)
    assert measured == pytest.approx(relative_error(best, exact), rel=0.01, abs=1e-3)
    assert {parts[DOWN].shape[0] for parts in read_kohya(load_file(path), files.table).values()} == {2}
    name, error = max(result.layer_errors.items(), key=lambda item: item[1])
    module = name.removeprefix("unet.")
    assert error == pytest.approx(relative_error({module: found[module]}, {module: exact[module]}), rel=1e-3)


@pytest.mark.parametrize("kind", ["lora, alpha above rank", "lokr"])
def test_resize_to_error_keeps_every_layer_below_it(files: Files, tmp_path: Path, kind: str):
    path = tmp_path / "small.safetensors"
    with BaseWeights(files.model) as base:
        result = write_resized(path, files.source(kind), files.table, base, None, 0.3, "float32")
    exact, found = files.deltas((kind, 1.0)), read_updates(path, files)
    assert all((found[name] - update).norm() <= 0.3 * update.norm() + 1e-6 for name, update in exact.items())
    assert relative_error(found, exact) <= 0.3
    assert result.relative_error <= 0.3
    layers = read_kohya(load_file(path), files.table)
    assert len({float(parts["alpha"]) for parts in layers.values()}) == 1


def test_resize_to_error_below_rounding_names_the_type(files: Files, tmp_path: Path):
    path = tmp_path / "small.safetensors"
    with pytest.raises(FormatError, match="add --dtype float32"):
        write_resized(path, files.source("lokr"), files.table, None, None, 1e-6, "bfloat16")
    assert not path.exists()


@pytest.mark.parametrize("as_unet", [True, False])
def test_extract_finds_a_low_rank_change_exactly(files: Files, tmp_path: Path, as_unet: bool):
    kind = "lora, gaussian, convolutions"
    merge_into(tmp_path / "tuned", [files.source(kind)], files.model)
    tuned = tmp_path / "tuned" / UNET if as_unet else tmp_path / "tuned"
    path = tmp_path / "extracted.safetensors"
    result, others = write_extracted(path, str(tuned), files.model, files.table, 4, "float32")
    assert others == 0
    assert result.relative_error < 1e-3
    found, exact = read_updates(path, files), files.deltas((kind, 1.0))
    assert found.keys() == exact.keys()
    assert relative_error(found, exact) < 1e-3


def test_extract_from_full_fine_tune_reports_error_and_other_weights(files: Files, tmp_path: Path):
    unet = load_unet(files.model, torch.float32)
    generator = torch.Generator().manual_seed(0)
    before = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    unet.save_pretrained(tmp_path / "unet", max_shard_size="2MB")
    path = tmp_path / "extracted.safetensors"
    result, others = write_extracted(path, str(tmp_path / "unet"), files.model, files.table, 8, "float32")
    assert others == sum(value.ndim < 2 for value in before.values())
    found = read_updates(path, files)
    exact = {name: unet.get_parameter(f"{name}.weight").detach() - before[f"{name}.weight"] for name in found}
    assert relative_error(found, exact) == pytest.approx(result.relative_error, rel=1e-4)
    assert 0.5 < result.relative_error < 1, "noise has full rank"


def test_extract_equal_model_is_refused(files: Files, tmp_path: Path):
    with pytest.raises(FormatError, match="nothing to extract"):
        write_extracted(tmp_path / "out.safetensors", str(files.folder), files.model, files.table, 4, "auto")


def test_written_header_has_sources_without_folders(files: Files, tmp_path: Path):
    path = tmp_path / "small.safetensors"
    write_resized(path, files.source("lokr"), files.table, None, 4, None, "auto")
    data = path.read_bytes()
    assert str(files.root).encode() not in data
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    origin = json.loads(header["origin"])
    assert origin["sources"] == [
        {"file": "lokr.safetensors", "sha256": sha256_file(files.path("lokr")), "scale": 1.0}
    ]
    assert header["ss_network_dim"] == "4"


def test_unreadable_adapters_are_refused_with_their_name(files: Files, tmp_path: Path):
    tensors = load_file(files.path("lokr"))
    save_file({**tensors, "lycoris_elsewhere.lokr_w1": torch.zeros(1)}, tmp_path / "unknown.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(files.path("lokr").read_bytes()[:-9])
    (tmp_path / "pickle.pt").write_bytes(b"")
    name = next(name for name in tensors if name.endswith("lokr_w1"))
    save_file(tensors | {name: tensors[name] * float("nan")}, tmp_path / "nan.safetensors")
    for file, message in (
        ("unknown.safetensors", "unknown.safetensors: lycoris_elsewhere.lokr_w1: no layer"),
        ("cut.safetensors", "cannot be read as safetensors"),
        ("pickle.pt", "is not a .safetensors file"),
        ("nan.safetensors", "holds NaN or infinity"),
        ("absent.safetensors", "does not exist"),
    ):
        with pytest.raises((FormatError, AdapterError), match=message):
            read_adapter(tmp_path / file, 1.0, files.table)


def test_product_svd_equals_the_svd_of_the_product():
    generator = torch.Generator().manual_seed(0)
    for rows, rank, columns in ((20, 4, 30), (3, 8, 5)):
        up, down = (
            torch.randn(rows, rank, generator=generator),
            torch.randn(rank, columns, generator=generator),
        )
        left, values, right = product_svd(up, down)
        torch.testing.assert_close(left @ torch.diag(values) @ right.T, up @ down)
        expected = torch.linalg.svdvals(up @ down)[: len(values)]
        torch.testing.assert_close(values[: len(expected)], expected, rtol=1e-4, atol=1e-5)


def test_rank_for_error_is_the_lowest_sufficient_rank():
    values = torch.tensor([2.0, 1.0, 1.0, 0.0])  # squares 4, 1, 1, 0
    assert [rank_for_error(values, error) for error in (0.99, 0.58, 0.41, 0.40, 1e-9)] == [1, 1, 2, 3, 3]
