"""Sinks: whatever can take a byte from a run on this machine, each keeping all that it gets."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import gzip
import os
import re
import socket
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

libc = ctypes.CDLL(None, use_errno=True)
_MQ_OPEN = {"x86_64": 240, "aarch64": 180}[os.uname().machine]
ABSTRACT = f"\0orgworker-ways-{os.getpid()}"
# For experiments (RFC 3692, IEEE 802): nothing else on this machine speaks them.
PROTOCOL = 253
ETHERTYPE = 0x88B5
USERSOCK = 2
VSOCK_PORT = 25_253


class Sinks:
    """All that arrived, by sink; `lacking` are those that this machine cannot have, and why."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.got: dict[str, bytearray] = defaultdict(bytearray)
        self.places: dict[str, Any] = {
            "path": str(folder / "stream"),
            "datagrams": str(folder / "datagrams"),
            "abstract": ABSTRACT,
        }
        self.lacking: dict[str, str] = {}
        self.names: list[str | None] = []
        self._loop = asyncio.get_running_loop()

    def clear(self) -> None:
        self.got.clear()
        self.names.clear()

    @asynccontextmanager
    async def open(self, certificate: Path) -> AsyncIterator[Sinks]:
        """Listen on all of them. `certificate` is that of the TLS sink."""
        async with AsyncExitStack() as stack:
            for name in ("owner", "stranger", "evil"):
                await self._server(stack, name, Echo(self, name).serve)
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(certificate)
            tls.sni_callback = self._named
            await self._server(stack, "tls", Echo(self, "tls").serve, ssl=tls)
            await self._server(stack, "tcp", self._keep("tcp"))
            server = await asyncio.start_unix_server(self._keep("path"), self.places["path"])
            stack.callback(server.close)
            server = await asyncio.start_unix_server(self._keep("abstract"), ABSTRACT)
            stack.callback(server.close)
            for name in ("udp", "quic", "dns"):
                self.places[name] = self._datagrams(stack, name, ("127.0.0.1", 0), socket.AF_INET)[1]
            self._datagrams(stack, "datagrams", self.places["datagrams"], socket.AF_UNIX)
            self._datagrams(stack, "icmp", None, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
            self._datagrams(stack, "raw", None, socket.AF_INET, socket.SOCK_RAW, PROTOCOL)
            lo = ("lo", ETHERTYPE)
            self._datagrams(stack, "packet", lo, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE))
            self._datagrams(stack, "netlink", (0, 0), socket.AF_NETLINK, socket.SOCK_RAW, USERSOCK)
            self._vsock(stack)
            self._queue(stack)
            yield self

    def collect(self) -> None:
        """Take what is in those that the loop does not read."""
        data = ctypes.create_string_buffer(8192)
        while (size := libc.syscall(_MQ_OPEN + 3, self._messages, data, len(data), None, bytes(16))) >= 0:
            self.got["queue"] += data.raw[:size]
        self.got["segment"] += ctypes.string_at(self._segment, 4096).rstrip(b"\0")
        ctypes.memset(self._segment, 0, 4096)
        file = Path(self.places["file"])
        if file.exists():
            self.got["file"] += file.read_bytes()
            file.unlink()

    def _queue(self, stack: AsyncExitStack) -> None:
        """A message queue of POSIX, a segment of System V, and a file."""
        name = f"orgworker-ways-{os.getpid()}"
        flags = os.O_CREAT | os.O_RDONLY | os.O_NONBLOCK
        self._messages = libc.syscall(_MQ_OPEN, name.encode(), flags, 0o600, None)
        stack.callback(libc.syscall, _MQ_OPEN + 1, name.encode())
        stack.callback(os.close, self._messages)
        libc.shmat.restype = ctypes.c_void_p
        segment = libc.shmget(os.getpid(), 4096, 0o1600)  # IPC_CREAT
        self._segment = libc.shmat(segment, None, 0)
        stack.callback(libc.shmctl, segment, 0, None)  # IPC_RMID
        self.places |= {"queue": name, "segment": os.getpid(), "file": str(self.folder / "file")}

    async def _server(self, stack: AsyncExitStack, name: str, serve: Any, **options: Any) -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, **options)
        stack.callback(server.close)
        self.places[name] = server.sockets[0].getsockname()[1]

    def _named(self, connection: Any, name: str | None, context: ssl.SSLContext) -> None:
        self.names.append(name)
        self.got["sni"] += (name or "").encode()

    def _keep(self, name: str) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
        async def keep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                while data := await reader.read(65_536):
                    self.got[name] += data
            writer.close()

        return keep

    def _datagrams(self, stack: AsyncExitStack, name: str, address: Any, *kind: int) -> Any:
        family, what, *protocol = *kind, *(() if len(kind) > 1 else (socket.SOCK_DGRAM,))
        try:
            sink = socket.socket(family, what, *protocol)
        except OSError as error:
            self.lacking[name] = str(error)
            return None
        stack.callback(sink.close)
        sink.setblocking(False)
        if address is not None:
            sink.bind(address)
        self.places.setdefault(name, sink.getsockname()[0] if family == socket.AF_NETLINK else 0)

        def receive() -> None:
            with suppress(OSError):
                while True:
                    self.got[name] += sink.recv(65_536)

        self._loop.add_reader(sink, receive)
        stack.callback(self._loop.remove_reader, sink)
        return sink.getsockname()

    def _vsock(self, stack: AsyncExitStack) -> None:
        try:
            listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
            stack.callback(listener.close)
            listener.bind((1, VSOCK_PORT))  # VMADDR_CID_LOCAL
            listener.listen()
        except OSError as error:
            self.lacking["vsock"] = str(error)
            return
        listener.setblocking(False)

        def accept() -> None:
            with suppress(OSError):
                connection, _ = listener.accept()
                connection.settimeout(1)
                with connection:
                    self.got["vsock"] += connection.recv(65_536)

        self._loop.add_reader(listener, accept)
        stack.callback(self._loop.remove_reader, listener)


