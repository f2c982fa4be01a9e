"""The kohya file of the bundled model: equal to the trained model in every program, described by its header, and refused by the check
before the release if it would be loaded partly or wrongly.
"""

import base64
import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_pipeline.files.atomic_files import sha256_file
from sdxl_pipeline.models.adapters.adapter import (
    UNET,
    adapted_module_names,
    add_adapter,
    load_adapter,
    save_adapter,
)
from sdxl_pipeline.models.adapters.init_adapter import load_init_adapter
from sdxl_pipeline.models.base_model import resolve_base_model
from sdxl_pipeline.models.components import load_pipeline, load_unet
from sdxl_pipeline.release.formats import FormatError
from sdxl_pipeline.release.formats.format_check import check_files
from sdxl_pipeline.release.formats.kohya import kohya_layers, low_rank, read_trained
from sdxl_pipeline.release.formats.kohya_file import KohyaFile, ensure_kohya_file, kohya_file_name
from sdxl_pipeline.release.formats.kohya_header import THUMBNAIL_BYTES, thumbnail_uri
from sdxl_pipeline.release.formats.layers import layer_table
from sdxl_pipeline.release.formats.weight_updates import BaseWeights, updates
from sdxl_pipeline.runtime.specs import TrainedLora, TrainSpec
from tests.models.adapted_unets import EVERY_KIND, KINDS, output, settings_of, shared_unet
from tests.models.original_layout import (
    first_text_tensors,
    second_text_tensors,
    unet_tensors,
    vae_tensors,
    write_checkpoint,
)
from tests.release.key_readers import read_as_a1111, read_as_comfyui
from tests.support.training_datasets import make_dataset, make_spec

DECOMPOSED = [kind for kind in EVERY_KIND if "dora" in str(kind.id) or "norms" in str(kind.id)]


class Run:
    """A finished run of the bundled model: its spec, its manifest and the trained UNet."""

    def __init__(self, folder: Path, kind: str, **settings: object):
        self.spec: TrainSpec = make_spec(
            folder, make_dataset(folder / "dataset", captions=2), **{**KINDS[kind], **settings}
        )
        self.unet = shared_unet(self.spec.base_model, kind)
        path = Path(self.spec.run_dir) / "pytorch_lora_weights.safetensors"
        save_adapter({UNET: self.unet}, path)
        self.manifest = TrainedLora(
            identity="abc123",
            run_dir=self.spec.run_dir,
            weights_path=str(path),
            weights_sha256=sha256_file(path),
            steps=2,
            epochs=0.5,
            samples=4,
            resumed_from_step=None,
            reused=False,
            final_loss=0.25,
            seconds=10.0,
            steps_per_second=4.0,
            peak_memory_bytes=1,
            trainable_parameters=1,
            adapted_modules=len(adapted_module_names(self.unet)),
            metrics_path="",
            loss_curve_path="",
            validation_sheet_path=None,
            validation_images=(),
        )

    @property
    def weights(self) -> Path:
        return Path(self.manifest.weights_path)

    def write(self, thumbnail: Path | None = None, **settings: object) -> KohyaFile:
        updated = self.spec.settings.model_copy(update=settings)
        spec = self.spec.model_copy(update={"settings": updated})
        return ensure_kohya_file(spec, self.manifest, self.weights, thumbnail)

    def manifest_with(self, file: KohyaFile) -> TrainedLora:
        return self.manifest.model_copy(
            update={
                "kohya_path": str(file.path),
                "kohya_sha256": sha256_file(file.path),
                "kohya_dtype": file.dtype,
            }
        )

    def check(self, file: KohyaFile) -> str:
        return check_files(self.manifest_with(file), self.spec.base_model, "both")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a run shared by the tests that do not modify its files."""
    run = Run(tmp_path_factory.mktemp("lora"), "lora")
    run.write()
    return run


def write_tensors(run: Run, path: Path, tensors: dict[str, Tensor]) -> KohyaFile:
    """Write tensors with the header of the run's kohya file."""
    file = run.write()
    save_file(tensors, path, metadata_of(file.path))
    return replace(file, path=path)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("kind", [kind for kind in EVERY_KIND if kind not in DECOMPOSED])
