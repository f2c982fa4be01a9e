"""What all downloads share: whole files or none, several at once, tried again with patience, and remembered for the next time."""

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

AT_ONCE: Final = 16
"""Downloads under way at a time; they wait for the network, not for a processor."""
TRIES: Final = 4
LONGEST_WAIT_SECONDS: Final = 60.0
DISK_ERRORS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})
"""What is wrong with this machine's disk, and so with every other download as well."""
first_wait_seconds = 0.5

_task = threading.local()

T = TypeVar("T")
Progress = Callable[[int, int], None]


class FetchError(Exception):
    """One file cannot be had. The message says why; `again` that another try may help, after `wait` seconds if the server said so."""

    def __init__(self, reason: str, again: bool = False, wait: float | None = None) -> None:
        super().__init__(reason)
        self.again, self.wait = again, wait


def retry(action: Callable[[], T]) -> T:
    """The action's value; after a FetchError that another try may mend, it is called again, each time after a longer wait."""
    for tried in range(1, TRIES + 1):
        try:
            return action()
        except FetchError as error:
            if not error.again or tried == TRIES:
                raise
            wait = first_wait_seconds * 2 ** (tried - 1) * random.uniform(0.8, 1.2)
            wait_unless_stopped(min(LONGEST_WAIT_SECONDS, max(wait, error.wait or 0.0)))
    raise AssertionError("the last try either gives a value or raises")


def wait_unless_stopped(seconds: float = 0.0) -> None:
    """Wait, on behalf of the download that this thread is at. Raises FetchError when the fetch that it is part of is stopped."""
    stop = getattr(_task, "stop", None)
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise FetchError("the fetch was stopped")


def fetch_all(
    jobs: Mapping[str, Callable[[], int]], on_progress: Progress | None, done: int, total: int
) -> tuple[int, dict[str, str]]:
    """Run the downloads by name: the bytes that came, and the reason of each that failed. Progress goes on from `done`.

    What is not a FetchError ends it all, an interruption too: the downloads under way then break off as soon as they can.
    """
    received, failed = 0, {}
    stop = threading.Event()

    def run(job: Callable[[], int]) -> int:
        _task.stop = stop
        return retry(job)

    with ThreadPoolExecutor(AT_ONCE) as pool:
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
    """A dataset's place among the downloads: `files`, what is on its way, and a ledger of what has come.

    The ledger has a line per file, `{"name": ..., "stamp": ...}`, where the stamp is the state of the remote file that the local one
    is a copy of. A line is written when the file lies under its name, so a kill loses none but those under way.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = folder / "files"
        self._incoming = folder / "incoming"
        self._manifest = folder / "ledger.jsonl"
        self._writing = threading.Lock()
        self.stamps: dict[str, Any] = {}

    @contextmanager
    def opened(self) -> Iterator["DownloadCache"]:
        """The depot for this process alone; a second one waits. What an earlier one left half done is cleared away."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            lock_descriptor(lock.fileno())
            shutil.rmtree(self._incoming, ignore_errors=True)
            self._incoming.mkdir()
            self.stamps = self._read_manifest()
            yield self

    @contextmanager
    def incoming(self, suffix: str = "") -> Iterator[Path]:
        """A path to write to; what still lies there at the end is removed."""
        path = self._incoming / (secrets.token_hex(8) + suffix)
        try:
            yield path
        finally:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def put(self, temporary: Path, name: str, stamp: Any) -> int:
        """Give a file that has come whole its name in `files`, and enter it in the ledger; its size in bytes."""
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        size = temporary.stat().st_size
        self._place(temporary, name)
        self.enter(name, stamp)
        return size

    def link(self, target: Path, name: str) -> None:
        """Let `name` in `files` be a link to a file that lies elsewhere."""
        path = self.files / name
        if path.is_symlink() and path.readlink() == target:
            return
        with self.incoming() as temporary:
            temporary.symlink_to(target)
            self._place(temporary, name)

    def enter(self, name: str, stamp: Any) -> None:
        """Note in the ledger what the file of this name is a copy of."""
        line = json.dumps({"name": name, "stamp": stamp}) + "\n"
        with self._writing, self._manifest.open("a", encoding="utf-8") as manifest:
            manifest.write(line)
            self.stamps[name] = stamp

    def holds(self, name: str, stamp: Any) -> bool:
        """Whether the file of this name is there and a copy of what the stamp stands for."""
        return self.stamps.get(name) == stamp and (self.files / name).is_file()

    def keep_only(self, names: Sequence[str] | set[str]) -> None:
        """Remove every file of another name, and every folder left empty; the ledger is written anew."""
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

    def _place(self, temporary: Path, name: str) -> None:
        path = self.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(path)

    def _read_manifest(self) -> dict[str, Any]:
        stamps: dict[str, Any] = {}
        with suppress(FileNotFoundError):
            for line in self._manifest.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, KeyError, TypeError):  # the last line may be cut by a kill
                    entry = json.loads(line)
                    stamps[entry["name"]] = entry["stamp"]
        return stamps
