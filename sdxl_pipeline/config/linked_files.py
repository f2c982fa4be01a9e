"""The JSON files that a setting points to: LyCORIS parameters (`lycoris_config`) and webhooks (`webhook_config`)."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, SecretStr, field_validator

from sdxl_pipeline.config.json_files import read_json
from sdxl_pipeline.config.paths import exists, resolve_path
from sdxl_pipeline.config.problems import NO_VALUE, Problem
from sdxl_pipeline.config.schema.lycoris import LYCORIS, LycorisSettings
from sdxl_pipeline.config.schema.settings_model import BadValueError, SettingsModel
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.settings_parser import parse_settings
from sdxl_pipeline.config.simpletuner_schema import KeySchema
from sdxl_pipeline.config.validators.dataset_rules import Finding

EXAMPLE = (
    '{"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 12, '
    '"apply_preset": {"target_module": ["Attention"], "module_algo_map": {"Attention": {"factor": 12}}}}'
)


def with_lycoris_file(
    training: TrainingSettings, folder: Path, problems: list[Problem], warnings: list[str]
) -> TrainingSettings:
    """Return the settings with the content of the file of lycoris_config instead of its path, relative to the project's `folder`.

    Problems of the file are added to `problems`; the settings then contain a valid placeholder. If the file does not exist, the one of
    the same name in the folder is read: SimpleTuner's paths are relative to its own repository.
    """
    written = training.lycoris_config
    if training.lora_type != "lycoris" or not isinstance(written, str):
        return training
    path = resolve_path(folder, written)
    if not exists(path) and exists(folder / path.name):
        warnings.append(
            f"config.json: lycoris_config names {written}, which does not exist; {path.name} of the project folder is read instead"
        )
        path = folder / path.name
    count_before = len(problems)
    content, unreadable = read_json(path, EXAMPLE)
    problems += unreadable
    if isinstance(content, Mapping):
        parsed = parse_settings(content, LycorisSettings, LYCORIS, path)
        problems += parsed.problems
        warnings += parsed.warnings
        for finding in () if parsed.settings is None else check_lycoris(parsed.settings):
            problems.append(Problem(path, finding.key, NO_VALUE, finding.message, finding.hint))
        if len(problems) == count_before:
            return training.model_copy(update={"lycoris_config": parsed.settings})
    elif content is not None:
        problems.append(Problem(path, "", NO_VALUE, "does not contain an object", f"write {EXAMPLE}"))
    return training.model_copy(update={"lycoris_config": LycorisSettings(algo="lokr")})


def check_lycoris(settings: LycorisSettings) -> Iterator[Finding]:
    """Yield invalid combinations within a LyCORIS configuration."""
    preset = settings.apply_preset
    if preset is not None and not (
        preset.target_module or preset.target_name or preset.module_algo_map or preset.name_algo_map
    ):
        yield Finding("apply_preset", "targets no layer", 'write "target_module": ["Attention"] in it')
    tucker = settings.use_tucker or any(override.use_tucker for override in settings.overrides)
    if tucker and "lokr" in settings.algorithms:
        yield Finding("use_tucker", "makes a LoKr that lycoris-lora cannot load", "write false")
    if settings.bypass_mode and settings.dora_wd:
        yield Finding(
            "bypass_mode",
            "does not train the magnitudes of dora_wd, but saves them to the file",
            "remove one of the two",
        )
    if settings.dropout and not settings.bypasses:
        yield Finding("dropout", "has no effect without bypass_mode", "remove it; dora_wd may remain")
    if settings.rank_dropout and "lokr" in settings.algorithms:
        yield Finding(
            "rank_dropout",
            "of LoKr works on a CPU only, where lycoris-lora samples the mask",
            "write 0, or use dropout",
        )


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
