"""Unusual and corrupt image files, each with its expected outcome."""

import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from tests.corpus.profiles import ADOBE_GAMMA, ADOBE_RGB, DISPLAY_P3, profile, to_srgb
from tests.support.photographs import PHOTOGRAPHS, encoded

SIZE = (96, 64)  # width, height
NEIGHBOURS = ("00 first.png", "zz last.jpg")
EXIF_ORIENTATION = 0x0112
TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""Transposition of the stored image for each EXIF orientation, which the decoder reverts."""


@dataclass(frozen=True)
class Kept:
    """The expected entry: upright sRGB pixels and a caption."""

    image: Image.Image
    caption: str
    tolerance: float = 1.5
    """Largest mean difference that the file format causes."""
    planned: bool = True
    """Whether the crop plan with `crop_aspect: preserve` has a crop of it."""


@dataclass(frozen=True)
class Case:
    """Files of one kind, and the outcome of each: an entry, or the reason why it is dropped."""

    name: str
    write: Callable[[Path], None]
    outcomes: dict[str, Kept | str]


def caption_of(name: str) -> str:
    """Return a caption unique to the file, so that a wrong pairing is detected."""
    return f"the image {zlib.crc32(os.fsencode(name)):08x}"


def write_image(folder: Path, name: str, data: bytes) -> None:
    """Write a file and its caption."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.with_suffix(".txt").write_text(caption_of(name))


@cache
def photograph(name: str = "astronaut", size: tuple[int, int] = SIZE) -> Image.Image:
    """Return a photograph without any symmetry."""
    with Image.open(PHOTOGRAPHS / f"{name}.png") as image:
        return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def write_neighbours(folder: Path) -> dict[str, Kept]:
    """Write two valid images, sorted before and after all others, and return their outcomes."""
    first, last = photograph("chelsea"), photograph("coffee", (64, 96))
    write_image(folder, NEIGHBOURS[0], encoded(first, "PNG"))
    write_image(folder, NEIGHBOURS[1], encoded(last, "JPEG", quality=95, subsampling=0))
    return {
        NEIGHBOURS[0]: Kept(first, caption_of(NEIGHBOURS[0])),
        NEIGHBOURS[1]: Kept(last, caption_of(NEIGHBOURS[1]), 3),
    }


def valid(
    name: str, data: bytes, image: Image.Image | None = None, tolerance: float = 1.5, file: str = ""
) -> Case:
    """Return the case of a file that must be kept as `image`."""
    file = file or f"{name}.png"
    outcome = Kept(image or photograph(), caption_of(file), tolerance)
    return Case(name, lambda folder: write_image(folder, file, data), {file: outcome})


def dropped(name: str, data: bytes, reason: str, file: str = "") -> Case:
    """Return the case of a file that must be dropped for `reason`."""
    file = file or f"{name}.png"
    return Case(name, lambda folder: write_image(folder, file, data), {file: reason})


def cases() -> list[Case]:
    """Return all cases; no two write files of the same name."""
    return [
        *_truncated(),
        *_contents(),
        *_pixel_types(),
        *_colours(),
        *_rotated(),
        *_extents(),
        *_names(),
        *_special_files(),
    ]


