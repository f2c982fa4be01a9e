"""What a model card calls an adapter, by its kind."""

from sdxl_pipeline.config.schema.key_facts import key_of
from sdxl_pipeline.config.schema.training import TrainingSettings

_ALGORITHMS = {"lokr": "LoKr", "loha": "LoHa", "lora": "LoRA", "locon": "LoCon"}


def adapter_name(settings: TrainingSettings) -> str:
    """With its article: "a DoRA of rank 16", "a LoKr (LyCORIS)"."""
    if settings.lora_type == "lycoris":
        algorithms = sorted(
            settings.lycoris.algorithms, key=lambda algo: (algo != settings.lycoris.algo, algo)
        )
        return f"a {' and '.join(_ALGORITHMS[algo] for algo in algorithms)} (LyCORIS)"
    return f"a {'DoRA' if settings.use_dora else 'LoRA'} of rank {settings.lora_rank}"


def adapter_tags(settings: TrainingSettings) -> tuple[str, ...]:
    """By which the Hub's users search."""
    if settings.lora_type == "lycoris":
        return ("lycoris", *sorted(settings.lycoris.algorithms))
    return ("lora", "dora") if settings.use_dora else ("lora",)


def is_shown(name: str, settings: TrainingSettings) -> bool:
    """Whether a setting says something about this adapter: those of PEFT's LoRA say nothing of a LyCORIS one."""
    only = key_of(TrainingSettings.model_fields[name]).lora_type
    return only in (None, settings.lora_type) and (name != "use_dora" or settings.use_dora)
