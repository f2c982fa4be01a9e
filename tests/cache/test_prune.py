"""Prune: what it frees and what it must retain, on real project folders, stores, manifests and tables."""

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

from sdxl_pipeline.cache.prune import CORRUPT_ENTRIES, PruneReport, prune
from sdxl_pipeline.cache.references import PruneError
from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.config.loader import load_project
from sdxl_pipeline.files.storage_layout import StorageLayout
from sdxl_pipeline.runtime.specs import LatentCache, TextEmbedCache

OLD = time.time() - 7200


def digest(what: object) -> str:
    return hashlib.sha256(str(what).encode()).hexdigest()


class PruneFixture:
    """A storage folder, and projects with one dataset `shapes` each, as after running their stages."""

    def __init__(self, root: Path, make_project: Callable[..., Path]) -> None:
        self.layout = StorageLayout(root)
        self.make_project = make_project
        self.projects: Path | None = None

    def project(self, name: str, **options) -> Path:
        folder = self.make_project(name, images=0, **options)
        self.projects = folder.parent
        return folder

    def encode(self, project: str, stage: str, numbers, dataset: str = "shapes", store: Path | None = None):
        """Write a stage's results: store entries, their table, and its manifest as the asset's value and beside the table."""
        root = store or (self.layout.latents if stage == "vae_latents" else self.layout.text_embeds)
        entries = TensorStore(root)
        with entries.writer(shard_rows=4) as writer:
            for number in numbers:
                writer.add(digest(number), {"mean": torch.full((16,), float(number))})
        work = self.layout.work / project / dataset / stage
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
        value = self.layout.values / project / f"{dataset}_{stage}.json"
        value.parent.mkdir(parents=True, exist_ok=True)
        value.write_text(manifest)
        (work / "entries.finished.json").write_text(manifest)

    def table(self, project: str, name: str) -> Path:
        path = self.layout.work / project / "shapes" / "vae_latents" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"path": [name]}).to_parquet(path)
        return path

    def prune(self, **options) -> PruneReport:
        for path in self.layout.root.rglob("*"):
            os.utime(path, (OLD, OLD))
        assert self.projects is not None
        return prune(self.layout.root, self.projects, **options)

    def remaining(self, store: Path) -> set[int]:
        keys = TensorStore(store).keys()
        return {number for number in range(200) if digest(number) in keys}


@pytest.fixture
def world(tmp_path: Path, make_project) -> PruneFixture:
    return PruneFixture(tmp_path / "storage", make_project)


def counts_by_kind(report: PruneReport) -> dict[str, int]:
    counts: dict[str, int] = {}
    for item in report.freed:
        counts[item.what] = counts.get(item.what, 0) + item.count
    return counts


def test_prune_frees_entries_that_no_manifest_references(world: PruneFixture):
    world.project("small")
    world.encode("small", "vae_latents", range(12))
    world.encode("small", "text_embeds", range(8))
    world.encode("small", "vae_latents", range(4))  # the dataset was reduced
    before = {path: path.stat().st_size for path in world.layout.root.rglob("*.safetensors")}
    estimated = world.prune(dry_run=True)
    assert all(path.exists() for path in before)
    done = world.prune()
    assert estimated == done
    assert counts_by_kind(done) == {"entries": 8}
    assert done.bytes == sum(size for path, size in before.items() if not path.exists()) > 0
    assert world.remaining(world.layout.latents) == set(range(4))
    assert world.remaining(world.layout.text_embeds) == set(range(8))
    assert world.prune().freed == ()


def test_prune_retains_entries_of_all_projects_sharing_a_store(world: PruneFixture, tmp_path: Path):
    shared = tmp_path / "elsewhere"
    world.project("first", dataset={"cache_dir_vae": str(shared)})
    world.project("second", dataset={"cache_dir_vae": str(shared)})
    world.encode("first", "vae_latents", range(0, 12), store=shared)
    world.encode("second", "vae_latents", range(4, 16), store=shared)
    world.encode("first", "vae_latents", range(0, 8), store=shared)
    assert counts_by_kind(world.prune()) == {}
    world.encode("second", "vae_latents", range(4, 12), store=shared)
    assert counts_by_kind(world.prune()) == {"entries": 4}
    assert world.remaining(shared) == set(range(12))


