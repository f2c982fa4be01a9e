"""Alternating execution of loops, each in a process of its own, so that other load on the machine affects all of them equally.

A contender is a program that prints "ready", reads numbers from stdin, one per line, takes that many training steps, and prints their
seconds, wall time and CPU time. When stdin ends it prints its peak memory in bytes and exits.
"""

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).absolute().parents[2]


class Timings(NamedTuple):
    """Seconds of each round, CPU seconds of each round (all threads), and peak memory in bytes of a contender."""

    seconds: list[float]
    cpu_seconds: list[float]
    peak: int


def take_turns(
    commands: Mapping[str, Sequence[str]], rounds: int, steps: int, warm_up: int
) -> dict[str, Timings]:
    """Run `steps` steps of each contender in each of `rounds` rounds, after `warm_up` steps that are not counted.

    Within a round they run one after the other; the first one changes from round to round.
    """
    contenders = {name: _Contender(command) for name, command in commands.items()}
    try:
        for contender in contenders.values():
            contender.take(warm_up)
        timings: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        names = list(contenders)
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                timings[name].append(contenders[name].take(steps))
        return {
            name: Timings([wall for wall, _ in rounds], [cpu for _, cpu in rounds], contenders[name].end())
            for name, rounds in timings.items()
        }
    finally:
        for contender in contenders.values():
            contender.kill()


def ratio(seconds: Sequence[float], reference_seconds: Sequence[float]) -> float:
    """Return the speed of a contender relative to a reference: the median of the rounds' ratios."""
    return statistics.median(other / own for own, other in zip(seconds, reference_seconds, strict=True))


class _Contender:
    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *command],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._expect("ready")

    def take(self, steps: int) -> tuple[float, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        wall, cpu = self._expect("seconds").split()
        return float(wall), float(cpu)

    def end(self) -> int:
        assert self._process.stdin is not None
        self._process.stdin.close()
        return int(self._expect("peak"))

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _expect(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # skip the stage's other lines
            label, _, value = line.strip().partition(" ")
            if label == word:
                return value
        raise RuntimeError(
            f"{self._process.args} ended with exit code {self._process.wait()}; its error is above"
        )


def allowances() -> Iterator[int]:
    """Yield, in a contender, the numbers of steps to take."""
    print("ready", flush=True)
    for line in sys.stdin:
        yield int(line)


class Stopwatch:
    """Wall and CPU time of one allowance, in a contender."""

    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def report(self) -> None:
        """Print the seconds since this was created."""
        wall, cpu = self._started
        print("seconds", time.perf_counter() - wall, time.process_time() - cpu, flush=True)


def serve(take: Callable[[int], None]) -> None:
    """Take the requested steps, in a contender."""
    for steps in allowances():
        watch = Stopwatch()
        take(steps)
        watch.report()
    report_peak()


def report_peak() -> None:
    """Print the peak memory, at the end of a contender."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("peak", peak if sys.platform == "darwin" else peak * 1024, flush=True)
