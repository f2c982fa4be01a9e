"""Duplicates in a dataset: identical files and near duplicates by perceptual hash.

Two images are near duplicates if their perceptual hashes (sdxl_pipeline.data.quality.perceptual_hash) differ in at most MAX_DISTANCE of 64
bits, and the colours of their 4 x 4 parts by at most MAX_COLOUR_DISTANCE. Half of a hash's bits are set by construction, so distances are
even. On the photographs of scikit-image, resizing gives distances up to 2, JPEG of quality 30 up to 4, brightness x 0.6 up to 4, cropping
2 % mostly up to 6 and 4 % mostly up to 8; different photographs, and different quarters of one, have at least 18. The colours of such
copies differ by up to 19; those of one drawing with a thin ring in two colours by at least 23, mostly 40 and more. Mirrored images,
greyscale copies and crops of a tenth and more are not detected.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd

MAX_DISTANCE = 8
"""Maximum Hamming distance of near duplicates. Of a million unrelated images, about a hundred pairs are within it by chance."""
MAX_COLOUR_DISTANCE = 21
"""Maximum difference of the colours of near duplicates, of 255."""
MAX_PAIRS = 2_000_000
"""Number of pairs after which a search ends, for datasets such as film frames, where most images are near duplicates."""
MAX_CANDIDATES = 1 << 32
"""Number of comparisons after which a search ends (about a minute)."""

_HASH_BYTES = 40
_MIN_SET_BITS = 16  # a hash with fewer set bits belongs to a flat or smoothly shaded image: its bits are mostly rounding errors
_BANDS = ((0, 21), (21, 21), (42, 22))  # (first bit, bits)
_MAX_ALL_PAIRS = 1 << 26
_CANDIDATES_PER_CHUNK = 1 << 22


class PerceptualHashes(NamedTuple):
    """Perceptual hashes of images: `hashes` uint64 (N,), `colours` uint8 (N, 32)."""

    hashes: np.ndarray
    colours: np.ndarray

    @property
    def have_features(self) -> np.ndarray:
        """Which hashes are of images with enough features to compare: bool (N,)."""
        return np.bitwise_count(self.hashes) >= _MIN_SET_BITS


@dataclass(frozen=True)
class Pairs:
    """Pairs of near duplicates: indices into both lists, and the Hamming distance of their hashes."""

    first: np.ndarray
    second: np.ndarray
    distance: np.ndarray
    complete: bool
    """False if the search ended at MAX_PAIRS or MAX_CANDIDATES."""


@dataclass(frozen=True)
class Group:
    """Paths of near duplicates, and the largest distance between paired images among them."""

    paths: tuple[str, ...]
    distance: int


@dataclass(frozen=True)
class NearDuplicates:
    """Duplicates and near duplicates of a dataset."""

    same: tuple[tuple[str, ...], ...]
    """Groups of paths of files with the same bytes."""
    near_duplicates: tuple[Group, ...]
    """Groups of near duplicates, largest first; of files with the same bytes only the first is listed."""
    featureless: int
    """Number of flat or smoothly shaded images, which cannot be compared."""
    complete: bool
    """False if the search ended early."""


@dataclass(frozen=True)
class Leak:
    """An evaluation image with a duplicate or near duplicate in the training images."""

    eval_path: str
    train_path: str
    distance: int
    same: bool
    """Whether the bytes are the same."""


def find_near_duplicates(frame: pd.DataFrame) -> NearDuplicates:
    """Return the duplicates among a scan's kept images. `frame` has the columns path, key, phash and status."""
    kept = frame[frame["status"] == "kept"].sort_values("path", kind="stable")
    same = tuple(
        tuple(paths.tolist())
        for _, paths in kept[kept["key"].duplicated(keep=False)].groupby("key", sort=False)["path"]
    )
    images = kept.drop_duplicates("key")
    images = images[images["phash"] != ""]
    hash_index, distinct = pd.factorize(images["phash"])  # so that equal hashes are compared only once
    fingerprints = parse_hashes(distinct)
    comparable = fingerprints.have_features
    pairs = near_pairs(PerceptualHashes(fingerprints.hashes[comparable], fingerprints.colours[comparable]))
    is_comparable = comparable[hash_index]
    pair_index = np.cumsum(comparable) - 1  # of each distinct hash, among the comparable ones
    groups = _groups(images["path"].to_numpy()[is_comparable], pair_index[hash_index[is_comparable]], pairs)
    return NearDuplicates(same, groups, int((~is_comparable).sum()), pairs.complete)


def find_leaks(train: pd.DataFrame, evaluation: pd.DataFrame) -> tuple[list[Leak], bool]:
    """Return the evaluation images that are trained on too, each with the most similar training image; and whether all were found.

    Both frames have the columns path, key and phash; an image with an empty `phash` is compared only by its bytes. The result is in the
    order of `evaluation`.
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
    """Return the scans' `phash` strings as arrays."""
    data = np.frombuffer(bytes.fromhex("".join(phashes)), np.uint8).reshape(-1, _HASH_BYTES)
    return PerceptualHashes(data[:, :8].copy().view(">u8").ravel().astype(np.uint64), data[:, 8:])