def test_prune_empties_the_store_of_a_renamed_dataset(world: PruneFixture, tmp_path: Path):
    own = tmp_path / "own"
    folder = world.project("small", dataset={"cache_dir_vae": str(own)})
    world.encode("small", "vae_latents", range(4), store=own)
    settings = json.loads((folder / "multidatabackend.json").read_text())
    settings[0]["id"] = "renamed"
    (folder / "multidatabackend.json").write_text(json.dumps(settings))
    done = world.prune()
    assert counts_by_kind(done) == {"entries": 4, "deleted datasets": 2}
    assert not (world.layout.values / "small" / "shapes_vae_latents.json").exists()
    assert not (world.layout.work / "small" / "shapes").exists()


def test_prune_retains_everything_of_an_invalid_project(world: PruneFixture, tmp_path: Path):
    own = tmp_path / "own"
    folder = world.project("small", dataset={"cache_dir_vae": str(own)})
    world.encode("small", "vae_latents", range(8), store=own)
    world.encode("small", "text_embeds", range(8))
    download = world.layout.sources / f"shapes-{digest(1)[:12]}"
    (download / "files").mkdir(parents=True)
    for content in ('{"learning_rat": 1}', "{"):
        (folder / "config.json").write_text(content)
        done = world.prune()
        assert counts_by_kind(done) == {}
        assert any("small: its files have problems" in note for note in done.notes)
    (folder / "multidatabackend.json").write_text("[]")
    assert counts_by_kind(world.prune()) == {}
    assert world.remaining(own) == set(range(8))
    assert (world.layout.values / "small" / "shapes_vae_latents.json").exists()
    assert download.exists()


def test_prune_frees_everything_of_a_deleted_project(world: PruneFixture):
    world.project("kept")
    folder = world.project("gone")
    world.encode("kept", "vae_latents", range(4))
    world.encode("gone", "vae_latents", range(8))
    (world.layout.work / "base_models").mkdir()
    assert counts_by_kind(world.prune()) == {}
    shutil.rmtree(folder)
    assert counts_by_kind(world.prune()) == {"entries": 4, "deleted projects": 2}
    assert not (world.layout.values / "gone").exists()
    assert not (world.layout.work / "gone").exists()
    assert (world.layout.work / "base_models").exists()
    assert (world.layout.values / "kept").exists()
    assert world.remaining(world.layout.latents) == set(range(4))


def test_prune_counts_registered_project_folders(world: PruneFixture, tmp_path: Path):
    world.project("here")
    others = tmp_path / "others"
    shutil.copytree(world.project("there"), others / "there")
    shutil.rmtree(tmp_path / "projects" / "there")
    world.encode("there", "vae_latents", range(4))
    world.layout.register_projects(others)
    assert counts_by_kind(world.prune()) == {}
    shutil.rmtree(others)
    with pytest.raises(PruneError, match=r"the projects folder .*others does not exist"):
        world.prune()
    (marker,) = world.layout.registered_projects().values()
    marker.unlink()
    assert counts_by_kind(world.prune()) == {"entries": 4, "deleted projects": 2}


def test_prune_with_an_absent_projects_folder_raises(world: PruneFixture):
    world.project("small")
    world.encode("small", "vae_latents", range(4))
    assert world.projects is not None
    world.projects = world.projects / "typo"
    with pytest.raises(PruneError, match="SDXL_PIPELINE_PROJECTS"):
        world.prune()
    assert world.remaining(world.layout.latents) == set(range(4))


@pytest.mark.parametrize("damage", ["delete", "truncate", "keys"])
def test_prune_retains_a_store_with_an_unreadable_table(world: PruneFixture, damage):
    world.project("small")
    world.encode("small", "vae_latents", range(8))
    world.encode("small", "text_embeds", range(8))
    world.encode("small", "text_embeds", range(4))
    table = world.layout.work / "small" / "shapes" / "vae_latents" / "entries.parquet"
    if damage == "delete":
        table.unlink()
    elif damage == "truncate":
        table.write_bytes(table.read_bytes()[:-9])
    else:
        pd.DataFrame({"latent_key": ["none"]}).to_parquet(table)
    done = world.prune()
    assert any("nothing is freed" in note and str(table) in note for note in done.notes)
    assert world.remaining(world.layout.latents) == set(range(8))
    assert world.remaining(world.layout.text_embeds) == set(range(4)), "the other store is still pruned"


@pytest.mark.parametrize("content", ["{", "[]", '{"store_root": 3}', '{"entries_path": "x"}'])
def test_prune_with_an_unreadable_manifest_raises(world: PruneFixture, content):
    world.project("small")
    world.encode("small", "vae_latents", range(8))
    world.encode("small", "vae_latents", range(4))
    value = world.layout.values / "small" / "shapes_vae_latents.json"
    value.write_text(content)
    with pytest.raises(PruneError, match=r"vae_latents.json cannot be read"):
        world.prune()
    assert world.remaining(world.layout.latents) == set(range(8))


