"""Generator of the demo project's dataset: images of zorps, a concept that the bundled model was not trained on.

A zorp is a round creature with a thick white rim and one large eye. The model knows its elements, but neither their
proportions, nor their combination, nor the word: that is what a LoRA has to learn.
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
# Colours and places of the training images, and those that only evaluation images have.
TRAIN_COLORS = ("red", "green", "blue", "yellow", "black")
EVAL_COLORS = ("purple", "orange")
TRAIN_PLACES = ("centre", "left", "right")
EVAL_PLACES = ("top", "bottom")
# (height, width) of the files: three aspects, two of them also at twice the size.
_SIZES = ((128, 128), (96, 160), (160, 96), (256, 256), (192, 320))

# Every band of a zorp is wider than the eight pixels of one latent position.
_RIM = 0.3
_EYE_SCALE = 1.5


@dataclass(frozen=True)
class DemoRequest:
    """The parameters of generate_data.json."""

    images: int = 42
    eval_images: int = 12
    prior_images: int = 36
    seed: int = 7


def generate_if_requested(project_folder: Path) -> Path | None:
    """Generate `project_folder`/data if the folder has a generate_data.json, and return it; else return None.

    Raises ValueError if the file has an unknown generator, key or value.
    """
    request_file = project_folder / REQUEST_FILE
    if not request_file.exists():
        return None
    data = project_folder / "data"
    ensure_demo_dataset(data, _read_request(request_file))
    return data


def ensure_demo_dataset(folder: Path, request: DemoRequest | None = None) -> None:
    """Generate the dataset at `folder` unless it exists: zorp/, zorp_unseen/ and world/, each with .txt captions.

    Equal requests give equal files. They are written to a temporary folder that is renamed, so `folder` is complete
    or absent. A folder generated for another request is replaced. Raises FileExistsError for any other folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{folder.name}.lock")):
        _make_if_needed(folder, request or DemoRequest())


def _make_if_needed(folder: Path, request: DemoRequest) -> None:
    marker_content = {"generator": WORD, **vars(request)}
    if folder.exists():
        marker = folder / _MARKER
        if not marker.exists():
            raise FileExistsError(
                f"{folder} exists and was not created by the demo's generator: move it to another path, or remove "
                f"{REQUEST_FILE} next to it if it is your own dataset"
            )
        if json.loads(marker.read_text()) == marker_content:
            return
        shutil.rmtree(folder)
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    rng = random.Random(request.seed)
    _write_images(temporary / "zorp", _zorps(TRAIN_COLORS, TRAIN_PLACES, request.images, rng), rng)
    eval_specs = _zorps(EVAL_COLORS, (*TRAIN_PLACES, *EVAL_PLACES), request.eval_images, rng)
    _write_images(temporary / "zorp_unseen", eval_specs, rng)
    _write_images(temporary / "world", [sample_plain(rng) for _ in range(request.prior_images)], rng)
    (temporary / _MARKER).write_text(json.dumps(marker_content, indent=2) + "\n")
    temporary.rename(folder)


def zorp(color: str, background: str, place: str, size: str = "large") -> Spec:
    """Return the spec of a zorp; `zorp_caption` returns its caption."""
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
    """Return a caption with colour, place and background; the word alone describes the other features of a zorp."""
    return canonical_caption(Spec(spec.shape, spec.color, spec.background, spec.size, spec.place, noun=WORD))


@contextmanager
def _locked(lock_file: Path) -> Iterator[None]:
    """Lock `lock_file` while the context is open, since the datasets' assets run concurrently."""
    with lock_file.open("w") as lock:
        lock_descriptor(lock.fileno())
        yield


def _zorps(colors: Sequence[str], places: Sequence[str], count: int, rng: random.Random) -> list[Spec]:
    """Return `count` zorps with cyclic colours; a background is neither the body's colour nor that of the white rim."""
    return [
        zorp(color, rng.choice([b for b in COLORS if b not in (color, "white")]), rng.choice(places))
        for color in islice(cycle(colors), count)
    ]


def _write_images(folder: Path, specs: Sequence[Spec], rng: random.Random) -> None:
    folder.mkdir(parents=True)
    for i, spec in enumerate(specs):
        # colours are cyclic too, so shift the sizes to pair each colour with every size
        size = _SIZES[(i + i // len(_SIZES)) % len(_SIZES)]
        caption = zorp_caption(spec) if spec.noun == WORD else canonical_caption(spec)
        _render_image(spec, size, rng).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(caption + "\n")


def _render_image(spec: Spec, size: tuple[int, int], rng: random.Random) -> "Image":
    from sdxl_pipeline.demo.render import render, to_image

    return to_image(render([spec], size, rng)[0])


def _read_request(file: Path) -> DemoRequest:
    """Return the validated request in `file`."""
    request: dict[str, Any] = json.loads(file.read_text())
    generator = request.pop("generator", None)
    if generator != WORD:
        raise ValueError(f'{file}: "generator" is {generator!r}; write "{WORD}", the only known one')
    known = set(vars(DemoRequest()))
    for key, value in request.items():
        if key not in known:
            raise ValueError(
                f"{file}: {key!r} is unknown, the known keys are generator, {', '.join(sorted(known))}"
            )
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{file}: {key!r} is {value!r}, write an integer of at least 0")
    return DemoRequest(**request)
