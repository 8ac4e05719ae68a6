"""Networks for `ctx.public_http`: a test sets the addresses of names, and no packet leaves this machine."""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpcore

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

# The addresses of a name, or a list of them for each lookup; the last list is repeated.
Answers = Mapping[str, Sequence[str] | Sequence[Sequence[str]]]


@dataclass
class Names:
    """Resolves names to the addresses that a test sets, and literal addresses as the system does."""

    answers: Answers = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def blocking(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
            return [str(entry[4][0]) for entry in found]
        except socket.gaierror:
            if host not in self.answers:
                raise
        answer = self.answers[host]
        if not answer or isinstance(answer[0], str):
            return [str(address) for address in answer]
        turn = min(self.asked.count(host), len(answer)) - 1
        return list(answer[turn])

    async def resolve(self, host: str, port: int) -> list[str]:
        return self.blocking(host, port)


class ScriptedNetwork(httpcore.AsyncNetworkBackend):
    """Sends the same bytes over each connection; addresses in `refuses` refuse it.

    `addresses` are those that the client tried, `tls_names` the host names of its TLS handshakes.
    """

    def __init__(self, answer: bytes = OK, refuses: Collection[str] = ()) -> None:
        self.addresses: list[tuple[str, int]] = []
        self.tls_names: list[str | None] = []
        self._answer = answer
        self._refuses = refuses

    async def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        return _Stream(self, self.dial(host, port))

    def dial(self, host: str, port: int) -> list[bytes]:
        self.addresses.append((host, port))
        if host in self._refuses:
            raise httpcore.ConnectError(f"{host} refuses")
        return [self._answer]


class BlockingNetwork(httpcore.NetworkBackend):
    """The same network for a blocking client."""

    def __init__(self, network: ScriptedNetwork) -> None:
        self._network = network

    def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        return _BlockingStream(self._network, self._network.dial(host, port))


class _Stream(httpcore.AsyncMockStream):
    def __init__(self, network: ScriptedNetwork, answer: list[bytes]) -> None:
        super().__init__(answer)
        self._network = network

    async def start_tls(self, *args: Any, **kwargs: Any) -> Any:
        self._network.tls_names.append(kwargs["server_hostname"])
        return self


class _BlockingStream(httpcore.MockStream):
    def __init__(self, network: ScriptedNetwork, answer: list[bytes]) -> None:
        super().__init__(answer)
        self._network = network

    def start_tls(self, *args: Any, **kwargs: Any) -> Any:
        self._network.tls_names.append(kwargs["server_hostname"])
        return self
