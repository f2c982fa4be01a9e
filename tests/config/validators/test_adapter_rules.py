"""Validation of adapter settings: SimpleTuner's LyCORIS files load unchanged, and invalid combinations are problems with the reason."""

import json
from pathlib import Path

import pytest

from sdxl_pipeline.config.loader import load_project
from sdxl_pipeline.config.problems import ProjectError
from sdxl_pipeline.config.schema.lycoris import LycorisSettings
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.validators.adapter_rules import DORA_PRECISIONS

# of the reference's examples: SDXL's, and the general one
SDXL_LOKR = {
    "bypass_mode": True,
    "algo": "lokr",
    "multiplier": 1.0,
    "linear_dim": 10000,
    "linear_alpha": 1,
    "factor": 12,
    "apply_preset": {"target_module": ["Attention"], "module_algo_map": {"Attention": {"factor": 12}}},
}
GENERAL_LOKR = {
    "algo": "lokr",
    "multiplier": 1.0,
    "full_matrix": True,
    "linear_alpha": 1,
    "factor": 16,
    "apply_preset": {
        "target_module": ["Attention", "FeedForward"],
        "module_algo_map": {"Attention": {"factor": 16}, "FeedForward": {"factor": 8}},
    },
}
LYCORIS = {"lora_type": "lycoris", "lycoris_config": "lycoris_config.json"}


@pytest.fixture
def lycoris_problems(write_project):
    """What is wrong with a project whose lycoris_config.json holds an object (or a text), by key."""

    def problems(content: object, **config: object) -> dict[str, str]:
        folder = write_project({**LYCORIS, **config})
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "lycoris_config.json").write_text(text)
        with pytest.raises(ProjectError) as caught:
            load_project(folder)
        return {problem.key: f"{problem.message} -> {problem.hint}" for problem in caught.value.problems}

    return problems


@pytest.mark.parametrize("content", [SDXL_LOKR, GENERAL_LOKR])
def test_load_project_simpletuner_lycoris_files_load_unchanged(write_project, content):
    folder = write_project(
        {**LYCORIS, "lycoris_config": "config/examples/lycoris_config.json", "lora_rank": 64}
    )
    (folder / "lycoris_config.json").write_text(json.dumps(content))
    project = load_project(folder)
    read = project.training.lycoris
    assert isinstance(read, LycorisSettings)
    assert (read.algo, read.factor, read.linear_alpha) == ("lokr", content["factor"], 1)
    assert read.apply_preset is not None
    assert read.apply_preset.target_module == tuple(content["apply_preset"]["target_module"])
    assert read.apply_preset.module_algo_map["Attention"].factor == content["factor"]
    rank, where = project.warnings
    assert "config/examples/lycoris_config.json, which does not exist; lycoris_config.json" in where
    assert "lora_rank = 64 has no effect with lora_type lycoris" in rank


def test_load_project_lycoris_file_is_replaced_by_its_content(write_project):
    folder = write_project(LYCORIS)
    (folder / "lycoris_config.json").write_text(json.dumps(SDXL_LOKR))
    training = load_project(folder).training
    assert TrainingSettings.model_validate_json(training.model_dump_json()).lycoris == training.lycoris
    assert (
        load_project(write_project({**LYCORIS, "lycoris_config": SDXL_LOKR})).training.lycoris
        == training.lycoris
    )


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        ({"linear_dims": 4}, "linear_dims", "not a known key -> write linear_dim"),
        ({"algo": "lokrr"}, "algo", 'write "lokr"'),
        ({"algo": "boft"}, "algo", "boft is not supported"),
        ({"multiplier": 2}, "multiplier", "a strength that the weights file does not record -> write 1.0"),
        ({"apply_preset": {}}, "apply_preset", "targets no layer"),
        ({"apply_preset": {"target_modul": ["A"]}}, "apply_preset.target_modul", "write target_module"),
        (
            {"apply_preset": {"target_module": ["A"], "module_algo_map": {"A": {"factr": 3}}}},
            "apply_preset.module_algo_map",
            "A: factr is not a known key",
        ),
        ({"use_tucker": True}, "use_tucker", "cannot load"),
        ({"unbalanced_factorization": True}, "unbalanced_factorization", "cannot load such a file"),
        ({"wd_on_output": False}, "wd_on_output", "cannot load such a file"),
        ({"train_norm": True}, "train_norm", "not supported"),
        ({"dora_wd": True}, "bypass_mode", "does not train the magnitudes of dora_wd"),
        ({"bypass_mode": False, "dropout": 0.1}, "dropout", "no effect without bypass_mode"),
        ({"rank_dropout": 0.1}, "rank_dropout", "on a CPU only"),
        ({"linear_dim": 0}, "linear_dim", "at least 1"),
    ],
)
def test_check_lycoris_invalid_file_reports_key_and_reason(lycoris_problems, change, key, message):
    assert message in lycoris_problems({**SDXL_LOKR, **change})[key]


