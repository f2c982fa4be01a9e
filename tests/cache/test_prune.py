"""Holds what a prune frees and what it must not: on real project folders, stores, manifests and tables."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from sdxl_pipeline.cache.prune import DAMAGED, PruneReport, prune
from sdxl_pipeline.cache.references import PruneError
from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.config.loader import load_project
from sdxl_pipeline.files.storage_layout import StorageLayout
from sdxl_pipeline.runtime.specs import LatentCache, TextEmbedCache

OLD = time.time() - 7200


def digest(what: object) -> str:
    return hashlib.sha256(str(what).encode()).hexdigest()


class World:
    """A storage, and projects with one dataset `shapes` each, whose stages seem to have run."""

    def __init__(self, root: Path, make_project: Callable[..., Path]) -> None:
        self.places = StorageLayout(root)
        self.make_project = make_project
        self.projects: Path | None = None

    def project(self, name: str, **options) -> Path:
        folder = self.make_project(name, images=0, **options)
        self.projects = folder.parent
        return folder

    def encode(self, project: str, stage: str, numbers, dataset: str = "shapes", store: Path | None = None):
        """What a stage leaves: entries in the store, their table, and its manifest as the asset's value and beside the table."""
        root = store or (self.places.latents if stage == "vae_latents" else self.places.text_embeds)
        entries = TensorStore(root)
        with entries.writer(shard_rows=4) as writer:
            for number in numbers:
                writer.add(digest(number), {"mean": torch.full((16,), float(number))})
        work = self.places.work / project / dataset / stage
        work.mkdir(parents=True, exist_ok=True)
        keys = [digest(number) for number in numbers]
        manifest_type, column = (
            (LatentCache, "latent_key") if stage == "vae_latents" else (TextEmbedCache, "embed_key")
        )
        pd.DataFrame({column: keys}).to_parquet(work / "entries.parquet")
        fields = {"store_root": str(root), "entries_path": str(work / "entries.parquet")}
        if stage == "text_embeds":
            pd.DataFrame({column: keys[:1]}).to_parquet(work / "prompts.parquet")
            fields["prompts_path"] = str(work / "prompts.parquet")
        manifest = manifest_type.model_construct(**fields).model_dump_json(include=set(fields))
        value = self.places.values / project / dataset / f"{stage}.json"
        value.parent.mkdir(parents=True, exist_ok=True)
        value.write_text(manifest)
        (work / "entries.finished.json").write_text(manifest)

    def table(self, project: str, name: str) -> Path:
        path = self.places.work / project / "shapes" / "vae_latents" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"path": [name]}).to_parquet(path)
        return path

    def prune(self, **options) -> PruneReport:
        for path in self.places.root.rglob("*"):
            os.utime(path, (OLD, OLD))
        assert self.projects is not None
        return prune(self.places.root, self.projects, **options)

    def left(self, store: Path) -> set[int]:
        keys = TensorStore(store).keys()
        return {number for number in range(200) if digest(number) in keys}


@pytest.fixture
def world(tmp_path: Path, make_project) -> World:
    return World(tmp_path / "storage", make_project)


def kinds(report: PruneReport) -> dict[str, int]:
    counts: dict[str, int] = {}
    for item in report.freed:
        counts[item.what] = counts.get(item.what, 0) + item.count
    return counts


def test_what_the_manifests_name_stays_and_the_rest_goes(world: World):
    world.project("small")
    world.encode("small", "vae_latents", range(12))
    world.encode("small", "text_embeds", range(8))
    world.encode("small", "vae_latents", range(4))  # the dataset has shrunk
    before = {path: path.stat().st_size for path in world.places.root.rglob("*.safetensors")}
    foreseen = world.prune(dry_run=True)
    assert all(path.exists() for path in before)
    done = world.prune()
    assert foreseen == done
    assert kinds(done) == {"entries": 8}
    assert done.bytes == sum(size for path, size in before.items() if not path.exists()) > 0
    assert world.left(world.places.latents) == set(range(4))
    assert world.left(world.places.text_embeds) == set(range(8))
    assert world.prune().freed == ()


