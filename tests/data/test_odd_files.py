"""Tests of unusual valid files, and of isolation: an error of a decoder affects only its own file."""

import os
import re
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import BmpImagePlugin, Image, PngImagePlugin, TiffImagePlugin

from sdxl_pipeline.cache.encode import latent_encoding
from sdxl_pipeline.data.buckets import face_detection
from sdxl_pipeline.data.decoding import image_decoding, memory_budget
from sdxl_pipeline.data.decoding.image_decoding import CORRUPT, UnreadableImage, read_header
from sdxl_pipeline.data.decoding.pixels import load_crop, load_upright, split_alpha, to_8_bit, to_srgb
from sdxl_pipeline.data.masks.mask_pairs import mask_crop, mask_overlay
from sdxl_pipeline.data.quality.contact_sheets import contact_sheet
from sdxl_pipeline.data.quality.perceptual_hash import compute_hashes
from sdxl_pipeline.data.scan import image_reader
from sdxl_pipeline.data.scan.dataset_scan import scan_dataset
from tests.support.crops import full_crop
from tests.support.odd_files import png, premultiplied_grey_tiff, tiff, twelve_bit_tiff
from tests.support.photographs import encoded

MODES = [
    "1",
    "L",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "LA",
    "PA",
    "RGBX",
    "RGBa",
    "La",
]
MODES += ["I;16", "I;16L", "I;16B"]


class PanicException(BaseException):
    """Exception of decoders written in Rust."""

    __module__ = "pyo3_runtime"


FAILURES = [
    AttributeError("no such attribute"),
    AssertionError(),
    MemoryError(),
    RecursionError("too deep"),
    StopIteration(3),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    NotImplementedError("not here"),
    Exception("two\nlines"),
    ExceptionGroup("several", [ValueError("one")]),
    PanicException("index out of bounds"),
]


