"""Validation of entries of masks, and of references between them and image datasets."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.config.schema.key_facts import keys_with
from sdxl_pipeline.config.schema.masks import MaskSettings
from sdxl_pipeline.config.validators.dataset_rules import Finding

GEOMETRY: Final = keys_with(ImageDataset, lambda key: key.masks == "of image")
"""Keys that a mask takes from its image: it is resized, cropped and flipped like its image."""

_MASK_TYPES = ("local", "aws")


class LinkFinding(NamedTuple):
    """A `Finding` about the entry `id`; one without a hint is a warning."""

    id: str
    key: str
    message: str
    hint: str


def mask_source(entry: ImageDataset) -> ImageDataset:
    """Return the entry with caption settings that accept every file, since masks need no captions."""
    captions = {"caption_strategy": "filename", "missing_captions": "empty", "caption_shuffle": None}
    disabled = {"prepend_instance_prompt": False, "only_instance_prompt": False, "caption_filter_list": None}
    return entry.model_copy(update=captions | disabled)


def check_mask_entry(entry: ImageDataset) -> Iterator[Finding]:
    """Yield invalid settings of an entry of dataset_type conditioning, except those of its source."""
    if entry.conditioning_type is None:
        yield Finding(
            "conditioning_type",
            "is missing",
            'write "mask" (loss weight = brightness) or "segmentation" (loss weight 1 where not black)',
        )
    if entry.type not in _MASK_TYPES:
        yield Finding(
            "type",
            f"{entry.type} names files after their URLs or rows, so no mask would have the name of its image",
            f"write one of {', '.join(_MASK_TYPES)}: a mask has the same path as its image",
        )
    if entry.conditioning_data is not None:
        yield Finding("conditioning_data", "is set for masks", "write it in the entry of the images")
    if entry.is_regularisation_data:
        yield Finding("is_regularisation_data", "is set for masks", "write it in the entry of the images")


def check_image_entry(dataset: ImageDataset) -> Iterator[Finding]:
    """Yield invalid settings of masks and regularisation in an entry of images."""
    if dataset.conditioning_type is not None:
        yield Finding(
            "conditioning_type",
            "is set for images",
            'write "dataset_type": "conditioning" if these are masks, or remove it',
        )
    if dataset.source_dataset_id is not None:
        yield Finding(
            "source_dataset_id",
            "is set for images",
            "remove it: the entry of the images refers to its masks by conditioning_data",
        )
    if dataset.dataset_type == "eval":
        if dataset.conditioning_data is not None:
            yield Finding(
                "conditioning_data",
                "is set for an eval dataset, but the eval loss uses no masks",
                "remove it",
            )
        if dataset.is_regularisation_data:
            yield Finding(
                "is_regularisation_data",
                "is set for an eval dataset, which is not trained on",
                "remove it, or write dataset_type image",
            )


def check_mask_links(
    images: Sequence[ImageDataset],
    masks: Sequence[ImageDataset],
    written: Mapping[str, Collection[str]],
) -> Iterator[LinkFinding]:
    """Yield invalid references between entries of images and of masks; `written` has the keys written in each entry, by id."""
    by_id = {entry.id: entry for entry in masks}
    users: dict[str, list[ImageDataset]] = {entry.id: [] for entry in masks}
    for dataset in images:
        mask_id = dataset.conditioning_data
        if mask_id is None:
            continue
        if mask_id in by_id:
            users[mask_id].append(dataset)
            continue
        known = (
            f"write one of {', '.join(by_id)}" if by_id else 'add an entry with "conditioning_type": "mask"'
        )
        yield LinkFinding(
            dataset.id,
            "conditioning_data",
            "is the id of no enabled entry of dataset_type conditioning",
            known,
        )
    for entry in masks:
        yield from _check_users(entry, users[entry.id], written.get(entry.id, ()))
    trained = [dataset for dataset in images if dataset.dataset_type == "image"]
    if trained and all(dataset.is_regularisation_data for dataset in trained):
        yield LinkFinding(
            trained[0].id,
            "is_regularisation_data",
            "is true for every dataset, so there are no images to train on",
            "remove it for the images to train on",
        )


def unused_mask_settings(training: MaskSettings, images: Sequence[ImageDataset]) -> Iterator[str]:
    """Yield settings of masks and regularisation that have no effect, or disable those of the datasets."""
    has_masks = any(each.conditioning_data for each in images)
    if training.masked_loss_probability == 0 and has_masks:
        yield "masked_loss_probability = 0: the masks are read but not used"
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
            "is a dataset whose conditioning_data is not this entry",
            f'write "conditioning_data": "{entry.id}" in the entry of the images',
        )
    elif not users:
        yield LinkFinding(entry.id, "", "is in no dataset's conditioning_data: these masks are not used", "")
    for dataset in users:
        ignored = [key for key in GEOMETRY if key in written and getattr(entry, key) != getattr(dataset, key)]
        if ignored:
            keys = ", ".join(ignored)
            yield LinkFinding(
                entry.id,
                "",
                f"its {keys} are ignored: a mask is resized and cropped like its image in {dataset.id}",
                "",
            )
