"""A LoRA trained with overridden settings is stale in the UI, due for automation, and not released by accident."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest

from assets.hub_release import plain_overrides
from resources.hardware import HardwareProfile
from resources.trackers import TrackerResource
from sdxl_pipeline.automation import trained_fingerprint
from sdxl_pipeline.config.loader import load_project
from sdxl_pipeline.data.scan.dataset_fingerprint import project_fingerprint
from sdxl_pipeline.definitions import build_definitions
from sdxl_pipeline.release.release_inputs import portable_lineage
from sdxl_pipeline.runtime.specs import SettingDifference, TrainedLora
from tests.support.asset_graph import DATASET_STAGES, InProcessStageClient, metadata, stage_key

CONFIG = {
    "eval_holdout_share": 0,
    "evaluation_type": "none",
    "eval_loss_disable": True,
    "num_eval_images": 2,
    "validation_disable": True,
    "max_train_steps": 1,
    "validation_resolution": "64x64",
    "validation_num_inference_steps": 1,
}
LORA = "small__lora"


class Runs:
    """Repeated materializations of one project on one instance."""

    def __init__(self, instance: dg.DagsterInstance, folder: Path) -> None:
        self.instance, self.folder = instance, folder
        self.materialize("base_model", *DATASET_STAGES, "training_set")

    def materialize(
        self, *stages: str, ops: dict[str, Any] | None = None, **resources: Any
    ) -> dg.ExecuteInProcessResult:
        definitions = build_definitions(self.folder.parent)
        keys = [stage_key("small", stage) for stage in stages]
        return dg.materialize(
            list(definitions.assets or []),
            selection=dg.AssetSelection.assets(*keys),
            resources={**(definitions.resources or {}), "launcher": InProcessStageClient(), **resources},
            instance=self.instance,
            run_config={"ops": {name: {"config": config} for name, config in (ops or {}).items()}},
        )

    def train(self, settings: dict[str, Any] | None = None, **resources: Any) -> dict[str, Any]:
        """Return the metadata of `lora`, with the result of its check as `passed` and `check_message`."""
        ops = {LORA: {"settings": settings}} if settings else None
        result = self.materialize("lora", ops=ops, **resources)
        (check,) = [
            each
            for each in result.get_asset_check_evaluations()
            if each.check_name == "trained_as_configured"
        ]
        assert check.severity is dg.AssetCheckSeverity.WARN
        assert not check.blocking
        return metadata(result, "small", "lora") | {
            "passed": check.passed,
            "check_message": check.description,
        }

    def status(self, asset: str) -> StaleStatus:
        graph = build_definitions(self.folder.parent).resolve_asset_graph()
        resolver = CachingStaleStatusResolver(self.instance, graph, LoadingContextForTest(self.instance))
        return resolver.get_status(dg.AssetKey(["small", asset]))

    def is_current(self) -> bool:
        """Return whether schedule and sensor have no run to request."""
        project = load_project(self.folder)
        return trained_fingerprint(self.instance, project) == project_fingerprint(project)


@pytest.fixture
def runs(instance: dg.DagsterInstance, make_project: Callable[..., Path]) -> Runs:
    return Runs(instance, make_project(images=4, config=CONFIG))


def test_lora_overridden_settings_is_stale_until_trained_as_configured(runs: Runs) -> None:
    configured = runs.train()
    assert configured["passed"]
    assert "setting_differences" not in configured
    assert (runs.status("lora"), runs.is_current()) == (StaleStatus.FRESH, True)

    overridden = runs.train({"learning_rate": 0.009, "lora_rank": 2, "checkpoint_step_interval": 1})
    assert overridden["identity"] != configured["identity"]
    assert not overridden["passed"]
    assert "learning_rate: 0.009 instead of 0.001" in overridden["check_message"]
    rows = overridden["setting_differences"].splitlines()
    assert "| `learning_rate` | 0.001 | 0.009 | yes |" in rows
    assert "| `lora_rank` | 4 | 2 | yes |" in rows
    assert "| `lora_alpha` | 4.0 | 2.0 | yes |" in rows
    assert "| `checkpoint_step_interval` | 2 | 1 | no |" in rows
    assert len(rows) == 2 + 4
    assert (runs.status("lora"), runs.is_current()) == (StaleStatus.STALE, False)

    second = runs.train()
    assert "reused" in second["summary"]
    assert second["identity"] == configured["identity"]
    assert second["passed"]
    assert (runs.status("lora"), runs.is_current()) == (StaleStatus.FRESH, True)

    config = json.loads((runs.folder / "config.json").read_text())
    (runs.folder / "config.json").write_text(json.dumps(config | {"learning_rate": 0.009, "lora_rank": 2}))
    assert (runs.status("lora"), runs.is_current()) == (StaleStatus.STALE, False)
    reconfigured = runs.train()
    assert reconfigured["identity"] == overridden["identity"]
    assert reconfigured["passed"]
    assert (runs.status("lora"), runs.is_current()) == (StaleStatus.FRESH, True)


def test_lora_overrides_without_effect_on_weights_are_listed_and_it_stays_current(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    configured = runs.train()
    shown = runs.train(
        {"gradient_checkpointing": True, "released_weights": "ema", "resume_from_checkpoint": "none"},
        trackers=TrackerResource(report_to=["tensorboard"], logging_dir=str(tmp_path / "logs")),
    )
    assert shown["identity"] == configured["identity"]
    for row in (
        '| `report_to` | [] | ["tensorboard"] | no |',
        "| `gradient_checkpointing` | false | true | no |",
        '| `resume_from_checkpoint` | "latest" | null | no |',
    ):
        assert row in shown["setting_differences"].splitlines()
    assert shown["passed"]
    assert (runs.status("lora"), runs.is_current()) == (StaleStatus.FRESH, True)


@pytest.mark.usefixtures("fresh_accelerator")
def test_lora_hardware_profile_that_changes_weights_is_an_override(runs: Runs) -> None:
    shown = runs.train(hardware=HardwareProfile(profile="cpu", mixed_precision="bf16", cpu_threads=1))
    assert '| `mixed_precision` | "no" | "bf16" | yes |' in shown["setting_differences"]
    assert "| `cpu_threads` | null | 1 | no |" in shown["setting_differences"]
    assert shown["overridden_settings"] == "mixed_precision"
    assert not shown["passed"]
    assert (runs.status("lora"), runs.is_current()) == (StaleStatus.STALE, False)


class RecordingStageClient(InProcessStageClient):
    """Stores the spec of each stage in `SPECS`."""

    def run_stage(
        self, context: dg.AssetExecutionContext, stage: str, spec: Any, *args: Any, **kwargs: Any
    ) -> Any:
        SPECS[stage] = spec
        return super().run_stage(context, stage, spec, *args, **kwargs)


SPECS: dict[str, Any] = {}


def test_hub_release_overridden_lora_requires_its_identity(
    runs: Runs,
) -> None:
    trained = runs.train({"train_batch_size": 1, "lora_rank": 2})
    assert runs.materialize("evaluation", launcher=RecordingStageClient()).success
    assert (SPECS["evaluate"].settings.lora_rank, SPECS["evaluate"].settings.train_batch_size) == (2, 1)

    with pytest.raises(dg.Failure) as error:
        runs.materialize("hub_release")
    message = str(error.value.description)
    assert "lora_rank: 2 instead of 4" in message
    lines = message.splitlines()
    launchpad = yaml.safe_load(lines[1])["ops"]["small__hub_release"]["config"]
    command = shlex.split(lines[3])
    assert command[command.index("--select") + 1] == 'key:"small/hub_release"'
    assert json.loads(command[-1]) == {"ops": {"small__hub_release": {"config": launchpad}}}
    assert not (runs.folder / "output" / "release").exists()

    for wrong in ("0" * 16, trained["identity"][:7]):
        with pytest.raises(dg.Failure, match="is not the identity of the current LoRA"):
            runs.materialize("hub_release", ops={"small__hub_release": {"promote": wrong}})
    released = metadata(
        runs.materialize("hub_release", ops={"small__hub_release": launchpad}), "small", "hub_release"
    )
    lineage = json.loads((Path(released["folder"]) / "lineage.json").read_text())
    assert lineage["overrides"] == {
        "lora_rank": {"configured": 4, "used": 2},
        "lora_alpha": {"configured": 4.0, "used": 2.0},
        "train_batch_size": {"configured": 2, "used": 1},
    }


def test_plain_overrides_local_path_is_removed_by_portable_lineage() -> None:
    override = SettingDifference(
        setting="init_lora", configured="null", used='"/home/someone/start.safetensors"'
    )
    lora = TrainedLora.model_construct(overrides=(override,))
    assert portable_lineage(plain_overrides(lora)) == {
        "init_lora": {"configured": None, "used": "start.safetensors"}
    }


@pytest.mark.slow
def test_hub_release_command_in_the_error_releases_the_lora(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs.train({"lora_rank": 2})
    runs.materialize("evaluation")
    with pytest.raises(dg.Failure) as error:
        runs.materialize("hub_release")
    command = shlex.split(str(error.value.description).splitlines()[3])
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SDXL_PIPELINE_PROJECTS", str(runs.folder.parent))
    without_promote = subprocess.run(
        [sys.executable, "-m", *command[:-2]], capture_output=True, text=True, timeout=300, check=False
    )
    assert without_promote.returncode != 0
    assert "Not released: the LoRA" in without_promote.stderr
    subprocess.run([sys.executable, "-m", *command], check=True, timeout=300)
    assert (runs.folder / "output" / "release" / "lineage.json").is_file()
