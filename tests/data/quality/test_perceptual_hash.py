"""Tests of the integrity check and perceptual hashes: corrupt pixels, hash similarity, and reuse of results."""

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import imagehash
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms

from sdxl_pipeline.data.decoding import memory_budget
from sdxl_pipeline.data.quality import perceptual_hash
from sdxl_pipeline.data.quality.near_duplicates import MAX_COLOUR_DISTANCE
from sdxl_pipeline.data.quality.perceptual_hash import CHANGED_SINCE_SCAN, compute_hashes
from tests.support.photographs import PHOTOGRAPHS, encoded

HASH_LENGTH = 80  # hex digits


def scan(folder: Path) -> pd.DataFrame:
    """Return the required columns of a scan for every file of a folder."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return pd.DataFrame(
        {
            "path": [path.name for path in paths],
            "key": [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths],
            "status": "kept",
            "reason": "",
            "phash": "",
        }
    )


def hashes_or_reasons(folder: Path, table: Path) -> dict[str, str]:
    """Return the hash of each image by name, or the reason why it is dropped."""
    frame = compute_hashes(folder, scan(folder), table)
    assert (frame["reason"].ne("") == frame["status"].eq("dropped")).all()
    assert (frame["phash"].ne("") == frame["status"].eq("kept")).all()
    return dict(zip(frame["path"], frame["phash"] + frame["reason"], strict=True))


def distance(first: str, second: str) -> int:
    return imagehash.hex_to_hash(first[:16]) - imagehash.hex_to_hash(second[:16])


def colours(hashes_or_reasons: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(hashes_or_reasons[16:]), np.uint8).astype(int)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "work" / "hashes.parquet"


@pytest.fixture(scope="session")
def large() -> Image.Image:
    with Image.open(PHOTOGRAPHS / "astronaut.png") as image:
        return image.convert("RGB").resize((1024, 1024), Image.Resampling.LANCZOS)


def test_compute_hashes_formats_of_one_image_give_similar_hashes(folder, table, photograph):
    """The hash is independent of format, orientation and pixel type."""
    exif = Image.Exif()
    exif[0x0112] = 6
    faded = photograph.convert("RGBA")
    faded.putalpha(Image.linear_gradient("L").resize(faded.size))
    over_white = Image.alpha_composite(Image.new("RGBA", faded.size, "white"), faded).convert("RGB")
    deep = Image.fromarray(np.asarray(photograph.convert("L")).astype(np.uint16) * 257)
    turned = photograph.transpose(Image.Transpose.ROTATE_90)
    files = {
        "a.png": encoded(photograph, "PNG"),
        "a.jpg": encoded(photograph, "JPEG", quality=90),
        "a.webp": encoded(photograph, "WEBP", quality=90),
        "a.tif": encoded(photograph, "TIFF"),
        "grey.jpg": encoded(photograph.convert("L"), "JPEG", quality=90),
        "cmyk.jpg": encoded(photograph.convert("CMYK"), "JPEG", quality=90),
        "palette.png": encoded(photograph.quantize(256), "PNG"),
        "deep.png": encoded(deep, "PNG"),
        "turned.jpg": encoded(turned, "JPEG", quality=90, exif=exif),
        "turned.png": encoded(turned, "PNG", exif=exif),
        "not_turned.jpg": encoded(turned, "JPEG", quality=90),
        "faded.png": encoded(faded, "PNG"),
        "on_white.png": encoded(over_white, "PNG"),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    found = hashes_or_reasons(folder, table)
    expected = str(imagehash.phash(photograph))
    equal_content = set(files) - {"not_turned.jpg", "faded.png", "on_white.png"}
    assert {
        name: distance(found[name], expected) for name in equal_content if distance(found[name], expected) > 2
    } == {}
    assert distance(found["not_turned.jpg"], expected) > 16
    for name in equal_content - {"grey.jpg", "deep.png"}:
        assert np.abs(colours(found[name]) - colours(found["a.png"])).max() <= 4, name
    assert colours(found["grey.jpg"]).tolist() == [128] * 32
    assert distance(found["faded.png"], found["on_white.png"]) <= 2
    assert distance(found["faded.png"], expected) > 2


def test_compute_hashes_colours_are_independent_of_brightness(folder, table):
    image = Image.new("RGB", (200, 200), (200, 0, 0))
    image.paste((0, 0, 200), (100, 0, 200, 100))
    image.paste((200, 200, 0), (100, 100, 200, 200))
    image.save(folder / "bright.png")
    image.point(lambda value: value * 8 // 10).save(folder / "dim.png")
    found = {
        name: colours(hashes_or_reasons) - 128
        for name, hashes_or_reasons in hashes_or_reasons(folder, table).items()
    }
    pure, yellow = 200 * 200 / (200 + 192), 200 * 200 / (400 + 192)
    red = [[pure, 0], [pure, 0]]  # of the quadrants
    blue = [[0, pure], [0, -yellow]]
    expected = np.rint([red, blue]).repeat(2, axis=1).repeat(2, axis=2)
    assert found["bright.png"].tolist() == expected.ravel().tolist()
    assert 0 < np.abs(found["dim.png"] - found["bright.png"]).max() < MAX_COLOUR_DISTANCE


@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_compute_hashes_corrupt_jpeg_is_dropped(folder, table, large, progressive):
    """Pillow decodes each of these files without an error."""
    data = encoded(large, "JPEG", quality=85, progressive=progressive)
    for tenth in range(1, 10):
        offset = len(data) * tenth // 10
        (folder / f"hole_{tenth}.jpg").write_bytes(data[:offset] + bytes(4096) + data[offset + 4096 :])
        (folder / f"swapped_{tenth}.jpg").write_bytes(
            data[:offset] + data[offset - 2048 : offset] + data[offset + 2048 :]
        )
        (folder / f"cut_{tenth}.jpg").write_bytes(data[:offset])
    (folder / "valid.jpg").write_bytes(data)
    (folder / "padded.jpg").write_bytes(data[:-2] + b"\0" * 4 + data[-2:])  # as some webcams do
    found = hashes_or_reasons(folder, table)
    assert len(found.pop("valid.jpg")) == len(found.pop("padded.jpg")) == HASH_LENGTH
    # decoding resynchronizes after some swapped sectors, and only a few blocks are wrong
    swapped = [found.pop(f"swapped_{tenth}.jpg") for tenth in range(1, 10)]
    assert swapped.count("corrupt image") >= 7
    assert set(found.values()) <= {"corrupt image", "truncated"}
    assert {name for name, reason in found.items() if reason == "truncated"} <= {
        f"cut_{n}.jpg" for n in range(1, 10)
    }
    Image.open(folder / "hole_5.jpg").load()


def test_compute_hashes_png_with_flipped_bit_is_dropped(folder, table, photograph):
    data = encoded(photograph, "PNG")
    for tenth in range(1, 10):
        corrupt = bytearray(data)
        corrupt[len(data) * tenth // 10] ^= 4
        (folder / f"{tenth}.png").write_bytes(corrupt)
    (folder / "valid.png").write_bytes(data)
    found = hashes_or_reasons(folder, table)
    assert len(found.pop("valid.png")) == HASH_LENGTH
    assert set(found.values()) == {"corrupt image"}


def test_compute_hashes_truncated_files_of_other_formats_are_dropped(folder, table, large):
    for format_name in ("WEBP", "GIF", "TIFF"):
        options = {"compression": "tiff_lzw"} if format_name == "TIFF" else {}
        data = encoded(large, format_name, **options)
        (folder / f"whole.{format_name.lower()}").write_bytes(data)
        (folder / f"half.{format_name.lower()}").write_bytes(data[: len(data) // 2])
    found = hashes_or_reasons(folder, table)
    for name, result in found.items():
        assert (len(result) == HASH_LENGTH) == name.startswith("whole"), (name, result)
    assert (found["half.webp"], found["half.gif"]) == ("truncated", "truncated")
    assert found["half.tiff"] == "truncated"  # its directory is at the end


def test_compute_hashes_profiles_and_thumbnails_are_valid(folder, table, photograph):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    thumbnail = encoded(photograph.resize((32, 20)), "JPEG")
    data = encoded(photograph, "JPEG", icc_profile=profile * 200, comment=thumbnail, restart_marker_blocks=4)
    (folder / "a.jpg").write_bytes(data)
    (folder / "mpo.jpg").write_bytes(encoded(photograph, "MPO", save_all=True, append_images=[photograph]))
    assert [len(result) for result in hashes_or_reasons(folder, table).values()] == [HASH_LENGTH, HASH_LENGTH]


def test_compute_hashes_known_content_is_not_read_again(folder, table, photograph, monkeypatch):
    for index in range(3):
        photograph.rotate(index).save(folder / f"{index}.png")
    (folder / "bad.jpg").write_bytes(encoded(photograph, "JPEG")[:3000])
    first = hashes_or_reasons(folder, table)
    assert set(pq.read_table(table)["key"].to_pylist()) == set(scan(folder)["key"])
    (folder / "0.png").rename(folder / "renamed.png")
    (folder / "1.png").unlink()
    (folder / "copy.png").write_bytes((folder / "2.png").read_bytes())
    frame, read = scan(folder), []
    monkeypatch.setattr(perceptual_hash, "_hash_one", lambda *arguments: read.append(arguments))
    again = compute_hashes(folder, frame, table)
    assert read == []
    found = dict(zip(again["path"], again["phash"] + again["reason"], strict=True))
    assert found == {
        "renamed.png": first["0.png"],
        "2.png": first["2.png"],
        "copy.png": first["2.png"],
        "bad.jpg": "truncated",
    }


def test_compute_hashes_argument_and_dropped_rows_are_unchanged(folder, table, photograph):
    photograph.save(folder / "a.png")
    photograph.save(folder / "b.png", optimize=True)
    frame = scan(folder)
    frame.loc[1, ["status", "reason", "key"]] = ["dropped", "caption is empty", ""]
    before = frame.copy()
    hashed = compute_hashes(folder, frame.drop(columns="phash"), table)
    pd.testing.assert_frame_equal(frame, before)
    assert hashed["reason"].tolist() == ["", "caption is empty"]
    assert hashed["phash"].map(len).tolist() == [HASH_LENGTH, 0]
    assert compute_hashes(folder, frame[1:], table.with_name("none.parquet"))["phash"].tolist() == [""]
    pd.testing.assert_frame_equal(hashed.drop(columns="phash"), before.drop(columns="phash"))


def test_compute_hashes_changed_or_missing_file_is_dropped_and_not_recorded(folder, table, photograph):
    for angle, name in enumerate(["changed.png", "gone.png", "fine.png"]):
        photograph.rotate(angle).save(folder / name)
    frame = scan(folder)
    original = (folder / "changed.png").read_bytes()
    (folder / "changed.png").write_bytes(encoded(photograph.rotate(90), "PNG"))
    (folder / "gone.png").unlink()
    hashed = compute_hashes(folder, frame, table).set_index("path")
    assert hashed["status"].to_dict() == {"changed.png": "dropped", "fine.png": "kept", "gone.png": "dropped"}
    assert hashed.loc["changed.png", "reason"] == CHANGED_SINCE_SCAN
    assert hashed.loc["gone.png", "reason"] == "cannot be read: No such file or directory"
    assert pq.read_table(table)["key"].to_pylist() == [hashed.loc["fine.png", "key"]]
    (folder / "changed.png").write_bytes(original)
    assert compute_hashes(folder, frame, table).set_index("path").loc["changed.png", "status"] == "kept"


def test_compute_hashes_one_of_two_paths_suffices(folder, table, photograph):
    for name in ("a.png", "b.png"):
        photograph.save(folder / name)
    frame = scan(folder)
    (folder / "a.png").write_bytes(b"changed")
    assert compute_hashes(folder, frame, table)["phash"].map(len).tolist() == [HASH_LENGTH, HASH_LENGTH]


def test_compute_hashes_unusable_table_is_rebuilt(folder, table, photograph):
    photograph.save(folder / "a.png")
    expected = hashes_or_reasons(folder, table)
    complete = table.read_bytes()
    for content in (b"", complete[:100], b"no table at all"):
        table.write_bytes(content)
        assert hashes_or_reasons(folder, table) == expected
        assert table.read_bytes() == complete
    # a table without version
    pd.DataFrame({"key": scan(folder)["key"], "phash": "0" * HASH_LENGTH, "problem": ""}).to_parquet(table)
    assert hashes_or_reasons(folder, table) == expected


def test_compute_hashes_killed_process_resumes_from_table(folder, table, photograph):
    """A killed process loses only results since the last write; the next call continues from the table."""
    for index in range(40):
        photograph.rotate(index).save(folder / f"{index:02d}.png")
    scan(folder).to_parquet(table.parent.parent / "scan.parquet")
    program = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        import pandas as pd
        from sdxl_pipeline.data.decoding import memory_budget
        from sdxl_pipeline.data.quality import perceptual_hash
        perceptual_hash.SAVE_SECONDS, perceptual_hash._BATCH = 0, 10
        def on_progress(done, total):
            if done == 35:
                os.kill(os.getpid(), signal.SIGKILL)
        perceptual_hash.compute_hashes(Path({str(folder)!r}), pd.read_parquet({str(table.parent.parent / "scan.parquet")!r}), Path({str(table)!r}), on_progress)
    """)
    done = subprocess.run([sys.executable, "-c", program], check=False, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert pq.read_table(table).num_rows == 30
    progress = []
    compute_hashes(folder, scan(folder), table, lambda done, total: progress.append((done, total)))
    assert progress == [(done, 10) for done in range(1, 11)]


def test_compute_hashes_image_above_budget_is_processed(folder, table, monkeypatch):
    """An image that needs more than the budget is processed alone."""
    monkeypatch.setattr(memory_budget, "PIXEL_BUDGET", memory_budget.MemoryBudget(1000))
    monkeypatch.setattr(perceptual_hash, "_MAX_FILE_BYTES", 1000)
    for index in range(6):
        Image.effect_noise((300, 200), 50 + index).save(folder / f"{index}.png")
    assert all(len(result) == HASH_LENGTH for result in hashes_or_reasons(folder, table).values())


def test_compute_hashes_writes_nothing_into_folder(folder, table, photograph):
    photograph.save(folder / "a.png")
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}
    hashes_or_reasons(folder, table)
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]} == before
    assert [path.name for path in table.parent.iterdir()] == ["hashes.parquet"]
