"""The file that `lycoris_config` names, read with the project, so that what is trained depends on its content and not on its place."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from sdxl_pipeline.project.dataset_checks import Finding
from sdxl_pipeline.project.json_files import read_json
from sdxl_pipeline.project.keys import read_settings
from sdxl_pipeline.project.problems import NO_VALUE, Problem
from sdxl_pipeline.project.sections.lycoris import LYCORIS, LycorisSettings

EXAMPLE = (
    '{"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 12, '
    '"apply_preset": {"target_module": ["Attention"], "module_algo_map": {"Attention": {"factor": 12}}}}'
)


def read_lycoris_file(
    written: str, folder: Path, problems: list[Problem], warnings: list[str]
) -> LycorisSettings | None:
    """The settings in the file that `written` names, from the project's `folder`; None when something in it is wrong.

    Where it is absent, the file of the same name in the folder is read: the reference's paths begin at its own repository.
    """
    path = (folder / Path(written).expanduser()).resolve()
    if not path.exists() and (folder / path.name).exists():
        warnings.append(
            f"config.json: lycoris_config names {written}, which does not exist; {path.name} of the project folder is read instead"
        )
        path = folder / path.name
    content, found = read_json(path, EXAMPLE)
    if content is not None and not isinstance(content, Mapping):
        found = [Problem(path, "", NO_VALUE, "does not hold an object", f"write {EXAMPLE}")]
    problems += found
    if not isinstance(content, Mapping):
        return None
    reading = read_settings(content, LycorisSettings, LYCORIS, path)
    problems += reading.problems
    warnings += reading.warnings
    if reading.settings is None:
        return None
    for finding in check_lycoris(reading.settings):
        problems.append(Problem(path, finding.key, NO_VALUE, finding.message, finding.remedy))
    return reading.settings


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
