"""The file of webhook_config: webhooks for messages of a training. Their URLs are secrets, which print as asterisks."""

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

_EXPECTED: Final = (
    '{"webhook_type": "discord", "webhook_url": "https://..."}, {"webhook_type": "raw", "callback_url": "https://..."}, '
    "or a list of such objects"
)


class Webhook(SettingsModel):
    """One webhook in the format of SimpleTuner's file."""

    webhook_type: Literal["discord", "raw"] = Field(
        description="discord: webhook of a channel; raw: JSON for a custom receiver."
    )
    webhook_url: SecretStr | None = Field(None, description="URL to post to.")
    callback_url: SecretStr | None = Field(None, description="URL to post to, for raw webhooks.")
    message_prefix: str | None = Field(
        None, description="Prefix of each message; not set: the project's name."
    )
    log_level: Level = Field("info", description="Minimum level of the messages that are sent.")
    ssl_no_verify: bool = Field(False, description="Do not verify TLS certificates.")

    @field_validator("webhook_url", "callback_url")
    @classmethod
    def _require_http(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(("http://", "https://")):
            raise BadValueError("is not a URL", "write a URL that begins with https://")
        return value

    @property
    def address(self) -> str | None:
        """Return the URL to post to, a secret."""
        address = self.webhook_url or self.callback_url
        return address.get_secret_value() if address else None


def read_webhooks(path: Path) -> tuple[tuple[Webhook, ...], list[Problem]]:
    """Return the webhooks of a file and its problems."""
    content, problems = read_json(path, _EXPECTED)
    if content is None:
        return (), problems
    entries = content if isinstance(content, list) else [content]
    if not entries:
        problems.append(Problem(path, "", NO_VALUE, "contains no webhook", f"write {_EXPECTED}"))
    webhooks = []
    for number, entry in enumerate(entries):
        where = f"[{number}]." if isinstance(content, list) else ""
        if not isinstance(entry, Mapping):
            problems.append(Problem(path, where, NO_VALUE, "is not an object", f"write {_EXPECTED}"))
            continue
        webhook, found = _read_webhook(entry, path, where)
        problems += found
        if webhook is not None:
            webhooks.append(webhook)
    return tuple(webhooks), problems


def _read_webhook(entry: Mapping[str, Any], path: Path, where: str) -> tuple[Webhook | None, list[Problem]]:
    parsed = parse_settings(entry, Webhook, KeySchema(), path, where)
    if parsed.settings is not None and not parsed.problems and parsed.settings.address is None:
        key = "callback_url" if parsed.settings.webhook_type == "raw" else "webhook_url"
        return None, [Problem(path, where + key, NO_VALUE, "is missing", "write the URL to post to")]
    return parsed.settings, parsed.problems
