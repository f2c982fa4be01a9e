"""Tests of pixel loading: every kind of file becomes upright, opaque 8-bit sRGB, resampled once and cropped as planned."""

import hashlib
import io
import struct

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageCms

from sdxl_pipeline.data.buckets.crop_plan import Crop, plan_crop, plan_crops
from sdxl_pipeline.data.decoding.image_decoding import UnreadableImage, read_header
from sdxl_pipeline.data.decoding.pixels import load_crop, load_upright
from tests.support.crops import ORIENTATION, full_crop, stored_with_orientation
from tests.support.photographs import PHOTOGRAPHS, encoded, values


def save(folder, data: bytes, name: str = "image"):
    path = folder / name
    path.write_bytes(data)
    return path


def scan_of(path: str, height: int, width: int) -> pd.DataFrame:
    """Return the scan of one image with the columns that the crop plan needs."""
    return pd.DataFrame(
        [
            {
                "path": path,
                "key": hashlib.sha256(path.encode()).hexdigest(),
                "height": height,
                "width": width,
                "status": "kept",
            }
        ]
    )


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_load_crop_every_orientation_gives_upright_pixels(folder, photograph, format_name, orientation):
    stored = stored_with_orientation(orientation, photograph)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format_name, {})
    data = encoded(stored, format_name, exif=exif, **options)
    header = read_header(data)
    assert (header.height, header.width, header.format) == (200, 320, format_name)
    loaded = load_crop(save(folder, data), full_crop(200, 320))
    difference = np.abs(values(loaded) - values(photograph))
    assert difference.mean() < (2 if format_name == "JPEG" else 1e-9)


def test_load_crop_png_orientation_after_pixels_is_applied(folder, photograph):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = encoded(stored_with_orientation(6, photograph), "PNG", exif=exif)
    start = data.index(b"eXIf") - 4
    end = start + 12 + struct.unpack_from(">I", data, start)[0]
    data = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert (read_header(data).height, read_header(data).width) == (200, 320)
    assert np.array_equal(load_crop(save(folder, data), full_crop(200, 320)), np.asarray(photograph))


def test_load_crop_invalid_exif_is_ignored(folder, photograph):
    data = encoded(photograph, "JPEG", exif=b"Exif\0\0garbage that is no TIFF header", quality=95)
    assert (read_header(data).height, read_header(data).width) == (200, 320)
    assert load_crop(save(folder, data), full_crop(200, 320)).shape == (200, 320, 3)


def test_load_crop_window_equals_resize_then_crop(folder, make_dataset):
    path = PHOTOGRAPHS / "coffee.png"  # 600x400
    with Image.open(path) as image:
        image = image.convert("RGB")
    for seed in range(3):
        plan = plan_crop(make_dataset(crop=True, resolution=192), 400, 600, f"key{seed}", seed)
        resized = image.resize((plan.resized_w, plan.resized_h), Image.Resampling.LANCZOS)
        box = (plan.crop_left, plan.crop_top, plan.crop_left + plan.bucket_w, plan.crop_top + plan.bucket_h)
        difference = np.abs(values(load_crop(path, plan)) - values(resized.crop(box)))
        assert difference.max() <= 1


@pytest.mark.parametrize("settings", [{"crop": True}, {"crop": True, "crop_aspect": "preserve"}, {}])
def test_load_crop_flipped_equals_crop_of_mirrored_image(folder, make_dataset, photograph, settings):
    straight, mirrored = folder / "straight.png", folder / "mirrored.png"
    straight.write_bytes(encoded(photograph, "PNG"))
    mirrored.write_bytes(encoded(photograph.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "PNG"))
    dataset = make_dataset(resolution=128, random_flip=True, crops_per_image=3, **settings)
    rows, _ = plan_crops(dataset, scan_of("straight.png", 200, 320), seed=3, held_out=(), is_eval=False)
    flipped = [row for row in rows.itertuples() if row.flipped]
    assert flipped
    for row in flipped:
        # crop_left refers to the mirrored image, so the same plan applies to that
        unflipped = Crop(
            **{name: getattr(row, name) for name in Crop.__dataclass_fields__} | {"flipped": False}
        )
        difference = np.abs(values(load_crop(straight, row)) - values(load_crop(mirrored, unflipped)))
        assert difference.max() <= 1
        # and it is bit-identical to its unmirrored twin mirrored
        twin = next(
            other
            for other in rows.itertuples()
            if not other.flipped
            and other.crop_top == row.crop_top
            and other.crop_left == row.resized_w - row.bucket_w - row.crop_left
        )
        assert np.array_equal(load_crop(straight, row), load_crop(straight, twin)[:, ::-1])