def test_projects_that_share_a_store_keep_what_either_names(world: World, tmp_path: Path):
    shared = tmp_path / "elsewhere"
    world.project("first", dataset={"cache_dir_vae": str(shared)})
    world.project("second", dataset={"cache_dir_vae": str(shared)})
    world.encode("first", "vae_latents", range(0, 12), store=shared)
    world.encode("second", "vae_latents", range(4, 16), store=shared)
    world.encode("first", "vae_latents", range(0, 8), store=shared)
    assert kinds(world.prune()) == {}
    world.encode("second", "vae_latents", range(4, 12), store=shared)
    assert kinds(world.prune()) == {"entries": 4}
    assert world.left(shared) == set(range(12))


def test_the_store_of_a_dataset_that_was_never_encoded_again_is_emptied(world: World, tmp_path: Path):
    own = tmp_path / "own"
    folder = world.project("small", dataset={"cache_dir_vae": str(own)})
    world.encode("small", "vae_latents", range(4), store=own)
    settings = json.loads((folder / "multidatabackend.json").read_text())
    settings[0]["id"] = "renamed"
    (folder / "multidatabackend.json").write_text(json.dumps(settings))
    done = world.prune()
    assert kinds(done) == {"entries": 4, "gone datasets": 2}
    assert not (world.places.values / "small" / "shapes").exists()
    assert not (world.places.work / "small" / "shapes").exists()


def test_a_project_with_a_typo_keeps_everything_it_had(world: World, tmp_path: Path):
    own = tmp_path / "own"
    folder = world.project("small", dataset={"cache_dir_vae": str(own)})
    world.encode("small", "vae_latents", range(8), store=own)
    world.encode("small", "text_embeds", range(8))
    download = world.places.sources / f"shapes-{digest(1)[:12]}"
    (download / "files").mkdir(parents=True)
    for content in ('{"learning_rat": 1}', "{"):
        (folder / "config.json").write_text(content)
        done = world.prune()
        assert kinds(done) == {}
        assert any("small: its files hold problems" in note for note in done.notes)
    (folder / "multidatabackend.json").write_text("[]")
    assert kinds(world.prune()) == {}
    assert world.left(own) == set(range(8))
    assert (world.places.values / "small" / "shapes").exists()
    assert download.exists()


def test_a_project_that_is_gone_is_cleared_away(world: World):
    world.project("kept")
    folder = world.project("gone")
    world.encode("kept", "vae_latents", range(4))
    world.encode("gone", "vae_latents", range(8))
    (world.places.work / "base_models").mkdir()
    assert kinds(world.prune()) == {}
    shutil.rmtree(folder)
    assert kinds(world.prune()) == {"entries": 4, "gone projects": 2}
    assert not (world.places.values / "gone").exists()
    assert not (world.places.work / "gone").exists()
    assert (world.places.work / "base_models").exists()
    assert (world.places.values / "kept").exists()
    assert world.left(world.places.latents) == set(range(4))


def test_projects_in_another_folder_that_used_this_storage_count(world: World, tmp_path: Path):
    world.project("here")
    others = tmp_path / "others"
    shutil.copytree(world.project("there"), others / "there")
    shutil.rmtree(tmp_path / "projects" / "there")
    world.encode("there", "vae_latents", range(4))
    world.places.remember_projects(others)
    assert kinds(world.prune()) == {}
    shutil.rmtree(others)
    with pytest.raises(PruneError, match=r"there is no folder of projects .*others"):
        world.prune()
    (marker,) = world.places.remembered_projects().values()
    marker.unlink()
    assert kinds(world.prune()) == {"entries": 4, "gone projects": 2}


def test_a_folder_of_projects_that_is_mistyped_frees_nothing(world: World):
    world.project("small")
    world.encode("small", "vae_latents", range(4))
    assert world.projects is not None
    world.projects = world.projects / "typo"
    with pytest.raises(PruneError, match="SDXL_PIPELINE_PROJECTS"):
        world.prune()
    assert world.left(world.places.latents) == set(range(4))