def test_prune_counts_finished_manifests_without_asset_value(world: PruneFixture):
    world.project("small")
    world.encode("small", "vae_latents", range(8))
    (world.layout.values / "small" / "shapes_vae_latents.json").unlink()
    assert counts_by_kind(world.prune()) == {}


def test_prune_retains_leased_entries_and_reports_the_holder(world: PruneFixture):
    world.project("small")
    world.encode("small", "vae_latents", range(8))
    world.encode("small", "vae_latents", range(4))
    store = TensorStore(world.layout.latents)
    with store.lease([digest(number) for number in range(8)], purpose="train small"):
        done = world.prune()
        assert counts_by_kind(done) == {}
        assert any(f"train small (process {os.getpid()}" in note for note in done.notes)
    assert counts_by_kind(world.prune()) == {"entries": 4}


def test_prune_frees_old_unreferenced_tables(world: PruneFixture):
    folder = world.project("small")
    in_spec, in_run_spec, superseded, young, other = (
        world.table("small", name)
        for name in (
            f"rows-{digest(1)[:16]}",
            f"rows-{digest(2)[:16]}",
            f"captions-{digest(3)[:16]}",
            f"rows-{digest(4)[:16]}",
            "faces",
        )
    )
    (in_spec.parent / "encode_latents.spec.json").write_text(json.dumps({"rows_path": str(in_spec)}))
    run = Path(load_project(folder).training.output_dir) / "lora" / "abc"
    run.mkdir(parents=True)
    (run / "spec.json").write_text(json.dumps({"datasets": [{"rows_path": str(in_run_spec)}]}))
    for path in world.layout.root.rglob("*"):
        os.utime(path, (OLD, OLD))
    os.utime(young)
    assert world.projects is not None
    report = prune(world.layout.root, world.projects)
    assert counts_by_kind(report) == {"superseded tables": 1}
    assert not superseded.exists()
    assert all(path.exists() for path in (in_spec, in_run_spec, young, other))


