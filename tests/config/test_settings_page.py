"""docs/settings.md is generated from the settings models and lists every key with its facts."""

from pathlib import Path

from sdxl_pipeline.config.schema.datasets import CaptionShuffle, ImageDataset, ParquetTable, TextEmbedsDataset
from sdxl_pipeline.config.schema.key_facts import key_of
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.settings_page import settings_page

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def facts_by_key(heading: str) -> dict[str, dict[str, str]]:
    """Return the rows of the first table below `heading` by key, each as its cells by column."""
    lines = settings_page().partition(f"{heading}\n")[2].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| key |"))
    columns, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines[start : lines.index("", start)]
    )
    return {row[0].strip("`"): dict(zip(columns, row, strict=True)) for row in rows}


def test_settings_page_equals_the_file_in_docs():
    assert PAGE.read_text(encoding="utf-8") == settings_page(), (
        "run: sdxl-pipeline settings > docs/settings.md"
    )


def test_settings_page_has_a_row_for_every_key():
    page = settings_page()
    for model in (TrainingSettings, ImageDataset, ParquetTable, CaptionShuffle, TextEmbedsDataset):
        for key, field in model.model_fields.items():
            assert any(
                line.startswith(f"| `{key}`") and str(field.description) in line for line in page.splitlines()
            ), key


def test_settings_page_contains_limits_defaults_and_choices():
    page = settings_page()
    assert "| `lora_rank` | whole number ≥ 1 | `16` |" in page
    assert "| `gradient_checkpointing` (`use_gradient_checkpointing`) | true / false | not set |" in page
    assert "| `mixed_precision` | `no` / `bf16` / `fp16` | not set |" in page
    assert "| `instance_data_dir` | path | not set |" in page
    assert "| `aws_secret_access_key` | secret | not set |" in page


def test_settings_page_lists_the_facts_of_every_training_key():
    facts = facts_by_key("## How the keys of config.json are used")
    assert list(facts) == list(TrainingSettings.model_fields)
    for name, field in TrainingSettings.model_fields.items():
        key = key_of(field)
        assert facts[name] == {
            "key": f"`{name}`",
            "affects the weights": "yes" if key.identity.affects_weights else "no",
            "identity contains": key.identity.value,
            "path": key.path or "",
            "run config": "yes" if key.overridable else "no",
            "profile": "yes" if key.profile else "",
            "length": "yes" if key.length else "",
            "card": "yes" if key.on_card else "",
            "published": "yes" if key.is_published else "no",
            "only with": f"lora_type {key.lora_type}" if key.lora_type else "",
            "needs": ", ".join(f"`{switch}`" for switch in key.needs),
            "also part of": ", ".join(key.used_by),
        }, name


def test_settings_page_lists_the_facts_of_every_dataset_key():
    images, texts = (
        facts_by_key(heading)
        for heading in ("## How the keys of multidatabackend.json are used", "### Text embeddings")
    )
    assert list(images) == list(ImageDataset.model_fields)
    assert list(texts) == list(TextEmbedsDataset.model_fields)
    assert images["resolution"] == {
        "key": "`resolution`",
        "default": "config.json, size",
        "masks": "of image",
        "part of": "aspect_buckets",
    }
    assert images["repeats"] == {"key": "`repeats`", "default": "", "masks": "unused", "part of": ""}
    assert images["type"]["part of"] == "source, scan, dataset, masks"
    assert texts["write_batch_size"] == {"key": "`write_batch_size`", "default": "config.json"}
