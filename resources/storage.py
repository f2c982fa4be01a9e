"""Where things lie: the tensor stores, the stages' working folders, and the values that assets hand on."""

import hashlib
import io
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
    """Fail a step whose disk is full with one sentence, and do not try it again."""
    try:
        yield
    except dg.Failure:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        message = describe_disk_full(error, storage_root(), "what this step writes")
        raise dg.Failure(description=message, allow_retries=False) from error


class Storage(dg.ConfigurableResource):
    """One folder under which everything is kept that can be made again."""

    root: str | None = Field(
        default=None,
        description=f"Folder. Not set: the environment variable {ROOT_VARIABLE}, and without it `storage` in the repository.",
    )

    @property
    def path(self) -> Path:
        """The root as an absolute path."""
        return storage_root(self.root)

    @property
    def places(self) -> StorageLayout:
        """The folders under the root."""
        return StorageLayout(self.path)

    def data_dir(self, dataset: ImageDataset) -> Path:
        """Folder that a dataset's images lie in: the user's own, or where they are downloaded to."""
        return data_folder(dataset, self.places.sources)

    def latent_store_root(self, dataset: ImageDataset) -> Path:
        """Root of the latent store of a dataset."""
        return self.places.latent_store_root(dataset.cache_dir_vae)

    def text_store_root(self, text_embeds: TextEmbedsDataset | None) -> Path:
        """Root of the text-embedding store of an entry, or of those that have none."""
        return self.places.text_store_root(text_embeds.cache_dir if text_embeds else None)

    @full_disk_as_failure()
    def work_dir(self, *parts: str) -> Path:
        """A folder for specs, manifests and what stages write beside them; made if need be."""
        folder = self.places.work.joinpath(*parts)
        folder.mkdir(parents=True, exist_ok=True)
        self.places.remember_projects(projects_folder())
        return folder

    @full_disk_as_failure()
    def keep_table(self, table: pd.DataFrame, folder: Path, name: str) -> Path:
        """Write a table as Parquet into a folder, under a name that holds its digest, and give the path.

        A manifest that names such a file keeps meaning the same rows after the table has changed. A prune deletes those that nobody names,
        if they are old: one that is there already is made young.
        """
        data = parquet_bytes(table)
        path = folder / f"{name}-{hashlib.sha256(data).hexdigest()[:16]}.parquet"
        with suppress(FileNotFoundError):
            os.utime(path)
        if not path.exists():
            write_bytes_atomic(path, data)
        return path


class ValueIOManager(dg.ConfigurableIOManager):
    """Keeps the values that assets hand on: DataFrames as Parquet, manifests (pydantic models) as JSON.

    The file is `<storage root>/values/<asset key>.parquet` or `.json`. Which one is loaded, and as what, says the type that the asset
    downstream asks for.
    """

    storage: dg.ResourceDependency[Storage]

    @full_disk_as_failure()
    def handle_output(self, context: dg.OutputContext, obj: Any) -> None:
        """Write a value by rename, and show its path among the asset's metadata."""
        path = self._path(context, type(obj))
        if isinstance(obj, pd.DataFrame):
            write_bytes_atomic(path, parquet_bytes(obj))
        else:
            write_text_atomic(path, obj.model_dump_json(indent=2) + "\n")
        context.add_output_metadata({"path": dg.MetadataValue.path(str(path))})

    def load_input(self, context: dg.InputContext) -> Any:
        """Read a value as the type asked for. Raises `dagster.Failure` naming the asset to materialize when it is not there."""
        wanted = context.dagster_type.typing_type
        path = self._path(context, wanted)
        asset = context.asset_key.to_user_string()
        hint = (
            f"Materialize it first: dagster asset materialize -m sdxl_pipeline.definitions --select 'key:\"{asset}\"', "
            "or select the assets upstream together with this one."
        )
        if not path.exists():
            raise dg.Failure(
                f"the value of asset {asset} is not there (looked for {path}). {hint}", allow_retries=False
            )
        if wanted is pd.DataFrame:
            return read_parquet(path)
        try:
            return wanted.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise dg.Failure(
                f"the value of asset {asset} ({path}) does not fit {wanted.__name__}; another version of this project wrote it. "
                f"{hint}\n{error}",
                allow_retries=False,
            ) from error

    def _path(self, context: dg.InputContext | dg.OutputContext, value_type: Any) -> Path:
        *folders, name = context.get_asset_identifier()
        return self.storage.path.joinpath("values", *folders, name + _suffix(value_type))


def parquet_bytes(table: pd.DataFrame) -> bytes:
    """A table as a Parquet file's content."""
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    return buffer.getvalue()


def read_parquet(path: Path) -> pd.DataFrame:
    """A table as it was written: columns of lists hold lists again, where pandas alone would give numpy arrays."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    stored = pq.read_table(path)
    table: pd.DataFrame = stored.to_pandas()
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
        f"values between assets are pandas DataFrames or pydantic models, not {value_type!r}: give the asset's output, and the input "
        "that loads it, such a type"
    )
