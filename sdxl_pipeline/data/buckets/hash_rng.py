"""Random choices that are functions of names alone: the same on every machine, whatever else is drawn."""

import hashlib
from collections.abc import Iterable

import numpy as np


def fractions(names: Iterable[str]) -> np.ndarray:
    """Two evenly spread integers below 2**64 for each name, drawn from its SHA-256: uint64 of shape (N, 2)."""
    digests = b"".join([hashlib.sha256(name.encode()).digest() for name in names])
    return np.frombuffer(digests, dtype=">u8").reshape(-1, 4)[:, :2].astype(np.uint64)


def below(drawn: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Each of the `fractions` scaled to an integer from 0 to its limit - 1, exactly: `drawn * limit >> 64`."""
    if limits.size and limits.max() >= 2**31:  # the products below would not fit; numbers of Python always do
        pairs = zip(drawn.tolist(), limits.tolist(), strict=True)
        return np.array([fraction * limit >> 64 for fraction, limit in pairs], dtype=np.int64)
    factor = limits.astype(np.uint64)
    half = np.uint64(32)
    low = (drawn & np.uint64(2**32 - 1)) * factor >> half
    return ((drawn >> half) * factor + low >> half).astype(np.int64)


def chosen(drawn: np.ndarray, share: float) -> np.ndarray:
    """Whether each of the `fractions` falls to a share of the whole: bool of shape (N,)."""
    limit = -int(
        -share * 2**64 // 1
    )  # rounded up, as an integer: 64-bit floats are too coarse to compare with
    return np.full(len(drawn), True) if limit >= 2**64 else drawn < np.uint64(max(limit, 0))
