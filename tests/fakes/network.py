"""Networks for `ctx.public_http` in tests: names resolve as the test says, nothing leaves this machine."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpcore

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

# An address, or a list of them for each time that the name is resolved; the last one stays.
Answers = Mapping[str, Sequence[str] | Sequence[Sequence[str]]]


@dataclass
class Names:
    """Resolves addresses as the system does, and names as the test says."""

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


@dataclass
class Dialled:
    """What was connected to, and by which names TLS was begun."""

    addresses: list[tuple[str, int]] = field(default_factory=list)
    tls_names: list[str | None] = field(default_factory=list)


class ScriptedNetwork(httpcore.AsyncNetworkBackend):
    """Answers each connection with the same bytes; `refuses` are addresses that nobody listens on."""

    def __init__(self, answer: bytes = OK, refuses: Iterable[str] = ()) -> None:
        self.dialled = Dialled()
        self._answer = answer
        self._refuses = frozenset(refuses)

    async def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        self.dialled.addresses.append((host, port))
        if host in self._refuses:
            raise httpcore.ConnectError(f"{host} refuses")
        return _Stream(self._answer, self.dialled)


class BlockingScriptedNetwork(httpcore.NetworkBackend):
    """The same for a client that blocks."""

    def __init__(self, answer: bytes = OK, refuses: Iterable[str] = ()) -> None:
        self.dialled = Dialled()
        self._answer = answer
        self._refuses = frozenset(refuses)

    def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        self.dialled.addresses.append((host, port))
        if host in self._refuses:
            raise httpcore.ConnectError(f"{host} refuses")
        return _BlockingStream(self._answer, self.dialled)


class _Stream(httpcore.AsyncNetworkStream):
    def __init__(self, answer: bytes, dialled: Dialled) -> None:
        self._answer = answer
        self._dialled = dialled

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        given, self._answer = self._answer[:max_bytes], self._answer[max_bytes:]
        return given

    async def write(self, buffer: bytes, timeout: float | None = None) -> None: ...

    async def aclose(self) -> None: ...

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        self._dialled.tls_names.append(server_hostname)
        return self


class _BlockingStream(httpcore.NetworkStream):
    def __init__(self, answer: bytes, dialled: Dialled) -> None:
        self._answer = answer
        self._dialled = dialled

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        given, self._answer = self._answer[:max_bytes], self._answer[max_bytes:]
        return given

    def write(self, buffer: bytes, timeout: float | None = None) -> None: ...

    def close(self) -> None: ...

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        self._dialled.tls_names.append(server_hostname)
        return self
