"""The webhook resource: addresses in the training's environment, precedence of the project, and an invalid file."""

import json

import dagster as dg
import pytest

from resources.webhook import WebhookResource
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.webhook import WEBHOOKS_VARIABLE, load_webhooks


def write_webhook(folder, name):
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"webhook_type": "raw", "callback_url": f"https://example.com/{name}"}))
    return str(path)


def test_environment_project_webhooks_override_the_deployment(tmp_path, monkeypatch):
    monkeypatch.delenv(WEBHOOKS_VARIABLE, raising=False)
    resource = WebhookResource(config_path=write_webhook(tmp_path, "deployment"))
    for settings, name in (
        (TrainingSettings(max_train_steps=1), "deployment"),
        (TrainingSettings(max_train_steps=1, webhook_config=write_webhook(tmp_path, "project")), "project"),
    ):
        environment = resource.environment(settings)
        with monkeypatch.context() as patched:
            patched.setenv(WEBHOOKS_VARIABLE, environment[WEBHOOKS_VARIABLE])
            (webhook,) = load_webhooks(None)
        assert webhook.address == f"https://example.com/{name}"
    assert WebhookResource().environment(TrainingSettings(max_train_steps=1)) == {}


def test_environment_missing_file_fails(tmp_path, monkeypatch):
    monkeypatch.delenv(WEBHOOKS_VARIABLE, raising=False)
    with pytest.raises(dg.Failure, match="the file does not exist"):
        WebhookResource(config_path=str(tmp_path / "absent.json")).environment(
            TrainingSettings(max_train_steps=1)
        )