def test_load_crop_large_image_is_decoded_and_resampled_once(folder, make_dataset, photograph, monkeypatch):
    tiles = Image.fromarray(np.tile(np.asarray(photograph.convert("L")), (25, 25)))  # 8000x5000
    path = save(folder, encoded(tiles, "JPEG", quality=85))
    plan = plan_crop(make_dataset(crop=True, resolution=512), 5000, 8000, "tiles", seed=0)
    decoders, resizes = [], []
    get_decoder, resize = Image._getdecoder, Image.Image.resize

    def recorded_decoder(mode, decoder_name, *arguments):
        decoders.append(decoder_name)
        return get_decoder(mode, decoder_name, *arguments)

    def recorded_resize(image, *arguments, **options):
        resizes.append((image.size, options))
        return resize(image, *arguments, **options)

    monkeypatch.setattr(Image, "_getdecoder", recorded_decoder)
    monkeypatch.setattr(Image.Image, "resize", recorded_resize)
    crop = load_crop(path, plan)
    monkeypatch.undo()
    assert decoders == ["jpeg"]
    ((size, options),) = resizes
    assert size == (8000, 5000)  # so the decoder did not reduce the image either
    assert options.keys() == {"box"}
    with Image.open(path) as full_image:
        resized = full_image.resize((plan.resized_w, plan.resized_h), Image.Resampling.LANCZOS)
    expected = values(resized)[plan.crop_top :, plan.crop_left :][: plan.bucket_h, : plan.bucket_w]
    assert np.abs(values(crop) - expected[:, :, None]).max() <= 1


def test_load_crop_parquet_row_equals_planned_crop(folder, tmp_path, make_dataset, photograph):
    (folder / "a.png").write_bytes(encoded(photograph, "PNG"))
    dataset = make_dataset(crop=True, resolution=128)
    rows, _ = plan_crops(dataset, scan_of("a.png", 200, 320), seed=5, held_out=(), is_eval=False)
    rows.to_parquet(tmp_path / "rows.parquet")
    (row,) = pd.read_parquet(tmp_path / "rows.parquet").itertuples(index=False)
    crop = load_crop(folder / row.path, row)
    assert crop.shape == (128, 128, 3)
    assert np.array_equal(crop, load_crop(folder / "a.png", plan_crop(dataset, 200, 320, row.key, seed=5)))


def test_load_crop_without_resize_returns_original_pixels(folder, photograph):
    path = save(folder, encoded(photograph, "PNG"))
    plan = full_crop(200, 320, bucket_h=64, bucket_w=96, crop_top=100, crop_left=31)
    assert np.array_equal(load_crop(path, plan), np.asarray(photograph)[100:164, 31:127])


@pytest.mark.parametrize(
    "name", ["astronaut.png", "camera.png", "rocket.jpg", "retina.jpg", "hubble_deep_field.jpg", "logo.png"]
)
def test_load_crop_real_photographs_fill_buckets(name, make_dataset):
    path = PHOTOGRAPHS / name
    header = read_header(path.read_bytes())
    for settings in (
        {"crop": True},
        {"crop": False},
        {"crop": True, "crop_aspect": "preserve", "resolution": 1024},
    ):
        plan = plan_crop(make_dataset(**settings), header.height, header.width, name, seed=0)
        crop = load_crop(path, plan)
        assert crop.shape == (plan.bucket_h, plan.bucket_w, 3)
        assert crop.dtype == np.uint8
        assert crop.std() > 10


