"""Every random choice of a run as a pure function of what the choice is for.

Nothing here remembers how often it was asked. A run that is resumed, or spread over more processes, therefore makes the choices that
the unbroken one would have made, and no random state needs saving. Hashing rather than a library's generator keeps the choices the
same across versions of numpy and torch.
"""

import hashlib
import json


def seed_for(*purpose: int | str) -> int:
    """A seed in [0, 2**63) for a purpose such as `(run_seed, "noise", step, slot)`; different purposes give unrelated seeds."""
    digest = hashlib.blake2b(json.dumps(purpose).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def uniform(*purpose: int | str) -> float:
    """A number in [0, 1), uniform over purposes."""
    return (seed_for(*purpose) >> 10) / 2**53


def choose(count: int, *purpose: int | str) -> int:
    """An index in [0, count), uniform over purposes up to a bias of count / 2**63."""
    return seed_for(*purpose) % count
