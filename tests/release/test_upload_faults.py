"""Every fault at every call of the upload, with the real client: released exactly once, or failed with reason and next step.

The repository holds an earlier release and a checkpoint, so that every call is made. Each failed upload is repeated without the fault.
"""

from pathlib import Path

import pytest

from sdxl_pipeline import hub_client
from sdxl_pipeline.release.upload import IN_FLIGHT, UNPUBLISHED, Published, UploadError
from tests.release.hub_publishing import files_of, publish_to, write_release
from tests.support.hub_server import Blob, HubServer

CALLS = {
    "create": "/repos/create",
    "head": "/revision/main",
    "list": "/tree/",
    "lineage": "/resolve/",
    "preupload": "/preupload/",
    "batch": "/objects/batch",
    "upload": "^/lfs/",
    "validate": "/validate-yaml",
    "commit": "/commit/",
    "find tag": "/revision/r-",
    "tag": "/tag/",
}
AFTER_COMMIT = ("find tag", "tag")
CHECKPOINT = {"checkpoints/run/a.bin": b"checkpoint"}
PERMANENT = {401: "HF_TOKEN", 402: "upgrade the plan", 403: "HF_TOKEN", 404: "hub_model_id"}
TOKEN_OF_CREATION = (401, 402, 403)
"""After these the client looks whether the repository exists, and goes on."""
MANY = 1000


@pytest.fixture(scope="module")
def server():
    with HubServer() as hub:
        yield hub


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    server.adopt_process(monkeypatch, tmp_path / "home")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # all waits of this process
    yield server
    server.clear_faults()


class Case:
    """One release of a repository that holds an earlier one, and what is true of it whatever happens."""

    def __init__(self, hub: HubServer, folder: Path, name: str) -> None:
        self.hub, self.repo_id = hub, f"someone/{name}"
        publish_to(hub, write_release(folder / "earlier", weights=b"earlier", old__json=b"{}"), self.repo_id)
        self.repo = hub.repos[self.repo_id]
        self.repo.commit(
            "Checkpoint", self.repo.head.files | {k: Blob(v, False) for k, v in CHECKPOINT.items()}
        )
        self.folder = write_release(folder / "release", weights=name.encode(), README__md=b"# Changed\n")
        self.before, self.content = self.state(), files_of(self.folder)
        self.log: list[str] = []

    def state(self) -> tuple[int, int]:
        return len(self.repo.commits), len(self.repo.tags)

    def publish(self) -> Published | UploadError:
        """Publish once, and require what holds for success and failure."""
        try:
            result: Published | UploadError = publish_to(self.hub, self.folder, self.repo_id, self.log)
        except UploadError as error:
            result = error
        self.hub.clear_faults()
        assert files_of(self.folder) == self.content
        assert not any(self.hub.token in text for text in (*self.log, str(result)))
        assert len(self.repo.commits) - self.before[0] <= 1
        if isinstance(result, UploadError):
            assert "The release stays on disk; materialize hub_release again" in str(result)
        else:
            self.require_released()
        return result

    def require_released(self) -> None:
        assert self.state() == (self.before[0] + 1, self.before[1] + 1)
        assert self.hub.files(self.repo_id) == self.content | CHECKPOINT
        assert list(self.repo.tags.values())[-1] == self.repo.head.oid

    def publish_again(self) -> None:
        """Publish without a fault after a failure."""
        assert isinstance(self.publish(), Published)


@pytest.fixture
def case(hub, tmp_path, request):
    name = "".join(c if c.isalnum() else "-" for c in request.node.name).strip("-")
    return Case(hub, tmp_path, name[-60:].strip("-"))


@pytest.mark.parametrize("status", [409, 412, 429, 500])
@pytest.mark.parametrize("call", CALLS)
def test_publish_after_two_temporary_faults_releases_once(hub, case, call, status):
    hub.fail_next(2, status=status, path=CALLS[call], headers={"Retry-After": "0"} if status == 429 else None)
    assert isinstance(case.publish(), Published)


@pytest.mark.parametrize("status", PERMANENT)
@pytest.mark.parametrize("call", CALLS)
def test_publish_rejected_call_fails_at_once_with_the_next_step(hub, case, call, status):
    hub.fail_next(1, status=status, path=CALLS[call])
    result = case.publish()
    if call == "create" and status in TOKEN_OF_CREATION:
        assert isinstance(result, Published)
        return
    assert isinstance(result, UploadError)
    assert f"HTTP {status}: " in str(result)
    assert PERMANENT[status] in str(result)
    assert not case.log
    assert result.is_lasting == (call not in AFTER_COMMIT)
    published = "are published as commit" if call in AFTER_COMMIT else UNPUBLISHED
    assert published in str(result)
    assert case.state() == (case.before[0] + (call in AFTER_COMMIT), case.before[1])
    case.publish_again()


@pytest.mark.parametrize("status", [pytest.param(429, marks=pytest.mark.slow), 500])
@pytest.mark.parametrize("call", CALLS)
def test_publish_with_a_lasting_fault_fails_and_may_be_repeated(hub, case, call, status):
    hub.fail_next(MANY, status=status, path=CALLS[call])
    result = case.publish()
    assert isinstance(result, UploadError)
    assert f"HTTP {status}: " in str(result)
    assert not result.is_lasting
    assert len(case.log) == hub_client.MAX_ATTEMPTS - 1
    case.publish_again()


