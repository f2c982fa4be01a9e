"""Files that are sound and unusual give the right pixels, and no file ends the work on the others, whatever its decoder raises."""

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
from sdxl_pipeline.data.decoding.colour import split_alpha, to_eight_bits, to_srgb
from sdxl_pipeline.data.decoding.image_decoding import DAMAGED, UnreadableImage, read_header
from sdxl_pipeline.data.decoding.pixels import load_crop, load_upright
from sdxl_pipeline.data.masks.mask_pairs import mask_crop, overlaid
from sdxl_pipeline.data.quality.contact_sheets import contact_sheet
from sdxl_pipeline.data.quality.perceptual_hash import compute_hashes
from sdxl_pipeline.data.scan import image_reader
from sdxl_pipeline.data.scan.dataset_scan import scan_dataset
from tests.data.decoding.test_pixels import whole
from tests.data.odd_files import png, premultiplied_grey_tiff, tiff, twelve_bit_tiff
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
    """As decoders in Rust raise it."""

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


def rows(frame: pd.DataFrame) -> dict[str, str]:
    return dict(zip(frame["path"], frame["reason"], strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow_becomes_eight_bits(mode):
    image = Image.new(mode, (3, 2))
    flat = to_eight_bits(image)
    assert to_srgb(flat, None).mode == "RGB"
    assert split_alpha(image)[0].size == (3, 2)


def test_grey_with_premultiplied_alpha_is_scanned_hashed_and_encoded(
    make_dataset, folder, tmp_path, photograph
):
    grey = np.asarray(photograph.convert("L"))
    alpha = np.asarray(Image.linear_gradient("L").resize((320, 200)))
    path = folder / "associated.tif"
    path.write_bytes(premultiplied_grey_tiff(grey, alpha))
    with Image.open(path) as image:
        assert image.mode == "La"
    looked = compute_hashes(folder, scan_dataset(make_dataset(), folder), tmp_path / "looks.parquet")
    assert rows(looked) == {"associated.tif": ""}
    expected = grey.astype(float) * (alpha / 255) + 255 - alpha
    assert np.abs(load_crop(path, whole(200, 320))[:, :, 1] - expected).max() <= 2
    assert contact_sheet([path], ["a caption"]).size[0] > 0
    assert mask_crop(path, whole(200, 320), "mask").max() <= 1


@pytest.mark.parametrize(
    ("depth", "row", "key"),
    [(1, b"\x40", 1), (2, b"\x1b", 1), (4, b"\x5a", 5), (8, b"\x05\x50", 5), (16, b"\x01\x2c\xff\xff", 300)],
)
def test_the_transparent_value_of_a_grey_png_is_transparent(folder, depth, row, key):
    width = max(1, len(row) * 8 // depth)
    data = png([row], width, depth, colour_type=0, tRNS=struct.pack(">H", key))
    path = folder / "keyed.png"
    path.write_bytes(data)
    stored = int.from_bytes(row, "big")
    samples = [stored >> (len(row) * 8 - depth * (n + 1)) & (1 << depth) - 1 for n in range(width)]
    assert key in samples
    largest = (1 << depth) - 1
    shown = [255 if value == key else round(value * 255 / largest) for value in samples]
    assert np.asarray(load_upright(path))[0, :, 0].tolist() == shown
    with image_decoding.open_image(data) as image:
        image_decoding.decode(image)
        alpha = split_alpha(image)[1]
    assert alpha is not None
    assert np.asarray(alpha)[0].tolist() == [0 if value == key else 255 for value in samples]


def test_the_transparent_colour_of_a_16_bit_png_is_white(folder):
    row = struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0x9ABC, 0x5678, 0x1234)
    path = folder / "keyed.png"
    path.write_bytes(png([row], 2, 16, colour_type=2, tRNS=struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)))
    assert np.asarray(load_upright(path)).tolist() == [[[255] * 3, [0x9A, 0x56, 0x12]]]


def test_the_hash_of_a_keyed_grey_png_is_that_of_the_image_over_white(make_dataset, folder, tmp_path):
    grey = np.full((400, 400), 90, np.uint8)
    grey[100:200, 50:350] = 3
    keyed = [bytes(row) for row in grey]
    (folder / "keyed.png").write_bytes(png(keyed, 400, 8, 0, tRNS=struct.pack(">H", 3)))
    grey[grey == 3] = 255
    (folder / "white.png").write_bytes(encoded(Image.fromarray(grey), "PNG"))
    looked = compute_hashes(folder, scan_dataset(make_dataset(), folder), tmp_path / "looks.parquet")
    assert looked["phash"].nunique() == 1


def test_twelve_bits_are_scaled_by_their_own_range(folder):
    deep = np.array([[0, 1024, 2048, 4095]])
    path = folder / "scanner.tif"
    path.write_bytes(twelve_bit_tiff(deep))
    assert load_crop(path, whole(1, 4))[0, :, 0].tolist() == [0, 64, 128, 255]
    turned = folder / "turned.tif"
    turned.write_bytes(twelve_bit_tiff(deep, t274=3))
    assert load_crop(turned, whole(1, 4))[0, :, 0].tolist() == [255, 128, 64, 0]


def test_a_tiff_of_an_unsupported_depth_is_not_called_damaged():
    with pytest.raises(UnreadableImage, match="unsupported kind of TIFF: unknown pixel mode"):
        read_header(tiff(bytes(10), 4, 2, bits=10))


def test_a_compression_that_is_not_known_is_not_called_damaged():
    with pytest.raises(UnreadableImage, match=r"unsupported kind of TIFF: .*34887"):
        read_header(tiff(bytes(8), 4, 2, bits=8, t259=34887))


def test_pixels_that_are_nan_are_reported(make_dataset, folder, photograph):
    measured = np.asarray(photograph.convert("F")).copy()
    (folder / "sound.tif").write_bytes(encoded(Image.fromarray(measured), "TIFF"))
    measured[5, 7] = np.nan
    (folder / "holes.tif").write_bytes(encoded(Image.fromarray(measured), "TIFF"))
    assert rows(scan_dataset(make_dataset(), folder)) == {
        "holes.tif": "some of its pixels are NaN or infinite",
        "sound.tif": "",
    }


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP", "XMP", "many"])
def test_a_png_with_megabytes_of_text_is_sound(make_dataset, folder, photograph, kind):
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
    assert rows(scan_dataset(make_dataset(), folder)) == {"workflow.png": ""}
    assert load_upright(folder / "workflow.png").size == (256, 4)


def test_text_beyond_the_limit_is_reported_as_that(monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1000)
    data = png([b"\0"], 1, 8, 0, zTXt=b"parameters\0\0" + zlib.compress(bytes(2000)))
    with pytest.raises(UnreadableImage, match="more than 100 MiB of text or profiles in a PNG"):
        read_header(data)


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_whatever_a_decoder_raises_the_other_files_go_on(
    make_dataset, folder, tmp_path, photograph, monkeypatch, failure
):
    """Every place where files of a dataset are decoded."""
    for name in ("a.png", "b.tif", "c.bmp"):
        (folder / name).write_bytes(encoded(photograph, {"p": "PNG", "t": "TIFF", "b": "BMP"}[name[2]]))
    sound = compute_hashes(folder, scan_dataset(make_dataset(), folder), tmp_path / "sound.parquet")
    assert set(sound["status"]) == {"kept"}

    def fail(*_):
        raise failure

    for plugin in (TiffImagePlugin.TiffImageFile, BmpImagePlugin.BmpImageFile):
        monkeypatch.setattr(plugin, "load", fail)
    said = type(failure).__name__
    text = " ".join(str(failure).split())
    scanned = scan_dataset(make_dataset(), folder)
    looked = compute_hashes(folder, sound, tmp_path / "looks.parquet")
    for found in (rows(scanned), rows(looked)):
        assert found.pop("a.png") == ""
        assert set(found) == {"b.tif", "c.bmp"}
        for reason in found.values():
            if isinstance(failure, MemoryError):
                assert reason == "not enough memory to decode it"
            elif isinstance(failure, ValueError):  # which decoders raise on purpose
                assert reason == DAMAGED
            else:
                assert reason == f"unexpected error while decoding it: {said}: {text}".rstrip(": ")
    assert contact_sheet([folder / "a.png", folder / "b.tif"], ["", ""]).width > 0
    assert face_detection._search(folder / "b.tif", sound["key"][1]) is None
    for call in (
        lambda: load_upright(folder / "b.tif"),
        lambda: load_crop(folder / "b.tif", whole(200, 320)),
        lambda: mask_crop(folder / "b.tif", whole(200, 320), "mask"),
        lambda: overlaid(folder / "a.png", folder / "b.tif", "mask"),
    ):
        with pytest.raises(UnreadableImage):
            call()
    row = pd.DataFrame([vars(whole(200, 320)) | {"path": "b.tif", "key": sound["key"][1]}])
    (reason,) = latent_encoding._load(folder, list(row.itertuples(index=False)), {})
    assert isinstance(reason, str)
    # a failure of the program or the machine is not remembered as the content's
    monkeypatch.undo()
    again = compute_hashes(folder, sound, tmp_path / "looks.parquet")
    assert isinstance(failure, ValueError) or set(again["status"]) == {"kept"}


@pytest.mark.parametrize("where", ["hash", "text"])
def test_a_failure_beside_the_decoder_is_the_files_own_too(
    make_dataset, folder, photograph, monkeypatch, where, caplog
):
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(encoded(photograph, "PNG"))
        (folder / f"{name}.txt").write_text(f"caption {name}")
    function, call = ("_read_whole", 0) if where == "hash" else ("decode_text", 1)
    genuine = getattr(image_reader, function)
    calls: list[bytes] = []

    def fail(data: bytes):
        calls.append(data)
        if len(calls) == 1:
            raise RuntimeError("no more handles")
        return genuine(data)

    monkeypatch.setattr(image_reader, function, fail)
    scanned = scan_dataset(make_dataset(caption_strategy="textfile"), folder)
    reasons = sorted(rows(scanned).values())
    assert reasons[0] == ""
    assert (
        reasons[1]
        == [
            "unexpected error while decoding it: RuntimeError: no more handles",
            "caption file cannot be read",
        ][call]
    )
    if where == "text":
        assert re.search(r"[ab]\.txt: .*RuntimeError: no more handles", caplog.text)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_stops_the_program_passes(folder, photograph, monkeypatch, stop):
    (folder / "a.bmp").write_bytes(encoded(photograph, "BMP"))

    def interrupted(*_):
        raise stop

    monkeypatch.setattr(BmpImagePlugin.BmpImageFile, "load", interrupted)
    with pytest.raises(stop):
        load_upright(folder / "a.bmp")


def test_the_scan_shares_the_memory_budget_of_perceptual_hashing(
    make_dataset, folder, tmp_path, photograph, monkeypatch
):
    """One image fits at a time, so no two of the threads decode at once."""
    for number in range(8):
        (folder / f"{number}.tif").write_bytes(encoded(photograph.rotate(number), "TIFF"))
    monkeypatch.setattr(memory_budget, "PIXELS", memory_budget.Budget(320 * 200 * 12))
    genuine, running, most = TiffImagePlugin.TiffImageFile.load, [], []
    lock = threading.Lock()

    def counted(image):
        with lock:
            running.append(image)
            most.append(len({id(other) for other in running}))
        try:
            threading.Event().wait(0.01)
            return genuine(image)
        finally:
            with lock:
                running.remove(image)

    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "load", counted)
    scanned = scan_dataset(make_dataset(), folder)
    assert set(compute_hashes(folder, scanned, tmp_path / "looks.parquet")["status"]) == {"kept"}
    assert len(most) >= 16
    assert max(most) == 1


