"""Looking at images: damage in their pixels is found and named, hashes follow the eye, and nothing is looked at twice."""

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
from sdxl_pipeline.data.quality.perceptual_hash import CHANGED, compute_hashes
from tests.support.photographs import PHOTOGRAPHS, encoded

LOOK = 80  # hex digits


def scan(folder: Path) -> pd.DataFrame:
    """The columns that are read, for every file of a folder."""
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


def look(folder: Path, table: Path) -> dict[str, str]:
    """The hash of each image by name, or the reason why it was dropped."""
    frame = compute_hashes(folder, scan(folder), table)
    assert (frame["reason"].ne("") == frame["status"].eq("dropped")).all()
    assert (frame["phash"].ne("") == frame["status"].eq("kept")).all()
    return dict(zip(frame["path"], frame["phash"] + frame["reason"], strict=True))


def distance(first: str, second: str) -> int:
    return imagehash.hex_to_hash(first[:16]) - imagehash.hex_to_hash(second[:16])


def colours(look: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(look[16:]), np.uint8).astype(int)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "work" / "looks.parquet"


@pytest.fixture(scope="session")
def large() -> Image.Image:
    with Image.open(PHOTOGRAPHS / "astronaut.png") as image:
        return image.convert("RGB").resize((1024, 1024), Image.Resampling.LANCZOS)


