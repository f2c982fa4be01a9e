"""The eval loss is deterministic, equals the mean squared error computed with diffusers, and a new LoRA has the base model's loss."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.models.adapters.adapter import add_lora
from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.diffusion.objective import HuberLoss, Objective, debiased_estimation
from sdxl_pipeline.training.validation.eval_loss import (
    EvalImage,
    eval_loss,
    eval_timesteps,
    fixed_noise,
    load_eval_images,
)
from sdxl_pipeline.training.validation.eval_samples import select_eval_samples
from tests.support.evaluation_specs import tiny_settings
from tests.support.training_datasets import make_dataset

SCHEDULE = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
EPSILON = Objective(SCHEDULE.alphas_cumprod, "epsilon")
WIDTH = 16


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        cross_attention_dim=WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=WIDTH + 6 * 4,
    ).eval()


@pytest.fixture(scope="module")
def images() -> list[EvalImage]:
    generator = torch.Generator().manual_seed(1)
    return [
        EvalImage(
            key=f"key{number}",
            entry_keys=(f"latents {number}", f"caption {number}"),
            latents=torch.randn(4, height, 8, generator=generator),
            prompt_embeds=torch.randn(77, WIDTH, generator=generator),
            pooled_prompt_embeds=torch.randn(WIDTH, generator=generator),
            time_ids=(1820, 1024, 3, 0, 64, 64),
        )
        for number, height in enumerate((8, 16, 8))
    ]


def test_eval_timesteps_are_midpoints_of_equal_parts():
    assert eval_timesteps(4) == (125, 375, 625, 875)
    assert eval_timesteps(1) == (500,)
    steps = eval_timesteps(28)
    assert len(set(steps)) == 28
    assert {b - a for a, b in itertools.pairwise(steps)} <= {35, 36}
    assert 0 <= steps[0] < 36
    assert 964 <= steps[-1] <= 999


def test_fixed_noise_depends_only_on_image_and_timestep():
    shape = torch.Size((4, 8, 8))
    noise = fixed_noise("a", 500, shape)
    torch.manual_seed(99)
    assert torch.equal(noise, fixed_noise("a", 500, shape))
    assert not torch.equal(noise, fixed_noise("a", 501, shape))
    assert not torch.equal(noise, fixed_noise("b", 500, shape))


def test_eval_loss_repeated_is_bit_identical(unet, images):
    first = eval_loss(unet, EPSILON, images, (100, 500, 900), batch_size=2)
    torch.manual_seed(4321)
    assert eval_loss(unet, EPSILON, images, (100, 500, 900), batch_size=2) == first


def test_eval_loss_by_image_name_identifies_inputs(unet, images):
    all_images = eval_loss(unet, EPSILON, images, (100, 900), batch_size=2)
    single = eval_loss(unet, EPSILON, images[1:2], (100, 900), batch_size=2)
    assert all_images.by_image[1][0] == single.by_image[0][0]
    assert all_images.by_image[1][1] == pytest.approx(single.mean, rel=1e-5)
    assert sum(loss for _, loss in all_images.by_image) / 3 == pytest.approx(all_images.mean)
    edited = replace(images[1], entry_keys=("latents 1", "another caption"))
    for other in (
        eval_loss(unet, EPSILON, [edited], (100, 900), batch_size=2),
        eval_loss(unet, EPSILON, images[1:2], (100, 901), batch_size=2),
    ):
        assert other.by_image[0][0] != single.by_image[0][0]
    with_copy = eval_loss(unet, EPSILON, [images[0], images[1], edited], (100, 900), batch_size=2)
    assert len(with_copy.by_image) == 2, "copies of one image count as one"


def test_eval_loss_equals_mean_squared_error_by_diffusers(unet, images):
    """The reference uses diffusers' scheduler, one image and one timestep at a time."""
    timesteps = (50, 400, 950)
    actual = eval_loss(unet, EPSILON, images, timesteps, batch_size=4)
    for timestep, loss in actual.by_timestep:
        errors = []
        for image in images:
            latents, timesteps_tensor = image.latents[None], torch.tensor([timestep])
            noise = fixed_noise(image.key, timestep, image.latents.shape)[None]
            added = {
                "text_embeds": image.pooled_prompt_embeds[None],
                "time_ids": torch.tensor([image.time_ids], dtype=torch.float32),
            }
            with torch.no_grad():
                noisy = SCHEDULE.add_noise(latents, noise, timesteps_tensor)
                predicted = unet(
                    noisy, timesteps_tensor, image.prompt_embeds[None], added_cond_kwargs=added
                ).sample
            errors.append(torch.nn.functional.mse_loss(predicted, noise).item())
        assert loss == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert actual.mean == pytest.approx(
        sum(loss for _, loss in actual.by_timestep) / len(timesteps), rel=1e-12
    )


