"""Regularisation images are trained towards the UNet without its adapter; all other images are unaffected."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_pipeline.models.components import load_unet
from sdxl_pipeline.runtime.specs import TrainSpec
from sdxl_pipeline.runtime.stage_runner import StopSignal
from sdxl_pipeline.training.trainer import Trainer
from tests.support.encoded_datasets import SilentReporter
from tests.support.training_datasets import SQUARE, make_dataset, make_spec

SUBJECT, PRIOR = "subject", "people"


def spec_of(folder: Path, prior: tuple[str, ...] = (PRIOR,), **settings: Any) -> TrainSpec:
    """Two datasets of two images each, with `prior` as regularisation, in batches of all four."""
    datasets = [
        make_dataset(folder / name, name, [SQUARE] * 2).model_copy(
            update={"is_regularisation": name in prior}
        )
        for name in (SUBJECT, PRIOR)
    ]
    return make_spec(folder, *datasets, **{"train_batch_size": 4, "max_train_steps": 2, **settings})


@pytest.fixture
def make_trainer() -> Iterator[Any]:
    trainers = []

    def make(spec: TrainSpec) -> Trainer:
        trainers.append(Trainer(spec, "0" * 64, SilentReporter(), StopSignal()))
        trainers[-1].unet.train()
        return trainers[-1]

    yield make
    for trainer in trainers:
        trainer.close()


def perturbed(trainer: Trainer) -> Trainer:
    """Return the trainer with a non-trivial adapter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter += 0.05 * torch.randn_like(parameter)
    return trainer


def predict(unet: torch.nn.Module, batch: Any, noisy_latents: torch.Tensor) -> torch.Tensor:
    conditions = {"text_embeds": batch.pooled_prompt_embeds, "time_ids": batch.time_ids}
    return unet(
        noisy_latents,
        batch.timesteps,
        encoder_hidden_states=batch.prompt_embeds,
        added_cond_kwargs=conditions,
    ).sample


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"loss_type": "huber", "huber_schedule": "snr"}, marks=pytest.mark.slow),
        pytest.param({"diff2flow_enabled": True, "diff2flow_loss": True}, marks=pytest.mark.slow),
        {"train_text_encoder": True},
    ],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_prior_loss_before_the_first_step_is_zero_with_zero_gradient(tmp_path, make_trainer, settings):
    trainer = make_trainer(spec_of(tmp_path, prior=(SUBJECT, PRIOR), **settings))
    loss = trainer._loss(trainer.batches.read(0), 0)
    assert loss.item() == 0.0
    loss.backward()
    assert all((parameter.grad == 0).all() for parameter in trainer.parameters.values())


LOKR = {
    "lora_type": "lycoris",
    "lycoris_config": {"algo": "lokr", "factor": 4, "apply_preset": {"target_module": ["Attention"]}},
}
ADAPTERS = [
    {},
    {"use_dora": True},
    LOKR,
    {"lora_dropout": 0.3},
    pytest.param({"snr_gamma": 5.0}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("settings", ADAPTERS, ids=lambda settings: next(iter(settings), "lora"))
def test_prior_target_is_the_base_model_prediction(tmp_path, make_trainer, settings):
    spec = spec_of(tmp_path, **settings)
    trainer = perturbed(make_trainer(spec))
    batch = trainer.batches.read(0)
    assert sorted(batch.prior) == [False, False, True, True]
    loss = trainer._loss(batch, 0)

    noisy_latents = trainer.batch_loss.objective.add_noise(batch.latents, batch.noise, batch.timesteps)
    torch.manual_seed(torch.initial_seed())  # the seed of the step's dropout; the base model used none
    trained = predict(trainer.unet_module, batch, noisy_latents)
    with torch.no_grad():
        base = predict(load_unet(spec.base_model, torch.float32), batch, noisy_latents)
    prior = torch.tensor(batch.prior)[:, None, None, None]
    target = torch.where(prior, base, batch.noise)
    errors = (trained - target).square().mean(dim=(1, 2, 3))
    assert errors.min() > 1e-4
    expected = (trainer.batch_loss.objective.weights(batch.timesteps) * errors).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_prior_preservation_leaves_the_adapter_unchanged(tmp_path, make_trainer):
    trainer = perturbed(make_trainer(spec_of(tmp_path)))
    batch = trainer.batches.read(0)
    noisy_latents = trainer.batch_loss.objective.add_noise(batch.latents, batch.noise, batch.timesteps)
    before = predict(trainer.unet_module, batch, noisy_latents)
    trainer._loss(batch, 0).backward()
    assert torch.equal(predict(trainer.unet_module, batch, noisy_latents), before)
    trainable_names = {name for name, p in trainer.unet_module.named_parameters() if p.requires_grad}
    assert trainable_names == set(trainer.parameters)
    assert all(parameter.grad is not None for parameter in trainer.parameters.values())


def test_prior_preservation_leaves_other_images_unaffected(tmp_path, make_trainer):
    plain, mixed = (perturbed(make_trainer(spec_of(tmp_path, prior=prior))) for prior in ((), (PRIOR,)))
    prior = mixed.batches.read(0).prior
    assert plain.batches.read(0).prior == ()
    others = torch.tensor([float(not each) for each in prior])[:, None, None, None]
    losses = [
        trainer._loss(replace(trainer.batches.read(0), loss_weights=others), 0) for trainer in (plain, mixed)
    ]
    assert losses[0] > 0
    assert torch.equal(*losses)


def loss_of(trainer: Trainer) -> torch.Tensor:
    return trainer._loss(trainer.batches.read(0), 0)


def test_prior_loss_weight_scales_only_prior_images(tmp_path, make_trainer):
    trainer = perturbed(make_trainer(spec_of(tmp_path, prior_loss_weight=3.0)))
    batch = trainer.batches.read(0)
    assert batch.loss_weights.flatten().tolist() == [3.0 if prior else 1.0 for prior in batch.prior]
    parts = []
    for selected in (True, False):
        weights = torch.tensor([float(prior is selected) for prior in batch.prior])[:, None, None, None]
        parts.append(trainer._loss(replace(batch, loss_weights=weights), 0))
    torch.testing.assert_close(loss_of(trainer), 3 * parts[0] + parts[1])


def test_prior_images_of_a_full_unet_training_keep_their_own_target(tmp_path, make_trainer):
    full = {"model_type": "full", "prior_loss_weight": 1.0}
    losses = [loss_of(make_trainer(spec_of(tmp_path, prior=prior, **full))) for prior in ((), (PRIOR,))]
    assert torch.equal(*losses)
