"""Attention kernels and compile modes that cannot train are problems with the reason; the others accept SimpleTuner's names."""

import pytest

from sdxl_pipeline.config.hardware_profiles import PRESETS, Hardware
from sdxl_pipeline.config.loader import ProjectError, load_project


@pytest.mark.parametrize(
    ("written", "expected"),
    [("flash-attn", "flash-attn-2"), ("flash-attention-2", "flash-attn-2"), ("xformers", "xformers")],
)
def test_attention_mechanism_aliases_are_accepted(write_project, written, expected):
    project = load_project(write_project({"attention_mechanism": written, "mixed_precision": "bf16"}))
    assert project.training.attention_mechanism == expected


def test_acceleration_off_values_have_no_warning(write_project):
    config = {"dynamo_backend": None, "dynamo_mode": "none", "attention_mechanism": "diffusers"}
    project = load_project(write_project(config))
    assert project.warnings == ()
    assert project.training.dynamo_backend == "no"


@pytest.mark.parametrize(
    ("config", "key", "message", "hint"),
    [
        ({"attention_mechanism": "sageattention"}, "attention_mechanism", "cannot train", "flash-attn-2"),
        (
            {"attention_mechanism": "sageattention-int8-fp16-cuda"},
            "attention_mechanism",
            "cannot train",
            "xformers",
        ),
        ({"attention_mechanism": "flash-attn-3"}, "attention_mechanism", "cannot train", "flash-attn-2"),
        ({"attention_mechanism": "flex"}, "attention_mechanism", "needs compilation", "inductor"),
        (
            {"attention_mechanism": "flash-attn-2", "mixed_precision": "no"},
            "attention_mechanism",
            "bf16",
            "diffusers",
        ),
        (
            {"dynamo_backend": "inductor", "dynamo_mode": "reduce-overhead"},
            "dynamo_mode",
            "CUDA graphs",
            "max-autotune-no-cudagraphs",
        ),
        (
            {"dynamo_backend": "inductor", "base_model_precision": "int8-quanto"},
            "dynamo_backend",
            "int8-quanto",
            "int8-torchao",
        ),
        (
            {"dynamo_backend": "eager", "dynamo_mode": "max-autotune-no-cudagraphs"},
            "dynamo_mode",
            "inductor",
            "remove it",
        ),
    ],
)
def test_check_acceleration_invalid_combination_reports_reason_and_hint(
    write_project, config, key, message, hint
):
    with pytest.raises(ProjectError) as caught:
        load_project(write_project(config))
    (problem,) = caught.value.problems
    assert problem.key == key
    assert message in problem.message
    assert hint in problem.hint


def test_unused_acceleration_settings_without_compilation_are_reported(write_project):
    project = load_project(write_project({"dynamo_fullgraph": True}))
    assert any("dynamo_fullgraph has no effect" in warning for warning in project.warnings)


def test_hardware_gpu_kernel_without_cuda_raises():
    with pytest.raises(ValueError, match="write 'diffusers'"):
        Hardware.model_validate(PRESETS["cpu"].model_dump() | {"attention_mechanism": "xformers"})
