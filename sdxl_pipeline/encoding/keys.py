"""What an entry of the stores depends on, and so what its key digests. No torch."""

from typing import Any, Final

from sdxl_pipeline.store.digest import digest_json

LATENTS_VERSION: Final = 1
"""Raise it when pixels or encoding change, so that older entries are no longer found."""

TEXT_VERSION: Final = 1
"""Raise it when the text encoding changes, so that older entries are no longer found."""

EMPTY_PROMPT: Final = ""

Row = Any
"""A row of the crop plan, as `DataFrame.itertuples` gives it."""

_CROP_COLUMNS = ("bucket_h", "bucket_w", "resized_h", "resized_w", "crop_top", "crop_left")


def latent_key(row: Row, vae_digest: str, vae_dtype: str) -> str:
    """The store's key for the latents of one crop."""
    return digest_json(
        {
            "picture": row.key,
            "crop": {column: int(getattr(row, column)) for column in _CROP_COLUMNS},
            "vae": vae_digest,
            "dtype": vae_dtype,
            "version": LATENTS_VERSION,
        }
    )


def embed_key(caption: str, text_digest: str, dtype: str) -> str:
    """The store's key for the embeddings of one caption."""
    return digest_json({"caption": caption, "text": text_digest, "dtype": dtype, "version": TEXT_VERSION})
