"""`sdxl-pipeline runs` and `sdxl-pipeline release`."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdxl_pipeline.cli import release
from sdxl_pipeline.cli.main import main
from sdxl_pipeline.config.loader import PROJECTS_VARIABLE
from sdxl_pipeline.evaluation.history import mark_released, record_evaluation
from tests.evaluation.test_report import make_report
from tests.support.finished_run import write_finished_run

FIRST, SECOND = "a" * 64, "b" * 64


@pytest.fixture
def output(make_project, monkeypatch) -> Path:
    """Return the output folder of a project with two finished runs, the first of which was evaluated and released."""
    folder = make_project(images=1)
    monkeypatch.setenv(PROJECTS_VARIABLE, str(folder.parent))
    monkeypatch.setenv("COLUMNS", "240")
    output = folder / "output"
    for identity in (FIRST, SECOND):
        run_dir = output / "lora" / identity[:16]
        write_finished_run(run_dir, identity, eval_losses=((0, 0.2), (12, 0.1)))
        rows = [{"step": step, "loss": 1 / step, "lr": 1e-4, "grad_norm": 1.0, "samples_per_second": 2.0} for step in range(1, 13)]  # fmt: skip
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = make_report(folder, run_identity=FIRST, step=6)
    record_evaluation(output, report, ["not_overfitted"], datetime(2026, 3, 1, tzinfo=UTC))
    mark_released(output, report.identity, "r-0123456789ab")
    return output


def test_runs_lists_evaluations_and_runs_without_one(output, capsys):
    assert main(["runs", "small"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (evaluated,) = [line.split() for line in lines if FIRST[:16] in line]
    assert {"6", "not_overfitted", "r-0123456789ab"} <= set(evaluated)
    (unevaluated,) = [line for line in lines if SECOND[:16] in line]
    assert "not evaluated" in unevaluated


def test_runs_in_a_narrow_terminal_prints_whole_values(output, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["runs", "small"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [line.split("  ")[1] for line in lines if line.startswith("20")] == [FIRST[:16], SECOND[:16]]
    assert {"step: 6", "failed checks: not_overfitted", "released: r-0123456789ab", "step: 12"} <= set(lines)


def test_runs_json_has_each_run_with_its_evaluations(output, capsys):
    assert main(["runs", str(output.parent), "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)
    assert [(run["run"], len(run["evaluations"]), run["steps"]) for run in runs] == [
        (FIRST, 1, 12),
        (SECOND, 0, 12),
    ]
    assert runs[0]["evaluations"][0]["released"] == "r-0123456789ab"


def test_runs_compare_writes_a_plot_and_names_it(output, capsys):
    assert main(["runs", "small", "--compare", FIRST[:8], SECOND[:12]]) == 0
    path = output / "runs_aaaaaaaa_bbbbbbbb.png"
    assert str(path) in capsys.readouterr().out
    with Image.open(path) as image:
        assert image.format == "PNG"
    other = output / "other.png"
    assert main(["runs", "small", "--compare", FIRST[:8], SECOND[:8], "--output", str(other)]) == 0
    assert other.is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs", "small", "--compare", "a" * 8, "c" * 8], "no finished run begins with 'cccccccc'"),
        (["runs", "large"], "there are: small"),
        (["release", "small", "--run", "c" * 8], f"Finished runs: {FIRST[:16]}, {SECOND[:16]}"),
        (["release", "small", "--run", "a"], "'a' is too short for a run"),
    ],
)
def test_unknown_project_or_run_is_reported(output, capsys, arguments, message):
    assert main(arguments) == 1
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        ([], {}),
        (
            ["--run", FIRST[:8]],
            {
                "small__evaluation": {"config": {"run": FIRST}},
                "small__hub_release": {"config": {"promote": FIRST}},
            },
        ),
        (["--checkpoint", "step-6"], {"small__evaluation": {"config": {"checkpoint": "step-6"}}}),
    ],
)
def test_release_materializes_evaluation_and_release_of_the_run(output, monkeypatch, arguments, config):
    calls: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        release, "materialize", lambda selection, run_config: calls.append((selection, run_config)) or 0
    )
    assert main(["release", "small", *arguments]) == 0
    assert calls == [('key:"small/evaluation" or key:"small/hub_release"', {"ops": config} if config else {})]
