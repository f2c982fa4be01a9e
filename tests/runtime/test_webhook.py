"""Holds: webhooks get what the reference's file asks for, in both forms; a failing or hanging one never holds up a caller; no address leaks."""

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

from sdxl_pipeline.config.webhook_file import Webhook
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
    in_environment,
    load_webhooks,
    raw_body,
)

SECRET = "t0ken-nobody-may-see"
ORIGIN = Origin("demo", "0123456789ab")
PNG, JPEG = Image("star.png", b"\x89PNG star"), Image("star.jpg", b"\xff\xd8 star")


@dataclass
class Listener:
    """A web server that keeps what is posted to it. `answers` are the next statuses and headers; after them all is well."""

    posts: list[tuple[str, str, bytes]] = field(default_factory=list)  # path, content type, body
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)  # of the answers given
    silence: threading.Event | None = None  # it answers only when this is set
    pace: float = 0.0  # seconds between two posts that it takes; one that comes sooner is told to wait
    port: int = 0

    def answer(self) -> tuple[int, dict[str, str]]:
        left = self._taken_at + self.pace - time.monotonic()
        if left > 0:
            return 429, {"Retry-After": f"{left:.3f}"}
        self._taken_at = time.monotonic()
        return self.answers.pop(0) if self.answers else (204, {})

    _taken_at: float = -math.inf

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/hooks/{SECRET}"


@pytest.fixture
def listener() -> Iterator[Listener]:
    kept = Listener()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kept.posts.append((self.path, self.headers["Content-Type"], body))
            if kept.silence is not None:
                kept.silence.wait(30)
            status, headers = kept.answer()
            kept.statuses.append(status)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    kept.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield kept
    if kept.silence is not None:
        kept.silence.set()
    server.shutdown()
    server.server_close()


def sent(listener: Listener, kind: str, *messages: Message, **settings: Any) -> list[str]:
    """Send messages to the listener as a webhook of one kind, and give what was told to the user meanwhile."""
    told: list[str] = []
    webhook = Webhook(webhook_type=kind, webhook_url=listener.address, **settings)
    webhooks = Webhooks([webhook], ORIGIN, told.append)
    for message in messages:
        webhooks.send(message)
    webhooks.close()
    return told


def parts_of(post: tuple[str, str, bytes]) -> dict[str, Mail]:
    """The parts of a multipart form by their names."""
    mail = message_from_bytes(b"Content-Type: " + post[1].encode() + b"\r\n\r\n" + post[2])
    return {str(part.get_param("name", header="content-disposition")): part for part in mail.get_payload()}


def test_a_raw_webhook_gets_json_with_figures_and_images(listener):
    figures = {"loss": 0.5, "lr": float("nan")}
    message = Message("training.progress", "step 3", "info", 3, figures, (PNG, JPEG), for_people=False)
    assert sent(listener, "raw", message) == []
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


def test_discord_gets_text_and_attachments_and_no_figures(listener):
    progress = Message("training.progress", "step 3", figures={"loss": 0.5}, for_people=False)
    images = Message("validation.images", "step 4: a star @everyone", images=(PNG, JPEG))
    assert sent(listener, "discord", progress, images) == []
    (post,) = listener.posts
    parts = parts_of(post)
    assert json.loads(parts["payload_json"].get_payload(decode=True)) == {
        "content": "`(demo)` step 4: a star @everyone",
        "allowed_mentions": {"parse": []},  # a caption must not ring a whole server
    }
    files = [
        (part.get_filename(), part.get_content_type()) for name, part in parts.items() if "files" in name
    ]
    assert files == [("star.png", "image/png"), ("star.jpg", "image/jpeg")]
    assert parts["files[1]"].get_payload(decode=True) == JPEG.content


