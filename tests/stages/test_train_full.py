"""Full fine-tuning by the train stage: all weights change, resume is bit-exact, and diffusers reproduces the validation images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from sdxl_pipeline.files.atomic_files import sha256_path
from sdxl_pipeline.models.components import load_unet
from sdxl_pipeline.release.export import ExportError, verify_export
from sdxl_pipeline.runtime.evaluation_report import EvaluateSpec
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import EMA_FOLDER, TrainedLora, TrainSpec
from sdxl_pipeline.runtime.stage_runner import StageStopped, StopSignal
from sdxl_pipeline.stages import evaluate, train
from tests.support.train_programs import StoppingReporter
from tests.support.training_datasets import NEGATIVE, PROMPT, make_dataset, make_spec

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4


def full_spec(folder: Path, run: str, **settings: object) -> TrainSpec:
    splits = ["train"] * 4 + ["eval"]
    values = {
        "model_type": "full",
        "lora_rank": 16,
        "learning_rate": 1e-4,
        "max_train_steps": STEPS,
        "lr_warmup_steps": 0,
        "checkpoint_step_interval": 2,
        "caption_dropout_probability": 0.3,
        "validation_disable": False,
        "validation_step_interval": STEPS,
        "validation_guidance": 3.0,
        "num_eval_images": 1,
        "eval_timesteps": 2,
        "evaluation_type": "none",
    }
    return make_spec(
        folder, make_dataset(folder / "dataset", splits=splits), run=run, **{**values, **settings}
    )


def run(spec: TrainSpec, stop_after: int | None = None) -> TrainedLora:
    stop = StopSignal()
    return train.main(spec, StoppingReporter(stop, stop_after), stop)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[TrainSpec, TrainedLora]:
    spec = full_spec(tmp_path_factory.mktemp("full"), "unbroken")
    return spec, run(spec)


def test_train_full_changes_every_weight_and_manifest_describes_it(trained):
    spec, manifest = trained
    before = load_unet(spec.base_model, torch.float32).state_dict()
    (shard,) = Path(manifest.weights_path).glob("*.safetensors")
    after = load_file(shard)
    assert after.keys() == before.keys()
    assert [name for name, tensor in after.items() if torch.equal(tensor, before[name])] == []
    assert (manifest.weights_kind, Path(manifest.weights_path).name) == ("unet", "unet")
    assert manifest.weights_sha256 == sha256_path(Path(manifest.weights_path))
    assert manifest.trainable_parameters == sum(tensor.numel() for tensor in before.values())


def test_train_full_checkpoint_stores_weights_once_in_diffusers_format(trained):
    _, manifest = trained
    checkpoint = Path(manifest.run_dir) / "checkpoints" / "step-00000002"
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "optimizer.safetensors",
        "state.json",
        "unet",
    ]
    assert UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet", use_safetensors=True)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("all", {}),
        pytest.param("bitfit", {"layer_freeze_strategy": "bitfit"}, marks=pytest.mark.slow),
        pytest.param("ema", {"use_ema": True}, marks=pytest.mark.slow),
    ],
)
def test_train_full_stopped_and_resumed_has_same_weights(trained, name, settings):
    spec, expected = trained
    folder = Path(spec.run_dir).parent
    if settings:
        expected = run(full_spec(folder, f"unbroken-{name}", **settings, validation_disable=True))
    stopped = full_spec(folder, f"stopped-{name}", **settings, validation_disable=bool(settings))
    with pytest.raises(StageStopped):
        run(stopped, stop_after=1)
    with pytest.raises(StageStopped):
        run(stopped, stop_after=3)
    resumed = run(stopped)
    assert resumed.resumed_from_step == 3
    assert resumed.weights_sha256 == expected.weights_sha256
    if name == "ema":
        for weights in ("unet", f"{EMA_FOLDER}/unet"):
            assert sha256_path(Path(resumed.run_dir) / weights) == sha256_path(
                Path(expected.run_dir) / weights
            )
        assert Path(resumed.weights_path).relative_to(resumed.run_dir) == Path(EMA_FOLDER, "unet")


def test_train_full_weights_in_diffusers_reproduce_validation_image(trained):
    spec, manifest = trained
    unet = UNet2DConditionModel.from_pretrained(manifest.weights_path, use_safetensors=True)
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        spec.base_model.path, unet=unet, torch_dtype=torch.float32
    )
    settings = spec.settings
    with torch.no_grad():
        embeds = _embeddings(spec)
        pixels = pipeline(
            **embeds,
            height=64,
            width=64,
            num_inference_steps=settings.validation_num_inference_steps,
            guidance_scale=settings.validation_guidance,
            generator=torch.Generator().manual_seed(settings.effective_validation_seed),
            output_type="np",
        ).images[0]
    last = next(image for image in manifest.validation_images if image.step == STEPS)
    with Image.open(last.path) as opened:
        assert np.array_equal(np.asarray(opened), (pixels * 255).round().astype(np.uint8))
    first = next(image for image in manifest.validation_images if image.step == 0)
    assert Path(first.path).read_bytes() != Path(last.path).read_bytes()


def test_evaluate_full_unet_compares_with_base_model(trained, tmp_path):
    spec, manifest = trained
    eval_spec = EvaluateSpec(
        base_model=spec.base_model,
        hardware=spec.hardware,
        settings=spec.settings,
        lora=manifest,
        datasets=spec.datasets,
        prompts=spec.prompts,
        output_dir=str(tmp_path),
    )
    report = evaluate.main(eval_spec, Reporter(), StopSignal())
    assert report.weights_kind == "unet"
    assert report.lora_loss.mean < report.base_loss.mean
    before, after = (Path(image.path).read_bytes() for image in report.images)
    assert before != after
    assert "Eval loss, trained UNet" in Path(report.report_path).read_text()
    untrained = manifest.model_copy(update={"weights_path": f"{spec.base_model.path}/unet"})
    untrained = untrained.model_copy(update={"weights_sha256": sha256_path(Path(untrained.weights_path))})
    update = {"lora": untrained, "output_dir": str(tmp_path / "base")}
    same = evaluate.main(eval_spec.model_copy(update=update), Reporter(), StopSignal())
    assert same.lora_loss == same.base_loss == report.base_loss


def test_verify_export_full_unet_counts_weights_and_rejects_empty_folder(trained, tmp_path):
    spec, manifest = trained
    assert verify_export(Path(manifest.weights_path), spec.base_model) == len(
        load_unet(spec.base_model, torch.float32).state_dict()
    )
    (tmp_path / "unet").mkdir()
    with pytest.raises(ExportError, match="does not load back"):
        verify_export(tmp_path / "unet", spec.base_model)


def _embeddings(spec: TrainSpec) -> dict[str, torch.Tensor]:
    from sdxl_pipeline.training.data.batches import BatchReader

    reader = BatchReader(spec.datasets)
    (prompt, pooled), (negative, negative_pooled) = map(reader.prompt_embeds, (PROMPT, NEGATIVE))
    return {
        "prompt_embeds": prompt,
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": negative,
        "negative_pooled_prompt_embeds": negative_pooled,
    }
