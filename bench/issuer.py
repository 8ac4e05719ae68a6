"""An issuer in a process of its own, for benches: it signs nothing and answers at once, or at a rate.

    .venv/bin/python -m bench.issuer [--rate N]

Prints its URL. `POST /load` gets the path of a file with a line for each client: its id, a tab, its token.
`GET /counts` returns the token requests of each second and how many were refused. With `--rate` it allows
so many requests a second, with a burst of one second's, and answers others with 429 and `Retry-After`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from worker.demo.keys import SigningKey
from worker.demo.provider import Application

# Seconds that a token lives.
LIFETIME = 86_400
# Tokens that one task signs.
PART = 500
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_CLIENT = re.compile(rb"(?:^|&)client_id=([^&]+)")


class Tokens:
    """What the issuer answers: a token for each client, within the rate."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._room = self._most = max(1.0, rate)
        self._filled_at = time.monotonic()
        self._bodies: dict[bytes, bytes] = {}
        self.keys = b"{}"
        self.requests: Counter[int] = Counter()
        self.refused = 0

    def load(self, path: str) -> None:
        folder = Path(path)
        self.keys = (folder / "keys.json").read_bytes()
        for line in (folder / "tokens").read_bytes().splitlines():
            client, _, text = line.partition(b"\t")
            self._bodies[client] = b'{"access_token":"%b","expires_in":%d,"token_type":"bearer"}' % (
                text,
                LIFETIME,
            )

    def answer(self, body: bytes) -> tuple[int, bytes, bytes]:
        """Status, further headers and body for a token request."""
        self.requests[int(time.time())] += 1
        if self._rate:
            now = time.monotonic()
            self._room = min(self._most, self._room + (now - self._filled_at) * self._rate)
            self._filled_at = now
            if self._room < 1:
                self.refused += 1
                wait = math.ceil((1 - self._room) / self._rate)
                return 429, b"Retry-After: %d\r\n" % max(1, wait), b'{"error":"slow_down"}'
            self._room -= 1
        client = _CLIENT.search(body)
        found = self._bodies.get(client[1]) if client else None
        return (200, b"", found) if found else (401, b"", b'{"error":"invalid_client"}')

    def counts(self) -> bytes:
        return json.dumps({"seconds": self.requests, "refused": self.refused}).encode()


class Connection(asyncio.Protocol):
    """HTTP/1.1 as httpx speaks it: requests with a length, connections that stay open."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._read = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._read += data
        while (end := self._read.find(b"\r\n\r\n")) >= 0:
            head = self._read[:end]
            found = _LENGTH.search(head)
            whole = end + 4 + (int(found[1]) if found else 0)
            if len(self._read) < whole:
                return
            body, self._read = self._read[end + 4 : whole], self._read[whole:]
            status, more, answer = self._route(head.split(b" ", 2)[1], body)
            self._transport.write(  # type: ignore[attr-defined]
                b"HTTP/1.1 %d .\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n%b"
                % (status, more, len(answer), answer)
            )

    def _route(self, target: bytes, body: bytes) -> tuple[int, bytes, bytes]:
        match target:
            case b"/oauth2/token":
                return self._tokens.answer(body)
            case b"/.well-known/jwks":
                return 200, b"", self._tokens.keys
            case b"/counts":
                return 200, b"", self._tokens.counts()
            case b"/load":
                self._tokens.load(body.decode())
                return 200, b"", b"{}"
        return 404, b"", b"{}"


@dataclass(frozen=True, slots=True)
class RunningIssuer:
    """The process, as the bench sees it."""

    url: str
    pid: int
    folder: Path

    def issue(self, applications: Sequence[Application], *, audience: str) -> list[str]:
        """Sign a token for each application, in as many processes as there are cores, and serve them."""
        key = SigningKey()
        pem = key.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        parts = [applications[start : start + PART] for start in range(0, len(applications), PART)]
        with ProcessPoolExecutor(initializer=_take_key, initargs=(pem, key.kid)) as pool:
            signed = pool.map(_sign, parts, [self.url] * len(parts), [audience] * len(parts))
            texts = [text for part in signed for text in part]
        (self.folder / "keys.json").write_text(json.dumps({"keys": [key.as_jwk()]}))
        with (self.folder / "tokens").open("w") as file:
            for app, text in zip(applications, texts, strict=True):
                file.write(f"{app.client_id}\t{text}\n")
        self._call("/load", str(self.folder))
        (self.folder / "tokens").unlink()
        return texts

    def counts(self) -> tuple[dict[int, int], int]:
        """The token requests by second of Unix time, and how many of them were refused."""
        found = self._call("/counts")
        return {int(second): count for second, count in found["seconds"].items()}, found["refused"]

    def _call(self, path: str, body: str | None = None) -> Any:
        data = None if body is None else body.encode()
        with urllib.request.urlopen(self.url + path, data=data, timeout=60) as reply:  # noqa: S310
            return json.loads(reply.read())


_key: list[Any] = []


def _take_key(pem: bytes, kid: str) -> None:
    _key[:] = [load_pem_private_key(pem, None), kid]


def _sign(applications: Sequence[Application], url: str, audience: str) -> list[str]:
    private, kid = _key
    now = int(time.time())
    return [
        jwt.encode(
            {
                "aud": [audience],
                "azp": app.client_id,
                "exp": now + LIFETIME,
                "gty": ["client_credentials"],
                "iat": now,
                "iss": url,
                "jti": os.urandom(16).hex(),
                "scope": " ".join(app.scopes),
                "scp": list(app.scopes),
                "v": "2",
                **app.as_claims(),
            },
            private,
            algorithm="RS256",
            headers={"kid": kid, "typ": "JWT"},
        )
        for app in applications
    ]


@contextlib.contextmanager
def issuer(folder: Path, *, rate: float) -> Iterator[RunningIssuer]:
    """Start the process; `folder` is where it finds what it serves."""
    command = [sys.executable, "-m", "bench.issuer", "--rate", str(rate)]
    folder.mkdir()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield RunningIssuer(next(iter(process.stdout or ())).strip(), process.pid, folder)
        finally:
            process.terminate()


async def serve(rate: float) -> None:
    loop, stop, tokens = asyncio.get_running_loop(), asyncio.Event(), Tokens(rate)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = await loop.create_server(lambda: Connection(tokens), "127.0.0.1", 0, backlog=512)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await stop.wait()
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rate", type=float, default=0.0, help="token requests a second; 0: no limit")
    asyncio.run(serve(parser.parse_args().rate))


if __name__ == "__main__":
    main()
