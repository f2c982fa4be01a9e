"""Tests of the scan: every file of a folder is one row, kept with its properties or dropped with a reason."""

import hashlib
import os
import shutil
import struct
import sys
import zlib
from collections import Counter

import pandas as pd
import pytest
from PIL import Image

from sdxl_pipeline.data.buckets.crop_plan import plan_crops
from sdxl_pipeline.data.decoding.image_decoding import UnreadableImage, read_header
from sdxl_pipeline.data.scan.dataset_fingerprint import dataset_digest, rows_digest
from sdxl_pipeline.data.scan.dataset_scan import SCAN_COLUMNS, DatasetFolderError, scan_dataset
from tests.support.photographs import PHOTOGRAPHS, encoded

ORIENTATION = 0x0112


def reasons(scanned: pd.DataFrame) -> dict[str, str]:
    dropped = scanned[scanned["status"] == "dropped"]
    return dict(zip(dropped["path"], dropped["reason"], strict=True))


def kept_paths(scanned: pd.DataFrame) -> list[str]:
    return scanned.loc[scanned["status"] == "kept", "path"].tolist()


@pytest.mark.real
def test_scan_dataset_mixed_folder_keeps_or_drops_every_file(make_dataset, folder, photograph):
    photograph_names = [
        "astronaut.png",
        "coffee.png",
        "chelsea.png",
        "rocket.jpg",
        "hubble_deep_field.jpg",
        "retina.jpg",
    ]
    photograph_names += ["camera.png", "no_time_for_that_tiny.gif", "multipage.tif"]
    for name in photograph_names:
        shutil.copy(PHOTOGRAPHS / name, folder / name)
    (folder / "deep" / "er").mkdir(parents=True)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    good = {
        "deep/er/turned.JPG": encoded(photograph, "JPEG", exif=exif),
        "deep/er/with alpha 🦊.png": encoded(photograph.convert("RGBA"), "PNG"),
        "inks.jpeg": encoded(photograph.convert("CMYK"), "JPEG"),
        "two\nlines.webp": encoded(photograph, "WEBP"),
        "windows.bmp": encoded(photograph, "BMP"),
        "really_a_png.jpg": encoded(photograph, "PNG"),
    }
    jpeg = encoded(photograph, "JPEG")
    bad = {
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "text.jpg": (b"this is no image", "content is not an image"),
        "empty.png": (b"", "empty file"),
        "odd.tif": (
            (PHOTOGRAPHS / "multipage_rgb.tif").read_bytes(),
            "unsupported kind of TIFF: unknown pixel mode",
        ),
        "phone.heic": (b"\0\0\0\x18ftypheic", "truncated"),
        "notes.md": (b"# notes", "not an image"),
        "no_extension": (jpeg, "not an image"),
        "orphan.txt": (b"a caption of nothing", "caption without image"),
        ".hidden.jpg": (jpeg, "hidden file"),
        "._rocket.jpg": (b"\0\5\x16\7", "hidden file"),
        ".thumbnails/rocket.jpg": (jpeg, "hidden file"),
    }
    (folder / ".thumbnails").mkdir()
    for name, data in (good | {name: data for name, (data, _) in bad.items()}).items():
        (folder / name).write_bytes(data)
    os.mkfifo(folder / "pipe.png")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "itself.png").symlink_to(folder / "itself.png")
    for name in [*photograph_names, *good, "cut.jpg"]:
        (folder / name).with_suffix(".txt").write_text(f"about {name.split('.')[0]}")

    scanned = scan_dataset(make_dataset(caption_strategy="textfile"), folder)

    assert tuple(scanned.columns) == SCAN_COLUMNS
    assert scanned["path"].tolist() == sorted(scanned["path"])
    assert set(kept_paths(scanned)) == {*photograph_names, *good}
    assert reasons(scanned) == {name: reason for name, (_, reason) in bad.items()} | {
        "pipe.png": "not a regular file",
        "gone.png": "broken link",
        "itself.png": "broken link",
    }
    # every file of the folder is a row except for caption files of images
    present = {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    captions = present - set(scanned["path"])
    assert len(captions) == len(photograph_names) + len(good) + 1
    assert {name.rsplit(".", 1)[1] for name in captions} == {"txt"}
    assert len(scanned) == len(kept_paths(scanned)) + len(reasons(scanned)) == len(present) - len(captions)

    by_path = scanned.set_index("path")
    assert by_path.loc["astronaut.png", ["height", "width", "format"]].tolist() == [512, 512, "PNG"]
    assert by_path.loc["rocket.jpg", ["height", "width", "format"]].tolist() == [427, 640, "JPEG"]
    assert by_path.loc["deep/er/turned.JPG", ["height", "width"]].tolist() == [320, 200]
    assert by_path.loc["really_a_png.jpg", "format"] == "PNG"
    assert by_path.loc["two\nlines.webp", "captions"] == ["about two", "lines"]
    for name in [*photograph_names, "inks.jpeg"]:
        data = (folder / name).read_bytes()
        assert by_path.loc[name, "key"] == hashlib.sha256(data).hexdigest()
        assert by_path.loc[name, "size"] == len(data)
        assert by_path.loc[name, "captions"] == [f"about {name.split('.')[0]}"]


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_read_header_truncated_file_raises(photograph, format_name):
    data = encoded(photograph, format_name)
    assert read_header(data).format == format_name
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(UnreadableImage) as raised:
            read_header(data[: int(len(data) * share)])
        assert raised.value.reason == "truncated"


@pytest.mark.filterwarnings("ignore:::PIL")
def test_read_header_truncated_tiff_raises(photograph):
    data = encoded(photograph, "TIFF", compression="tiff_lzw")
    assert read_header(data).format == "TIFF"
    with pytest.raises(UnreadableImage, match="truncated"):
        read_header(data[: len(data) // 2])


def test_read_header_end_marker_of_thumbnail_is_ignored(photograph):
    thumbnail = encoded(photograph.resize((32, 20)), "JPEG")
    data = encoded(photograph, "JPEG", exif=b"Exif\0\0" + thumbnail)
    assert b"\xff\xd9" in data[:4000]
    assert read_header(data).width == 320
    with pytest.raises(UnreadableImage, match="truncated"):
        read_header(data[:-200])


def test_read_header_trailing_bytes_are_ignored(photograph):
    for format_name in ("PNG", "JPEG", "WEBP", "GIF"):
        assert read_header(encoded(photograph, format_name) + b"\0trailing bytes of some camera").width == 320


def test_scan_dataset_decompression_bomb_is_dropped(make_dataset, folder, recwarn):
    def png(width: int, height: int) -> bytes:
        header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        parts = [header, b"IDAT" + zlib.compress(b""), b"IEND"]
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts
        )

    (folder / "large.png").write_bytes(png(12_000, 12_000))
    (folder / "bomb.png").write_bytes(png(100_000, 100_000))
    scanned = scan_dataset(make_dataset(), folder)
    large = scanned[scanned["path"] == "large.png"].iloc[0]
    assert (large["status"], large["width"], large["height"]) == ("kept", 12_000, 12_000)
    assert list(reasons(scanned)) == ["bomb.png"]
    assert "100000x100000 pixels are more than 178 million" in reasons(scanned)["bomb.png"]
    assert not recwarn.list


def test_scan_dataset_links_are_followed_once(make_dataset, folder, tmp_path, photograph):
    data = encoded(photograph, "PNG")
    elsewhere = tmp_path / "elsewhere"
    for where in (folder / "real", elsewhere / "inner"):
        where.mkdir(parents=True)
        (where / "a.png").write_bytes(data)
    (folder / "also_real").symlink_to(folder / "real")  # sorts first, but the real path takes precedence
    (folder / "outside").symlink_to(elsewhere)
    (folder / "real" / "up").symlink_to(folder)
    (elsewhere / "inner" / "around").symlink_to(elsewhere)
    (folder / "linked.png").symlink_to(elsewhere / "inner" / "a.png")
    scanned = scan_dataset(make_dataset(), folder)
    assert kept_paths(scanned) == ["linked.png", "outside/inner/a.png", "real/a.png"]
    assert reasons(scanned) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems reject such names")
def test_scan_dataset_undecodable_file_name_is_dropped(make_dataset, folder, photograph):
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(encoded(photograph, "PNG"))
    scanned = scan_dataset(make_dataset(), folder)
    assert reasons(scanned) == {"caf\\xe9.png": "file name is not UTF-8"}
    scanned.to_parquet(folder.parent / "scan.parquet")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that can be opened but not read")
def test_scan_dataset_unreadable_file_is_dropped(make_dataset, folder, photograph):
    (folder / "a.png").symlink_to("/proc/self/mem")
    (folder / "b.png").write_bytes(encoded(photograph, "PNG"))
    scanned = scan_dataset(make_dataset(), folder)
    assert kept_paths(scanned) == ["b.png"]
    assert reasons(scanned) == {"a.png": "cannot be read: Input/output error"}


def test_scan_dataset_caption_files_match_images(make_dataset, folder, photograph):
    for name in ("a.png", "a.webp", "b.png", "c.png", "d.png"):
        (folder / name).write_bytes(encoded(photograph, "PNG"))
    (folder / "a.txt").write_text("shared by two")
    (folder / "b.TXT").write_text("upper case")
    (folder / "c.TXT").write_text("not this one")
    (folder / "c.txt").write_text("this one")
    (folder / "orphan.txt").write_text("nobody's")
    scanned = scan_dataset(make_dataset(caption_strategy="textfile"), folder)
    kept = scanned[scanned["status"] == "kept"]
    assert dict(zip(kept["path"], kept["captions"], strict=True)) == {
        "a.png": ["shared by two"],
        "a.webp": ["shared by two"],
        "b.png": ["upper case"],
        "c.png": ["this one"],
    }
    assert reasons(scanned) == {
        "c.TXT": "caption file is not read beside one with the extension .txt",
        "d.png": "no caption file",
        "orphan.txt": "caption without image",
    }
    assert scanned.set_index("path").loc["d.png", "caption_status"] == "missing"
    emptied = scan_dataset(make_dataset(caption_strategy="textfile", missing_captions="empty"), folder)
    row = emptied.set_index("path").loc["d.png"]
    assert (row["status"], row["captions"], row["caption_status"]) == ("kept", [""], "missing")


def test_scan_dataset_unusable_folder_raises_with_hint(make_dataset, folder, tmp_path):
    with pytest.raises(
        DatasetFolderError, match=r"dataset 'photos'.*instance_data_dir.*is empty\. Add images"
    ):
        scan_dataset(make_dataset(), folder)
    with pytest.raises(DatasetFolderError, match=r"missing' does not exist\. Create the folder"):
        scan_dataset(make_dataset(), tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetFolderError, match=r"file' is a file\. Write the path of the folder"):
        scan_dataset(make_dataset(), tmp_path / "file")


def test_scan_dataset_progress_counts_images(make_dataset, folder, photograph):
    for number in range(5):
        (folder / f"{number}.png").write_bytes(encoded(photograph, "PNG"))
    (folder / "other.md").write_text("")
    progress: list[tuple[int, int]] = []
    scan_dataset(make_dataset(), folder, on_progress=lambda done, total: progress.append((done, total)))
    assert progress == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_scan_dataset_is_read_only_and_deterministic(make_dataset, folder, photograph):
    for number in range(12):
        (folder / f"{number}.png").write_bytes(encoded(photograph.rotate(number), "PNG"))
    before = sorted(folder.iterdir())
    first, second = scan_dataset(make_dataset(), folder), scan_dataset(make_dataset(), folder)
    pd.testing.assert_frame_equal(first, second)
    assert sorted(folder.iterdir()) == before


def test_digests_depend_on_content_only(make_dataset, folder, tmp_path, photograph):
    for number in range(4):
        (folder / f"{number}.png").write_bytes(encoded(photograph.rotate(number), "PNG"))
        (folder / f"{number}.txt").write_text(f"caption {number}\nanother")
    dataset = make_dataset(caption_strategy="textfile")

    def digests() -> tuple[str, str]:
        scanned = scan_dataset(dataset, folder)
        rows, _ = plan_crops(dataset, scanned, 0, (), is_eval=False)
        return dataset_digest(scanned), rows_digest(rows)

    first = digests()
    scanned = scan_dataset(dataset, folder)
    scanned.to_parquet(tmp_path / "scan.parquet")
    assert dataset_digest(pd.read_parquet(tmp_path / "scan.parquet")) == first[0]
    assert dataset_digest(scanned.iloc[::-1]) == first[0]

    copied = tmp_path / "copied"
    shutil.copytree(folder, copied, copy_function=shutil.copyfile)  # other times, another path
    assert (
        dataset_digest(
            scan_dataset(make_dataset(caption_strategy="textfile", instance_data_dir=copied), copied)
        )
        == first[0]
    )
    (folder / "stray.md").write_text("no image")
    assert digests() == first

    (folder / "0.txt").write_text("caption edited")
    edited = digests()
    assert edited[0] != first[0]
    assert edited[1] == first[1]  # no crop depends on a caption
    (folder / "1.png").write_bytes(encoded(photograph.rotate(90), "PNG"))
    assert edited[0] != digests()[0]
    assert edited[1] != digests()[1]


def test_scan_dataset_equal_problems_have_equal_reasons(make_dataset, folder):
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(b"")
        (folder / f"{number}.doc").write_bytes(b"x")
    assert Counter(reasons(scan_dataset(make_dataset(), folder)).values()) == {
        "empty file": 3,
        "not an image": 3,
    }
