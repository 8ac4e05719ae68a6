"""The key set of an issuer on a real port, and tokens that its keys sign."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.fakes.issuer import AUDIENCE, jwk, make_token


class KeyServer(ThreadingHTTPServer):
    """A key set that takes `seconds`; `fetches` counts."""

    daemon_threads = True
    audience = AUDIENCE

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.fetches = 0
        self.seconds = 0.0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def token(self, **changes: Any) -> str:
        now = int(time.time())
        claims = {"iss": self.url, "aud": AUDIENCE, "azp": "client-a", "org_code": "org_a", "iat": now}
        return make_token({**claims, "exp": now + 600, "scope": "read:kb", **changes})


class _Answer(BaseHTTPRequestHandler):
    server: KeyServer

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.fetches += 1
        time.sleep(self.server.seconds)
        body = json.dumps({"keys": [jwk("k1")]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *ignored: object) -> None:
        pass


@contextmanager
def key_server() -> Iterator[KeyServer]:
    with KeyServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
