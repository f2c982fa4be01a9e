"""Schedule and sensor start one training after a change, and none otherwise; the prune job."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import pytest
import torch
from dagster._core.events import DagsterEvent, StepMaterializationData

from resources.storage import Storage
from sdxl_pipeline.automation import build_prune_job, build_schedule, build_sensor
from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.config.loader import load_project
from sdxl_pipeline.data.scan.dataset_fingerprint import METADATA_ENTRY, OVERRIDES_ENTRY, project_fingerprint
from sdxl_pipeline.definitions import build_definitions
from tests.conftest import draw_image


def record_training(instance: dg.DagsterInstance, folder: Path) -> None:
    """Record a materialization of `<project>/lora` trained on the current files."""
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


def test_sensor_without_a_training_skips(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    assert isinstance(tick(instance, make_project()), dg.SkipReason)


def test_sensor_changed_files_requests_a_run_when_they_are_stable(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    folder = make_project()
    record_training(instance, folder)
    assert isinstance(tick(instance, folder), dg.SkipReason)

    draw_image(folder / "data", 20)
    changed = tick(instance, folder)
    assert isinstance(changed, dg.SensorResult)
    assert not changed.run_requests
    draw_image(folder / "data", 21)
    changing = tick(instance, folder, changed.cursor)
    assert isinstance(changing, dg.SensorResult)
    assert not changing.run_requests
    stable = tick(instance, folder, changing.cursor)
    assert isinstance(stable, dg.SensorResult)
    assert stable.run_requests is not None
    assert len(stable.run_requests) == 1

    record_training(instance, folder)
    assert isinstance(tick(instance, folder, stable.cursor), dg.SkipReason)


def test_sensor_edited_caption_or_changed_setting_is_detected(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    folder = make_project()
    record_training(instance, folder)
    (folder / "data" / "image_00.txt").write_text("another caption")
    assert isinstance(tick(instance, folder), dg.SensorResult)
    record_training(instance, folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"lora_rank": 4', '"lora_rank": 8'))
    assert isinstance(tick(instance, folder), dg.SensorResult)


def test_schedule_without_cron_is_none_and_without_change_skips(
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
    draw_image(folder / "data", 30)
    assert isinstance(schedule(context), dg.RunRequest)


def test_schedule_remote_images_requests_a_run_to_detect_changes(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    elsewhere = {"type": "huggingface", "dataset_name": "someone/cats", "instance_data_dir": ""}
    folder = make_project("remote", config={"retraining_cron": "0 3 * * *"}, dataset=elsewhere)
    schedule = build_schedule(load_project(folder))
    assert schedule is not None
    record_training(instance, folder)

    def at(day: int) -> dg.RunRequest | dg.SkipReason:
        when = datetime(2026, 1, day, 3, tzinfo=UTC)
        return schedule(dg.build_schedule_context(instance=instance, scheduled_execution_time=when))

    first = at(1)
    assert isinstance(first, dg.RunRequest)
    assert "stored elsewhere" in first.tags["reason"]
    run = launch(instance, folder, first.tags)
    assert isinstance(at(2), dg.SkipReason)
    instance.report_run_failed(run)
    assert isinstance(at(3), dg.RunRequest)  # the source may have changed, which only a run can detect
    assert isinstance(tick(instance, folder), dg.SkipReason)  # the sensor does not watch it


def launch(
    instance: dg.DagsterInstance, folder: Path, tags: Mapping[str, str], *stages: str
) -> dg.DagsterRun:
    """Create a started run of the project's job, or of some of its stages."""
    keys = {dg.AssetKey([folder.name, stage]) for stage in stages} or None
    job = build_definitions(folder.parent).resolve_job_def(f"{folder.name}_train")
    return instance.create_run_for_job(
        job.get_subset(asset_selection=keys) if keys else job,
        tags=dict(tags),
        status=dg.DagsterRunStatus.STARTED,
        asset_selection=keys,
    )


@pytest.fixture
def nightly(make_project: Callable[..., Path]) -> Path:
    return make_project("nightly", config={"retraining_cron": "0 3 * * *"})


