"""Webhook client: posts messages and images from background threads, so that the training never waits for a server.

The addresses are secrets. They come from the environment or from the file named in webhook_config, and appear in no message here: only
the kind of an error is reported, since the HTTP library's own messages contain the address.
"""

import base64
import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import requests

from sdxl_pipeline.config.linked_files import Level, Webhook, read_webhooks
from sdxl_pipeline.config.problems import ProjectError

WEBHOOKS_VARIABLE: Final = "SDXL_PIPELINE_WEBHOOKS"
"""Environment variable with the webhooks as JSON, secrets included: how a launcher passes them to a stage on another machine."""

QUEUE_LENGTH: Final = 64
"""Most messages that wait for one webhook. Beyond it, the oldest message of the first kind in `DROP_FIRST` is dropped, else the oldest."""

PREVIEW: Final = "validation.preview"
PROGRESS: Final = "training.progress"
DROP_FIRST: Final = (PREVIEW, PROGRESS)
"""Message kinds that are dropped before all others, in this order."""

TIMEOUT_SECONDS: Final = (5.0, 20.0)  # connect, and between two received bytes
CLOSE_TIMEOUT_SECONDS: Final = 15.0
MAX_RETRY_SECONDS: Final = 30.0

DISCORD_LENGTH: Final = 2000  # characters of a message
DISCORD_FILES: Final = 10  # images of a message
DISCORD_BYTES: Final = 8_000_000  # of a message's images together

_LEVELS: Final[tuple[Level, ...]] = ("critical", "error", "warning", "info", "debug")


@dataclass(frozen=True)
class Image:
    """An image file; the suffix of its name gives the format."""

    name: str
    content: bytes

    @classmethod
    def read(cls, path: Path | str) -> "Image":
        """Read an image file."""
        return cls(Path(path).name, Path(path).read_bytes())

    @property
    def media_type(self) -> str:
        """MIME type of the image."""
        return "image/jpeg" if self.name.endswith((".jpg", ".jpeg")) else "image/png"


@dataclass(frozen=True)
class Message:
    """One message. `kind` is for programs, `text` for people; metrics are sent to raw webhooks only."""

    kind: str
    text: str
    level: Level = "info"
    step: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    images: Sequence[Image] = ()
    human_readable: bool = True  # False: sent to raw webhooks only
    replaces: str | None = None  # replaces the queued message with the same value
    created_at: float = field(default_factory=time.time)  # seconds since 1970

    @property
    def drop_order(self) -> int:
        """Drop order: messages of the lowest rank are dropped first."""
        return DROP_FIRST.index(self.kind) if self.kind in DROP_FIRST else len(DROP_FIRST)


@dataclass(frozen=True)
class Origin:
    """The run that sends the messages."""

    project: str
    job_id: str


class _DeliveryError(Exception):
    """A message was not delivered; the text does not contain the address."""


def load_webhooks(config: Path | None) -> tuple[Webhook, ...]:
    """Return the webhooks of the environment, else those of the file. Raises ProjectError for an invalid file."""
    from_environment = os.environ.get(WEBHOOKS_VARIABLE)
    if from_environment is not None:
        return tuple(Webhook.model_validate(entry) for entry in json.loads(from_environment))
    if config is None:
        return ()
    webhooks, problems = read_webhooks(config)
    if problems:
        raise ProjectError(problems)
    return webhooks


def webhook_environment(webhooks: Sequence[Webhook]) -> dict[str, str]:
    """Return the environment variables that pass the webhooks to a stage."""
    if not webhooks:
        return {}
    entries = [
        webhook.model_dump() | {"webhook_url": webhook.address, "callback_url": None} for webhook in webhooks
    ]
    return {WEBHOOKS_VARIABLE: json.dumps(entries)}


