"""Reporter: throttling by a fake clock, Pipes messages, plain lines, and a real terminal."""

import io
import json
import os
import pty
import subprocess
import sys
import textwrap
from pathlib import Path

import dagster as dg
import pytest

from sdxl_pipeline.runtime.reporter import (
    MAX_EVENT_LOG_LINES,
    METRIC_INTERVAL_SECONDS,
    PROGRESS_INTERVAL_SECONDS,
    PipesReporter,
    PlainReporter,
    Reporter,
    open_reporter,
)

REPOSITORY = Path(__file__).parents[2]


class Recorder(Reporter):
    """Records the reports that are not throttled."""

    def __init__(self, clock):
        super().__init__(clock)
        self.progresses = []
        self.metrics = []

    def _show_progress(self, task, done, total, unit):
        self.progresses.append((task, done, total))

    def _show_metric(self, step, values):
        self.metrics.append((step, values))


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_reporter_of_many_calls_at_once_shows_the_first_and_the_last(clock):
    reporter = Recorder(clock)
    for done in range(1, 100_001):
        reporter.progress("encode", done, 100_000)
        reporter.metric(done, {"loss": 1.0})
    reporter.close()
    assert reporter.progresses == [("encode", 1, 100_000), ("encode", 100_000, 100_000)]
    assert [step for step, _ in reporter.metrics] == [1, 100_000]


def test_progress_of_a_finished_task_is_shown_once(clock):
    reporter = Recorder(clock)
    for _ in range(1000):
        reporter.progress("encode", 3, 3)
    assert reporter.progresses == [("encode", 3, 3)]


def test_progress_is_shown_once_per_interval_and_task(clock):
    reporter = Recorder(clock)
    for done in range(1, 6):
        reporter.progress("encode", done, 100)
        reporter.progress("decode", done, 100)
        clock.now += PROGRESS_INTERVAL_SECONDS / 2
    assert reporter.progresses == [(task, done, 100) for done in (1, 3, 5) for task in ("encode", "decode")]


def test_metrics_are_throttled_per_set_of_names(clock):
    reporter = Recorder(clock)
    for step in range(10):
        reporter.metric(step, {"loss": 0.5})
    reporter.metric(10, {"eval_loss": 0.4})
    reporter.close()
    assert reporter.metrics == [(0, {"loss": 0.5}), (10, {"eval_loss": 0.4}), (9, {"loss": 0.5})]


def test_close_does_not_repeat_shown_metrics(clock):
    reporter = Recorder(clock)
    for step in range(3):
        reporter.metric(step, {"loss": 0.5})
        clock.now += METRIC_INTERVAL_SECONDS
    reporter.close()
    assert [step for step, _ in reporter.metrics] == [0, 1, 2]


def test_reporter_of_a_day_of_steps_shows_some_thousands_of_messages(clock):
    reporter = Recorder(clock)
    seconds = 24 * 3600
    for done in range(seconds):
        reporter.progress("train", done, seconds)
        reporter.metric(done, {"loss": 1.0})
        clock.now += 1
    assert 1000 < len(reporter.progresses) < 5000
    assert 1000 < len(reporter.metrics) < 5000


def test_plain_reporter_formats_lines(tmp_path, clock):
    stream = io.StringIO()
    with PlainReporter(stream, clock) as reporter:
        reporter.log("hello")
        reporter.progress("encode latents", 12, 48, "images")
        reporter.metric(7, {"loss": 0.123456, "lr": 1e-4})
        reporter.image("red_star", tmp_path / "20.png", "a red star", step=20)
    assert stream.getvalue().splitlines() == [
        "hello",
        "encode latents: 12 of 48 images (25 %)",
        "step 7: loss 0.1235, lr 0.0001",
        f"image red_star at step 20: {tmp_path}/20.png (a red star)",
    ]


class FakeLog:
    def __init__(self):
        self.lines = []

    def info(self, line):
        self.lines.append(line)


