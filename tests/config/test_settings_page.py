"""Holds: docs/settings.md is what the code says today, and names every key."""

from pathlib import Path

from sdxl_pipeline.config.schema.datasets import CaptionShuffle, ImageDataset, ParquetTable, TextEmbedsDataset
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.settings_page import settings_page

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == settings_page(), (
        "run: sdxl-pipeline settings > docs/settings.md"
    )


def test_every_key_has_a_row():
    page = settings_page()
    for model in (TrainingSettings, ImageDataset, ParquetTable, CaptionShuffle, TextEmbedsDataset):
        for key, field in model.model_fields.items():
            assert any(
                line.startswith(f"| `{key}`") and str(field.description) in line for line in page.splitlines()
            ), key


def test_limits_defaults_and_choices_are_shown():
    page = settings_page()
    assert "| `lora_rank` | whole number ≥ 1 | `16` |" in page
    assert "| `gradient_checkpointing` (`use_gradient_checkpointing`) | true / false | not set |" in page
    assert "| `mixed_precision` | `no` / `bf16` / `fp16` | not set |" in page
    assert "| `instance_data_dir` | path | not set |" in page
    assert "| `aws_secret_access_key` | secret | not set |" in page
