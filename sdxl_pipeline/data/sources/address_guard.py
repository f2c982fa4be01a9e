"""Rejection of connections to private addresses, checked at the IP address of each connection.

A list of URLs or a dataset repository may be untrusted, and a server may redirect anywhere. Without this check a download could read
what only this machine or its network can reach, such as a router or a cloud's metadata service. A host name is resolved once and the
connection is made to the checked address, so that a second DNS answer cannot change the target. Each redirect is a separate connection
and is checked too.
"""

import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any, Final
from urllib.parse import urlsplit

from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.sources.download import FetchError

_NAT64: Final = IPv6Network("64:ff9b::/96")
_HINT: Final = "write allow_private_addresses: true in this dataset's entry to allow it"


class RefusedConnectionError(OSError):
    """A connection to a private address; an OSError, after which clients try the host's next address."""


class AddressGuard:
    """The IP addresses to which the downloads of one dataset may connect.

    `own_hosts` are hosts that the user configured, such as that of HF_ENDPOINT: their addresses are allowed even if private.
    """

    def __init__(self, own_hosts: Collection[str] = ()) -> None:
        self._own_hosts = own_hosts

    @cached_property
    def _own_addresses(self) -> frozenset[str]:
        return frozenset(address for host in self._own_hosts for address in _resolve(host, None))

    def allows(self, address: str) -> bool:
        """Return whether a connection to this IP address is allowed."""
        return is_public(address) or address in self._own_addresses

    def resolve(self, host: str, port: int | None) -> list[str]:
        """Return the allowed IP addresses of a host. Raise FetchError if it has none, OSError if it cannot be resolved."""
        found = _resolve(host, port)
        allowed = [address for address in found if self.allows(address)]
        if not allowed:
            raise FetchError(_private_address_message(host, found[0]))
        return allowed

    def open_socket(self, info: Any) -> socket.socket:
        """Return a socket for an entry of `getaddrinfo`, as aiohttp's `socket_factory`. Raise RefusedConnectionError if it is private."""
        family, kind, protocol, _, target = info
        if not self.allows(target[0]):
            raise RefusedConnectionError(_private_address_message(target[0], target[0]))
        return socket.socket(family, kind, protocol)


def is_public(address: str) -> bool:
    """Return whether an IP address is globally routable: not private, loopback, link-local, multicast, unspecified or reserved.

    For an IPv6 address with an embedded IPv4 address (mapped, compatible, NAT64, 6to4, Teredo) the latter decides.
    """
    parsed = ip_address(address)
    if isinstance(parsed, IPv6Address) and (embedded := _embedded_ipv4(parsed)) is not None:
        parsed = embedded
    site_local = isinstance(parsed, IPv6Address) and parsed.is_site_local
    return parsed.is_global and not parsed.is_multicast and not site_local


def own_host(address: str | None) -> tuple[str, ...]:
    """Return the host of a URL that the user configured, as `own_hosts`."""
    try:
        host = urlsplit(address or "").hostname
    except ValueError:
        host = None
    return (host,) if host else ()


def refusal_message(error: BaseException) -> str:
    """Return the message of the RefusedConnectionError that caused a client's error; "" if there is none."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, RefusedConnectionError):
            return str(current)
        inner = getattr(current, "os_error", None)  # set by aiohttp
        if isinstance(inner, RefusedConnectionError):
            return str(inner)
        current = current.__cause__ or current.__context__
    return ""


def guarded_session(guard: AddressGuard) -> Any:
    """Return a `requests.Session` whose direct connections are checked by `guard`.

    A proxy in the environment is configured by the user and resolves names itself: then only names that this machine resolves are checked.
    """
    import requests
    from requests.adapters import HTTPAdapter
    from requests.utils import select_proxy
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
    from urllib3.exceptions import NameResolutionError, NewConnectionError

    class Checked(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            host = self._dns_host
            try:
                addresses = guard.resolve(host, self.port)
            except socket.gaierror as error:
                raise NameResolutionError(host, self, error) from error
            for position, address in enumerate(addresses, start=1):
                self._dns_host = address  # restored below, since the Host header and TLS need the name
                try:
                    return super()._new_conn()
                except NewConnectionError:
                    if position == len(addresses):
                        raise
                finally:
                    self._dns_host = host
            raise AssertionError("`resolve` returns at least one address or raises")

    class CheckedTls(Checked, HTTPSConnection):
        pass

    class Pool(HTTPConnectionPool):
        ConnectionCls = Checked

    class TlsPool(HTTPSConnectionPool):
        ConnectionCls = CheckedTls

    class Adapter(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **options: Any) -> None:
            super().init_poolmanager(*args, **options)
            self.poolmanager.pool_classes_by_scheme = {"http": Pool, "https": TlsPool}

        def send(self, request: Any, *args: Any, **options: Any) -> Any:
            if select_proxy(request.url, options.get("proxies")):
                for host in own_host(request.url):
                    try:
                        guard.resolve(host, None)
                    except OSError:
                        continue  # only the proxy knows this name
            return super().send(request, *args, **options)

    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, Adapter())
    return session


@contextmanager
def guarded_hub_client(dataset: ImageDataset, endpoint: str) -> Iterator[None]:
    """Restrict huggingface_hub's client to public addresses and the host of `endpoint` while the context is open."""
    if dataset.allow_private_addresses:
        yield
        return
    import httpcore2
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    guard = AddressGuard(own_host(endpoint))

    class Backend(httpcore2.SyncBackend):
        def connect_tcp(self, host: str, port: int, *args: Any, **options: Any) -> Any:
            try:
                addresses = guard.resolve(host, port)
            except OSError as error:
                raise httpcore2.ConnectError(str(error)) from error
            for position, address in enumerate(addresses, start=1):
                try:
                    return super().connect_tcp(address, port, *args, **options)
                except httpcore2.ConnectError:
                    if position == len(addresses):
                        raise
            raise AssertionError("`resolve` returns at least one address or raises")

    def client() -> Any:
        hub_client = default_client_factory()
        # httpx2 has no option for this; proxies of the environment have their own transports
        hub_client._transport._pool._network_backend = Backend()
        return hub_client

    set_client_factory(client)
    try:
        yield
    finally:
        set_client_factory(default_client_factory)


def _embedded_ipv4(address: IPv6Address) -> IPv4Address | None:
    if address.teredo is not None:
        return address.teredo[1]
    if address in _NAT64 or int(address) >> 32 == 0:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def _resolve(host: str, port: int | None) -> list[str]:
    """Return every IP address of a host, in the order of the resolver. Raises OSError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # a label that IDNA cannot encode
        raise socket.gaierror(socket.EAI_NONAME, str(error)) from error
    return list(dict.fromkeys(str(info[4][0]) for info in found))


def _private_address_message(host: str, address: str) -> str:
    address_text = address if host == address else f"{host} ({address})"
    return f"{address_text} is a private address; {_HINT}"
