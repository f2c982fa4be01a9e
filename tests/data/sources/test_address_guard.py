"""Downloads connect to no private address: not directly, not by a redirect, and not by a second answer of the resolver."""

import socket

import pytest

from sdxl_pipeline.data.sources import SourceError, address_guard, fetch_source
from sdxl_pipeline.data.sources.address_guard import is_public
from tests.data.sources.conftest import image, tree

REFUSED = "is a private address; write allow_private_addresses: true in this dataset's entry to allow it"


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
def test_only_globally_routable_addresses_are_public(address, public):
    assert is_public(address) is public


@pytest.fixture
def first_is_public(monkeypatch):
    """Take 127.0.0.1 for a server of the internet; 127.0.0.2 stays a private one."""
    monkeypatch.setattr(
        address_guard, "is_public", lambda address: address == "127.0.0.1" or is_public(address)
    )


@pytest.fixture
def listed(make, sources, tmp_path):
    """Fetches a list of addresses; gives the reason of each that failed."""

    def fetch(*addresses, **settings):
        path = tmp_path / "list.csv"
        path.write_text("\n".join(["url,caption", *(f"{address},a" for address in addresses)]))
        return dict(fetch_source(make(type="csv", csv_file=path, **settings), sources).failed)

    return fetch


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"])
def test_an_address_of_a_list_is_refused_before_a_connection_is_made(web, listed, host):
    address = web.add("/0.png", image(0)).replace("127.0.0.1", host)
    (reason,) = listed(address).values()
    assert reason.startswith("download failed: ")
    assert reason.endswith(REFUSED)
    assert not web.asked


def test_tls_and_proxies_are_no_way_around(web, listed, monkeypatch):
    (reason,) = listed(f"https://127.0.0.1:{web.port}/0.png").values()
    assert reason.endswith(REFUSED)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, web.url)
    monkeypatch.setattr("requests.utils.should_bypass_proxies", lambda url, no_proxy: False)
    (reason,) = listed("http://127.0.0.1:9/0.png").values()
    assert reason.endswith(REFUSED)
    web.add("http://only-the-proxy-knows.invalid/0.png", image(0))
    assert listed("http://only-the-proxy-knows.invalid/0.png") == {}


def test_a_private_address_is_read_where_the_entry_allows_it(web, listed):
    assert listed(web.add("/0.png", image(0)), allow_private_addresses=True) == {}
    assert web.asked["/0.png"] == 1


def test_a_redirect_to_a_private_address_is_refused(web, listed, first_is_public):
    address = web.add("/0.png", image(0))
    target = f"http://127.0.0.2:{web.port}/secret"
    web.faults["/0.png"] = [(302, {"Location": target}, b"")]
    assert listed(address) == {address: f"download failed: 127.0.0.2 {REFUSED}"}
    assert listed(address) == {}, "the next run asks again"


def test_a_second_answer_of_the_resolver_changes_nothing(web, listed, first_is_public, monkeypatch):
    answers = ["127.0.0.1", "127.0.0.2"]
    resolve = socket.getaddrinfo

    def getaddrinfo(host, *args, **options):
        return resolve(answers.pop(0) if host == "rebind.test" else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert listed(web.add("/0.png", image(0)).replace("127.0.0.1", "rebind.test")) == {}
    assert web.asked["/0.png"] == 1
    assert answers == ["127.0.0.2"]


def test_a_host_with_private_and_public_addresses_is_reached_at_the_public_one(
    web, listed, first_is_public, monkeypatch
):
    resolve = socket.getaddrinfo

    def getaddrinfo(host, *args, **options):
        hosts = ["127.0.0.2", "127.0.0.1"] if host == "mixed.test" else [host]
        return [info for name in hosts for info in resolve(name, *args, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert listed(web.add("/0.png", image(0)).replace("127.0.0.1", "mixed.test")) == {}


def test_other_protocols_of_a_list_are_refused_unless_allowed(web, listed):
    address = "simplecache::" + web.add("/0.png", image(0))
    (reason,) = listed(address).values()
    assert "simplecache::http:// is not read from a list" in reason
    assert not web.asked
    assert listed(address, allow_private_addresses=True) == {}


def test_the_hub_may_not_redirect_to_another_private_host(hub, make, sources, tmp_path):
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "0.png").write_bytes(image(0))
    hub.add_dataset("someone/cats", tmp_path / "repository")
    dataset = make(
        type="huggingface",
        dataset_name="someone/cats",
        caption_strategy="instanceprompt",
        instance_prompt="a",
    )
    own = hub.cdn
    hub.cdn = own.replace("localhost", "127.0.0.2")
    fetched = fetch_source(dataset, sources)
    assert fetched.failed == (("0.png", f"download failed: 127.0.0.2 {REFUSED}"),)
    hub.cdn = own
    assert fetch_source(dataset, sources).failed == ()


def test_addresses_in_cells_of_a_hub_table_are_refused(hub, web, make, sources, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "repository").mkdir()
    table = pa.table({"image": [web.add("/0.png", image(0))], "caption": ["a"]})
    pq.write_table(table, tmp_path / "repository" / "train.parquet")
    hub.add_dataset("someone/cats", tmp_path / "repository")
    fetched = fetch_source(make(type="huggingface", dataset_name="someone/cats"), sources)
    assert [reason for _, reason in fetched.failed] == [f"download failed: 127.0.0.1 {REFUSED}"]
    assert not web.asked


def test_a_page_of_links_may_not_redirect_to_another_private_host(web, make, sources):
    web.add("/cats/", b'<a href="0.png">0</a> <a href="1.png">1</a>', "text/html")
    for number in range(2):
        web.add(f"/cats/{number}.png", image(number))
    elsewhere = (302, {"Location": f"http://127.0.0.2:{web.port}/secret"}, b"")
    web.faults["/cats/1.png"] = [elsewhere] * 4
    fetched = fetch_source(make(type="aws", url=f"{web.url}/cats/"), sources)
    assert fetched.failed == (("1.png", f"download failed: 127.0.0.2 {REFUSED}"),)
    assert tree(fetched.folder) == {"0.png": image(0)}
    web.faults["/dogs/"] = [elsewhere]
    web.add("/dogs/", b"", "text/html")
    with pytest.raises(SourceError, match=r"127\.0\.0\.2 is a private address"):
        fetch_source(make(type="aws", url=f"{web.url}/dogs/"), sources)
