"""A file is read whole and once; one that changes meanwhile is read again, and never told as a mixture of two."""

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


def test_a_image_read_in_pieces_gives_what_it_gives_whole(folder, photograph, monkeypatch):
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
            monkeypatch.setattr(image_reader, "LARGE", 0)
            read = read_image(str(folder / name))
            monkeypatch.undo()
            assert read == expected
        assert read_image(str(folder / "whole")).width == (320 if format_name in ("BMP", "GIF") else 200)


def png_with(data: bytes, kind: bytes, content: bytes, after_the_pixels: bool) -> bytes:
    """A PNG with one more chunk, behind its header or before its end."""
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    at = len(data) - 12 if after_the_pixels else 33
    return data[:at] + chunk + data[at:]


@pytest.mark.parametrize("after_the_pixels", [False, True])
def test_a_png_is_upright_wherever_it_says_how_it_was_held(folder, photograph, after_the_pixels):
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


def test_a_large_file_is_not_held_in_memory(folder, photograph):
    path = folder / "large.jpg"
    data = encoded(photograph, "JPEG")
    with path.open("wb") as file:
        file.write(data)
        file.truncate(image_reader.LARGE * 4)  # a hole, which takes no disk
    tracemalloc.start()
    read = read_image(str(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (read.width, read.height, read.unreadable) == (320, 200, "")
    assert read.size == image_reader.LARGE * 4
    assert read.key == hashlib.sha256(data + bytes(image_reader.LARGE * 4 - len(data))).hexdigest()
    assert peak < image_reader.LARGE // 4


def changes(monkeypatch, times: int, change) -> None:
    """Let `change` happen to the file while its header is being read, on the first so many readings."""
    real, left = image_reader.read_header, [times]

    def read_header(data):
        if left[0] > 0:
            left[0] -= 1
            change()
        return real(data)

    monkeypatch.setattr(image_reader, "read_header", read_header)


def test_a_image_that_changes_while_it_is_read_is_read_again(folder, photograph, monkeypatch):
    path, later = folder / "a.png", encoded(photograph.rotate(90, expand=True), "PNG")
    path.write_bytes(encoded(photograph, "PNG"))
    changes(monkeypatch, 1, lambda: path.write_bytes(later))
    read = read_image(str(path))
    assert (read.key, read.size, read.width) == (hashlib.sha256(later).hexdigest(), len(later), 200)


def test_a_image_that_is_replaced_while_it_is_read_is_read_again(folder, photograph, monkeypatch):
    path, later = folder / "a.png", encoded(photograph.rotate(90, expand=True), "PNG")
    path.write_bytes(encoded(photograph, "PNG"))
    (folder / "b").write_bytes(later)
    changes(monkeypatch, 1, lambda: (folder / "b").replace(path))
    read = read_image(str(path))
    assert (read.key, read.inode) == (hashlib.sha256(later).hexdigest(), path.stat().st_ino)


def test_a_image_that_never_rests_is_named(make_dataset, folder, photograph, monkeypatch):
    path = folder / "a.png"
    path.write_bytes(encoded(photograph, "PNG"))

    def append() -> None:
        with path.open("ab") as file:
            file.write(b"more")

    changes(monkeypatch, 99, append)
    scanned = scan_dataset(make_dataset(), folder)
    assert scanned[["path", "status", "reason", "key"]].values.tolist() == [
        ["a.png", "dropped", "changed while it was read", ""]
    ]


def test_a_image_that_vanishes_is_named_and_its_neighbours_are_kept(
    make_dataset, folder, photograph, monkeypatch
):
    for number in range(40):
        (folder / f"{number:02d}.png").write_bytes(encoded(photograph.rotate(number), "PNG"))
    changes(monkeypatch, 1, lambda: (folder / "39.png").unlink())
    scanned = scan_dataset(make_dataset(), folder).set_index("path")
    assert scanned.loc["39.png", "reason"] == "vanished during the scan"
    assert (scanned["status"] == "kept").sum() == 39


def test_a_folder_that_vanishes_is_named_file_by_file(make_dataset, folder, photograph, monkeypatch):
    for number in range(40):
        (folder / f"{number:02d}.png").write_bytes(encoded(photograph.rotate(number), "PNG"))
    moved = folder.parent / "moved"
    changes(monkeypatch, 1, lambda: folder.rename(moved))
    scanned = scan_dataset(make_dataset(), folder)
    assert len(scanned) == 40
    assert (scanned["reason"] == "vanished during the scan").sum() > 0
    assert set(scanned["reason"]) <= {"", "vanished during the scan"}


def test_a_caption_that_is_replaced_while_it_is_read_is_the_later_one(folder, monkeypatch):
    path = folder / "a.txt"
    path.write_text("before")
    real, replaced = os.fstat, []

    def fstat(descriptor):
        info = real(descriptor)
        if not replaced:
            replaced.append(True)
            (folder / "b").write_text("afterwards")
            (folder / "b").replace(path)
        return info

    monkeypatch.setattr(image_reader.os, "fstat", fstat)
    assert read_text(str(path)).text == "afterwards"


@pytest.mark.parametrize("data", [b"", b"x" * 10])
def test_what_a_file_was_is_told_with_what_it_holds(folder, data):
    path = folder / "a.txt"
    path.write_bytes(data)
    read, info = read_text(str(path)), path.stat()
    assert (read.size, read.mtime_ns, read.inode) == (len(data), info.st_mtime_ns, info.st_ino)