def test_load_crop_transparency_is_composited_over_white(folder):
    rgba = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    rgba.putpixel((1, 0), (10, 20, 30, 0))
    expected = [[[200, 0, 0], [255, 255, 255]]]
    assert load_crop(save(folder, encoded(rgba, "PNG")), full_crop(1, 2)).tolist() == expected

    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 10, 20, 30])
    palette.putdata([0, 1])
    assert (
        load_crop(save(folder, encoded(palette, "PNG", transparency=1)), full_crop(1, 2)).tolist() == expected
    )
    assert (
        load_crop(save(folder, encoded(palette, "GIF", transparency=1)), full_crop(1, 2)).tolist() == expected
    )

    grey = Image.new("LA", (2, 1), (100, 51))
    assert load_crop(save(folder, encoded(grey, "PNG")), full_crop(1, 2)).tolist() == [[[224, 224, 224]] * 2]

    keyed = Image.new("RGB", (2, 1), (200, 0, 0))
    keyed.putpixel((1, 0), (10, 20, 30))
    data = encoded(keyed, "PNG", transparency=(10, 20, 30))
    assert load_crop(save(folder, data), full_crop(1, 2)).tolist() == expected


def test_load_crop_bilevel_and_grey_become_rgb(folder):
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    for format_name in ("PNG", "BMP", "TIFF"):
        assert load_crop(save(folder, encoded(bits, format_name)), full_crop(1, 2)).tolist() == [
            [[0] * 3, [255] * 3]
        ]
    grey = Image.new("L", (2, 1), 77)
    assert load_crop(save(folder, encoded(grey, "PNG")), full_crop(1, 2)).tolist() == [[[77] * 3] * 2]


