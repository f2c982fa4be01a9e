"""Which files lie under a folder: links followed, loops survived, nothing left out and nothing read."""

import os
import stat
from collections import deque
from pathlib import Path

import numpy as np
import pandas as pd

LISTING_COLUMNS = {"path": "str", "size": "int64", "mtime_ns": "int64", "inode": "uint64", "problem": "str"}
"""Columns of `find_files`, with their types.

`path` is relative to the root, with forward slashes; bytes that are no UTF-8 are shown as backslash escapes. `problem` says why a
file cannot be used whatever it holds; it is empty for an ordinary readable-looking file, and the numbers are 0 when it is not.
"""

Folders = list[tuple[Path, str]]
"""Folders to be listed, each with the beginning of its files' relative paths."""


class _Found:
    """The columns, as they grow: a list each, since a million files as objects of their own would cost their creation."""

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
    """Every file under `root`, at any depth, sorted by path: a row each, with LISTING_COLUMNS.

    Links to files and folders are followed. A folder reachable by several ways, or by a loop of links, is entered once: by its own
    path if that lies under `root`, else by the first link to it. A folder that cannot be listed is returned as one entry with its
    problem, so that it is not overlooked. Raises OSError when `root` itself cannot be listed.
    """
    found = _Found()
    entered: set[tuple[int, int]] = set()
    folders: deque[tuple[Path, str]] = deque([(root, "")])
    linked: deque[tuple[Path, str]] = (
        deque()
    )  # after all real ones, so that a real path wins over a link to it
    while folders or linked:
        folder, prefix = folders.popleft() if folders else linked.popleft()
        try:
            info = folder.stat()
            if (info.st_dev, info.st_ino) in entered:
                continue
            entered.add((info.st_dev, info.st_ino))
            real_folders, linked_folders = _list(folder, prefix, found)
        except OSError as error:
            if not prefix:
                raise
            found.add_problem(prefix, f"folder cannot be read: {error.strerror}")
            continue
        folders.extend(real_folders)
        linked.extend(linked_folders)
    return found.table()


def _list(folder: Path, prefix: str, found: _Found) -> tuple[Folders, Folders]:
    """Add the files of one folder to `found`, and give its folders: real ones, and links to folders."""
    real: Folders = []
    linked: Folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            path = prefix + entry.name
            try:
                if entry.is_dir():
                    (linked if entry.is_symlink() else real).append((Path(entry.path), path + "/"))
                    continue
                info = entry.stat()
                path.encode()
            except UnicodeEncodeError:
                found.add_problem(path, "file name is not UTF-8")
                continue
            except OSError as error:  # is_dir() raises it for a link to itself
                link = entry.is_symlink()
                found.add_problem(path, "broken link" if link else f"cannot be read: {error.strerror}")
                continue
            if not stat.S_ISREG(info.st_mode):  # reading a pipe would wait for ever
                found.add_problem(path, "not a regular file")
                continue
            found.paths.append(path)
            found.sizes.append(info.st_size)
            found.mtimes.append(info.st_mtime_ns)
            found.inodes.append(info.st_ino)
            found.problems.append("")
    return sorted(real), sorted(linked)