def test_the_hash_is_of_what_is_seen(folder, table, photograph):
    """Whatever the format, the orientation and the type of the pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    faded = photograph.convert("RGBA")
    faded.putalpha(Image.linear_gradient("L").resize(faded.size))
    on_white = Image.alpha_composite(Image.new("RGBA", faded.size, "white"), faded).convert("RGB")
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
        "on_white.png": encoded(on_white, "PNG"),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    found = look(folder, table)
    expected = str(imagehash.phash(photograph))
    alike = set(files) - {"not_turned.jpg", "faded.png", "on_white.png"}
    assert {
        name: distance(found[name], expected) for name in alike if distance(found[name], expected) > 2
    } == {}
    assert distance(found["not_turned.jpg"], expected) > 16
    for name in alike - {"grey.jpg", "deep.png"}:
        assert np.abs(colours(found[name]) - colours(found["a.png"])).max() <= 4, name
    assert colours(found["grey.jpg"]).tolist() == [128] * 32
    assert distance(found["faded.png"], found["on_white.png"]) <= 2
    assert distance(found["faded.png"], expected) > 2


def test_the_hash_knows_colours_and_hardly_how_bright_they_are(folder, table):
    image = Image.new("RGB", (200, 200), (200, 0, 0))
    image.paste((0, 0, 200), (100, 0, 200, 100))
    image.paste((200, 200, 0), (100, 100, 200, 200))
    image.save(folder / "bright.png")
    image.point(lambda value: value * 8 // 10).save(folder / "dim.png")
    found = {name: colours(look) - 128 for name, look in look(folder, table).items()}
    pure, yellow = 200 * 200 / (200 + 192), 200 * 200 / (400 + 192)
    red = [[pure, 0], [pure, 0]]  # of the quarters
    blue = [[0, pure], [0, -yellow]]
    expected = np.rint([red, blue]).repeat(2, axis=1).repeat(2, axis=2)
    assert found["bright.png"].tolist() == expected.ravel().tolist()
    assert 0 < np.abs(found["dim.png"] - found["bright.png"]).max() < MAX_COLOUR_DISTANCE


@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_a_hole_in_a_jpeg_is_found_wherever_it_lies(folder, table, large, progressive):
    """Pillow decodes each of these without complaint."""
    data = encoded(large, "JPEG", quality=85, progressive=progressive)
    for tenth in range(1, 10):
        at = len(data) * tenth // 10
        (folder / f"hole_{tenth}.jpg").write_bytes(data[:at] + bytes(4096) + data[at + 4096 :])
        (folder / f"swapped_{tenth}.jpg").write_bytes(data[:at] + data[at - 2048 : at] + data[at + 2048 :])
        (folder / f"cut_{tenth}.jpg").write_bytes(data[:at])
    (folder / "sound.jpg").write_bytes(data)
    (folder / "padded.jpg").write_bytes(data[:-2] + b"\0" * 4 + data[-2:])  # as some webcams write it
    found = look(folder, table)
    assert len(found.pop("sound.jpg")) == len(found.pop("padded.jpg")) == LOOK
    # decoding falls into step behind some exchanged sectors, and only a few blocks are wrong
    swapped = [found.pop(f"swapped_{tenth}.jpg") for tenth in range(1, 10)]
    assert swapped.count("corrupt image") >= 7
    assert set(found.values()) <= {"corrupt image", "truncated"}
    assert {name for name, reason in found.items() if reason == "truncated"} <= {
        f"cut_{n}.jpg" for n in range(1, 10)
    }
    Image.open(folder / "hole_5.jpg").load()


def test_a_flipped_bit_in_a_png_is_found_wherever_it_lies(folder, table, photograph):
    data = encoded(photograph, "PNG")
    for tenth in range(1, 10):
        damaged = bytearray(data)
        damaged[len(data) * tenth // 10] ^= 4
        (folder / f"{tenth}.png").write_bytes(damaged)
    (folder / "sound.png").write_bytes(data)
    found = look(folder, table)
    assert len(found.pop("sound.png")) == LOOK
    assert set(found.values()) == {"corrupt image"}


def test_damaged_data_of_other_formats_is_named_where_the_decoder_sees_it(folder, table, large):
    for format_name in ("WEBP", "GIF", "TIFF"):
        options = {"compression": "tiff_lzw"} if format_name == "TIFF" else {}
        data = encoded(large, format_name, **options)
        (folder / f"whole.{format_name.lower()}").write_bytes(data)
        (folder / f"half.{format_name.lower()}").write_bytes(data[: len(data) // 2])
    found = look(folder, table)
    for name, result in found.items():
        assert (len(result) == LOOK) == name.startswith("whole"), (name, result)
    assert (found["half.webp"], found["half.gif"]) == ("truncated", "truncated")
    assert found["half.tiff"] == "truncated"  # its directory is at the end


def test_profiles_and_thumbnails_are_no_damage(folder, table, photograph):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    thumbnail = encoded(photograph.resize((32, 20)), "JPEG")
    data = encoded(photograph, "JPEG", icc_profile=profile * 200, comment=thumbnail, restart_marker_blocks=4)
    (folder / "a.jpg").write_bytes(data)
    (folder / "mpo.jpg").write_bytes(encoded(photograph, "MPO", save_all=True, append_images=[photograph]))
    assert [len(result) for result in look(folder, table).values()] == [LOOK, LOOK]


def test_nothing_is_looked_at_twice(folder, table, photograph, monkeypatch):
    for index in range(3):
        photograph.rotate(index).save(folder / f"{index}.png")
    (folder / "bad.jpg").write_bytes(encoded(photograph, "JPEG")[:3000])
    first = look(folder, table)
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


def test_the_frame_handed_in_stays_as_it_was_and_dropped_rows_are_left_alone(folder, table, photograph):
    photograph.save(folder / "a.png")
    photograph.save(folder / "b.png", optimize=True)
    frame = scan(folder)
    frame.loc[1, ["status", "reason", "key"]] = ["dropped", "caption is empty", ""]
    before = frame.copy()
    looked = compute_hashes(folder, frame.drop(columns="phash"), table)
    pd.testing.assert_frame_equal(frame, before)
    assert looked["reason"].tolist() == ["", "caption is empty"]
    assert looked["phash"].map(len).tolist() == [LOOK, 0]
    assert compute_hashes(folder, frame[1:], table.with_name("none.parquet"))["phash"].tolist() == [""]
    pd.testing.assert_frame_equal(looked.drop(columns="phash"), before.drop(columns="phash"))


def test_a_file_that_changed_or_went_is_dropped_and_not_remembered(folder, table, photograph):
    for angle, name in enumerate(["changed.png", "gone.png", "fine.png"]):
        photograph.rotate(angle).save(folder / name)
    frame = scan(folder)
    original = (folder / "changed.png").read_bytes()
    (folder / "changed.png").write_bytes(encoded(photograph.rotate(90), "PNG"))
    (folder / "gone.png").unlink()
    looked = compute_hashes(folder, frame, table).set_index("path")
    assert looked["status"].to_dict() == {"changed.png": "dropped", "fine.png": "kept", "gone.png": "dropped"}
    assert looked.loc["changed.png", "reason"] == CHANGED
    assert looked.loc["gone.png", "reason"] == "cannot be read: No such file or directory"
    assert pq.read_table(table)["key"].to_pylist() == [looked.loc["fine.png", "key"]]
    (folder / "changed.png").write_bytes(original)
    assert compute_hashes(folder, frame, table).set_index("path").loc["changed.png", "status"] == "kept"


def test_one_of_two_names_is_enough_to_look_at_an_image(folder, table, photograph):
    for name in ("a.png", "b.png"):
        photograph.save(folder / name)
    frame = scan(folder)
    (folder / "a.png").write_bytes(b"changed")
    assert compute_hashes(folder, frame, table)["phash"].map(len).tolist() == [LOOK, LOOK]


def test_a_table_that_cannot_be_used_is_made_anew(folder, table, photograph):
    photograph.save(folder / "a.png")
    expected = look(folder, table)
    whole = table.read_bytes()
    for content in (b"", whole[:100], b"no table at all"):
        table.write_bytes(content)
        assert look(folder, table) == expected
        assert table.read_bytes() == whole
    pd.DataFrame({"key": scan(folder)["key"], "phash": "0" * LOOK, "problem": ""}).to_parquet(
        table
    )  # of no version
    assert look(folder, table) == expected


def test_a_kill_loses_little(folder, table, photograph):
    """Every batch is saved when it is due; the next call goes on from there."""
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
    told = []
    compute_hashes(folder, scan(folder), table, lambda done, total: told.append((done, total)))
    assert told == [(done, 10) for done in range(1, 11)]


def test_large_images_take_turns(folder, table, monkeypatch):
    """An image that wants more than the whole budget is looked at all the same, alone."""
    monkeypatch.setattr(memory_budget, "PIXELS", memory_budget.Budget(1000))
    monkeypatch.setattr(perceptual_hash, "_FILE_BYTES_AT_ONCE", 1000)
    for index in range(6):
        Image.effect_noise((300, 200), 50 + index).save(folder / f"{index}.png")
    assert all(len(result) == LOOK for result in look(folder, table).values())


def test_nothing_is_written_into_the_folder(folder, table, photograph):
    photograph.save(folder / "a.png")
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}
    look(folder, table)
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]} == before
    assert [path.name for path in table.parent.iterdir()] == ["looks.parquet"]
