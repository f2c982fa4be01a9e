"""Model downloads: only the files in use, at a known commit, and again without a network."""

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdxl_pipeline import hub_client
from sdxl_pipeline.files.disk_space import DiskFullError
from sdxl_pipeline.models.base_model import BUNDLED_MODEL, BUNDLED_NAME, SDXL_BASE_ID, ResolvedModel
from sdxl_pipeline.models.model_files import BaseModelError
from tests.models.conftest import Resolve
from tests.support.hub_server import HubServer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        server.adopt_process(monkeypatch, tmp_path / "hf")
        monkeypatch.setattr(hub_client, "first_wait_seconds", 0.01)
        yield server


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The bundled model in a repository like SDXL's: both variants, and many other files."""
    folder = Path(shutil.copytree(BUNDLED_MODEL, tmp_path / "repository"))
    for path in list(folder.glob("*/*.safetensors")):
        shutil.copy(path, path.with_suffix(".fp16.safetensors"))
    for name in (
        "sd_xl_base_1.0.safetensors",
        "unet/model.onnx",
        "text_encoder/pytorch_model.bin",
        "README.md",
    ):
        (folder / name).write_bytes(b"not needed")
    return folder


def downloaded_files(hub: HubServer, tmp_path: Path) -> set[str]:
    snapshots = tmp_path / "hf" / "hub" / "models--someone--model" / "snapshots"
    return {
        path.relative_to(next(snapshots.iterdir())).as_posix()
        for path in snapshots.rglob("*")
        if path.is_file()
    }


def test_resolve_downloads_only_files_in_use_at_the_commit(
    hub, repository: Path, resolve: Resolve, bundled: ResolvedModel, tmp_path: Path
):
    commit = hub.add_repo("someone/model", repository)
    model = resolve("someone/model")
    assert model.revision == commit
    assert model.source == "someone/model"
    assert set(model.variants.values()) == {"fp16"}
    assert model.digests["tokenizer"] == bundled.digests["tokenizer"]
    files = downloaded_files(hub, tmp_path)
    assert {name for name in files if name.endswith(".safetensors")} == {
        f"{part}/{stem}.fp16.safetensors"
        for part, stem in [
            ("unet", "diffusion_pytorch_model"),
            ("vae", "diffusion_pytorch_model"),
            ("text_encoder", "model"),
            ("text_encoder_2", "model"),
        ]
    }
    assert {Path(name).suffix for name in files} <= {".safetensors", ".json", ".txt"}


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("path", ["/api/models/someone/model", "/resolve/", "/lfs/"])
def test_resolve_retries_a_download_while_the_hub_is_busy(
    hub: HubServer,
    repository: Path,
    resolve: Resolve,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    status: int,
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # of its own retries
    commit = hub.add_repo("someone/model", repository)
    hub.fail_next(2, status=status, path=path, headers={"Retry-After": "0"})
    assert resolve("someone/model").revision == commit


def test_resolve_of_a_cached_model_needs_no_network(hub, repository: Path, resolve: Resolve, monkeypatch):
    hub.add_repo("someone/model", repository)
    online = resolve("someone/model")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # closed port
    assert resolve("someone/model") == online
    with pytest.raises(BaseModelError, match=r"someone/other cannot be reached.*local folder"):
        resolve("someone/other")


def test_resolve_connection_lost_after_the_listing_reports_it_and_does_not_use_a_partial_cache(
    hub, repository: Path, resolve: Resolve, monkeypatch
):
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    hub.add_repo("someone/model", repository)
    cached_only = []

    def lose_connection(*_: object, local_files_only: bool, **__: object) -> str:
        cached_only.append(local_files_only)
        raise HTTPError("connection lost")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lose_connection)
    with pytest.raises(BaseModelError, match=r"someone/model cannot be reached.*lacks some of its files"):
        resolve("someone/model")
    assert cached_only == [False]


def test_resolve_in_offline_mode_uses_the_cache(hub, repository: Path, resolve: Resolve, monkeypatch):
    from huggingface_hub import constants

    hub.add_repo("someone/model", repository)
    online = resolve("someone/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("someone/model") == online


def test_resolve_with_a_revision_pins_the_commit(hub, repository: Path, resolve: Resolve):
    first = hub.add_repo("someone/model", repository)
    path = repository / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("epsilon", "v_prediction"))
    second = hub.add_repo("someone/model", repository)
    assert resolve("someone/model", revision=first).revision == first
    latest = resolve("someone/model")
    assert latest.revision == second
    assert latest.digest != resolve("someone/model", revision=first).digest
    with pytest.raises(BaseModelError, match="no revision 'nonesuch'"):
        resolve("someone/model", revision="nonesuch")


def test_resolve_of_an_unknown_repository_raises(hub, resolve: Resolve):
    with pytest.raises(BaseModelError, match=r"someone/absent is not a repository.*HF_TOKEN"):
        resolve("someone/absent")


def test_resolve_of_a_private_repository_requires_the_token(
    hub, repository: Path, resolve: Resolve, monkeypatch
):
    hub.add_repo("someone/model", repository, private=True)
    assert resolve("someone/model").revision
    monkeypatch.setenv("HF_TOKEN", "")
    hub.add_repo("someone/hidden", repository, private=True)
    with pytest.raises(BaseModelError, match="HF_TOKEN") as error:
        resolve("someone/hidden")
    assert hub.token not in str(error.value)


def test_resolve_of_pickles_raises_before_downloading_them(
    hub, repository: Path, resolve: Resolve, tmp_path: Path
):
    for path in (repository / "unet").glob("*.safetensors"):
        path.unlink()
    (repository / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02")
    hub.add_repo("someone/model", repository)
    with pytest.raises(BaseModelError, match=r"someone/model.*only as diffusion_pytorch_model\.bin"):
        resolve("someone/model")
    assert downloaded_files(hub, tmp_path) == set()


@pytest.mark.parametrize("at_root", [True, False])
def test_resolve_a_vae_from_the_hub(hub, repository: Path, resolve: Resolve, bundled: ResolvedModel, at_root):
    commit = hub.add_repo("someone/vae", repository / "vae" if at_root else repository)
    model = resolve(BUNDLED_NAME, vae="someone/vae")
    assert (model.vae_source, model.vae_revision, model.revision) == ("someone/vae", commit, None)
    assert model.variants == {"vae": "fp16"}
    assert Path(model.vae_path or "", "config.json").is_file()
    assert "unet" not in {path.name for path in Path(model.vae_path or "").parent.iterdir()}


def test_resolve_default_is_sdxl_base_without_the_replaced_vae(hub, repository: Path, resolve: Resolve):
    hub.add_repo(SDXL_BASE_ID, repository)
    model = resolve(None, vae=str(BUNDLED_MODEL / "vae"))
    assert model.source == SDXL_BASE_ID
    assert [path.name for path in (Path(model.path) / "vae").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Data processing error: No space left on device (os error 28)"),
    ],
)
def test_resolve_on_a_full_cache_disk_raises_with_the_needed_bytes(
    hub, repository: Path, resolve: Resolve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    import huggingface_hub

    hub.add_repo("someone/model", repository)
    download = huggingface_hub.snapshot_download

    def on_full_disk(*args, **options):
        if not options.get("dry_run"):
            raise error
        return download(*args, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", on_full_disk)
    with pytest.raises(
        DiskFullError, match=r"for someone/model: .* (needed), .* reserve.* free\. .*HF_HOME"
    ) as full:
        resolve("someone/model")
    assert "unknown" not in str(full.value)
    assert str(tmp_path / "hf") in str(full.value)