def test_kohya_file_equals_trained_model_in_every_program(tmp_path: Path, kind: str):
    run = Run(tmp_path, kind)
    file = run.write(lora_export_dtype="float32")
    assert file.path == run.weights.with_name("small.safetensors")
    assert f"{run.manifest.adapted_modules} of {run.manifest.adapted_modules}" in run.check(file)
    expected = output(run.unet)
    tensors = load_file(file.path)
    plain = load_unet(run.spec.base_model, torch.float32)
    modules = {name.partition(".")[0] for name in tensors}
    assert len(modules) == run.manifest.adapted_modules
    assert read_as_comfyui(tensors, plain).keys() == read_as_a1111(tensors, plain).keys() == modules

    if "lora_type" in KINDS[kind]:  # lycoris-lora expects diffusers' names after its own prefix
        from lycoris import create_lycoris_from_weights

        table = layer_table(run.spec.base_model.config_path)
        names = {layer.kohya: f"lycoris_{layer.module.replace('.', '_')}" for layer in table.layers}
        renamed = {f"{names[n.partition('.')[0]]}.{n.partition('.')[2]}": t for n, t in tensors.items()}
        network, _ = create_lycoris_from_weights(1.0, "", plain, weights_sd=renamed)
        network.apply_to()
        assert len(network.loras) == run.manifest.adapted_modules
    else:
        pipeline = load_pipeline(run.spec.base_model, torch.float32, unet=plain, text_encoders=False)
        pipeline.load_lora_weights(str(file.path.parent), weight_name=file.path.name)
        assert adapted_module_names(plain) == adapted_module_names(run.unet)
    torch.testing.assert_close(output(plain), expected, rtol=0, atol=1e-4)

    # init_lora also reads the file
    resumed = load_unet(run.spec.base_model, torch.float32)
    add_adapter(resumed, settings_of(kind), seed=9)
    load_init_adapter({UNET: resumed}, file.path)
    torch.testing.assert_close(output(resumed), expected, rtol=0, atol=1e-4)


def test_kohya_file_and_diffusers_file_generate_same_image(tmp_path: Path):
    run = Run(tmp_path, "lora, alpha above rank")
    file = run.write()
    assert file.dtype == "float16"
    images = []
    for path in (run.weights, file.path, None):
        pipeline = load_pipeline(run.spec.base_model, torch.float32)
        if path is not None:
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
        image = pipeline(
            "a red circle",
            height=64,
            width=64,
            num_inference_steps=4,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(3),
            output_type="pt",
        ).images[0]
        images.append((image * 255).round().to(torch.int16))
    assert (images[0] - images[1]).abs().max() <= 1
    assert (images[0] - images[2]).abs().max() > 1


