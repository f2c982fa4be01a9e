"""Posts messages and images to webhooks from threads of its own, so that none of them ever holds up the work.

The addresses are secrets. They come from the environment, or from the file that webhook_config names, and are in no message here: of
what went wrong only the kind is told, since the HTTP library's own words hold the address.
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

from sdxl_pipeline.config.problems import ProjectError
from sdxl_pipeline.config.webhook_file import Level, Webhook, read_webhooks

WEBHOOKS_VARIABLE: Final = "SDXL_PIPELINE_WEBHOOKS"
"""Environment variable with the webhooks as JSON, secrets included: how a launcher hands them to a stage on another machine."""

QUEUE_LENGTH: Final = 64
"""Messages that wait for one webhook; of more, one is dropped: the oldest of the most EXPENDABLE, since the newest tell most."""

PREVIEW: Final = "validation.preview"
PROGRESS: Final = "training.progress"
EXPENDABLE: Final = (PREVIEW, PROGRESS)
"""Kinds of messages that are dropped before all others, in this order."""

TIMEOUT_SECONDS: Final = (5.0, 20.0)  # to connect, and between two signs of life
CLOSING_SECONDS: Final = 15.0
LONGEST_RETRY_SECONDS: Final = 30.0

DISCORD_LENGTH: Final = 2000  # characters of a message
DISCORD_FILES: Final = 10  # images of a message
DISCORD_BYTES: Final = 8_000_000  # of a message's images together

_LEVELS: Final[tuple[Level, ...]] = ("critical", "error", "warning", "info", "debug")


@dataclass(frozen=True)
class Image:
    """An image as a file: its name says the format."""

    name: str
    content: bytes

    @classmethod
    def read(cls, path: Path | str) -> "Image":
        """The image of a file as it is now."""
        return cls(Path(path).name, Path(path).read_bytes())

    @property
    def media_type(self) -> str:
        """What HTTP calls the format."""
        return "image/jpeg" if self.name.endswith((".jpg", ".jpeg")) else "image/png"


@dataclass(frozen=True)
class Message:
    """Something to tell. `kind` is for programs, `text` for people; figures go to raw webhooks only."""

    kind: str
    text: str
    level: Level = "info"
    step: int | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    images: Sequence[Image] = ()
    for_people: bool = True  # False: only raw webhooks get it
    replaces: str | None = None  # of those with the same words here only the newest waits
    made_at: float = field(default_factory=time.time)  # seconds since 1970

    @property
    def rank(self) -> int:
        """The higher, the later it is dropped."""
        return EXPENDABLE.index(self.kind) if self.kind in EXPENDABLE else len(EXPENDABLE)


@dataclass(frozen=True)
class Origin:
    """Whose messages they are."""

    project: str
    job_id: str


class _Failure(Exception):  # noqa: N818  # told to the user in one word, never raised past this module
    """Why a message was not delivered, without the address."""


def load_webhooks(config: Path | None) -> tuple[Webhook, ...]:
    """The webhooks of the environment, else those of the file. Raises ProjectError for what cannot be used."""
    handed = os.environ.get(WEBHOOKS_VARIABLE)
    if handed is not None:
        return tuple(Webhook.model_validate(entry) for entry in json.loads(handed))
    if config is None:
        return ()
    webhooks, problems = read_webhooks(config)
    if problems:
        raise ProjectError(problems)
    return webhooks


def in_environment(webhooks: Sequence[Webhook]) -> dict[str, str]:
    """What hands the webhooks to a stage through its environment."""
    if not webhooks:
        return {}
    entries = [
        webhook.model_dump() | {"webhook_url": webhook.address, "callback_url": None} for webhook in webhooks
    ]
    return {WEBHOOKS_VARIABLE: json.dumps(entries)}


class Webhooks:
    """Sends messages to some webhooks. Calls return at once; `close` waits a little for what is still to be sent.

    A webhook that fails or hangs loses its own messages and delays nobody. The first failure of each is told to `tell` at the next
    message, how many messages were lost at the end.
    """

    def __init__(self, webhooks: Sequence[Webhook], origin: Origin, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._lines = [
            _Line(webhook, origin, f"webhook {number} ({webhook.webhook_type})")
            for number, webhook in enumerate(webhooks, start=1)
        ]

    def __len__(self) -> int:
        return len(self._lines)

    def send(self, message: Message) -> None:
        """Hand a message over."""
        for line in self._lines:
            if line.takes(message):
                line.put(message)
            if complaint := line.new_complaint():
                self._tell(complaint)

    def close(self, seconds: float = CLOSING_SECONDS) -> None:
        """End sending: wait at most so long, all webhooks together, then say what was lost.

        Previews that still wait are given up: the images they show forming are finished.
        """
        give_up = time.monotonic() + seconds
        for line in self._lines:
            line.finish(give_up)
        for line in self._lines:
            line.join(max(0.0, give_up - time.monotonic()))
            if loss := line.loss():
                self._tell(loss)


class _Line:
    """The queue and the thread of one webhook."""

    def __init__(self, webhook: Webhook, origin: Origin, name: str) -> None:
        self._webhook, self._origin, self._name = webhook, origin, name
        self._waiting: deque[Message] = deque()
        self._changed = threading.Condition()
        self._finishing = False
        self._give_up = math.inf  # when the sending ends, by time.monotonic
        self._under_way = False
        self._dropped = self._failed = 0
        self._first_failure: str | None = None
        self._complained = False
        # A daemon: a server that does not answer must not keep the program from ending.
        self._thread = threading.Thread(target=self._work, name="webhook", daemon=True)
        self._thread.start()

    def takes(self, message: Message) -> bool:
        """Whether the webhook asks for messages like this one."""
        important = _LEVELS.index(message.level) <= _LEVELS.index(self._webhook.log_level)
        return important and (message.for_people or self._webhook.webhook_type == "raw")

    def put(self, message: Message) -> None:
        with self._changed:
            if message.replaces is not None:
                self._keep(lambda other: other.replaces != message.replaces)
            self._waiting.append(message)
            if len(self._waiting) > QUEUE_LENGTH:
                self._waiting.remove(min(self._waiting, key=lambda other: other.rank))  # the first of them
                self._dropped += 1
            self._changed.notify()

    def finish(self, give_up: float) -> None:
        with self._changed:
            self._keep(lambda other: other.kind != PREVIEW)
            self._finishing, self._give_up = True, give_up
            self._changed.notify()

    def _keep(self, wanted: Callable[[Message], bool]) -> None:
        self._waiting = deque(filter(wanted, self._waiting))

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def new_complaint(self) -> str | None:
        """What to say of the first failure, once."""
        if self._first_failure is None or self._complained:
            return None
        self._complained = True
        return f"The {self._name} does not take messages: {self._first_failure}. The training goes on without it."

    def loss(self) -> str | None:
        """How many messages were lost, and why; None where none was."""
        with self._changed:
            unsent = len(self._waiting) + self._under_way
            lost = self._dropped + self._failed + unsent
        if not lost:
            return None
        reason = f"; the first failure was: {self._first_failure}" if self._first_failure else ""
        return (
            f"The {self._name} lost {lost} messages ({self._failed} failed, {self._dropped} found the queue full, "
            f"{unsent} unsent at the end){reason}."
        )

    def _work(self) -> None:
        with requests.Session() as session:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting or self._finishing)
                    if not self._waiting:
                        return
                    message = self._waiting.popleft()
                    self._under_way = True
                try:
                    self._deliver(session, message)
                except _Failure as failure:
                    self._note(str(failure))
                except (
                    Exception
                ) as error:  # whatever it is, the work must go on, and the error may hold the address
                    self._note(type(error).__name__)
                with self._changed:
                    self._under_way = False

    def _note(self, failure: str) -> None:
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
                stream=True,  # the answer's body is not wanted
                **content,
            ) as answer:
                if 200 <= answer.status_code < 300:
                    return
                wait = _retry_seconds(answer) if attempt == 1 else None
                if wait is None or not self._waited(wait):
                    raise _Failure(f"HTTP status {answer.status_code}")

    def _waited(self, seconds: float) -> bool:
        """Wait so long; False, at once, when the sending will have ended by then."""
        until = time.monotonic() + seconds
        with self._changed:
            return not self._changed.wait_for(lambda: until >= self._give_up, timeout=seconds)


def _retry_seconds(answer: requests.Response) -> float | None:
    """How long a webhook with too much to do asks to be left alone; None where it does not ask."""
    if answer.status_code not in (429, 503):
        return None
    try:
        seconds = float(answer.headers.get("Retry-After", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds <= LONGEST_RETRY_SECONDS else None


def raw_body(message: Message, origin: Origin) -> dict[str, Any]:
    """What a raw webhook gets, as JSON; images are base64 of their files, and a figure that is no number is null."""
    return {
        "message_type": message.kind,
        "message": message.text,
        "level": message.level,
        "project": origin.project,
        "job_id": origin.job_id,
        "timestamp": int(message.made_at),
        "step": message.step,
        "values": {name: value if math.isfinite(value) else None for name, value in message.figures.items()},
        "images": [base64.b64encode(image.content).decode("ascii") for image in message.images],
    }


def discord_posts(
    message: Message, prefix: str
) -> list[tuple[dict[str, Any], dict[str, tuple[str, bytes, str]]]]:
    """(body, files) of each post that a message takes: a post holds so many images and bytes, and the first the text."""
    lots: list[list[Image]] = [[]]
    for image in message.images:
        size = sum(len(other.content) for other in lots[-1])
        if len(lots[-1]) == DISCORD_FILES or (lots[-1] and size + len(image.content) > DISCORD_BYTES):
            lots.append([])
        lots[-1].append(image)
    text = f"`({prefix})` {message.text}"
    posts = []
    for number, lot in enumerate(lots):
        body = {"content": "" if number else text[:DISCORD_LENGTH], "allowed_mentions": {"parse": []}}
        files = {
            f"files[{index}]": (image.name, image.content, image.media_type)
            for index, image in enumerate(lot)
        }
        posts.append((body, files))
    return posts
