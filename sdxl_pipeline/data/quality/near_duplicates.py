"""Images that stand in a dataset more than once: byte for byte, or nearly so to the eye.

Two images look alike when their perceptual hashes (sdxl_pipeline.data.quality.perceptual_hash) differ in at most MAX_DISTANCE of 64 bits, and the
colours of their 4 x 4 parts by at most MAX_COLOUR_DISTANCE. Half of a hash's bits are set by construction, so distances are even. On the
photographs of scikit-image, resizing gives distances up to 2, JPEG of quality 30 up to 4, brightness x 0.6 up to 4, trimming 2 % off
mostly up to 6 and 4 % mostly up to 8; different photographs, and different quarters of one, begin at 18. The colours of such copies are
up to 19 apart; those of one drawing with a thin ring in two colours at least 23, mostly 40 and more. Mirrored images are not found, nor
those made grey, nor crops of a tenth and more.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd

MAX_DISTANCE = 8
"""Bits in which two hashes of look-alikes may differ. Of a million unrelated images, some hundred pairs have such hashes by chance."""
MAX_COLOUR_DISTANCE = 21
"""How far the colours of look-alikes may be apart, of 255."""
MAX_PAIRS = 2_000_000
"""Pairs after which a search ends, for datasets such as a film's frames, where everything looks like everything."""
MAX_CANDIDATES = 1 << 32
"""Comparisons after which it ends: a minute or so."""

_HASH_BYTES = 40
_FEATURES = (
    16  # a hash with fewer bits set is of a flat or evenly shaded image: its bits are mostly rounding errors
)
_BANDS = ((0, 21), (21, 21), (42, 22))  # (first bit, bits)
_ALL_AT_ONCE = 1 << 26
_CANDIDATES_AT_ONCE = 1 << 22


class PerceptualHashes(NamedTuple):
    """What images look like: `hashes` uint64 (N,), `colours` uint8 (N, 32)."""

    hashes: np.ndarray
    colours: np.ndarray

    @property
    def have_features(self) -> np.ndarray:
        """Which hashes say something of their image: bool (N,)."""
        return np.bitwise_count(self.hashes) >= _FEATURES


@dataclass(frozen=True)
class Pairs:
    """Pairs of images that look alike: indices into both lists, and in how many bits their hashes differ."""

    first: np.ndarray
    second: np.ndarray
    distance: np.ndarray
    complete: bool
    """False when the search ended at MAX_PAIRS or MAX_CANDIDATES."""


@dataclass(frozen=True)
class Group:
    """Images that look alike, by path, and the largest distance between neighbours among them."""

    paths: tuple[str, ...]
    distance: int


@dataclass(frozen=True)
class NearDuplicates:
    """What a dataset holds more than once."""

    same: tuple[tuple[str, ...], ...]
    """Paths of files with the same bytes."""
    alike: tuple[Group, ...]
    """Groups of different files that look alike, largest first; of files with the same bytes only the first is named."""
    featureless: int
    """Images that could not be compared: they are flat, or evenly shaded."""
    complete: bool
    """False when there are more than could be listed."""


@dataclass(frozen=True)
class Leak:
    """An evaluation image that is also trained on."""

    eval_path: str
    train_path: str
    distance: int
    same: bool
    """Whether the bytes are the same."""


def find_near_duplicates(frame: pd.DataFrame) -> NearDuplicates:
    """What of a scan's kept images is there more than once. `frame` has the columns path, key, phash and status."""
    kept = frame[frame["status"] == "kept"].sort_values("path", kind="stable")
    same = tuple(
        tuple(paths.tolist())
        for _, paths in kept[kept["key"].duplicated(keep=False)].groupby("key", sort=False)["path"]
    )
    images = kept.drop_duplicates("key")
    images = images[images["phash"] != ""]
    which, distinct = pd.factorize(images["phash"])  # so that equal looks, however many, cost nothing
    fingerprints = parse_hashes(distinct)
    told = fingerprints.have_features
    pairs = near_pairs(PerceptualHashes(fingerprints.hashes[told], fingerprints.colours[told]))
    compared = told[which]
    number = np.cumsum(told) - 1  # of each distinct look, among those that are compared
    groups = _groups(images["path"].to_numpy()[compared], number[which[compared]], pairs)
    return NearDuplicates(same, groups, int((~compared).sum()), pairs.complete)