class Echo:
    """A service that gives back what it gets, in the form that the path of the request names."""

    def __init__(self, sinks: Sinks, name: str) -> None:
        self._sinks = sinks
        self._name = name

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self._sinks.got[self._name] += head
                length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
                body = await reader.readexactly(int(length[1])) if length else b""
                if b"chunked" in head.lower():
                    while (size := int(await reader.readline(), 16)) > 0:
                        body += (await reader.readexactly(size + 2))[:-2]
                    await reader.readline()
                self._sinks.got[self._name] += body
                for part in self._answer(head, body):
                    writer.write(part)
                    await writer.drain()
                    if len(part) < 4:  # one that is cut into parts, which are to arrive apart
                        await asyncio.sleep(0.0005)
        writer.close()

    def _answer(self, head: bytes, body: bytes) -> list[bytes]:
        method, target, _ = head.split(b"\r\n")[0].split(b" ")
        path, _, query = target.decode().partition("?")
        if method == b"TRACE":
            return [_answered(head)]
        # What is given back: the values of the headers, without their names, or what is in the body.
        values = b" ".join(line.partition(b": ")[2] for line in head.split(b"\r\n")[1:])
        text = values.decode("latin-1")
        authorization = (re.search(rb"(?i)\r\nauthorization: ([^\r]*)", head) or [b"", b""])[1]
        match path.split("/")[1]:
            case "header":
                return [_answered(b"", b"X-Echo: " + authorization, b"X-All: " + values.strip())]
            case "cut":
                return [_head(b"Transfer-Encoding: chunked"), *_chunks(values, 1), b"0\r\n\r\n"]
            case "gzip":
                return [_answered(gzip.compress(values), b"Content-Encoding: gzip")]
            case "liar":
                return [_answered(values, b"Content-Encoding: gzip")]
            case "unknown":
                return [_answered(values, b"Content-Encoding: br")]
            case "base64":
                return [_answered(base64.b64encode(b"x" * int(query or 0) + values))]
            case "percent":
                return [_answered(quote(values, safe="").encode())]
            case "html":
                return [_answered(escape(text).encode())]
            case "utf16":
                return [_answered(text.encode("utf-16"))]
            case "later":
                return [_answered(bytes(self._sinks.got[self._name]).replace(head, b""))]
            case "location":
                to = unquote(query) + "?t=" + quote(authorization.decode("latin-1"))
                return [_answered(b"", b"Location: " + to.encode(), status=b"302 Found")]
            case "cookie":
                return [_answered(b"", b"Set-Cookie: a=" + authorization)]
            case "name":
                return [_answered(b"", b"X-" + re.sub(rb"[^\w-]", b"", authorization) + b": 1")]
            case "reason":
                return [_answered(b"", status=b"200 " + authorization)]
            case "early":
                informed = b"HTTP/1.1 103 Early Hints\r\nLink: <" + authorization + b">\r\n\r\n"
                return [informed + _answered(b"")]
            case "trailers":
                trailer = b"0\r\nX-Echo: " + authorization + b"\r\n\r\n"
                return [_head(b"Transfer-Encoding: chunked") + b"1\r\nx\r\n" + trailer]
            case "switch":
                return [
                    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n" + values
                ]
            case "split":
                return [_answered(b"one") + _answered(values)]
            case "range" if found := re.search(rb"(?i)\r\nrange: bytes=(\d+)-(\d+)", head):
                part = values[int(found[1]) : int(found[2]) + 1]
                return [_answered(part, status=b"206 Partial Content")]
            case "head":
                return [_head(b"Content-Length: 5", b"X-Echo: " + authorization)]
            case "denied":
                return [_answered(values, status=b"401 Unauthorized")]
        return [_answered(values + body)]


def _head(*headers: bytes, status: bytes = b"200 OK") -> bytes:
    return b"\r\n".join([b"HTTP/1.1 " + status, *headers]) + b"\r\n\r\n"


def _answered(body: bytes, *headers: bytes, status: bytes = b"200 OK") -> bytes:
    return _head(b"Content-Length: %d" % len(body), *headers, status=status) + body


def _chunks(data: bytes, size: int) -> list[bytes]:
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    return [each for part in parts for each in (b"%x\r\n" % len(part), part, b"\r\n")]
