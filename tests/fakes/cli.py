"""The command line called in this process: what it printed and its exit code, without a process each."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from tests.fakes.site import Completed
from worker.cli.app import invoke


class CommandLine:
    """An installation's folder with its worker.toml, and the commands given there."""

    def __init__(self, folder: Path, database_url: str) -> None:
        self.settings = folder / "worker.toml"
        self.settings.write_text(
            f'secrets_dir = "{folder}"\n[database]\nurl = "{database_url}"\n'
            '[issuers.main]\nurl = "https://acme.kinde.com"\naudience = "https://api.acme.com"\n'
        )

    def __call__(self, *arguments: str, stdin: str = "", check: bool = True) -> Completed:
        """Run one command; with `check` its failure fails the test, with what it printed."""
        out, err = io.StringIO(), io.StringIO()
        given = io.TextIOWrapper(io.BytesIO(stdin.encode()))
        with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "stdin", given):
            code = invoke(["--config", str(self.settings), *arguments])
        done = Completed(code, out.getvalue(), err.getvalue())
        if check and code:
            raise AssertionError(f"{arguments} ended with {done}")
        return done
