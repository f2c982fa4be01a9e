"""Contenders that take turns, each a process of its own, so that a busy neighbour slows all of them alike and none disturbs another.

A contender is a program that prints "ready", then reads numbers from stdin, a line each, takes that many training steps, and prints the
seconds they took, by the clock and of the CPU. When stdin ends it prints its peak memory in bytes and leaves.
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


class Taken(NamedTuple):
    """What a contender took: seconds of each round, CPU seconds of each (all threads), and bytes of memory at its peak."""

    seconds: list[float]
    cpu_seconds: list[float]
    peak: int


def take_turns(
    commands: Mapping[str, Sequence[str]], rounds: int, steps: int, warm_up: int
) -> dict[str, Taken]:
    """Let the contenders take `steps` steps in each of `rounds` rounds, after `warm_up` steps that are not counted.

    Within a round they run one after the other; who begins changes from round to round.
    """
    contenders = {name: _Contender(command) for name, command in commands.items()}
    try:
        for contender in contenders.values():
            contender.take(warm_up)
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        names = list(contenders)
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                taken[name].append(contenders[name].take(steps))
        return {
            name: Taken([wall for wall, _ in rounds], [cpu for _, cpu in rounds], contenders[name].end())
            for name, rounds in taken.items()
        }
    finally:
        for contender in contenders.values():
            contender.kill()


def ratio(own: Sequence[float], theirs: Sequence[float]) -> float:
    """Speed of one contender over that of another, from their seconds: the median of the rounds' own ratios."""
    return statistics.median(other / seconds for seconds, other in zip(own, theirs, strict=True))


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
        for line in self._process.stdout:  # a stage's own lines stand between
            said, _, value = line.strip().partition(" ")
            if said == word:
                return value
        raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}; its error stands above")


def allowances() -> Iterator[int]:
    """In a contender: the numbers of steps to take, until there are no more."""
    print("ready", flush=True)
    for line in sys.stdin:
        yield int(line)


class Watch:
    """In a contender: the clocks over one allowance."""

    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def tell(self) -> None:
        """Say what has passed since this was made."""
        wall, cpu = self._started
        print("seconds", time.perf_counter() - wall, time.process_time() - cpu, flush=True)


def serve(take: Callable[[int], None]) -> None:
    """In a contender: take steps as told."""
    for steps in allowances():
        watch = Watch()
        take(steps)
        watch.tell()
    report_peak()


def report_peak() -> None:
    """In a contender, at its end."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("peak", peak if sys.platform == "darwin" else peak * 1024, flush=True)
