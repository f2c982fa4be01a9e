"""Hardware presets, and their detection on a fake torch module."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from sdxl_pipeline.config import hardware_profiles
from sdxl_pipeline.config.hardware_profiles import (
    GIB,
    PRESETS,
    Hardware,
    HardwareError,
    detect,
    hardware_from_name,
    probe,
)

REPOSITORY = Path(__file__).parents[2]


def torch_with(cards=(), hip=None, mps=False):
    """A torch that sees these cards, given as (GiB, major compute capability)."""
    properties = [SimpleNamespace(total_memory=int(gib * GIB), major=major) for gib, major in cards]
    return SimpleNamespace(
        cuda=SimpleNamespace(
            is_available=lambda: bool(cards),
            device_count=lambda: len(cards),
            get_device_properties=properties.__getitem__,
        ),
        version=SimpleNamespace(hip=hip),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps)),
    )


def test_presets_have_the_documented_names():
    assert list(PRESETS) == ["cpu", "apple-silicon", "cuda-12gb", "cuda-24gb", "cuda-80gb", "rocm-mi300x"]
    assert all(name == preset.profile for name, preset in PRESETS.items())
    assert PRESETS["cpu"].mixed_precision == PRESETS["apple-silicon"].mixed_precision == "no"
    assert {PRESETS[name].device for name in PRESETS if name.startswith(("cuda", "rocm"))} == {"cuda"}


@pytest.mark.parametrize(
    ("torch", "profile"),
    [
        (torch_with(), "cpu"),
        (torch_with(mps=True), "apple-silicon"),
        (torch_with([(11.6, 8)]), "cuda-12gb"),
        (torch_with([(15.8, 8)]), "cuda-12gb"),
        (torch_with([(22.0, 8)]), "cuda-24gb"),
        (torch_with([(47.5, 8)]), "cuda-24gb"),
        (torch_with([(79.1, 9)]), "cuda-80gb"),
        (torch_with([(191.5, 9)], hip="6.4"), "rocm-mi300x"),
        (torch_with([(23.9, 11)], hip="6.4"), "cuda-24gb"),
    ],
)
def test_probe_selects_preset_by_device_and_memory(monkeypatch, torch, profile):
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert probe() == PRESETS[profile]


def test_probe_several_gpus_uses_the_smallest_and_one_process_each(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", torch_with([(79.1, 9), (23.6, 8), (79.1, 9)]))
    assert probe() == Hardware.model_validate(PRESETS["cuda-24gb"].model_dump() | {"num_processes": 3})


def test_probe_gpu_without_bf16_units_uses_fp16_and_an_fp32_vae(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", torch_with([(23.6, 7)]))
    hardware = probe()
    assert (hardware.mixed_precision, hardware.vae_dtype) == ("fp16", "fp32")
    monkeypatch.setitem(sys.modules, "torch", torch_with([(23.6, 7)], hip="6.4"))
    assert probe().mixed_precision == "bf16", "compute capabilities of ROCm cards count otherwise"


def test_detect_does_not_import_torch_into_the_caller():
    code = (
        "import sys; from sdxl_pipeline.config.hardware_profiles import detect; "
        "print(detect().profile, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    profile, torch_loaded = result.stdout.split()
    assert profile in PRESETS
    assert torch_loaded == "False"


@pytest.fixture
def a_device_node(monkeypatch, tmp_path):
    """A machine with a device node, on which detection needs torch."""
    node = tmp_path / "nvidiactl"
    node.touch()
    monkeypatch.setattr(hardware_profiles, "DEVICE_NODES", (node,))
    detect.cache_clear()
    yield
    detect.cache_clear()


@pytest.mark.usefixtures("a_device_node")
def test_detect_with_a_device_node_runs_torch_in_a_child_process():
    assert detect() == probe()


@pytest.mark.usefixtures("a_device_node")
def test_detect_failing_torch_raises_instead_of_using_the_cpu(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcuda is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(HardwareError, match=r"set SDXL_HARDWARE[\s\S]*libcuda is broken"):
        detect()


def test_hardware_from_name_unknown_profile_error_lists_known_ones():
    with pytest.raises(
        HardwareError, match=r"'cuda-16gb' does not exist.*SDXL_HARDWARE.*auto, cpu, apple-silicon"
    ):
        hardware_from_name("cuda-16gb")


@pytest.mark.parametrize(
    ("profile", "change", "message"),
    [
        ("apple-silicon", {"num_processes": 2}, "one GPU"),
        ("cpu", {"mixed_precision": "fp16"}, "write 'no' or 'bf16'"),
        ("cpu", {"vae_batch_size": 0}, "greater than or equal to 1"),
        ("cpu", {"vae_dtype": "fp16"}, "'bf16' or 'fp32'"),
    ],
)
def test_hardware_invalid_combination_raises(profile, change, message):
    with pytest.raises(ValidationError, match=message):
        Hardware.model_validate(PRESETS[profile].model_dump() | change)
