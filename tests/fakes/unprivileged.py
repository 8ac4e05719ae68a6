"""Code in a process without root's rights, as a worker's account has none."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.fakes.postgres import unprivileged_user


@contextmanager
def folder_of_the_account() -> Iterator[Path]:
    """A folder that belongs to the account; not in tmp_path, which is closed to others if this is root."""
    folder = Path(tempfile.mkdtemp(prefix="orgworker-account-"))
    hand_over(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def hand_over(*paths: Path) -> None:
    user = unprivileged_user()
    for path in paths if user is not None else ():
        os.chown(path, *user)


def in_account(call: Callable[[], Any]) -> Any:
    """Call this in a process of the account; returns its result, by way of JSON."""
    user = unprivileged_user()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if user is not None:
                os.setgroups([])
                os.setgid(user[1])
                os.setuid(user[0])
            os.write(writer, json.dumps(call()).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        text = said.read()
    os.waitpid(pid, 0)
    assert text, "the call failed: see the trace above"
    return json.loads(text)
