"""Keys of `multidatabackend.json` that have no effect with the other settings of their entry, and why.

`RULES` contains every key that may have no effect, with the condition; all other keys of an image dataset always have one. Keys that
are written cause a warning, unless their value is off.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from sdxl_pipeline.config.schema.datasets import ImageDataset, TextEmbedsDataset
from sdxl_pipeline.config.schema.key_facts import keys_with

_NOT_FOR_MASKS: Final = keys_with(ImageDataset, lambda key: key.masks == "unused")
_OFF: Final = (None, False, "", ())


class UnusedSetting(NamedTuple):
    """A key without effect in the entry `id`, and the reason. `key` is "" for the entry itself."""

    id: str
    key: str
    reason: str


def find_unused_dataset_settings(dataset: ImageDataset, keys: Collection[str]) -> Iterator[UnusedSetting]:
    """Yield those of `keys` that are set in an entry of images and have no effect."""
    if dataset.crop_aspect_weights:  # may be written in crop_aspect_buckets
        keys = {*keys, "crop_aspect_weights"}
    for names, reason_of in RULES:
        for key in names:
            value = getattr(dataset, key)
            if key in keys and value not in _OFF and (reason := reason_of(dataset)):
                yield UnusedSetting(dataset.id, key, reason)


def unused_mask_entry_settings(entry: ImageDataset, keys: Collection[str]) -> Iterator[UnusedSetting]:
    """Yield unused settings of an entry of masks. `check_mask_links` compares its geometry with the images'."""
    ignored = [key for key in _NOT_FOR_MASKS if key in keys and getattr(entry, key) not in (*_OFF, 0)]
    if ignored:
        yield UnusedSetting(
            entry.id,
            "",
            f"its {', '.join(ignored)} have no effect: masks have no captions, latents or repeats",
        )


def unused_across_entries(
    images: Sequence[ImageDataset], text_embeds: Sequence[TextEmbedsDataset]
) -> Iterator[UnusedSetting]:
    """Yield settings that have no effect, or an unintended one, with the other entries; paths are absolute."""
    trained = [dataset for dataset in images if dataset.dataset_type == "image"]
    if len(trained) == 1 and trained[0].probability != 1:
        yield UnusedSetting(trained[0].id, "probability", "it is the only dataset that is trained on")
    for dataset in trained:
        if dataset.is_regularisation_data:
            for other in trained:
                if not other.is_regularisation_data and _contains_folder_of(dataset, other):
                    reason = f"its folder is within that of {other.id}, so the same images are also trained as ordinary ones"
                    yield UnusedSetting(
                        dataset.id, "", f"{reason}; move regularisation images to a separate folder"
                    )
    default_entry = next((entry for entry in text_embeds if entry.default), next(iter(text_embeds), None))
    used = {dataset.text_embeds for dataset in images} | ({default_entry.id} if default_entry else set())
    for entry in text_embeds:
        if entry.id not in used:
            yield UnusedSetting(entry.id, "", "has no effect: it is in no dataset's text_embeds")
        if entry.text_cache_ondemand and entry.text_cache_disable:
            yield UnusedSetting(
                entry.id, "text_cache_ondemand", "text_cache_disable is true, so nothing is cached"
            )


def _contains_folder_of(dataset: ImageDataset, other: ImageDataset) -> bool:
    folder, parent = dataset.instance_data_dir, other.instance_data_dir
    if dataset.type != "local" or other.type != "local" or folder is None or parent is None:
        return False
    return Path(folder).is_relative_to(parent)


def _other_type(*types: str) -> Callable[[ImageDataset], str]:
    return lambda dataset: "" if dataset.type in types else f"type is {dataset.type}"


def _other_strategy(*strategies: str) -> Callable[[ImageDataset], str]:
    def reason(dataset: ImageDataset) -> str:
        if dataset.only_instance_prompt:
            return "only_instance_prompt is true"
        used = dataset.caption_strategy in strategies
        return "" if used else f"caption_strategy is {dataset.caption_strategy}"

    return reason


def _only_prompt(dataset: ImageDataset) -> str:
    """Return why captions other than the instance prompt are not used."""
    if dataset.only_instance_prompt:
        return "only_instance_prompt is true"
    return "caption_strategy is instanceprompt" if dataset.caption_strategy == "instanceprompt" else ""


def _prompt_unused(dataset: ImageDataset) -> str:
    if dataset.prepend_instance_prompt or _only_prompt(dataset):
        return ""
    return (
        f"caption_strategy is {dataset.caption_strategy}; write prepend_instance_prompt: true to put it before each caption, or "
        "caption_strategy: instanceprompt to use it as the only caption (a release lists it as trigger words if captions contain it)"
    )


def _shuffle_unused(dataset: ImageDataset) -> str:
    shuffle = dataset.caption_shuffle
    if shuffle is None:
        return ""
    if shuffle.enable:
        return _only_prompt(dataset)
    written = ", ".join(sorted(shuffle.model_fields_set - {"enable"}))
    return f"{written} need enable: true" if written else ""


