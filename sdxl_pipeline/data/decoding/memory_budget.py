"""Memory budget that threads share for decoded images."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from PIL import Image

BYTES_PER_PIXEL: Final = 12
"""Peak memory: that of a decoded 16-bit image during its conversion to 8 bits."""


class MemoryBudget:
    """Bytes that threads share: a thread waits for free bytes; one that needs more than the limit runs alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._freed = threading.Condition()

    @contextmanager
    def reserve(self, amount: int) -> Iterator[None]:
        """Reserve `amount` bytes of the budget while the context is open, after waiting for them."""
        amount = min(amount, self._limit)
        with self._freed:
            self._freed.wait_for(lambda: self._used + amount <= self._limit)
            self._used += amount
        try:
            yield
        finally:
            with self._freed:
                self._used -= amount
                self._freed.notify_all()


PIXEL_BUDGET = MemoryBudget(3 << 30)
"""Budget of all threads of this process that decode full images for the scan and the perceptual hash."""


@contextmanager
def pixel_memory(image: Image.Image) -> Iterator[None]:
    """Reserve the memory for decoding `image` in `PIXEL_BUDGET` while the context is open."""
    with PIXEL_BUDGET.reserve(image.width * image.height * BYTES_PER_PIXEL):
        yield
