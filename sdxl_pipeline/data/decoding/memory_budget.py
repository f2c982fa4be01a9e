"""Memory that threads share while they hold decoded images."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from PIL import Image

BYTES_PER_PIXEL: Final = 12
"""Of a decoded 16-bit image while it is brought to 8 bits, which takes most."""


class Budget:
    """Bytes that threads share: one that needs more than are left waits; one that needs more than there are goes alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._freed = threading.Condition()

    @contextmanager
    def taking(self, amount: int) -> Iterator[None]:
        """Hold `amount` bytes of the budget, after waiting for them."""
        amount = min(amount, self._limit)
        with self._freed:
            self._freed.wait_for(lambda: self._taken + amount <= self._limit)
            self._taken += amount
        try:
            yield
        finally:
            with self._freed:
                self._taken -= amount
                self._freed.notify_all()


PIXELS = Budget(3 << 30)
"""The budget of every thread of this process that decodes whole images to examine them: scan and perceptual hash alike."""


@contextmanager
def pixel_memory(image: Image.Image) -> Iterator[None]:
    """Hold what decoding `image` takes of `PIXELS`."""
    with PIXELS.taking(image.width * image.height * BYTES_PER_PIXEL):
        yield
