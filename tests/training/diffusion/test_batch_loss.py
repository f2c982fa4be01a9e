"""The trainer's batch loss equals an independent computation with diffusers' scheduler, for every objective, to 1e-6."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import Tensor

from sdxl_pipeline.runtime.specs import TrainSpec
from sdxl_pipeline.runtime.stage_runner import StopSignal
from sdxl_pipeline.training.data.batches import Batch
from sdxl_pipeline.training.trainer import Trainer
from tests.support.encoded_datasets import SilentReporter
from tests.support.masked_datasets import masked_dataset
from tests.support.training_datasets import SQUARE, make_dataset, make_spec

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerator")

V = {"prediction_type": "v_prediction"}
ZERO_SNR = {**V, "rescale_betas_zero_snr": True}
SAMPLE = {"prediction_type": "sample"}
MIN_SNR = {"snr_gamma": 5.0}
SOFT = {"use_soft_min_snr": True}
DEBIASED = {"debiased_estimation_loss": True}
HUBER = {"loss_type": "huber", "huber_c": 0.2}
SMOOTH = {"loss_type": "smooth_l1", "huber_c": 0.2}
FLOW = {"diff2flow_enabled": True, "diff2flow_loss": True}
NOISY = {"offset_noise": True, "noise_offset_probability": 1.0, "input_perturbation": 0.3}

OBJECTIVES = {
    "epsilon": {},
    "v": V,
    "sample": SAMPLE,
    "v, zero SNR": ZERO_SNR,
    "min-SNR": MIN_SNR,
    "min-SNR of v": {**V, **MIN_SNR},
    "min-SNR of v, zero SNR": {**ZERO_SNR, **MIN_SNR},
    "min-SNR of the sample": {**SAMPLE, **MIN_SNR},
    "soft min-SNR": {**MIN_SNR, **SOFT},
    "soft min-SNR of v by sigma_data": {**V, **SOFT, "soft_min_snr_sigma_data": 0.5},
    "debiased": DEBIASED,
    "debiased of v": {**V, **DEBIASED},
    "loss scale": {"snr_weight": 0.3},
    "huber by SNR": HUBER,
    "huber, exponential": {**HUBER, "huber_schedule": "exponential"},
    "huber, constant": {**HUBER, "huber_schedule": "constant"},
    "smooth L1 of v": {**V, **SMOOTH},
    "smooth L1 and min-SNR": {**SMOOTH, **MIN_SNR},
    "Diff2Flow": FLOW,
    "Diff2Flow of v, zero SNR": {**ZERO_SNR, **FLOW},
    "offset and perturbed noise": NOISY,
    "biased timesteps": {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 4.0},
}


BY_DEFAULT = (
    "epsilon",
    "v, zero SNR",
    "min-SNR of the sample",
    "soft min-SNR of v by sigma_data",
    "debiased of v",
    "loss scale",
    "huber by SNR",
    "smooth L1 and min-SNR",
    "Diff2Flow of v, zero SNR",
    "offset and perturbed noise",
    "biased timesteps",
)
"""Every kind of loss, weighting and noise. The others are variants of them, whose formulas test_objective.py checks as well."""


@contextlib.contextmanager
def trainer_of(spec: TrainSpec) -> Iterator[Trainer]:
    Path(spec.run_dir).mkdir(parents=True)
    trainer = Trainer(spec, "0" * 64, SilentReporter(), StopSignal())
    try:
        trainer.unet.train()
        yield trainer
    finally:
        trainer.close()


def scheduler_of(spec: TrainSpec) -> DDPMScheduler:
    config = DDPMScheduler.load_config(spec.base_model.path, subfolder="scheduler")
    return DDPMScheduler.from_config(config, **spec.settings.scheduler_changes)


def predict(
    unet: UNet2DConditionModel, batch: Batch, noisy: Tensor, timesteps: Tensor, item: slice
) -> Tensor:
    """Return the UNet's prediction for some items of a batch."""
    added = {"text_embeds": batch.pooled_prompt_embeds[item], "time_ids": batch.time_ids[item]}
    return unet(noisy, timesteps, batch.prompt_embeds[item], added_cond_kwargs=added).sample