@pytest.mark.parametrize("damage", ["delete", "truncate", "keys"])
def test_a_store_is_left_alone_when_a_table_cannot_be_read(world: World, damage):
    world.project("small")
    world.encode("small", "vae_latents", range(8))
    world.encode("small", "text_embeds", range(8))
    world.encode("small", "text_embeds", range(4))
    table = world.places.work / "small" / "shapes" / "vae_latents" / "entries.parquet"
    if damage == "delete":
        table.unlink()
    elif damage == "truncate":
        table.write_bytes(table.read_bytes()[:-9])
    else:
        pd.DataFrame({"latent_key": ["none"]}).to_parquet(table)
    done = world.prune()
    assert any("nothing is freed" in note and str(table) in note for note in done.notes)
    assert world.left(world.places.latents) == set(range(8))
    assert world.left(world.places.text_embeds) == set(range(4)), "the other store is pruned"


@pytest.mark.parametrize("content", ["{", "[]", '{"store_root": 3}', '{"entries_path": "x"}'])
def test_a_manifest_that_cannot_be_read_stops_everything(world: World, content):
    world.project("small")
    world.encode("small", "vae_latents", range(8))
    world.encode("small", "vae_latents", range(4))
    value = world.places.values / "small" / "shapes" / "vae_latents.json"
    value.write_text(content)
    with pytest.raises(PruneError, match=r"vae_latents.json cannot be read"):
        world.prune()
    assert world.left(world.places.latents) == set(range(8))


def test_what_a_stage_has_just_finished_counts_before_its_asset_has_handed_it_on(world: World):
    world.project("small")
    world.encode("small", "vae_latents", range(8))
    (world.places.values / "small" / "shapes" / "vae_latents.json").unlink()
    assert kinds(world.prune()) == {}


def test_running_stages_keep_what_they_lease_and_are_named(world: World):
    world.project("small")
    world.encode("small", "vae_latents", range(8))
    world.encode("small", "vae_latents", range(4))
    store = TensorStore(world.places.latents)
    with store.lease([digest(number) for number in range(8)], purpose="train small"):
        done = world.prune()
        assert kinds(done) == {}
        assert any(f"train small (process {os.getpid()}" in note for note in done.notes)
    assert kinds(world.prune()) == {"entries": 4}


def test_tables_that_no_manifest_and_no_spec_names_go_once_they_are_old(world: World):
    folder = world.project("small")
    named, by_run, superseded, young, other = (
        world.table("small", name)
        for name in (
            f"rows-{digest(1)[:16]}",
            f"rows-{digest(2)[:16]}",
            f"captions-{digest(3)[:16]}",
            f"rows-{digest(4)[:16]}",
            "faces",
        )
    )
    (named.parent / "encode_latents.spec.json").write_text(json.dumps({"rows_path": str(named)}))
    run = Path(load_project(folder).training.output_dir) / "lora" / "abc"
    run.mkdir(parents=True)
    (run / "spec.json").write_text(json.dumps({"datasets": [{"rows_path": str(by_run)}]}))
    for path in world.places.root.rglob("*"):
        os.utime(path, (OLD, OLD))
    os.utime(young)
    assert world.projects is not None
    report = prune(world.places.root, world.projects)
    assert kinds(report) == {"superseded tables": 1}
    assert not superseded.exists()
    assert all(path.exists() for path in (named, by_run, young, other))


