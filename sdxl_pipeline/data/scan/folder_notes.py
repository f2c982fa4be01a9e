"""What a folder holds that a dataset's settings do not use, found from the names of its files alone."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.captions.caption_tables import captions_from_table, table_path
from sdxl_pipeline.data.captions.text_files import CaptionError
from sdxl_pipeline.data.scan.file_listing import find_files
from sdxl_pipeline.data.scan.file_types import SHADOWED, FileTypes, classify_files
from sdxl_pipeline.data.sources.fetch_result import SourceError
from sdxl_pipeline.data.sources.url_lists import read_list

_KOHYA_FOLDER: Final = re.compile(r"([1-9]\d{0,2})_.*")
"""A folder of kohya's trainers: how often an epoch shows each image, and a concept.

Four digits are a year far more often, and a leading zero is a numbering.
"""
_REGULARISATION_FOLDERS: Final = frozenset({"reg", "regs", "regularization", "regularisation"})
_TABLES: Final = tuple(
    f"{name}{suffix}" for name in ("metadata", "captions") for suffix in (".parquet", ".jsonl", ".ndjson")
)


def folder_notes(dataset: ImageDataset, paths: Sequence[str], roles: FileTypes) -> Iterator[str]:
    """Yield a sentence on each kind of content that the dataset's settings leave unused: `paths` are relative to its folder.

    - caption files beside images, or a table of captions, while captions are the files' names;
    - second caption files of an image;
    - folders named as kohya's trainers name them, whose number of repeats is not followed.
    """
    if dataset.dataset_type == "conditioning":  # masks have neither captions nor repeats
        return
    if dataset.caption_strategy == "filename" and not dataset.only_instance_prompt:
        if count := len(roles.companions):
            files = "1 text file is" if count == 1 else f"{count} text files are"
            yield f"{files} stored beside images and not read; write caption_strategy: textfile."
        for path in paths:
            if path.lower().endswith(_TABLES):
                yield f"{path} is not read; if it holds captions, write caption_strategy: parquet and its path in parquet.path."
    if dataset.caption_strategy == "textfile":
        shadowed = [paths[position] for position, why in roles.left_out.items() if why.startswith(SHADOWED)]
        if shadowed:
            files = "1 caption file is" if len(shadowed) == 1 else f"{len(shadowed)} caption files are"
            yield f"{files} not read, such as {shadowed[0]}: another one of the same image goes before (.txt, then .caption)."
    if dataset.type == "local" and dataset.dataset_type == "image":
        yield from _kohya_notes(dataset, [paths[position] for position in roles.images])


def local_notes(dataset: ImageDataset) -> list[str]:
    """Return what a run would report of the files of this machine, without reading an image: a folder is listed, a table is read.

    Beside `folder_notes` these are rows of a caption table or list that are not used, and why a table cannot be read.
    """
    notes: list[str] = []
    try:
        if dataset.type == "csv" and dataset.csv_file is not None and dataset.csv_file.exists():
            notes += read_list(dataset).notes
        folder = dataset.instance_data_dir
        if dataset.type != "local" or folder is None:
            return notes
        files = find_files(folder)
        paths = files["path"].tolist()
        roles = classify_files(paths, files["problem"].tolist())
        notes += folder_notes(dataset, paths, roles)
        if table_path(dataset, folder) is not None:
            images = [paths[position] for position in roles.images]
            captions_from_table(dataset, folder, images, paths, notes.append)
    except (CaptionError, SourceError) as error:
        notes.append(str(error))
    except OSError:  # no folder yet, or none that can be listed: reported elsewhere
        pass
    return notes


def _kohya_notes(dataset: ImageDataset, images: Sequence[str]) -> Iterator[str]:
    """Yield a sentence on each folder whose name asks for other repeats than the dataset's, or for regularisation."""
    root = dataset.instance_data_dir or Path()
    counts: Counter[tuple[str, ...]] = Counter()
    for folder, count in Counter(image.rpartition("/")[0] for image in images).items():
        parts = folder.split("/")
        depth = next((depth for depth, name in enumerate(parts) if _KOHYA_FOLDER.fullmatch(name)), None)
        if depth is not None:
            counts[tuple(parts[: depth + 1])] += count
        elif _KOHYA_FOLDER.fullmatch(root.name):
            counts[()] += count
    for folders, count in sorted(counts.items()):
        name = folders[-1] if folders else root.name
        named = _KOHYA_FOLDER.fullmatch(name)
        repeats = max(0, int(named[1]) - 1) if named else 0
        above = {part.lower() for part in (*folders[:-1], root.name)}
        regularises = bool(above & _REGULARISATION_FOLDERS) and not dataset.is_regularisation_data
        if repeats == dataset.repeats and not regularises:
            continue
        wanted = [f'"repeats": {repeats}'] + ['"is_regularisation_data": true'] * regularises
        alone = not folders or (len(counts) == 1 and sum(counts.values()) == len(images))
        entry = (
            "in this entry"
            if alone
            else f'in an entry of its own with "instance_data_dir": "{root.joinpath(*folders).as_posix()}"'
        )
        where = "/".join(folders) or root.name
        yield (
            f"folder {where} ({count} images): the repeats in its name, as kohya's trainers write them, are not followed; "
            f"write {' and '.join(wanted)} {entry}."
        )