class Daemon:
    """Schedule and sensor of one project, evaluated in turn; each request becomes a started run."""

    def __init__(self, instance: dg.DagsterInstance, folder: Path) -> None:
        self.instance, self.folder, self.cursor = instance, folder, None
        self.runs: list[dg.DagsterRun] = []
        self.reasons: list[str] = []

    def schedule(self) -> None:
        schedule = build_schedule(load_project(self.folder))
        assert schedule is not None
        self._handle(schedule(dg.build_schedule_context(instance=self.instance)))

    def sensor(self) -> None:
        result = tick(self.instance, self.folder, self.cursor)
        if isinstance(result, dg.SensorResult):
            self.cursor = result.cursor
            for request in result.run_requests or ():
                self._handle(request)
        else:
            self._handle(result)

    def both(self) -> None:
        self.sensor()
        self.schedule()
        self.sensor()

    def _handle(self, result: dg.RunRequest | dg.SkipReason) -> None:
        if isinstance(result, dg.RunRequest):
            self.runs.append(launch(self.instance, self.folder, result.tags))
        else:
            self.reasons.append(str(result.skip_message))


def test_request_one_state_starts_one_run_while_unfinished_and_after_failure(
    instance: dg.DagsterInstance, nightly: Path
) -> None:
    record_training(instance, nightly)
    daemon = Daemon(instance, nightly)
    draw_image(nightly / "data", 20)
    for _ in range(3):
        daemon.both()
    (run,) = daemon.runs
    assert run.tags["reason"].startswith("schedule: ")
    assert f"The run {run.run_id[:8]} trains this LoRA and is not finished (started)" in daemon.reasons[-1]
    instance.report_run_failed(run)
    for _ in range(3):
        daemon.both()
    assert len(daemon.runs) == 1
    assert "for this state of files and settings ended (failure)" in daemon.reasons[-1]

    draw_image(nightly / "data", 21)
    for _ in range(3):
        daemon.both()
    assert len(daemon.runs) == 2
    instance.report_run_canceled(daemon.runs[1])
    daemon.both()
    assert len(daemon.runs) == 2


def test_request_waits_for_a_manual_run_of_the_lora_only(instance: dg.DagsterInstance, nightly: Path) -> None:
    daemon = Daemon(instance, nightly)
    release = launch(instance, nightly, {}, "hub_release")
    manual = launch(instance, nightly, {}, "lora", "evaluation")
    daemon.schedule()
    assert f"The run {manual.run_id[:8]} trains this LoRA" in daemon.reasons[-1]
    instance.report_run_failed(manual)
    daemon.schedule()
    assert len(daemon.runs) == 1
    assert daemon.runs[0].tags["reason"] == "schedule: not trained yet"
    assert not instance.get_run_by_id(release.run_id).is_finished


def test_request_after_overridden_training_starts_the_configured_one(
    instance: dg.DagsterInstance, nightly: Path
) -> None:
    daemon, project = Daemon(instance, nightly), load_project(nightly)
    daemon.schedule()
    instance.report_run_failed(daemon.runs[0])
    overrides = {"learning_rate": "0.009"}
    instance.report_runless_asset_event(
        dg.AssetMaterialization(
            [project.name, "lora"],
            metadata={
                METADATA_ENTRY: project_fingerprint(project, None, overrides),
                OVERRIDES_ENTRY: "learning_rate",
            },
        )
    )
    daemon.both()
    assert len(daemon.runs) == 2
    assert "the last training overrode settings: learning_rate" in daemon.runs[1].tags["reason"]


def test_request_run_that_read_other_files_is_not_repeated(
    instance: dg.DagsterInstance, nightly: Path
) -> None:
    daemon = Daemon(instance, nightly)
    daemon.schedule()
    (run,) = daemon.runs
    materialization = dg.AssetMaterialization(["nightly", "lora"], metadata={METADATA_ENTRY: "another state"})
    event = DagsterEvent(
        dg.DagsterEventType.ASSET_MATERIALIZATION.value,
        run.job_name,
        event_specific_data=StepMaterializationData(materialization),
    )
    instance.report_dagster_event(event, run.run_id)
    success = DagsterEvent(dg.DagsterEventType.RUN_SUCCESS.value, run.job_name)
    instance.report_dagster_event(success, run.run_id)
    daemon.both()
    assert len(daemon.runs) == 1
    assert "ended (success), and nothing has changed since" in daemon.reasons[-1]


