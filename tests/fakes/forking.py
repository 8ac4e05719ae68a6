"""Processes that fork around a guard: `python -m tests.fakes.forking SCENARIO ISSUER AUDIENCE TOKEN`.

Exit code 0 if every child verified the token within twenty seconds. As with gunicorn's --preload, the guard
is made before the fork.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from worker.errors import TokenRefused
from worker.guard import Guard, threads

CHILDREN = 4
SECONDS = 20


class OneLoop:
    """The control: one loop in a thread, made once, as one might write it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def check(self, guard: Guard, token: str) -> object:
        return asyncio.run_coroutine_threadsafe(guard.check(token), self.loop).result(2)


def in_children(check: Callable[[], object], number: int = CHILDREN) -> bool:
    """Whether all children succeed."""
    # Its thread would be waited for in the child, which does not have it.
    faulthandler.cancel_dump_traceback_later()
    children = []
    for _ in range(number):
        child = os.fork()
        if child == 0:
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            try:
                check()
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(1)
            os._exit(0)
        children.append(child)
    return not any([os.waitpid(child, 0)[1] for child in children])


def inside(guard: Guard, token: str) -> bool:
    """Forks at many points of the first checks of eight threads."""
    done = threading.Event()
    faults: list[BaseException] = []

    def work() -> None:
        while not done.is_set():
            try:
                guard.check_sync(token)
            except BaseException as error:
                faults.append(error)

    workers = [threading.Thread(target=work) for _ in range(8)]
    for thread in workers:
        thread.start()
    good = True
    for number in range(10):
        good = in_children(lambda: guard.check_sync(token), 1) and good
        time.sleep(0.003 * number)
    done.set()
    for thread in workers:
        thread.join()
    print(*map(repr, faults), file=sys.stderr)
    return good and not faults


def look_up(guard: Guard) -> None:
    """Needs the loop, whatever the guard knows."""
    with suppress(TokenRefused):
        guard._thread_keys.find("another")


def main(scenario: str, issuer: str, audience: str, token: str) -> bool:
    guard = Guard(issuer, audience=audience)
    match scenario:
        case "preload":
            return in_children(lambda: guard.check_sync(token))
        case "warm":
            guard.check_sync(token)
            return in_children(lambda: guard.check_sync(token)) and bool(guard.check_sync(token))
        case "inside":
            return inside(guard, token)
        case "generations":
            grandchild = partial(in_children, partial(look_up, guard), 1)
            return in_children(lambda: guard.check_sync(token) and (grandchild() or sys.exit(1)), 1)
        case "imports":
            threads._process.running_loop()
            before = set(sys.modules)
            guard.check_sync(token)
            print(*sorted(set(sys.modules) - before))
            return True
        case "naive":
            naive = OneLoop()
            naive.check(guard, token)
            return in_children(lambda: naive.check(guard, token), 1)
    raise SystemExit(f"unknown scenario {scenario}")


if __name__ == "__main__":
    sys.exit(0 if main(*sys.argv[1:]) else 1)
