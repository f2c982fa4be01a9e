"""Tests of the file reader: consistent results for files that change, are replaced or vanish while they are read."""

import hashlib
import os
import struct
import tracemalloc
import zlib

import pytest

from sdxl_pipeline.data.scan import image_reader
from sdxl_pipeline.data.scan.dataset_scan import scan_dataset
from sdxl_pipeline.data.scan.image_reader import read_image, read_text
from tests.support.photographs import encoded


def test_read_image_in_chunks_equals_small_read(folder, photograph, monkeypatch):
    exif = photograph.getexif()
    exif[0x0112] = 6
    for format_name in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        data = encoded(photograph, format_name, **({} if format_name in ("BMP", "GIF") else {"exif": exif}))
        for name, content in (
            ("whole", data),
            ("cut", data[: len(data) // 2]),
            ("text", b"no image"),
            ("empty", b""),
        ):
            (folder / name).write_bytes(content)
            expected = read_image(str(folder / name))
            monkeypatch.setattr(image_reader, "LARGE_FILE_BYTES", 0)
            read = read_image(str(folder / name))
            monkeypatch.undo()
            assert read == expected
        assert read_image(str(folder / "whole")).width == (320 if format_name in ("BMP", "GIF") else 200)


def png_with(data: bytes, kind: bytes, content: bytes, after_the_pixels: bool) -> bytes:
    """Return a PNG with one more chunk, after its header or before its end."""
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    offset = len(data) - 12 if after_the_pixels else 33
    return data[:offset] + chunk + data[offset:]


@pytest.mark.parametrize("after_the_pixels", [False, True])
def test_read_image_png_orientation_in_any_chunk_is_applied(folder, photograph, after_the_pixels):
    exif = photograph.getexif()
    exif[0x0112] = 6
    raw = exif.tobytes().removeprefix(b"Exif\0\0")
    profile = b"\nexif\n%8d\n" % (len(raw) + 6) + (b"Exif\0\0" + raw).hex().encode()
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    plain = encoded(photograph, "PNG")
    turned = {
        b"eXIf": raw,
        b"zTXt": b"Raw profile type exif\0\0" + zlib.compress(profile),
        b"iTXt": b"XML:com.adobe.xmp\0\0\0\0\0" + xmp,
    }
    for kind, content in turned.items():
        (folder / "a.png").write_bytes(png_with(plain, kind, content, after_the_pixels))
        read = read_image(str(folder / "a.png"))
        assert (read.width, read.height, read.unreadable) == (200, 320, ""), kind
    (folder / "a.png").write_bytes(png_with(plain, b"tEXt", b"Comment\0eXIf", after_the_pixels))
    assert read_image(str(folder / "a.png")).width == 320


def test_read_image_large_file_bounds_memory(folder, photograph):
    path = folder / "large.jpg"
    data = encoded(photograph, "JPEG")
    with path.open("wb") as file:
        file.write(data)
        file.truncate(image_reader.LARGE_FILE_BYTES * 4)  # a sparse file, which takes no disk space
    tracemalloc.start()
    read = read_image(str(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (read.width, read.height, read.unreadable) == (320, 200, "")
    assert read.size == image_reader.LARGE_FILE_BYTES * 4
    assert read.key == hashlib.sha256(data + bytes(image_reader.LARGE_FILE_BYTES * 4 - len(data))).hexdigest()
    assert peak < image_reader.LARGE_FILE_BYTES // 4


def change_while_reading(monkeypatch, count: int, change) -> None:
    """Call `change` while the header of a file is read, for the first `count` reads."""
    original, remaining = image_reader.read_header, [count]

    def read_header(data):
        if remaining[0] > 0:
            remaining[0] -= 1
            change()
        return original(data)

    monkeypatch.setattr(image_reader, "read_header", read_header)


def test_read_image_changed_while_reading_is_read_again(folder, photograph, monkeypatch):
    path, new_content = folder / "a.png", encoded(photograph.rotate(90, expand=True), "PNG")
    path.write_bytes(encoded(photograph, "PNG"))
    change_while_reading(monkeypatch, 1, lambda: path.write_bytes(new_content))
    read = read_image(str(path))
    assert (read.key, read.size, read.width) == (
        hashlib.sha256(new_content).hexdigest(),
        len(new_content),
        200,
    )


def test_read_image_replaced_while_reading_is_read_again(folder, photograph, monkeypatch):
    path, new_content = folder / "a.png", encoded(photograph.rotate(90, expand=True), "PNG")
    path.write_bytes(encoded(photograph, "PNG"))
    (folder / "b").write_bytes(new_content)
    change_while_reading(monkeypatch, 1, lambda: (folder / "b").replace(path))
    read = read_image(str(path))
    assert (read.key, read.inode) == (hashlib.sha256(new_content).hexdigest(), path.stat().st_ino)


def test_scan_dataset_constantly_changing_image_is_dropped(make_dataset, folder, photograph, monkeypatch):
    path = folder / "a.png"
    path.write_bytes(encoded(photograph, "PNG"))

    def append() -> None:
        with path.open("ab") as file:
            file.write(b"more")

    change_while_reading(monkeypatch, 99, append)
    scanned = scan_dataset(make_dataset(), folder)
    assert scanned[["path", "status", "reason", "key"]].values.tolist() == [
        ["a.png", "dropped", "changed while it was read", ""]
    ]


def test_scan_dataset_vanished_image_is_dropped(make_dataset, folder, photograph, monkeypatch):
    for number in range(40):
        (folder / f"{number:02d}.png").write_bytes(encoded(photograph.rotate(number), "PNG"))
    change_while_reading(monkeypatch, 1, lambda: (folder / "39.png").unlink())
    scanned = scan_dataset(make_dataset(), folder).set_index("path")
    assert scanned.loc["39.png", "reason"] == "vanished during the scan"
    assert (scanned["status"] == "kept").sum() == 39


def test_scan_dataset_vanished_folder_drops_files(make_dataset, folder, photograph, monkeypatch):
    for number in range(40):
        (folder / f"{number:02d}.png").write_bytes(encoded(photograph.rotate(number), "PNG"))
    moved = folder.parent / "moved"
    change_while_reading(monkeypatch, 1, lambda: folder.rename(moved))
    scanned = scan_dataset(make_dataset(), folder)
    assert len(scanned) == 40
    assert (scanned["reason"] == "vanished during the scan").sum() > 0
    assert set(scanned["reason"]) <= {"", "vanished during the scan"}


def test_read_text_replaced_while_reading_returns_new_content(folder, monkeypatch):
    path = folder / "a.txt"
    path.write_text("before")
    original, replaced = os.fstat, []

    def fstat(descriptor):
        info = original(descriptor)
        if not replaced:
            replaced.append(True)
            (folder / "b").write_text("afterwards")
            (folder / "b").replace(path)
        return info

    monkeypatch.setattr(image_reader.os, "fstat", fstat)
    assert read_text(str(path)).text == "afterwards"


@pytest.mark.parametrize("data", [b"", b"x" * 10])
def test_read_text_returns_file_identity(folder, data):
    path = folder / "a.txt"
    path.write_bytes(data)
    read, info = read_text(str(path)), path.stat()
    assert (read.size, read.mtime_ns, read.inode) == (len(data), info.st_mtime_ns, info.st_ino)
