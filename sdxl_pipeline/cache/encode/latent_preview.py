"""Preview of a dataset's latents: channel statistics, and crops beside their decoded latents."""

from pathlib import Path

import pandas as pd
import torch
from PIL import Image, PngImagePlugin

from sdxl_pipeline.cache.encode.cache_keys import Row
from sdxl_pipeline.cache.encode.crop_batches import read_crops
from sdxl_pipeline.cache.encode.encoders import load_latent_encoder
from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.data.decoding.image_decoding import UnreadableImage
from sdxl_pipeline.data.quality.contact_sheets import contact_sheet
from sdxl_pipeline.files.atomic_files import atomic_path
from sdxl_pipeline.files.digest import digest_json
from sdxl_pipeline.models.components import latent_scaling_factor
from sdxl_pipeline.models.vae import decode
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import EncodeLatentsSpec
from sdxl_pipeline.runtime.stage_runner import StopSignal

MEASURED_LATENTS = 1024
SAMPLE_CROPS = 4
_SAMPLE_DIGEST = "latents"


def channel_statistics(
    store: TensorStore, keys: "pd.Series[str]", scaling_factor: float, stop: StopSignal
) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Return mean and standard deviation of each channel of the scaled posterior means, and the number of latents measured.

    Near 0 and 1 for images like the VAE's training data. Covers all latents, or the MEASURED_LATENTS with the smallest keys: keys are
    digests, so that is a deterministic random sample.
    """
    measured = sorted(keys.unique())[:MEASURED_LATENTS]
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for key in measured:
        stop.raise_if_requested()
        channels = store.read(key)["mean"].double().flatten(1) * scaling_factor  # (4, h * w)
        count += channels.shape[1]
        total = total + channels.sum(1)
        squares = squares + channels.square().sum(1)
    if not count:
        return (), (), 0
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist()), len(measured)


def write_sample(
    spec: EncodeLatentsSpec, available: pd.DataFrame, store: TensorStore, reporter: Reporter
) -> str | None:
    """Write a PNG of some crops, spread over the dataset, beside their decoded latents; return its path, None without crops.

    An existing image of the same crops is reused.
    """
    path = Path(spec.sample_path)
    count = min(SAMPLE_CROPS, len(available))
    chosen = available.iloc[[index * len(available) // count for index in range(count)]]
    rows: list[Row] = list(chosen.itertuples(index=False, name="Row"))
    digest = digest_json([[row.path, row.latent_key] for row in rows])
    if not rows:
        return None
    if _sample_digest(path) == digest:
        return str(path)
    vae = load_latent_encoder(spec.base_model, spec.hardware)
    scaling_factor = latent_scaling_factor(spec.base_model)
    images, labels = [], []
    for row in rows:
        try:
            crop = read_crops(Path(spec.data_dir) / row.path, row.key, [row])[0]
        except UnreadableImage:  # deleted or changed since it was encoded
            continue
        decoded = decode(vae, store.read(row.latent_key)["mean"][None] * scaling_factor)[0]  # (3, H, W)
        decoded_pixels = decoded.permute(1, 2, 0).mul(255).round().byte().cpu().numpy()
        images += [Image.fromarray(crop), Image.fromarray(decoded_pixels)]
        labels += [f"{row.path} {row.bucket_w}x{row.bucket_h}", "decoded from its latents"]
    if not images:
        return None
    metadata = PngImagePlugin.PngInfo()
    metadata.add_text(_SAMPLE_DIGEST, digest)
    with atomic_path(path) as temporary:
        contact_sheet(images, labels, columns=min(4, len(images)), tile=256).save(temporary, pnginfo=metadata)
    reporter.image("decoded latents", path, "crops beside their decoded latents")
    return str(path)


def _sample_digest(path: Path) -> str | None:
    """Return the digest of the crops in an existing sample image."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get(_SAMPLE_DIGEST)
