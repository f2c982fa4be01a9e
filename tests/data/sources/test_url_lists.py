"""Tests of CSV lists: images from URLs, paths and object stores, retries, and reports of failures."""

import csv
import hashlib
import io
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from sdxl_pipeline.data.scan.dataset_scan import scan_dataset
from sdxl_pipeline.data.sources import SourceError, data_folder, download, fetch_source
from tests.support.remote_sources import image, tree


@pytest.fixture
def write(tmp_path: Path):
    """Return a function that writes a list of (URL, caption) rows and gives its path."""

    def write(*rows, header=("url", "caption"), delimiter=",", encoding="utf-8") -> Path:
        path = tmp_path / "lists" / "cats.csv"
        path.parent.mkdir(exist_ok=True)
        with path.open("w", newline="", encoding=encoding) as file:
            csv.writer(file, delimiter=delimiter).writerows([header, *rows])
        return path

    return write


def cats(make, path, **settings):
    return make(**{"type": "csv", "csv_file": path, "allow_private_addresses": True} | settings)


def by_content(fetched):
    """Return the captions of each image by its content."""
    return {data: (fetched.captions or {}).get(name) for name, data in tree(fetched.folder).items()}


def test_fetch_list_urls_and_paths_become_files_with_captions(web, make, sources, write, tmp_path):
    (tmp_path / "lists" / "near").mkdir(parents=True)
    (tmp_path / "lists" / "near" / "2.png").write_bytes(image(2))
    (tmp_path / "a b.png").write_bytes(image(3))
    (tmp_path / "4.png").write_bytes(image(4))
    first = web.add("/0.jpg", image(0))  # a PNG by its content
    path = write(
        (first, "a cat, sitting"),
        (web.add("/get", image(1), "text/plain") + "?id=1", "another"),
        ("near/2.png", "two"),
        (f"file://{quote(str(tmp_path / 'a b.png'))}", "three"),
        (tmp_path / "4.png", "four"),
        (first, "ein Kater"),
        (first, "a cat, sitting"),
    )
    progress = []
    fetched = fetch_source(cats(make, path), sources, lambda done, total: progress.append((done, total)))
    assert by_content(fetched) == {
        image(0): ("a cat, sitting", "ein Kater"),
        image(1): ("another",),
        image(2): ("two",),
        image(3): ("three",),
        image(4): ("four",),
    }
    assert (fetched.files, fetched.downloaded, fetched.failed) == (5, 2, ())
    assert fetched.downloaded_bytes == len(image(0)) + len(image(1))
    assert fetched.revision == hashlib.sha256(path.read_bytes()).hexdigest()
    assert progress[-1] == (5, 5)
    names = list(tree(fetched.folder))
    assert {Path(name).suffix for name in names} == {".png"}
    assert sum((fetched.folder / name).is_symlink() for name in names) == 3
    scanned = scan_dataset(cats(make, path), fetched.folder, captions=fetched.captions, failed=fetched.failed)
    assert set(scanned["status"]) == {"kept"}


def test_fetch_list_second_fetch_downloads_only_changes(web, make, sources, write):
    rows = [(web.add(f"/{index}.png", image(index)), f"cat {index}") for index in range(4)]
    path = write(*rows[:3])
    fetch_source(cats(make, path), sources)
    write(*rows[1:])
    again = fetch_source(cats(make, path), sources)
    assert again.downloaded == 1
    assert dict(web.requested) == {f"/{index}.png": 1 for index in range(4)}
    assert set(by_content(again)) == {image(index) for index in (1, 2, 3)}
    next(iter(again.folder.glob("2-*"))).unlink()
    assert fetch_source(cats(make, path), sources).downloaded == 1
    assert web.requested["/2.png"] == 2


@pytest.mark.parametrize(
    "faults",
    [
        [(503, {}, b""), (500, {}, b"")],
        [(429, {"Retry-After": "0"}, b"")],
        [(503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, b"")],
        [(200, {}, None)],  # truncated body
        [(200, {}, b"")],
    ],
)
def test_fetch_list_retryable_errors_are_retried(web, make, sources, write, faults):
    path = write((web.add("/0.png", image(0)), "a"))
    empty = faults == [(200, {}, b"")]
    web.faults["/0.png"] = list(faults)
    fetched = fetch_source(cats(make, path), sources)
    if empty:
        assert fetched.failed == ((web.url + "/0.png", "download failed: the file is empty"),)
    else:
        assert by_content(fetched) == {image(0): ("a",)}
        assert web.requested["/0.png"] == len(faults) + 1


