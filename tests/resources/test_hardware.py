"""The hardware resource: the source of the profile, overrides, and errors about invalid ones."""

import dagster as dg
import pytest

from resources.hardware import HardwareProfile
from sdxl_pipeline.config.hardware_profiles import PRESETS, detect


def test_hardware_field_overrides_environment_which_overrides_detection(monkeypatch):
    monkeypatch.delenv("SDXL_HARDWARE", raising=False)
    assert HardwareProfile().hardware() == detect()
    monkeypatch.setenv("SDXL_HARDWARE", "cuda-24gb")
    assert HardwareProfile().hardware() == PRESETS["cuda-24gb"]
    assert HardwareProfile(profile="cuda-80gb").hardware() == PRESETS["cuda-80gb"]
    assert HardwareProfile(profile="auto").hardware() == detect()


def test_hardware_fields_override_the_profile_also_with_false():
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
def test_hardware_invalid_field_fails_without_retries(fields, message):
    with pytest.raises(dg.Failure, match=message) as raised:
        HardwareProfile(**fields).hardware()
    assert raised.value.allow_retries is False


def test_hardware_schema_has_every_field_with_a_description():
    schema = HardwareProfile.to_config_schema().as_field().config_type.fields
    assert set(schema) == {"profile", *PRESETS["cpu"].model_dump()}
    assert all(field.description for field in schema.values())


def test_hardware_run_config_selects_the_profile():
    profiles = []

    @dg.asset
    def reader(hardware: HardwareProfile) -> None:
        profiles.append(hardware.hardware())

    result = dg.materialize(
        [reader],
        resources={"hardware": HardwareProfile.configure_at_launch()},
        run_config={"resources": {"hardware": {"config": {"profile": "cuda-12gb", "cpu_threads": 2}}}},
    )
    assert result.success
    assert (profiles[0].profile, profiles[0].cpu_threads) == ("cuda-12gb", 2)
