"""A guard in processes that fork, as gunicorn and uWSGI do, against a server that counts fetches of keys."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.fakes.issuer import AUDIENCE, jwk, make_token

ROOT = Path(__file__).parents[3]


class Keys(ThreadingHTTPServer):
    """A key set that takes `seconds`; `fetches` counts."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.fetches = 0
        self.seconds = 0.0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def token(self) -> str:
        now = int(time.time())
        claims = {"iss": self.url, "aud": AUDIENCE, "azp": "client-a", "org_code": "org_a"}
        return make_token({**claims, "iat": now, "exp": now + 600})

    def run(self, scenario: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.fakes.forking", scenario, self.url, AUDIENCE, self.token]
        return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=50)


class Answer(BaseHTTPRequestHandler):
    server: Keys

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.fetches += 1
        time.sleep(self.server.seconds)
        body = json.dumps({"keys": [jwk("k1"), jwk("k2")]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *ignored: object) -> None:
        pass


@pytest.fixture
def keys() -> Iterator[Keys]:
    with Keys() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_guard_made_before_the_fork_works_in_every_child(keys: Keys) -> None:
    """gunicorn --preload: each child fetches once."""
    done = keys.run("preload")

    assert done.returncode == 0, done.stderr
    assert keys.fetches == 4


def test_children_know_the_keys_of_their_parent(keys: Keys) -> None:
    done = keys.run("warm")

    assert done.returncode == 0, done.stderr
    assert keys.fetches == 1


def test_a_fork_while_threads_are_inside_harms_neither_side(keys: Keys) -> None:
    """At the start of the loop, during imports, during the fetch, and after it."""
    keys.seconds = 0.1

    done = keys.run("inside")

    assert done.returncode == 0, done.stderr
    assert 1 <= keys.fetches <= 11


def test_a_child_of_a_child_has_a_loop_of_its_own(keys: Keys) -> None:
    done = keys.run("generations")

    assert done.returncode == 0, done.stderr
    assert keys.fetches == 2


def test_a_fetch_imports_nothing(keys: Keys) -> None:
    """A fork during an import leaves the child with an import that never ends."""
    done = keys.run("imports")

    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_the_control_hangs_in_a_child(keys: Keys) -> None:
    """One shared loop, made before the fork: the test sees what it is for."""
    done = keys.run("naive")

    assert done.returncode == 1, done.stderr
