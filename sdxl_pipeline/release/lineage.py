"""The content of lineage.json: what a release was made from, so that `sdxl-pipeline reproduce` can make it again. No torch.

It has digests, counts, settings and versions, and neither local paths nor addresses of buckets and servers.
"""

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path, PurePath
from typing import Any, Final

from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.schema.datasets import ImageDataset, TextEmbedsDataset
from sdxl_pipeline.config.schema.key_facts import keys_with
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.runtime.specs import TrainedLora, TrainSpec

DATASETS: Final = "datasets"
GENERATED_FOLDER: Final = "generated_folder"
"""Entry of a dataset whose images the project generates: its folder within the project."""
GENERATOR_FILE: Final = "generate_data.json"
HARDWARE_FIELDS: Final = ("device", "num_processes", "cpu_threads")
"""Fields of the hardware that are no settings and change the weights, if only in their last bits."""

_PACKAGES: Final = [
    "sdxl-pipeline", "torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "pillow", "lycoris-lora", "bitsandbytes",
    "torchao", "optimum-quanto", "prodigyopt", "schedulefree", "torch-optimi",
]  # fmt: skip
_LOCATIONS: Final = {
    "instance_data_dir", "url", "aws_bucket_name", "aws_data_prefix", "aws_endpoint_url", "aws_region_name", "csv_file",
    "csv_cache_dir", "cache_dir_vae", "cache_dir", "disabled", "verify", "skip_file_discovery", "allow_private_addresses",
}  # fmt: skip
"""Fields of a dataset that are not published: where its files are, and how this machine reads them."""
_INHERITED: Final = {
    kind: set(keys_with(kind, lambda key: key.inherited)) for kind in (ImageDataset, TextEmbedsDataset)
}


def release_lineage(
    project: Project,
    model: ResolvedModel,
    data_versions: Mapping[str, str],
    lora: TrainedLora,
    spec: TrainSpec,
    is_final: bool = True,
) -> dict[str, Any]:
    """Return the lineage of the released weights as plain data.

    `data_versions` are the digests of the datasets' assets by asset key, `spec` is that of the training, and `is_final` whether the
    weights are those of the run's last step.
    """
    return {
        "data_versions": {
            f"{project.name}/base_model": model.digest,
            f"{project.name}/lora": lora.weights_sha256,
            **data_versions,
        },
        "base_model": model.source,
        "base_model_revision": model.revision,
        "base_model_digests": dict(model.digests),
        "training_identity": lora.identity,
        "weights_sha256": lora.weights_sha256,
        "step": lora.steps,
        "is_final": is_final,
        "weights": lora.released_weights,
        "ancestor": lora.ancestor and lora.ancestor.model_dump(mode="json"),
        DATASETS: [
            _dataset(dataset, project.folder) for dataset in (*project.datasets, *project.mask_datasets)
        ]
        + [_entry(entry) for entry in project.text_embeds],
        "prompts": [prompt.model_dump(mode="json") for prompt in spec.prompts],
        "hardware": hardware_record(spec),
        "environment": environment(),
        **_generator(project.folder),
        **({"overrides": plain_overrides(lora)} if lora.overrides else {}),
    }


def environment() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that compute weights, and the machine's architecture."""
    versions = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in _PACKAGES:
        try:
            versions[package] = installed_version(package)
        except PackageNotFoundError:
            continue
    return versions


def hardware_record(spec: TrainSpec) -> dict[str, Any]:
    """Return HARDWARE_FIELDS; without `cpu_threads` the number of threads is that of OMP_NUM_THREADS, if it is set."""
    record = {field: getattr(spec.hardware, field) for field in HARDWARE_FIELDS}
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if record["cpu_threads"] is None and threads.isdecimal() and int(threads) > 0:
        record["cpu_threads"] = int(threads)
    return record


def plain_overrides(lora: TrainedLora) -> dict[str, dict[str, Any]]:
    """Return the overridden settings as plain JSON values, in which local paths can be detected and removed."""
    return {
        each.setting: {"configured": json.loads(each.configured), "used": json.loads(each.used)}
        for each in lora.overrides
    }


def datasets_without_location(lineage: Mapping[str, Any]) -> list[str]:
    """Return the ids of the datasets whose images are neither on the Hub nor generated, so that `reproduce` needs `--data` for them."""
    return [
        entry["id"]
        for entry in lineage.get(DATASETS, ())
        if entry["dataset_type"] != "text_embeds"
        and entry["type"] != "huggingface"
        and GENERATED_FOLDER not in entry
    ]


def _dataset(dataset: ImageDataset, folder: Path) -> dict[str, Any]:
    """Return an entry of images; `parquet.path` is kept if it is relative to the images, and otherwise only its name."""
    entry = _entry(dataset)
    if dataset.parquet is not None:
        path = PurePath(dataset.parquet.path)
        entry["parquet"]["path"] = path.name if path.is_absolute() else path.as_posix()
    images = dataset.instance_data_dir
    if _generator(folder) and images is not None and images.is_relative_to(folder):
        entry[GENERATED_FOLDER] = images.relative_to(folder).as_posix()
    return entry


def _entry(entry: ImageDataset | TextEmbedsDataset) -> dict[str, Any]:
    """Return the values that are not the default, and those that another config.json could give as the default."""
    values = entry.model_dump(mode="json", exclude=_LOCATIONS)
    defaults = {name: field.default for name, field in type(entry).model_fields.items()}
    kept = {"id", "type", "dataset_type", "resolution_type"} | _INHERITED[type(entry)]
    found = {
        name: value
        for name, value in values.items()
        if name in kept or getattr(entry, name) != defaults[name]
    }
    if isinstance(entry.caption_filter_list, Path):
        found["caption_filter_list"] = entry.caption_filter_list.name
    return found


def _generator(folder: Path) -> dict[str, Any]:
    """Return the request of a project that generates its images."""
    file = folder / GENERATOR_FILE
    return {"generator": json.loads(file.read_text(encoding="utf-8"))} if file.is_file() else {}
