"""Training of the text encoders: gradients, weights file, captions, and equality with cached embeddings at learning rate 0."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.files.atomic_files import sha256_file
from sdxl_pipeline.models.base_model import resolve_base_model
from sdxl_pipeline.release.export import verify_export
from sdxl_pipeline.runtime.evaluation_report import EvaluateSpec
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import TrainedLora, TrainSpec
from sdxl_pipeline.runtime.stage_runner import StageStopped, StopSignal
from sdxl_pipeline.stages import evaluate, train
from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.data.on_demand_cache import OnDemandEncoders
from sdxl_pipeline.training.data.samples import load_samples
from sdxl_pipeline.training.logging.run_logs import read_metrics
from sdxl_pipeline.training.trainer_setup import build_trainable
from tests.support.encoded_datasets import prepare_dataset, write_images
from tests.support.train_programs import StoppingReporter
from tests.support.training_datasets import NEGATIVE, PROMPT, make_spec, model_folder

STEPS = 4


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Return `datasets(windows)`: real captions with cached embeddings, which the training must not use."""
    folder = tmp_path_factory.mktemp("datasets")
    write_images(folder / "images", count=6)
    (folder / "images" / "image_0.txt").write_text("a very, very " + "long image " * 60)
    settings = TrainingSettings(pretrained_model_name_or_path=str(model_folder()))
    model = resolve_base_model(settings, folder, cache_dir=folder / "digests")
    prepared = {}

    def dataset(windows: int = 1):
        if windows not in prepared:
            prepared[windows] = prepare_dataset(
                folder / str(windows), folder / "images", model, windows=windows, holdout=0.2
            )
        return prepared[windows]

    return dataset


def spec_of(folder: Path, dataset, run: str = "run", **settings: object) -> TrainSpec:
    values = {
        "train_text_encoder": True,
        "max_train_steps": STEPS,
        "lr_warmup_steps": 0,
        "checkpoint_step_interval": 0,
        "max_grad_norm": 0,  # clipping would couple the UNet's gradients to the text encoders'
        "caption_dropout_probability": 0.3,
        "validation_guidance": 3.0,
        "evaluation_type": "none",
        "eval_timesteps": 2,
    }
    return make_spec(folder, dataset, run=run, **{**values, **settings})


def run(spec: TrainSpec, stop_after: int | None = None) -> TrainedLora:
    stop = StopSignal()
    return train.main(spec, StoppingReporter(stop, stop_after), stop)


def losses(manifest: TrainedLora) -> list[float]:
    return [row.loss for row in read_metrics(Path(manifest.metrics_path))]


@pytest.fixture(scope="module")
def trained(datasets, tmp_path_factory):
    images = {"validation_disable": False, "validation_step_interval": STEPS, "learning_rate": 3e-3}
    spec = spec_of(tmp_path_factory.mktemp("trained"), datasets(), **images)
    return spec, run(spec)


