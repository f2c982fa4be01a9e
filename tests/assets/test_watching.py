"""A training launched from the graph logs its images as observations, calls its webhook, and stores the address nowhere."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from tests.support.asset_graph import DATASET_STAGES, materialize

SECRET = "t0ken-nobody-may-see"
CONFIG = {
    "webhook_config": "webhooks.json",
    "webhook_reporting_interval": 1,
    "validation_preview": True,
    "eval_steps_interval": 2,
}


@pytest.mark.slow
def test_lora_validation_and_webhook_are_reported_without_storing_the_address(
    instance: dg.DagsterInstance,
    make_project: Callable[..., Path],
    isolated_storage: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            kinds.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["message_type"])
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    folder = make_project(config=CONFIG)
    address = f"http://127.0.0.1:{server.server_address[1]}/{SECRET}"
    file = folder / "webhooks.json"
    file.write_text(json.dumps({"webhook_type": "raw", "callback_url": address}))
    monkeypatch.setenv("SDXL_PIPELINE_PROJECTS", str(folder.parent))
    result = materialize(
        instance, folder, "base_model", *DATASET_STAGES, "training_set", "lora", in_process=False
    )
    server.shutdown()
    server.server_close()

    assert result.success
    assert (kinds[0], kinds[-1]) == ("training.started", "training.finished")
    # a preview replaces one that is still queued
    assert 1 <= kinds.count("validation.preview") <= 4
    assert {kind: kinds.count(kind) for kind in kinds if kind != "validation.preview"} == {
        "training.started": 1,
        "training.progress": 3,
        "eval.loss": 3,  # before the first step, after the second, and at the end
        "validation.images": 2,
        "training.finished": 1,
    }
    observations = [
        event.asset_observation_data.asset_observation for event in result.get_asset_observation_events()
    ]
    image_names = {str(item.metadata["name"].value) for item in observations if "image" in item.metadata}
    assert {"validation", "validation (preview)"} <= image_names
    assert "eval/loss" in {name for item in observations for name in item.metadata}
    (lora,) = result.asset_materializations_for_node("small__lora")
    assert lora.metadata["eval_loss"].value > 0
    for root in (folder / "output", isolated_storage):
        for path in root.rglob("*"):
            assert not path.is_file() or SECRET.encode() not in path.read_bytes()
    assert SECRET not in str(instance.all_logs(result.run_id))