class FakePipes:
    """Accepts only messages that Pipes can send: JSON."""

    def __init__(self):
        self.messages = []
        self.log = FakeLog()

    def report_custom_message(self, payload):
        self.messages.append(json.loads(json.dumps(payload, allow_nan=False)))


def test_pipes_reporter_sends_all_fields_and_non_finite_numbers(tmp_path, clock):
    pipes, stream = FakePipes(), io.StringIO()
    with PipesReporter(pipes, stream, clock) as reporter:
        reporter.progress("train", 1, 2, "steps")
        reporter.metric(1, {"loss": float("nan"), "lr": 0.5})
        reporter.image("a", tmp_path / "a.png", step=1)
    assert pipes.messages == [
        {"type": "progress", "task": "train", "done": 1, "total": 2, "unit": "steps"},
        {"type": "metric", "step": 1, "values": {"loss": "nan", "lr": 0.5}},
        {"type": "image", "name": "a", "path": str(tmp_path / "a.png"), "caption": "", "step": 1},
    ]
    assert len(stream.getvalue().splitlines()) == 3


def test_pipes_reporter_beyond_the_log_limit_writes_to_stdout_only(clock):
    pipes, stream = FakePipes(), io.StringIO()
    reporter = PipesReporter(pipes, stream, clock)
    for number in range(MAX_EVENT_LOG_LINES + 500):
        reporter.log(str(number))
    assert len(pipes.log.lines) == MAX_EVENT_LOG_LINES
    assert "stdout only" in pipes.log.lines[-1]
    assert len(stream.getvalue().splitlines()) == MAX_EVENT_LOG_LINES + 500


REPORTING_PROGRAM = textwrap.dedent("""
    from sdxl_pipeline.runtime.reporter import open_reporter
    with open_reporter() as reporter:
        reporter.log("[hello]")
        reporter.progress("encode", 1, 4, "images")
        reporter.progress("encode", 4, 4, "images")
        reporter.metric(3, {"loss": 0.5})
""")


def test_open_reporter_under_dagster_sends_pipes_messages():
    received = []

    @dg.asset
    def reporting_asset(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with dg.open_pipes_session(
            context, dg.PipesEnvContextInjector(), dg.PipesTempFileMessageReader()
        ) as session:
            environment = {**os.environ, **session.get_bootstrap_env_vars()}
            subprocess.run(
                [sys.executable, "-c", REPORTING_PROGRAM], cwd=REPOSITORY, env=environment, check=True
            )
        received.extend(session.get_custom_messages())
        return dg.MaterializeResult()

    with dg.instance_for_test() as instance:
        result = dg.materialize([reporting_asset], instance=instance)
        logged = [entry.user_message for entry in instance.all_logs(result.run_id)]
    assert [(message["type"], message.get("done")) for message in received] == [
        ("progress", 1),
        ("progress", 4),
        ("metric", None),
    ]
    assert "[hello]" in logged


def test_open_reporter_on_a_terminal_shows_progress_bars():
    terminal, program_end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    stage = subprocess.Popen(
        [sys.executable, "-c", REPORTING_PROGRAM],
        cwd=REPOSITORY,
        env=environment,
        stdout=program_end,
        stderr=program_end,
    )
    os.close(program_end)
    output = b""
    try:
        while chunk := os.read(terminal, 65536):
            output += chunk
    except OSError:  # Linux: the other end of the terminal is closed
        pass
    os.close(terminal)
    assert stage.wait(timeout=60) == 0
    text = output.decode()
    assert "━━━━" in text
    assert "4/4" in text
    assert "[hello]" in text, "square brackets are rich's markup and must be left alone"
    assert "step 3: loss 0.5" in text


def test_open_reporter_on_rank_1_is_silent(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with open_reporter() as reporter:
        reporter.log("hello")
        reporter.progress("encode", 1, 1)
    assert capsys.readouterr().out == ""
