"""Concurrent downloads with retries, and a cache of complete files with a manifest of their remote state."""

import errno
import json
import os
import random
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar

from filelock import lock_descriptor

from sdxl_pipeline.files.atomic_files import write_text_atomic

MAX_CONCURRENT: Final = 16
"""Maximum number of concurrent downloads, which are bound by the network rather than the CPU."""
MAX_ATTEMPTS: Final = 4
MAX_WAIT_SECONDS: Final = 60.0
DISK_ERRORS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})
"""Errors of the local disk, which affect every other download too."""
initial_wait_seconds = 0.5

_task = threading.local()

T = TypeVar("T")
Progress = Callable[[int, int], None]


class FetchError(Exception):
    """A file that cannot be downloaded. `retryable` errors may succeed on retry, after `retry_after` seconds if the server set that."""

    def __init__(self, reason: str, retryable: bool = False, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retryable, self.retry_after = retryable, retry_after


def retry(action: Callable[[], T]) -> T:
    """Return the action's value; retry after a retryable FetchError with exponential backoff, up to MAX_ATTEMPTS calls."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return action()
        except FetchError as error:
            if not error.retryable or attempt == MAX_ATTEMPTS:
                raise
            backoff = initial_wait_seconds * 2 ** (attempt - 1) * random.uniform(0.8, 1.2)
            wait_unless_stopped(min(MAX_WAIT_SECONDS, max(backoff, error.retry_after or 0.0)))
    raise AssertionError("the last attempt returns or raises")


def wait_unless_stopped(seconds: float = 0.0) -> None:
    """Wait in the download of this thread. Raise FetchError if the fetch that it belongs to is stopped."""
    stop = getattr(_task, "stop", None)
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise FetchError("the fetch was stopped")


def fetch_all(
    jobs: Mapping[str, Callable[[], int]], on_progress: Progress | None, done: int, total: int
) -> tuple[int, dict[str, str]]:
    """Run the jobs by name and return (received bytes, reason by name of each that failed). Progress counts from `done`.

    Any other error than FetchError, or an interrupt, cancels all jobs; running downloads stop as soon as possible.
    """
    received, failed = 0, {}
    stop = threading.Event()

    def run(job: Callable[[], int]) -> int:
        _task.stop = stop
        return retry(job)

    with ThreadPoolExecutor(MAX_CONCURRENT) as pool:
        running = {pool.submit(run, job): name for name, job in jobs.items()}
        try:
            for future in as_completed(running):
                try:
                    received += future.result()
                except FetchError as error:
                    failed[running[future]] = str(error)
                done += 1
                if on_progress is not None:
                    on_progress(done, total)
        except BaseException:
            stop.set()
            for future in running:
                future.cancel()
            raise
    return received, failed


class DownloadCache:
    """Downloaded `files` of a dataset, a folder of temporary files, and a manifest.

    The manifest has a line per file, `{"name": ..., "stamp": ...}`, where the stamp identifies the version of the remote file. A line is
    written after the file has its final name, so a kill loses only downloads in progress.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = folder / "files"
        self._temporary_folder = folder / "incoming"
        self._manifest = folder / "ledger.jsonl"
        self._manifest_lock = threading.Lock()
        self.stamps: dict[str, Any] = {}

    @contextmanager
    def locked(self) -> Iterator["DownloadCache"]:
        """Lock the cache for this process while the context is open, and remove temporary files of an interrupted one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            lock_descriptor(lock.fileno())
            shutil.rmtree(self._temporary_folder, ignore_errors=True)
            self._temporary_folder.mkdir()
            self.stamps = self._read_manifest()
            yield self

    @contextmanager
    def temporary_path(self, suffix: str = "") -> Iterator[Path]:
        """Yield a temporary path; what remains there at the end is removed."""
        path = self._temporary_folder / (secrets.token_hex(8) + suffix)
        try:
            yield path
        finally:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def add(self, temporary: Path, name: str, stamp: Any) -> int:
        """Move a complete file to `name` in `files`, record it in the manifest, and return its size in bytes."""
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        size = temporary.stat().st_size
        self._move_into_files(temporary, name)
        self.record(name, stamp)
        return size

    def link(self, target: Path, name: str) -> None:
        """Make `name` in `files` a link to a file in another folder."""
        path = self.files / name
        if path.is_symlink() and path.readlink() == target:
            return
        with self.temporary_path() as temporary:
            temporary.symlink_to(target)
            self._move_into_files(temporary, name)

    def record(self, name: str, stamp: Any) -> None:
        """Append the file's name and stamp to the manifest."""
        line = json.dumps({"name": name, "stamp": stamp}) + "\n"
        with self._manifest_lock, self._manifest.open("a", encoding="utf-8") as manifest:
            manifest.write(line)
            self.stamps[name] = stamp

    def contains(self, name: str, stamp: Any) -> bool:
        """Return whether the file exists and has this stamp."""
        return self.stamps.get(name) == stamp and (self.files / name).is_file()

    def retain(self, names: Sequence[str] | set[str]) -> None:
        """Remove all other files and empty folders, and rewrite the manifest."""
        keep = set(names)
        self.files.mkdir(exist_ok=True)
        for folder, folders, files in os.walk(self.files, topdown=False):
            for entry in files:
                path = Path(folder, entry)
                if path.relative_to(self.files).as_posix() not in keep:
                    path.unlink()
            for entry in folders:
                with suppress(OSError):  # not empty
                    Path(folder, entry).rmdir()
        self.stamps = {name: stamp for name, stamp in self.stamps.items() if name in keep}
        lines = (json.dumps({"name": name, "stamp": stamp}) for name, stamp in sorted(self.stamps.items()))
        write_text_atomic(self._manifest, "".join(f"{line}\n" for line in lines))

    def _move_into_files(self, temporary: Path, name: str) -> None:
        path = self.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(path)

    def _read_manifest(self) -> dict[str, Any]:
        stamps: dict[str, Any] = {}
        with suppress(FileNotFoundError):
            for line in self._manifest.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, KeyError, TypeError):  # a kill may truncate the last line
                    entry = json.loads(line)
                    stamps[entry["name"]] = entry["stamp"]
        return stamps
