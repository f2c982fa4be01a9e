"""Webhooks: messages in both formats; a failing or hanging webhook never blocks a caller; no address leaks."""

import base64
import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from email import message_from_bytes
from email.message import Message as Mail
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sdxl_pipeline.config.linked_files import Webhook
from sdxl_pipeline.runtime import webhook
from sdxl_pipeline.runtime.webhook import (
    DISCORD_BYTES,
    PREVIEW,
    PROGRESS,
    QUEUE_LENGTH,
    Image,
    Message,
    Origin,
    Webhooks,
    discord_posts,
    load_webhooks,
    raw_body,
    webhook_environment,
)

SECRET = "t0ken-nobody-may-see"
ORIGIN = Origin("demo", "0123456789ab")
PNG, JPEG = Image("star.png", b"\x89PNG star"), Image("star.jpg", b"\xff\xd8 star")


@dataclass
class Listener:
    """A web server that records posts. `responses` are the next statuses and headers; after them it answers 204."""

    posts: list[tuple[str, str, bytes]] = field(default_factory=list)  # path, content type, body
    responses: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)  # of the responses sent
    responses_allowed: threading.Event | None = None  # responses are sent only once it is set
    min_interval: float = 0.0  # minimum seconds between two accepted posts; an earlier one gets a Retry-After
    port: int = 0

    def answer(self) -> tuple[int, dict[str, str]]:
        remaining = self._accepted_at + self.min_interval - time.monotonic()
        if remaining > 0:
            return 429, {"Retry-After": f"{remaining:.3f}"}
        self._accepted_at = time.monotonic()
        return self.responses.pop(0) if self.responses else (204, {})

    _accepted_at: float = -math.inf

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/hooks/{SECRET}"


@pytest.fixture
def listener() -> Iterator[Listener]:
    server_state = Listener()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server_state.posts.append((self.path, self.headers["Content-Type"], body))
            if server_state.responses_allowed is not None:
                server_state.responses_allowed.wait(30)
            status, headers = server_state.answer()
            server_state.statuses.append(status)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server_state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server_state
    if server_state.responses_allowed is not None:
        server_state.responses_allowed.set()
    server.shutdown()
    server.server_close()


def send(listener: Listener, kind: str, *messages: Message, **settings: Any) -> list[str]:
    """Send messages to the listener as a webhook of one kind, and return the warnings."""
    warnings: list[str] = []
    webhook = Webhook(webhook_type=kind, webhook_url=listener.address, **settings)
    webhooks = Webhooks([webhook], ORIGIN, warnings.append)
    for message in messages:
        webhooks.send(message)
    webhooks.close()
    return warnings


def parts_of(post: tuple[str, str, bytes]) -> dict[str, Mail]:
    """Return the parts of a multipart form by their names."""
    mail = message_from_bytes(b"Content-Type: " + post[1].encode() + b"\r\n\r\n" + post[2])
    return {str(part.get_param("name", header="content-disposition")): part for part in mail.get_payload()}


def test_raw_webhook_gets_json_with_metrics_and_images(listener):
    metrics = {"loss": 0.5, "lr": float("nan")}
    message = Message("training.progress", "step 3", "info", 3, metrics, (PNG, JPEG), human_readable=False)
    assert send(listener, "raw", message) == []
    ((path, kind, body),) = listener.posts
    assert (path, kind) == (f"/hooks/{SECRET}", "application/json")
    content = json.loads(body)
    assert abs(content.pop("timestamp") - time.time()) < 60
    assert [base64.b64decode(image) for image in content.pop("images")] == [PNG.content, JPEG.content]
    assert content == {
        "message_type": "training.progress",
        "message": "step 3",
        "level": "info",
        "project": "demo",
        "job_id": "0123456789ab",
        "step": 3,
        "values": {"loss": 0.5, "lr": None},
    }


def test_discord_webhook_gets_text_and_attachments_without_metrics(listener):
    progress = Message("training.progress", "step 3", metrics={"loss": 0.5}, human_readable=False)
    images = Message("validation.images", "step 4: a star @everyone", images=(PNG, JPEG))
    assert send(listener, "discord", progress, images) == []
    (post,) = listener.posts
    parts = parts_of(post)
    assert json.loads(parts["payload_json"].get_payload(decode=True)) == {
        "content": "`(demo)` step 4: a star @everyone",
        "allowed_mentions": {"parse": []},  # a caption must not mention everyone on a server
    }
    files = [
        (part.get_filename(), part.get_content_type()) for name, part in parts.items() if "files" in name
    ]
    assert files == [("star.png", "image/png"), ("star.jpg", "image/jpeg")]
    assert parts["files[1]"].get_payload(decode=True) == JPEG.content


