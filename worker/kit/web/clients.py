"""Clients: which address a request comes from, and how many calls it and its caller may make."""

from __future__ import annotations

import hashlib
import math
import re
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from starlette.requests import HTTPConnection

from worker.clock import Clock
from worker.errors import TooManyRequests

Address = IPv4Address | IPv6Address

# Limits count a whole IPv6 network of this size as one client.
_CLIENT_BITS = 64
_WITH_PORT = re.compile(r"\[([^\]]*)\](?::\d+)?|(\d+\.\d+\.\d+\.\d+):\d+")


@dataclass(frozen=True, slots=True)
class Client:
    """The sender of a request; `address` is None if it is unknown."""

    address: Address | None
    is_proxy: bool = False
    """Whether a trusted proxy sent the request itself, such as a health check."""
    is_local: bool = False
    """Whether it runs on this machine."""

    @property
    def key(self) -> str:
        """What limits count by: the IPv4 address, or the /64 network of an IPv6 address."""
        if isinstance(self.address, IPv6Address):
            return str(ip_network((int(self.address), 128)).supernet(new_prefix=_CLIENT_BITS))
        return str(self.address or "unknown")


class Addresses:
    """Resolves clients; `trusted` are the networks, as CIDR, whose X-Forwarded-For is believed."""

    def __init__(self, trusted: Iterable[str] = ()) -> None:
        self._trusted = [ip_network(network) for network in trusted]

    def trusts(self, host: str | None) -> bool:
        """Whether a peer of this address is a trusted proxy."""
        address = _address(host or "")
        return address is not None and self._is_trusted(address)

    def client_of(self, connection: HTTPConnection) -> Client:
        """The client: the peer, or the rightmost forwarded address that is not a trusted proxy."""
        peer = _address(connection.client.host if connection.client else "")
        forwarded = [
            entry.strip()
            for header in connection.headers.getlist("x-forwarded-for")
            for entry in header.split(",")
        ]
        if peer is None or not self._is_trusted(peer):
            # An untrusted proxy may run on this machine while its clients are elsewhere.
            is_direct = not forwarded and "forwarded" not in connection.headers
            return Client(peer, is_local=is_direct and peer is not None and peer.is_loopback)
        if not forwarded:
            return Client(peer, is_proxy=True, is_local=peer.is_loopback)
        address: Address | None = peer
        for entry in reversed(forwarded):
            address = _address(entry)
            if address is None or not self._is_trusted(address):
                break
        return Client(address, is_local=address is not None and address.is_loopback)

    def is_https(self, connection: HTTPConnection) -> bool:
        """Whether the client uses https, to this server or to a trusted proxy before it."""
        if connection.client is not None and self.trusts(connection.client.host):
            return connection.headers.get("x-forwarded-proto", "").strip().lower() == "https"
        return connection.url.scheme == "https"

    def _is_trusted(self, address: Address) -> bool:
        return any(address in network for network in self._trusted)


def counted_as(host: str) -> str:
    """The key by which limits count a peer of this address."""
    return Client(_address(host)).key


def _address(text: str) -> Address | None:
    """Parse an address as proxies write it: with or without a port, IPv4 possibly mapped into IPv6."""
    with_port = _WITH_PORT.fullmatch(text)
    if with_port:
        text = with_port[1] or with_port[2]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


# Keys remembered at once. A forgotten key starts with a full bucket.
MAX_KEYS = 20_000
# Tokens remembered as valid.
MAX_TOKENS = 10_000


