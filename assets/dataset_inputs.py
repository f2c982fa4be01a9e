"""The inputs that training, evaluation and release have in common."""

import dagster as dg

from assets.asset_keys import project_key
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.runtime.specs import ValidationPrompt


def model_input(project: Project) -> dict[str, dg.AssetIn]:
    """Return the base model as an input named `model`."""
    return {"model": dg.AssetIn(key=project_key(project, "base_model"), dagster_type=ResolvedModel)}


def validation_prompts(project: Project) -> tuple[ValidationPrompt, ...]:
    """Return the project's prompts for a spec."""
    return tuple(
        ValidationPrompt(name=prompt.name, prompt=prompt.prompt, negative_prompt=prompt.negative_prompt)
        for prompt in project.prompts
    )
