"""Collective operations between the processes of a training on their CPUs."""

from datetime import timedelta

import torch
import torch.distributed

TIMEOUT = timedelta(days=7)
"""How long a process waits for the others: the main process may generate images, evaluate, or wait for disk space."""


class CpuGroup:
    """A gloo group of all processes, created after the accelerator; with one process every operation is local."""

    def __init__(self, num_processes: int) -> None:
        self._group = (
            torch.distributed.new_group(backend="gloo", timeout=TIMEOUT) if num_processes > 1 else None
        )

    def all_reduce_any(self, *flags: bool) -> list[bool]:
        """Return which flags are set on any process: the same result everywhere, so that all processes leave the loop together."""
        if self._group is None:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.int32)
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in values.tolist()]

    def barrier(self) -> None:
        """Wait for all other processes on the host, since a device barrier would time out."""
        if self._group is not None:
            torch.distributed.barrier(group=self._group)
