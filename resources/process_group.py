"""A child process and all its descendants, stopped together."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import psutil

# Time for remaining processes to end after the leader has ended by itself, before they are killed.
LEFTOVER_TIMEOUT_SECONDS = 5.0


class ProcessGroup:
    """A child that leads its own process group, so that a Ctrl-C in the terminal is not sent to it directly."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the command. It inherits stdout and stderr, which Dagster stores as the step's compute log."""
        self.leader = subprocess.Popen(command, env=dict(environment), start_new_session=True)
        self._descendants: set[psutil.Process] = set()

    def wait(self, timeout: float) -> int | None:
        """Return the leader's exit code (negative: killed by that signal), or None if it still runs after `timeout` seconds."""
        try:
            return self.leader.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def stop(self, timeout: float) -> None:
        """Send SIGTERM to the leader, wait up to `timeout` seconds, then end all remaining processes. Return when none is left.

        Only the leader gets the first signal: it needs its workers and ranks until it has reached a safe point.
        """
        self._remember_descendants()
        self.leader.terminate()
        if self.wait(timeout) is None:
            self._signal(signal.SIGKILL)
            self.leader.wait()
        self.end_rest()

    def end_rest(self) -> None:
        """End the processes that outlived the leader."""
        if self._alive():
            self._signal(signal.SIGTERM)
            psutil.wait_procs(self._alive(), timeout=LEFTOVER_TIMEOUT_SECONDS)
        while alive := self._alive():
            self._signal(signal.SIGKILL)
            psutil.wait_procs(alive, timeout=LEFTOVER_TIMEOUT_SECONDS)

    def _remember_descendants(self) -> None:
        """Record the descendants: some lead their own groups (torchrun's ranks), and their parent may have ended when they are searched."""
        if self.leader.returncode is not None:
            return  # its pid may belong to another process by now
        with suppress(psutil.NoSuchProcess):
            self._descendants.update(psutil.Process(self.leader.pid).children(recursive=True))

    def _alive(self) -> list[psutil.Process]:
        """Return every running process of the group or descended from the leader, without zombies."""
        self._remember_descendants()
        found = {process for process in self._descendants if process.is_running()}
        for pid in psutil.pids():
            with suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
                if os.getpgid(pid) == self.leader.pid:
                    found.add(psutil.Process(pid))
        return [process for process in found if _is_running(process)]

    def _signal(self, number: signal.Signals) -> None:
        for process in self._alive():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Ignore SIGINT and SIGTERM while waiting for a child that is saving. Does nothing outside the main thread, where Python sets no handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
