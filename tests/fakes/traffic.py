"""A service that writes down what reaches it, and when its connections end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# Seconds between two parts of an answer that does not end.
TRICKLE = 0.005


@dataclass(frozen=True)
class Seen:
    """One request; `at` in seconds of the monotonic clock, which all processes of a machine share."""

    at: float
    path: str
    headers: dict[str, str]
    body: bytes


class Traffic(ThreadingHTTPServer):
    """Answers with the headers and the body that it got, or what `answer` makes of a request.

    Below `/stream` an answer never ends; `streams` has when each of them was closed, by its path.
    """

    daemon_threads = True
    request_queue_size = 200

    def __init__(self, answer: Callable[[Seen], tuple[int, dict[str, str], bytes]] | None = None) -> None:
        self.seen: list[Seen] = []
        self.open_streams: set[str] = set()
        self.streams: dict[str, float] = {}
        self.answer = answer or _echo
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def paths(self) -> list[str]:
        return [each.path for each in self.seen]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: brokers that are killed reset their connections."""


def _echo(seen: Seen) -> tuple[int, dict[str, str], bytes]:
    body = json.dumps({"headers": seen.headers, "body": seen.body.decode("utf-8", "replace")}).encode()
    return 200, {"Content-Type": "application/json"}, body


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Traffic

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(time.monotonic(), self.path, headers, body)
        self.server.seen.append(seen)
        if self.path.startswith("/stream"):
            self._stream()
            return
        status, more, content = self.server.answer(seen)
        self.send_response(status)
        for name, value in more.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PUT = do_GET

    def _stream(self) -> None:
        self.close_connection = True
        self.send_response(200)
        self.end_headers()
        self.server.open_streams.add(self.path)
        with suppress(OSError):
            while True:
                self.wfile.write(b"tick\n")
                time.sleep(TRICKLE)
        self.server.streams[self.path] = time.monotonic()
        self.server.open_streams.discard(self.path)

    def log_message(self, *args: Any) -> None:
        """Nothing: the test looks at what arrived."""


@contextmanager
def traffic(answer: Callable[[Seen], tuple[int, dict[str, str], bytes]] | None = None) -> Iterator[Traffic]:
    with Traffic(answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
