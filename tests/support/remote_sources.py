"""Content and state of the remote sources in tests: small images, pages of a web server, and an S3 bucket."""

import io
import os
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image


def image(seed: int, suffix: str = ".png") -> bytes:
    """Return a distinct image for each seed."""
    buffer = io.BytesIO()
    image = Image.new("RGB", (16 + seed % 5, 16), (seed * 37 % 256, seed * 59 % 256, seed * 83 % 256))
    image.save(buffer, {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}[suffix])
    return buffer.getvalue()


def tree(folder: Path) -> dict[str, bytes]:
    """Return the content by path of every file below a folder, following links."""
    paths = (Path(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(paths)}


@dataclass
class Web:
    """A web server with `pages` by path, and faults for the next requests of a path."""

    port: int = 0
    pages: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    faults: dict[str, list[tuple[int, dict[str, str], bytes | None]]] = field(default_factory=dict)
    """(status, headers, body) for the next requests of a path; a body of None truncates that of the page."""
    requested: Counter[str] = field(default_factory=Counter)
    stalls: dict[str, int] = field(default_factory=dict)
    """Number of bytes by path after which a download blocks until `go_on` is set; `stalled` is set when one blocks."""
    stalled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, path: str, data: bytes, kind: str = "image/png") -> str:
        self.pages[path] = (kind, data)
        return self.url + path


def matches(text: str, *words: str) -> bool:
    """Return whether a text contains the words in this order."""
    return re.search(".*".join(map(re.escape, words)), text, re.DOTALL) is not None


class Bucket:
    """A bucket of a local S3 server, which records requests."""

    name = "photos"
    region = "eu-central-1"
    key_id, secret = "AKIALOCALTESTS", "wJalrXUtnFEMI7MDENGbPxRfiCYEXAMPLEKEY"

    def __init__(self, endpoint: str, requested: list[tuple[str, str]]) -> None:
        import boto3

        self.endpoint, self.requested = endpoint, requested
        self._client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name=self.region,
            aws_access_key_id=self.key_id,
            aws_secret_access_key=self.secret,
        )
        self._client.create_bucket(
            Bucket=self.name, CreateBucketConfiguration={"LocationConstraint": self.region}
        )

    def put(self, name: str, data: bytes) -> None:
        self._client.put_object(Bucket=self.name, Key=name, Body=data)

    def delete(self, name: str) -> None:
        self._client.delete_object(Bucket=self.name, Key=name)

    def downloads(self) -> list[str]:
        """Return the paths of the files downloaded since the last call."""
        found = [path for method, path in self.requested if method == "GET" and path.count("/") > 1]
        self.requested.clear()
        return sorted(path.removeprefix(f"/{self.name}/") for path in found)
