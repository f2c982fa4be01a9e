"""Publishing with the Hub client to a local Hub server, and every reason for a failure."""

import dagster as dg
import pytest

from resources.hub import HubResource, missing_write_access
from sdxl_pipeline import hub_client
from tests.support.hub_server import HubServer


@pytest.fixture(scope="module")
def server():
    with HubServer() as hub:
        yield hub


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    server.adopt_process(monkeypatch, tmp_path)
    monkeypatch.setattr(hub_client, "first_wait_seconds", 0.01)
    return server


@pytest.fixture
def user(hub):
    from huggingface_hub import HfApi

    return HfApi(endpoint=hub.endpoint).whoami()["name"]


@pytest.fixture
def folder(tmp_path):
    release = tmp_path / "release"
    (release / "images").mkdir(parents=True)
    (release / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A LoRA\n")
    (release / "pytorch_lora_weights.safetensors").write_bytes(b"weights" * 1000)
    (release / "images" / "a.png").write_bytes(b"image")
    return release


def test_publish_publishes_all_files_in_one_commit(hub, user, folder):
    release = HubResource().publish(folder, f"{user}/released", True, "A LoRA of stars")
    published = hub.files(f"{user}/released")
    expected = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}
    assert {name: published[name] for name in expected} == expected
    assert hub.commits(f"{user}/released").count("A LoRA of stars") == 1
    assert release.commit in release.url
    assert release.url.startswith(hub.endpoint)


def test_qualified_id_adds_the_owner_that_the_hub_reports(hub, user):
    resource = HubResource()
    assert resource.qualified_id("released") == f"{user}/released"
    hub.fail_next(status=403, path="/whoami")
    assert resource.qualified_id("released") == "released"
    before = len(hub.requests)
    assert resource.qualified_id("other/released") == "other/released"
    assert len(hub.requests) == before


def test_publish_second_commit_replaces_changed_files(hub, user, folder):
    first = HubResource().publish(folder, f"{user}/twice", True, "first")
    (folder / "README.md").write_text("# Better\n")
    second = HubResource().publish(folder, f"{user}/twice", True, "second")
    assert first.commit != second.commit
    assert hub.files(f"{user}/twice")["README.md"] == b"# Better\n"


def test_publish_rejected_commit_is_a_failure(hub, user, folder):
    hub.fail_next(status=403, path="/commit/")
    with pytest.raises(dg.Failure, match=f"could not be published as {user}/refused"):
        HubResource().publish(folder, f"{user}/refused", True, "refused")
    assert "refused" not in hub.commits(f"{user}/refused")


CALLS = ("/repos/create", "/preupload/", "/objects/batch", "/commit/")


@pytest.mark.parametrize("path", CALLS)
@pytest.mark.parametrize("status", [429, 503])
def test_publish_busy_hub_retries_each_call(hub, user, folder, monkeypatch, path, status):
    monkeypatch.setattr(
        "huggingface_hub.utils._http.time.sleep", lambda _: None
    )  # of the client's own retries
    name = f"{user}/busy-{status}-{path.strip('/').replace('/', '-')}"
    (folder / "new.bin").write_bytes(name.encode())  # content that no other test has uploaded
    hub.fail_next(2, status=status, path=path, headers={"Retry-After": "0"})
    HubResource().publish(folder, name, True, "busy")
    assert "new.bin" in hub.files(name)


def test_check_can_push_busy_hub_waits_as_long_as_requested(hub, user, monkeypatch):
    waits = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    hub.fail_next(1, status=429, path="/whoami", headers={"Retry-After": "7"})
    hub.fail_next(1, status=429, path="/whoami", headers={"RateLimit": '"api";r=0;t=9'})
    hub.fail_next(1, status=500, path="/whoami")
    HubResource().check_can_push(f"{user}/stars")
    assert waits[:2] == [7, 9]
    assert 0 < waits[2] < 1


def test_check_can_push_busy_hub_fails_after_the_last_try(hub, user):
    before = len(hub.requests)
    hub.fail_next(hub_client.MAX_ATTEMPTS, status=503, path="/whoami")
    with pytest.raises(dg.Failure, match=r"HTTP 503.*unavailable.*again later"):
        HubResource().check_can_push(f"{user}/stars")
    assert len(hub.requests) - before == hub_client.MAX_ATTEMPTS


def test_check_can_push_long_wait_fails_at_once(hub, user):
    hub.fail_next(1, status=429, path="/whoami", headers={"Retry-After": "86400"})
    with pytest.raises(dg.Failure, match="HTTP 429: the Hub's rate limit is reached"):
        HubResource().check_can_push(f"{user}/stars")


@pytest.mark.parametrize("path", ["/repos/create", "/commit/"])
def test_publish_lasting_conflict_without_body_fails_with_a_message(hub, user, folder, path):
    hub.fail_next(hub_client.MAX_ATTEMPTS, status=409, path=path, headers={})
    with pytest.raises(dg.Failure) as failure:
        HubResource().publish(folder, f"{user}/conflict", True, "conflict")
    message = str(failure.value.description)
    assert f"could not be published as {user}/conflict: " in message
    assert "'url'" not in message
    assert "another" in message
    assert "materialize hub_release again" in message


