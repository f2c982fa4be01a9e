"""Entries of masks, and the datasets of images that they belong to: what cannot be meant in them and between them."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.config.schema.key_facts import keys_with
from sdxl_pipeline.config.schema.masks import MaskSettings
from sdxl_pipeline.config.validators.dataset_rules import Finding

GEOMETRY: Final = keys_with(ImageDataset, lambda key: key.masks == "of image")
"""Keys that a mask takes from its image: it is resized, cropped and flipped like its image."""

_SOURCES = ("local", "aws")


class LinkFinding(NamedTuple):
    """A `Finding` about the entry `id`; one without remedy is a warning."""

    id: str
    key: str
    message: str
    hint: str


def mask_source(entry: ImageDataset) -> ImageDataset:
    """The entry as a source of masks: a file needs no caption to be one."""
    plain = {"caption_strategy": "filename", "missing_captions": "empty", "caption_shuffle": None}
    off = {"prepend_instance_prompt": False, "only_instance_prompt": False, "caption_filter_list": None}
    return entry.model_copy(update=plain | off)


def check_mask_entry(entry: ImageDataset) -> Iterator[Finding]:
    """What cannot be meant in an entry of dataset_type conditioning, its source aside."""
    if entry.conditioning_type is None:
        yield Finding(
            "conditioning_type",
            "is missing",
            'write "mask" (the loss is weighted from black to white) or "segmentation" (all that is not black counts)',
        )
    if entry.type not in _SOURCES:
        yield Finding(
            "type",
            f"{entry.type} names files after their addresses or rows, so that no mask would have its image's name",
            f"write one of {', '.join(_SOURCES)}: a mask has the path of its image",
        )
    if entry.conditioning_data is not None:
        yield Finding("conditioning_data", "is given for masks", "write it in the entry of the images")
    if entry.is_regularisation_data:
        yield Finding("is_regularisation_data", "is given for masks", "write it in the entry of the images")


def check_image_entry(dataset: ImageDataset) -> Iterator[Finding]:
    """What cannot be meant of masks and regularisation in an entry of images."""
    if dataset.conditioning_type is not None:
        yield Finding(
            "conditioning_type",
            "is given for images",
            'write "dataset_type": "conditioning" if these are masks, or leave it out',
        )
    if dataset.source_dataset_id is not None:
        yield Finding(
            "source_dataset_id",
            "is given for images",
            "leave it out: the entry of the images names its masks in conditioning_data",
        )
    if dataset.dataset_type == "eval":
        if dataset.conditioning_data is not None:
            yield Finding(
                "conditioning_data",
                "is given for an eval dataset, and the eval loss is measured on whole images",
                "leave it out",
            )
        if dataset.is_regularisation_data:
            yield Finding(
                "is_regularisation_data",
                "is given for an eval dataset, which is not trained on",
                "leave it out, or write dataset_type image",
            )


def check_mask_links(
    images: Sequence[ImageDataset],
    masks: Sequence[ImageDataset],
    written: Mapping[str, Collection[str]],
) -> Iterator[LinkFinding]:
    """What entries of images and of masks say of each other; `written` has the keys that stand in each entry, by id."""
    by_id = {entry.id: entry for entry in masks}
    users: dict[str, list[ImageDataset]] = {entry.id: [] for entry in masks}
    for dataset in images:
        named = dataset.conditioning_data
        if named is None:
            continue
        if named in by_id:
            users[named].append(dataset)
            continue
        known = (
            f"write one of {', '.join(by_id)}" if by_id else 'add an entry with "conditioning_type": "mask"'
        )
        yield LinkFinding(
            dataset.id,
            "conditioning_data",
            "names no entry of dataset_type conditioning that is not disabled",
            known,
        )
    for entry in masks:
        yield from _check_users(entry, users[entry.id], written.get(entry.id, ()))
    trained = [dataset for dataset in images if dataset.dataset_type == "image"]
    if trained and all(dataset.is_regularisation_data for dataset in trained):
        yield LinkFinding(
            trained[0].id,
            "is_regularisation_data",
            "is true for every dataset, so that there would be nothing to learn",
            "leave it out for the images that are to be learned",
        )


def unused_mask_settings(training: MaskSettings, images: Sequence[ImageDataset]) -> Iterator[str]:
    """Settings of masks and regularisation that have no effect, or leave the datasets' own without one."""
    has_masks = any(each.conditioning_data for each in images)
    if training.masked_loss_probability == 0 and has_masks:
        yield "masked_loss_probability = 0: the masks are read, and never used"
    if training.masked_loss_probability != 1 and not has_masks:
        yield f"masked_loss_probability = {training.masked_loss_probability:g} has no effect: no dataset has conditioning_data"
    if training.prior_loss_weight != 1 and not any(each.is_regularisation_data for each in images):
        yield f"prior_loss_weight = {training.prior_loss_weight:g} has no effect: no dataset has is_regularisation_data"


def _check_users(
    entry: ImageDataset, users: Sequence[ImageDataset], written: Collection[str]
) -> Iterator[LinkFinding]:
    names = [dataset.id for dataset in users]
    if entry.source_dataset_id is not None and entry.source_dataset_id not in names:
        yield LinkFinding(
            entry.id,
            "source_dataset_id",
            "names a dataset whose conditioning_data does not name this entry",
            f'write "conditioning_data": "{entry.id}" in the entry of the images',
        )
    elif not users:
        yield LinkFinding(
            entry.id, "", "no dataset names it in conditioning_data: these masks are not used", ""
        )
    for dataset in users:
        ignored = [key for key in GEOMETRY if key in written and getattr(entry, key) != getattr(dataset, key)]
        if ignored:
            keys = ", ".join(ignored)
            yield LinkFinding(
                entry.id,
                "",
                f"its own {keys} are not read: a mask is resized and cut as its image in {dataset.id} is",
                "",
            )