def test_request_concurrent_schedule_and_sensor_start_one_run(
    instance: dg.DagsterInstance, nightly: Path
) -> None:
    record_training(instance, nightly)
    draw_image(nightly / "data", 20)
    first = tick(instance, nightly)
    assert isinstance(first, dg.SensorResult)
    schedule = build_schedule(load_project(nightly))
    assert schedule is not None
    requested = schedule(dg.build_schedule_context(instance=instance))  # its run is not in the instance yet
    assert isinstance(requested, dg.RunRequest)
    skipped = tick(instance, nightly, first.cursor)
    assert isinstance(skipped, dg.SkipReason)
    assert skipped.skip_message == "The schedule has just requested a run of this project."
    repeated = schedule(dg.build_schedule_context(instance=instance))  # the daemon was restarted in between
    assert isinstance(repeated, dg.RunRequest)


def test_request_invalid_project_skips_with_its_problems(instance: dg.DagsterInstance, nightly: Path) -> None:
    daemon = Daemon(instance, nightly)
    schedule, sensor = build_schedule(load_project(nightly)), build_sensor(load_project(nightly))
    assert schedule is not None
    (nightly / "config.json").write_text('{"lora_rank": 0}')
    for answer in (
        schedule(dg.build_schedule_context(instance=instance)),
        sensor(dg.build_sensor_context(instance=instance)),
    ):
        assert isinstance(answer, dg.SkipReason)
        assert "lora_rank" in str(answer.skip_message)
    assert not daemon.runs


def test_schedule_reads_settings_changed_after_loading(instance: dg.DagsterInstance, nightly: Path) -> None:
    schedule = build_schedule(load_project(nightly))
    assert schedule is not None
    config = nightly / "config.json"
    config.write_text(config.read_text().replace('"lora_rank": 4', '"lora_rank": 8'))
    record_training(instance, nightly)  # by a run, which reads the files again
    assert isinstance(schedule(dg.build_schedule_context(instance=instance)), dg.SkipReason)


def prune_event(
    instance: dg.DagsterInstance, root: Path, storage: Path, **config: bool
) -> dg.AssetObservation:
    job = build_prune_job(root)
    result = job.execute_in_process(
        instance=instance,
        resources={"storage": Storage(root=str(storage))},
        run_config={"ops": {"garbage_collect": {"config": config}}},
    )
    (event,) = (
        event.event_specific_data
        for event in result.all_events
        if event.is_step_materialization or event.event_type_value == "ASSET_OBSERVATION"
    )
    return getattr(event, "materialization", None) or event.asset_observation


def test_prune_job_metadata_has_freed_bytes_and_entries(
    instance: dg.DagsterInstance, make_project: Callable[..., Path], tmp_path: Path
) -> None:
    root, storage = make_project(images=0).parent, tmp_path / "storage"
    store = TensorStore(storage / "latents")
    with store.writer() as writer:
        writer.add("a" * 64, {"mean": torch.zeros(1000)})
    (shard,) = (storage / "latents" / "shards").iterdir()
    size = shard.stat().st_size

    preview = prune_event(instance, root, storage, dry_run=True)
    assert isinstance(preview, dg.AssetObservation)
    assert preview.metadata["bytes_to_free"].value == size
    assert shard.exists()

    freed = prune_event(instance, root, storage)
    assert isinstance(freed, dg.AssetMaterialization)
    assert freed.metadata["bytes_freed"].value == size
    assert freed.metadata["entries"].value == 1
    assert not shard.exists()


def test_prune_job_without_projects_fails_with_a_message(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    with pytest.raises(dg.Failure, match="Nothing is freed: the projects folder"):
        prune_event(instance, tmp_path / "typo", tmp_path / "storage")


def test_definitions_have_the_prune_job(make_project: Callable[..., Path]) -> None:
    definitions = build_definitions(make_project(images=0).parent)
    assert definitions.get_job_def("prune").name == "prune"
