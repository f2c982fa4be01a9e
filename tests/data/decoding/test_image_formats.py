"""Tests of image formats: recognition by content, decoders, and reasons for unsupported files."""

import io
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_pipeline.data.decoding import image_formats
from sdxl_pipeline.data.decoding.image_decoding import MAX_PIXELS, UnreadableImage, open_image, read_header
from sdxl_pipeline.data.decoding.image_formats import (
    FORMATS,
    HEAD_BYTES,
    IMAGE_SUFFIXES,
    format_of,
    suffix_of,
)
from sdxl_pipeline.data.decoding.pixels import load_upright
from sdxl_pipeline.data.quality.perceptual_hash import compute_hashes
from sdxl_pipeline.data.scan.dataset_scan import scan_dataset
from tests.support.odd_files import dib, tga
from tests.support.photographs import PHOTOGRAPHS, encoded, values

EDGE = 60_000
DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def samples(photograph) -> dict[str, tuple[bytes, float]]:
    """Return a file of each format, 320x200, and its mean coding error."""
    import pillow_heif
    import pillow_jxl  # noqa: F401

    image = photograph

    pillow_heif.register_heif_opener()
    pixels = np.asarray(image)
    return {
        "PNG": (encoded(image, "PNG"), 0),
        "JPEG": (encoded(image, "JPEG", quality=95, subsampling=0), 3),
        "WEBP": (encoded(image, "WEBP", lossless=True), 0),
        "AVIF": (encoded(image, "AVIF", quality=95, subsampling="4:4:4"), 3),
        "GIF": (encoded(image, "GIF"), 8),
        "BMP": (encoded(image, "BMP"), 0),
        "DIB": (dib(pixels), 0),
        "TIFF": (encoded(image, "TIFF"), 0),
        "PNM": (encoded(image, "PPM"), 0),
        "TGA": (tga(pixels), 0),
        "JPEG2000": (encoded(image, "JPEG2000"), 0),
        "HEIF": (encoded(image, "HEIF", quality=95, chroma=444), 3),
        "JXL": (encoded(image, "JXL", lossless=True), 0),
    }


def test_scan_format_is_that_of_content(make_dataset, folder, tmp_path, photograph, samples):
    files = samples
    assert set(files) == set(FORMATS)
    for name, (data, _) in files.items():
        (folder / f"{name}.jpg").write_bytes(data)
    scanned = scan_dataset(make_dataset(), folder)
    assert set(scanned["status"]) == {"kept"}, dict(zip(scanned["path"], scanned["reason"], strict=True))
    assert dict(zip(scanned["path"], scanned["format"], strict=True)) == {f"{n}.jpg": n for n in files}
    assert set(scanned["width"]) == {320}
    assert set(scanned["height"]) == {200}
    hashed = compute_hashes(folder, scanned, tmp_path / "hashes.parquet")
    assert set(hashed["status"]) == {"kept"}
    for name, (_, tolerance) in files.items():
        loaded = load_upright(folder / f"{name}.jpg")
        assert np.abs(values(loaded) - values(photograph)).mean() <= tolerance, name


def test_scan_all_supported_suffixes_are_read(make_dataset, folder, photograph):
    for suffix in IMAGE_SUFFIXES:
        (folder / f"image{suffix}").write_bytes(encoded(photograph, "PNG"))
        (folder / f"IMAGE{suffix.upper()}").write_bytes(encoded(photograph, "PNG"))
    scanned = scan_dataset(make_dataset(), folder)
    assert len(scanned) == 2 * len(IMAGE_SUFFIXES)
    assert set(scanned["status"]) == {"kept"}


def test_load_upright_animation_gives_first_frame(folder, photograph):
    second = Image.new("RGB", photograph.size, "red")
    for name, suffix, options in (
        ("PNG", ".apng", {"duration": 100}),
        ("MPO", ".mpo", {"quality": 95, "subsampling": 0}),
        ("AVIF", ".avif", {"quality": 95, "duration": 100}),
    ):
        path = folder / f"moving{suffix}"
        path.write_bytes(encoded(photograph, name, save_all=True, append_images=[second], **options))
        assert np.abs(values(load_upright(path)) - values(photograph)).mean() < 4, name


@pytest.mark.parametrize("mode", ["1", "L"])
def test_read_header_pbm_and_pgm_are_pnm(mode, photograph):
    assert read_header(encoded(photograph.convert(mode), "PPM")).format == "PNM"