@pytest.mark.parametrize("windows", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_train_text_encoder_with_zero_lr_equals_cached_embeddings(datasets, tmp_path, windows):
    settings = {"max_train_steps": 2}
    online = run(spec_of(tmp_path, datasets(windows), "online", text_encoder_lr=0, **settings))
    cached = run(spec_of(tmp_path, datasets(windows), "cached", train_text_encoder=False, **settings))
    assert losses(online) == pytest.approx(losses(cached), rel=1e-5)
    actual, expected = load_file(online.weights_path), load_file(cached.weights_path)
    assert {name for name in actual if name.startswith("unet.")} == expected.keys()
    for name, tensor in expected.items():
        # AdamW amplifies small gradients and with them rounding differences between processors
        assert (actual[name] - tensor).norm() <= 1e-2 * tensor.norm(), name
    assert not any(tensor.any() for name, tensor in actual.items() if "text_" in name and "lora_B" in name)


def test_text_encoder_gradients_equal_diffusers_pipeline(datasets, tmp_path):
    spec = spec_of(tmp_path, datasets())
    trainable = build_trainable(spec)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable.parameters.values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    trainable.write(tmp_path / "lora.safetensors", {})
    latents, target = torch.randn(2, 2, 4, 8, 8, generator=generator)
    prompts, time_ids = [PROMPT, "something else!"], torch.full((2, 6), 64.0)
    timesteps = torch.tensor([10, 900])
    added = {"time_ids": time_ids}
    ids = trainable.online_text_encoder.input_ids(prompts)
    prediction = trainable.module(latents, timesteps, ids, added, return_dict=False)[0]
    (prediction - target).square().mean().backward()
    actual = {
        f"{prefix}.{name}": parameter.grad
        for prefix, encoder in zip(("text_encoder", "text_encoder_2"), trainable.encoders, strict=True)
        for name, parameter in encoder.named_parameters()
        if parameter.requires_grad
    }

    pipeline = StableDiffusionXLPipeline.from_pretrained(spec.base_model.path, torch_dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="default")
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_("lora_" in name)
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    reference = pipeline.unet(
        latents,
        timesteps,
        encoder_hidden_states=embeds,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
    ).sample
    (reference - target).square().mean().backward()
    expected = {
        f"{prefix}.{name}": parameter.grad
        for prefix, encoder in (
            ("text_encoder", pipeline.text_encoder),
            ("text_encoder_2", pipeline.text_encoder_2),
        )
        for name, parameter in encoder.named_parameters()
        if parameter.requires_grad
    }
    assert actual.keys() == expected.keys()
    assert all(gradient is not None and gradient.any() for gradient in actual.values()), (
        "every parameter has a gradient"
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-7)


def test_gradient_checkpointing_does_not_change_text_encoder_gradients(datasets, tmp_path):
    def gradients(**settings: object) -> list[torch.Tensor]:
        trainable = build_trainable(spec_of(tmp_path, datasets(), **settings))
        trainable.module.train()
        generator = torch.Generator().manual_seed(2)
        ids = trainable.online_text_encoder.input_ids([PROMPT])
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        added = {"time_ids": torch.full((1, 6), 64.0)}
        trainable.module(latents, torch.tensor([500]), ids, added, return_dict=False)[0].sum().backward()
        return [parameter.grad for parameter in trainable.text_parameters]

    plain, checkpointed = gradients(), gradients(gradient_checkpointing=True)
    assert plain
    for one, other in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(one, other)


def test_batch_reader_tokens_with_dropped_caption_contains_empty_prompt(datasets, tmp_path):
    spec = spec_of(tmp_path, datasets(2))
    trainable = build_trainable(spec)
    reader = BatchReader(
        spec.datasets, OnDemandEncoders(spec.base_model, spec.hardware), trainable.online_text_encoder
    )
    samples = load_samples(spec.datasets, "train")[:2]
    tokens = reader.tokens(samples, [samples[0].embed_keys[0], reader.empty_prompt_key("drawings")])
    assert tokens.keys == (samples[0].key, samples[1].key)
    assert tokens.input_ids.shape == (2, 2, 2, 77)
    assert torch.equal(tokens.input_ids[1], trainable.online_text_encoder.input_ids([""])[0])
    captions = {
        Path(dataset.data_dir, samples[0].path).with_suffix(".txt").read_text().strip()
        for dataset in spec.datasets
    }
    assert torch.equal(tokens.input_ids[:1], trainable.online_text_encoder.input_ids(list(captions)))


def test_batch_reader_prompt_embeds_use_current_text_encoder_weights(datasets, tmp_path):
    spec = spec_of(tmp_path, datasets())
    trainable = build_trainable(spec)
    trainable.module.train()
    encoders = OnDemandEncoders(spec.base_model, spec.hardware)
    online = BatchReader(spec.datasets, encoders, trainable.online_text_encoder)
    cached = BatchReader(spec.datasets)
    for one, other in zip(online.prompt_embeds(PROMPT), cached.prompt_embeds(PROMPT), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    with torch.no_grad():
        for parameter in trainable.text_parameters:
            parameter.fill_(0.1)
    assert not torch.allclose(online.prompt_embeds(PROMPT)[0], cached.prompt_embeds(PROMPT)[0], atol=1e-2)
    assert all(encoder.training for encoder in trainable.encoders), "their mode is restored"


def test_weights_file_in_diffusers_reproduces_validation_image(trained):
    spec, manifest = trained
    tensors = load_file(manifest.weights_path)
    assert {name.split(".")[0] for name in tensors} == {"unet", "text_encoder", "text_encoder_2"}
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    pipeline = StableDiffusionXLPipeline.from_pretrained(spec.base_model.path, torch_dtype=torch.float32)
    weights = Path(manifest.weights_path)
    pipeline.load_lora_weights(weights.parent, weight_name=weights.name)
    pixels = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        height=64,
        width=64,
        num_inference_steps=spec.settings.validation_num_inference_steps,
        guidance_scale=spec.settings.validation_guidance,
        generator=torch.Generator().manual_seed(spec.settings.effective_validation_seed),
        output_type="np",
    ).images[0]
    last = next(image for image in manifest.validation_images if image.step == STEPS)
    with Image.open(last.path) as opened:
        difference = np.abs(np.asarray(opened) - pixels * 255).max()
    assert difference < 0.5 + 1e-4 * 255
    assert verify_export(weights, spec.base_model) == manifest.adapted_modules


def test_train_text_encoder_stopped_and_resumed_has_same_weights(trained):
    spec, expected = trained
    folder = Path(spec.run_dir).with_name("stopped")
    stopped = spec.model_copy(update={"run_dir": str(folder)})
    with pytest.raises(StageStopped):
        run(stopped, stop_after=2)
    resumed = run(stopped)
    assert resumed.resumed_from_step == 2
    assert resumed.weights_sha256 == expected.weights_sha256


@pytest.mark.slow
def test_evaluate_encodes_captions_with_text_encoders_of_each_model(trained, tmp_path):
    spec, manifest = trained
    eval_spec = EvaluateSpec(
        base_model=spec.base_model,
        hardware=spec.hardware,
        settings=spec.settings,
        lora=manifest,
        datasets=spec.datasets,
        prompts=spec.prompts,
        output_dir=str(tmp_path / "online"),
    )
    report = evaluate.main(eval_spec, Reporter(), StopSignal())
    assert report.lora_loss.mean != report.base_loss.mean
    cached = spec.settings.model_copy(update={"train_text_encoder": False})
    unet_lora = tmp_path / "pytorch_lora_weights.safetensors"
    trainable = build_trainable(spec.model_copy(update={"settings": cached}))
    trainable.write(unet_lora, {})
    lora = manifest.model_copy(
        update={
            "weights_path": str(unet_lora),
            "weights_sha256": sha256_file(unet_lora),
            "adapted_modules": trainable.num_trained_modules,
        }
    )
    update = {"settings": cached, "lora": lora, "output_dir": str(tmp_path / "cached")}
    base = evaluate.main(eval_spec.model_copy(update=update), Reporter(), StopSignal())
    assert report.base_loss.mean == pytest.approx(base.base_loss.mean, rel=1e-5)


@pytest.mark.slow
def test_train_text_encoder_two_processes_equal_one_with_double_batch(datasets, tmp_path):
    settings = {"max_train_steps": 3, "max_grad_norm": 1.0}
    one = run(spec_of(tmp_path, datasets(), "one", train_batch_size=2, **settings))
    spec = spec_of(tmp_path, datasets(), "two", train_batch_size=1, **settings)
    spec = spec.model_copy(update={"hardware": spec.hardware.model_copy(update={"num_processes": 2})})
    (tmp_path / "two.json").write_text(spec.model_dump_json())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = ["-m", "sdxl_pipeline.stages.train", str(tmp_path / "two.json")]
    done = subprocess.run(
        [*torchrun, *program, "--manifest", str(tmp_path / "manifest.json")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    two = TrainedLora.model_validate_json((tmp_path / "manifest.json").read_bytes())
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    ones, twos = load_file(one.weights_path), load_file(two.weights_path)
    assert ones.keys() == twos.keys()
    for name, tensor in ones.items():
        torch.testing.assert_close(twos[name], tensor, rtol=0, atol=1e-5)
