"""Keys of `multidatabackend.json` that have no effect beside the others of their entry, and why.

`RULES` has every key that may be without effect, with the condition; every other key of an image dataset always has one. A warning is
given for keys that are written, whatever their value, but for those that are off.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from sdxl_pipeline.config.schema.datasets import ImageDataset, TextEmbedsDataset
from sdxl_pipeline.config.schema.key_facts import keys_with

_NOT_FOR_MASKS: Final = keys_with(ImageDataset, lambda key: key.masks == "unused")
_OFF: Final = (None, False, "", ())


class UnusedSetting(NamedTuple):
    """A key without effect in the entry `id`: which, and why. `key` is "" for the entry as a whole."""

    id: str
    key: str
    reason: str


def find_unused_dataset_settings(dataset: ImageDataset, keys: Collection[str]) -> Iterator[UnusedSetting]:
    """Yield those of `keys` that are set in an entry of images and have no effect there."""
    if dataset.crop_aspect_weights:  # which may be written in crop_aspect_buckets
        keys = {*keys, "crop_aspect_weights"}
    for names, reason_of in RULES:
        for key in names:
            value = getattr(dataset, key)
            if key in keys and value not in _OFF and (reason := reason_of(dataset)):
                yield UnusedSetting(dataset.id, key, reason)


def unused_mask_entry_settings(entry: ImageDataset, keys: Collection[str]) -> Iterator[UnusedSetting]:
    """Yield what is set in an entry of masks and not read; keys of geometry are compared with the images' elsewhere."""
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
    """Yield settings that have no effect, or not the one that is meant, beside the other entries; their paths are absolute."""
    trained = [dataset for dataset in images if dataset.dataset_type == "image"]
    if len(trained) == 1 and trained[0].probability != 1:
        yield UnusedSetting(trained[0].id, "probability", "it is the only dataset that is trained on")
    for dataset in trained:
        if dataset.is_regularisation_data:
            for other in trained:
                if not other.is_regularisation_data and _is_within(dataset, other):
                    reason = f"its folder is within that of {other.id}, so that the same images are also trained as ordinary ones"
                    yield UnusedSetting(
                        dataset.id, "", f"{reason}; keep regularisation images in a folder of their own"
                    )
    chosen = next((entry for entry in text_embeds if entry.default), next(iter(text_embeds), None))
    used = {dataset.text_embeds for dataset in images} | ({chosen.id} if chosen else set())
    for entry in text_embeds:
        if entry.id not in used:
            yield UnusedSetting(entry.id, "", "has no effect: no dataset names it in text_embeds")
        if entry.text_cache_ondemand and entry.text_cache_disable:
            yield UnusedSetting(
                entry.id, "text_cache_ondemand", "text_cache_disable is true, so that nothing is kept"
            )


def _is_within(dataset: ImageDataset, other: ImageDataset) -> bool:
    folder, above = dataset.instance_data_dir, other.instance_data_dir
    if dataset.type != "local" or other.type != "local" or folder is None or above is None:
        return False
    return Path(folder).is_relative_to(above)


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
    """Return why no caption is read but the instance prompt."""
    if dataset.only_instance_prompt:
        return "only_instance_prompt is true"
    return "caption_strategy is instanceprompt" if dataset.caption_strategy == "instanceprompt" else ""


def _prompt_unused(dataset: ImageDataset) -> str:
    if dataset.prepend_instance_prompt or _only_prompt(dataset):
        return ""
    return (
        f"caption_strategy is {dataset.caption_strategy}; write prepend_instance_prompt: true to put it before each caption, or "
        "caption_strategy: instanceprompt to train it alone (a release names it as trigger words where captions hold it)"
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
    return "" if is_s3 else "url is no s3:// address"


def _private_unused(dataset: ImageDataset) -> str:
    if dataset.type == "aws" and not (dataset.url or "").lower().startswith(("http://", "https://")):
        return "only downloads by http and https are checked"
    return "type is local" if dataset.type == "local" else ""


def _uncropped(dataset: ImageDataset) -> str:
    return "" if dataset.crop else "crop is false, which keeps each image's aspect; write crop: true"


def _aspects_unused(dataset: ImageDataset) -> str:
    if dataset.crop_aspect not in ("closest", "random"):
        return f"crop_aspect is {dataset.crop_aspect}; write closest or random"
    return _uncropped(dataset)


def _one_crop(dataset: ImageDataset) -> str:
    if dataset.crops_per_image == 1:
        return ""
    if dataset.dataset_type == "eval":
        return "an eval dataset has one crop for each image"
    return _fixed_crop(dataset)


def _fixed_crop(dataset: ImageDataset) -> str:
    """Return why all crops of an image are the same."""
    if _uncropped(dataset):
        return _uncropped(dataset)
    varies = dataset.crop_style == "random" or dataset.crop_aspect == "random"
    return "" if varies else f"crop_style is {dataset.crop_style}, so that all crops of an image are the same"


def _not_fresh(dataset: ImageDataset) -> str:
    reason = _uncropped(dataset) or ("" if dataset.crop_style == "random" else "crop_style is not random")
    return f"{reason}: each epoch cuts the same crop, and its latents are encoded again" if reason else ""


def _measured(dataset: ImageDataset) -> str:
    return "an eval dataset is not trained on" if dataset.dataset_type == "eval" else ""


def _ondemand_unused(dataset: ImageDataset) -> str:
    keys = ("vae_cache_disable", "vae_cache_clear_each_epoch")
    other = next((key for key in keys if getattr(dataset, key)), "")
    return f"{other} is true, so that no latents are kept" if other else ""


def _strategy_unused(dataset: ImageDataset) -> str:
    replaced = dataset.only_instance_prompt and dataset.caption_strategy != "instanceprompt"
    return "only_instance_prompt is true, which replaces every caption" if replaced else ""


def _trust_unused(dataset: ImageDataset) -> str:
    files = dataset.skipped_stages & {"metadata", "aspect"}
    return (
        f"verify is true, so that {', '.join(sorted(files))} is not skipped"
        if dataset.verify and files
        else ""
    )


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
    (("allow_private_addresses",), _private_unused),
    (("skip_file_discovery",), _trust_unused),
    (("crop_style", "crop_aspect"), _uncropped),
    (("crop_aspect_buckets",), _aspects_unused),
    (
        ("crop_aspect_weights",),
        lambda dataset: "" if dataset.crop_aspect == "random" else f"crop_aspect is {dataset.crop_aspect}",
    ),
    (("crops_per_image",), _one_crop),
    (("random_flip", "repeats"), _measured),
    (("probability",), lambda dataset: _measured(dataset) if dataset.probability != 1 else ""),
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
"""Keys, and the reason for which they have no effect in a dataset; "" where they have one."""
