"""Folders under the storage root: what can be regenerated, and which project folders use it."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from sdxl_pipeline.files.atomic_files import write_text_atomic

ROOT_VARIABLE = "SDXL_PIPELINE_STORAGE"
DEFAULT_ROOT = Path(__file__).parents[2] / "storage"


def storage_root(named: str | None = None) -> Path:
    """Return `named`, else $SDXL_PIPELINE_STORAGE, else `storage` in the repository, as an absolute path."""
    return Path(named or os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT).expanduser().resolve()


@dataclass(frozen=True)
class StorageLayout:
    """Folders under one root."""

    root: Path

    @property
    def values(self) -> Path:
        """Asset values: `<project>/<dataset>_<stage>`, or `<project>/<stage>`."""
        return self.root / "values"

    @property
    def work(self) -> Path:
        """Specs, manifests and the files that stages write beside them."""
        return self.root / "work"

    @property
    def sources(self) -> Path:
        """Downloaded images."""
        return self.root / "sources"

    @property
    def latents(self) -> Path:
        """Shared latent store, for datasets that set no `cache_dir_vae`."""
        return self.root / "latents"

    @property
    def text_embeds(self) -> Path:
        """Shared text-embedding store, for entries that set no `cache_dir`."""
        return self.root / "text_embeds"

    def latent_store_root(self, cache_dir_vae: Path | None) -> Path:
        """Return the root of a dataset's latent store: its `cache_dir_vae`, or the shared store.

        Sharing is safe, since an entry's key is the digest of everything it depends on, and an image that is part of two datasets or
        projects is encoded once.
        """
        return cache_dir_vae or self.latents

    def text_store_root(self, cache_dir: Path | None) -> Path:
        """Return the root of a text-embedding store: the entry's `cache_dir`, or the shared store."""
        return cache_dir or self.text_embeds

    def register_projects(self, folder: Path) -> None:
        """Record that the projects in `folder` use this storage, so that a prune started from another folder retains their files."""
        marker = self._project_markers / f"{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.txt"
        if not marker.exists():
            write_text_atomic(marker, f"{folder}\n")

    def registered_projects(self) -> dict[Path, Path]:
        """Return the folders of projects that use this storage, each with its marker file."""
        return {
            Path(marker.read_text(encoding="utf-8").strip()): marker
            for marker in sorted(self._project_markers.glob("[!.]*.txt"))
        }

    @property
    def _project_markers(self) -> Path:
        return self.work / ".projects"
