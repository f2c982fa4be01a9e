"""SimpleTuner's webhook file is parsed, its problems contain their position, and no output contains a URL."""

import json
from pathlib import Path

import pytest

from sdxl_pipeline.config.linked_files import read_webhooks
from sdxl_pipeline.config.loader import load_project
from sdxl_pipeline.config.problems import ProjectError

SECRET = "t0ken-nobody-may-see"
DISCORD = {"webhook_type": "discord", "webhook_url": f"https://discord.com/api/webhooks/1/{SECRET}"}
RAW = {"webhook_type": "raw", "callback_url": f"https://example.com/{SECRET}"}


def test_read_webhooks_accepts_one_webhook_or_a_list(tmp_path):
    path = tmp_path / "webhooks.json"
    path.write_text(json.dumps(DISCORD | {"message_prefix": "cats", "log_level": "error"}))
    (webhook,), problems = read_webhooks(path)
    assert problems == []
    assert webhook.address == DISCORD["webhook_url"]
    assert (webhook.message_prefix, webhook.log_level, webhook.ssl_no_verify) == ("cats", "error", False)
    path.write_text(json.dumps([DISCORD, RAW | {"ssl_no_verify": "true"}]))
    webhooks, problems = read_webhooks(path)
    assert problems == []
    assert [webhook.webhook_type for webhook in webhooks] == ["discord", "raw"]
    assert webhooks[1].ssl_no_verify is True


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ([], ""),
        ([3], "[0]."),
        ({"webhook_type": "slack", "webhook_url": f"https://example.com/{SECRET}"}, "webhook_type"),
        ({"webhook_url": f"https://example.com/{SECRET}"}, "webhook_type"),
        ({"webhook_type": "discord"}, "webhook_url"),
        ([DISCORD, {"webhook_type": "raw"}], "[1].callback_url"),
        ({"webhook_type": "discord", "webhook_url": f"example.com/{SECRET}"}, "webhook_url"),
        ({"webhook_type": "raw", "callbak_url": f"https://example.com/{SECRET}"}, "callbak_url"),
        (DISCORD | {"log_level": "loud"}, "log_level"),
    ],
)
def test_read_webhooks_invalid_file_is_a_problem_without_the_url(write_project, content, key):
    folder = write_project({"webhook_config": "webhooks.json"})
    (folder / "webhooks.json").write_text(json.dumps(content))
    with pytest.raises(ProjectError) as caught:
        load_project(folder)
    assert (folder / "webhooks.json", key) in [
        (problem.file, problem.key) for problem in caught.value.problems
    ]
    assert SECRET not in str(caught.value) + repr(caught.value)


@pytest.mark.parametrize("inline", [DISCORD, [RAW], json.dumps(DISCORD), DISCORD["webhook_url"]])
def test_load_project_inline_webhook_is_a_problem_without_the_url(write_project, inline):
    with pytest.raises(ProjectError) as caught:
        load_project(write_project({"webhook_config": inline}))
    assert "webhook_config" in str(caught.value)
    assert SECRET not in str(caught.value) + repr(caught.value)


def test_load_project_settings_contain_the_path_of_the_webhook_file_only(write_project):
    folder = write_project({"webhook_config": "webhooks.json", "webhook_reporting_interval": "0"})
    (folder / "webhooks.json").write_text(json.dumps(DISCORD))
    training = load_project(folder).training
    assert Path(str(training.webhook_config)) == folder / "webhooks.json"
    assert training.webhook_reporting_interval is None
    assert SECRET not in training.model_dump_json()