class Buckets:
    """One token bucket for each key: `size` at once, then `rate` a second.

    Full buckets are not kept. If there are too many others, the fullest are dropped: a flood
    of keys drops its own buckets before that of a key that has reached its limit.
    """

    def __init__(self, clock: Clock, *, size: float, rate: float, most: int = MAX_KEYS) -> None:
        self._clock = clock
        self._rate = rate
        self._longest = size / rate
        self._most = most
        # When each bucket is full again, in seconds of the monotonic clock.
        self._full_at: dict[str, float] = {}

    def take(self, key: str) -> float:
        """Take one and return 0.0, or return the seconds until one is available."""
        seconds = self.wait(key)
        if seconds == 0.0:
            self.charge(key)
        return seconds

    def wait(self, key: str) -> float:
        """Return the seconds until one is available; 0.0 if one is."""
        now = self._clock.monotonic()
        missing = max(self._full_at.get(key, now), now) + 1 / self._rate - now - self._longest
        return missing if missing > 1e-9 else 0.0

    def charge(self, key: str) -> None:
        """Take one even from an empty bucket, which delays the next one."""
        now = self._clock.monotonic()
        if key not in self._full_at and len(self._full_at) >= self._most:
            self._forget(now)
        self._full_at[key] = max(self._full_at.get(key, now), now) + 1 / self._rate

    def give_back(self, key: str) -> None:
        if key in self._full_at:
            self._full_at[key] -= 1 / self._rate

    def _forget(self, now: float) -> None:
        """Free a tenth of the keys at once, so that a flood rarely pays for it."""
        self._full_at = {key: at for key, at in self._full_at.items() if at > now}
        room = max(1, self._most // 10)
        if len(self._full_at) > self._most - room:
            ordered = sorted(self._full_at.items(), key=lambda entry: entry[1])
            self._full_at = dict(ordered[len(ordered) - self._most + room :])


class ClientLimits:
    """Counts by address until the caller is known, and by caller from then on.

    A trusted proxy's own requests are not counted by address. Each method raises
    TooManyRequests at its limit.
    """

    def __init__(self, clock: Clock, *, logins_per_minute: int, calls_per_second: int) -> None:
        self._logins = Buckets(clock, size=logins_per_minute, rate=logins_per_minute / 60)
        self._strangers = Buckets(clock, size=calls_per_second, rate=calls_per_second)
        # Tokens that are being checked.
        self._new = Buckets(clock, size=calls_per_second, rate=calls_per_second)
        self._callers = Buckets(clock, size=calls_per_second, rate=calls_per_second)
        self._good: OrderedDict[bytes, None] = OrderedDict()

    def login(self, client: Client) -> None:
        if not client.is_proxy:
            _require(self._logins.take(client.key), f"too many logins from {client.key}")

    def stranger(self, client: Client) -> None:
        """Count a request without a token or session."""
        if not client.is_proxy:
            _require(self._strangers.take(client.key), f"too many requests without a token from {client.key}")

    def caller(self, key: str, name: str) -> None:
        _require(self._callers.take(key), f"too many calls by {name}")

    def token(self, token: str, client: Client) -> None:
        """Check whether a token may be verified; `was_good` or `was_bad` must follow.

        A bad token counts as a login. A token that was good before passes whatever others at its
        address have tried, and new tokens that arrive together do not block each other.
        """
        if client.is_proxy or _digest(token) in self._good:
            return
        _require(self._logins.wait(client.key), f"too many bad tokens from {client.key}")
        _require(self._new.take(client.key), f"too many new tokens from {client.key}")

    def was_good(self, token: str, client: Client) -> None:
        digest = _digest(token)
        if digest not in self._good and not client.is_proxy:
            self._new.give_back(client.key)
        self._good[digest] = None
        self._good.move_to_end(digest)
        if len(self._good) > MAX_TOKENS:
            self._good.popitem(last=False)

    def was_bad(self, token: str, client: Client) -> None:
        """Count an invalid token as a login, unless it was valid before, such as one that has expired."""
        digest = _digest(token)
        if digest in self._good:
            del self._good[digest]
        elif not client.is_proxy:
            self._logins.charge(client.key)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _require(seconds: float, message: str) -> None:
    if seconds > 0:
        raise TooManyRequests(message, retry_after=math.ceil(seconds))
