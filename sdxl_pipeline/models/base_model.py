"""Resolution of the base model: from a name in the settings to local files and a digest of each component.

Names are `bundled:tiny-sdxl`, a Hub id, a local folder in diffusers' layout, or a single `.safetensors` checkpoint in SDXL's original
layout. A single checkpoint has no configurations and no tokenizers. They come from its companion folder: one named like the file without
its suffix, else the folder of the file, if that has them in diffusers' layout. Otherwise the configurations are SDXL-base's, which are
part of this package, and the tokenizers SDXL-base's from the Hub cache or the Hub (2 MB).

Torch is not imported here: the asset graph reads these records.
"""

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sdxl_pipeline.config.paths import resolve_path
from sdxl_pipeline.config.schema.model import MODEL_FLAVOURS, ModelSettings
from sdxl_pipeline.files.digest import digest_json
from sdxl_pipeline.models.hub_download import download_snapshot
from sdxl_pipeline.models.model_files import (
    MODEL_INDEX,
    SCHEDULER_CONFIG,
    SINGLE_FILE_PREFIXES,
    TOKENIZERS,
    WEIGHT_STEMS,
    BaseModelError,
    DigestCache,
    choose_component,
    choose_tokenizer,
    default_cache_dir,
    digest_component,
    digest_config,
    digest_plain_files,
    read_safetensors_header,
)

BUNDLED_NAME = "bundled:tiny-sdxl"
BUNDLED_MODEL = Path(__file__).parent / "tiny" / "model"
BUNDLED_CLIP = Path(__file__).parent / "tiny" / "clip"
BUNDLED_TAESD = Path(__file__).parent / "tiny" / "taesd"
SDXL_BASE_ID = MODEL_FLAVOURS["base-1.0"]
SDXL_BASE_CONFIGS = Path(__file__).parent / "configs" / "sdxl-base-1.0"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TEXT_COMPONENTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


class ResolvedModel(BaseModel):
    """A base model on the local disk, as plain data for a stage's spec.

    The digests cover the content in use, not its path: a model by Hub id and by local copy has the same digests.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(description="The name in the settings, or the default of the model flavour.")
    kind: Literal["folder", "single_file"]
    path: str = Field(description="Folder in diffusers' layout, or the .safetensors checkpoint.")
    config_path: str = Field(
        description="Folder with the components' configurations; `path` itself for a folder."
    )
    tokenizers_path: str = Field(description="Folder that holds tokenizer/ and tokenizer_2/.")
    revision: str | None = Field(default=None, description="Commit on the Hub; None for local files.")
    variants: dict[str, str] = Field(
        default_factory=dict,
        description="Component -> variant of its weight files, such as fp16; absent for none.",
    )
    scheduler_overrides: dict[str, str | bool] = Field(
        default_factory=dict,
        description="Scheduler configuration overridden by marker tensors of a checkpoint.",
    )
    vae_source: str | None = Field(default=None, description="Name of the VAE that replaces the model's own.")
    vae_path: str | None = Field(
        default=None, description="Folder with that VAE's config.json, or its .safetensors file."
    )
    vae_revision: str | None = None
    digests: dict[str, str] = Field(description="SHA-256 per component; `vae` is the VAE in use.")

    @property
    def digest(self) -> str:
        """Digest of all components."""
        return digest_json(self.digests)

    @property
    def vae_digest(self) -> str:
        """Digest that latents depend on."""
        return self.digests["vae"]

    @property
    def text_digest(self) -> str:
        """Digest that text embeddings depend on: both encoders and both tokenizers."""
        return digest_json({component: self.digests[component] for component in _TEXT_COMPONENTS})

    @property
    def unet_digest(self) -> str:
        """Digest of the fine-tuned UNet."""
        return self.digests["unet"]


@dataclass(frozen=True)
class _Vae:
    """A VAE that replaces the model's own."""

    source: str
    path: Path
    digest: str
    variant: str | None = None
    revision: str | None = None