def near_pairs(fingerprints: PerceptualHashes, others: PerceptualHashes | None = None) -> Pairs:
    """Return each pair of near duplicates with one of `fingerprints` (N) and one of `others` (M).

    Without `others`, the pairs are within `fingerprints`, the first index below the second. The search is exact: few hashes are compared
    exhaustively; many only if they differ in at most a third of MAX_DISTANCE bits within one of three bands, which holds for every pair
    (multi-index hashing; Norouzi, Punjani and Fleet 2012). Memory and time are bounded by MAX_PAIRS and MAX_CANDIDATES.
    """
    within = others is None
    hashes, colours = fingerprints
    targets, target_colours = fingerprints if others is None else others
    compare = _all_pairs if len(hashes) * len(targets) <= _MAX_ALL_PAIRS else _band_candidates
    pair_codes = np.empty(0, np.int64)  # a pair encoded as one integer
    pending: list[np.ndarray] = []
    pending_count, compared = 0, 0
    for first, second in compare(hashes, targets, within):
        compared += len(first)
        near = np.bitwise_count(hashes[first] ^ targets[second]) <= MAX_DISTANCE
        first, second = first[near], second[near]
        colour_distance = np.abs(colours[first].astype(np.int16) - target_colours[second]).max(
            axis=1, initial=0
        )
        similar = colour_distance <= MAX_COLOUR_DISTANCE
        pending.append(first[similar].astype(np.int64) * len(targets) + second[similar])
        pending_count += len(pending[-1])
        if pending_count > MAX_PAIRS:  # or fewer distinct ones, since a pair may occur in each band
            pair_codes, pending, pending_count = np.unique(np.concatenate((pair_codes, *pending))), [], 0
        if len(pair_codes) > MAX_PAIRS or compared > MAX_CANDIDATES:
            break
    pair_codes = np.unique(np.concatenate((pair_codes, *pending)))
    complete = len(pair_codes) <= MAX_PAIRS and compared <= MAX_CANDIDATES
    first, second = np.divmod(pair_codes[:MAX_PAIRS], max(len(targets), 1))
    return Pairs(first, second, np.bitwise_count(hashes[first] ^ targets[second]).astype(np.int64), complete)


def _all_pairs(
    hashes: np.ndarray, targets: np.ndarray, within: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the pairs within MAX_DISTANCE by exhaustive comparison, in chunks of rows."""
    rows = max(1, _CANDIDATES_PER_CHUNK // max(len(targets), 1))
    for start in range(0, len(hashes), rows):
        near = np.bitwise_count(hashes[start : start + rows, None] ^ targets[None, :]) <= MAX_DISTANCE
        first, second = np.nonzero(near)
        first += start
        yield (first[first < second], second[first < second]) if within else (first, second)


def _band_candidates(
    hashes: np.ndarray, targets: np.ndarray, within: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield candidate pairs that differ in few bits of a band; they include all pairs within MAX_DISTANCE."""
    for first_bit, bits in _BANDS:
        shift, mask = np.uint64(first_bit), np.uint64((1 << bits) - 1)
        values = ((hashes >> shift) & mask).astype(np.int32)
        order = np.argsort(values, kind="stable")  # sorted lookups are local in memory
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
                probes, indices = values, order
                if (
                    within and flipped
                ):  # each pair occurs in both orders: keep the one whose lowest differing bit is 0
                    zero = (values >> flipped[0]) & 1 == 0
                    probes, indices = values[zero], order[zero]
                probes = probes ^ np.int32(sum(1 << bit for bit in flipped))
                for first, second in _expand(indices, starts[probes], starts[probes + 1]):
                    second = target_order[second]
                    if within:
                        first, second = np.minimum(first, second), np.maximum(first, second)
                        yield first[first < second], second[first < second]
                    else:
                        yield first, second


def _expand(
    indices: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each index paired with every integer from its start up to its end, in chunks of bounded size."""
    counts = ends - starts
    nonempty = np.flatnonzero(counts)
    indices, starts, counts = indices[nonempty], starts[nonempty], counts[nonempty].astype(np.int64)
    totals = np.cumsum(counts)
    begin = 0
    while begin < len(indices):
        done = totals[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(totals, done + _CANDIDATES_PER_CHUNK, side="right")))
        repeats = counts[begin:end]
        first_of = totals[begin:end] - repeats - done
        offsets = np.arange(repeats.sum()) - np.repeat(first_of, repeats)
        yield np.repeat(indices[begin:end], repeats), np.repeat(starts[begin:end], repeats) + offsets
        begin = end


def _groups(paths: np.ndarray, hash_index: np.ndarray, pairs: Pairs) -> tuple[Group, ...]:
    """Return the groups of images connected by pairs or by equal hashes; `hash_index` is the index of each image's hash."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(paths):
        return ()
    count = int(hash_index.max()) + 1
    graph = coo_array(
        (np.ones(len(pairs.first), dtype=np.int8), (pairs.first, pairs.second)), shape=(count, count)
    )
    _, component = connected_components(graph, directed=False)
    max_distance = np.zeros(count, dtype=np.int64)
    np.maximum.at(max_distance, component[pairs.first], pairs.distance)
    image_component = component[hash_index]
    sizes = np.bincount(image_component)
    members = np.flatnonzero(sizes[image_component] > 1)
    members = members[np.argsort(image_component[members], kind="stable")]
    edges = np.flatnonzero(np.diff(image_component[members])) + 1
    groups = [
        Group(tuple(paths[part].tolist()), int(max_distance[image_component[part[0]]]))
        for part in np.split(members, edges)
        if len(part)
    ]
    return tuple(sorted(groups, key=lambda group: (-len(group.paths), group.paths)))


def _comparable(frame: pd.DataFrame) -> pd.DataFrame:
    frame = frame[frame["phash"] != ""]
    return frame[parse_hashes(frame["phash"]).have_features]