def _s3_unused(dataset: ImageDataset) -> str:
    if dataset.type not in ("aws", "csv"):
        return f"type is {dataset.type}"
    is_s3 = dataset.url is None or dataset.url.lower().startswith(("s3://", "s3a://"))
    return "" if is_s3 else "url is not an s3:// URL"


def _private_addresses_unused(dataset: ImageDataset) -> str:
    if dataset.type == "aws" and not (dataset.url or "").lower().startswith(("http://", "https://")):
        return "only downloads by http and https are checked"
    return "type is local" if dataset.type == "local" else ""


def _crop_unused(dataset: ImageDataset) -> str:
    return "" if dataset.crop else "crop is false, which preserves each image's aspect; write crop: true"


def _aspects_unused(dataset: ImageDataset) -> str:
    if dataset.crop_aspect not in ("closest", "random"):
        return f"crop_aspect is {dataset.crop_aspect}; write closest or random"
    return _crop_unused(dataset)


def _one_crop(dataset: ImageDataset) -> str:
    if dataset.crops_per_image == 1:
        return ""
    if dataset.dataset_type == "eval":
        return "an eval dataset has one crop for each image"
    return _fixed_crop(dataset)


def _fixed_crop(dataset: ImageDataset) -> str:
    """Return why all crops of an image are equal."""
    if _crop_unused(dataset):
        return _crop_unused(dataset)
    varies = dataset.crop_style == "random" or dataset.crop_aspect == "random"
    return "" if varies else f"crop_style is {dataset.crop_style}, so all crops of an image are equal"


def _not_fresh(dataset: ImageDataset) -> str:
    reason = _crop_unused(dataset) or ("" if dataset.crop_style == "random" else "crop_style is not random")
    return f"{reason}: each epoch computes the same crop and encodes its latents again" if reason else ""


def _eval_unused(dataset: ImageDataset) -> str:
    return "an eval dataset is not trained on" if dataset.dataset_type == "eval" else ""


def _ondemand_unused(dataset: ImageDataset) -> str:
    keys = ("vae_cache_disable", "vae_cache_clear_each_epoch")
    other = next((key for key in keys if getattr(dataset, key)), "")
    return f"{other} is true, so no latents are cached" if other else ""


def _strategy_unused(dataset: ImageDataset) -> str:
    replaced = dataset.only_instance_prompt and dataset.caption_strategy != "instanceprompt"
    return "only_instance_prompt is true, which replaces every caption" if replaced else ""


def _trust_unused(dataset: ImageDataset) -> str:
    files = dataset.skipped_stages & {"metadata", "aspect"}
    return f"verify is true, so {', '.join(sorted(files))} is not skipped" if dataset.verify and files else ""


RULES: Final[tuple[tuple[tuple[str, ...], Callable[[ImageDataset], str]], ...]] = (
    (("instance_data_dir",), _other_type("local")),
    (("url", "aws_bucket_name"), _other_type("aws")),
    (
        ("aws_data_prefix",),
        lambda dataset: _other_type("aws")(dataset) or ("url is given" if dataset.url else ""),
    ),
    (
        (
            "aws_endpoint_url",
            "aws_region_name",
            "aws_access_key_id",
            "aws_secret_access_key",
            "aws_session_token",
        ),
        _s3_unused,
    ),
    (("dataset_name", "dataset_config", "revision", "split", "image_column"), _other_type("huggingface")),
    (("caption_column",), _other_strategy("huggingface")),
    (("csv_file", "csv_url_column", "csv_cache_dir"), _other_type("csv")),
    (("csv_caption_column",), _other_strategy("csv")),
    (("allow_private_addresses",), _private_addresses_unused),
    (("skip_file_discovery",), _trust_unused),
    (("crop_style", "crop_aspect"), _crop_unused),
    (("crop_aspect_buckets",), _aspects_unused),
    (
        ("crop_aspect_weights",),
        lambda dataset: "" if dataset.crop_aspect == "random" else f"crop_aspect is {dataset.crop_aspect}",
    ),
    (("crops_per_image",), _one_crop),
    (("random_flip", "repeats"), _eval_unused),
    (("probability",), lambda dataset: _eval_unused(dataset) if dataset.probability != 1 else ""),
    (
        ("aspect_bucket_rounding",),
        lambda dataset: "every crop is square" if dataset.crop and dataset.crop_aspect == "square" else "",
    ),
    (("caption_strategy",), _strategy_unused),
    (("parquet",), _other_strategy("parquet")),
    (("disable_multiline_split",), _other_strategy("textfile", "huggingface")),
    (("caption_shuffle",), _shuffle_unused),
    (("caption_filter_list", "missing_captions", "prepend_instance_prompt"), _only_prompt),
    (("instance_prompt",), _prompt_unused),
    (
        ("missing_masks",),
        lambda dataset: "" if dataset.conditioning_data else "the entry has no conditioning_data",
    ),
    (("vae_cache_ondemand",), _ondemand_unused),
    (("vae_cache_clear_each_epoch",), _not_fresh),
)
"""Keys, and a function that returns why they have no effect in a dataset, or "" if they have one."""