@pytest.mark.parametrize("format_name", ["PNG", "TIFF"])
def test_load_crop_16_bits_are_scaled(folder, format_name):
    deep = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    crop = load_crop(save(folder, encoded(Image.fromarray(deep), format_name)), full_crop(1, 6))
    assert crop[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


@pytest.mark.parametrize(
    ("deep", "expected"),
    [
        (np.array([[0, 32768, 65535]], dtype=np.int32), [0, 128, 255]),
        (np.array([[0, 2**30, 2**31 - 1]], dtype=np.int32), [0, 64, 127]),
        (np.array([[0, 0.5, 1.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[0, 127.6, 255.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[-3, 0.5, 1.0]], dtype=np.float32), [0, 128, 255]),
    ],
)
def test_load_crop_tiff_integers_and_floats_are_scaled(folder, deep, expected):
    crop = load_crop(save(folder, encoded(Image.fromarray(deep), "TIFF")), full_crop(1, 3))
    assert crop[0, :, 0].tolist() == expected


def test_load_crop_cmyk_preserves_colours(folder, photograph):
    data = encoded(photograph.convert("CMYK"), "JPEG", quality=95)
    with Image.open(io.BytesIO(data)) as stored:
        assert stored.mode == "CMYK"
        assert stored.info["adobe"]  # which stores inverted inks
    difference = np.abs(values(load_crop(save(folder, data), full_crop(200, 320))) - values(photograph))
    assert difference.mean() < 3
    tiff = encoded(photograph.convert("CMYK"), "TIFF")
    assert np.array_equal(load_crop(save(folder, tiff), full_crop(200, 320)), np.asarray(photograph))


def test_load_crop_lab_preserves_colours(folder, photograph):
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    data = encoded(ImageCms.applyTransform(photograph, to_lab), "TIFF")
    difference = np.abs(values(load_crop(save(folder, data), full_crop(200, 320))) - values(photograph))
    assert difference.mean() < 2


def swapped_profile() -> bytes:
    """Return an RGB profile with swapped red and green primaries, so that its use is obvious."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    entries = {}
    for index in range(struct.unpack_from(">I", data, 128)[0]):
        position = 132 + 12 * index
        entries[bytes(data[position : position + 4])] = position
    red, green = entries[b"rXYZ"] + 4, entries[b"gXYZ"] + 4
    data[red : red + 8], data[green : green + 8] = data[green : green + 8], data[red : red + 8]
    return bytes(data)


def test_load_crop_embedded_profile_is_applied(folder):
    image = Image.new("RGB", (4, 4), (220, 30, 60))
    data = encoded(image, "PNG", icc_profile=swapped_profile())
    crop = load_crop(save(folder, data), full_crop(4, 4))
    assert np.abs(values(crop) - np.array([30, 220, 60])).max() <= 2
    assert np.array_equal(np.asarray(load_upright(save(folder, data))), crop)
    with_alpha = image.copy()
    with_alpha.putalpha(0)
    data = encoded(with_alpha, "PNG", icc_profile=swapped_profile())
    assert values(load_crop(save(folder, data), full_crop(4, 4))).min() >= 254


def test_load_crop_srgb_profile_is_not_applied(folder, photograph):
    with Image.open(PHOTOGRAPHS / "hubble_deep_field.jpg") as image:
        camera = image.info["icc_profile"]
    assert b"sRGB IEC61966-2.1" in camera  # the one that cameras and phones embed
    generated = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with Image.open(PHOTOGRAPHS / "rocket.jpg") as image:
        adobe = image.info["icc_profile"]
    for profile, same in ((camera, True), (generated, True), (adobe, False), (swapped_profile(), False)):
        path = save(folder, encoded(photograph, "PNG", icc_profile=profile))
        assert np.array_equal(load_crop(path, full_crop(200, 320)), np.asarray(photograph)) is same


@pytest.mark.parametrize("profile", [b"no profile at all", swapped_profile()[:200]])
def test_load_crop_invalid_profile_is_ignored(folder, profile):
    data = encoded(Image.new("RGB", (2, 2), (220, 30, 60)), "PNG", icc_profile=profile)
    assert load_crop(save(folder, data), full_crop(2, 2))[0, 0].tolist() == [220, 30, 60]


def test_load_crop_profile_of_other_colour_space_is_ignored(folder):
    data = encoded(Image.new("L", (2, 2), 80), "PNG", icc_profile=swapped_profile())
    assert load_crop(save(folder, data), full_crop(2, 2))[0, 0].tolist() == [80, 80, 80]


def test_load_crop_animation_gives_first_frame(folder):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for format_name in ("GIF", "WEBP"):
        options = {"lossless": True} if format_name == "WEBP" else {}
        data = encoded(
            frames[0], format_name, save_all=True, append_images=frames[1:], duration=50, **options
        )
        assert load_crop(save(folder, data), full_crop(4, 4))[0, 0].tolist() == [255, 0, 0]
    crop = load_crop(PHOTOGRAPHS / "no_time_for_that_tiny.gif", full_crop(25, 14))
    assert crop.std() > 10


def test_load_crop_unusable_files_raise_with_reason(folder, photograph):
    jpeg = encoded(photograph, "JPEG")
    for data, reason in [
        (b"", "empty file"),
        (b"a caption by mistake", "content is not an image"),
        (jpeg[: len(jpeg) // 2], "truncated"),
        (jpeg[:12], "truncated"),
    ]:
        with pytest.raises(UnreadableImage) as raised:
            load_crop(save(folder, data), full_crop(200, 320))
        assert raised.value.reason == reason
    with pytest.raises(UnreadableImage, match="cannot be read: No such file"):
        load_crop(folder / "gone.png", full_crop(200, 320))


def test_load_crop_size_differs_from_plan_raises(folder, photograph):
    path = save(folder, encoded(photograph.rotate(90, expand=True), "PNG"))
    with pytest.raises(UnreadableImage, match="changed since the scan: 200x320 pixels, planned at 320x200"):
        load_crop(path, full_crop(200, 320))


def test_load_upright_longest_edge_keeps_aspect(folder, photograph):
    path = save(folder, encoded(photograph, "PNG"))
    assert load_upright(path).size == (320, 200)
    assert load_upright(path, longest_edge=80).size == (80, 50)


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.filterwarnings("ignore:::PIL")  # it warns about each invalid tag
def test_load_crop_fuzzed_files_give_image_or_reason(folder, photograph, format_name):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    options = {} if format_name in ("BMP", "GIF") else {"exif": exif, "icc_profile": swapped_profile()}
    full_file = encoded(photograph.resize((40, 25)), format_name, **options)
    random = np.random.default_rng(0)
    reasons = set()
    for _ in range(150):
        data = bytearray(
            full_file[: random.integers(1, len(full_file) + 1)] if random.random() < 0.3 else full_file
        )
        for position in random.integers(0, min(len(data), 600), size=random.integers(1, 6)):
            data[position] = random.integers(0, 256)
        path = save(folder, bytes(data))
        try:
            header = read_header(bytes(data))
            load_crop(path, full_crop(header.height, header.width))
        except UnreadableImage as error:
            reasons.add(error.reason.partition(" (")[0])
    assert "truncated" in reasons
    known_reasons = {"truncated", "corrupt image", "content is not an image"}
    unsupported = f"unsupported kind of {format_name}: "
    others = {reason for reason in reasons - known_reasons if not reason.startswith(unsupported)}
    assert {reason for reason in others if "million pixels" not in reason} == set()