def find_leaks(train: pd.DataFrame, evaluation: pd.DataFrame) -> tuple[list[Leak], bool]:
    """Evaluation images that are trained on too, each with the training image most like it; and whether all were found.

    Both frames have the columns path, key and phash, the latter empty where an image was not looked at: such a one is only
    compared by its bytes. Leaks are in the order of `evaluation`.
    """
    train = train.sort_values("path", kind="stable").drop_duplicates("key")
    by_key = dict(zip(train["key"].tolist(), train["path"].tolist(), strict=True))
    found: dict[int, Leak] = {}
    for row, (path, key) in enumerate(
        zip(evaluation["path"].tolist(), evaluation["key"].tolist(), strict=True)
    ):
        if key in by_key:
            found[row] = Leak(path, by_key[key], distance=0, same=True)
    train = _comparable(train)
    rest = np.array([row not in found for row in range(len(evaluation))], dtype=bool)
    evaluation = evaluation.assign(row=np.arange(len(evaluation)))[rest]
    evaluation = _comparable(evaluation)
    pairs = near_pairs(parse_hashes(evaluation["phash"]), parse_hashes(train["phash"]))
    rows, paths, others = (evaluation["row"].tolist(), evaluation["path"].tolist(), train["path"].tolist())
    order = np.lexsort((pairs.second, pairs.distance))
    for first, second, distance in zip(
        pairs.first[order].tolist(), pairs.second[order].tolist(), pairs.distance[order].tolist(), strict=True
    ):
        found.setdefault(rows[first], Leak(paths[first], others[second], distance, same=False))
    return [found[row] for row in sorted(found)], pairs.complete


def parse_hashes(phashes: Iterable[str]) -> PerceptualHashes:
    """The scans' `phash` as numbers."""
    data = np.frombuffer(bytes.fromhex("".join(phashes)), np.uint8).reshape(-1, _HASH_BYTES)
    return PerceptualHashes(data[:, :8].copy().view(">u8").ravel().astype(np.uint64), data[:, 8:])


def near_pairs(fingerprints: PerceptualHashes, others: PerceptualHashes | None = None) -> Pairs:
    """Pairs of one of `fingerprints` (N) and one of `others` (M) that look alike, each once.

    Without `others`, pairs within `fingerprints`, the first index below the second. Exact: few hashes are compared each with each; of more,
    only those that differ in at most a third of MAX_DISTANCE bits within one of three bands of their bits, which every pair does
    (multi-index hashing; Norouzi, Punjani and Fleet 2012). Memory and time are bounded by MAX_PAIRS and MAX_CANDIDATES.
    """
    within = others is None
    hashes, colours = fingerprints
    targets, target_colours = fingerprints if others is None else others
    compare = _compare_all if len(hashes) * len(targets) <= _ALL_AT_ONCE else _compare_bands
    codes = np.empty(0, np.int64)  # a pair as one number
    fresh: list[np.ndarray] = []
    waiting, compared = 0, 0
    for first, second in compare(hashes, targets, within):
        compared += len(first)
        near = np.bitwise_count(hashes[first] ^ targets[second]) <= MAX_DISTANCE
        first, second = first[near], second[near]
        apart = np.abs(colours[first].astype(np.int16) - target_colours[second]).max(axis=1, initial=0)
        similar = apart <= MAX_COLOUR_DISTANCE
        fresh.append(first[similar].astype(np.int64) * len(targets) + second[similar])
        waiting += len(fresh[-1])
        if waiting > MAX_PAIRS:  # or fewer: a pair may be met in each band
            codes, fresh, waiting = np.unique(np.concatenate((codes, *fresh))), [], 0
        if len(codes) > MAX_PAIRS or compared > MAX_CANDIDATES:
            break
    codes = np.unique(np.concatenate((codes, *fresh)))
    complete = len(codes) <= MAX_PAIRS and compared <= MAX_CANDIDATES
    first, second = np.divmod(codes[:MAX_PAIRS], max(len(targets), 1))
    return Pairs(first, second, np.bitwise_count(hashes[first] ^ targets[second]).astype(np.int64), complete)