def resolve_base_model(
    settings: ModelSettings, project_folder: Path, cache_dir: Path | None = None
) -> ResolvedModel:
    """Locate or download the base model of the settings and compute the digests of its components.

    Relative paths are relative to `project_folder`. `cache_dir` stores the digests of large files (default: `default_cache_dir`);
    downloads are stored in huggingface_hub's own cache. Raises BaseModelError with a fix.
    """
    cache = DigestCache(cache_dir or default_cache_dir())
    source = settings.pretrained_model_name_or_path or MODEL_FLAVOURS[settings.model_flavour]
    vae_source = settings.pretrained_vae_model_name_or_path
    location = _locate(source, project_folder)
    if isinstance(location, str):
        return _resolve_hub(location, settings.revision, vae_source, project_folder, cache)
    if settings.revision is not None:
        raise BaseModelError(
            f"revision is {settings.revision!r}, but {source} is not on the Hub, so it has no revisions. Remove `revision`."
        )
    if location.is_dir():
        return _resolve_folder(source, location, None, vae_source, project_folder, cache)
    return _resolve_single_file(source, location, vae_source, project_folder, cache)


def _locate(source: str, project_folder: Path) -> Path | str:
    """Return an existing folder or .safetensors file, or a Hub id."""
    if source.startswith("bundled:"):
        if source != BUNDLED_NAME:
            raise BaseModelError(f"{source!r} is not a bundled model. There is one: {BUNDLED_NAME!r}.")
        return BUNDLED_MODEL
    path = resolve_path(project_folder, source)
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() != ".safetensors":
            raise BaseModelError(
                f"{path} is not a .safetensors file, the only supported format: pickled checkpoints can run code when opened. "
                "Convert it, or download its .safetensors version."
            )
        return path
    if _HUB_ID.fullmatch(source) and not source.lower().endswith(".safetensors"):
        return source
    raise BaseModelError(
        f"{source!r} is neither a file nor a folder (searched {path}), nor a Hub id of the form owner/name. "
        f"Give one of these, or {BUNDLED_NAME!r}."
    )


def _resolve_hub(
    repo_id: str, revision: str | None, vae_source: str | None, project_folder: Path, cache: DigestCache
) -> ResolvedModel:
    def choose(names: Collection[str]) -> list[str]:
        _require_index(names, repo_id)
        chosen = [MODEL_INDEX, SCHEDULER_CONFIG]
        for component in WEIGHT_STEMS:
            if component == "vae" and vae_source is not None:
                chosen.append("vae/config.json")  # the configuration of a single-file VAE
                continue
            files = choose_component(names, component, repo_id)
            chosen += [files.config, *files.weights]
        for tokenizer in TOKENIZERS:
            chosen += choose_tokenizer(names, tokenizer, repo_id)
        return chosen

    snapshot = download_snapshot(repo_id, revision, [MODEL_INDEX], choose)
    return _resolve_folder(repo_id, snapshot.folder, snapshot.revision, vae_source, project_folder, cache)


def _resolve_folder(
    source: str,
    folder: Path,
    revision: str | None,
    vae_source: str | None,
    project_folder: Path,
    cache: DigestCache,
) -> ResolvedModel:
    names = _list_files(folder)
    _require_sdxl(folder, names, source)
    vae = _resolve_vae(vae_source, project_folder, folder, cache)
    digests, variants = _digest_configs(folder, folder, cache), {}
    for component in WEIGHT_STEMS:
        if component == "vae" and vae is not None:
            continue
        files = choose_component(names, component, source)
        digests[component] = digest_component(folder, files.config, files.weights, cache)
        if files.variant is not None:
            variants[component] = files.variant
    return _record(source, "folder", folder, folder, folder, revision, digests, variants, vae)