def test_check_can_push_write_token_passes(hub, user):
    HubResource().check_can_push(f"{user}/anything")
    HubResource().check_can_push("anything")


def test_check_can_push_without_token_fails_without_a_request(server, monkeypatch, tmp_path):
    server.adopt_process(monkeypatch, tmp_path, token=None)
    requests_before = len(server.requests)
    with pytest.raises(
        dg.Failure, match=r"no token for publishing me/stars.*HF_TOKEN.*hf auth login.*push_to_hub"
    ) as raised:
        HubResource().check_can_push("me/stars")
    assert raised.value.allow_retries is False
    assert len(server.requests) == requests_before


def test_check_can_push_unknown_token_fails_without_printing_it(server, monkeypatch, tmp_path):
    server.adopt_process(monkeypatch, tmp_path, token="hf_of_somewhere_else")
    with pytest.raises(dg.Failure, match=r"rejects the token.*HF_TOKEN") as raised:
        HubResource().check_can_push("me/stars")
    assert "hf_of_somewhere_else" not in str(raised.value.description)


def test_check_can_push_denied_whoami_asks_about_the_repository(hub, user, caplog):
    """A usable token need not be allowed to ask who it is."""
    hub.add_repo(f"{user}/known")
    hub.fail_next(3, status=403, path="/whoami")
    HubResource().check_can_push(f"{user}/known")
    assert not caplog.messages
    HubResource().check_can_push(f"{user}/unknown")
    assert "does not report whether the token may create" in caplog.messages[-1]
    hub.fail_next(status=403, path="/auth-check")
    with pytest.raises(dg.Failure, match=r"rejects the token.*HF_TOKEN") as raised:
        HubResource().check_can_push(f"{user}/known")
    assert raised.value.allow_retries is False


def test_check_can_push_read_only_token_fails(server, monkeypatch, tmp_path):
    server.adopt_process(monkeypatch, tmp_path, token=server.read_token)
    with pytest.raises(dg.Failure, match=r"the token is read-only and cannot publish someone/stars"):
        HubResource().check_can_push("someone/stars")


@pytest.mark.parametrize(("status", "retries"), [(403, False), (500, True)])
def test_publish_failure_may_be_retried_if_only_the_hub_is_at_fault(hub, user, folder, status, retries):
    hub.fail_next(hub_client.MAX_ATTEMPTS, status=status, path="/commit/")
    with pytest.raises(dg.Failure, match=f"HTTP {status}") as raised:
        HubResource().publish(folder, f"{user}/failed-{status}", True, "failed")
    hub.clear_faults()
    assert raised.value.allow_retries is retries


def test_publish_of_a_rejected_card_creates_no_repository(hub, user, folder):
    (folder / "README.md").write_text("---\nlicense: unknown\n---\n")
    with pytest.raises(
        dg.Failure, match=r'the Hub rejects the metadata.*"license".*materialize hub_release'
    ) as raised:
        HubResource().publish(folder, f"{user}/card", True, "card")
    assert raised.value.allow_retries is False
    assert f"{user}/card" not in hub.repos


def test_check_can_push_repository_of_another_owner_fails(hub, user):
    with pytest.raises(
        dg.Failure, match=rf"belongs to someone-else, but the token belongs to {user}.*hub_model_id"
    ):
        HubResource().check_can_push("someone-else/stars")


def test_check_can_push_unreachable_hub_fails_with_retries(hub):
    with pytest.raises(dg.Failure, match=r"the Hub at http://127\.0\.0\.1:9 did not answer") as raised:
        HubResource(endpoint="http://127.0.0.1:9").check_can_push("me/stars")
    assert raised.value.allow_retries is True


def account(role="write", orgs=(), scoped=()):
    token = {"role": role, "fineGrained": {"scoped": list(scoped)}}
    return {"name": "me", "orgs": list(orgs), "auth": {"accessToken": token}}


def scope(name, *permissions):
    return {"entity": {"name": name}, "permissions": list(permissions)}


@pytest.mark.parametrize(
    ("repo_id", "whoami", "problem"),
    [
        ("stars", account(), None),
        ("me/stars", account(), None),
        ("me/stars", account(role="read"), "is read-only"),
        ("us/stars", account(orgs=[{"name": "us", "roleInOrg": "write"}]), None),
        ("us/stars", account(orgs=[{"name": "us"}]), None),
        (
            "us/stars",
            account(orgs=[{"name": "us", "roleInOrg": "read"}]),
            "may only read in the organization us",
        ),
        ("them/stars", account(orgs=[{"name": "us", "roleInOrg": "write"}]), "not a member of it"),
        ("me/stars", account(role="fineGrained", scoped=[scope("me", "repo.write")]), None),
        ("stars", account(role="fineGrained", scoped=[scope("me/stars", "repo.write")]), None),
        ("me/stars", account(role="fineGrained", scoped=[scope("me/moons", "repo.write")]), "fine-grained"),
        ("me/stars", account(role="fineGrained", scoped=[scope("me", "repo.content.read")]), "fine-grained"),
        ("me/stars", {"name": "me"}, None),
    ],
)
def test_missing_write_access_account_and_token_decide(repo_id, whoami, problem):
    message = missing_write_access(whoami, repo_id)
    assert (message is None) if problem is None else (problem in message)
