"""The file that webhook_config names: where messages of a training go. Its addresses are secrets and print as stars."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, SecretStr, field_validator

from sdxl_pipeline.config.json_files import read_json
from sdxl_pipeline.config.problems import NO_VALUE, Problem
from sdxl_pipeline.config.schema.settings_model import BadValueError, SettingsModel
from sdxl_pipeline.config.settings_parser import parse_settings
from sdxl_pipeline.config.simpletuner_schema import KeySchema

Level = Literal["critical", "error", "warning", "info", "debug"]

WHAT: Final = (
    '{"webhook_type": "discord", "webhook_url": "https://..."}, {"webhook_type": "raw", "callback_url": "https://..."}, '
    "or a list of such objects"
)


class Webhook(SettingsModel):
    """One webhook, as SimpleTuner's file describes it."""

    webhook_type: Literal["discord", "raw"] = Field(
        description="discord: a channel's webhook; raw: JSON for a program of one's own."
    )
    webhook_url: SecretStr | None = Field(None, description="Address to post to.")
    callback_url: SecretStr | None = Field(None, description="The same, as raw webhooks call it.")
    message_prefix: str | None = Field(
        None, description="Stands before each message; not set: the project's name."
    )
    log_level: Level = Field("info", description="Least important message that is sent.")
    ssl_no_verify: bool = Field(False, description="Accept any TLS certificate.")

    @field_validator("webhook_url", "callback_url")
    @classmethod
    def _require_http(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(("http://", "https://")):
            raise BadValueError("is not a web address", "write an address that begins with https://")
        return value

    @property
    def address(self) -> str | None:
        """Where to post. A secret."""
        address = self.webhook_url or self.callback_url
        return address.get_secret_value() if address else None


def read_webhooks(path: Path) -> tuple[tuple[Webhook, ...], list[Problem]]:
    """The webhooks of a file, and what is wrong with it."""
    content, problems = read_json(path, WHAT)
    if content is None:
        return (), problems
    entries = content if isinstance(content, list) else [content]
    if not entries:
        problems.append(Problem(path, "", NO_VALUE, "holds no webhook", f"write {WHAT}"))
    webhooks = []
    for number, entry in enumerate(entries):
        where = f"[{number}]." if isinstance(content, list) else ""
        if not isinstance(entry, Mapping):
            problems.append(Problem(path, where, NO_VALUE, "is not an object", f"write {WHAT}"))
            continue
        webhook, found = _read_webhook(entry, path, where)
        problems += found
        if webhook is not None:
            webhooks.append(webhook)
    return tuple(webhooks), problems


def _read_webhook(entry: Mapping[str, Any], path: Path, where: str) -> tuple[Webhook | None, list[Problem]]:
    reading = parse_settings(entry, Webhook, KeySchema(), path, where)
    if reading.settings is not None and not reading.problems and reading.settings.address is None:
        key = "callback_url" if reading.settings.webhook_type == "raw" else "webhook_url"
        return None, [Problem(path, where + key, NO_VALUE, "is missing", "write the address to post to")]
    return reading.settings, reading.problems
