"""The hardware resource: which profile is taken, from where, and what a change that does not fit says."""

import dagster as dg
import pytest

from resources.hardware import HardwareProfile
from sdxl_pipeline.config.hardware_profiles import PRESETS, detect


def test_the_field_goes_before_the_environment_and_that_before_detection(monkeypatch):
    monkeypatch.delenv("SDXL_HARDWARE", raising=False)
    assert HardwareProfile().hardware() == detect()
    monkeypatch.setenv("SDXL_HARDWARE", "cuda-24gb")
    assert HardwareProfile().hardware() == PRESETS["cuda-24gb"]
    assert HardwareProfile(profile="cuda-80gb").hardware() == PRESETS["cuda-80gb"]
    assert HardwareProfile(profile="auto").hardware() == detect()


def test_changes_are_made_on_top_of_the_profile_and_false_is_a_change():
    hardware = HardwareProfile(profile="cuda-24gb", vae_batch_size=2, gradient_checkpointing=False).hardware()
    assert hardware.model_dump() == PRESETS["cuda-24gb"].model_dump() | {
        "vae_batch_size": 2,
        "gradient_checkpointing": False,
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"profile": "cuda-16gb"}, "'cuda-16gb' does not exist"),
        ({"profile": "cpu", "vae_batch_size": 0}, "vae_batch_size: .*greater than or equal to 1, not 0"),
        ({"profile": "cpu", "mixed_precision": "fp8"}, "mixed_precision: .*not 'fp8'"),
        ({"profile": "apple-silicon", "num_processes": 2}, "num_processes must be 1"),
    ],
)
def test_what_does_not_fit_is_a_failure_that_is_not_retried(fields, message):
    with pytest.raises(dg.Failure, match=message) as raised:
        HardwareProfile(**fields).hardware()
    assert raised.value.allow_retries is False


def test_the_launchpad_can_set_every_field_and_each_is_described():
    schema = HardwareProfile.to_config_schema().as_field().config_type.fields
    assert set(schema) == {"profile", *PRESETS["cpu"].model_dump()}
    assert all(field.description for field in schema.values())


def test_a_profile_can_be_chosen_in_the_launchpad():
    chosen = []

    @dg.asset
    def taken(hardware: HardwareProfile) -> None:
        chosen.append(hardware.hardware())

    result = dg.materialize(
        [taken],
        resources={"hardware": HardwareProfile.configure_at_launch()},
        run_config={"resources": {"hardware": {"config": {"profile": "cuda-12gb", "cpu_threads": 2}}}},
    )
    assert result.success
    assert (chosen[0].profile, chosen[0].cpu_threads) == ("cuda-12gb", 2)
