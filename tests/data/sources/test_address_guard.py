"""Tests of the address guard: no connection to private addresses, directly, by redirect or by DNS rebinding."""

import socket

import pytest

from sdxl_pipeline.data.sources import SourceError, address_guard, fetch_source
from sdxl_pipeline.data.sources.address_guard import is_public
from tests.support.remote_sources import image, tree

PRIVATE_ADDRESS = (
    "is a private address; write allow_private_addresses: true in this dataset's entry to allow it"
)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True),
        *(
            (address, False)
            for address in (
                "127.0.0.1",
                "10.1.2.3",
                "172.16.0.1",
                "192.168.1.1",
                "169.254.169.254",
                "100.64.0.1",
                "0.0.0.0",
                "224.0.0.1",
                "255.255.255.255",
                "::",
                "::1",
                "fe80::1",
                "fe80::1%2",
                "fc00::1",
                "fec0::1",
                "ff02::1",
                "::ffff:127.0.0.1",
                "::ffff:169.254.169.254",
                "::7f00:1",
                "64:ff9b::7f00:1",
                "2002:7f00:1::",
            )
        ),
    ],
)
def test_is_public_only_globally_routable_addresses(address, public):
    assert is_public(address) is public


@pytest.fixture
def first_is_public(monkeypatch):
    """Treat 127.0.0.1 as a public address and 127.0.0.2 as a private one."""
    monkeypatch.setattr(
        address_guard, "is_public", lambda address: address == "127.0.0.1" or is_public(address)
    )


@pytest.fixture
def failures_of_list(make, sources, tmp_path):
    """Return a function that fetches a list of URLs and gives the reason of each that failed."""

    def fetch(*addresses, **settings):
        path = tmp_path / "list.csv"
        path.write_text("\n".join(["url,caption", *(f"{address},a" for address in addresses)]))
        return dict(fetch_source(make(type="csv", csv_file=path, **settings), sources).failed)

    return fetch


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"])
def test_url_list_private_address_is_rejected_before_connecting(web, failures_of_list, host):
    address = web.add("/0.png", image(0)).replace("127.0.0.1", host)
    (reason,) = failures_of_list(address).values()
    assert reason.startswith("download failed: ")
    assert reason.endswith(PRIVATE_ADDRESS)
    assert not web.requested


def test_url_list_private_address_with_tls_or_proxy_is_rejected(web, failures_of_list, monkeypatch):
    (reason,) = failures_of_list(f"https://127.0.0.1:{web.port}/0.png").values()
    assert reason.endswith(PRIVATE_ADDRESS)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, web.url)
    monkeypatch.setattr("requests.utils.should_bypass_proxies", lambda url, no_proxy: False)
    (reason,) = failures_of_list("http://127.0.0.1:9/0.png").values()
    assert reason.endswith(PRIVATE_ADDRESS)
    web.add("http://only-the-proxy-knows.invalid/0.png", image(0))
    assert failures_of_list("http://only-the-proxy-knows.invalid/0.png") == {}


def test_url_list_allow_private_addresses_permits_download(web, failures_of_list):
    assert failures_of_list(web.add("/0.png", image(0)), allow_private_addresses=True) == {}
    assert web.requested["/0.png"] == 1


def test_url_list_redirect_to_private_address_is_rejected(web, failures_of_list, first_is_public):
    address = web.add("/0.png", image(0))
    target = f"http://127.0.0.2:{web.port}/secret"
    web.faults["/0.png"] = [(302, {"Location": target}, b"")]
    assert failures_of_list(address) == {address: f"download failed: 127.0.0.2 {PRIVATE_ADDRESS}"}
    assert failures_of_list(address) == {}, "the next run retries"


def test_url_list_dns_rebinding_uses_checked_address(web, failures_of_list, first_is_public, monkeypatch):
    answers = ["127.0.0.1", "127.0.0.2"]
    resolve = socket.getaddrinfo

    def getaddrinfo(host, *args, **options):
        return resolve(answers.pop(0) if host == "rebind.test" else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert failures_of_list(web.add("/0.png", image(0)).replace("127.0.0.1", "rebind.test")) == {}
    assert web.requested["/0.png"] == 1
    assert answers == ["127.0.0.2"]


def test_url_list_mixed_host_uses_public_address(web, failures_of_list, first_is_public, monkeypatch):
    resolve = socket.getaddrinfo

    def getaddrinfo(host, *args, **options):
        hosts = ["127.0.0.2", "127.0.0.1"] if host == "mixed.test" else [host]
        return [info for name in hosts for info in resolve(name, *args, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert failures_of_list(web.add("/0.png", image(0)).replace("127.0.0.1", "mixed.test")) == {}


def test_url_list_other_protocols_are_rejected_unless_allowed(web, failures_of_list):
    address = "simplecache::" + web.add("/0.png", image(0))
    (reason,) = failures_of_list(address).values()
    assert "simplecache::http:// is not supported in a list" in reason
    assert not web.requested
    assert failures_of_list(address, allow_private_addresses=True) == {}


def test_hub_redirect_to_private_address_is_rejected(hub, make, sources, tmp_path):
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "0.png").write_bytes(image(0))
    hub.add_dataset("someone/cats", tmp_path / "repository")
    dataset = make(
        type="huggingface",
        dataset_name="someone/cats",
        caption_strategy="instanceprompt",
        instance_prompt="a",
    )
    cdn = hub.cdn
    hub.cdn = cdn.replace("localhost", "127.0.0.2")
    fetched = fetch_source(dataset, sources)
    assert fetched.failed == (("0.png", f"download failed: 127.0.0.2 {PRIVATE_ADDRESS}"),)
    hub.cdn = cdn
    assert fetch_source(dataset, sources).failed == ()


def test_hub_table_with_private_url_is_rejected(hub, web, make, sources, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "repository").mkdir()
    table = pa.table({"image": [web.add("/0.png", image(0))], "caption": ["a"]})
    pq.write_table(table, tmp_path / "repository" / "train.parquet")
    hub.add_dataset("someone/cats", tmp_path / "repository")
    fetched = fetch_source(make(type="huggingface", dataset_name="someone/cats"), sources)
    assert [reason for _, reason in fetched.failed] == [f"download failed: 127.0.0.1 {PRIVATE_ADDRESS}"]
    assert not web.requested


def test_object_store_page_redirecting_to_private_address_is_rejected(web, make, sources):
    web.add("/cats/", b'<a href="0.png">0</a> <a href="1.png">1</a>', "text/html")
    for number in range(2):
        web.add(f"/cats/{number}.png", image(number))
    redirect = (302, {"Location": f"http://127.0.0.2:{web.port}/secret"}, b"")
    web.faults["/cats/1.png"] = [redirect] * 4
    fetched = fetch_source(make(type="aws", url=f"{web.url}/cats/"), sources)
    assert fetched.failed == (("1.png", f"download failed: 127.0.0.2 {PRIVATE_ADDRESS}"),)
    assert tree(fetched.folder) == {"0.png": image(0)}
    web.faults["/dogs/"] = [redirect]
    web.add("/dogs/", b"", "text/html")
    with pytest.raises(SourceError, match=r"127\.0\.0\.2 is a private address"):
        fetch_source(make(type="aws", url=f"{web.url}/dogs/"), sources)