def test_prune_retains_files_of_a_mask_dataset(world: PruneFixture):
    folder = world.project("small", dataset={"conditioning_data": "disc-masks"})
    file = folder / "multidatabackend.json"
    masks = {"dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "masks"}
    entries = [*json.loads(file.read_text()), {"id": "disc-masks", **masks}]
    file.write_text(json.dumps(entries))
    work = world.layout.work / "small" / "disc_masks" / "dataset"
    value = world.layout.values / "small" / "disc_masks_dataset.parquet"
    for file_of_stage in (work / "scan.parquet", value):
        file_of_stage.parent.mkdir(parents=True)
        file_of_stage.write_bytes(b"x")
    superseded = world.table("small", f"masks-{digest(1)[:16]}")
    assert counts_by_kind(world.prune()) == {"superseded tables": 1}
    assert not superseded.exists()
    file.write_text(json.dumps([{**entries[0], "conditioning_data": None}]))
    assert counts_by_kind(world.prune()) == {"deleted datasets": 2}
    assert not work.exists()
    assert not value.exists()


def test_prune_frees_values_of_masks_and_retains_values_of_the_project(world: PruneFixture):
    world.project("small")
    values = world.layout.values / "small"
    values.mkdir(parents=True)
    retained = [
        values / name for name in ("shapes_masks.parquet", "training_set.json", "generated_images.json")
    ]
    freed = [values / name for name in ("gone_masks.parquet", "gone_vae_latents_dataset.parquet")]
    for path in (*retained, *freed):
        path.write_text("{}")
    assert counts_by_kind(world.prune()) == {"deleted datasets": 2}
    assert all(path.exists() for path in retained)
    assert not any(path.exists() for path in freed)


def test_prune_frees_values_stored_under_the_keys_of_earlier_versions(world: PruneFixture):
    folder = world.project("small")
    world.encode("small", "vae_latents", range(4))
    earlier = world.layout.values / "small" / "shapes" / "vae_latents.json"
    earlier.parent.mkdir()
    (world.layout.values / "small" / "shapes_vae_latents.json").rename(earlier)
    (folder / "config.json").rename(folder / "config.old")
    (folder / "config.json").write_text("{")
    assert counts_by_kind(world.prune()) == {}, "the datasets of an invalid project are unknown"
    (folder / "config.old").rename(folder / "config.json")
    assert counts_by_kind(world.prune()) == {"superseded values": 1}
    assert not earlier.parent.exists()
    assert world.remaining(world.layout.latents) == set(range(4)), "the stage's own manifest references them"


def test_prune_frees_downloads_that_no_dataset_reads(world: PruneFixture):
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
    read = data_folder(dataset, world.layout.sources)
    older = world.layout.sources / f"shapes-{digest('older')[:12]}"
    other = world.layout.sources / "not a download"
    for path in (read, older / "files", other):
        path.mkdir(parents=True)
        (path / "a.jpg").write_bytes(b"x" * 500)
    done = world.prune()
    assert counts_by_kind(done) == {"downloads": 1}
    assert done.bytes == 500
    assert (read.exists(), older.exists(), other.exists()) == (True, False, True)


def test_prune_frees_unfinished_files_of_killed_processes(world: PruneFixture):
    world.project("small")
    world.encode("small", "vae_latents", range(4))
    half = world.layout.values / "small" / ".lora.77-abcd.tmp.json"
    half.write_bytes(b"x" * 10)
    done = world.prune()
    assert counts_by_kind(done) == {"unfinished files": 1}
    assert not half.exists()


def test_prune_frees_old_leftovers_in_outputs_and_of_killed_runs(world: PruneFixture):
    folder = world.project("small")
    output = folder / "output"
    remaining = [
        output / "lora" / "abc" / "ema" / ".weights.77-0123abcd.tmp.safetensors",
        output / "evaluation" / ".gallery.77-0123abcd.tmp.png",
        output / ".release.77.tmp" / "README.md",
    ]
    run = "01234567-89ab-cdef-0123-456789abcdef"
    spec = world.layout.work / "small" / "lora" / f"train.{run}.spec.json"
    retained = [output / "lora" / "abc" / "notes.tmp.txt", output / ".release.77.old" / "README.md"]
    for path in (*remaining, *retained, spec):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    day_ago, young = time.time() - 24 * 3600, output / "evaluation" / ".report.77-0123abcd.tmp.md"
    young.write_text("under way")
    for path in output.rglob("*"):
        if path != young:
            os.utime(path, (OLD, OLD))
    os.utime(spec, (day_ago, day_ago))
    assert world.projects is not None
    report = prune(world.layout.root, world.projects)
    assert counts_by_kind(report) == {"unfinished files": 3}
    assert not any(path.exists() for path in remaining)
    assert all(path.exists() for path in (*retained, young, spec))
    (output / "release").mkdir()
    week_ago = day_ago - 7 * 24 * 3600
    os.utime(spec, (week_ago, week_ago))
    prune(world.layout.root, world.projects)
    assert not retained[1].exists(), "a newer release replaced it"
    assert not spec.exists()


def test_prune_retains_young_files(world: PruneFixture):
    world.project("small")
    world.encode("elsewhere", "vae_latents", range(4))
    assert world.projects is not None
    report = prune(world.layout.root, world.projects)
    assert "deleted projects" not in counts_by_kind(report)
    assert (world.layout.values / "elsewhere").exists()


def test_prune_of_an_empty_storage_frees_nothing(world: PruneFixture):
    world.project("small")
    world.layout.root.mkdir()
    assert world.prune().freed == ()
    assert list(world.layout.root.iterdir()) == []


def test_prune_with_verify_counts_and_discards_corrupt_entries(world: PruneFixture):
    world.project("small")
    world.encode("small", "vae_latents", range(12))
    world.encode("small", "text_embeds", range(4))
    corrupt_shard = sorted((world.layout.latents / "shards").iterdir())[1]
    data = bytearray(corrupt_shard.read_bytes())
    data[-1] ^= 1  # of the entry 7
    corrupt_shard.write_bytes(data)
    assert counts_by_kind(world.prune(dry_run=True)) == {}
    seen: list[tuple[str, int, int]] = []
    estimated = world.prune(dry_run=True, verify=True, on_progress=lambda *progress: seen.append(progress))
    assert counts_by_kind(estimated) == {CORRUPT_ENTRIES: 1}
    assert [(done, total) for what, done, total in seen if str(world.layout.latents) in what][-1] == (12, 12)
    assert world.remaining(world.layout.latents) == set(range(12))
    assert counts_by_kind(world.prune(verify=True)) == {CORRUPT_ENTRIES: 1}
    assert world.remaining(world.layout.latents) == set(range(12)) - {7}
    assert counts_by_kind(world.prune(verify=True)) == {}