class Webhooks:
    """Sends messages to webhooks. Calls return at once; `close` waits a limited time for queued messages.

    A webhook that fails or hangs loses only its own messages and delays nobody. The first failure of each is passed to `warn` at the next
    message, and the number of lost messages at the end.
    """

    def __init__(self, webhooks: Sequence[Webhook], origin: Origin, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._queues = [
            _WebhookQueue(webhook, origin, f"webhook {number} ({webhook.webhook_type})")
            for number, webhook in enumerate(webhooks, start=1)
        ]

    def __len__(self) -> int:
        return len(self._queues)

    def send(self, message: Message) -> None:
        """Queue a message for every webhook that accepts it."""
        for queue in self._queues:
            if queue.accepts(message):
                queue.put(message)
            if warning := queue.new_failure_warning():
                self._warn(warning)

    def close(self, seconds: float = CLOSE_TIMEOUT_SECONDS) -> None:
        """Stop sending: wait at most `seconds` for all webhooks together, then warn about lost messages.

        Queued previews are discarded: the images they preview are finished.
        """
        deadline = time.monotonic() + seconds
        for queue in self._queues:
            queue.finish(deadline)
        for queue in self._queues:
            queue.join(max(0.0, deadline - time.monotonic()))
            if loss_warning := queue.loss_warning():
                self._warn(loss_warning)


class _WebhookQueue:
    """Queue and thread of one webhook."""

    def __init__(self, webhook: Webhook, origin: Origin, name: str) -> None:
        self._webhook, self._origin, self._name = webhook, origin, name
        self._queued: deque[Message] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._deadline = math.inf  # when the sending ends, by time.monotonic
        self._sending = False
        self._dropped = self._failed = 0
        self._first_failure: str | None = None
        self._failure_reported = False
        # A daemon thread: an unresponsive server must not keep the program from exiting.
        self._thread = threading.Thread(target=self._send_queued, name="webhook", daemon=True)
        self._thread.start()

    def accepts(self, message: Message) -> bool:
        """Return whether the webhook's level and type include this message."""
        level_included = _LEVELS.index(message.level) <= _LEVELS.index(self._webhook.log_level)
        return level_included and (message.human_readable or self._webhook.webhook_type == "raw")

    def put(self, message: Message) -> None:
        with self._changed:
            if message.replaces is not None:
                self._retain(lambda other: other.replaces != message.replaces)
            self._queued.append(message)
            if len(self._queued) > QUEUE_LENGTH:
                # `min` returns the oldest of equal rank
                self._queued.remove(min(self._queued, key=lambda other: other.drop_order))
                self._dropped += 1
            self._changed.notify()

    def finish(self, deadline: float) -> None:
        with self._changed:
            self._retain(lambda other: other.kind != PREVIEW)
            self._closing, self._deadline = True, deadline
            self._changed.notify()

    def _retain(self, predicate: Callable[[Message], bool]) -> None:
        self._queued = deque(filter(predicate, self._queued))

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def new_failure_warning(self) -> str | None:
        """Return the warning about the first failure, once."""
        if self._first_failure is None or self._failure_reported:
            return None
        self._failure_reported = True
        return f"The {self._name} does not take messages: {self._first_failure}. The training continues without it."

    def loss_warning(self) -> str | None:
        """Return a warning with the number of lost messages and the reason; None if none were lost."""
        with self._changed:
            unsent = len(self._queued) + self._sending
            lost = self._dropped + self._failed + unsent
        if not lost:
            return None
        reason = f"; the first failure was: {self._first_failure}" if self._first_failure else ""
        return (
            f"The {self._name} lost {lost} messages ({self._failed} failed, {self._dropped} found the queue full, "
            f"{unsent} unsent at the end){reason}."
        )

    def _send_queued(self) -> None:
        with requests.Session() as session:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._queued or self._closing)
                    if not self._queued:
                        return
                    message = self._queued.popleft()
                    self._sending = True
                try:
                    self._deliver(session, message)
                except _DeliveryError as error:
                    self._record_failure(str(error))
                except Exception as error:  # continue with the next message; the text may contain the address
                    self._record_failure(type(error).__name__)
                with self._changed:
                    self._sending = False

    def _record_failure(self, failure: str) -> None:
        with self._changed:
            self._failed += 1
            self._first_failure = self._first_failure or failure

    def _deliver(self, session: requests.Session, message: Message) -> None:
        if self._webhook.webhook_type == "raw":
            self._post(session, json=raw_body(message, self._origin))
            return
        prefix = self._webhook.message_prefix or self._origin.project
        for body, files in discord_posts(message, prefix):
            if files:
                self._post(session, data={"payload_json": json.dumps(body)}, files=files)
            else:
                self._post(session, json=body)

    def _post(self, session: requests.Session, **content: Any) -> None:
        for attempt in (1, 2):
            with session.post(
                self._webhook.address or "",
                timeout=TIMEOUT_SECONDS,
                verify=not self._webhook.ssl_no_verify,
                allow_redirects=False,
                stream=True,  # the response body is not read
                **content,
            ) as response:
                if 200 <= response.status_code < 300:
                    return
                wait = _retry_seconds(response) if attempt == 1 else None
                if wait is None or not self._sleep(wait):
                    raise _DeliveryError(f"HTTP status {response.status_code}")

    def _sleep(self, seconds: float) -> bool:
        """Sleep for `seconds`. Return False at once if the deadline of `close` is earlier."""
        retry_at = time.monotonic() + seconds
        with self._changed:
            return not self._changed.wait_for(lambda: retry_at >= self._deadline, timeout=seconds)


def _retry_seconds(response: requests.Response) -> float | None:
    """Return the Retry-After of an overloaded webhook in seconds; None without one or if it is too long."""
    if response.status_code not in (429, 503):
        return None
    try:
        seconds = float(response.headers.get("Retry-After", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds <= MAX_RETRY_SECONDS else None


def raw_body(message: Message, origin: Origin) -> dict[str, Any]:
    """Return the JSON body for a raw webhook. Images are the base64 of their files; a non-finite metric is null."""
    return {
        "message_type": message.kind,
        "message": message.text,
        "level": message.level,
        "project": origin.project,
        "job_id": origin.job_id,
        "timestamp": int(message.created_at),
        "step": message.step,
        "values": {name: value if math.isfinite(value) else None for name, value in message.metrics.items()},
        "images": [base64.b64encode(image.content).decode("ascii") for image in message.images],
    }


def discord_posts(
    message: Message, prefix: str
) -> list[tuple[dict[str, Any], dict[str, tuple[str, bytes, str]]]]:
    """Return (body, files) of each Discord post for a message: images split by count and size, the text in the first post."""
    batches: list[list[Image]] = [[]]
    for image in message.images:
        size = sum(len(other.content) for other in batches[-1])
        if len(batches[-1]) == DISCORD_FILES or (batches[-1] and size + len(image.content) > DISCORD_BYTES):
            batches.append([])
        batches[-1].append(image)
    text = f"`({prefix})` {message.text}"
    posts = []
    for number, batch in enumerate(batches):
        body = {"content": "" if number else text[:DISCORD_LENGTH], "allowed_mentions": {"parse": []}}
        files = {
            f"files[{index}]": (image.name, image.content, image.media_type)
            for index, image in enumerate(batch)
        }
        posts.append((body, files))
    return posts