def test_load_upright_orientation_is_applied_once(folder, photograph, samples):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = exif.tobytes()  # the AVIF encoder removes the orientation from the object
    (folder / "a.avif").write_bytes(encoded(photograph, "AVIF", exif=exif, quality=95))
    assert read_header((folder / "a.avif").read_bytes()).width == 200
    assert load_upright(folder / "a.avif").size == (200, 320)
    # a JPEG XL codestream has its own orientation, which the decoder applies
    (folder / "a.jxl").write_bytes(encoded(photograph, "JXL", exif=turned))
    assert read_header((folder / "a.jxl").read_bytes()).width == 320
    assert load_upright(folder / "a.jxl").size == (320, 200)
    # one transcoded losslessly from a JPEG has the JPEG's pixels and needs its orientation
    (folder / "a.jpg").write_bytes(encoded(photograph, "JPEG", exif=turned))
    with Image.open(folder / "a.jpg") as jpeg, pytest.warns(UserWarning, match="lossless"):
        jpeg.save(folder / "b.jxl")
    assert read_header((folder / "b.jxl").read_bytes()).width == 200
    assert load_upright(folder / "b.jxl").size == (200, 320)


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("HEIF", "pillow_heif", "heif"), ("JXL", "pillow_jxl", "jxl")]
)
def test_scan_missing_decoder_gives_reason_with_extra(
    make_dataset, folder, tmp_path, samples, monkeypatch, name, package, extra
):
    data, _ = samples[name]
    suffix = FORMATS[name].suffixes[0]
    for file in (f"a{suffix}", "b.jpg"):
        (folder / file).write_bytes(data)
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, FORMATS[name].module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    scanned = scan_dataset(make_dataset(), folder, recorded=tmp_path / "scan.parquet")
    assert set(scanned["reason"]) == {
        f"{name} needs an optional package: pip install 'sdxl-pipeline[{extra}]'"
    }
    monkeypatch.undo()
    again = scan_dataset(make_dataset(), folder, recorded=tmp_path / "scan.parquet")
    assert set(again["status"]) == {"kept"}, "the package is installed by now"


def test_read_header_pillow_without_decoder_raises(photograph, monkeypatch):
    from PIL import AvifImagePlugin

    data = encoded(photograph, "AVIF")
    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    with pytest.raises(UnreadableImage, match="AVIF cannot be decoded by this build of Pillow"):
        read_header(data)


@pytest.mark.parametrize("name", ["AVIF", "HEIF", "JXL", "JPEG2000", "PNM", "TGA"])
def test_read_header_truncated_file_raises(samples, name):
    data, _ = samples[name]
    for end in (len(data) * 9 // 10, len(data) // 2, 70, 20):
        for source in (data[:end], io.BytesIO(data[:end])):
            with pytest.raises(UnreadableImage) as raised:
                read_header(source)
            # a bare JPEG XL codestream does not contain its length
            allowed = {"truncated", "corrupt image"} if name in ("JXL", "JPEG2000") else {"truncated"}
            assert raised.value.reason in allowed, end


def test_open_image_too_large_jpeg_xl_raises(samples):
    data = bytearray(samples["JXL"][0])
    bits = int.from_bytes(data[2:12], "little")
    # a height of 30 bits, and the width by its ratio 1:1
    data[2:12] = (0 | 3 << 1 | (EDGE - 1) << 3 | 1 << 33 | (bits >> 20) << 36).to_bytes(20, "little")[:10]
    with pytest.raises(
        UnreadableImage, match=f"{EDGE}x{EDGE} pixels are more than {MAX_PIXELS // 10**6} million"
    ):
        open_image(bytes(data))


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf", "HEIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp42", ""),
        (b"RIFF\x10\0\0\0WAVEfmt ", ""),
        (b"P5 is a page of the paper", "PNM"),
        (b"P is a letter", ""),
        (b"8BPS\0\1", "PSD"),
        (b"\0\0\1\0\1\0 \0", "ICO"),
        (b"\0\0\2\0\1\0 \0\0\0\1\0\1\0\0\0\0\0\0\0", ""),
        (bytes(64), ""),
        (b"Dear diary,\n" * 5, ""),
        (struct.pack("<BBBHHBHHHHBB", 0, 1, 1, 0, 256, 24, 0, 0, 5, 5, 8, 0), "TGA"),
        (struct.pack("<BBBHHBHHHHBB", 0, 0, 10, 0, 0, 0, 0, 0, 5, 5, 32, 8), "TGA"),
        (struct.pack("<BBBHHBHHHHBB", 0, 0, 10, 0, 0, 0, 0, 0, 0, 5, 32, 8), ""),
    ],
)
def test_format_of_signature_gives_format(head, name):
    assert format_of(head) == name


@pytest.mark.real
def test_format_of_real_photographs_matches_suffix():
    expected = {suffix: name for name, known in FORMATS.items() for suffix in known.suffixes}
    images = [path for path in PHOTOGRAPHS.iterdir() if path.suffix in IMAGE_SUFFIXES]
    assert len(images) > 10
    for path in images:
        head = path.read_bytes()[:HEAD_BYTES]
        assert format_of(head) == expected[path.suffix], path.name
        assert suffix_of(head) in IMAGE_SUFFIXES


def test_formats_are_documented():
    for page in ("datasets.md", "from-simpletuner.md"):
        text = (DOCS / page).read_text(encoding="utf-8")
        missing = [suffix for suffix in image_formats.IMAGE_SUFFIXES if f"`{suffix}`" not in text]
        assert missing == [], page
    table = (DOCS / "datasets.md").read_text(encoding="utf-8")
    for known in FORMATS.values():
        row = next(
            line for line in table.splitlines() if line.startswith("|") and f"`{known.suffixes[0]}`" in line
        )
        assert set(re.findall(r"`(\.\w+)`", row)) == set(known.suffixes)
        assert not known.extra or f"[{known.extra}]" in row
