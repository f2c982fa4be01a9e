"""Index of a store: the locations of a million keys as columns, with batched lookup.

On disk an index is a Parquet table with a row per entry, sorted by key: key (32 bytes), shard (file name), row (of the entry in its
shard), nbytes (of its tensors) and shard_bytes (size of the shard's file).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdxl_pipeline.files.atomic_files import atomic_path

KEY_BYTES = 32
_KEY = np.dtype(f"S{KEY_BYTES}")
_SCHEMA = pa.schema(
    [
        ("key", pa.binary(KEY_BYTES)),
        ("shard", pa.dictionary(pa.int32(), pa.string())),
        ("row", pa.int32()),
        ("nbytes", pa.int64()),
        ("shard_bytes", pa.int64()),
    ]
)


def pack_keys(keys: Sequence[str]) -> np.ndarray:
    """Return keys as bytes, (N,) S32. Raises ValueError for a key that is not the 64 hexadecimal digits of a SHA-256.

    Two packed keys are equal exactly when all their bytes are. Never convert one to a Python object: numpy strips trailing zeros.
    """
    packed = b""
    if all(len(key) == 2 * KEY_BYTES for key in keys):
        try:
            packed = bytes.fromhex("".join(keys))
        except ValueError:
            packed = b""
    if len(packed) != KEY_BYTES * len(keys):
        invalid = next(key for key in keys if not _is_digest(key))
        raise ValueError(f"{invalid!r} is not a digest: a key is 64 hexadecimal digits")
    return np.frombuffer(packed, dtype=_KEY)


def unpack_keys(packed: np.ndarray) -> list[str]:
    """Return the keys as text, from (N,) S32."""
    text = packed.tobytes().hex()
    return [text[start : start + 2 * KEY_BYTES] for start in range(0, len(text), 2 * KEY_BYTES)]


def _is_digest(key: str) -> bool:
    return len(key) == 2 * KEY_BYTES and all(digit in "0123456789abcdefABCDEF" for digit in key)


@dataclass(frozen=True)
class Index:
    """Locations of N entries in S shards, as columns sorted by key; keys are unique."""

    keys: np.ndarray  # (N,) S32
    shard: np.ndarray  # (N,) int32, into `shards`
    row: np.ndarray  # (N,) int32
    nbytes: np.ndarray  # (N,) int64
    shards: tuple[str, ...]  # (S,)
    shard_bytes: np.ndarray  # (S,) int64
    prefix: (
        np.ndarray
    )  # (N,) uint64: the first bytes of each key, since integers are searched faster than strings

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the position of each of these packed keys: (M,) int64, -1 for an absent one."""
        if not len(self):
            return np.full(len(keys), -1)
        prefixes = _prefixes(keys)
        positions = np.searchsorted(self.prefix, prefixes)
        positions[positions == len(self)] = 0
        found = self.keys[positions] == keys
        # Keys whose first 8 bytes are equal are compared in full.
        collisions = ~found & (self.prefix[positions] == prefixes)
        if collisions.any():
            positions[collisions] = np.minimum(np.searchsorted(self.keys, keys[collisions]), len(self) - 1)
            found = self.keys[positions] == keys
        return np.where(found, positions, -1)

    def select(self, mask: np.ndarray) -> "Index":
        """Return the entries where `mask` (N,) is true, and only their shards."""
        if mask.all():
            return self
        used, codes = np.unique(self.shard[mask], return_inverse=True)
        return _index(
            self.keys[mask],
            codes.astype(np.int32),
            self.row[mask],
            self.nbytes[mask],
            tuple(self.shards[code] for code in used.tolist()),
            self.shard_bytes[used],
        )

    def with_complete_shards(self, sizes: Mapping[str, int]) -> "Index":
        """Return the entries of shards whose files have their recorded size, given file sizes by name."""
        if not self.shards:
            return self
        complete = np.array(
            [
                sizes.get(name) == size
                for name, size in zip(self.shards, self.shard_bytes.tolist(), strict=True)
            ]
        )
        return self if complete.all() else self.select(complete[self.shard])


def index_of_shard(name: str, file_bytes: int, keys: np.ndarray, nbytes: np.ndarray) -> Index:
    """Return the index of one shard, given the packed keys and the sizes of its entries in the order of its rows."""
    count = len(keys)
    rows = np.arange(count, dtype=np.int32)
    return _sorted(keys, np.zeros(count, np.int32), rows, nbytes, (name,), np.array([file_bytes], np.int64))