def test_discords_limits_are_kept():
    many = discord_posts(Message("x", "t" * 5000, images=[PNG] * 12), "p")
    assert [len(files) for _, files in many] == [10, 2]
    assert [len(body["content"]) for body, _ in many] == [2000, 0]
    big = Image("big.png", b"x" * (DISCORD_BYTES // 2 + 1))
    assert [len(files) for _, files in discord_posts(Message("x", "t", images=[big] * 2), "p")] == [1, 1]


def test_prefix_and_level_are_as_the_file_says(listener):
    settings = {"message_prefix": "cat lora", "log_level": "warning"}
    sent(listener, "discord", Message("x", "quiet"), Message("x", "loud", "error"), **settings)
    (post,) = listener.posts
    assert post[1] == "application/json"
    assert json.loads(post[2])["content"] == "`(cat lora)` loud"


def test_a_busy_webhook_is_asked_again_after_the_time_it_wants(listener):
    listener.answers = [(429, {"Retry-After": "0.05"})]
    assert sent(listener, "raw", Message("x", "one")) == []
    assert len(listener.posts) == 2


def texts(listener: Listener) -> list[str]:
    """What a raw listener has taken, in order."""
    posts = zip(listener.posts, listener.statuses, strict=True)
    return [json.loads(body)["message"] for (_, _, body), status in posts if status == 204]


def test_the_last_messages_wait_for_a_busy_webhook_and_arrive(listener):
    listener.pace = 0.2
    messages = [Message("training.finished", str(number)) for number in range(4)]
    assert sent(listener, "raw", *messages) == []
    assert texts(listener) == ["0", "1", "2", "3"]
    assert listener.statuses.count(429) == 3


def test_a_wait_beyond_the_end_is_not_begun(listener):
    told: list[str] = []
    listener.answers = [(429, {"Retry-After": "20"})]
    webhooks = Webhooks([Webhook(webhook_type="raw", webhook_url=listener.address)], ORIGIN, told.append)
    webhooks.send(Message("x", "one"))
    webhooks.send(Message("x", "two"))
    while not listener.statuses:
        time.sleep(0.01)
    began = time.monotonic()
    webhooks.close(seconds=5)
    assert time.monotonic() - began < 4
    assert texts(listener) == ["two"]
    assert "lost 1 messages (1 failed" in told[-1]


@pytest.fixture
def hanging(listener) -> Webhooks:
    """A webhook that hangs on its first message."""
    listener.silence = threading.Event()
    webhooks = Webhooks([Webhook(webhook_type="raw", webhook_url=listener.address)], ORIGIN, [].append)
    webhooks.send(Message("x", "first"))
    while not listener.posts:
        time.sleep(0.01)
    return webhooks


def test_of_a_forming_image_only_the_newest_preview_waits_and_none_beyond_the_end(listener, hanging):
    for number in range(3):
        for name in ("star", "moon"):
            hanging.send(Message(PREVIEW, f"{name} {number}", replaces=name))
    hanging.send(Message("validation.images", "all"))
    listener.silence.set()
    while len(listener.statuses) < 4:
        time.sleep(0.01)
    assert texts(listener) == ["first", "star 2", "moon 2", "all"]
    listener.silence.clear()
    hanging.send(Message("x", "second"))
    while len(listener.posts) < 5:
        time.sleep(0.01)
    hanging.send(Message(PREVIEW, "star 3", replaces="star"))
    hanging.send(Message("training.finished", "end"))
    threading.Timer(0.1, listener.silence.set).start()
    hanging.close()
    assert texts(listener)[4:] == ["second", "end"]


def test_a_full_queue_drops_previews_then_figures_then_the_oldest(listener, hanging):
    for number in range(5):
        hanging.send(Message(PREVIEW, f"preview {number}", replaces=str(number)))
        hanging.send(Message(PROGRESS, f"progress {number}"))
    for number in range(QUEUE_LENGTH - 3):
        hanging.send(Message("validation.images", f"images {number}"))
    hanging.send(Message(PREVIEW, "preview at last", replaces="at last"))
    listener.silence.set()
    hanging.close()
    images = [f"images {number}" for number in range(QUEUE_LENGTH - 3)]
    assert texts(listener) == ["first", "progress 2", "progress 3", "progress 4", *images]


def test_a_raw_message_bears_the_time_it_was_made_at():
    assert abs(raw_body(Message("x", "now"), ORIGIN)["timestamp"] - time.time()) < 60
    assert raw_body(Message("x", "delivered late", made_at=1e9 + 0.5), ORIGIN)["timestamp"] == 1_000_000_000


@pytest.mark.parametrize("answer", [(500, {}), (302, {"Location": "/elsewhere"}), (429, {})])
def test_what_failed_is_counted_and_told_without_the_address(listener, answer):
    listener.answers = [answer] * 2
    told = sent(listener, "raw", Message("x", "one"), Message("x", "two"), Message("x", "three"))
    assert len(listener.posts) == 3
    assert "lost 2 messages (2 failed" in told[-1]
    assert f"HTTP status {answer[0]}" in told[-1]
    assert SECRET not in " ".join(told)
    assert "127.0.0.1" not in " ".join(told)


def test_a_server_that_is_not_there_is_told_once_without_the_address():
    told: list[str] = []
    webhooks = Webhooks(
        [Webhook(webhook_type="raw", callback_url=f"http://127.0.0.1:9/{SECRET}")], ORIGIN, told.append
    )
    while not told:
        webhooks.send(Message("x", "hello"))
        time.sleep(0.01)
    webhooks.send(Message("x", "hello"))
    webhooks.close()
    assert sum("does not take messages: ConnectionError" in line for line in told) == 1
    assert "lost" in told[-1]
    assert SECRET not in " ".join(told)


def test_a_webhook_that_hangs_holds_up_nobody_and_the_newest_messages_wait(listener, monkeypatch):
    listener.silence = threading.Event()
    other: list[str] = []
    told: list[str] = []
    hanging = Webhook(webhook_type="raw", webhook_url=listener.address)
    webhooks = Webhooks([hanging], ORIGIN, told.append)
    webhooks.send(Message("x", "first"))
    while not listener.posts:  # it hangs on this one
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
        in told[-1]
    )


def test_webhooks_reach_a_stage_through_its_environment_and_print_as_stars(tmp_path, monkeypatch):
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
    (value,) = in_environment(webhooks).values()
    monkeypatch.setenv(webhook.WEBHOOKS_VARIABLE, value)
    handed = load_webhooks(None)
    assert [(w.webhook_type, w.address, w.log_level) for w in handed] == [
        (w.webhook_type, w.address, w.log_level) for w in webhooks
    ]
    assert load_webhooks(tmp_path / "not there") == handed  # the environment goes before the file
    monkeypatch.delenv(webhook.WEBHOOKS_VARIABLE)
    assert load_webhooks(None) == ()
    assert in_environment(()) == {}