def test_what_a_dataset_of_masks_leaves_stays_while_it_is_one(world: World):
    folder = world.project("small", dataset={"conditioning_data": "disc-masks"})
    file = folder / "multidatabackend.json"
    masks = {"dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "masks"}
    entries = [*json.loads(file.read_text()), {"id": "disc-masks", **masks}]
    file.write_text(json.dumps(entries))
    work = world.places.work / "small" / "disc_masks" / "dataset"
    value = world.places.values / "small" / "disc_masks"
    for place in (work, value):
        place.mkdir(parents=True)
        (place / "scan.parquet").write_bytes(b"x")
    superseded = world.table("small", f"masks-{digest(1)[:16]}")
    assert kinds(world.prune()) == {"superseded tables": 1}
    assert not superseded.exists()
    file.write_text(json.dumps([{**entries[0], "conditioning_data": None}]))
    assert kinds(world.prune()) == {"gone datasets": 2}
    assert not work.exists()
    assert not value.exists()


def test_downloads_that_no_dataset_reads_go(world: World):
    folder = world.project(
        "small",
        dataset={"type": "huggingface", "dataset_name": "someone/images", "instance_data_dir": None},
    )
    settings = json.loads((folder / "multidatabackend.json").read_text())
    del settings[0]["instance_data_dir"]
    settings[0]["caption_strategy"] = "huggingface"
    (folder / "multidatabackend.json").write_text(json.dumps(settings))
    from sdxl_pipeline.data.sources import data_folder

    (dataset,) = load_project(folder).datasets
    read = data_folder(dataset, world.places.sources)
    older = world.places.sources / f"shapes-{digest('older')[:12]}"
    other = world.places.sources / "not a download"
    for path in (read, older / "files", other):
        path.mkdir(parents=True)
        (path / "a.jpg").write_bytes(b"x" * 500)
    done = world.prune()
    assert kinds(done) == {"downloads": 1}
    assert done.bytes == 500
    assert (read.exists(), older.exists(), other.exists()) == (True, False, True)


def test_unfinished_files_of_killed_processes_go(world: World):
    world.project("small")
    world.encode("small", "vae_latents", range(4))
    half = world.places.values / "small" / ".lora.77-abcd.tmp.json"
    half.write_bytes(b"x" * 10)
    done = world.prune()
    assert kinds(done) == {"unfinished files": 1}
    assert not half.exists()


def test_leftovers_in_outputs_and_of_killed_runs_go_when_nobody_can_still_need_them(world: World):
    folder = world.project("small")
    output = folder / "output"
    left = [
        output / "lora" / "abc" / "ema" / ".weights.77-0123abcd.tmp.safetensors",
        output / "evaluation" / ".gallery.77-0123abcd.tmp.png",
        output / ".release.77.tmp" / "README.md",
    ]
    run = "01234567-89ab-cdef-0123-456789abcdef"
    spec = world.places.work / "small" / "lora" / f"train.{run}.spec.json"
    kept = [output / "lora" / "abc" / "notes.tmp.txt", output / ".release.77.old" / "README.md"]
    for path in (*left, *kept, spec):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    day_ago, young = time.time() - 24 * 3600, output / "evaluation" / ".report.77-0123abcd.tmp.md"
    young.write_text("under way")
    for path in output.rglob("*"):
        if path != young:
            os.utime(path, (OLD, OLD))
    os.utime(spec, (day_ago, day_ago))
    assert world.projects is not None
    report = prune(world.places.root, world.projects)
    assert kinds(report) == {"unfinished files": 3}
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in (*kept, young, spec))
    (output / "release").mkdir()
    week_ago = day_ago - 7 * 24 * 3600
    os.utime(spec, (week_ago, week_ago))
    prune(world.places.root, world.projects)
    assert not kept[1].exists(), "it has been replaced"
    assert not spec.exists()


def test_what_is_young_is_left_alone(world: World):
    world.project("small")
    world.encode("elsewhere", "vae_latents", range(4))
    assert world.projects is not None
    report = prune(world.places.root, world.projects)
    assert "gone projects" not in kinds(report)
    assert (world.places.values / "elsewhere").exists()


def test_an_empty_storage_has_nothing_to_free(world: World):
    world.project("small")
    world.places.root.mkdir()
    assert world.prune().freed == ()
    assert list(world.places.root.iterdir()) == []


def test_verify_counts_damaged_entries_and_removes_them_from_the_index(world: World):
    world.project("small")
    world.encode("small", "vae_latents", range(12))
    world.encode("small", "text_embeds", range(4))
    damaged = sorted((world.places.latents / "shards").iterdir())[1]
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1  # of the entry 7
    damaged.write_bytes(data)
    assert kinds(world.prune(dry_run=True)) == {}
    seen: list[tuple[str, int, int]] = []
    foreseen = world.prune(dry_run=True, verify=True, on_progress=lambda *progress: seen.append(progress))
    assert kinds(foreseen) == {DAMAGED: 1}
    assert [(done, total) for what, done, total in seen if str(world.places.latents) in what][-1] == (12, 12)
    assert world.left(world.places.latents) == set(range(12))
    assert kinds(world.prune(verify=True)) == {DAMAGED: 1}
    assert world.left(world.places.latents) == set(range(12)) - {7}
    assert kinds(world.prune(verify=True)) == {}
