"""Holds: attention kernels and compilations that cannot train are refused with the reason; the others are read under SimpleTuner's names."""

import pytest

from sdxl_pipeline.config.hardware_profiles import PRESETS, Hardware
from sdxl_pipeline.config.loader import ProjectError, load_project


@pytest.mark.parametrize(
    ("written", "read"),
    [("flash-attn", "flash-attn-2"), ("flash-attention-2", "flash-attn-2"), ("xformers", "xformers")],
)
def test_kernels_are_read_under_every_name(write_project, written, read):
    project = load_project(write_project({"attention_mechanism": written, "mixed_precision": "bf16"}))
    assert project.training.attention_mechanism == read


def test_off_spelled_out_changes_nothing(write_project):
    config = {"dynamo_backend": None, "dynamo_mode": "none", "attention_mechanism": "diffusers"}
    project = load_project(write_project(config))
    assert project.warnings == ()
    assert project.training.dynamo_backend == "no"


@pytest.mark.parametrize(
    ("config", "key", "said", "hint"),
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
    write_project, config, key, said, hint
):
    with pytest.raises(ProjectError) as caught:
        load_project(write_project(config))
    (problem,) = caught.value.problems
    assert problem.key == key
    assert said in problem.message
    assert hint in problem.hint


def test_tuning_without_compilation_is_said(write_project):
    project = load_project(write_project({"dynamo_fullgraph": True}))
    assert any("dynamo_fullgraph has no effect" in warning for warning in project.warnings)


def test_hardware_gpu_kernel_without_cuda_raises():
    with pytest.raises(ValueError, match="write 'diffusers'"):
        Hardware.model_validate(PRESETS["cpu"].model_dump() | {"attention_mechanism": "xformers"})
