"""Keys of store entries: digests of everything an entry's tensors depend on. No torch."""

from hashlib import sha256
from json.encoder import encode_basestring
from typing import Any, Final

import pandas as pd

from sdxl_pipeline.files.digest import digest_json

LATENTS_VERSION: Final = 3
"""Increment when pixels or encoding change, so that older entries are no longer found."""

TEXT_VERSION: Final = 1
"""Increment when the text encoding changes, so that older entries are no longer found."""

EMPTY_PROMPT: Final = ""

Row = Any
"""A row of the crop plan, as yielded by `DataFrame.itertuples`."""

_CROP_COLUMNS = ("bucket_h", "bucket_w", "resized_h", "resized_w", "crop_top", "crop_left")


def latent_key(row: Row, vae_digest: str, vae_dtype: str) -> str:
    """Return the store key for the latents of one crop."""
    crop = {column: int(getattr(row, column)) for column in _CROP_COLUMNS} | {"flipped": bool(row.flipped)}
    return digest_json(
        {
            "picture": row.key,
            "crop": crop,
            "vae": vae_digest,
            "dtype": vae_dtype,
            "version": LATENTS_VERSION,
        }
    )


def latent_keys(rows: pd.DataFrame, vae_digest: str, vae_dtype: str) -> list[str]:
    """Return `latent_key` for every row of a crop plan, in a few microseconds each: the JSON of `digest_json` is formatted directly."""
    template = (
        '{"crop":{"bucket_h":%d,"bucket_w":%d,"crop_left":%d,"crop_top":%d,"flipped":%s,"resized_h":%d,"resized_w":%d},'
        f'"dtype":{_quote_json(vae_dtype)},"picture":%s,"vae":{_quote_json(vae_digest)},"version":{LATENTS_VERSION}}}'
    )
    flipped = ["true" if value else "false" for value in rows["flipped"].tolist()]
    names = ("bucket_h", "bucket_w", "crop_left", "crop_top", "flipped", "resized_h", "resized_w")
    crop = (flipped if name == "flipped" else rows[name].tolist() for name in names)
    return [
        sha256((template % (*values, encode_basestring(key))).encode()).hexdigest()
        for *values, key in zip(*crop, rows["key"].tolist(), strict=True)
    ]


def _quote_json(text: str) -> str:
    return encode_basestring(text).replace("%", "%%")


def embed_key(caption: str, text_digest: str, dtype: str, windows: int = 1) -> str:
    """Return the store key for the embeddings of a caption in `windows` windows of 77 tokens; `dtype` is `Hardware.text_precision`."""
    content = {"caption": caption, "text": text_digest, "dtype": dtype, "version": TEXT_VERSION}
    # Only if there are several: entries from before multi-window captions keep their keys.
    return digest_json(content if windows == 1 else content | {"windows": windows})