@pytest.mark.parametrize("call", CALLS)
def test_publish_with_a_lost_answer_releases_once(hub, case, call):
    """The Hub has done what was asked, and the connection ends before the answer."""
    hub.lose_next(1, path=CALLS[call])
    assert isinstance(case.publish(), Published)


@pytest.mark.parametrize("call", ["commit", "tag"])
def test_publish_with_every_answer_lost_fails_and_is_found_later(hub, case, call):
    hub.lose_next(MANY, path=CALLS[call])
    hub.fail_next(MANY, status=500, path="/revision/r-" if call == "tag" else "^$")
    result = case.publish()
    assert call == "tag" or isinstance(result, Published)  # found when the head was read again
    if call == "tag":
        assert isinstance(result, UploadError)
        assert "are published as commit" in str(result)
        case.publish_again()


def test_publish_with_a_commit_of_unknown_fate_finds_it_later(hub, case):
    hub.lose_next(1, path=CALLS["commit"])
    hub.fail_next(1, status=200, path="^$")
    case.log = _FailingHead(hub)
    result = case.publish()
    assert isinstance(result, UploadError)
    assert IN_FLIGHT in str(result)
    assert not result.is_lasting
    case.log = []
    case.publish_again()


class _FailingHead(list):
    """A log that makes the Hub unavailable as soon as the first retry is reported."""

    def __init__(self, hub: HubServer) -> None:
        super().__init__()
        self._hub = hub

    def append(self, line: str) -> None:
        super().append(line)
        self._hub.fail_next(MANY, status=503, path="/revision/main")


@pytest.mark.parametrize("call", ["preupload", "batch", "upload", "commit"])
def test_publish_cut_in_the_middle_of_a_request_releases_once(hub, case, call):
    hub.cut_upload_next(5, count=2, path=CALLS[call])
    assert isinstance(case.publish(), Published)


def test_publish_with_every_upload_cut_publishes_nothing(hub, case):
    hub.cut_upload_next(5, count=MANY)
    result = case.publish()
    assert isinstance(result, UploadError)
    assert UNPUBLISHED in str(result)
    assert case.state() == case.before
    case.publish_again()


def test_publish_to_a_slow_hub_releases_once_without_a_retry(hub, case):
    for path in CALLS.values():
        hub.delay_next(0.03, count=MANY, path=path)
    assert isinstance(case.publish(), Published)
    assert not case.log


@pytest.mark.parametrize("call", ["create", "upload", "commit", "tag"])
def test_publish_to_a_silent_hub_gives_up_the_call_and_releases_once(hub, case, call, monkeypatch):
    """The late request is handled after its repetition: the parent commit rejects it."""
    monkeypatch.setattr(hub_client, "max_silence_seconds", 0.25)
    hub.delay_next(0.5, path=CALLS[call])
    assert isinstance(case.publish(), Published)


def test_publish_with_a_read_only_token_fails(server, case, monkeypatch, tmp_path):
    server.adopt_process(monkeypatch, tmp_path / "home", token=server.read_token)
    result = case.publish()
    assert isinstance(result, UploadError)
    assert "you must use a write token" in str(result)
    assert "HF_TOKEN" in str(result)
    assert case.state() == case.before


@pytest.mark.parametrize("call", ["create", "preupload", "batch", "commit"])
@pytest.mark.parametrize("message", ["Private repository storage limit reached, please upgrade your plan"])
def test_publish_over_the_quota_fails_with_the_ways_out(hub, tmp_path, call, message):
    folder = write_release(tmp_path / "release", weights=call.encode())
    hub.fail_next(1, status=403, path=CALLS[call], message=message)
    with pytest.raises(UploadError, match=f"HTTP 403: {message}") as raised:
        publish_to(hub, folder, f"someone/quota-{call}")
    assert "Free storage" in str(raised.value)
    assert "hub_model_id" in str(raised.value)
    assert "HF_TOKEN" not in str(raised.value)
    assert publish_to(hub, folder, f"someone/quota-{call}").changed


def test_publish_of_rejected_metadata_names_every_reason(hub, tmp_path):
    folder = write_release(
        tmp_path / "release", README__md=b"---\nlicense: unknown\nbase_model: /model\n---\n"
    )
    with pytest.raises(
        UploadError, match=r'Invalid metadata in README.md. - "license".* - "base_model"'
    ) as raised:
        publish_to(hub, folder, "someone/metadata")
    assert raised.value.is_lasting
    assert UNPUBLISHED in str(raised.value)
    assert len(hub.commits("someone/metadata")) == 1


def test_publish_with_a_malformed_token_does_not_print_it(server, monkeypatch, tmp_path):
    token = "hf_malformed\x07token"
    server.adopt_process(monkeypatch, tmp_path / "home", token=token)
    with pytest.raises(UploadError) as raised:
        publish_to(server, write_release(tmp_path / "release"), "someone/zorp")
    assert "hf_mal" not in str(raised.value)


def test_publish_unreachable_hub_fails_with_the_reason(hub, tmp_path):
    from huggingface_hub import HfApi

    from sdxl_pipeline.release.upload import publish

    with pytest.raises(UploadError, match=r"ConnectError: .*refused") as raised:
        publish(HfApi(endpoint="http://127.0.0.1:9"), write_release(tmp_path / "r"), "someone/a", True, "a")
    assert not raised.value.is_lasting