def test_fetch_list_retry_after_is_respected(web, make, sources, write):
    path = write((web.add("/0.png", image(0)), "a"))
    web.faults["/0.png"] = [(429, {"Retry-After": "1"}, b"")]
    started = time.monotonic()
    assert fetch_source(cats(make, path), sources).downloaded == 1
    assert time.monotonic() - started >= 1


def test_fetch_list_failures_are_reported_and_retried_next_run(web, make, sources, write):
    path = write(
        (web.url + "/gone.png?sig=SECRET", "a"),
        (web.add("/page.png", b"<html>", "text/html"), "b"),
        ("nowhere.png", "c"),
        ("ftpp://a.org/x.png", "d"),
        ("n" * 5000 + ".png", "too long"),
        ("~nobody_of_that_name/a.png", "no home"),
        ("file://[x", "no URL"),
        ("http://[x", "no URL"),
        ("http://", "no URL"),
        ("http://user:SECRET@127.0.0.1:9/x.png", "e"),
        (web.add("/down.png", image(1)), "f"),
        (web.add("/fine.png", image(0)), "g"),
    )
    web.faults["/down.png"] = [(503, {}, b"")] * download.MAX_ATTEMPTS
    dataset = cats(make, path)
    fetched = fetch_source(dataset, sources)
    failed = dict(fetched.failed)
    assert failed[web.url + "/gone.png"] == "download failed: 404 Not Found"
    assert failed[web.url + "/page.png"] == "download failed: the server sent text/html instead of an image"
    assert failed["nowhere.png"] == "the file does not exist"
    assert failed[web.url + "/down.png"] == "download failed: 503 Service Unavailable"
    assert "ftpp" in failed["ftpp://a.org/x.png"]
    assert failed["http://127.0.0.1:9/x.png"].startswith("download failed: no connection")
    assert "SECRET" not in str(fetched)
    assert failed["http://[x"] == failed["http://"] == "download failed: not a valid URL"
    assert (fetched.files, fetched.downloaded) == (12, 1)
    assert (web.requested["/gone.png"], web.requested["/down.png"]) == (1, download.MAX_ATTEMPTS)
    scanned = scan_dataset(dataset, fetched.folder, captions=fetched.captions, failed=fetched.failed)
    assert len(scanned) == 12
    assert not [path for path, data in tree(sources).items() if b"SECRET" in data or "SECRET" in path]
    web.add("/gone.png", image(2))
    again = fetch_source(dataset, sources)
    assert again.downloaded == 2
    assert len(again.failed) == 9
    assert web.requested["/fine.png"] == 1


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_fetch_list_delimiters_and_encodings_are_detected(
    make, sources, write, tmp_path, delimiter, encoding
):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "ä.png").write_bytes(image(0))
    path = write(
        ("1", "ä.png", 'Käse, "gelb";\nund|mehr'),
        ("2", "", "nobody"),
        header=("n", "url", "caption"),
        delimiter=delimiter,
        encoding=encoding,
    )
    assert by_content(fetch_source(cats(make, path), sources)) == {image(0): ('Käse, "gelb";\nund|mehr',)}


def test_fetch_list_columns_are_configurable(make, sources, write, tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "0.png").write_bytes(image(0))
    path = write(("0.png", "a cat"), header=("where", "what"))
    fetched = fetch_source(cats(make, path, csv_url_column="where", csv_caption_column="what"), sources)
    assert by_content(fetched) == {image(0): ("a cat",)}
    dataset = cats(make, path, csv_url_column="where", caption_strategy="instanceprompt", instance_prompt="a")
    assert fetch_source(dataset, sources).failed == ()
    with pytest.raises(
        SourceError, match=r"'cats'.*no column 'url', the value of csv_url_column.*where, what"
    ):
        fetch_source(cats(make, path), sources)
    with pytest.raises(
        SourceError, match=r"no column 'caption', the value of csv_caption_column.*where, what"
    ):
        fetch_source(cats(make, path, csv_url_column="where"), sources)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "does not exist"),
        (b"", "no column 'url'"),
        (b"url,caption\n", "has no images"),
        (b"url,caption\n\xff\xfe\xfa", "neither UTF-8"),
        (b"url,caption\na.png,a man, a dog, a tree\n", "line 2 has 4 fields, and the header has 2"),
        (b"url,caption\na.png\n", "line 2 has 1 field, and the header has 2"),
        (b'url,caption\na.png,"a man\nb.png,a dog\nc.png,a tree\n', "line 2: the row that begins here"),
    ],
)
def test_fetch_list_invalid_list_raises(make, sources, tmp_path, data, message):
    path = tmp_path / "cats.csv"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(SourceError, match=message) as caught:
        fetch_source(cats(make, path), sources)
    assert str(path) in str(caught.value)