def test_discord_posts_observe_the_limits():
    many = discord_posts(Message("x", "t" * 5000, images=[PNG] * 12), "p")
    assert [len(files) for _, files in many] == [10, 2]
    assert [len(body["content"]) for body, _ in many] == [2000, 0]
    big = Image("big.png", b"x" * (DISCORD_BYTES // 2 + 1))
    assert [len(files) for _, files in discord_posts(Message("x", "t", images=[big] * 2), "p")] == [1, 1]


def test_webhook_applies_prefix_and_log_level(listener):
    settings = {"message_prefix": "cat lora", "log_level": "warning"}
    send(listener, "discord", Message("x", "quiet"), Message("x", "loud", "error"), **settings)
    (post,) = listener.posts
    assert post[1] == "application/json"
    assert json.loads(post[2])["content"] == "`(cat lora)` loud"


def test_webhook_retries_after_the_requested_time(listener):
    listener.responses = [(429, {"Retry-After": "0.05"})]
    assert send(listener, "raw", Message("x", "one")) == []
    assert len(listener.posts) == 2


def accepted_texts(listener: Listener) -> list[str]:
    """Return the messages that a raw listener accepted, in order."""
    posts = zip(listener.posts, listener.statuses, strict=True)
    return [json.loads(body)["message"] for (_, _, body), status in posts if status == 204]


def test_close_waits_for_a_rate_limited_webhook(listener):
    listener.min_interval = 0.2
    messages = [Message("training.finished", str(number)) for number in range(4)]
    assert send(listener, "raw", *messages) == []
    assert accepted_texts(listener) == ["0", "1", "2", "3"]
    assert listener.statuses.count(429) == 3


def test_close_skips_a_retry_beyond_its_deadline(listener):
    warnings: list[str] = []
    listener.responses = [(429, {"Retry-After": "20"})]
    webhooks = Webhooks([Webhook(webhook_type="raw", webhook_url=listener.address)], ORIGIN, warnings.append)
    webhooks.send(Message("x", "one"))
    webhooks.send(Message("x", "two"))
    while not listener.statuses:
        time.sleep(0.01)
    started = time.monotonic()
    webhooks.close(seconds=5)
    assert time.monotonic() - started < 4
    assert accepted_texts(listener) == ["two"]
    assert "lost 1 messages (1 failed" in warnings[-1]


@pytest.fixture
def hanging(listener) -> Webhooks:
    """A webhook that hangs on its first message."""
    listener.responses_allowed = threading.Event()
    webhooks = Webhooks([Webhook(webhook_type="raw", webhook_url=listener.address)], ORIGIN, [].append)
    webhooks.send(Message("x", "first"))
    while not listener.posts:
        time.sleep(0.01)
    return webhooks


def test_newer_preview_replaces_a_queued_one_and_close_drops_previews(listener, hanging):
    for number in range(3):
        for name in ("star", "moon"):
            hanging.send(Message(PREVIEW, f"{name} {number}", replaces=name))
    hanging.send(Message("validation.images", "all"))
    listener.responses_allowed.set()
    while len(listener.statuses) < 4:
        time.sleep(0.01)
    assert accepted_texts(listener) == ["first", "star 2", "moon 2", "all"]
    listener.responses_allowed.clear()
    hanging.send(Message("x", "second"))
    while len(listener.posts) < 5:
        time.sleep(0.01)
    hanging.send(Message(PREVIEW, "star 3", replaces="star"))
    hanging.send(Message("training.finished", "end"))
    threading.Timer(0.1, listener.responses_allowed.set).start()
    hanging.close()
    assert accepted_texts(listener)[4:] == ["second", "end"]


def test_full_queue_drops_previews_then_metrics_then_the_oldest(listener, hanging):
    for number in range(5):
        hanging.send(Message(PREVIEW, f"preview {number}", replaces=str(number)))
        hanging.send(Message(PROGRESS, f"progress {number}"))
    for number in range(QUEUE_LENGTH - 3):
        hanging.send(Message("validation.images", f"images {number}"))
    hanging.send(Message(PREVIEW, "preview at last", replaces="at last"))
    listener.responses_allowed.set()
    hanging.close()
    images = [f"images {number}" for number in range(QUEUE_LENGTH - 3)]
    assert accepted_texts(listener) == ["first", "progress 2", "progress 3", "progress 4", *images]


def test_raw_body_has_the_creation_time():
    assert abs(raw_body(Message("x", "now"), ORIGIN)["timestamp"] - time.time()) < 60
    assert (
        raw_body(Message("x", "delivered late", created_at=1e9 + 0.5), ORIGIN)["timestamp"] == 1_000_000_000
    )


@pytest.mark.parametrize("answer", [(500, {}), (302, {"Location": "/elsewhere"}), (429, {})])
def test_failed_messages_are_counted_without_the_address(listener, answer):
    listener.responses = [answer] * 2
    warnings = send(listener, "raw", Message("x", "one"), Message("x", "two"), Message("x", "three"))
    assert len(listener.posts) == 3
    assert "lost 2 messages (2 failed" in warnings[-1]
    assert f"HTTP status {answer[0]}" in warnings[-1]
    assert SECRET not in " ".join(warnings)
    assert "127.0.0.1" not in " ".join(warnings)


def test_unreachable_server_is_reported_once_without_the_address():
    warnings: list[str] = []
    webhooks = Webhooks(
        [Webhook(webhook_type="raw", callback_url=f"http://127.0.0.1:9/{SECRET}")], ORIGIN, warnings.append
    )
    while not warnings:
        webhooks.send(Message("x", "hello"))
        time.sleep(0.01)
    webhooks.send(Message("x", "hello"))
    webhooks.close()
    assert sum("does not take messages: ConnectionError" in line for line in warnings) == 1
    assert "lost" in warnings[-1]
    assert SECRET not in " ".join(warnings)


def test_hanging_webhook_blocks_neither_send_nor_close(listener, monkeypatch):
    listener.responses_allowed = threading.Event()
    other: list[str] = []
    warnings: list[str] = []
    hanging = Webhook(webhook_type="raw", webhook_url=listener.address)
    webhooks = Webhooks([hanging], ORIGIN, warnings.append)
    webhooks.send(Message("x", "first"))
    while not listener.posts:  # it hangs on this message
        time.sleep(0.01)
    sender = threading.Thread(
        target=lambda: [webhooks.send(Message("x", str(number))) for number in range(QUEUE_LENGTH + 5)]
    )
    sender.start()
    sender.join(20)
    assert not sender.is_alive()
    closing = threading.Thread(target=lambda: (webhooks.close(seconds=0.2), other.append("closed")))
    closing.start()
    closing.join(20)
    assert other == ["closed"]
    assert (
        f"lost {QUEUE_LENGTH + 6} messages (0 failed, 5 found the queue full, {QUEUE_LENGTH + 1} unsent"
        in warnings[-1]
    )


def test_webhooks_round_trip_through_the_environment_and_repr_is_masked(tmp_path, monkeypatch):
    monkeypatch.delenv(webhook.WEBHOOKS_VARIABLE, raising=False)
    path = tmp_path / "webhooks.json"
    entries = [
        {"webhook_type": "discord", "webhook_url": f"https://discord.com/api/webhooks/1/{SECRET}"},
        {"webhook_type": "raw", "callback_url": f"https://example.com/{SECRET}", "log_level": "debug"},
    ]
    path.write_text(json.dumps(entries))
    webhooks = load_webhooks(path)
    assert [webhook.address for webhook in webhooks] == [
        f"https://discord.com/api/webhooks/1/{SECRET}",
        f"https://example.com/{SECRET}",
    ]
    assert SECRET not in repr(webhooks) + str(webhooks) + webhooks[0].model_dump_json()
    (value,) = webhook_environment(webhooks).values()
    monkeypatch.setenv(webhook.WEBHOOKS_VARIABLE, value)
    from_environment = load_webhooks(None)
    assert [(w.webhook_type, w.address, w.log_level) for w in from_environment] == [
        (w.webhook_type, w.address, w.log_level) for w in webhooks
    ]
    assert (
        load_webhooks(tmp_path / "not there") == from_environment
    )  # the environment takes precedence over the file
    monkeypatch.delenv(webhook.WEBHOOKS_VARIABLE)
    assert load_webhooks(None) == ()
    assert webhook_environment(()) == {}