def _compare_all(
    hashes: np.ndarray, targets: np.ndarray, within: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every pair, some rows at a time."""
    rows = max(1, _CANDIDATES_AT_ONCE // max(len(targets), 1))
    for start in range(0, len(hashes), rows):
        near = np.bitwise_count(hashes[start : start + rows, None] ^ targets[None, :]) <= MAX_DISTANCE
        first, second = np.nonzero(near)
        first += start
        yield (first[first < second], second[first < second]) if within else (first, second)


def _compare_bands(
    hashes: np.ndarray, targets: np.ndarray, within: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs that differ in few bits of a band: candidates, among which are all near pairs."""
    for first_bit, bits in _BANDS:
        shift, mask = np.uint64(first_bit), np.uint64((1 << bits) - 1)
        values = ((hashes >> shift) & mask).astype(np.int32)
        order = np.argsort(
            values, kind="stable"
        )  # neighbours in this order ask for neighbouring places of the table
        values = values[order]
        if within:
            target_order, target_values = order, values
        else:
            target_values = ((targets >> shift) & mask).astype(np.int32)
            target_order = np.argsort(target_values, kind="stable")
            target_values = target_values[target_order]
        starts = np.searchsorted(target_values, np.arange((1 << bits) + 1, dtype=np.int32)).astype(np.int32)
        for flips in range(MAX_DISTANCE // len(_BANDS) + 1):
            for flipped in combinations(range(bits), flips):
                asked, places = values, order
                if (
                    within and flipped
                ):  # the pair is met from both sides: take the one whose lowest differing bit is 0
                    zero = (values >> flipped[0]) & 1 == 0
                    asked, places = values[zero], order[zero]
                asked = asked ^ np.int32(sum(1 << bit for bit in flipped))
                for first, second in _expand(places, starts[asked], starts[asked + 1]):
                    second = target_order[second]
                    if within:
                        first, second = np.minimum(first, second), np.maximum(first, second)
                        yield first[first < second], second[first < second]
                    else:
                        yield first, second


def _expand(
    places: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each place with every number from its start up to its end, a bounded number of pairs at a time."""
    counts = ends - starts
    some = np.flatnonzero(counts)
    places, starts, counts = places[some], starts[some], counts[some].astype(np.int64)
    totals = np.cumsum(counts)
    begin = 0
    while begin < len(places):
        done = totals[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(totals, done + _CANDIDATES_AT_ONCE, side="right")))
        repeats = counts[begin:end]
        first_of = totals[begin:end] - repeats - done
        offsets = np.arange(repeats.sum()) - np.repeat(first_of, repeats)
        yield np.repeat(places[begin:end], repeats), np.repeat(starts[begin:end], repeats) + offsets
        begin = end


def _groups(paths: np.ndarray, which: np.ndarray, pairs: Pairs) -> tuple[Group, ...]:
    """Images joined by pairs, or by having the same hash; `which` gives each image's hash among the paired ones."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(paths):
        return ()
    count = int(which.max()) + 1
    graph = coo_array(
        (np.ones(len(pairs.first), dtype=np.int8), (pairs.first, pairs.second)), shape=(count, count)
    )
    _, component = connected_components(graph, directed=False)
    farthest = np.zeros(count, dtype=np.int64)
    np.maximum.at(farthest, component[pairs.first], pairs.distance)
    of_image = component[which]
    sizes = np.bincount(of_image)
    members = np.flatnonzero(sizes[of_image] > 1)
    members = members[np.argsort(of_image[members], kind="stable")]
    edges = np.flatnonzero(np.diff(of_image[members])) + 1
    groups = [
        Group(tuple(paths[part].tolist()), int(farthest[of_image[part[0]]]))
        for part in np.split(members, edges)
        if len(part)
    ]
    return tuple(sorted(groups, key=lambda group: (-len(group.paths), group.paths)))


def _comparable(frame: pd.DataFrame) -> pd.DataFrame:
    frame = frame[frame["phash"] != ""]
    return frame[parse_hashes(frame["phash"]).have_features]