def test_fetch_list_unused_rows_are_reported_with_cause(make, sources, write, tmp_path):
    (tmp_path / "lists").mkdir()
    for number in range(2):
        (tmp_path / "lists" / f"{number}.png").write_bytes(image(number))
    path = write(
        ("0.png", "a"), ("", "nobody"), ("lists/1.png", "b"), ("..\\lists\\1.png", "c"), ("9.png", "d")
    )
    fetched = fetch_source(cats(make, path), sources)
    assert fetched.notes == (
        "1 row of cats.csv without a value in column 'url', at line 3: their captions are unused.",
    )
    assert dict(fetched.failed) == {
        "lists/1.png": "the file does not exist: the paths begin with 'lists/', which is not below the folder; leave it out",
        "..\\lists\\1.png": "the file does not exist: the paths have backslashes; write forward slashes",
        "9.png": "the file does not exist",
    }


def test_fetch_list_csv_cache_dir_is_used(web, make, sources, write, tmp_path):
    path = write((web.add("/0.png", image(0)), "a"))
    fetched = fetch_source(cats(make, path, csv_cache_dir=tmp_path / "cache"), sources)
    assert fetched.folder.is_relative_to(tmp_path / "cache")
    assert not sources.exists()


def test_fetch_list_names_stay_within_folder(web, make, sources, write, tmp_path):
    rows = [
        (web.add(f"/{name}", image(seed)), "a") for seed, name in enumerate(["..%2F..%2Fx.png", "%00.png"])
    ]
    path = write(*rows, (web.url + "/../" * 5 + "etc/y.png", "b"), (web.add("/" + "n" * 2000, image(9)), "c"))
    fetched = fetch_source(cats(make, path), sources)
    assert len(tree(fetched.folder)) == 3
    root_entries = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert root_entries == {"lists", "storage"}


def test_fetch_list_local_files_are_unchanged(make, sources, write, tmp_path):
    (tmp_path / "lists").mkdir()
    original = tmp_path / "lists" / "0.png"
    original.write_bytes(image(0))
    before = original.stat()
    path = write(("0.png", "a"), ("./0.png", "b"))
    fetch_source(cats(make, path), sources)
    write(("nothing.png", "a"))
    assert tree(fetch_source(cats(make, path), sources).folder) == {}
    assert original.stat() == before


def test_fetch_list_long_caption_is_read(make, sources, tmp_path):
    (tmp_path / "0.png").write_bytes(image(0))
    path = tmp_path / "cats.csv"
    text = io.StringIO()
    csv.writer(text).writerows([("url", "caption"), ("0.png", "long " * 200_000)])
    path.write_text(text.getvalue())
    (texts,) = by_content(fetch_source(cats(make, path), sources)).values()
    assert texts is not None
    assert len(texts[0]) == 999_999


def test_data_folder_differs_by_list(make, sources, tmp_path):
    first, second = cats(make, tmp_path / "a.csv"), cats(make, tmp_path / "b.csv")
    assert data_folder(first, sources) != data_folder(second, sources)


def test_fetch_list_unwritable_folder_raises(web, make, write, tmp_path):
    path = write((web.add("/0.png", image(0)), "a"))
    (tmp_path / "occupied").write_text("a file")
    with pytest.raises(SourceError, match=r"cannot be stored in .*occupied.*SDXL_PIPELINE_STORAGE"):
        fetch_source(cats(make, path), tmp_path / "occupied")


@pytest.mark.timeout(30)
def test_fetch_list_interrupt_stops_waiting_downloads(web, make, sources, write):
    path = write((web.add("/0.png", image(0)), "a"), (web.add("/1.png", image(1)), "b"))
    web.faults["/1.png"] = [(503, {"Retry-After": "50"}, b"")]

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_source(cats(make, path), sources, interrupt)
    again = fetch_source(cats(make, path), sources)
    assert set(by_content(again)) == {image(0), image(1)}
    assert again.downloaded == 1
