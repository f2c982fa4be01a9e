"""Where things lie under the storage's root: what can be made again, and who may ask for it."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from sdxl_pipeline.config.schema.datasets import ImageDataset, TextEmbedsDataset
from sdxl_pipeline.files.atomic_files import write_text_atomic

ROOT_VARIABLE = "SDXL_PIPELINE_STORAGE"
DEFAULT_ROOT = Path(__file__).parents[2] / "storage"


def storage_root(named: str | None = None) -> Path:
    """The folder `named`, else that of the environment variable SDXL_PIPELINE_STORAGE, else `storage` in the repository; absolute."""
    return Path(named or os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT).expanduser().resolve()


@dataclass(frozen=True)
class StorageLayout:
    """The folders under one root."""

    root: Path

    @property
    def values(self) -> Path:
        """Values that assets hand on: `<project>/<dataset>/<stage>`, or `<project>/<stage>`."""
        return self.root / "values"

    @property
    def work(self) -> Path:
        """Specs, manifests, and what stages write beside them."""
        return self.root / "work"

    @property
    def sources(self) -> Path:
        """Downloaded images."""
        return self.root / "sources"

    @property
    def latents(self) -> Path:
        """The latent store of all datasets that name none of their own."""
        return self.root / "latents"

    @property
    def text_embeds(self) -> Path:
        """The text-embedding store of all entries that name none of their own."""
        return self.root / "text_embeds"

    def latent_store_root(self, dataset: ImageDataset) -> Path:
        """Root of the latent store: the dataset's own `cache_dir_vae`, or the one that all others share.

        Sharing is safe, since an entry's key is the digest of everything it depends on, and spares encoding an image twice that is
        part of two datasets or projects.
        """
        return dataset.cache_dir_vae or self.latents

    def text_store_root(self, text_embeds: TextEmbedsDataset | None) -> Path:
        """Root of the text-embedding store: the entry's own `cache_dir`, or the shared one."""
        return (text_embeds.cache_dir if text_embeds else None) or self.text_embeds

    def remember_projects(self, folder: Path) -> None:
        """Note that the projects in `folder` keep things here, so that a prune asked for by others knows of them."""
        marker = self._users / f"{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.txt"
        if not marker.exists():
            write_text_atomic(marker, f"{folder}\n")

    def remembered_projects(self) -> dict[Path, Path]:
        """Folders of projects that keep things here, each with the file that says so."""
        return {
            Path(marker.read_text(encoding="utf-8").strip()): marker
            for marker in sorted(self._users.glob("[!.]*.txt"))
        }

    @property
    def _users(self) -> Path:
        return self.work / ".projects"