def _truncated() -> Iterator[Case]:
    large = photograph(size=(192, 128))
    files = {
        "png": encoded(large, "PNG"),
        "jpg": encoded(large, "JPEG", quality=90),
        "progressive.jpg": encoded(large, "JPEG", quality=90, progressive=True),
    }
    for suffix, data in files.items():
        for tenth in range(1, 10):
            end = len(data) * tenth // 10
            yield dropped(f"cut at {tenth}0 % of {suffix}", data[:end], "truncated", f"cut {tenth}.{suffix}")
    hole = bytearray(files["jpg"])
    hole[len(hole) // 2 :][:512] = bytes(512)
    middle = len(hole) // 2
    hole[middle : middle + 512] = bytes(512)
    yield dropped("a hole in a JPEG", bytes(hole), "corrupt image", "hole.jpg")
    flipped = bytearray(files["png"])
    flipped[len(flipped) // 2] ^= 1
    yield dropped("a flipped bit in a PNG", bytes(flipped), "corrupt image", "flipped.png")


def _contents() -> Iterator[Case]:
    image = photograph()
    yield valid("a PNG with the extension of a JPEG", encoded(image, "PNG"), file="is png.jpg")
    yield valid(
        "a JPEG with the extension of a PNG",
        encoded(image, "JPEG", quality=95, subsampling=0),
        tolerance=3,
        file="is jpeg.png",
    )
    yield dropped(
        "text with the extension of an image", b"Dear diary,\n", "content is not an image", "diary.png"
    )
    yield dropped("an empty file", b"", "empty file", "nothing.jpg")
    yield dropped(
        "a web page", b"<!DOCTYPE html><title>404</title>", "content is not an image", "not found.jpg"
    )
    yield dropped("only a signature", b"\x89PNG\r\n\x1a\n", "truncated", "signature.png")
    yield dropped("another format", b"8BPS", "image format .psd is not supported", "layers.psd")
    yield dropped("another format's content", b"8BPS\0\1", "image format PSD is not supported", "layers.png")
    others = [image.transpose(Image.Transpose.ROTATE_180), Image.new("RGB", SIZE, "red")]
    gif = encoded(image, "GIF", save_all=True, append_images=others, duration=100, loop=0)
    yield valid("an animated GIF", gif, image.quantize(256).convert("RGB"), 4, "moving.gif")
    webp = encoded(image, "WEBP", save_all=True, append_images=others, duration=100, lossless=True)
    yield valid("an animated WebP", webp, file="moving too.webp")


def _pixel_types() -> Iterator[Case]:
    image = photograph()
    grey = image.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    yield valid("16 bits", encoded(deep, "PNG"), grey.convert("RGB"))
    yield valid("1 bit", encoded(image.convert("1"), "PNG"), image.convert("1").convert("RGB"))
    alpha = Image.linear_gradient("L").resize(SIZE)
    see_through = image.copy()
    see_through.putalpha(alpha)
    white = Image.new("RGB", SIZE, "white")
    yield valid("RGBA", encoded(see_through, "PNG"), Image.composite(image, white, alpha))
    grey_alpha = grey.copy()
    grey_alpha.putalpha(alpha)
    yield valid("LA", encoded(grey_alpha, "PNG"), Image.composite(grey.convert("RGB"), white, alpha))
    palette = image.quantize(255)
    opaque = np.asarray(palette) != 7
    keyed = Image.composite(palette.convert("RGB"), white, Image.fromarray(opaque))
    yield valid("P with transparency", encoded(palette, "PNG", transparency=7), keyed)


def _colours() -> Iterator[Case]:
    image = photograph()
    inks = image.convert("CMYK")
    yield valid("CMYK", encoded(inks, "JPEG", quality=95, subsampling=0), tolerance=4, file="CMYK.jpg")
    # TurboJPEG stores CMYK as YCCK; Adobe's marker means that the values are inverted
    inverted = np.ascontiguousarray(255 - np.asarray(inks))
    ycck = simplejpeg.encode_jpeg(inverted, quality=95, colorspace="CMYK", colorsubsampling="444")
    yield valid("YCCK", ycck, tolerance=4, file="YCCK.jpg")
    pixels = np.asarray(image)
    for name, primaries, gamma in (("Display P3", DISPLAY_P3, None), ("Adobe RGB", ADOBE_RGB, ADOBE_GAMMA)):
        expected = Image.fromarray(to_srgb(pixels, primaries, gamma))
        yield valid(name, encoded(image, "PNG", icc_profile=profile(primaries, gamma)), expected)
    jpeg = encoded(image, "JPEG", quality=95, subsampling=0, icc_profile=profile(DISPLAY_P3))
    yield valid("Display P3 in a JPEG", jpeg, Image.fromarray(to_srgb(pixels, DISPLAY_P3)), 3, "P3.jpg")


def _rotated() -> Iterator[Case]:
    image = photograph()
    for orientation, turn in TURNS.items():
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        stored = image if turn is None else image.transpose(turn)
        data = encoded(stored, "JPEG", quality=95, subsampling=0, exif=exif)
        yield valid(f"EXIF orientation {orientation}", data, tolerance=3, file=f"turned {orientation}.jpg")


def _extents() -> Iterator[Case]:
    colours = np.linspace(0, 255, 20_000).astype(np.uint8)
    line = np.stack([colours, colours[::-1], np.full(20_000, 90, np.uint8)], axis=1)
    for name, shape in (("20000 x 1", line[None]), ("1 x 20000", line[:, None])):
        image, file = Image.fromarray(shape), f"{name}.png"
        outcome = Kept(image, caption_of(file), planned=False)
        yield Case(name, partial(write_image, name=file, data=encoded(image, "PNG")), {file: outcome})
    yield valid(
        "one pixel", encoded(Image.new("RGB", (1, 1), "teal"), "PNG"), Image.new("RGB", (1, 1), "teal")
    )
    yield dropped(
        "a bomb",
        bomb(40_000, 40_000),
        "40000x40000 pixels are more than 178 million pixels, too large to decode safely (a decompression bomb?)",
        "bomb.png",
    )


def bomb(width: int, height: int) -> bytes:
    """Return a valid black PNG with 1 bit per pixel, compressed to few bytes."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    pixels = b"".join([packer.compress(row * 100) for _ in range(height // 100)] + [packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def _names() -> Iterator[Case]:
    names = {
        "spaces": "  two  spaces .png",
        "a newline": "first line\nsecond line.png",
        "emoji": "🦊 in the ❄️.png",
        "right to left": "תמונה של חתול.png",
        "right to left and back": "صورة cat قطة.png",
        "quotes": 'it\'s "quoted" & <b>bold</b> | $HOME; `ls`.png',
        "a percent sign and backslashes": "100%\\n C:\\x.png",
        "over 200 bytes": "é" * 110 + ".png",
        "the longest there can be": "x" * 251 + ".png",
        "several dots": "a.b..c.png.png",
        "an upper-case extension": "SHOUTED.PNG",
        "a deep folder": "/".join(f"folder {number}" for number in range(20)) + "/deep.png",
    }
    for number, (name, file) in enumerate(names.items()):
        image = photograph().rotate(10 * number)
        yield valid(f"a name with {name}", encoded(image, "PNG"), image, file=file)
    one, other = photograph(), photograph().transpose(Image.Transpose.FLIP_TOP_BOTTOM)

    def write_cases(folder: Path) -> None:
        write_image(folder, "case.png", encoded(one, "PNG"))
        write_image(folder, "CASE.png", encoded(other, "PNG"))

    yield Case(
        "names that differ in case only",
        write_cases,
        {"case.png": Kept(one, caption_of("case.png")), "CASE.png": Kept(other, caption_of("CASE.png"))},
    )

    def write_twins(folder: Path) -> None:
        write_image(folder, "twin.png", encoded(one, "PNG"))
        (folder / "twin.jpg").write_bytes(encoded(other, "JPEG", quality=95, subsampling=0))

    yield Case(
        "a.png beside a.jpg share their caption",
        write_twins,
        {"twin.png": Kept(one, caption_of("twin.png")), "twin.jpg": Kept(other, caption_of("twin.png"), 3)},
    )


def _special_files() -> Iterator[Case]:
    image = photograph().rotate(5)

    def write_links(folder: Path) -> None:
        target = folder.parent / f"{folder.name} elsewhere"
        target.mkdir(exist_ok=True)
        write_image(target, "linked to.png", encoded(image, "PNG"))
        (folder / "link.png").symlink_to(target / "linked to.png")
        (folder / "link.txt").symlink_to(target / "linked to.txt")
        (folder / "lost.png").symlink_to(target / "not there.png")
        (folder / "itself.png").symlink_to(folder / "itself.png")
        (folder / "around").symlink_to(folder)
        (folder / "there.png").symlink_to(folder / "and back.png")
        (folder / "and back.png").symlink_to(folder / "there.png")

    links: dict[str, Kept | str] = dict.fromkeys(
        ("lost.png", "itself.png", "there.png", "and back.png"), "broken link"
    )
    yield Case("links", write_links, links | {"link.png": Kept(image, caption_of("linked to.png"))})

    def write_pipe(folder: Path) -> None:
        os.mkfifo(folder / "pipe.png")
        os.mkfifo(folder / "pipe.txt")

    yield Case("pipes", write_pipe, {"pipe.png": "not a regular file", "pipe.txt": "not a regular file"})

    def write_folder(folder: Path) -> None:
        (folder / "folder.png").mkdir()
        write_image(folder / "folder.png", "inside.png", encoded(image.rotate(5), "PNG"))

    yield Case(
        "a folder with the extension of an image",
        write_folder,
        {"folder.png/inside.png": Kept(image.rotate(5), caption_of("inside.png"))},
    )

    def write_bytes_name(folder: Path) -> None:
        with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:  # noqa: PTH123 - a name that is no UTF-8
            file.write(encoded(image, "PNG"))

    yield Case("a name that is not UTF-8", write_bytes_name, {"caf\\xe9.png": "file name is not UTF-8"})

    def write_hidden(folder: Path) -> None:
        (folder / "._twin of a Mac.png").write_bytes(b"\0\5\x16\7")
        (folder / "Thumbs.db").write_bytes(b"\xd0\xcf")
        (folder / "alone.txt").write_text("whose am I?")

    yield Case(
        "files of operating systems",
        write_hidden,
        {
            "._twin of a Mac.png": "hidden file",
            "Thumbs.db": "not an image",
            "alone.txt": "caption without image",
        },
    )
