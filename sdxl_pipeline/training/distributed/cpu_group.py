"""What the processes of a training say to each other without their devices."""

from datetime import timedelta

import torch
import torch.distributed

TIMEOUT = timedelta(days=7)
"""How long a process waits for the others: as long as the first may draw images, measure, or wait for space on its disk."""


class CpuGroup:
    """The processes of a training, from the accelerator's start on; with one process nothing is said and nobody waits."""

    def __init__(self, num_processes: int) -> None:
        self._group = (
            torch.distributed.new_group(backend="gloo", timeout=TIMEOUT) if num_processes > 1 else None
        )

    def all_reduce_any(self, *flags: bool) -> list[bool]:
        """Which flags are raised on any process: the same answer everywhere, so that none goes on to wait for one that has left."""
        if self._group is None:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        torch.distributed.all_reduce(raised, torch.distributed.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in raised.tolist()]

    def barrier(self) -> None:
        """Wait for all others to come here: by the host, since a device would give up."""
        if self._group is not None:
            torch.distributed.barrier(group=self._group)
