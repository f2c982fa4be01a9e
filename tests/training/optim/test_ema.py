"""The EMA of the weights: its value, what it leaves unchanged, and which weights are validated, written, evaluated and released."""

import pytest
import torch
from safetensors.torch import load_file

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.stage_runner import StageStopped, StopSignal
from sdxl_pipeline.stages.train import main
from sdxl_pipeline.training.optim.ema import Ema, EvalWeights
from tests.support.training_datasets import make_dataset, make_spec

CPU = torch.device("cpu")
SCHEDULE_FREE = {"optimizer": "adamw_schedulefree", "lr_scheduler": "constant_with_warmup"}


def settings_of(**values) -> TrainingSettings:
    return TrainingSettings(**{"max_train_steps": 6, "use_ema": True, **values})


def one_parameter(value: float = 0.0, dtype=torch.float32) -> dict[str, torch.nn.Parameter]:
    return {"weight": torch.nn.Parameter(torch.full((3,), value, dtype=dtype))}


def test_ema_update_equals_the_recursion_of_its_decays():
    parameters = one_parameter()
    ema = Ema(settings_of(ema_decay=0.35), parameters, CPU)
    expected = 0.0
    for step in range(1, 8):
        parameters["weight"].data.fill_(step**2)
        ema.update(step)
        decay = 0.0 if step == 1 else min(step / (9 + step), 0.35)
        expected = decay * expected + (1 - decay) * step**2
    assert ema.average["weight"].tolist() == pytest.approx([expected] * 3)
    assert (ema.decay(2), ema.decay(5)) == (2 / 11, 0.35)


def test_ema_update_with_warm_up_and_interval_copies_and_skips():
    parameters = one_parameter(1.0)
    ema = Ema(settings_of(ema_warmup_steps=4, ema_decay=0.9, ema_update_interval=2), parameters, CPU)
    ema.update(3)  # not a multiple of the interval
    parameters["weight"].data.fill_(2.0)
    ema.update(2)
    assert ema.average["weight"].tolist() == [2.0] * 3
    parameters["weight"].data.fill_(3.0)
    ema.update(4)
    assert ema.average["weight"].tolist() == pytest.approx([0.9 * 2 + 0.1 * 3] * 3)


def test_ema_of_bf16_weights_has_float32_resolution():
    parameters = one_parameter(1.0, torch.bfloat16)
    ema = Ema(settings_of(ema_decay=0.999, ema_warmup_steps=1), parameters, CPU)
    parameters["weight"].data.fill_(1.0 + 2**-7)
    ema.update(1)
    assert ema.average["weight"].tolist() == pytest.approx([1 + 0.001 * 2**-7] * 3, rel=1e-7)


def test_released_restores_the_weights_bit_for_bit_after_an_error():
    parameters = {"weight": torch.nn.Parameter(torch.randn(50))}
    before = parameters["weight"].detach().clone()
    optimizer = torch.optim.AdamW(parameters.values())
    eval_weights = EvalWeights(settings_of(), optimizer, parameters, CPU)
    eval_weights.ema.average["weight"].fill_(7.0)

    def fail_in_context():
        with eval_weights.released():
            assert parameters["weight"].tolist() == [7.0] * 50
            raise ValueError("sampling failed")

    with pytest.raises(ValueError, match="sampling"):
        fail_in_context()
    assert torch.equal(parameters["weight"], before)


def test_released_kind_is_trained_without_an_average():
    parameters = one_parameter(1.0)
    optimizer = torch.optim.AdamW(parameters.values())
    for settings, kind in (
        (settings_of(), "ema"),
        (settings_of(released_weights="trained"), "trained"),
        (settings_of(use_ema=False), "trained"),
    ):
        assert EvalWeights(settings, optimizer, parameters, CPU).released_kind == kind


@pytest.mark.parametrize(
    ("ema_validation", "labels"), [("none", [""]), ("ema_only", [" EMA"]), ("comparison", ["", " EMA"])]
)
def test_sampled_yields_images_of_the_weights_selected_by_ema_validation(ema_validation, labels):
    parameters = one_parameter(1.0)
    eval_weights = EvalWeights(
        settings_of(ema_validation=ema_validation), torch.optim.AdamW(parameters.values()), parameters, CPU
    )
    eval_weights.ema.average["weight"].fill_(2.0)
    values_by_label = {}

    def generate(label):
        values_by_label[label] = parameters["weight"][0].item()
        yield label

    assert list(eval_weights.sampled(generate)) == labels
    assert values_by_label == {label: {"": 1.0, " EMA": 2.0}[label] for label in labels}


