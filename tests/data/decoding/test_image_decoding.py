"""Tests of opening images: the size limit applies to every format before anything is decoded."""

import io
import struct

import pytest
from PIL import Image

from sdxl_pipeline.data.decoding import image_decoding
from sdxl_pipeline.data.decoding.image_decoding import MAX_PIXELS, UnreadableImage, open_image, read_header
from tests.corpus.cases import bomb
from tests.support.photographs import encoded

EDGE = 60_000


def file_claiming_large_size(format_name: str) -> bytes:
    """Return a small file whose header claims 60000x60000 pixels, or the maximum of its format."""
    small = Image.new("RGB", (8, 8), "teal")
    data = bytearray(encoded(small, format_name, **({"lossless": True} if format_name == "WEBP" else {})))
    match format_name:
        case "PNG":
            return bomb(EDGE, EDGE)
        case "JPEG":
            offset = data.index(b"\xff\xc0") + 5
            struct.pack_into(">HH", data, offset, EDGE, EDGE)
        case "BMP":
            struct.pack_into("<ii", data, 18, EDGE, EDGE)
        case "GIF":
            struct.pack_into("<HH", data, 6, EDGE, EDGE)
            offset = data.index(b"\x2c", 13)
            struct.pack_into("<HH", data, offset + 5, EDGE, EDGE)
        case "TIFF":
            stream = io.BytesIO()
            small.save(stream, "TIFF", tiffinfo={})
            data = bytearray(stream.getvalue())
            (directory,) = struct.unpack_from("<I", data, 4)
            for entry in range(struct.unpack_from("<H", data, directory)[0]):
                offset = directory + 2 + 12 * entry
                if struct.unpack_from("<H", data, offset)[0] in (256, 257):
                    struct.pack_into("<HII", data, offset + 2, 4, 1, EDGE)
        case "WEBP":
            offset = data.index(b"VP8L") + 9
            (bits,) = struct.unpack_from("<I", data, offset)
            struct.pack_into("<I", data, offset, bits & ~0xFFFFFFF | 16_382 | 16_382 << 14)
    return bytes(data)


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"])
def test_open_image_too_large_header_raises(format_name, recwarn):
    with pytest.raises(UnreadableImage, match="more than 178 million pixels"):
        open_image(file_claiming_large_size(format_name))
    assert not [
        str(warning.message) for warning in recwarn.list if "DecompressionBomb" in str(warning.category)
    ]


def test_read_header_limit_is_independent_of_pillow(monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert read_header(encoded(Image.new("RGB", (300, 200)), "PNG")).width == 300
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(UnreadableImage, match="20000x20000 pixels are more than 178 million"):
        read_header(bomb(20_000, 20_000))
    assert not recwarn.list


def test_read_header_image_at_max_pixels_is_accepted(monkeypatch):
    assert MAX_PIXELS > 151_000_000, "a camera of 150 megapixels"
    monkeypatch.setattr(image_decoding, "MAX_PIXELS", 300 * 200)
    assert read_header(encoded(Image.new("RGB", (300, 200)), "JPEG")).height == 200
    with pytest.raises(UnreadableImage, match="300x201"):
        read_header(encoded(Image.new("RGB", (300, 201)), "JPEG"))


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_read_header_open_file_equals_bytes(format_name, photograph):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if format_name in ("PNG", "JPEG", "WEBP") else {}
    data = encoded(photograph, format_name, **options)
    assert read_header(io.BytesIO(data)) == read_header(data)
    for broken in (data[: len(data) // 2], data[:6], b"", b"a text of some length, and no image"):
        reasons = []
        for source in (broken, io.BytesIO(broken)):
            with pytest.raises(UnreadableImage) as raised:
                read_header(source)
            reasons.append(raised.value.reason)
        assert reasons[0] == reasons[1]
