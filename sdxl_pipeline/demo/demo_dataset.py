"""Makes the demo project's dataset: images of zorps, which the bundled model has never seen or heard of.

A zorp is a round creature with a thick white rim and one huge eye. Its strokes are known to the model, their
proportions, their combination under this word and the word itself are not: that is what a LoRA has to learn.
"""

import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import lock_descriptor

from sdxl_pipeline.demo.shape_captions import canonical_caption
from sdxl_pipeline.demo.shape_world import COLORS, Mark, Spec, sample_plain

if TYPE_CHECKING:
    from PIL.Image import Image

REQUEST_FILE = "generate_data.json"
_MARKER = "generated.json"
WORD = "zorp"
# What the LoRA is shown, and what it must draw without having been shown.
SEEN_COLORS = ("red", "green", "blue", "yellow", "black")
UNSEEN_COLORS = ("purple", "orange")
SEEN_PLACES = ("centre", "left", "right")
UNSEEN_PLACES = ("top", "bottom")
# (height, width) of the files: three aspects, two of them also at twice the size.
_SIZES = ((128, 128), (96, 160), (160, 96), (256, 256), (192, 320))

# Every band of a zorp is wider than the eight pixels that one latent stands for.
_RIM = 0.3
_EYE_SCALE = 1.5


@dataclass(frozen=True)
class DemoRequest:
    """The parameters of generate_data.json."""

    images: int = 42
    eval_images: int = 12
    prior_images: int = 36
    seed: int = 7


def generate_if_asked(project_folder: Path) -> Path | None:
    """Makes `project_folder`/data when the folder holds a generate_data.json; else does nothing.

    Returns the data folder, or None when nothing is asked for. Raises ValueError when the file asks for
    something this generator does not know.
    """
    request_file = project_folder / REQUEST_FILE
    if not request_file.exists():
        return None
    data = project_folder / "data"
    ensure_demo_dataset(data, _read_request(request_file))
    return data


def ensure_demo_dataset(folder: Path, request: DemoRequest | None = None) -> None:
    """Makes the dataset at `folder` unless it is there: zorp/, zorp_unseen/ and world/, each with .txt captions.

    The same request gives the same files. They are written beside and renamed, so `folder` is whole or absent.
    A folder made from another request is replaced; one that we did not make is an error (FileExistsError).
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.with_name(f".{folder.name}.lock")):
        _make_if_needed(folder, request or DemoRequest())


def _make_if_needed(folder: Path, request: DemoRequest) -> None:
    wanted = {"generator": WORD, **vars(request)}
    if folder.exists():
        marker = folder / _MARKER
        if not marker.exists():
            raise FileExistsError(
                f"{folder} exists and was not made by the demo's generator: move it away, or remove {REQUEST_FILE} "
                "beside it if it is your own dataset"
            )
        if json.loads(marker.read_text()) == wanted:
            return
        shutil.rmtree(folder)
    beside = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    rng = random.Random(request.seed)
    _write_images(beside / "zorp", _zorps(SEEN_COLORS, SEEN_PLACES, request.images, rng), rng)
    unseen = _zorps(UNSEEN_COLORS, (*SEEN_PLACES, *UNSEEN_PLACES), request.eval_images, rng)
    _write_images(beside / "zorp_unseen", unseen, rng)
    _write_images(beside / "world", [sample_plain(rng) for _ in range(request.prior_images)], rng)
    (beside / _MARKER).write_text(json.dumps(wanted, indent=2) + "\n")
    beside.rename(folder)


def zorp(color: str, background: str, place: str, size: str = "large") -> Spec:
    """One zorp; `zorp_caption` is what it is called."""
    return Spec(
        "circle",
        color,
        background,
        size,
        place,
        outline="white",
        outline_width=_RIM,
        mark=Mark(eyes=1, scale=_EYE_SCALE),
        noun=WORD,
    )


def zorp_caption(spec: Spec) -> str:
    """The caption names colour, place and background; what makes a zorp is left to the word."""
    return canonical_caption(Spec(spec.shape, spec.color, spec.background, spec.size, spec.place, noun=WORD))


@contextmanager
def _alone(lock_file: Path) -> Iterator[None]:
    """Keeps other processes out: the dataset's assets ask for it at the same time."""
    with lock_file.open("w") as lock:
        lock_descriptor(lock.fileno())
        yield


def _zorps(colors: Sequence[str], places: Sequence[str], count: int, rng: random.Random) -> list[Spec]:
    """`count` zorps, colours in turn; a background is neither the body's colour nor that of the white rim."""
    return [
        zorp(color, rng.choice([b for b in COLORS if b not in (color, "white")]), rng.choice(places))
        for color in islice(cycle(colors), count)
    ]


def _write_images(folder: Path, specs: Sequence[Spec], rng: random.Random) -> None:
    folder.mkdir(parents=True)
    for i, spec in enumerate(specs):
        size = _SIZES[
            (i + i // len(_SIZES)) % len(_SIZES)
        ]  # colours come in turn too: pair each with every size
        caption = zorp_caption(spec) if spec.noun == WORD else canonical_caption(spec)
        _draw(spec, size, rng).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(caption + "\n")


def _draw(spec: Spec, size: tuple[int, int], rng: random.Random) -> "Image":
    from sdxl_pipeline.demo.render import render, to_image

    return to_image(render([spec], size, rng)[0])


def _read_request(file: Path) -> DemoRequest:
    """The validated request of `file`."""
    asked: dict[str, Any] = json.loads(file.read_text())
    generator = asked.pop("generator", None)
    if generator != WORD:
        raise ValueError(f'{file}: "generator" is {generator!r}, the only known one is "{WORD}"')
    known = set(vars(DemoRequest()))
    for key, value in asked.items():
        if key not in known:
            raise ValueError(
                f"{file}: {key!r} is unknown, the known keys are generator, {', '.join(sorted(known))}"
            )
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{file}: {key!r} is {value!r}, write a whole number of at least 0")
    return DemoRequest(**asked)