def _resolve_single_file(
    source: str, path: Path, vae_source: str | None, project_folder: Path, cache: DigestCache
) -> ResolvedModel:
    header, _ = read_safetensors_header(path)
    required = [component for component in SINGLE_FILE_PREFIXES if component != "vae" or vae_source is None]
    absent = [
        f"{component} ({prefix}*)"
        for component, prefix in SINGLE_FILE_PREFIXES.items()
        if component in required and not any(name.startswith(prefix) for name in header)
    ]
    if absent:
        raise BaseModelError(
            f"{path} is not a complete SDXL checkpoint: it lacks {', '.join(absent)}. Give a checkpoint with all components"
            + (
                ", or set pretrained_vae_model_name_or_path."
                if absent == ["vae (first_stage_model.*)"]
                else "."
            )
        )
    overrides = _scheduler_overrides(header, path)
    configs, tokenizers = _companions(path)
    _require_discrete_betas(configs, source)
    vae = _resolve_vae(vae_source, project_folder, configs, cache)
    digests = _digest_configs(configs, tokenizers, cache)
    if overrides:
        digests["scheduler"] = digest_json({"config": digests["scheduler"], "overrides": overrides})
    tensors = cache.single_file_components(path)
    for component in required:
        config = digest_config(configs / component / "config.json")
        digests[component] = digest_json({"config": config, "tensors": tensors[component]})
    record = _record(source, "single_file", path, configs, tokenizers, None, digests, {}, vae)
    return record.model_copy(update={"scheduler_overrides": overrides})


def _scheduler_overrides(header: Collection[str], path: Path) -> dict[str, str | bool]:
    """Return the overrides that marker tensors of a checkpoint imply, by ComfyUI's convention."""
    if any(name.startswith("edm_") for name in header):
        raise BaseModelError(
            f"{path} was trained in EDM's formulation (it has edm_* tensors), which is not supported. "
            "Choose a checkpoint that predicts noise or v."
        )
    if "v_pred" not in header:
        return {}
    return {"prediction_type": "v_prediction"} | (
        {"rescale_betas_zero_snr": True} if "ztsnr" in header else {}
    )


def _record(
    source: str,
    kind: Literal["folder", "single_file"],
    path: Path,
    configs: Path,
    tokenizers: Path,
    revision: str | None,
    digests: dict[str, str],
    variants: dict[str, str],
    vae: _Vae | None,
) -> ResolvedModel:
    if vae is not None:
        digests = digests | {"vae": vae.digest}
        variants = variants | ({"vae": vae.variant} if vae.variant else {})
    return ResolvedModel(
        source=source,
        kind=kind,
        path=str(path),
        config_path=str(configs),
        tokenizers_path=str(tokenizers),
        revision=revision,
        variants=variants,
        vae_source=vae.source if vae else None,
        vae_path=str(vae.path) if vae else None,
        vae_revision=vae.revision if vae else None,
        digests=dict(sorted(digests.items())),
    )


def _resolve_vae(source: str | None, project_folder: Path, configs: Path, cache: DigestCache) -> _Vae | None:
    """Return the VAE of pretrained_vae_model_name_or_path: a Hub id or folder with a VAE at its root or in vae/, or a .safetensors file."""
    if source is None:
        return None
    location = _locate(source, project_folder)
    revision = None
    if isinstance(location, str):
        snapshot = download_snapshot(
            location, None, [MODEL_INDEX, "config.json", "vae/config.json"], _vae_files(location)
        )
        location, revision = snapshot.folder, snapshot.revision
    if location.is_file():
        components = cache.single_file_components(location)
        tensors = components.get("vae") or cache.file(location)
        digest = digest_json({"config": digest_config(configs / "vae" / "config.json"), "tensors": tensors})
        return _Vae(source, location, digest)
    names = _list_files(location)
    subfolder = _vae_folder(names)
    files = choose_component(names, "vae", source, subfolder)
    digest = digest_component(location, files.config, files.weights, cache)
    return _Vae(source, location / subfolder, digest, files.variant, revision)


def _vae_folder(names: Collection[str]) -> str:
    return "vae" if "vae/config.json" in names else ""


def _vae_files(source: str) -> Callable[[Collection[str]], list[str]]:
    def choose(names: Collection[str]) -> list[str]:
        files = choose_component(names, "vae", source, _vae_folder(names))
        return [files.config, *files.weights]

    return choose


