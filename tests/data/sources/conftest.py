"""Fixtures of the source tests: datasets, a Hub server, a web server with injected faults, and an S3 server."""

import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.sources import download
from tests.support.hub_server import HubServer
from tests.support.remote_sources import Bucket, Web


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "initial_wait_seconds", 0.01)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return tmp_path / "storage" / "sources"


@pytest.fixture
def make() -> Callable[..., ImageDataset]:
    """Return a function that builds a validated dataset entry."""

    def dataset(**settings: Any) -> ImageDataset:
        return ImageDataset.model_validate({"id": "cats", "resolution": 64, **settings})

    return dataset


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.adopt_process(monkeypatch, tmp_path / "hf_home")
        yield server


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if self.command == "GET":
                web.requested[path] += 1
            fault = (web.faults.get(path) or [None]).pop(0)
            kind, data = web.pages.get(path, ("text/html", b"not here"))
            status, headers = (200 if path in web.pages else 404), {}
            length = len(data)
            if fault is not None:
                status, headers, body = fault
                data = data[: len(data) // 2] if body is None else body
                length = length if body is None else len(data)
            self.send_response(status)
            etag = {"ETag": f'"{hash(data)}"'}
            for name, value in {
                "Content-Type": kind,
                "Content-Length": str(length),
                **etag,
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                if path in web.stalls:
                    self.wfile.write(data[: web.stalls[path]])
                    web.stalled.set()
                    web.go_on.wait(60)
                    return
                self.wfile.write(data)
            self.close_connection = length != len(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    web.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield web
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[str, list[tuple[str, str]], list[int]]]:
    """Run an S3 server; yield its URL, its requests, and a list of error statuses for the next downloads."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    requested: list[tuple[str, str]] = []
    faults: list[int] = []
    backend = DomainDispatcherApplication(create_backend_app)

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        requested.append((method, path))
        if method == "GET" and path.endswith(".png") and faults:
            start_response(f"{faults.pop(0)} Injected", [("Content-Length", "0")])
            return []
        return backend(environ, start_response)

    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requested, faults
    server.shutdown()
    thread.join()


@pytest.fixture
def bucket(
    s3_server: tuple[str, list[tuple[str, str]], list[int]], monkeypatch: pytest.MonkeyPatch
) -> Bucket:
    """Return an empty bucket; the environment has neither its credentials nor its URL."""
    import requests

    endpoint, requested, faults = s3_server
    requests.post(f"{endpoint}/moto-api/reset", timeout=10)
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    bucket = Bucket(endpoint, requested)
    requested.clear()
    faults.clear()
    return bucket
