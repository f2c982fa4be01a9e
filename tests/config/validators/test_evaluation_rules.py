"""Settings of early stopping, selection, gallery and checks of the evaluation: values, combinations, and those without effect."""

import pytest

from assets.checks.result_checks import EVALUATION_CHECKS
from sdxl_pipeline.config.loader import load_project
from sdxl_pipeline.config.problems import ProjectError
from sdxl_pipeline.config.schema.evaluation import EVALUATION_CHECK_NAMES


@pytest.mark.parametrize(
    ("config", "key", "message", "hint"),
    [
        (
            {"early_stopping_patience": 2},
            "early_stopping_patience",
            "none are computed",
            "eval_epoch_interval",
        ),
        (
            {"early_stopping_patience": 2, "eval_steps_interval": 5, "eval_loss_disable": True},
            "early_stopping_patience",
            "eval_loss_disable is true",
            "eval_loss_disable false",
        ),
        (
            {"num_caption_samples": 2, "caption_sample_seeds": 3},
            "caption_sample_seeds",
            "above num_caption_samples (2)",
            "at most 2",
        ),
        ({"num_caption_samples": 65}, "num_caption_samples", "at most 64", "at most 64"),
        ({"gallery_scales": [0.5, 0]}, "gallery_scales", "above 0", "above 0"),
        ({"gallery_scales": 0.5}, "gallery_scales", "must be a list", "a list"),
        ({"released_checkpoint": "500"}, "released_checkpoint", "no checkpoint", "step-500"),
        ({"released_checkpoint": "step-0"}, "released_checkpoint", "no checkpoint", "step-500"),
        ({"evaluation_checks": "warning"}, "evaluation_checks", "must be an object", "better_than_base"),
        (
            {"evaluation_checks": {"images_vald": "warning"}},
            "evaluation_checks",
            "images_vald is not a check",
            "write images_valid",
        ),
        (
            {"evaluation_checks": {"images_valid": "off"}},
            "evaluation_checks",
            'images_valid is "off"',
            '"blocking" or "warning"',
        ),
    ],
)
def test_evaluation_settings_invalid_is_a_problem(write_project, config, key, message, hint):
    with pytest.raises(ProjectError) as caught:
        load_project(write_project(config))
    (problem,) = caught.value.problems
    assert problem.key == key
    assert message in problem.message
    assert hint in problem.hint


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"early_stopping_min_delta": 0.1}, "early_stopping_min_delta"),
        ({"eval_loss_disable": True, "num_probe_images": 4}, "num_probe_images"),
        (
            {"num_caption_samples": 0, "caption_sample_seeds": 1, "memorisation_limit": 0.5},
            "caption_sample_seeds, memorisation_limit",
        ),
        (
            {"evaluation_type": "none", "pretrained_similarity_model_name_or_path": "facebook/dinov2-small"},
            "pretrained_similarity_model_name_or_path",
        ),
        (
            {"model_type": "full", "num_caption_samples": 0, "gallery_scales": [0.5]},
            "gallery_scales",
        ),
    ],
)
def test_evaluation_settings_without_effect_are_warnings(write_project, config, words):
    warnings = load_project(write_project(config)).warnings
    assert [f"{words} has no effect" in warning for warning in warnings].count(True) == 1


def test_evaluation_settings_switched_off_have_no_warning(write_project):
    project = load_project(write_project({"early_stopping_patience": 0, "num_caption_samples": 0}))
    assert project.warnings == ()
    assert project.training.early_stopping_patience is None


@pytest.mark.parametrize(
    ("written", "read"),
    [("Best", "best"), ("last", "last"), ("step-500", "step-500"), ("step-00000500", "step-500")],
)
def test_released_checkpoint_is_read_in_one_form(write_project, written, read):
    assert load_project(write_project({"released_checkpoint": written})).training.released_checkpoint == read


def test_gallery_scales_are_read_from_a_list_or_text(write_project):
    for number, written in enumerate(([0.4, 1], "0.4,1")):
        project = load_project(write_project({"gallery_scales": written}, name=f"p{number}"))
        assert project.training.gallery_scales == (0.4, 1.0)


def test_evaluation_check_names_contain_the_checks_of_the_evaluation(write_project):
    assert {check.name for check in EVALUATION_CHECKS} <= {*EVALUATION_CHECK_NAMES}
    project = load_project(write_project({"evaluation_checks": {"better_than_base": "warning"}}))
    assert project.training.evaluation_checks == {"better_than_base": "warning"}