def _companions(checkpoint: Path) -> tuple[Path, Path]:
    """Return the folders with the configurations and with the tokenizers of a single-file checkpoint."""
    candidates = (checkpoint.with_suffix(""), checkpoint.parent)
    configs = next(
        (
            f
            for f in candidates
            if all((f / component / "config.json").is_file() for component in WEIGHT_STEMS)
            and (f / SCHEDULER_CONFIG).is_file()
            and (f / MODEL_INDEX).is_file()
        ),
        SDXL_BASE_CONFIGS,
    )
    for folder in candidates:
        if all((folder / tokenizer).is_dir() for tokenizer in TOKENIZERS):
            return configs, folder

    def choose(names: Collection[str]) -> list[str]:
        return [name for tokenizer in TOKENIZERS for name in choose_tokenizer(names, tokenizer, SDXL_BASE_ID)]

    try:
        return configs, download_snapshot(SDXL_BASE_ID, None, ["tokenizer/vocab.json"], choose).folder
    except BaseModelError as error:
        raise BaseModelError(
            f"{checkpoint} is a single-file checkpoint, which has no tokenizers, and those of {SDXL_BASE_ID} are not available. "
            f"Put its folders tokenizer and tokenizer_2 into {candidates[0]}, or connect once. ({error})"
        ) from error


def _digest_configs(configs: Path, tokenizers: Path, cache: DigestCache) -> dict[str, str]:
    names = _list_files(tokenizers)
    digests = {
        "pipeline": digest_config(configs / MODEL_INDEX),
        "scheduler": digest_config(configs / SCHEDULER_CONFIG),
    }
    for tokenizer in TOKENIZERS:
        files = choose_tokenizer(names, tokenizer, str(tokenizers))
        digests[tokenizer] = digest_plain_files(tokenizers, files, cache)
    return digests


def _list_files(folder: Path) -> list[str]:
    """Return the names of the files in a model folder and its component folders."""
    return [
        path.relative_to(folder).as_posix()
        for pattern in ("*", "*/*")
        for path in folder.glob(pattern)
        if path.is_file()
    ]


def _require_index(names: Collection[str], source: str) -> None:
    if MODEL_INDEX not in names:
        raise BaseModelError(
            f"{source} has no {MODEL_INDEX}, so it is not a model in diffusers' layout. If it contains a single .safetensors checkpoint, "
            "give the path of that file."
        )
    if SCHEDULER_CONFIG not in names:
        raise BaseModelError(f"{source} has no {SCHEDULER_CONFIG}. Add that of the model it was made from.")


def _require_sdxl(folder: Path, names: Collection[str], source: str) -> None:
    _require_index(names, source)
    index = json.loads((folder / MODEL_INDEX).read_text(encoding="utf-8"))
    pipeline = index.get("_class_name", "")
    if not str(pipeline).startswith("StableDiffusionXL"):
        raise BaseModelError(
            f"{source} is a {pipeline or 'model of unknown kind'}; this project trains Stable Diffusion XL."
        )
    for component in WEIGHT_STEMS:
        if index.get(component) in (None, [None, None]):
            raise BaseModelError(
                f"{source} has no {component}. This project trains SDXL base models, which have two text encoders; the refiner has one."
            )
    _require_discrete_betas(folder, source)


def _require_discrete_betas(configs: Path, source: str) -> None:
    """Raise BaseModelError unless the scheduler's configuration holds the betas of a discrete variance-preserving schedule.

    diffusers would fill in missing entries with its own defaults, which are other betas than SDXL's.
    """
    config = json.loads((configs / SCHEDULER_CONFIG).read_text(encoding="utf-8"))
    required = ["num_train_timesteps"]
    if config.get("trained_betas") is None:
        required += ["beta_schedule", "beta_start", "beta_end"]
    reasons = [f"has no {key}" for key in required if config.get(key) is None]
    if config.get("use_flow_sigmas"):
        reasons.append("has use_flow_sigmas true")
    if "sigma_data" in config:
        reasons.append("has sigma_data, which is EDM's")
    if reasons:
        raise BaseModelError(
            f"{source}: {SCHEDULER_CONFIG} (_class_name {config.get('_class_name')!r}) {', '.join(reasons)}. Models of flow matching and "
            "EDM are not supported; this project trains those with discrete betas (a DDPM, DDIM, PNDM, LMS, Heun, Euler, UniPC or "
            "DPMSolverMultistep scheduler, for SDXL with beta_schedule scaled_linear). Choose another base model or, if the file is wrong, "
            "put that of the model it was made from in its place."
        )
