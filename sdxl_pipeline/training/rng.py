"""Every random choice of a run as a pure function of what the choice is for.

Nothing here remembers how often it was asked. A run that is resumed, or spread over more processes, therefore makes the choices that
the unbroken one would have made, and no random state needs saving. Hashing rather than a library's generator keeps the choices the
same across versions of numpy and torch.
"""

import hashlib
import json

import numpy as np


def derive_seed(*purpose: int | str) -> int:
    """A seed in [0, 2**63) for a purpose such as `(run_seed, "noise", step, slot)`; different purposes give unrelated seeds."""
    digest = hashlib.blake2b(json.dumps(purpose).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def uniform(*purpose: int | str) -> float:
    """A number in [0, 1), uniform over purposes."""
    return (derive_seed(*purpose) >> 10) / 2**53


def choose(count: int, *purpose: int | str) -> int:
    """An index in [0, count), uniform over purposes up to a bias of count / 2**63."""
    return derive_seed(*purpose) % count


def scattered(names: np.ndarray, seed: int) -> np.ndarray:
    """Numbers below 2**64 for already random ones, unrelated under different seeds: uint64 of shape (N,) both.

    A bijection, so different numbers stay different. It is the last step of the generator SplitMix64 (Steele, Lea and Flood 2014, "Fast
    splittable pseudorandom number generators"), which takes a few nanoseconds where `derive_seed` takes microseconds.
    """
    mixed = names ^ np.uint64(seed)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