def test_eval_mode_of_schedule_free_optimizer_applies_its_average_and_restores_bit_for_bit():
    pytest.importorskip("schedulefree", reason="needs the extra `optimizers`")
    from schedulefree import AdamWScheduleFree

    parameters = {"weight": torch.nn.Parameter(torch.randn(50))}
    optimizer = AdamWScheduleFree(parameters.values(), lr=0.1)
    eval_weights = EvalWeights(settings_of(use_ema=False, **SCHEDULE_FREE), optimizer, parameters, CPU)
    for _ in range(3):
        parameters["weight"].grad = parameters["weight"].detach().clone()
        optimizer.step()
    before = parameters["weight"].detach().clone()
    z = optimizer.state[parameters["weight"]]["z"]
    with eval_weights.eval_mode():
        # y = 0.9 x + 0.1 z
        torch.testing.assert_close(parameters["weight"].detach(), (before - 0.1 * z) / 0.9)
    assert torch.equal(parameters["weight"], before)
    optimizer.step()  # raises outside of training mode
    assert not eval_weights.writes_training_weights


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"), captions=1)


def train(folder, dataset, run, **settings):
    spec = make_spec(
        folder, dataset, run=run, **{"max_train_steps": 6, "checkpoint_step_interval": 3, **settings}
    )
    return spec, main(spec, Reporter(), StopSignal())


WITH_EMA = {"use_ema": True, "ema_decay": 0.9}


@pytest.fixture(scope="module")
def with_ema(tmp_path_factory, dataset):
    folder = tmp_path_factory.mktemp("ema")
    return train(
        folder,
        dataset,
        "run",
        **WITH_EMA,
        validation_disable=False,
        validation_step_interval=0,
        validation_disable_unconditional=True,
    )


def test_train_with_ema_writes_and_releases_the_average(with_ema):
    spec, manifest = with_ema
    trained = load_file(f"{spec.run_dir}/pytorch_lora_weights.safetensors")
    average = load_file(f"{spec.run_dir}/ema/pytorch_lora_weights.safetensors")
    assert manifest.weights_path == f"{spec.run_dir}/ema/pytorch_lora_weights.safetensors"
    assert manifest.released_weights == "ema"
    assert trained.keys() == average.keys()
    assert any(not torch.equal(trained[name], average[name]) for name in trained)
    checkpoint = f"{spec.run_dir}/checkpoints/step-00000006"
    saved_average = load_file(f"{checkpoint}/average.safetensors")
    assert {tensor.dtype for tensor in saved_average.values()} == {torch.float32}
    names = {image.name for image in manifest.validation_images}
    assert len(names) % 2 == 0
    assert {name + " EMA" for name in names if not name.endswith(" EMA")} < names


def test_train_with_other_released_weights_reuses_the_run(with_ema):
    spec, manifest = with_ema
    settings = spec.settings.model_copy(update={"released_weights": "trained"})
    reused = main(spec.model_copy(update={"settings": settings}), Reporter(), StopSignal())
    assert reused.reused
    assert reused.weights_path == f"{spec.run_dir}/pytorch_lora_weights.safetensors"
    assert reused.weights_sha256 != manifest.weights_sha256
    assert main(spec, Reporter(), StopSignal()).weights_sha256 == manifest.weights_sha256


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(WITH_EMA, id="ema"),
        pytest.param(SCHEDULE_FREE, id="schedule-free", marks=pytest.mark.slow),
    ],
)
def test_train_resumed_run_writes_identical_weights(settings, dataset, tmp_path):
    if "optimizer" in settings:
        pytest.importorskip("schedulefree", reason="needs the extra `optimizers`")
    _, uninterrupted = train(tmp_path, dataset, "uninterrupted", **settings)

    spec = make_spec(
        tmp_path,
        dataset,
        run="interrupted",
        **{"max_train_steps": 6, "checkpoint_step_interval": 3, **settings},
    )

    class StopAtFirstCheckpoint(StopSignal):
        @property
        def requested(self) -> bool:
            return any((tmp_path / "interrupted" / "checkpoints").glob("step-*"))

    with pytest.raises(StageStopped):
        main(spec, Reporter(), StopAtFirstCheckpoint())
    resumed = main(spec, Reporter(), StopSignal())
    assert resumed.resumed_from_step == 3
    assert resumed.weights_sha256 == uninterrupted.weights_sha256
    trained = "pytorch_lora_weights.safetensors"
    assert (tmp_path / "interrupted" / trained).read_bytes() == (
        tmp_path / "uninterrupted" / trained
    ).read_bytes()


@pytest.mark.slow
def test_train_schedule_free_writes_the_average(dataset, tmp_path):
    pytest.importorskip("schedulefree", reason="needs the extra `optimizers`")
    spec, manifest = train(tmp_path, dataset, "run", **SCHEDULE_FREE, learning_rate=0.01)
    written = load_file(manifest.weights_path)
    trained = load_file(f"{spec.run_dir}/checkpoints/step-00000006/trainable.safetensors")
    for parameter_name, tensor in trained.items():
        (name,) = [name for name in written if name.endswith(parameter_name.replace(".default.", "."))]
        assert not torch.equal(written[name], tensor)
        torch.testing.assert_close(written[name], tensor, atol=0.02, rtol=0)
