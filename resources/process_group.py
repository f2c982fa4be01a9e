"""A child process together with everything it starts, to be stopped as one."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import psutil

# After the leader has ended by itself, what it left behind has this long to follow before it is killed.
LEFTOVER_TIMEOUT_SECONDS = 5.0


class ProcessGroup:
    """A child that leads a process group of its own, so that a Ctrl-C in the terminal reaches it only through us."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the command. It inherits stdout and stderr, which Dagster keeps as the step's compute log."""
        self.leader = subprocess.Popen(command, env=dict(environment), start_new_session=True)
        self._descendants: set[psutil.Process] = set()

    def wait(self, timeout: float) -> int | None:
        """The leader's exit code (negative: killed by that signal), or None if it still runs after `timeout` seconds."""
        try:
            return self.leader.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def stop(self, timeout: float) -> None:
        """Ask the leader to stop, wait up to `timeout` seconds, then end whatever is left. Returns when nothing is.

        Only the leader is asked at first: it needs its helpers (loader workers, ranks) until it has come to a safe point.
        """
        self._remember_descendants()
        self.leader.terminate()
        if self.wait(timeout) is None:
            self._signal(signal.SIGKILL)
            self.leader.wait()
        self.end_rest()

    def end_rest(self) -> None:
        """End what outlived the leader."""
        if self._alive():
            self._signal(signal.SIGTERM)
            psutil.wait_procs(self._alive(), timeout=LEFTOVER_TIMEOUT_SECONDS)
        while alive := self._alive():
            self._signal(signal.SIGKILL)
            psutil.wait_procs(alive, timeout=LEFTOVER_TIMEOUT_SECONDS)

    def _remember_descendants(self) -> None:
        """Some descendants lead groups of their own (torchrun's ranks), and their parent may be gone when they are looked for."""
        if self.leader.returncode is not None:
            return  # its pid may belong to someone else by now
        with suppress(psutil.NoSuchProcess):
            self._descendants.update(psutil.Process(self.leader.pid).children(recursive=True))

    def _alive(self) -> list[psutil.Process]:
        """Every process of the group, or once descended from the leader, that still runs. A zombie does not."""
        self._remember_descendants()
        found = {process for process in self._descendants if process.is_running()}
        for pid in psutil.pids():
            with suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
                if os.getpgid(pid) == self.leader.pid:
                    found.add(psutil.Process(pid))
        return [process for process in found if _runs(process)]

    def _signal(self, number: signal.Signals) -> None:
        for process in self._alive():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Let no second SIGINT or SIGTERM cut short the wait for a child that is saving. Python sets handlers in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
