"""A client in processes that fork, as gunicorn and uWSGI do, and in threads, against a server over TCP."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from tests.integration.client.test_distribution import api as api
from worker.client import Client


def in_children(work: Callable[[], object], count: int) -> list[int]:
    """The exit codes of so many forks, each 0 if its work was done."""
    codes = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work()
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        codes.append(os.waitstatus_to_exitcode(status))
    return codes


def test_a_client_made_and_used_before_the_fork_works_on_both_sides(api: str):
    """A child opens connections of its own; those of its parent stay usable."""
    client = Client(api, "t", retry_for=0)

    def start() -> None:
        assert client.start("org_a", "export", key="k").run.id == "r"

    start()
    parents = client._http()

    def inside() -> None:
        start()
        assert client._http() is not parents
        client.close()

    assert in_children(inside, 10) == [0] * 10
    start()
    assert client._http() is parents
    client.close()


def test_forks_while_threads_are_sending(api: str):
    """Whatever the threads hold at the fork, no child waits for it."""
    client, stop, failures = Client(api, "t", retry_for=0), threading.Event(), []

    def send() -> None:
        while not stop.is_set():
            try:
                client.start("org_a", "export", key="k")
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    codes = in_children(lambda: client.start("org_a", "export", key="k"), 20)
    stop.set()
    for thread in threads:
        thread.join()
    client.close()

    assert (codes, failures) == ([0] * 20, [])
