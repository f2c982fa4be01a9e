"""The stage client with real stages and a real Dagster instance: manifests, messages, failures, and stopping all processes."""

import os
import signal
import sys
from pathlib import Path

import dagster as dg
import psutil
import pytest

from tests.resources.sleepy_asset import launcher, sleepy, sleepy_with_a_retry
from tests.resources.worker import Worker, wait_until_gone
from tests.stages.sleepy_stage import SleepyManifest, SleepySpec
from tests.support.processes import runs, wait_for, wait_for_number

FOREVER = 100_000


@pytest.fixture(scope="module")
def instance():
    with dg.instance_for_test() as module_instance:
        yield module_instance


def materialize(
    spec: SleepySpec, monkeypatch: pytest.MonkeyPatch, instance: dg.DagsterInstance, asset=sleepy
):
    monkeypatch.setenv("SLEEPY_SPEC", spec.model_dump_json())
    return dg.materialize(
        [asset], resources={"launcher": launcher()}, instance=instance, raise_on_error=False
    )


def step_failure(result):
    """Return the failure event of the last attempt."""
    (event,) = [event for event in result.all_events if event.is_step_failure]
    return event.step_failure_data


def test_run_stage_returns_the_manifest_and_relays_messages(tmp_path, work_dir, monkeypatch, instance):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.chdir(tmp_path)
    result = materialize(SleepySpec(folder=tmp_path, steps=60), monkeypatch, instance)
    assert result.success
    records = [
        record
        for record in instance.fetch_observations(sleepy.key, limit=1000).records
        if record.run_id == result.run_id
    ]
    points = [record.asset_observation.metadata for record in reversed(records)]
    logged = [entry.user_message for entry in instance.all_logs(result.run_id)]

    manifest = SleepyManifest.model_validate_json((work_dir / "sleepy_stage.manifest.json").read_text())
    (materialization,) = result.asset_materializations_for_node("sleepy")
    assert materialization.metadata["steps"].value == manifest.steps == 60
    assert manifest.environment["HF_TOKEN"] == "hf_secret", "the environment carries the token"
    assert "hf_secret" not in (work_dir / "sleepy_stage.spec.json").read_text()
    assert manifest.environment["TQDM_DISABLE"] == "1"
    assert manifest.environment["TRANSFORMERS_VERBOSITY"] == "info", "a value set by the user is not replaced"
    assert manifest.environment["EXTRA"] == "yes"

    steps = [point["step"].value for point in points]
    assert (steps[0], steps[-1]) == (1, 60)
    assert len(steps) <= 12, "metric_points is 10"
    assert all(point["loss"].value == pytest.approx(1 / point["step"].value) for point in points)
    assert "count: 60 of 60 steps (100 %)" in logged
    assert "counted" in logged
    assert f"image dot at step 60: {tmp_path}/dot.png (a dot)" in logged


@pytest.mark.slow
def test_run_stage_concurrent_runs_use_separate_specs_and_manifests(tmp_path, work_dir):
    """Two runs of one project, as with a pool of two, count to their own number of steps."""
    workers = []
    for steps in (3, 4):
        folder = tmp_path / str(steps)
        folder.mkdir()
        spec = SleepySpec(folder=folder, steps=steps, wait_for=tmp_path / "go")
        workers.append(Worker(spec, work_dir))
    specs = lambda: list(work_dir.glob("sleepy_stage.*.spec.json"))  # noqa: E731
    wait_for(lambda: len(specs()) == 2, 60, "both specs written")
    (tmp_path / "go").touch()
    assert [worker.end() for worker in workers] == [0, 0], workers[0].output + workers[1].output
    for worker, steps in zip(workers, (3, 4), strict=True):
        assert f"count: {steps} of {steps} steps" in worker.output
    names = {path.name for path in work_dir.iterdir()}
    assert names == {"sleepy_stage.spec.json", "sleepy_stage.manifest.json", "sleepy_stage.lock"}


@pytest.mark.parametrize(
    ("ending", "attempts", "message"),
    [
        ("user", 1, "steps: 7 is unlucky; write 8"),
        ("out_of_memory", 1, "Lower train_batch_size"),
        ("crash", 2, "Stage sleepy_stage failed: RuntimeError: the floor gave way"),
        (
            "killed",
            2,
            "was killed by SIGKILL. Often the kernel does this when the machine runs out of memory.",
        ),
    ],
)
def test_run_stage_failed_stage_raises_its_message_and_retries_only_crashes(
    tmp_path, work_dir, monkeypatch, instance, ending, attempts, message
):
    result = materialize(
        SleepySpec(folder=tmp_path, ending=ending), monkeypatch, instance, sleepy_with_a_retry
    )
    assert not result.success
    failure = step_failure(result)
    assert message in failure.user_failure_data.description
    assert (tmp_path / "starts").read_text() == "x" * attempts
    if ending == "crash":
        assert "in main" in failure.user_failure_data.metadata["traceback"].value


