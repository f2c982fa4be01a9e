"""Which files lie under a folder: links followed, loops survived, nothing left out and nothing read."""

import os
import stat
from collections import deque
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class FoundFile:
    """One entry of a folder that is not itself a folder that could be entered."""

    path: str
    """Relative to the root, with forward slashes; bytes that are no UTF-8 are shown as backslash escapes."""
    size: int
    mtime_ns: int
    problem: str = ""
    """Why the file cannot be used whatever it holds; empty when it is an ordinary readable-looking file."""

    @property
    def suffix(self) -> str:
        """Extension in lower case with its dot."""
        return PurePosixPath(self.path).suffix.lower()

    @property
    def stem_path(self) -> str:
        """The path without its extension: what a picture and its caption file share."""
        return str(PurePosixPath(self.path).with_suffix(""))

    @property
    def hidden(self) -> bool:
        """Whether the file or a folder above it (below the root) begins with a dot, as macOS's `._` twins do."""
        return any(part.startswith(".") for part in PurePosixPath(self.path).parts)


def find_files(root: Path) -> list[FoundFile]:
    """Every file under `root`, at any depth, sorted by path.

    Links to files and folders are followed. A folder reachable by several ways, or by a loop of links, is entered once: by its own
    path if that lies under `root`, else by the first link to it. A folder that cannot be listed is returned as one entry with its
    problem, so that it is not overlooked. Raises OSError when `root` itself cannot be listed.
    """
    found: list[FoundFile] = []
    entered: set[tuple[int, int]] = set()
    folders: deque[tuple[Path, str]] = deque([(root, "")])
    linked_folders: deque[tuple[Path, str]] = (
        deque()
    )  # after all real ones, so that a real path wins over a link to it
    while folders or linked_folders:
        folder, prefix = folders.popleft() if folders else linked_folders.popleft()
        try:
            info = folder.stat()
            if (info.st_dev, info.st_ino) in entered:
                continue
            entered.add((info.st_dev, info.st_ino))
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            if not prefix:
                raise
            found.append(_problem_file(prefix, f"folder cannot be read: {error.strerror}"))
            continue
        for entry in entries:
            path = prefix + entry.name
            if not _is_folder(entry):
                found.append(_examine(entry, path))
            elif entry.is_symlink():
                linked_folders.append((Path(entry.path), path + "/"))
            else:
                folders.append((Path(entry.path), path + "/"))
    return sorted(found, key=lambda file: file.path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _examine(entry: os.DirEntry[str], path: str) -> FoundFile:
    try:
        info = entry.stat()
    except OSError as error:
        return _problem_file(
            path, "broken link" if entry.is_symlink() else f"cannot be read: {error.strerror}"
        )
    if not stat.S_ISREG(info.st_mode):  # reading a pipe would wait for ever
        return _problem_file(path, "not a regular file")
    try:
        path.encode()
    except UnicodeEncodeError:
        return _problem_file(path, "file name is not UTF-8")
    return FoundFile(path, info.st_size, info.st_mtime_ns)


def _problem_file(path: str, problem: str) -> FoundFile:
    printable = os.fsencode(path).decode("utf-8", "backslashreplace")
    return FoundFile(printable, size=0, mtime_ns=0, problem=problem)
