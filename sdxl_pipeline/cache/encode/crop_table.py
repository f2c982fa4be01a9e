"""Images from the data folder: read once, checked against the plan, decoded and cut. No torch."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np

from sdxl_pipeline.data.buckets.crop_plan import Crop
from sdxl_pipeline.data.decoding.image_decoding import UnreadableImage, unexpected_as_unreadable
from sdxl_pipeline.data.decoding.pixels import load_crops
from sdxl_pipeline.runtime.stage_runner import UserError


def read_crops(path: Path, key: str | None, crops: Sequence[Crop]) -> list[np.ndarray]:
    """Crops of the image at `path`: uint8 sRGB, (bucket_h, bucket_w, 3) each.

    The file is read once: what is decoded is what was hashed. Raises UnreadableImage, with a reason to show, when it cannot be read or
    decoded, or is no longer the image whose digest is `key` (None: not looked at).
    """
    with unexpected_as_unreadable():
        data = path.read_bytes()
    # an edited image must not be stored under the old one's key, where it would stay
    if key is not None and sha256(data).hexdigest() != key:
        raise UnreadableImage("changed since the dataset was scanned; materialize the dataset again")
    return load_crops(data, crops)


def require_folder(data_dir: Path) -> None:
    """Raise UserError when the images' folder is not there: one sentence, rather than one for each image."""
    try:
        if data_dir.is_dir():
            next(data_dir.iterdir(), None)
            return
        reason = "does not exist"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    raise UserError(
        f"the images' folder {data_dir} {reason}; it was there when the dataset was scanned. Mount it or put it back, or mend "
        "instance_data_dir in multidatabackend.json, and materialize this again"
    )