def test_run_stage_interrupted_saves_and_ends_the_process_group(tmp_path, work_dir):
    spec = SleepySpec(folder=tmp_path, steps=FOREVER, save_seconds=1.5, helper=True)
    worker = Worker(spec, work_dir)
    pids = worker.started("stage-0", "helper-0")
    os.kill(worker.process.pid, signal.SIGINT)
    wait_for_number(tmp_path / "saving")
    os.kill(worker.process.pid, signal.SIGINT)  # a second Ctrl-C during the save
    os.kill(worker.process.pid, signal.SIGTERM)
    assert worker.end() != 0
    assert (tmp_path / "saved").exists()
    assert not any(runs(pid) for pid in pids), "the step ended before its processes"
    assert "stopping stage sleepy_stage" in worker.output


@pytest.mark.slow
def test_run_stage_unresponsive_stage_is_killed_after_the_timeout(tmp_path, work_dir):
    spec = SleepySpec(folder=tmp_path, steps=FOREVER, stubborn=True, helper=True)
    worker = Worker(spec, work_dir, SLEEPY_STOP_TIMEOUT="1")
    pids = worker.started("stage-0", "helper-0")
    os.kill(worker.process.pid, signal.SIGINT)
    assert worker.end(seconds=20) != 0
    assert not any(runs(pid) for pid in pids)
    assert not (tmp_path / "saved").exists()


def test_run_stage_killed_worker_stage_saves_and_ends(tmp_path, work_dir):
    spec = SleepySpec(folder=tmp_path, steps=FOREVER, save_seconds=0.5, helper=True)
    worker = Worker(spec, work_dir)
    pids = worker.started("stage-0", "helper-0")
    worker.process.kill()
    worker.end()
    wait_until_gone(pids)
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
def test_run_stage_killed_worker_ends_an_unresponsive_stage(tmp_path, work_dir):
    spec = SleepySpec(folder=tmp_path, steps=FOREVER, stubborn=True, helper=True)
    worker = Worker(spec, work_dir, SLEEPY_STOP_TIMEOUT="1")
    pids = worker.started("stage-0", "helper-0")
    worker.process.kill()
    worker.end()
    wait_until_gone(pids)


TRAIN = {"SLEEPY_STAGE": "tests.stages.distributed.train", "SLEEPY_PROCESSES": "2"}


@pytest.mark.slow
def test_run_stage_train_on_two_devices_has_two_ranks_and_one_manifest(tmp_path, work_dir):
    worker = Worker(SleepySpec(folder=tmp_path), work_dir, **TRAIN)
    assert worker.end() == 0, worker.output
    assert (tmp_path / "done-1").exists()
    manifest = SleepyManifest.model_validate_json((work_dir / "train.manifest.json").read_text())
    assert (manifest.environment["RANK"], manifest.environment["WORLD_SIZE"]) == ("0", "2")


def test_run_stage_other_stages_use_one_process(tmp_path, work_dir, monkeypatch, instance):
    monkeypatch.setenv("SLEEPY_PROCESSES", "2")
    assert materialize(SleepySpec(folder=tmp_path), monkeypatch, instance).success
    assert not (tmp_path / "done-1").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_run_stage_stopped_or_killed_worker_all_ranks_save_and_end(tmp_path, work_dir, number):
    spec = SleepySpec(folder=tmp_path, steps=FOREVER, helper=True)
    worker = Worker(spec, work_dir, **TRAIN)
    pids = worker.started("stage-0", "stage-1", "helper-0", "helper-1")
    agent = psutil.Process(pids[0]).ppid()
    os.kill(worker.process.pid, number)
    worker.end()
    wait_until_gone([*pids, agent])
    assert (tmp_path / "saved").exists()


def test_dagster_command_stores_stdout_and_stops_the_stage(tmp_path, work_dir):
    """In a run from the command line or the UI, the step is a process of the multiprocess executor, which gets the signal."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    command = [
        str(Path(sys.executable).with_name("dagster")),
        *["asset", "materialize", "-m", "tests.resources.sleepy_asset", "--select", "sleepy"],
    ]
    spec = SleepySpec(folder=tmp_path, steps=FOREVER, helper=True, save_seconds=1.0)
    worker = Worker(spec, work_dir, command, DAGSTER_HOME=str(home))
    step, *pids = worker.started("worker", "stage-0", "helper-0")
    assert step != worker.process.pid
    os.kill(worker.process.pid, signal.SIGINT)
    assert worker.end() != 0
    assert (tmp_path / "saved").exists()
    wait_until_gone([step, *pids])
    stored = "".join(path.read_text() for path in (home / "storage").rglob("*.out"))
    assert "stdout of rank 0" in stored


def test_run_any_module_returns_a_pipes_invocation_with_the_exit_code(tmp_path, monkeypatch, instance):
    client, invocations = launcher(), []
    (tmp_path / "exits.py").write_text("import sys; sys.exit(int(sys.argv[1]))")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    @dg.asset
    def caller(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        invocations.append(client.run(context=context, module="exits", arguments=["3"]))
        return invocations[0].get_materialize_result()

    assert isinstance(client, dg.PipesClient)
    assert dg.materialize([caller], instance=instance).success
    assert invocations[0].metadata == {"exit_code": dg.IntMetadataValue(3)}