def test_kohya_header_describes_the_adapter(tmp_path: Path):
    run = Run(tmp_path, "lora, alpha above rank", instance_prompt="Shapes 0", seed=7)
    Image.new("RGB", (640, 320), "teal").save(tmp_path / "image.png")
    file = run.write(thumbnail=tmp_path / "image.png")
    header = metadata_of(file.path)
    expected = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "small",
        "modelspec.prediction_type": "epsilon",
        "modelspec.trigger_phrase": "Shapes 0",
        "trained_words": "Shapes 0",
        "ss_v2": "False",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "10.0",
        "ss_output_name": "small",
        "ss_steps": "2",
        "ss_seed": "7",
        "ss_num_train_images": "5",
        "ss_num_reg_images": "0",
        "ss_learning_rate": "0.001",
        "ss_resolution": "64,64",
    }
    assert {name: header[name] for name in expected} == expected
    assert json.loads(header["ss_bucket_info"])["buckets"]["1"] == {"resolution": [96, 64], "count": 2}
    assert "ss_tag_frequency" not in header
    assert "ss_dataset_dirs" not in header
    everything = file.path.read_bytes()
    assert str(tmp_path).encode() not in everything
    assert b"shapes 0 0" not in everything  # a caption

    length = int.from_bytes(everything[:8], "little")
    digest = hashlib.sha256(everything[8 + length :]).hexdigest()
    assert header["sshs_model_hash"] == digest
    assert header["modelspec.hash_sha256"] == f"0x{digest}"
    assert len(header["sshs_legacy_hash"]) == 8
    kind, _, encoded = header["modelspec.thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as thumbnail:
        assert thumbnail.size == (256, 128)


def test_trigger_words_exclude_instance_prompt_without_caption(tmp_path: Path):
    header = metadata_of(Run(tmp_path, "lora", instance_prompt="a zorp").write().path)
    assert "modelspec.trigger_phrase" not in header
    assert "trained_words" not in header


def test_metadata_include_captions_writes_tags_and_folders(tmp_path: Path):
    run = Run(tmp_path, "lora")
    header = metadata_of(run.write(metadata_include_captions=True).path)
    frequencies = json.loads(header["ss_tag_frequency"])
    captions = pd.read_parquet(run.spec.datasets[0].text_embeds.entries_path)["caption"]
    assert frequencies == {"images": dict.fromkeys(captions, 1)}
    assert json.loads(header["ss_dataset_dirs"]) == {"images": {"n_repeats": 1, "img_count": 5}}


def test_model_hash_depends_on_tensors_only(tmp_path: Path):
    first = Run(tmp_path / "one", "lora")
    second = Run(tmp_path / "two", "lora")
    one = first.write()
    os.utime(second.weights, (1e9, 1e9))
    two = second.write()
    assert metadata_of(two.path)["modelspec.date"] == "2001-09-09T01:46:40+00:00"
    assert metadata_of(one.path)["modelspec.date"] != metadata_of(two.path)["modelspec.date"]
    assert metadata_of(one.path)["sshs_model_hash"] == metadata_of(two.path)["sshs_model_hash"]


def test_thumbnail_uri_of_noise_is_below_limit(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 255, (1024, 1024, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(noise.numpy()).resize((256, 256)).save(tmp_path / "noise.png")
    assert len(thumbnail_uri(tmp_path / "noise.png")) < THUMBNAIL_BYTES


def test_ensure_kohya_file_rewrites_only_outdated_or_corrupt_files(tmp_path: Path):
    run = Run(tmp_path, "lora")
    file = run.write()
    before = file.path.stat().st_mtime_ns
    assert run.write() == file
    assert file.path.stat().st_mtime_ns == before
    other = run.write(lora_export_dtype="bfloat16")
    assert other.dtype == "bfloat16"
    assert {tensor.dtype for tensor in load_file(other.path).values()} == {torch.bfloat16}
    run.check(other)
    corrupt = bytearray(other.path.read_bytes())
    corrupt[-1] ^= 1
    other.path.write_bytes(corrupt)
    assert run.write(lora_export_dtype="bfloat16") == other
    other.path.write_bytes(b"half a file")
    assert run.write(lora_export_dtype="bfloat16") == other


@pytest.mark.parametrize("scale", [1e8, 1e-7])
def test_export_dtype_auto_chooses_bfloat16_outside_float16_range(tmp_path: Path, scale: float):
    run = Run(tmp_path, "lora")
    tensors = load_file(run.weights)
    scaled = {name: tensor * scale if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(scaled, run.weights, metadata_of(run.weights))
    file = run.write()
    assert file.dtype == "bfloat16"
    run.check(file)
    if scale > 1:
        with pytest.raises(
            FormatError, match=r"lora_export_dtype float16 cannot represent.*Set it to bfloat16"
        ):
            run.write(lora_export_dtype="float16")
    else:
        assert run.write(lora_export_dtype="float16").dtype == "float16"


@pytest.mark.parametrize("kind", DECOMPOSED)
def test_weight_decomposed_adapter_is_approximated_by_plain_lora(tmp_path: Path, kind: str):
    run = Run(tmp_path, kind)
    file = run.write()
    tensors = load_file(file.path)
    assert not any("dora_scale" in name or "magnitude" in name for name in tensors)
    recorded = json.loads(metadata_of(file.path)["dora_approximation"])
    assert recorded["rank"] == file.dora_approximation["rank"] == 64
    assert len(recorded["layer_errors"]) == run.manifest.adapted_modules
    assert "approximates a weight-decomposed adapter" in metadata_of(file.path)["modelspec.usage_hint"]
    assert f"{file.dora_approximation['relative_error']:.2g}"[:3] in run.check(file)

    # the exact updates, merged into the base model, give the trained model
    table = layer_table(run.spec.base_model.config_path)
    with BaseWeights(run.spec.base_model) as base:
        exact = dict(updates(read_trained(run.weights, table), base))
    plain = load_unet(run.spec.base_model, torch.float32)
    expected = output(run.unet)
    with torch.no_grad():
        for layer, update in exact.items():
            plain.get_submodule(layer.module).weight += update
    torch.testing.assert_close(output(plain), expected, rtol=0, atol=1e-4)

    # the recorded error equals that of the file as loaded by diffusers
    loaded = load_unet(run.spec.base_model, torch.float32)
    pipeline = load_pipeline(run.spec.base_model, torch.float32, unet=loaded, text_encoders=False)
    pipeline.load_lora_weights(str(file.path.parent), weight_name=file.path.name)
    squared_error = squared_norm = 0.0
    for layer, update in exact.items():
        module = loaded.get_submodule(layer.module)
        actual = module.get_delta_weight("default_0").float()
        squared_error += float((actual - update).norm()) ** 2
        squared_norm += float(update.norm()) ** 2
    relative_error = (squared_error / squared_norm) ** 0.5
    assert relative_error == pytest.approx(file.dora_approximation["relative_error"], abs=2e-3)


def test_check_files_with_larger_error_than_recorded_raises(tmp_path: Path):
    run = Run(tmp_path, "dora")
    file = run.write()
    tensors = load_file(file.path)
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    save_file({**tensors, name: -tensors[name]}, file.path, metadata_of(file.path))
    with pytest.raises(FormatError, match="differ from the DoRA's"):
        run.check(file)


def test_low_rank_equals_truncated_svd():
    generator = torch.Generator().manual_seed(2)
    for shape in ((40, 70), (30, 8, 3, 3)):
        update = torch.randn(shape, generator=generator)
        parts = low_rank(update, 5)
        product = parts["lora_up.weight"].flatten(1) @ parts["lora_down.weight"].flatten(1)
        minimum = torch.linalg.svdvals(update.flatten(1))[5:].square().sum().sqrt()
        assert float((product - update.flatten(1)).norm()) == pytest.approx(float(minimum), rel=1e-2)
        assert parts["lora_down.weight"].shape == (5, *shape[1:])


def test_base_weights_of_folder_and_checkpoint_are_equal(tmp_path: Path):
    run = Run(tmp_path, "lora")
    pipeline = load_pipeline(run.spec.base_model, torch.float16)
    checkpoint = tmp_path / "single.safetensors"
    write_checkpoint(
        checkpoint,
        {
            **unet_tensors(pipeline.unet),
            **vae_tensors(pipeline.vae),
            **first_text_tensors(pipeline.text_encoder),
            **second_text_tensors(pipeline.text_encoder_2),
        },
    )
    configs = tmp_path / "single"
    configs.symlink_to(run.spec.base_model.path)
    settings = run.spec.settings.model_copy(update={"pretrained_model_name_or_path": str(checkpoint)})
    single = resolve_base_model(settings, tmp_path, cache_dir=tmp_path / "digests")
    assert single.kind == "single_file"
    table = layer_table(single.config_path)
    with BaseWeights(run.spec.base_model) as folder, BaseWeights(single) as file:
        for layer in table.layers[::9]:
            assert torch.equal(folder.weight(layer), file.weight(layer)), layer


def _rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    for name in [name for name in tensors if name.startswith(old)]:
        tensors[name.replace(old, new, 1)] = tensors.pop(name)


def test_check_files_of_rewritten_kohya_file_accepts_it(lora: Run, tmp_path: Path):
    tensors = load_file(lora.write().path)
    assert "136 of 136" in lora.check(write_tensors(lora, tmp_path / "same.safetensors", tensors))


LAYER = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.alpha"), r"attn1.to_q \(alpha\): a tensor is missing"),
        (
            lambda t: [t.pop(n) for n in list(t) if n.startswith(LAYER)],
            "lacks trained layers: unet.mid_block",
        ),
        (lambda t: t.update({"lora_unet_zorp.alpha": torch.ones(())}), "lora_unet_zorp.alpha: no layer"),
        (
            lambda t: _rename(t, LAYER, "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"),
            "no layer of the base model has this name",
        ),
        (lambda t: _rename(t, LAYER, LAYER.replace("attn1_to_q", "ff_net_2")), "not fit|has the shape"),
        (lambda t: t[f"{LAYER}.alpha"].mul_(2), "differs from the trained one"),
        (lambda t: t.update({f"{LAYER}.alpha": t[f"{LAYER}.alpha"].reshape(1)}), "must be a scalar"),
        (lambda t: t[f"{LAYER}.alpha"].zero_(), "has alpha 0"),
        (
            lambda t: t.update({f"{LAYER}.lora_up.weight": t[f"{LAYER}.lora_up.weight"].T.contiguous()}),
            "do not fit each other",
        ),
        (
            lambda t: t.update(
                {f"{LAYER}.lora_down.weight": t[f"{LAYER}.lora_down.weight"][:, 1:].contiguous()}
            ),
            "its update has the shape",
        ),
        (lambda t: t[f"{LAYER}.lora_down.weight"][0].fill_(torch.nan), "to_q.lora_down.weight holds NaN"),
        (lambda t: t[f"{LAYER}.lora_down.weight"][0].fill_(torch.inf), "to_q.lora_down.weight holds NaN"),
        (lambda t: t[f"{LAYER}.lora_down.weight"].mul_(1.01), "differs from the trained one"),
        (lambda t: t.update({f"{LAYER}.dora_scale": torch.ones(96, 1)}), "another formula"),
        (lambda t: [tensor.zero_() for n, tensor in t.items() if "lora_up" in n], "changes nothing"),
    ],
)
def test_check_files_of_corrupt_kohya_file_raises(
    lora: Run, tmp_path: Path, corrupt: Callable[[dict[str, Tensor]], object], message: str
):
    tensors = load_file(lora.write().path)
    corrupt(tensors)
    with pytest.raises(FormatError, match=message):
        lora.check(write_tensors(lora, tmp_path / "changed.safetensors", tensors))


def test_check_files_of_corrupt_diffusers_file_raises(tmp_path: Path):
    run = Run(tmp_path, "lora")
    file = run.write()
    tensors = load_file(run.weights)
    save_file({**tensors, "unet.zorp.lora_A.weight": torch.ones(1)}, run.weights, metadata_of(run.weights))
    with pytest.raises(
        FormatError, match=r"pytorch_lora_weights.safetensors: unet.zorp.lora_A.weight: no layer"
    ):
        run.check(file)
    for name in [name for name in tensors if "attn1.to_q" in name]:
        del tensors[name]
    save_file(tensors, run.weights, metadata_of(run.weights))
    with pytest.raises(FormatError, match="layers, but 136 were trained"):
        run.check(file)


def test_check_files_with_missing_or_modified_kohya_file_raises(tmp_path: Path):
    run = Run(tmp_path, "lora")
    model = run.spec.base_model
    with pytest.raises(FormatError, match="Materialize lora again, which writes it without training"):
        check_files(run.manifest, model, "both")
    assert "Only diffusers and InvokeAI" in check_files(run.manifest, model, "diffusers")
    file = run.write()
    manifest = run.manifest_with(file)
    with file.path.open("ab") as stream:
        stream.write(b"!")
    with pytest.raises(FormatError, match="was modified after it was written"):
        check_files(manifest, model, "comfyui")


def test_kohya_layers_with_unnamed_layer_raises(lora: Run):
    trained = read_trained(lora.weights, layer_table(lora.spec.base_model.config_path))
    layer, parts = next(iter(trained.items()))
    with pytest.raises(FormatError, match=r"have no name for this layer. Set lora_format to diffusers"):
        kohya_layers({replace(layer, kohya=None): parts}, BaseWeights(lora.spec.base_model))


def test_kohya_file_name_never_equals_diffusers_file_name():
    assert kohya_file_name("zorp") == "zorp.safetensors"
    assert kohya_file_name("pytorch_lora_weights") == "pytorch_lora_weights_kohya.safetensors"


def test_load_adapter_reads_kohya_file(tmp_path: Path):
    run = Run(tmp_path, "lora, alpha above rank")
    file = run.write(lora_export_dtype="float32")
    unet = load_unet(run.spec.base_model, torch.float32)
    load_adapter({UNET: unet}, file.path)
    torch.testing.assert_close(output(unet), output(run.unet), rtol=0, atol=1e-4)
