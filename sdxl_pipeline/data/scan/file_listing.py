"""Recursive listing of a folder: links are followed, loops of links end, and no file is opened."""

import os
import stat
from collections import deque
from pathlib import Path

import numpy as np
import pandas as pd

LISTING_COLUMNS = {"path": "str", "size": "int64", "mtime_ns": "int64", "inode": "uint64", "problem": "str"}
"""Columns of `find_files` with their dtypes.

`path` is relative to the root, with forward slashes; bytes that are not UTF-8 appear as backslash escapes. `problem` is the reason
why a file cannot be used whatever its content, and then the numbers are 0; it is empty for a regular file.
"""

Folders = list[tuple[Path, str]]
"""Folders to list, each with the prefix of its files' relative paths."""


class _ListingColumns:
    """Growing columns of the listing: lists rather than an object per file, which would be slow for a million files."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.sizes: list[int] = []
        self.mtimes: list[int] = []
        self.inodes: list[int] = []
        self.problems: list[str] = []

    def add_problem(self, path: str, problem: str) -> None:
        self.paths.append(os.fsencode(path).decode("utf-8", "backslashreplace"))
        self.sizes.append(0)
        self.mtimes.append(0)
        self.inodes.append(0)
        self.problems.append(problem)

    def table(self) -> pd.DataFrame:
        order = sorted(range(len(self.paths)), key=self.paths.__getitem__)
        columns = (self.sizes, self.mtimes, self.inodes)
        numbers = {
            name: np.array(column, dtype=LISTING_COLUMNS[name])[order]
            for name, column in zip(("size", "mtime_ns", "inode"), columns, strict=True)
        }
        return pd.DataFrame(
            {
                "path": pd.Series([self.paths[row] for row in order], dtype="str"),
                **numbers,
                "problem": pd.Series([self.problems[row] for row in order], dtype="str"),
            }
        )


def find_files(root: Path) -> pd.DataFrame:
    """Return a row with LISTING_COLUMNS for every file under `root`, at any depth, sorted by path.

    Links to files and folders are followed. A folder reachable by several paths, or by a loop of links, is listed once: under its own
    path if that is below `root`, else under the first link to it. A folder that cannot be listed is one row with its problem, so
    that it is not overlooked. Raises OSError if `root` itself cannot be listed.
    """
    columns = _ListingColumns()
    entered: set[tuple[int, int]] = set()
    pending: deque[tuple[Path, str]] = deque([(root, "")])
    pending_links: deque[tuple[Path, str]] = deque()  # after all real folders, whose paths take precedence
    while pending or pending_links:
        folder, prefix = pending.popleft() if pending else pending_links.popleft()
        try:
            info = folder.stat()
            if (info.st_dev, info.st_ino) in entered:
                continue
            entered.add((info.st_dev, info.st_ino))
            real_folders, linked_folders = _list(folder, prefix, columns)
        except OSError as error:
            if not prefix:
                raise
            columns.add_problem(prefix, f"folder cannot be read: {error.strerror}")
            continue
        pending.extend(real_folders)
        pending_links.extend(linked_folders)
    return columns.table()


def _list(folder: Path, prefix: str, columns: _ListingColumns) -> tuple[Folders, Folders]:
    """Add the files of one folder to `columns`; return its subfolders and its links to folders."""
    real_folders: Folders = []
    linked_folders: Folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            path = prefix + entry.name
            try:
                if entry.is_dir():
                    (linked_folders if entry.is_symlink() else real_folders).append(
                        (Path(entry.path), path + "/")
                    )
                    continue
                info = entry.stat()
                path.encode()
            except UnicodeEncodeError:
                columns.add_problem(path, "file name is not UTF-8")
                continue
            except OSError as error:  # is_dir() raises it for a link to itself
                link = entry.is_symlink()
                columns.add_problem(path, "broken link" if link else f"cannot be read: {error.strerror}")
                continue
            if not stat.S_ISREG(info.st_mode):  # reading a pipe would block
                columns.add_problem(path, "not a regular file")
                continue
            columns.paths.append(path)
            columns.sizes.append(info.st_size)
            columns.mtimes.append(info.st_mtime_ns)
            columns.inodes.append(info.st_ino)
            columns.problems.append("")
    return sorted(real_folders), sorted(linked_folders)