@pytest.mark.parametrize(
    ("compression", "mode", "codes", "reported"),
    [
        ("tiff_lzw", "RGB", b"\xff", "Using code not yet in table"),
        ("group4", "1", b"\x55", "Fax4Decode: Bad code word at line"),
    ],
)
def test_what_libtiff_prints_is_part_of_the_reason_and_stderr_is_quiet(
    folder, photograph, compression, mode, codes, reported
):
    """It prints past Python, without the file's name; the bad codes of a fax do not even reach Pillow."""
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

    alone = "from PIL import Image\ntry: Image.open(path).load()\nexcept OSError: pass"
    assert reported.rpartition(": ")[2] in stderr_of(alone)
    assert stderr_of("from sdxl_pipeline.data.scan.image_reader import read_image; read_image(path)") == ""
    with pytest.raises(UnreadableImage, match=f"corrupt image .*{reported}"):
        read_header(bytes(data))
    path.write_bytes(encoded(photograph.convert(mode), "TIFF", compression=compression))
    assert read_header(path.read_bytes()).format == "TIFF"


def test_a_bitmap_of_an_unsupported_depth_is_not_called_damaged(photograph):
    bmp = bytearray(encoded(photograph, "BMP"))
    bmp[28] = 5
    with pytest.raises(UnreadableImage, match=r"unsupported kind of BMP: Unsupported BMP pixel depth \(5\)"):
        read_header(bytes(bmp))
