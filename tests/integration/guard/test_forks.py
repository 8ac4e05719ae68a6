"""A guard in processes that fork, as gunicorn and uWSGI do, against a server that counts fetches of keys."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.fakes.key_server import KeyServer
from tests.integration.guard.conftest import ROOT


def run(keys: KeyServer, scenario: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fakes.forking", scenario, keys.url, keys.audience, keys.token()]
    # httpx then asks certifi for its certificates, as on most machines.
    env = {name: value for name, value in os.environ.items() if not name.startswith("SSL_CERT_")}
    return subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=50)


def test_a_guard_made_before_the_fork_works_in_every_child(keys: KeyServer) -> None:
    """gunicorn --preload: each child fetches once."""
    done = run(keys, "preload")

    assert done.returncode == 0, done.stderr
    assert keys.fetches == 4


def test_children_know_the_keys_of_their_parent(keys: KeyServer) -> None:
    done = run(keys, "warm")

    assert done.returncode == 0, done.stderr
    assert keys.fetches == 1


def test_a_fork_while_threads_are_inside_harms_neither_side(keys: KeyServer) -> None:
    """At the start of the loop, during imports, during the fetch, and after it."""
    keys.seconds = 0.1

    done = run(keys, "inside")

    assert done.returncode == 0, done.stderr
    assert 1 <= keys.fetches <= 11


def test_a_child_of_a_child_has_a_loop_of_its_own(keys: KeyServer) -> None:
    done = run(keys, "generations")

    assert done.returncode == 0, done.stderr
    assert keys.fetches == 2


def test_a_fetch_imports_nothing(keys: KeyServer) -> None:
    """A fork during an import leaves the child with an import that never ends."""
    done = run(keys, "imports")

    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_the_control_hangs_in_a_child(keys: KeyServer) -> None:
    """One shared loop, made before the fork: the test sees what it is for."""
    done = run(keys, "naive")

    assert done.returncode == 1, done.stderr
