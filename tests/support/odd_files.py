"""Image files that Pillow cannot write, built from bytes."""

import struct
import zlib
from collections.abc import Sequence

import numpy as np


def png(rows: Sequence[bytes], width: int, depth: int, colour_type: int, **chunks: bytes) -> bytes:
    """Return a PNG of unfiltered rows, with further chunks before the pixels (`tRNS=...`)."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *((kind.encode(), body) for kind, body in chunks.items())]
    parts += [(b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )


def tiff(data: bytes, width: int, height: int, bits: int, samples: int = 1, **tags: int) -> bytes:
    """Return an uncompressed little-endian TIFF of one strip; `tags` are further ones of type SHORT, `t338=1`."""
    shorts = {256: width, 257: height, 259: 1, 262: 1 if samples < 3 else 2, 277: samples, 278: height}
    shorts |= {258: bits} | {int(name[1:]): value for name, value in tags.items()}
    entries = {tag: struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in shorts.items()}
    if samples > 1:  # two shorts fit into the entry itself
        entries[258] = struct.pack("<HHIHH", 258, 3, 2, bits, bits)
    entries[273] = struct.pack("<HHII", 273, 4, 1, 8)
    entries[279] = struct.pack("<HHII", 279, 4, 1, len(data))
    data += bytes(len(data) % 2)
    directory = struct.pack("<H", len(entries)) + b"".join(entries[tag] for tag in sorted(entries))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + bytes(4)


def premultiplied_grey_tiff(grey: np.ndarray, alpha: np.ndarray) -> bytes:
    """Return a TIFF of grey and associated alpha, 8 bits each (ExtraSamples 1): Pillow's mode La."""
    premultiplied = np.rint(grey.astype(float) * alpha / 255).astype(np.uint8)
    data = np.stack([premultiplied, alpha], axis=-1).tobytes()
    return tiff(data, grey.shape[1], grey.shape[0], bits=8, samples=2, t338=1)


def twelve_bit_tiff(values: np.ndarray, **tags: int) -> bytes:
    """Return a grey TIFF of 12 bits per sample; rows have an even number of pixels."""
    pairs = values.reshape(-1, 2).astype(np.uint32)
    packed = (pairs[:, 0] << 12) | pairs[:, 1]
    data = np.stack([packed >> 16, packed >> 8, packed], axis=1).astype(np.uint8).tobytes()
    return tiff(data, values.shape[1], values.shape[0], bits=12, **tags)


def tga(pixels: np.ndarray) -> bytes:
    """Return an uncompressed 24-bit Targa image of version 1, which has no signature."""
    height, width, _ = pixels.shape
    header = struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, width, height, 24, 0x20)
    return header + pixels[:, :, ::-1].tobytes()


def dib(pixels: np.ndarray) -> bytes:
    """Return a bitmap without the BMP file header, as in Windows resources."""
    height, width, _ = pixels.shape
    rows = [row[:, ::-1].tobytes() for row in pixels[::-1]]
    data = b"".join(row + bytes(-len(row) % 4) for row in rows)
    return struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, len(data), 0, 0, 0, 0) + data
