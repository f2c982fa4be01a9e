"""The crop plan asset: metadata of several crops, checks, data version, and face detection."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pytest

from assets.aspect_buckets import build_aspect_buckets
from assets.asset_keys import dataset_key
from resources.storage import Storage, ValueIOManager
from sdxl_pipeline.config.loader import load_project


def scan_table(sizes: list[tuple[int, int]]) -> pd.DataFrame:
    """Return a scan of images with these (height, width)."""
    rows = [(f"{n}.png", f"{n:064x}", height, width, "", "kept") for n, (height, width) in enumerate(sizes)]
    return pd.DataFrame(rows, columns=["path", "key", "height", "width", "phash", "status"])


def materialize_plan(folder: Path, scanned: pd.DataFrame) -> dg.ExecuteInProcessResult:
    """Materialize the crop plan of a project's dataset from the scan `scanned`."""
    project = load_project(folder)
    (dataset,) = project.datasets

    @dg.asset(key=dataset_key(project, dataset, "dataset"))
    def scan() -> pd.DataFrame:
        return scanned

    storage = Storage()
    with dg.DagsterInstance.ephemeral() as instance:
        return dg.materialize(
            [scan, build_aspect_buckets(project, dataset)],
            resources={"storage": storage, "io_manager": ValueIOManager(storage=storage)},
            instance=instance,
            raise_on_error=False,
        )


def materialization(result: dg.ExecuteInProcessResult) -> dg.AssetMaterialization:
    assert result.success
    (event,) = result.asset_materializations_for_node("small__shapes_aspect_buckets")
    return event


def plan_metadata(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    return {name: value.value for name, value in materialization(result).metadata.items()}


def test_aspect_buckets_several_flipped_crops_metadata_counts_each_image_once_per_epoch(
    make_project: Callable[..., Path],
) -> None:
    folder = make_project(
        images=1,
        config={"eval_holdout_share": 0.0, "train_batch_size": 4},
        dataset={
            "crop_aspect": "square",
            "crops_per_image": 3,
            "random_flip": True,
            "repeats": 1,
            "maximum_aspect_ratio": 10,
        },
    )
    # five images with a choice of crops, one without, one removed by the filters
    metadata = plan_metadata(
        materialize_plan(folder, scan_table([(400, 900)] * 4 + [(100, 300)] + [(512, 512), (10, 900)]))
    )
    assert metadata["crops"] == metadata["train"] == 5 * 3 * 2 + 2
    assert metadata["flipped"] == 5 * 3 + 1
    assert metadata["crops_per_image"] == 32 / 6
    assert metadata["batches_per_epoch"] == 3  # six images twice, in one bucket, four at a time
    assert metadata["upscaled"] == 6  # the crops of the fifth image
    area = 128 * 128
    kept_ratio = (4 * 6 * 128 * 288 + 6 * 128 * 384 + 2 * area) / (32 * area)
    assert metadata["cropped_area_share"] == pytest.approx(1 - 1 / kept_ratio)
    assert metadata["filtered_out"].records[0].data["files"] == 1


def test_buckets_fill_a_batch_fewer_images_than_a_batch_warns_regardless_of_crops(
    make_project: Callable[..., Path],
) -> None:
    folder = make_project(
        images=1,
        config={"eval_holdout_share": 0.0, "train_batch_size": 3},
        dataset={"crops_per_image": 4, "resolution": 256},
    )
    result = materialize_plan(folder, scan_table([(256, 256)] * 3 + [(400, 801)] * 2))
    checks = {check.check_name: check for check in result.get_asset_check_evaluations()}
    short = checks.pop("buckets_fill_a_batch")
    assert not short.passed
    assert short.severity == dg.AssetCheckSeverity.WARN
    assert "352x192 (2)" in str(short.description)
    assert "256x256" not in str(short.description)
    assert all(check.passed for check in checks.values())


def test_aspect_buckets_renamed_files_keep_the_data_version(make_project: Callable[..., Path]) -> None:
    def version(scanned: pd.DataFrame) -> str:
        return materialization(materialize_plan(folder, scanned)).tags["dagster/data_version"]

    folder = make_project(images=1)
    scanned = scan_table([(400, 900), (512, 300), (128, 128)])
    before = version(scanned)
    renamed = scanned.assign(path=["z.png", "sub/b.png", "a.png"]).iloc[[2, 0, 1]]
    assert version(renamed) == before
    rows = pd.read_parquet(Storage().path / "values" / "small" / "shapes_aspect_buckets.parquet")
    assert rows["path"].tolist() == ["a.png", "z.png", "sub/b.png"]
    assert version(scanned.assign(width=[901, 300, 128])) != before


def test_aspect_buckets_face_crop_without_opencv_fails_with_the_install_command(
    make_project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_project(images=1, dataset={"crop_style": "face"})
    monkeypatch.setitem(sys.modules, "cv2", None)
    result = materialize_plan(folder, scan_table([(400, 900)]))
    (failure,) = result.get_step_failure_events()
    message = str(failure.step_failure_data.user_failure_data.description)
    assert "'shapes'" in message
    assert '"crop_style": "face"' in message
    assert "pip install 'sdxl-pipeline[faces]'" in message


def test_aspect_buckets_images_without_face_are_counted(make_project: Callable[..., Path]) -> None:
    pytest.importorskip("cv2", reason="the extra `faces` is not installed")
    folder = make_project(images=1, dataset={"crop_style": "face"})
    metadata = plan_metadata(materialize_plan(folder, scan_table([(128, 128)])))
    assert metadata["images_without_face"] == 1
    assert list((Storage().path / "work").rglob("faces.parquet"))
