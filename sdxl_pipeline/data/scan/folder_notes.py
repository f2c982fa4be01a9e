"""Notes on content of a dataset's folder that its settings leave unused, from file names alone."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.captions.caption_tables import captions_from_table, table_path
from sdxl_pipeline.data.captions.text_files import CaptionError
from sdxl_pipeline.data.scan.file_listing import SHADOWED, FileTypes, classify_files, find_files
from sdxl_pipeline.data.sources.fetch_result import SourceError
from sdxl_pipeline.data.sources.url_lists import read_list

_KOHYA_FOLDER: Final = re.compile(r"([1-9]\d{0,2})_.*")
"""A folder name of kohya's trainers: repeats per epoch, underscore, concept.

Four digits are more often a year, and a leading zero is a numbering.
"""
_REGULARISATION_FOLDERS: Final = frozenset({"reg", "regs", "regularization", "regularisation"})
_TABLES: Final = tuple(
    f"{name}{suffix}" for name in ("metadata", "captions") for suffix in (".parquet", ".jsonl", ".ndjson")
)


def folder_notes(dataset: ImageDataset, paths: Sequence[str], file_types: FileTypes) -> Iterator[str]:
    """Yield a sentence for each kind of content that the dataset's settings leave unused; `paths` are relative to its folder.

    - caption files beside images, or a table of captions, with caption_strategy filename;
    - further caption files of an image;
    - folders in kohya's naming scheme, whose number of repeats is ignored.
    """
    if dataset.dataset_type == "conditioning":  # masks have neither captions nor repeats
        return
    if dataset.caption_strategy == "filename" and not dataset.only_instance_prompt:
        if count := len(file_types.sidecars):
            files = "1 text file is" if count == 1 else f"{count} text files are"
            yield f"{files} stored beside images and not read; write caption_strategy: textfile."
        for path in paths:
            if path.lower().endswith(_TABLES):
                yield f"{path} is not read; if it holds captions, write caption_strategy: parquet and its path in parquet.path."
    if dataset.caption_strategy == "textfile":
        shadowed = [
            paths[position] for position, why in file_types.skipped.items() if why.startswith(SHADOWED)
        ]
        if shadowed:
            files = "1 caption file is" if len(shadowed) == 1 else f"{len(shadowed)} caption files are"
            yield f"{files} not read, such as {shadowed[0]}: another one of the same image takes precedence (.txt, then .caption)."
    if dataset.type == "local" and dataset.dataset_type == "image":
        yield from _kohya_notes(dataset, [paths[position] for position in file_types.images])


def local_notes(dataset: ImageDataset) -> list[str]:
    """Return what a run would report about local files, without reading an image: the folder is listed and the tables are read.

    The notes are the `folder_notes`, unused rows of a caption table or list, and the error of a table that cannot be read.
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
        file_types = classify_files(paths, files["problem"].tolist())
        notes += folder_notes(dataset, paths, file_types)
        if table_path(dataset, folder) is not None:
            images = [paths[position] for position in file_types.images]
            captions_from_table(dataset, folder, images, paths, notes.append)
    except (CaptionError, SourceError) as error:
        notes.append(str(error))
    except OSError:  # a missing or unreadable folder is reported elsewhere
        pass
    return notes


def _kohya_notes(dataset: ImageDataset, images: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for each folder whose name implies other repeats than the dataset's, or regularisation."""
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
        match = _KOHYA_FOLDER.fullmatch(name)
        repeats = max(0, int(match[1]) - 1) if match else 0
        above = {part.lower() for part in (*folders[:-1], root.name)}
        is_regularisation = bool(above & _REGULARISATION_FOLDERS) and not dataset.is_regularisation_data
        if repeats == dataset.repeats and not is_regularisation:
            continue
        required = [f'"repeats": {repeats}'] + ['"is_regularisation_data": true'] * is_regularisation
        is_whole_dataset = not folders or (len(counts) == 1 and sum(counts.values()) == len(images))
        entry = (
            "in this entry"
            if is_whole_dataset
            else f'in a separate entry with "instance_data_dir": "{root.joinpath(*folders).as_posix()}"'
        )
        where = "/".join(folders) or root.name
        yield (
            f"folder {where} ({count} images): the repeats in its name, as kohya's trainers write them, are ignored; "
            f"write {' and '.join(required)} {entry}."
        )
