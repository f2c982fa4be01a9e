"""The file of `lycoris_config`, read at project load so that the settings contain its content instead of its path."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from sdxl_pipeline.config.json_files import read_json
from sdxl_pipeline.config.paths import exists, resolve_path
from sdxl_pipeline.config.problems import NO_VALUE, Problem
from sdxl_pipeline.config.schema.lycoris import LYCORIS, LycorisSettings
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.settings_parser import parse_settings
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
