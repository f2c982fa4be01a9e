"""The file that `lycoris_config` names, read with the project, so that what is trained depends on its content and not on its place."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from sdxl_pipeline.config.json_files import read_json
from sdxl_pipeline.config.paths import exists, inside
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
    """The settings with the content of the file that lycoris_config names, from the project's `folder`, in its place.

    What is wrong in it goes to `problems`; the content is then nothing that other keys need be compared with. Where the file is absent,
    the one of the same name in the folder is read: the reference's paths begin at its own repository.
    """
    written = training.lycoris_config
    if training.lora_type != "lycoris" or not isinstance(written, str):
        return training
    path = inside(folder, written)
    if not exists(path) and exists(folder / path.name):
        warnings.append(
            f"config.json: lycoris_config names {written}, which does not exist; {path.name} of the project folder is read instead"
        )
        path = folder / path.name
    found = len(problems)
    content, unreadable = read_json(path, EXAMPLE)
    problems += unreadable
    if isinstance(content, Mapping):
        reading = parse_settings(content, LycorisSettings, LYCORIS, path)
        problems += reading.problems
        warnings += reading.warnings
        for finding in () if reading.settings is None else check_lycoris(reading.settings):
            problems.append(Problem(path, finding.key, NO_VALUE, finding.message, finding.hint))
        if len(problems) == found:
            return training.model_copy(update={"lycoris_config": reading.settings})
    elif content is not None:
        problems.append(Problem(path, "", NO_VALUE, "does not hold an object", f"write {EXAMPLE}"))
    return training.model_copy(update={"lycoris_config": LycorisSettings(algo="lokr")})


def check_lycoris(settings: LycorisSettings) -> Iterator[Finding]:
    """What does not go together within a LyCORIS configuration."""
    preset = settings.apply_preset
    if preset is not None and not (
        preset.target_module or preset.target_name or preset.module_algo_map or preset.name_algo_map
    ):
        yield Finding("apply_preset", "targets no layer", 'write "target_module": ["Attention"] in it')
    tucker = settings.use_tucker or any(override.use_tucker for override in settings.overrides)
    if tucker and "lokr" in settings.algorithms:
        yield Finding("use_tucker", "makes a LoKr that lycoris-lora does not load back", "write false")
    if settings.bypass_mode and settings.dora_wd:
        yield Finding(
            "bypass_mode",
            "leaves the norms of dora_wd out of the training, though not out of the file",
            "leave one of the two out",
        )
    if settings.dropout and not settings.bypasses:
        yield Finding("dropout", "has no effect without bypass_mode", "leave it out, and dora_wd may stay")
    if settings.rank_dropout and "lokr" in settings.algorithms:
        yield Finding(
            "rank_dropout",
            "of LoKr runs on a CPU only, where lycoris-lora draws it",
            "write 0, or use dropout",
        )
