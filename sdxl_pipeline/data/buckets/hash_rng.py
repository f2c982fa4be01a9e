"""Random numbers that are pure functions of strings: equal on every machine and independent of each other."""

import hashlib
from collections.abc import Iterable

import numpy as np


def hash_uint64(names: Iterable[str]) -> np.ndarray:
    """Return two uniform integers below 2**64 for each name, from its SHA-256: uint64 of shape (N, 2)."""
    digests = b"".join([hashlib.sha256(name.encode()).digest() for name in names])
    return np.frombuffer(digests, dtype=">u8").reshape(-1, 4)[:, :2].astype(np.uint64)


def scale_to_limits(values: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Return each of the `hash_uint64` scaled to an integer from 0 to its limit - 1, exactly: `value * limit >> 64`."""
    if limits.size and limits.max() >= 2**31:  # the products below would overflow; Python's integers do not
        pairs = zip(values.tolist(), limits.tolist(), strict=True)
        return np.array([fraction * limit >> 64 for fraction, limit in pairs], dtype=np.int64)
    factor = limits.astype(np.uint64)
    half = np.uint64(32)
    low = (values & np.uint64(2**32 - 1)) * factor >> half
    return ((values >> half) * factor + low >> half).astype(np.int64)


def below_share(values: np.ndarray, share: float) -> np.ndarray:
    """Return whether each of the `hash_uint64` is below `share` of 2**64: bool of shape (N,)."""
    limit = -int(
        -share * 2**64 // 1
    )  # rounded up to an integer, since float64 is too coarse for the comparison
    return np.full(len(values), True) if limit >= 2**64 else values < np.uint64(max(limit, 0))
