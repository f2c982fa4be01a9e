"""Paths of the tensor stores and work folders, and the IO manager for the values of assets."""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
from pydantic import BaseModel, Field, ValidationError

from sdxl_pipeline.config.loader import projects_folder
from sdxl_pipeline.config.schema.datasets import ImageDataset, TextEmbedsDataset
from sdxl_pipeline.data.sources import data_folder
from sdxl_pipeline.files.atomic_files import write_bytes_atomic, write_text_atomic
from sdxl_pipeline.files.disk_space import describe_disk_full, is_disk_full
from sdxl_pipeline.files.storage_layout import ROOT_VARIABLE, StorageLayout, storage_root


@contextmanager
def full_disk_as_failure() -> Iterator[None]:
    """Convert a disk-full error into a `dagster.Failure` without retries."""
    try:
        yield
    except dg.Failure:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        message = describe_disk_full(error, storage_root(), "the output of this step")
        raise dg.Failure(description=message, allow_retries=False) from error


class Storage(dg.ConfigurableResource):
    """One root folder for everything that can be recomputed."""

    root: str | None = Field(
        default=None,
        description=f"Folder. Not set: the environment variable {ROOT_VARIABLE}, and without it `storage` in the repository.",
    )

    @property
    def path(self) -> Path:
        """Return the root as an absolute path."""
        return storage_root(self.root)

    @property
    def layout(self) -> StorageLayout:
        """Return the folders under the root."""
        return StorageLayout(self.path)

    def data_dir(self, dataset: ImageDataset) -> Path:
        """Return the folder of a dataset's images: the user's own, or the download folder."""
        return data_folder(dataset, self.layout.sources)

    def latent_store_root(self, dataset: ImageDataset) -> Path:
        """Return the root of a dataset's latent store."""
        return self.layout.latent_store_root(dataset.cache_dir_vae)

    def text_store_root(self, text_embeds: TextEmbedsDataset | None) -> Path:
        """Return the root of the text-embedding store of a text_embeds entry, or the default one without an entry."""
        return self.layout.text_store_root(text_embeds.cache_dir if text_embeds else None)

    @full_disk_as_failure()
    def work_dir(self, *parts: str) -> Path:
        """Return a folder for specs, manifests and other files of a stage, created if necessary."""
        folder = self.layout.work.joinpath(*parts)
        folder.mkdir(parents=True, exist_ok=True)
        self.layout.register_projects(projects_folder())
        return folder

    @full_disk_as_failure()
    def write_table(self, table: pd.DataFrame, folder: Path, name: str) -> Path:
        """Write a table as Parquet into a folder, under a name that contains its digest, and return the path.

        A manifest with this path refers to the same rows after the table has changed. `prune` deletes old files without references, so
        an existing file gets the current modification time.
        """
        content = table.copy(deep=False)
        content.attrs = {}  # describes the file that the table came from, not its rows
        data = parquet_bytes(content)
        path = folder / f"{name}-{hashlib.sha256(data).hexdigest()[:16]}.parquet"
        with suppress(FileNotFoundError):
            os.utime(path)
        if not path.exists():
            write_bytes_atomic(path, data)
        return path


class ValueIOManager(dg.ConfigurableIOManager):
    """Stores the values of assets: DataFrames as Parquet, manifests (pydantic models) as JSON.

    The file is `<storage root>/values/<asset key>.parquet` or `.json`. The input type of the downstream asset determines which one is
    loaded, and as what.
    """

    storage: dg.ResourceDependency[Storage]

    @full_disk_as_failure()
    def handle_output(self, context: dg.OutputContext, obj: Any) -> None:
        """Write a value atomically and add its path to the asset's metadata."""
        path = self._path(context, type(obj))
        if isinstance(obj, pd.DataFrame):
            write_bytes_atomic(path, parquet_bytes(obj))
        else:
            write_text_atomic(path, obj.model_dump_json(indent=2) + "\n")
        context.add_output_metadata({"path": dg.MetadataValue.path(str(path))})

    def load_input(self, context: dg.InputContext) -> Any:
        """Read a value as the type of the input. Raise `dagster.Failure` with the asset to materialize when it does not exist."""
        value_type = context.dagster_type.typing_type
        path = self._path(context, value_type)
        asset = context.asset_key.to_user_string()
        hint = (
            f"Materialize it first: dagster asset materialize -m sdxl_pipeline.definitions --select 'key:\"{asset}\"', "
            "or select the assets upstream together with this one."
        )
        if not path.exists():
            raise dg.Failure(
                f"the value of asset {asset} does not exist (expected at {path}). {hint}", allow_retries=False
            )
        if value_type is pd.DataFrame:
            return read_parquet(path)
        try:
            return value_type.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise dg.Failure(
                f"the value of asset {asset} ({path}) is not a valid {value_type.__name__}: it was written by another version of this project. "
                f"{hint}\n{error}",
                allow_retries=False,
            ) from error

    def _path(self, context: dg.InputContext | dg.OutputContext, value_type: Any) -> Path:
        *folders, name = context.get_asset_identifier()
        return self.storage.path.joinpath("values", *folders, name + _suffix(value_type))


def parquet_bytes(table: pd.DataFrame) -> bytes:
    """Return a table as the bytes of a Parquet file."""
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    return buffer.getvalue()


def read_parquet(path: Path) -> pd.DataFrame:
    """Return a table as it was written: list columns contain lists, where pandas alone returns numpy arrays; its `attrs` too."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    stored = pq.read_table(path)
    table: pd.DataFrame = stored.to_pandas()
    table.attrs = json.loads((stored.schema.metadata or {}).get(b"PANDAS_ATTRS", b"{}"))
    for field in stored.schema:
        if pa.types.is_list(field.type) and field.name in table.columns:
            table[field.name] = pd.Series(stored[field.name].to_pylist(), index=table.index, dtype=object)
    return table


def _suffix(value_type: Any) -> str:
    if value_type is pd.DataFrame:
        return ".parquet"
    if isinstance(value_type, type) and issubclass(value_type, BaseModel):
        return ".json"
    raise TypeError(
        f"asset values must be pandas DataFrames or pydantic models, not {value_type!r}: annotate the asset's output, and the input "
        "that loads it, with such a type"
    )
