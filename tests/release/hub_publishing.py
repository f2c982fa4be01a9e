"""A release folder, and the functions that publish it to a local Hub, for the tests of the upload."""

import json
from pathlib import Path

from huggingface_hub import HfApi

from sdxl_pipeline.release.upload import Published, publish
from tests.support.hub_server import HubServer

REPO = "someone/zorp"
CARD = "---\nlicense: apache-2.0\n---\n# A LoRA\n"


def write_release(folder: Path, weights: bytes = b"weights" * 1000, **files: bytes) -> Path:
    """Write a small release; `files` maps a name with "__" instead of "." to its content."""
    content = {
        "README.md": CARD.encode(),
        "zorp.safetensors": weights,
        "images/a.png": b"image",
        **{name.replace("__", "."): data for name, data in files.items()},
    }
    content["lineage.json"] = json.dumps({"files": sorted([*content, "lineage.json"])}).encode()
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """Return content by path of a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def publish_to(hub: HubServer, folder: Path, repo_id: str = REPO, log: list[str] | None = None) -> Published:
    """Publish as a release does, with the real client; messages go to `log`."""
    return publish(
        HfApi(endpoint=hub.endpoint),
        folder,
        repo_id,
        private=True,
        message="zorp",
        report=([] if log is None else log).append,
    )