def target_of(scheduler: DDPMScheduler, batch: Batch) -> Tensor:
    return {
        "epsilon": batch.noise,
        "sample": batch.latents,
        "v_prediction": scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps),
    }[scheduler.config.prediction_type]


def expected_losses(
    spec: TrainSpec, batch: Batch, noisy: Tensor, prediction: Tensor, target: Tensor
) -> Tensor:
    """Return the loss of each image, (B,), from the UNet's prediction and its target."""
    settings, scheduler = spec.settings, scheduler_of(spec)
    kind = scheduler.config.prediction_type
    abar = scheduler.alphas_cumprod[batch.timesteps][:, None, None, None]
    if settings.diff2flow_loss:
        # the image and the noise implied by the prediction
        x0 = (noisy - (1 - abar).sqrt() * prediction) / abar.sqrt()
        eps = prediction
        if kind == "v_prediction":
            x0 = abar.sqrt() * noisy - (1 - abar).sqrt() * prediction
            eps = abar.sqrt() * prediction + (1 - abar).sqrt() * noisy
        prediction, target = eps - x0, batch.noise - batch.latents
    errors = (prediction - target) ** 2
    if settings.loss_type != "l2":
        sigma = ((1 - abar) / abar).sqrt()
        c = {
            "snr": (1 - settings.huber_c) / (1 + sigma) ** 2 + settings.huber_c,
            "exponential": torch.exp(
                math.log(settings.huber_c) * batch.timesteps / scheduler.config.num_train_timesteps
            )[:, None, None, None],
            "constant": torch.tensor(settings.huber_c),
        }[settings.huber_schedule].double()
        errors = 2 * ((errors.double() + c**2).sqrt() - c) * (c if settings.loss_type == "huber" else 1)
    snr = compute_snr(scheduler, batch.timesteps)
    # as in diffusers' example scripts: SNR + 1 for v-prediction
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(())}[kind]
    weights = torch.full_like(snr, settings.snr_weight)
    if settings.use_soft_min_snr:
        gamma = settings.snr_gamma or settings.soft_min_snr_sigma_data**-2
        weights = snr * gamma / (snr + gamma) / divisor
    elif settings.snr_gamma:
        weights = torch.minimum(snr, torch.tensor(settings.snr_gamma)) / divisor
    elif settings.debiased_estimation_loss:
        weights = snr.sqrt() / divisor
    if batch.loss_weights is not None:
        errors = errors * batch.loss_weights
    return (weights * errors.mean(dim=(1, 2, 3))).float()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.slow) for name in OBJECTIVES]
)
def test_batch_loss_of_every_objective_equals_diffusers(tmp_path: Path, name: str):
    # an adapter of few layers is made faster, and a new one changes no prediction
    settings = {"max_train_steps": 1, "train_batch_size": 4, "lora_target_modules": ["to_q"]}
    spec = make_spec(tmp_path, **settings, **OBJECTIVES[name])
    with trainer_of(spec) as trainer:
        batch = trainer.batches.read(0)
        loss = trainer._loss(batch, 0).detach()
    noisy = scheduler_of(spec).add_noise(batch.latents, batch.input_noise, batch.timesteps)
    unet = UNet2DConditionModel.from_pretrained(spec.base_model.path, subfolder="unet")
    with torch.no_grad():
        prediction = predict(unet, batch, noisy, batch.timesteps, slice(None))
    expected = expected_losses(spec, batch, noisy, prediction, target_of(scheduler_of(spec), batch)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(batch.input_noise, batch.noise) is (OBJECTIVES[name] is not NOISY)


ROLLOUT_SETTINGS = {
    "scheduled_sampling_max_step_offset": 6,
    "scheduled_sampling_probability": 0.7,
    "input_perturbation": 0.1,
    "lora_dropout": 0.3,
    "prior_loss_weight": 2.5,
}
SOLVERS = {
    "unipc": {},
    "euler": {"scheduled_sampling_sampler": "euler", **ZERO_SNR, **MIN_SNR},
    "dpm": {"scheduled_sampling_sampler": "dpm", "scheduled_sampling_order": 3, **HUBER},
}
CLASSES = {
    "unipc": diffusers.UniPCMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpm": diffusers.DPMSolverMultistepScheduler,
}


def expected_rollouts(spec: TrainSpec, unet: UNet2DConditionModel, batch: Batch) -> Tensor:
    """Return each image at its timestep, rolled out individually with a plain sampling loop."""
    settings, scheduler = spec.settings, scheduler_of(spec)
    noisy = scheduler.add_noise(batch.latents, batch.input_noise, batch.timesteps)
    order = {} if settings.scheduled_sampling_sampler == "euler" else {"solver_order": settings.scheduled_sampling_order}  # fmt: skip
    for rollout in batch.rollouts:
        item = slice(rollout.item, rollout.item + 1)
        solver = CLASSES[settings.scheduled_sampling_sampler].from_config(
            dict(scheduler.config), timestep_spacing="trailing", **order
        )
        solver.set_timesteps(1000)
        timesteps = list(range(rollout.source, rollout.target, -1))
        solver.set_begin_index(999 - rollout.source)
        sample = solver.add_noise(
            batch.latents[item], batch.input_noise[item], torch.tensor([rollout.source])
        )
        for timestep in timesteps:
            scheduler_timestep = solver.timesteps[999 - timestep]
            prediction = predict(
                unet,
                batch,
                solver.scale_model_input(sample, scheduler_timestep),
                torch.tensor([timestep]),
                item,
            )
            sample = solver.step(prediction, scheduler_timestep, sample).prev_sample
        noisy[item] = solver.scale_model_input(sample, solver.timesteps[999 - rollout.target])
    return noisy


@pytest.mark.parametrize("solver", ["unipc", "euler", pytest.param("dpm", marks=pytest.mark.slow)])
def test_batch_loss_with_rollouts_masks_and_regularisation_equals_diffusers(tmp_path: Path, solver: str):
    """Use a non-trivial adapter whose dropout is off in rollouts and on in the trained forward pass."""
    subject = masked_dataset(
        make_dataset(tmp_path / "subject", "subject", [SQUARE] * 4), tmp_path / "masks", images=[0, 1]
    )
    people = make_dataset(tmp_path / "people", "people", [SQUARE] * 4)
    people = people.model_copy(update={"is_regularisation": True})
    settings = {"max_train_steps": 1, "train_batch_size": 8, **ROLLOUT_SETTINGS, **SOLVERS[solver]}
    spec = make_spec(tmp_path, subject, people, **settings)
    with trainer_of(spec) as trainer:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for parameter in trainer.parameters.values():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        batch = trainer.batches.read(0)
        loss = trainer._loss(batch, 0).detach()
        dropout_seed = torch.initial_seed()  # seeded by the loss, for the dropout of its last forward pass
        unet = trainer.unet_module
        with torch.no_grad():
            noisy = expected_rollouts(spec, unet.eval(), batch)
            torch.manual_seed(dropout_seed)
            prediction = predict(unet.train(), batch, noisy, batch.timesteps, slice(None))
            base_unet = UNet2DConditionModel.from_pretrained(spec.base_model.path, subfolder="unet")
            base_prediction = predict(base_unet, batch, noisy, batch.timesteps, slice(None))
    assert len(batch.rollouts) > 2
    assert 0 < sum(batch.prior) < 8
    assert batch.loss_weights is not None
    is_prior = torch.tensor(batch.prior)[:, None, None, None]
    target = torch.where(is_prior, base_prediction, target_of(scheduler_of(spec), batch))
    expected = expected_losses(spec, batch, noisy, prediction, target).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
