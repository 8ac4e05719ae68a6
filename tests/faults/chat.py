"""A chat server that counts: every request is a call that somebody pays, and gets an answer of its own."""

from __future__ import annotations

import json
import secrets
import threading
import time
import uuid
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

# Seconds that an answer takes.
DELAY = 0.02


@dataclass(frozen=True)
class Call:
    """One request: the attempt that made it, its idempotency key, and the id of the answer."""

    attempt: int
    key: str
    answer: str


class ChatServer:
    """Listens on loopback; `calls` has the calls of each run and number, in order."""

    def __init__(self) -> None:
        self.calls: dict[tuple[str, int], list[Call]] = defaultdict(list)
        calls = self.calls

        class Answers(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                text = self.rfile.read(int(self.headers["Content-Length"]))
                if not text:  # the process was killed within its request
                    return
                asked = json.loads(text)
                answer, key = str(uuid.uuid4()), self.headers["Idempotency-Key"]
                calls[asked["run"], asked["number"]].append(Call(asked["attempt"], key, answer))
                time.sleep(DELAY)
                said = {"run": asked["run"], "number": asked["number"], "tokens": secrets.randbelow(1000)}
                body = json.dumps({"id": answer, **said}).encode()
                with suppress(OSError):  # it was killed before its answer came
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            # The connections of many processes at once.
            request_queue_size = 1024

        self._server = Server(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self._server.server_port}/chat"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> ChatServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
