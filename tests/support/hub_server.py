"""A Hugging Face Hub on 127.0.0.1: enough of its API for the real huggingface_hub client to download and to publish.

Supported: whoami, repository creation, model and dataset info by revision, tree listing, `resolve` by HEAD and GET with ETag,
`X-Repo-Commit` and ranges (large files by redirect, as on the Hub), validation of model cards' metadata, preupload, the git-lfs batch API,
commits and tags, and faults of every kind in any of them. Xet is not supported, so the client must run with `HF_HUB_DISABLE_XET=1`; both helpers below set it:

    with HubServer() as hub:
        hub.add_repo("someone/model", folder)
        subprocess.run([...], env=os.environ | hub.environment(tmp_path))     # another process: HF_ENDPOINT and HF_TOKEN

    def test_it(hub, monkeypatch, tmp_path):
        hub.adopt_process(monkeypatch, tmp_path)                              # this process: redirect the imported client
        snapshot_download("someone/model", endpoint=hub.endpoint)
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

LFS_SUFFIXES = frozenset({".safetensors", ".bin", ".png", ".jpg", ".gz", ".parquet"})


@dataclass(frozen=True)
class Blob:
    """Content of one file of a repository."""

    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def git_oid(self) -> str:
        """Git object id: of the content for a regular file, of the pointer file for one in large-file storage."""
        data = self.data
        if self.lfs:
            data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    oid: str
    message: str
    files: dict[str, Blob]


@dataclass
class Repo:
    private: bool
    commits: list[Commit] = field(default_factory=list)
    gated: bool = False
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def commit(self, message: str, files: dict[str, Blob]) -> Commit:
        tree = "".join(f"{path}\0{blob.git_oid}\n" for path, blob in sorted(files.items()))
        parent = self.commits[-1].oid if self.commits else ""
        oid = hashlib.sha1(f"{parent}\n{message}\n{tree}".encode(), usedforsecurity=False).hexdigest()
        self.commits.append(Commit(oid, message, dict(files)))
        return self.head

    def at(self, revision: str) -> Commit:
        for commit in reversed(self.commits):
            if commit.oid in (revision, self.tags.get(revision)):
                return commit
        if revision == "main":
            return self.head
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")


@dataclass(frozen=True)
class Request:
    """One entry of the server's log. `range` is the Range header of a resumed download."""

    method: str
    path: str
    range: str | None


FaultKind = Literal["fail", "cut", "cut upload", "lose", "delay"]


@dataclass
class Fault:
    """Fault to inject into the next `left` requests whose path matches."""

    kind: FaultKind
    left: int
    pattern: re.Pattern[str]
    status: int = 500
    headers: dict[str, str] | None = None
    message: str = "Injected fault"
    after_bytes: int = 0
    seconds: float = 0.0


