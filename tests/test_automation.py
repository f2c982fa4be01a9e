"""Schedule and sensor start a training when something changed, and only then."""

from collections.abc import Callable
from pathlib import Path

import dagster as dg

from sdxl_pipeline.automation import build_schedule, build_sensor
from sdxl_pipeline.images.fingerprint import METADATA_ENTRY, project_fingerprint
from sdxl_pipeline.project.project import load_project
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