def merge_indices(indices: Iterable[Index]) -> Index:
    """Return all entries of some indices; for a key in several, the location in the first."""
    parts = [index for index in indices if len(index)]
    if not parts:
        return _index(*_no_rows(), (), np.empty(0, np.int64))
    if len(parts) == 1:
        return parts[0]
    codes: dict[str, int] = {}
    sizes: list[int] = []
    shard_columns = []
    for part in parts:
        new_codes = np.empty(len(part.shards), np.int32)
        for code, (name, size) in enumerate(zip(part.shards, part.shard_bytes.tolist(), strict=True)):
            new_codes[code] = codes.setdefault(name, len(codes))
            if len(codes) > len(sizes):
                sizes.append(size)
        shard_columns.append(new_codes[part.shard])
    return _sorted(
        np.concatenate([part.keys for part in parts]),
        np.concatenate(shard_columns),
        np.concatenate([part.row for part in parts]),
        np.concatenate([part.nbytes for part in parts]),
        tuple(codes),
        np.array(sizes, np.int64),
    )


def write_index(path: Path, index: Index) -> None:
    """Write an index to `path` atomically."""
    keys = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(KEY_BYTES), len(index), [None, pa.py_buffer(np.ascontiguousarray(index.keys))]
    )
    shards = pa.DictionaryArray.from_arrays(pa.array(index.shard), pa.array(index.shards, pa.string()))
    columns = [keys, shards, index.row, index.nbytes, index.shard_bytes[index.shard]]
    with atomic_path(path) as temporary:
        pq.write_table(
            pa.table(columns, schema=_SCHEMA),
            temporary,
            use_dictionary=["shard", "row", "nbytes", "shard_bytes"],
            write_statistics=False,
            write_page_checksum=True,
        )


class IndexFileError(Exception):
    """An index file cannot be read. The message contains the path and the reason."""


def read_index(path: Path) -> Index | None:
    """Return an index as it was written, or None when the file does not exist.

    Raises IndexFileError for a corrupt file (the checksums of its pages are verified), and PermissionError.
    """
    try:
        # Read in small pieces by one thread: read_table needs three times the memory.
        with pq.ParquetFile(
            path,
            read_dictionary=["shard"],
            pre_buffer=False,
            buffer_size=1 << 16,
            page_checksum_verification=True,
        ) as file:
            table = file.read(use_threads=False).unify_dictionaries().combine_chunks()
        if not table.schema.equals(_SCHEMA) or any(column.null_count for column in table.columns):
            raise IndexFileError(f"{path} cannot be read: its columns are not those of an index")
        return _index_of_table(table)
    except FileNotFoundError:
        return None
    except (PermissionError, MemoryError, IndexFileError):
        raise
    except Exception as error:  # pyarrow raises OSError, ValueError, UnicodeDecodeError and others
        raise IndexFileError(f"{path} cannot be read: {error}") from error


def _index_of_table(table: pa.Table) -> Index:
    if not len(table):
        return merge_indices([])
    key, shard, *rest = (table.column(name).chunk(0) for name in _SCHEMA.names)
    row, nbytes, shard_bytes = (column.to_numpy() for column in rest)
    keys = np.frombuffer(key.buffers()[1], dtype=_KEY, count=len(table), offset=key.offset * KEY_BYTES)
    codes = shard.indices.to_numpy()
    shards = tuple(shard.dictionary.to_pylist())
    sizes = np.zeros(len(shards), np.int64)
    sizes[codes] = shard_bytes
    if len(keys) > 1 and not (keys[:-1] < keys[1:]).all():
        return _sorted(keys, codes, row, nbytes, shards, sizes)
    return _index(keys, codes, row, nbytes, shards, sizes)


def _index(
    keys: np.ndarray,
    shard: np.ndarray,
    row: np.ndarray,
    nbytes: np.ndarray,
    shards: tuple[str, ...],
    shard_bytes: np.ndarray,
) -> Index:
    return Index(keys, shard, row, nbytes, shards, shard_bytes, _prefixes(keys))


def _sorted(
    keys: np.ndarray,
    shard: np.ndarray,
    row: np.ndarray,
    nbytes: np.ndarray,
    shards: tuple[str, ...],
    shard_bytes: np.ndarray,
) -> Index:
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    first = np.ones(len(keys), bool)
    first[1:] = keys[1:] != keys[:-1]
    order = order[first]
    return _index(keys[first], shard[order], row[order], nbytes[order], shards, shard_bytes)


def _prefixes(keys: np.ndarray) -> np.ndarray:
    words = np.ascontiguousarray(keys).view(">u8")
    return words[:: KEY_BYTES // 8].astype(np.uint64)


def _no_rows() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return np.empty(0, _KEY), np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int64)
