"""Tests of object stores against local S3 and web servers: incremental synchronization, complete files, valid names, no secrets."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_pipeline.data.scan.dataset_scan import scan_dataset
from sdxl_pipeline.data.sources import SourceError, data_folder, fetch_source, object_store
from tests.support.processes import wait_for
from tests.support.remote_sources import Bucket, image, matches, tree


@pytest.fixture
def cats(make, bucket: Bucket):
    """Return a function that builds a dataset in the bucket, with URL and keys in its entry."""

    def cats(**settings):
        entry = {
            "type": "aws",
            "aws_bucket_name": bucket.name,
            "aws_data_prefix": "cats",
            "aws_endpoint_url": bucket.endpoint,
            "aws_region_name": bucket.region,
            "aws_access_key_id": bucket.key_id,
            "aws_secret_access_key": bucket.secret,
        }
        return make(**entry | settings)

    return cats


def test_fetch_bucket_second_fetch_downloads_only_changes(bucket: Bucket, cats, sources):
    for index in range(3):
        bucket.put(f"cats/deep/er/{index}.png", image(index))
    bucket.put("cats/0.txt", b"a cat")
    bucket.put("dogs/9.png", image(9))
    bucket.put("cats/deep/", b"")  # consoles represent a folder like this
    progress = []
    fetched = fetch_source(cats(), sources, lambda done, total: progress.append((done, total)))
    names = [f"deep/er/{index}.png" for index in range(3)]
    assert set(tree(fetched.folder)) == {*names, "0.txt"}
    assert (fetched.files, fetched.downloaded, fetched.failed) == (4, 4, ())
    assert fetched.downloaded_bytes == 5 + sum(len(image(index)) for index in range(3))
    assert progress == [(done, 4) for done in range(1, 5)]
    assert len(bucket.downloads()) == 4

    unchanged = fetch_source(cats(), sources)
    assert (unchanged.downloaded, unchanged.revision, bucket.downloads()) == (0, fetched.revision, [])

    untouched = (fetched.folder / names[1]).stat()
    bucket.put("cats/deep/er/0.png", image(7))
    bucket.delete("cats/deep/er/2.png")
    bucket.delete("cats/0.txt")
    bucket.put("cats/new.png", image(8))
    changed = fetch_source(cats(), sources)
    assert tree(changed.folder) == {names[0]: image(7), names[1]: image(1), "new.png": image(8)}
    assert bucket.downloads() == ["cats/deep/er/0.png", "cats/new.png"]
    assert changed.revision != fetched.revision
    assert (changed.folder / names[1]).stat() == untouched


def test_fetch_bucket_credentials_from_environment(bucket: Bucket, make, sources, monkeypatch):
    bucket.put("cats/0.png", image(0))
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", bucket.key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", bucket.secret)
    monkeypatch.setenv("AWS_DEFAULT_REGION", bucket.region)
    fetched = fetch_source(make(type="aws", url=f"s3://{bucket.name}/cats/"), sources)
    assert tree(fetched.folder) == {"0.png": image(0)}


def test_fetch_list_s3_urls_are_downloaded(bucket: Bucket, make, sources, tmp_path):
    bucket.put("cats/0.png", image(0))
    path = tmp_path / "cats.csv"
    path.write_text(f"url,caption\ns3://{bucket.name}/cats/0.png,a cat\ns3://{bucket.name}/gone.png,b\n")
    dataset = make(
        type="csv",
        csv_file=path,
        aws_endpoint_url=bucket.endpoint,
        aws_access_key_id=bucket.key_id,
        aws_secret_access_key=bucket.secret,
    )
    fetched = fetch_source(dataset, sources)
    assert list(tree(fetched.folder).values()) == [image(0)]
    assert fetched.failed == (
        (f"s3://{bucket.name}/gone.png", "download failed: the file does not exist (any more)"),
    )


def test_fetch_bucket_invalid_names_are_reported(bucket: Bucket, cats, sources, tmp_path):
    invalid_names = {
        "../up.png": "another folder",
        "a/../../up.png": "another folder",
        "./x.png": "another folder",
    }
    invalid_names |= {"a//b.png": "empty folder", "/root.png": "absolute", "é" * 150 + ".png": "too long"}
    invalid_names |= {"both": "also that of a folder"}
    for name in invalid_names:
        bucket.put(f"cats/{name}", image(1))
    bucket.put("cats/both/0.png", image(0))
    bucket.put("cats/with space ?#%41.png", image(2))
    fetched = fetch_source(cats(), sources)
    assert tree(fetched.folder) == {"both/0.png": image(0), "with space ?#%41.png": image(2)}
    failed = dict(fetched.failed)
    assert set(failed) == set(invalid_names)
    assert all(phrase in failed[name] for name, phrase in invalid_names.items()), failed
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")} == {"storage"}
    scanned = scan_dataset(cats(), fetched.folder, failed=fetched.failed)
    assert (scanned["status"] == "dropped").sum() == len(invalid_names)


def test_fetch_bucket_server_errors_are_retried(bucket: Bucket, cats, sources, s3_server):
    bucket.put("cats/0.png", image(0))
    s3_server[2].extend([503, 500])
    assert tree(fetch_source(cats(), sources).folder) == {"0.png": image(0)}


def test_fetch_bucket_failed_update_removes_old_copy(bucket: Bucket, cats, sources, s3_server):
    bucket.put("cats/0.png", image(0))
    bucket.put("cats/1.png", image(1))
    fetch_source(cats(), sources)
    bucket.put("cats/1.png", image(2))
    s3_server[2].extend([403] * 20)
    fetched = fetch_source(cats(), sources)
    s3_server[2].clear()
    ((name, reason),) = fetched.failed
    assert (name, list(tree(fetched.folder))) == ("1.png", ["0.png"])
    assert reason.startswith("download failed: ")
    assert fetch_source(cats(), sources).downloaded == 1


@pytest.mark.parametrize(
    ("settings", "phrases"),
    [
        ({"aws_data_prefix": "kats"}, ["aws_bucket_name 's3://photos/kats'", "has no files"]),
        ({"aws_bucket_name": "absent"}, ["'cats'", "s3://absent/cats"]),
        ({"aws_endpoint_url": "http://127.0.0.1:9"}, ["cannot be listed"]),
        ({"aws_bucket_name": None, "url": "nonesuch://a/b"}, ["url 'nonesuch://a/b' cannot be opened"]),
    ],
)
def test_fetch_bucket_unreadable_bucket_raises_without_secrets(
    bucket: Bucket, cats, sources, settings, phrases
):
    bucket.put("cats/0.png", image(0))
    dataset = cats().model_copy(update=settings)
    with pytest.raises(SourceError) as caught:
        fetch_source(dataset, sources)
    assert matches(str(caught.value), *phrases), caught.value
    assert bucket.secret not in str(caught.value)
    assert bucket.key_id not in str(caught.value)


def test_redacted_message_hides_secrets(cats, bucket: Bucket):
    error = PermissionError(f"{bucket.key_id} with {bucket.secret} at https://a.org/x?X-Amz-Signature=abc")
    assert object_store.redacted_message(error, cats()) == "(hidden) with (hidden) at https://a.org/x"


def test_fetch_bucket_empty_bucket_raises_and_keeps_files(bucket: Bucket, cats, sources):
    bucket.put("cats/0.png", image(0))
    fetched = fetch_source(cats(), sources)
    bucket.delete("cats/0.png")
    with pytest.raises(SourceError, match="has no files"):
        fetch_source(cats(), sources)
    assert tree(fetched.folder) == {"0.png": image(0)}


def test_fetch_bucket_secrets_are_not_written_to_disk(bucket: Bucket, cats, sources):
    bucket.put("cats/0.png", image(0))
    fetched = fetch_source(cats(), sources)
    scan_dataset(cats(), fetched.folder, recorded=sources / "scan.parquet")
    written = tree(sources)
    assert len(written) > 2
    assert not [path for path, data in written.items() if bucket.secret.encode() in data]
    assert not [path for path, data in written.items() if bucket.key_id.encode() in data]
    assert bucket.secret not in repr(fetched)


def test_fetch_bucket_killed_process_resumes_without_partial_files(web, make, sources, tmp_path):
    """A real process is killed while a download blocks; complete files are kept and not downloaded again."""
    data = {f"/cats/{index}.png": image(index) * 3000 for index in range(6)}
    links = "".join(f'<a href="{index}.png">{index}</a>' for index in range(6))
    web.add("/cats/", f"<html>{links}</html>".encode(), "text/html")
    for path, content in data.items():
        web.add(path, content)
    web.stalls["/cats/5.png"] = 1000
    dataset = make(type="aws", url=web.url + "/cats")
    program = (
        "import sys, pathlib; from sdxl_pipeline.data.sources import fetch_source\n"
        "from sdxl_pipeline.config.schema.datasets import ImageDataset\n"
        "fetch_source(ImageDataset.model_validate_json(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", program, dataset.model_dump_json(), str(sources)]
    child = subprocess.Popen(command, cwd=Path(__file__).parents[3])
    folder = data_folder(dataset, sources)
    manifest = folder.parent / "ledger.jsonl"
    try:
        wait_for(
            lambda: (
                manifest.exists() and len(manifest.read_text().splitlines()) == 5 and web.stalled.is_set()
            ),
            60,
            "five files fetched and the sixth started",
        )
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        web.go_on.set()
    expected = {path.removeprefix("/cats/"): content for path, content in data.items()}
    present = tree(folder)
    assert present == {name: expected[name] for name in present}
    assert len(present) == 5
    web.stalls.clear()
    web.requested.clear()
    fetched = fetch_source(dataset, sources)
    assert tree(folder) == expected
    assert fetched.downloaded == 1
    assert dict(web.requested) == {"/cats/": 1, "/cats/5.png": 1}
    assert list((folder.parent / "incoming").iterdir()) == []


def test_fetch_bucket_page_of_links_is_read_like_a_folder(web, make, sources):
    elsewhere = web.add("/other/z.png", image(9))
    page = '<a href="?C=N;O=D">Name</a> <a href="/">Up</a> <a href="../">..</a> <a href="a%20b.png">a</a> <a href="sub/">s</a>'
    web.add("/cats/", f'{page} <a href="{elsewhere}">z</a> <a href="gone.png">g</a>'.encode(), "text/html")
    web.add(
        "/cats/sub/",
        b'<a href="../">..</a> <a href="/cats/sub/1.png">1</a> <a href="/cats/">up</a>',
        "text/html",
    )
    web.add("/cats/a%20b.png", image(0))
    web.add("/cats/sub/1.png", image(1))
    dataset = make(type="aws", url=web.url + "/cats/")
    fetched = fetch_source(dataset, sources)
    assert tree(fetched.folder) == {"a b.png": image(0), "sub/1.png": image(1)}
    assert [name for name, _ in fetched.failed] == ["gone.png"]
    assert web.requested["/other/z.png"] == 0
    web.add("/cats/sub/1.png", image(2))
    web.faults["/cats/sub/1.png"] = []
    assert fetch_source(dataset, sources).downloaded == 1
    assert web.requested["/cats/a%20b.png"] == 1


def test_fetch_bucket_missing_package_raises_with_extra(make, sources, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gcsfs" else find(name, *rest)
    )
    with pytest.raises(
        SourceError, match=r"url 'gs://b/c': gs:// needs the package gcsfs.*sdxl-pipeline\[gs\]"
    ):
        fetch_source(make(type="aws", url="gs://b/c"), sources)