def reasons_by_path(frame: pd.DataFrame) -> dict[str, str]:
    return dict(zip(frame["path"], frame["reason"], strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_to_8_bit_every_pillow_mode_converts_to_rgb(mode):
    image = Image.new(mode, (3, 2))
    flat = to_8_bit(image)
    assert to_srgb(flat, None).mode == "RGB"
    assert split_alpha(image)[0].size == (3, 2)


def test_premultiplied_grey_tiff_is_processed_by_all_stages(make_dataset, folder, tmp_path, photograph):
    grey = np.asarray(photograph.convert("L"))
    alpha = np.asarray(Image.linear_gradient("L").resize((320, 200)))
    path = folder / "associated.tif"
    path.write_bytes(premultiplied_grey_tiff(grey, alpha))
    with Image.open(path) as image:
        assert image.mode == "La"
    hashed = compute_hashes(folder, scan_dataset(make_dataset(), folder), tmp_path / "hashes.parquet")
    assert reasons_by_path(hashed) == {"associated.tif": ""}
    expected = grey.astype(float) * (alpha / 255) + 255 - alpha
    assert np.abs(load_crop(path, full_crop(200, 320))[:, :, 1] - expected).max() <= 2
    assert contact_sheet([path], ["a caption"]).size[0] > 0
    assert mask_crop(path, full_crop(200, 320), "mask").max() <= 1


@pytest.mark.parametrize(
    ("depth", "row", "key"),
    [(1, b"\x40", 1), (2, b"\x1b", 1), (4, b"\x5a", 5), (8, b"\x05\x50", 5), (16, b"\x01\x2c\xff\xff", 300)],
)
def test_load_upright_keyed_grey_png_is_transparent(folder, depth, row, key):
    width = max(1, len(row) * 8 // depth)
    data = png([row], width, depth, colour_type=0, tRNS=struct.pack(">H", key))
    path = folder / "keyed.png"
    path.write_bytes(data)
    stored = int.from_bytes(row, "big")
    samples = [stored >> (len(row) * 8 - depth * (n + 1)) & (1 << depth) - 1 for n in range(width)]
    assert key in samples
    largest = (1 << depth) - 1
    expected_values = [255 if value == key else round(value * 255 / largest) for value in samples]
    assert np.asarray(load_upright(path))[0, :, 0].tolist() == expected_values
    with image_decoding.open_image(data) as image:
        image_decoding.decode(image)
        alpha = split_alpha(image)[1]
    assert alpha is not None
    assert np.asarray(alpha)[0].tolist() == [0 if value == key else 255 for value in samples]


def test_load_upright_keyed_16_bit_png_is_white(folder):
    row = struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0x9ABC, 0x5678, 0x1234)
    path = folder / "keyed.png"
    path.write_bytes(png([row], 2, 16, colour_type=2, tRNS=struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)))
    assert np.asarray(load_upright(path)).tolist() == [[[255] * 3, [0x9A, 0x56, 0x12]]]


def test_compute_hashes_keyed_grey_png_equals_image_over_white(make_dataset, folder, tmp_path):
    grey = np.full((400, 400), 90, np.uint8)
    grey[100:200, 50:350] = 3
    keyed = [bytes(row) for row in grey]
    (folder / "keyed.png").write_bytes(png(keyed, 400, 8, 0, tRNS=struct.pack(">H", 3)))
    grey[grey == 3] = 255
    (folder / "white.png").write_bytes(encoded(Image.fromarray(grey), "PNG"))
    hashed = compute_hashes(folder, scan_dataset(make_dataset(), folder), tmp_path / "hashes.parquet")
    assert hashed["phash"].nunique() == 1


def test_load_crop_12_bit_tiff_is_scaled_by_its_range(folder):
    deep = np.array([[0, 1024, 2048, 4095]])
    path = folder / "scanner.tif"
    path.write_bytes(twelve_bit_tiff(deep))
    assert load_crop(path, full_crop(1, 4))[0, :, 0].tolist() == [0, 64, 128, 255]
    turned = folder / "turned.tif"
    turned.write_bytes(twelve_bit_tiff(deep, t274=3))
    assert load_crop(turned, full_crop(1, 4))[0, :, 0].tolist() == [255, 128, 64, 0]


def test_read_header_tiff_of_unsupported_depth_is_unsupported():
    with pytest.raises(UnreadableImage, match="unsupported kind of TIFF: unknown pixel mode"):
        read_header(tiff(bytes(10), 4, 2, bits=10))


def test_read_header_tiff_of_unknown_compression_is_unsupported():
    with pytest.raises(UnreadableImage, match=r"unsupported kind of TIFF: .*34887"):
        read_header(tiff(bytes(8), 4, 2, bits=8, t259=34887))


def test_scan_dataset_nan_pixels_are_dropped(make_dataset, folder, photograph):
    measured = np.asarray(photograph.convert("F")).copy()
    (folder / "valid.tif").write_bytes(encoded(Image.fromarray(measured), "TIFF"))
    measured[5, 7] = np.nan
    (folder / "holes.tif").write_bytes(encoded(Image.fromarray(measured), "TIFF"))
    assert reasons_by_path(scan_dataset(make_dataset(), folder)) == {
        "holes.tif": "some of its pixels are NaN or infinite",
        "valid.tif": "",
    }


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP", "XMP", "many"])
def test_scan_dataset_png_with_large_text_is_kept(make_dataset, folder, photograph, kind):
    text = zlib.compress(b"a caption and its settings " * 200_000)
    chunks = {
        "zTXt": {"zTXt": b"parameters\0\0" + text},
        "iTXt": {"iTXt": b"parameters\0\1\0\0\0" + text},
        "iCCP": {"iCCP": b"profile\0\0" + text},
        "XMP": {"iTXt": b"XML:com.adobe.xmp\0\1\0\0\0" + text},
        "many": {"zTXt": b"parameters\0\0" + text},
    }[kind]
    row = bytes(range(256))
    data = png([row] * 4, 256, 8, 0, **chunks)
    if kind == "many":  # 65 MiB of text, in chunks with 5 MiB each
        start = data.index(b"zTXt") - 4
        end = data.index(b"IDAT") - 4
        data = data[:start] + data[start:end] * 13 + data[end:]
    (folder / "workflow.png").write_bytes(data)
    assert reasons_by_path(scan_dataset(make_dataset(), folder)) == {"workflow.png": ""}
    assert load_upright(folder / "workflow.png").size == (256, 4)


def test_read_header_png_text_beyond_limit_raises(monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1000)
    data = png([b"\0"], 1, 8, 0, zTXt=b"parameters\0\0" + zlib.compress(bytes(2000)))
    with pytest.raises(UnreadableImage, match="more than 100 MiB of text or profiles in a PNG"):
        read_header(data)


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_decoder_error_affects_only_its_file(
    make_dataset, folder, tmp_path, photograph, monkeypatch, failure
):
    """Covers every function that decodes files of a dataset."""
    for name in ("a.png", "b.tif", "c.bmp"):
        (folder / name).write_bytes(encoded(photograph, {"p": "PNG", "t": "TIFF", "b": "BMP"}[name[2]]))
    valid = compute_hashes(folder, scan_dataset(make_dataset(), folder), tmp_path / "valid.parquet")
    assert set(valid["status"]) == {"kept"}

    def fail(*_):
        raise failure

    for plugin in (TiffImagePlugin.TiffImageFile, BmpImagePlugin.BmpImageFile):
        monkeypatch.setattr(plugin, "load", fail)
    type_name = type(failure).__name__
    text = " ".join(str(failure).split())
    scanned = scan_dataset(make_dataset(), folder)
    hashed = compute_hashes(folder, valid, tmp_path / "hashes.parquet")
    for found in (reasons_by_path(scanned), reasons_by_path(hashed)):
        assert found.pop("a.png") == ""
        assert set(found) == {"b.tif", "c.bmp"}
        for reason in found.values():
            if isinstance(failure, MemoryError):
                assert reason == "not enough memory to decode it"
            elif isinstance(failure, ValueError):  # raised deliberately by decoders
                assert reason == CORRUPT
            else:
                assert reason == f"unexpected error while decoding it: {type_name}: {text}".rstrip(": ")
    assert contact_sheet([folder / "a.png", folder / "b.tif"], ["", ""]).width > 0
    assert face_detection._search(folder / "b.tif", valid["key"][1]) is None
    for call in (
        lambda: load_upright(folder / "b.tif"),
        lambda: load_crop(folder / "b.tif", full_crop(200, 320)),
        lambda: mask_crop(folder / "b.tif", full_crop(200, 320), "mask"),
        lambda: mask_overlay(folder / "a.png", folder / "b.tif", "mask"),
    ):
        with pytest.raises(UnreadableImage):
            call()
    row = pd.DataFrame([vars(full_crop(200, 320)) | {"path": "b.tif", "key": valid["key"][1]}])
    (reason,) = latent_encoding._load(folder, list(row.itertuples(index=False)), {})
    assert isinstance(reason, str)
    # a failure of the program or the machine is not recorded for the content
    monkeypatch.undo()
    again = compute_hashes(folder, valid, tmp_path / "hashes.parquet")
    assert isinstance(failure, ValueError) or set(again["status"]) == {"kept"}


@pytest.mark.parametrize("where", ["hash", "text"])
def test_scan_dataset_error_outside_decoder_affects_only_its_file(
    make_dataset, folder, photograph, monkeypatch, where, caplog
):
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(encoded(photograph, "PNG"))
        (folder / f"{name}.txt").write_text(f"caption {name}")
    function, call = ("_read_small", 0) if where == "hash" else ("decode_text", 1)
    original = getattr(image_reader, function)
    calls: list[bytes] = []

    def fail(data: bytes):
        calls.append(data)
        if len(calls) == 1:
            raise RuntimeError("no more handles")
        return original(data)

    monkeypatch.setattr(image_reader, function, fail)
    scanned = scan_dataset(make_dataset(caption_strategy="textfile"), folder)
    sorted_reasons = sorted(reasons_by_path(scanned).values())
    assert sorted_reasons[0] == ""
    assert (
        sorted_reasons[1]
        == [
            "unexpected error while decoding it: RuntimeError: no more handles",
            "caption file cannot be read",
        ][call]
    )
    if where == "text":
        assert re.search(r"[ab]\.txt: .*RuntimeError: no more handles", caplog.text)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_load_upright_interrupts_propagate(folder, photograph, monkeypatch, interrupt):
    (folder / "a.bmp").write_bytes(encoded(photograph, "BMP"))

    def interrupted(*_):
        raise interrupt

    monkeypatch.setattr(BmpImagePlugin.BmpImageFile, "load", interrupted)
    with pytest.raises(interrupt):
        load_upright(folder / "a.bmp")


def test_scan_and_hashing_share_memory_budget(make_dataset, folder, tmp_path, photograph, monkeypatch):
    """Only one image fits into the budget, so the threads decode one at a time."""
    for number in range(8):
        (folder / f"{number}.tif").write_bytes(encoded(photograph.rotate(number), "TIFF"))
    monkeypatch.setattr(memory_budget, "PIXEL_BUDGET", memory_budget.MemoryBudget(320 * 200 * 12))
    original, running, concurrent = TiffImagePlugin.TiffImageFile.load, [], []
    lock = threading.Lock()

    def counted(image):
        with lock:
            running.append(image)
            concurrent.append(len({id(other) for other in running}))
        try:
            threading.Event().wait(0.01)
            return original(image)
        finally:
            with lock:
                running.remove(image)

    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "load", counted)
    scanned = scan_dataset(make_dataset(), folder)
    assert set(compute_hashes(folder, scanned, tmp_path / "hashes.parquet")["status"]) == {"kept"}
    assert len(concurrent) >= 16
    assert max(concurrent) == 1