def test_eval_loss_v_prediction_uses_velocity_target(unet, images):
    objective = replace(EPSILON, prediction_type="v_prediction")
    actual = eval_loss(unet, objective, images[:1], (700,), batch_size=1)
    image, timesteps_tensor = images[0], torch.tensor([700])
    noise = fixed_noise(image.key, 700, image.latents.shape)[None]
    added = {
        "text_embeds": image.pooled_prompt_embeds[None],
        "time_ids": torch.tensor([image.time_ids]).float(),
    }
    with torch.no_grad():
        noisy = SCHEDULE.add_noise(image.latents[None], noise, timesteps_tensor)
        predicted = unet(noisy, timesteps_tensor, image.prompt_embeds[None], added_cond_kwargs=added).sample
    velocity = SCHEDULE.get_velocity(image.latents[None], noise, timesteps_tensor)
    assert actual.mean == pytest.approx(torch.nn.functional.mse_loss(predicted, velocity).item(), rel=1e-5)


def test_eval_loss_ignores_loss_weighting_and_huber_loss(unet, images):
    huber = HuberLoss("huber", "snr", 0.1)
    weighted = replace(EPSILON, weighting=debiased_estimation, scale=2.0, huber=huber, diff2flow=True)
    assert eval_loss(unet, weighted, images, (20,), 4) == eval_loss(unet, EPSILON, images, (20,), 4)


def test_eval_loss_new_or_disabled_lora_equals_base_model(unet, images):
    base = eval_loss(unet, EPSILON, images, (300, 800), batch_size=3)
    adapted = UNet2DConditionModel.from_config(unet.config).eval()
    adapted.load_state_dict(unet.state_dict())
    parameters = add_lora(adapted, 2, 2.0, 0.0, ("to_q", "to_v"), seed=0)
    assert eval_loss(adapted, EPSILON, images, (300, 800), batch_size=3) == base
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.5)
    assert eval_loss(adapted, EPSILON, images, (300, 800), batch_size=3).mean != base.mean
    adapted.disable_adapters()
    assert eval_loss(adapted, EPSILON, images, (300, 800), batch_size=3) == base


def test_eval_loss_on_batch_counts_each_pair_once(unet, images):
    calls: list[tuple[int, int]] = []
    eval_loss(unet, EPSILON, images, (1, 2), 4, lambda done, total: calls.append((done, total)))
    assert calls == [(4, 6), (6, 6)]  # two sizes: four pairs of one, two of the other


def splits(**by_stem: str) -> dict[str, str]:
    return {f"{stem}.png": split for stem, split in by_stem.items()}


def test_choose_samples_eval_dataset_precedes_held_out_share(tmp_path: Path):
    mixed = make_dataset(tmp_path / "photos", "photos", splits=splits(a="train", b="eval"))
    eval_only = make_dataset(tmp_path / "test_set", "test_set", splits=splits(c="eval", d="eval"))
    settings = tiny_settings()
    source, samples = select_eval_samples((mixed, eval_only), settings, "original")
    assert source == "eval dataset"
    assert {sample.path for sample in samples} == {"c.png", "d.png"}
    source, samples = select_eval_samples((mixed,), settings, "original")
    assert source == "held-out share"
    assert [sample.path for sample in samples] == ["b.png"]


def test_choose_samples_without_eval_images_uses_training_images(tmp_path: Path):
    dataset = make_dataset(tmp_path / "photos", "photos", splits=splits(a="train", b="train"))
    source, samples = select_eval_samples((dataset,), tiny_settings(), "original")
    assert source == "training images"
    assert {sample.path for sample in samples} == {"a.png", "b.png"}


def test_choose_samples_num_eval_images_takes_first_by_key(tmp_path: Path):
    dataset = make_dataset(
        tmp_path / "photos", "photos", splits={f"{number}.png": "eval" for number in range(8)}
    )
    _, all_samples = select_eval_samples((dataset,), tiny_settings(), "original")
    _, limited = select_eval_samples((dataset,), tiny_settings(num_eval_images=3), "original")
    assert [sample.key for sample in all_samples] == sorted(sample.key for sample in all_samples)
    assert list(limited) == all_samples[:3]


def test_read_images_returns_scaled_posterior_mean_and_first_caption(tmp_path: Path):
    dataset = make_dataset(tmp_path / "photos", "photos", splits=splits(a="eval", b="eval"))
    _, samples = select_eval_samples((dataset,), tiny_settings(), "original")
    images = load_eval_images(samples, BatchReader((dataset,)), scaling_factor=0.5)
    latents, texts = (
        TensorStore(Path(dataset.latents.store_root)),
        TensorStore(Path(dataset.text_embeds.store_root)),
    )
    for image, sample in zip(images, samples, strict=True):
        assert torch.equal(image.latents, latents.read(sample.latent_key)["mean"] * 0.5)
        assert torch.equal(image.prompt_embeds, texts.read(sample.embed_keys[0])["prompt_embeds"])
        assert image.time_ids == sample.time_ids
