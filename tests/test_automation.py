"""Schedule and sensor start a training when something changed, and only then."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import pytest
import torch

from resources.storage import Storage
from sdxl_pipeline.automation import build_prune_job, build_schedule, build_sensor
from sdxl_pipeline.definitions import build_definitions
from sdxl_pipeline.images.fingerprint import METADATA_ENTRY, project_fingerprint
from sdxl_pipeline.project.project import load_project
from sdxl_pipeline.store.tensor_store import TensorStore
from tests.conftest import draw_picture


def record_training(instance: dg.DagsterInstance, folder: Path) -> None:
    """What `<project>/lora` leaves behind when it has trained on the files as they are."""
    project = load_project(folder)
    instance.report_runless_asset_event(
        dg.AssetMaterialization(
            [project.name, "lora"], metadata={METADATA_ENTRY: project_fingerprint(project)}
        )
    )


def tick(
    instance: dg.DagsterInstance, folder: Path, cursor: str | None = None
) -> dg.SensorResult | dg.SkipReason:
    context = dg.build_sensor_context(instance=instance, cursor=cursor)
    return build_sensor(load_project(folder))(context)


def test_sensor_waits_for_a_first_training(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    assert isinstance(tick(instance, make_project()), dg.SkipReason)


def test_sensor_asks_once_the_changed_files_lie_still(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    folder = make_project()
    record_training(instance, folder)
    assert isinstance(tick(instance, folder), dg.SkipReason)

    draw_picture(folder / "data", 20)
    seen = tick(instance, folder)
    assert isinstance(seen, dg.SensorResult)
    assert not seen.run_requests
    draw_picture(folder / "data", 21)
    moving = tick(instance, folder, seen.cursor)
    assert isinstance(moving, dg.SensorResult)
    assert not moving.run_requests
    still = tick(instance, folder, moving.cursor)
    assert isinstance(still, dg.SensorResult)
    assert still.run_requests is not None
    assert len(still.run_requests) == 1

    record_training(instance, folder)
    assert isinstance(tick(instance, folder, still.cursor), dg.SkipReason)


def test_sensor_sees_an_edited_caption_and_a_changed_setting(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    folder = make_project()
    record_training(instance, folder)
    (folder / "data" / "picture_00.txt").write_text("another caption")
    assert isinstance(tick(instance, folder), dg.SensorResult)
    record_training(instance, folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"lora_rank": 4', '"lora_rank": 8'))
    assert isinstance(tick(instance, folder), dg.SensorResult)


def test_schedule_is_off_without_a_cron_line_and_idle_without_a_change(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    assert build_schedule(load_project(make_project("plain"))) is None

    folder = make_project("nightly", config={"retraining_cron": "0 3 * * *"})
    schedule = build_schedule(load_project(folder))
    assert schedule is not None
    assert schedule.cron_schedule == "0 3 * * *"
    context = dg.build_schedule_context(instance=instance)
    assert isinstance(schedule(context), dg.RunRequest)
    record_training(instance, folder)
    assert isinstance(schedule(context), dg.SkipReason)
    draw_picture(folder / "data", 30)
    assert isinstance(schedule(context), dg.RunRequest)


def test_a_schedule_looks_at_pictures_that_lie_elsewhere(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    elsewhere = {"type": "huggingface", "dataset_name": "someone/cats", "instance_data_dir": ""}
    folder = make_project("remote", config={"retraining_cron": "0 3 * * *"}, dataset=elsewhere)
    schedule = build_schedule(load_project(folder))
    assert schedule is not None
    record_training(instance, folder)
    keys = set()
    for day in (1, 2):
        at = datetime(2026, 1, day, 3, tzinfo=UTC)
        request = schedule(dg.build_schedule_context(instance=instance, scheduled_execution_time=at))
        assert isinstance(request, dg.RunRequest)
        keys.add(request.run_key)
    assert len(keys) == 2
    assert isinstance(tick(instance, folder), dg.SkipReason)  # and the sensor asks nobody


def prune_event(
    instance: dg.DagsterInstance, root: Path, storage: Path, **config: bool
) -> dg.AssetObservation:
    job = build_prune_job(root)
    result = job.execute_in_process(
        instance=instance,
        resources={"storage": Storage(root=str(storage))},
        run_config={"ops": {"free_what_no_project_refers_to": {"config": config}}},
    )
    (event,) = (
        event.event_specific_data
        for event in result.all_events
        if event.is_step_materialization or event.event_type_value == "ASSET_OBSERVATION"
    )
    return getattr(event, "materialization", None) or event.asset_observation


def test_the_prune_job_shows_what_it_freed(
    instance: dg.DagsterInstance, make_project: Callable[..., Path], tmp_path: Path
) -> None:
    root, storage = make_project(pictures=0).parent, tmp_path / "storage"
    store = TensorStore(storage / "latents")
    with store.writer() as writer:
        writer.add("a" * 64, {"mean": torch.zeros(1000)})
    (shard,) = (storage / "latents" / "shards").iterdir()
    size = shard.stat().st_size

    seen = prune_event(instance, root, storage, dry_run=True)
    assert isinstance(seen, dg.AssetObservation)
    assert seen.metadata["bytes_to_free"].value == size
    assert shard.exists()

    freed = prune_event(instance, root, storage)
    assert isinstance(freed, dg.AssetMaterialization)
    assert freed.metadata["bytes_freed"].value == size
    assert freed.metadata["entries"].value == 1
    assert not shard.exists()


def test_the_prune_job_fails_with_a_sentence(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    with pytest.raises(dg.Failure, match="Nothing is freed: there is no folder of projects"):
        prune_event(instance, tmp_path / "typo", tmp_path / "storage")


def test_every_code_location_has_the_prune_job(make_project: Callable[..., Path]) -> None:
    definitions = build_definitions(make_project(pictures=0).parent)
    assert definitions.get_job_def("prune").name == "prune"