class HubError(Exception):
    """A rejection, with the error code from which the client chooses its exception."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class HubServer:
    """The server, as a context manager; it listens from `__enter__` on, on a free port."""

    token = "hf_localHubWriteToken"
    read_token = "hf_localHubReadToken"
    user = "someone"

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.repos: dict[str, Repo] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.lock = threading.RLock()
        self._faults: list[Fault] = []
        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        self._httpd.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._httpd.server_port}"
        # Large files are on another host like the Hub's CDN, to which the client sends no token.
        self.cdn = f"http://localhost:{self._httpd.server_port}"
        self._thread = threading.Thread(target=self._httpd.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()
        self._thread.join()

    def add_repo(self, repo_id: str, folder: Path | None = None, private: bool = False) -> str:
        """Publish the files of a folder as a new commit of `repo_id`; return the commit's id."""
        paths = (
            {}
            if folder is None
            else {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        )
        files = {name: Blob(data := path.read_bytes(), _is_large(name, data)) for name, path in paths.items()}
        with self.lock:
            repo = self.repos.setdefault(repo_id, Repo(private))
            self.lfs_objects |= {blob.sha256: blob.data for blob in files.values() if blob.lfs}
            return repo.commit("Initial commit" if not repo.commits else "Replace the files", files).oid

    def add_dataset(self, repo_id: str, folder: Path, private: bool = False, gated: bool = False) -> str:
        """Publish a folder as a commit of a dataset repository; access to a gated one is always denied."""
        commit = self.add_repo(f"datasets/{repo_id}", folder, private)
        self.repos[f"datasets/{repo_id}"].gated = gated
        return commit

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return content by path, of the branch or of one commit."""
        return {path: blob.data for path, blob in self.repos[repo_id].at(revision).files.items()}

    def commits(self, repo_id: str) -> list[str]:
        """Return commit messages, oldest first."""
        return [commit.message for commit in self.repos[repo_id].commits]

    def fail_next(
        self,
        count: int = 1,
        status: int = 500,
        path: str = "",
        headers: dict[str, str] | None = None,
        message: str = "Injected fault",
    ) -> None:
        """Answer the next `count` requests whose path matches the regular expression with this status, or with `headers` and no body."""
        self._faults.append(
            Fault("fail", count, re.compile(path), status=status, headers=headers, message=message)
        )

    def cut_next(self, after_bytes: int, count: int = 1, path: str = "/(resolve|lfs)/") -> None:
        """Close the connection of the next `count` matching downloads after `after_bytes` bytes of the body."""
        self._faults.append(Fault("cut", count, re.compile(path), after_bytes=after_bytes))

    def cut_upload_next(self, after_bytes: int, count: int = 1, path: str = "/lfs/") -> None:
        """Close the connection of the next `count` matching requests after reading `after_bytes` bytes of their body."""
        self._faults.append(Fault("cut upload", count, re.compile(path), after_bytes=after_bytes))

    def lose_next(self, count: int = 1, path: str = "") -> None:
        """Do what the next `count` matching requests ask, and close their connections without an answer."""
        self._faults.append(Fault("lose", count, re.compile(path)))

    def delay_next(self, seconds: float, count: int = 1, path: str = "") -> None:
        """Wait before the next `count` matching requests are handled."""
        self._faults.append(Fault("delay", count, re.compile(path), seconds=seconds))

    def clear_faults(self) -> None:
        """Forget the faults that no request has met."""
        self._faults.clear()

    def take_fault(self, path: str, kind: FaultKind) -> Fault | None:
        """Return the fault of this kind for a request, and count it down."""
        with self.lock:
            for fault in self._faults:
                if fault.left > 0 and fault.kind == kind and fault.pattern.search(path):
                    fault.left -= 1
                    return fault
        return None

    def environment(self, home: Path, token: str | None = token) -> dict[str, str]:
        """Return variables that direct another process's client to this server, without the user's own cache and login."""
        variables = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        variables |= {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
        # An empty HF_TOKEN counts as no token, and overrides one in the surrounding environment.
        return variables | {
            "HF_TOKEN": token or "",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def adopt_process(self, monkeypatch: pytest.MonkeyPatch, home: Path, token: str | None = token) -> None:
        """Direct this process's client to this server. It read its environment at import, so its constants are replaced as well."""
        from huggingface_hub import constants

        for name, value in self.environment(home, token).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            self.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def _is_large(name: str, data: bytes) -> bool:
    return len(data) > 0 and PurePosixPath(name).suffix in LFS_SUFFIXES


def _handler_for(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    return type("Handler", (_Handler,), {"hub": hub})


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    # headers and body in one packet: otherwise every answer waits 40 ms for the client's acknowledgement
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: requests are recorded in `HubServer.requests`."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        if fault := self.hub.take_fault(url.path, "cut upload"):
            self.rfile.read(fault.after_bytes)
            self.close_connection = True
            return
        self.body = self._read_body()
        self.query = parse_qs(url.query)
        self.hub.requests.append(Request(self.command, url.path, self.headers.get("Range")))
        if fault := self.hub.take_fault(url.path, "delay"):
            threading.Event().wait(fault.seconds)  # tests may replace time.sleep
        self.lost = self.hub.take_fault(url.path, "lose") is not None
        try:
            if fault := self.hub.take_fault(url.path, "fail"):
                if fault.headers is not None:
                    self._send(fault.status, b"", fault.headers)
                    return
                raise HubError(fault.status, None, fault.message)
            for methods, pattern, handle in ROUTES:
                if self.command in methods and (match := re.fullmatch(pattern, url.path)):
                    handle(
                        self, **{name: unquote(value) for name, value in match.groupdict(default="").items()}
                    )
                    return
            raise HubError(404, None, f"Sorry, we can't find the page {url.path}")
        except HubError as error:
            headers = {"X-Error-Message": error.message} | (
                {"X-Error-Code": error.code} if error.code else {}
            )
            self._send(error.status, json.dumps({"error": error.message}).encode(), headers)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        if self.lost:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.take_fault(urlsplit(self.path).path, "cut") if status in (200, 206) else None
        if cut is not None:
            body = body[: cut.after_bytes]
            self.close_connection = True
        self.wfile.write(body)

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode())

    def _send_content(self, data: bytes, headers: dict[str, str]) -> None:
        """Send a file's bytes, or the requested range of them."""
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if requested is None:
            self._send(200, data, headers)
            return
        start, end = int(requested[1]), min(int(requested[2] or len(data)), len(data) - 1)
        if start >= len(data):
            raise HubError(416, None, "Requested range not satisfiable")
        self._send(
            206, data[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"}
        )

    def _caller(self, write: bool = False) -> str | None:
        """Return the name of the user whose token came with the request, None without one."""
        header = self.headers.get("Authorization")
        if header is None:
            if write:
                raise HubError(401, None, "Invalid username or password.")
            return None
        if header == f"Bearer {self.hub.token}":
            return self.hub.user
        if header != f"Bearer {self.hub.read_token}":
            raise HubError(401, None, "Invalid credentials in Authorization header")
        if write:
            raise HubError(403, None, "Forbidden: you must use a write token to upload to a repository")
        return self.hub.user

    def _repo(self, repo_id: str, write: bool = False) -> Repo:
        caller = self._caller(write)
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and caller is None):
            raise HubError(404 if caller else 401, "RepoNotFound", "Repository not found")
        if repo.gated:
            raise HubError(403, "GatedRepo", "Access to this repository is restricted")
        return repo

    def whoami(self) -> None:
        if (name := self._caller()) is None:
            raise HubError(401, None, "Invalid username or password.")
        role = "write" if self.headers["Authorization"].endswith(self.hub.token) else "read"
        access = {"accessToken": {"displayName": "test", "role": role}, "type": "access_token"}
        self._send_json({"type": "user", "name": name, "fullname": name, "orgs": [], "auth": access})

    def create(self) -> None:
        name = self._caller(write=True)
        requested = json.loads(self.body)
        repo_id = f"{requested.get('organization') or name}/{requested['name']}"
        if repo_id.split("/")[0] != name:
            raise HubError(
                403,
                None,
                f'You don\'t have the rights to create a model under the namespace "{repo_id.split("/")[0]}"',
            )
        with self.hub.lock:
            exists = repo_id in self.hub.repos
            if not exists:
                self.hub.add_repo(
                    repo_id,
                    private=requested.get("visibility") == "private" or bool(requested.get("private")),
                )
        url = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        if exists:
            self._send(409, json.dumps({"error": "You already created this model repo", **url}).encode())
        else:
            self._send_json(url)

    def auth_check(self, repo_id: str, write: str) -> None:
        self._repo(repo_id, write=bool(write))
        self._send_json({})

    def info(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id)
        commit = repo.at(revision or "main")
        siblings = [
            {"rfilename": path, "size": len(blob.data)} for path, blob in sorted(commit.files.items())
        ]
        name = repo_id.removeprefix("datasets/")
        info = {
            "id": name,
            **({} if name != repo_id else {"modelId": name}),
            "sha": commit.oid,
            "private": repo.private,
            "siblings": siblings,
        }
        self._send_json({**info, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0})

    def info_of_head(self, repo_id: str) -> None:
        self.info(repo_id, "")

    def tree(self, repo_id: str, revision: str, path: str) -> None:
        commit = self._repo(repo_id).at(revision)
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix = f"{path}/" if path else ""
        inside = {name: blob for name, blob in sorted(commit.files.items()) if name.startswith(prefix)}
        if path and not inside:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        parts = [PurePosixPath(name).relative_to(path or ".") for name in inside]
        folders = {
            str(PurePosixPath(path, parent))
            for part in parts
            for parent in part.parents
            if str(parent) != "."
        }
        entries = [
            {"type": "directory", "path": name, "size": 0, "oid": _oid_of(name)} for name in sorted(folders)
        ]
        entries += [_tree_file(name, blob) for name, blob in inside.items()]
        self._send_json([e for e in entries if recursive or "/" not in str(e["path"])[len(prefix) :]])

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        commit = self._repo(repo_id).at(revision)
        if (blob := commit.files.get(path)) is None:
            body = json.dumps({"error": "Entry not found"}).encode()
            refusal = {
                "X-Error-Code": "EntryNotFound",
                "X-Error-Message": "Entry not found",
                "X-Repo-Commit": commit.oid,
            }
            self._send(404, body, refusal)
            return
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"'}
        if blob.lfs:
            linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
            self._send(302, b"", headers | linked | {"Location": f"{self.hub.cdn}/lfs/{blob.sha256}"})
        else:
            self._send_content(blob.data, headers)

    def download_object(self, sha256: str) -> None:
        if (data := self.hub.lfs_objects.get(sha256)) is None:
            raise HubError(404, "EntryNotFound", "No such object")
        self._send_content(data, {"ETag": f'"{sha256}"'})

    def validate_yaml(self) -> None:
        front_matter = re.match(r"---\r?\n(.*?)\r?\n---", json.loads(self.body)["content"], re.DOTALL)
        if front_matter is None:
            self._send_json(
                {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
            )
            return
        try:
            metadata = yaml.safe_load(front_matter[1])
        except yaml.YAMLError as error:
            self._send(400, json.dumps({"errors": [{"message": str(error)}], "warnings": []}).encode())
            return
        errors = [{"message": message} for message in _metadata_errors(metadata)]
        self._send(400 if errors else 200, json.dumps({"errors": errors, "warnings": []}).encode())

    def preupload(self, repo_id: str, revision: str) -> None:
        commit = self._repo(repo_id, write=True).at(revision)
        answers = []
        for item in json.loads(self.body)["files"]:
            known = commit.files.get(item["path"])
            large = item["size"] > 0 and _is_large(item["path"], base64.b64decode(item["sample"]))
            mode = {"path": item["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append(mode | ({"oid": known.etag} if known else {}))
        self._send_json({"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        self._repo(repo_id, write=True)
        objects = []
        for requested in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.endpoint}/lfs/{requested['oid']}", "header": {}}
            known = requested["oid"] in self.hub.lfs_objects
            objects.append(requested | ({} if known else {"actions": {"upload": upload}}))
        self._send_json({"transfer": "basic", "objects": objects})

    def upload_object(self, sha256: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise HubError(400, None, "The content does not match its sha256")
        self.hub.lfs_objects[sha256] = self.body
        self._send(200)

    def commit(self, repo_id: str, revision: str) -> None:
        with self.hub.lock:
            repo = self._repo(repo_id, write=True)
            files = dict(repo.at(revision).files)
            message = ""
            for line in self.body.splitlines():
                operation = json.loads(line)
                value = operation["value"]
                match operation["key"]:
                    case "header":
                        message = value["summary"]
                        if value.get("parentCommit", repo.head.oid) != repo.head.oid:
                            raise HubError(
                                412, None, "A commit has happened since. Please refresh and try again."
                            )
                    case "file":
                        files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
                    case "lfsFile":
                        if value["oid"] not in self.hub.lfs_objects:
                            raise HubError(400, None, f"Missing large file {value['path']}")
                        files[value["path"]] = Blob(self.hub.lfs_objects[value["oid"]], lfs=True)
                    case "deletedFile":
                        if files.pop(value["path"], None) is None:
                            raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
                    case "deletedFolder":
                        files = {
                            p: b
                            for p, b in files.items()
                            if not p.startswith(value["path"].rstrip("/") + "/")
                        }
                    case other:
                        raise HubError(400, None, f"Unknown operation {other}")
            commit = repo.commit(message, files)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{commit.oid}"
        self._send_json({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def tag(self, repo_id: str, revision: str) -> None:
        with self.hub.lock:
            repo, name = self._repo(repo_id, write=True), json.loads(self.body)["tag"]
            if name in repo.tags:
                raise HubError(409, None, f"Tag reference exists already, pick another name: {name}")
            repo.tags[name] = repo.at(revision).oid
        self._send_json({})


def _metadata_errors(metadata: Any) -> list[str]:
    """Return what the Hub rejects in a model card's metadata, of the keys that this project writes."""
    if not isinstance(metadata, dict):
        return ["the metadata must be a mapping"]
    errors = []
    if "license" in metadata and metadata["license"] not in ("openrail++", "apache-2.0", "mit", "other"):
        errors.append('"license" must be one of the known licenses')
    if "license_name" in metadata and metadata.get("license") != "other":
        errors.append('"license_name" is only allowed with "license: other"')
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", metadata.get("base_model", "owner/name")):
        errors.append('"base_model" with value that is not a model id')
    if metadata.get("base_model_relation", "adapter") not in ("adapter", "merge", "quantized", "finetune"):
        errors.append('"base_model_relation" must be one of adapter, merge, quantized, finetune')
    if not all(isinstance(tag, str) for tag in metadata.get("tags", [])):
        errors.append('"tags" must be an array of strings')
    for entry in metadata.get("widget", []):
        if not isinstance(entry.get("text"), str) or not isinstance(entry.get("output", {}).get("url"), str):
            errors.append('"widget" must have a text and an output url')
    for model in metadata.get("model-index", []):
        for result in model["results"] if "name" in model else [{}]:
            named = "type" in result.get("task", {}) and {"type", "name"} <= result.get("dataset", {}).keys()
            if not named or not all({"type", "value"} <= metric.keys() for metric in result["metrics"]):
                errors.append('"model-index" must have task, dataset and metrics')
    return errors


def _oid_of(text: str) -> str:
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def _tree_file(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.git_oid}
    if blob.lfs:
        entry["lfs"] = {
            "oid": blob.sha256,
            "size": len(blob.data),
            "pointerSize": 128 + len(str(len(blob.data))),
        }
    return entry


REPO = r"(?P<repo_id>[^/]+(?:/[^/]+)?)"
DATASET = r"(?P<repo_id>datasets/[^/]+(?:/[^/]+)?)"
REVISION = r"(?P<revision>[^/]+)"
READ = ("GET", "HEAD")
ROUTES: tuple[tuple[tuple[str, ...], str, Callable[..., None]], ...] = (
    (("GET",), r"/api/whoami-v2", _Handler.whoami),
    (("POST",), r"/api/repos/create", _Handler.create),
    (("POST",), r"/api/validate-yaml", _Handler.validate_yaml),
    (("GET",), rf"/api/models/{REPO}/auth-check(?P<write>/write)?", _Handler.auth_check),
    (("GET",), rf"/api/models/{REPO}/tree/{REVISION}(?:/(?P<path>.+))?", _Handler.tree),
    (("POST",), rf"/api/models/{REPO}/preupload/{REVISION}", _Handler.preupload),
    (("POST",), rf"/api/models/{REPO}/commit/{REVISION}", _Handler.commit),
    (("POST",), rf"/api/models/{REPO}/tag/{REVISION}", _Handler.tag),
    (("GET",), rf"/api/models/{REPO}(?:/revision/{REVISION})?", _Handler.info),
    (("GET",), rf"/api/{DATASET}/tree/{REVISION}(?:/(?P<path>.+))?", _Handler.tree),
    (("GET",), rf"/api/{DATASET}/revision/{REVISION}", _Handler.info),
    (("GET",), r"/api/(?P<repo_id>datasets/[^/]+/[^/]+)", _Handler.info_of_head),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), r"/lfs/(?P<sha256>[0-9a-f]{64})", _Handler.upload_object),
    (READ, r"/lfs/(?P<sha256>[0-9a-f]{64})", _Handler.download_object),
    (READ, rf"/{DATASET}/resolve/{REVISION}/(?P<path>.+)", _Handler.resolve),
    (READ, rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", _Handler.resolve),
)