def test_with_lycoris_file_invalid_or_missing_file_hint_contains_an_example(lycoris_problems, write_project):
    assert "does not contain an object" in lycoris_problems("[]")[""]
    assert "is missing -> add it" in lycoris_problems({"linear_dim": 4})["algo"]
    with pytest.raises(ProjectError, match=r"(?s)nowhere\.json.*does not exist.*\"algo\": \"lokr\""):
        load_project(write_project({**LYCORIS, "lycoris_config": "nowhere.json"}))


@pytest.mark.parametrize(
    ("config", "key", "message"),
    [
        ({"lora_type": "lycoris"}, "lycoris_config", "is missing"),
        ({"lora_init_type": "pissa"}, "lora_init_type", "changes the base model's weights"),
        ({"init_lokr_norm": 1e-3}, "init_lokr_norm", "lora_type is standard"),
        ({"use_dora": True, "base_model_precision": "int8-quanto"}, "use_dora", "PEFT cannot dequantize"),
        (
            {"use_dora": True, "lora_target_modules": "to_q,resnets.0.conv2", "mixed_precision": "bf16"},
            "use_dora",
            "norms of a convolution, such as resnets.0.conv2, in bf16",
        ),
        (
            {"lora_target_modules": ["conv_in", "conv1"], "base_model_precision": "int4-quanto"},
            "lora_target_modules",
            "contains conv1, a convolution that base_model_precision int4-quanto quantizes",
        ),
        (
            {**LYCORIS, "lycoris_config": SDXL_LOKR, "use_dora": True},
            "use_dora",
            "applies to lora_type standard only",
        ),
        ({**LYCORIS, "lycoris_config": SDXL_LOKR, "lora_dropout": 0.1}, "lora_dropout", "lora_type standard"),
        (
            {**LYCORIS, "lycoris_config": SDXL_LOKR, "lora_target_modules": "to_k"},
            "lora_target_modules",
            "lora_type standard",
        ),
        (
            {**LYCORIS, "lycoris_config": SDXL_LOKR, "init_lokr_norm": 1e-3, "init_lora": "a.safetensors"},
            "init_lokr_norm",
            "both initialize the LoKr",
        ),
        (
            {**LYCORIS, "lycoris_config": {"algo": "loha"}, "init_lokr_norm": 1e-3},
            "init_lokr_norm",
            "algo lokr only",
        ),
        (
            {
                **LYCORIS,
                "lycoris_config": {"algo": "lokr", "dora_wd": True},
                "base_model_precision": "int8-quanto",
            },
            "lycoris_config",
            "dora_wd recomputes each weight",
        ),
        (
            {
                **LYCORIS,
                "lycoris_config": {"algo": "lokr", "bypass_mode": False},
                "base_model_precision": "int8-quanto",
            },
            "lycoris_config",
            "bypass_mode false recomputes each weight",
        ),
        (
            {
                **LYCORIS,
                "lycoris_config": SDXL_LOKR,
                "init_lokr_norm": 1e-3,
                "base_model_precision": "int8-quanto",
            },
            "init_lokr_norm",
            "deviations",
        ),
        ({"init_lora": "lora.ckpt"}, "init_lora", "not a .safetensors file"),
        ({"init_lora": "./absent.safetensors"}, "init_lora", "does not exist"),
    ],
)
def test_check_adapter_invalid_combination_reports_key_and_reason(problems_of, config, key, message):
    assert message in problems_of(config)[key].message


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True, "lora_target_modules": ["conv2"], "mixed_precision": "no"},
        {"use_dora": True, "lora_target_modules": ["proj_in"], "mixed_precision": "bf16"},
        {"lora_target_modules": ["conv_in", "conv_out", "to_q"], "base_model_precision": "int8-quanto"},
        {"lora_target_modules": ["conv1"], "base_model_precision": "int8-torchao"},
    ],
)
def test_check_adapter_supported_targets_have_no_problem(write_project, config):
    load_project(write_project(config))


@pytest.mark.parametrize("precision", DORA_PRECISIONS)
def test_check_adapter_dora_with_supported_precision_has_no_problem(write_project, precision):
    config = {"use_dora": True, "base_model_precision": precision}
    assert load_project(write_project(config)).training.use_dora


def test_load_project_init_lora_is_relative_to_the_folder(write_project):
    folder = write_project({"init_lora": "loras/first.safetensors"})
    (folder / "loras").mkdir()
    (folder / "loras" / "first.safetensors").touch()
    assert load_project(folder).training.init_lora == str(
        Path(folder, "loras", "first.safetensors").resolve()
    )
    hub = "someone/zorp/zorp.safetensors"
    assert load_project(write_project({"init_lora": hub})).training.init_lora == hub
