"""The command line called in this process, which is fast enough for hundreds of calls."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from worker.app.shell import invoke


@dataclass(frozen=True)
class Completed:
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)

    def checked(self, command: object) -> Completed:
        """Return self, or fail with the output if the command failed."""
        if self.code:
            raise AssertionError(f"{command} exited with {self.code}:\n{self.out}{self.err}")
        return self


def run_command(*arguments: str, stdin: str = "") -> Completed:
    """Run one command in this process."""
    out, err = io.StringIO(), io.StringIO()
    given = io.TextIOWrapper(io.BytesIO(stdin.encode()))
    with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "stdin", given):
        code = invoke(arguments)
    return Completed(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def as_process(folder: Path, environment: Mapping[str, str]) -> Any:
    """Give this process the working directory, environment and PYTHONPATH of another one."""
    path = [*environment.get("PYTHONPATH", "").split(os.pathsep), *sys.path]
    with (
        contextlib.chdir(folder),
        patch.dict(os.environ, environment, clear=True),
        patch.object(sys, "path", path),
    ):
        yield


class CommandLine:
    """Writes a worker.toml into a folder, and runs commands with it."""

    def __init__(self, folder: Path, database_url: str) -> None:
        self.settings = folder / "worker.toml"
        self.settings.write_text(
            f'secrets_dir = "{folder}"\n[database]\nurl = "{database_url}"\n'
            '[issuers.main]\nurl = "https://acme.kinde.com"\naudience = "https://api.acme.com"\n'
        )

    def __call__(self, *arguments: str, stdin: str = "", check: bool = True) -> Completed:
        """Run one command; with `check` its failure fails the test and shows the output."""
        done = run_command("--config", str(self.settings), *arguments, stdin=stdin)
        return done.checked(arguments) if check else done