@pytest.mark.parametrize(
    ("compression", "mode", "codes", "reported"),
    [
        ("tiff_lzw", "RGB", b"\xff", "Using code not yet in table"),
        ("group4", "1", b"\x55", "Fax4Decode: Bad code word at line"),
    ],
)
def test_read_header_libtiff_error_is_part_of_reason(folder, photograph, compression, mode, codes, reported):
    """libtiff prints to stderr without the file name, and Pillow does not report invalid fax codes."""
    data = bytearray(encoded(photograph.convert(mode), "TIFF", compression=compression))
    data[len(data) // 2 : len(data) // 2 + 40] = codes * 40
    path = folder / "bad codes.tif"
    path.write_bytes(data)

    def stderr_of(program: str) -> str:
        program = f"path = {str(path)!r}\n{program}"
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=True
        )
        return done.stderr

    without_capture = "from PIL import Image\ntry: Image.open(path).load()\nexcept OSError: pass"
    assert reported.rpartition(": ")[2] in stderr_of(without_capture)
    assert stderr_of("from sdxl_pipeline.data.scan.image_reader import read_image; read_image(path)") == ""
    with pytest.raises(UnreadableImage, match=f"corrupt image .*{reported}"):
        read_header(bytes(data))
    path.write_bytes(encoded(photograph.convert(mode), "TIFF", compression=compression))
    assert read_header(path.read_bytes()).format == "TIFF"


def test_read_header_bmp_of_unsupported_depth_is_unsupported(photograph):
    bmp = bytearray(encoded(photograph, "BMP"))
    bmp[28] = 5
    with pytest.raises(UnreadableImage, match=r"unsupported kind of BMP: Unsupported BMP pixel depth \(5\)"):
        read_header(bytes(bmp))
