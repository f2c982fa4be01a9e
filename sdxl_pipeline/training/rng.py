"""Random choices as pure functions of their purpose.

No state is kept. A run that is resumed, or distributed over more processes, therefore makes the same choices as an uninterrupted one,
and no random state needs saving. Hashing instead of a library's generator keeps the choices the same across versions of numpy and torch.
"""

import hashlib
import json

import numpy as np


def derive_seed(*purpose: int | str) -> int:
    """Return a seed in [0, 2**63) for a purpose such as `(run_seed, "noise", step, slot)`; different purposes give independent seeds."""
    digest = hashlib.blake2b(json.dumps(purpose).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def uniform(*purpose: int | str) -> float:
    """Return a number in [0, 1), uniform over purposes."""
    return (derive_seed(*purpose) >> 10) / 2**53


def choose(count: int, *purpose: int | str) -> int:
    """Return an index in [0, count), uniform over purposes up to a bias of count / 2**63."""
    return derive_seed(*purpose) % count


def mix_hashes(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Return hashes below 2**64 derived from given ones, independent under different seeds: uint64 of shape (N,) both.

    A bijection, so different hashes stay different. It is the last step of the generator SplitMix64 (Steele, Lea and Flood 2014, "Fast
    splittable pseudorandom number generators"), which takes a few nanoseconds where `derive_seed` takes microseconds.
    """
    mixed = hashes ^ np.uint64(seed)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
