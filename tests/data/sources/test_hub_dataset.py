"""Tests of Hub datasets with the real client against a local Hub: splits, commits, captions, and incremental downloads."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdxl_pipeline.data.scan.dataset_scan import scan_dataset
from sdxl_pipeline.data.sources import SourceError, data_folder, fetch_source
from tests.support.remote_sources import image, matches, tree

REPO = "someone/cats"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Write an image folder with two splits."""
    folder = tmp_path / "repository"
    for index in range(3):
        path = folder / "train" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(index))
    (folder / "test").mkdir()
    (folder / "test" / "9.png").write_bytes(image(9))
    (folder / "README.md").write_text("# Cats\n")
    rows = [{"file_name": f"{index}.png", "text": f"cat {index}"} for index in range(3)]
    (folder / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def hub_dataset(make, **settings):
    return make(type="huggingface", dataset_name=REPO, **settings)


def downloads(hub) -> list[str]:
    return [
        r.path for r in hub.requests if r.method == "GET" and ("/resolve/" in r.path or "/lfs/" in r.path)
    ]


def write_parquet(path: Path, seeds, captions=None, **columns) -> None:
    """Write a shard like `datasets` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array(
        [None if seed is None else {"bytes": image(seed), "path": f"{seed}.png"} for seed in seeds],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    captions = captions or [f"cat {seed}" for seed in seeds]
    pq.write_table(pa.table({"image": images, "caption": captions, **columns}), path)


def test_fetch_hub_image_folder_downloads_split(hub, repository, make, sources):
    commit = hub.add_dataset(REPO, repository)
    progress = []
    fetched = fetch_source(hub_dataset(make), sources, lambda done, total: progress.append((done, total)))
    assert fetched.revision == commit
    assert fetched.folder == data_folder(hub_dataset(make), sources)
    assert tree(fetched.folder) == {f"train/{index}.png": image(index) for index in range(3)}
    assert fetched.captions == {f"train/{index}.png": (f"cat {index}",) for index in range(3)}
    assert (fetched.files, fetched.downloaded, fetched.failed) == (3, 3, ())
    assert fetched.downloaded_bytes >= sum(len(image(index)) for index in range(3))
    assert progress[-1][0] == progress[-1][1] > 0
    scanned = scan_dataset(hub_dataset(make), fetched.folder, captions=fetched.captions)
    assert scanned["captions"].tolist() == [["cat 0"], ["cat 1"], ["cat 2"]]
    assert set(scanned["status"]) == {"kept"}


def test_fetch_hub_new_commit_downloads_only_changes(hub, repository, make, sources):
    hub.add_dataset(REPO, repository)
    first = fetch_source(hub_dataset(make), sources)
    before = len(downloads(hub))
    second = fetch_source(hub_dataset(make), sources)
    assert (second.downloaded, second.downloaded_bytes) == (0, 0)
    assert len(downloads(hub)) == before
    assert sum("/tree/" in request.path for request in hub.requests) == 1
    (repository / "train" / "0.png").unlink()
    (repository / "train" / "7.png").write_bytes(image(7))
    commit = hub.add_dataset(REPO, repository)
    third = fetch_source(hub_dataset(make), sources)
    assert (third.revision, third.downloaded) == (commit, 1)
    assert set(tree(third.folder)) == {"train/1.png", "train/2.png", "train/7.png"}
    assert [path for path in downloads(hub)[before:] if "/lfs/" in path] != []
    assert len([path for path in downloads(hub)[before:] if "/lfs/" in path]) == 1
    assert len(list(first.folder.parent.glob("commit-*"))) == 1  # content of the first commit is removed


@pytest.mark.parametrize("form", ["csv", "parquet", "jsonl above", "texts"])
def test_fetch_hub_captions_from_metadata_or_text_files(hub, repository, make, sources, form):
    (repository / "train" / "metadata.jsonl").unlink()
    if form == "csv":
        text = 'file_name,caption\r\n0.png,"a, b"\r\n1.png,one\r\n1.png,uno\r\n'
        (repository / "train" / "metadata.csv").write_bytes(text.encode("utf-8-sig"))
    elif form == "parquet":
        table = pa.table({"file_name": ["0.png", "1.png"], "caption": [["a, b"], ["one", "uno"]]})
        pq.write_table(table, repository / "train" / "metadata.parquet")
    elif form == "jsonl above":
        rows = [
            {"file_name": "train/0.png", "caption": "a, b"},
            {"file_name": "train/1.png", "caption": ["one", "uno"]},
        ]
        (repository / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        (repository / "train" / "0.caption").write_text("a, b\n")
        (repository / "train" / "1.txt").write_text("one\nuno\n")
    hub.add_dataset(REPO, repository)
    captions = fetch_source(hub_dataset(make), sources).captions
    assert captions == {"train/0.png": ("a, b",), "train/1.png": ("one", "uno")}


def test_fetch_hub_textfile_strategy_reads_text_files(hub, repository, make, sources):
    (repository / "train" / "0.txt").write_text("a cat")
    hub.add_dataset(REPO, repository)
    dataset = hub_dataset(make, caption_strategy="textfile")
    fetched = fetch_source(dataset, sources)
    assert fetched.captions is None
    scanned = scan_dataset(dataset, fetched.folder)
    assert scanned["captions"].tolist()[0] == ["a cat"]


def test_fetch_hub_parquet_shards_are_extracted_once(hub, tmp_path, make, sources):
    folder = tmp_path / "repository"
    write_parquet(folder / "data" / "train-00000-of-00002.parquet", [0, 1, None])
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", [2], [["a cat", "une chatte"]])
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", [9])
    commit = hub.add_dataset(REPO, folder)
    fetched = fetch_source(hub_dataset(make), sources)
    stem = "data/train-0000{}-of-00002"
    names = [
        stem.format(0) + "/0000000.png",
        stem.format(0) + "/0000001.png",
        stem.format(1) + "/0000000.png",
    ]
    assert tree(fetched.folder) == dict(zip(names, map(image, range(3)), strict=True))
    assert fetched.captions == {
        names[0]: ("cat 0",),
        names[1]: ("cat 1",),
        names[2]: ("a cat", "une chatte"),
    }
    assert (fetched.revision, fetched.files, fetched.downloaded) == (commit, 4, 3)
    assert fetched.failed == ((stem.format(0) + "/0000002", "has no image in the column image"),)
    inode = (fetched.folder / names[0]).stat().st_ino
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", [3, 4])
    hub.add_dataset(REPO, folder)
    second_fetch = fetch_source(hub_dataset(make), sources)
    assert second_fetch.downloaded == 2
    assert (second_fetch.folder / names[0]).stat().st_ino == inode
    assert (second_fetch.folder / names[2]).read_bytes() == image(3)
    assert fetch_source(hub_dataset(make), sources).downloaded == 0


def test_fetch_hub_parquet_bytes_and_nested_captions_are_read(hub, tmp_path, make, sources):
    path = tmp_path / "repository" / "data" / "train-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    captions = [{"short": "a cat", "long": "a cat on a mat"}, {"short": "", "long": "a dog"}]
    pq.write_table(pa.table({"jpg": [image(0, ".jpg"), image(1, ".webp")], "about": captions}), path)
    hub.add_dataset(REPO, tmp_path / "repository")
    dataset = hub_dataset(make, image_column="jpg", caption_column=("about.short", "about.long"))
    fetched = fetch_source(dataset, sources)
    stem = "data/train-00000-of-00001"
    assert fetched.captions == {
        f"{stem}/0000000.jpg": ("a cat", "a cat on a mat"),
        f"{stem}/0000001.webp": ("a dog",),
    }


def test_fetch_hub_parquet_urls_and_paths_are_downloaded(hub, web, tmp_path, make, sources):
    folder = tmp_path / "repository"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "5.png").write_bytes(image(5))
    url = web.add("/6.png", image(6))
    values = [
        url + "?sig=SECRET",
        "images/5.png",
        "images/absent.png",
        web.url + "/gone.png",
        url + "?sig=SECRET",
    ]
    table = pa.table({"image": values, "caption": list("abcde")})
    (folder / "data").mkdir()
    pq.write_table(table, folder / "data" / "train-00000-of-00001.parquet")
    hub.add_dataset(REPO, folder)
    fetched = fetch_source(hub_dataset(make, allow_private_addresses=True), sources)
    assert sorted(tree(fetched.folder).values()) == sorted([image(5), image(6)])
    assert fetched.captions is not None
    assert sorted(fetched.captions.values()) == [("a", "e"), ("b",)]
    assert dict(fetched.failed) == {
        web.url + "/gone.png": "download failed: 404 Not Found",
        "images/absent.png": "download failed: the repository has no such file",
    }
    web.add("/gone.png", image(8))
    second = fetch_source(hub_dataset(make, allow_private_addresses=True), sources)
    assert (web.requested["/6.png"], web.requested["/gone.png"], len(second.failed)) == (1, 2, 1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_fetch_hub_parquet_memory_is_independent_of_row_groups(hub, tmp_path, make, sources):
    """Extracting 160 MB of images needs little more memory than 40 MB; a file in memory would need 120 MB more."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for name, count in (("small", 20), ("large", 80)):
        rows = [{"bytes": image(0) + bytes([row]) * 2_000_000, "path": None} for row in range(count)]
        table = pa.table({"image": pa.array(rows, kind), "caption": ["a"] * count})
        (tmp_path / name).mkdir()
        options = {"compression": "none", "use_dictionary": False, "row_group_size": 5}
        pq.write_table(table, tmp_path / name / "train.parquet", **options)
        hub.add_dataset(f"someone/{name}", tmp_path / name)
    # VmHWM rather than getrusage, in which a child starts with its parent's peak
    program = (
        "import re, sys, pathlib; from sdxl_pipeline.data.sources import fetch_source\n"
        "from sdxl_pipeline.config.schema.datasets import ImageDataset\n"
        "for entry in sys.argv[2:]:\n"
        "    dataset = ImageDataset.model_validate_json(entry)\n"
        "    fetched = fetch_source(dataset, pathlib.Path(sys.argv[1]))\n"
        "    peak = re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1]\n"
        "    print(fetched.downloaded, int(peak) // 1024)"
    )
    environment = hub.environment(tmp_path / "other_home") | {"PATH": "/usr/bin:/bin"}
    entries = [
        make(type="huggingface", dataset_name=f"someone/{name}").model_dump_json()
        for name in ("small", "large")
    ]
    done = subprocess.run(
        [sys.executable, "-c", program, str(sources), *entries],
        env=environment,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    small, peak_of_small, large, peak_of_large = map(int, done.stdout.split())
    assert (small, large) == (20, 80)
    assert peak_of_large - peak_of_small < 80, done.stdout  # memory retained by allocators varies by 50 MB


def test_fetch_hub_readme_declares_configurations_and_splits(hub, tmp_path, make, sources):
    folder = tmp_path / "repository"
    write_parquet(folder / "small" / "a.parquet", [1])
    write_parquet(folder / "large" / "a.parquet", [2, 3])
    write_parquet(folder / "large" / "b.parquet", [4])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files: small/*.parquet\n- config_name: large\n  default: true\n  data_files:\n"
        "  - split: train\n    path: [large/a.*]\n  - split: held\n    path: large/b.parquet\n---\n"
    )
    hub.add_dataset(REPO, folder)
    assert fetch_source(hub_dataset(make), sources).files == 2
    assert fetch_source(hub_dataset(make, split="held"), sources).files == 1
    assert fetch_source(hub_dataset(make, dataset_config="small"), sources).files == 1
    with pytest.raises(
        SourceError, match=r"split 'test': someone/cats has no such split; it has held, train"
    ):
        fetch_source(hub_dataset(make, split="test"), sources)
    with pytest.raises(SourceError, match=r"dataset_config 'tiny'.*it has small, large"):
        fetch_source(hub_dataset(make, dataset_config="tiny"), sources)


def test_fetch_hub_without_splits_all_files_are_train(hub, tmp_path, make, sources):
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "a.png").write_bytes(image(1))
    (folder / "a.txt").write_text("a cat")
    hub.add_dataset(REPO, folder)
    assert fetch_source(hub_dataset(make), sources).captions == {"a.png": ("a cat",)}


@pytest.mark.parametrize(
    ("settings", "phrases"),
    [
        ({"dataset_name": "someone/absent"}, ["'cats'", "dataset_name 'someone/absent'", "HF_TOKEN"]),
        ({"dataset_name": "no name at all"}, ["dataset_name 'no name at all'", "owner/name"]),
        ({"dataset_name": "someone/gated"}, ["'someone/gated' is gated", "accept its terms"]),
        ({"revision": "nonesuch"}, ["revision 'nonesuch'", "branch, tag or commit"]),
        ({"split": "testing"}, ["split 'testing'", "it has test, train"]),
        ({"caption_column": "label"}, ["caption_column 'label'", "it has file_name, text"]),
        ({"dataset_name": "someone/tables", "image_column": "img"}, ["image_column 'img'", "image, caption"]),
        ({"dataset_name": "someone/tables", "image_column": "n"}, ["image_column 'n'", "has int64"]),
        ({"dataset_name": "someone/archives"}, ["neither images nor Parquet files, but .tar"]),
    ],
)
def test_fetch_hub_invalid_settings_raise_with_alternatives(
    hub, repository, make, sources, tmp_path, settings, phrases
):
    hub.add_dataset(REPO, repository)
    hub.add_dataset("someone/gated", repository, gated=True)
    write_parquet(tmp_path / "tables" / "data" / "train-00000-of-00001.parquet", [1], n=[1])
    hub.add_dataset("someone/tables", tmp_path / "tables")
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / "0.tar").write_bytes(b"x")
    hub.add_dataset("someone/archives", tmp_path / "archives")
    with pytest.raises(SourceError) as caught:
        fetch_source(hub_dataset(make).model_copy(update=settings), sources)
    assert matches(str(caught.value), *phrases), caught.value


def test_fetch_hub_private_dataset_requires_token(hub, repository, make, sources, monkeypatch):
    hub.add_dataset(REPO, repository, private=True)
    assert fetch_source(hub_dataset(make), sources).files == 3
    assert not [path for path, data in tree(sources).items() if hub.token.encode() in data]
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(SourceError, match="HF_TOKEN"):
        fetch_source(hub_dataset(make), sources)


def test_fetch_hub_revision_selects_commit(hub, repository, make, sources):
    first = hub.add_dataset(REPO, repository)
    (repository / "train" / "0.png").unlink()
    hub.add_dataset(REPO, repository)
    assert fetch_source(hub_dataset(make, revision=first), sources).files == 3
    assert fetch_source(hub_dataset(make), sources).files == 2


def test_fetch_hub_offline_uses_last_commit(hub, repository, make, sources, monkeypatch):
    hub.add_dataset(REPO, repository)
    online = fetch_source(hub_dataset(make), sources)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # no server listens there
    offline = fetch_source(hub_dataset(make), sources)
    assert (offline.revision, offline.captions, offline.downloaded) == (online.revision, online.captions, 0)
    with pytest.raises(SourceError, match=r"someone/other' cannot be reached"):
        fetch_source(make(type="huggingface", dataset_name="someone/other"), sources)


def test_fetch_hub_failed_image_is_reported_and_retried(hub, repository, make, sources):
    hub.add_dataset(REPO, repository)
    hub.fail_next(100, status=403, path=r"/resolve/.*train/1\.png")
    fetched = fetch_source(hub_dataset(make), sources)
    ((name, reason),) = fetched.failed
    assert (name, fetched.files, fetched.downloaded) == ("train/1.png", 3, 2)
    assert reason.startswith("download failed: ")
    assert set(tree(fetched.folder)) == {"train/0.png", "train/2.png"}
    hub._faults.clear()
    second = fetch_source(hub_dataset(make), sources)
    assert (second.failed, second.downloaded, len(tree(second.folder))) == ((), 1, 3)


def test_fetch_hub_corrupt_parquet_raises(hub, tmp_path, make, sources):
    path = tmp_path / "repository" / "data" / "train-00000-of-00001.parquet"
    write_parquet(path, range(50))
    data = bytearray(path.read_bytes())
    data[200 : len(data) // 2] = bytes(len(data) // 2 - 200)
    path.write_bytes(data)
    hub.add_dataset(REPO, tmp_path / "repository")
    with pytest.raises(SourceError, match=r"train-00000-of-00001.parquet cannot be read as Parquet"):
        fetch_source(hub_dataset(make), sources)
    assert not data_folder(hub_dataset(make), sources).exists()


@pytest.mark.parametrize("text", ['["0.png", "a"]', '{"text": "a"}\n{"file_name": "0.png', "\x00"])
def test_fetch_hub_invalid_metadata_raises(hub, repository, make, sources, text):
    (repository / "train" / "metadata.jsonl").write_text(text)
    hub.add_dataset(REPO, repository)
    with pytest.raises(SourceError, match=r"train/metadata.jsonl of someone/cats cannot be read"):
        fetch_source(hub_dataset(make), sources)


@pytest.mark.parametrize(
    ("name", "text", "phrases"),
    [
        ("metadata.csv", "file_name,text\n0.png,a, b\n", "line 2 has 3 fields, and the header has 2"),
        ("metadata.csv", 'file_name,text\n0.png,"a\n1.png,b\n', "line 2: the row that begins here"),
        (
            "metadata.jsonl",
            '{"file_name": "0.png", "text": {"short": "a"}}',
            "row 1: column 'text' has objects",
        ),
        (
            "metadata.jsonl",
            '{"file_name": "0.png", "text": true}',
            "row 1: column 'text' has true or false",
        ),
        ("metadata.jsonl", '{"file_name": "0.png", "text": 3}', "row 1: column 'text' has numbers"),
    ],
)
def test_fetch_hub_metadata_with_invalid_captions_raises(hub, repository, make, sources, name, text, phrases):
    (repository / "train" / "metadata.jsonl").unlink()
    (repository / "train" / name).write_text(text)
    hub.add_dataset(REPO, repository)
    with pytest.raises(SourceError, match=phrases) as caught:
        fetch_source(hub_dataset(make), sources)
    assert f"train/{name} of someone/cats" in str(caught.value)


def test_fetch_hub_unmatched_metadata_rows_are_noted(hub, repository, make, sources):
    rows = [
        ("0.png", "a"),
        ("train/1.png", "b"),
        ("", "c"),
        ("gone.png", "d"),
        ("../test/9.png", "of another split"),
    ]
    (repository / "train" / "metadata.jsonl").unlink()
    (repository / "train" / "metadata.csv").write_text("\n".join(["file_name,text", *map(",".join, rows)]))
    hub.add_dataset(REPO, repository)
    fetched = fetch_source(hub_dataset(make), sources)
    assert fetched.captions is not None
    assert fetched.captions["train/0.png"] == ("a",)
    assert [note.partition(":")[0] for note in fetched.notes] == [
        "1 row of train/metadata.csv without a value in column 'file_name', at line 4",
        "1 row of train/metadata.csv without a matching image, such as 'train/1.png'",
        "1 row of train/metadata.csv without a matching image, such as 'gone.png'.",
    ]


@pytest.mark.parametrize(
    ("cell", "phrases"),
    [
        (
            {"short": "a cat"},
            r"column 'caption' of .* has struct<short: .*> *, not text\. Write a field within it, such as caption.short",
        ),
        ([["a cat"]], "column 'caption' of .* has list<"),
        (3, "column 'caption' of .* has int64, not text"),
        (True, "column 'caption' of .* has bool, not text"),
        (b"\xff", "row 1: column 'caption' has bytes"),
    ],
)
def test_fetch_hub_parquet_with_non_text_captions_raises(hub, tmp_path, make, sources, cell, phrases):
    write_parquet(tmp_path / "repository" / "data" / "train-00000-of-00001.parquet", [1], [cell])
    hub.add_dataset(REPO, tmp_path / "repository")
    with pytest.raises(SourceError, match=phrases):
        fetch_source(hub_dataset(make), sources)


def test_fetch_hub_parquet_utf_8_bytes_are_captions(hub, tmp_path, make, sources):
    write_parquet(tmp_path / "repository" / "data" / "train-00000-of-00001.parquet", [1], [b"a cat"])
    hub.add_dataset(REPO, tmp_path / "repository")
    captions = fetch_source(hub_dataset(make), sources).captions
    assert captions is not None
    assert list(captions.values()) == [("a cat",)]


def test_fetch_hub_invalid_commit_keeps_previous_content(hub, tmp_path, make, sources):
    """The images of the last complete commit remain until the next one is complete."""
    folder = tmp_path / "repository"
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", [0])
    hub.add_dataset(REPO, folder)
    before = tree(fetch_source(hub_dataset(make), sources).folder)
    shutil.rmtree(folder)
    (folder / "data").mkdir(parents=True)
    broken = io.BytesIO()
    pq.write_table(pa.table({"image": [image(1)], "caption": ["a"]}), broken)
    (folder / "data" / "train-00000-of-00001.parquet").write_bytes(broken.getvalue()[:-40])
    hub.add_dataset(REPO, folder)
    with pytest.raises(SourceError, match="cannot be read as Parquet"):
        fetch_source(hub_dataset(make), sources)
    assert tree(data_folder(hub_dataset(make), sources)) == before
