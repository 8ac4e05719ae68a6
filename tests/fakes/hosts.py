"""Hosts for acceptance tests: each a real process with a folder of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.fakes.site import Site


class Hosts:
    """The hosts of a site, each a process with a folder of its own."""

    def __init__(self, site: Site, port: int) -> None:
        self.site = site
        self.port = port
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, name: str = "h1", pool: str = "default", execution: str = "") -> subprocess.Popen[bytes]:
        added = json.loads(self.site.cli("hosts", "add", name, "--pool", pool, "-o", "json").out)
        folder = self.site.folder / name
        folder.mkdir()
        token = folder / "token"
        token.write_text(added["token"])
        token.chmod(0o600)
        config = folder / "host.toml"
        config.write_text(
            f"""\
[host]
control = ["http://127.0.0.1:{self.port}"]
token_file = "{token}"
[execution]
sandbox = "auto"
write_paths = ["{self.site.out}"]
{execution}
"""
        )
        environment = {**self.site.process_environment()}
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "worker", "--config", str(config), "host"],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=log,
            )
        self._processes.append(process)
        return process

    def log(self, name: str = "h1") -> Path:
        return self.site.folder / name / "host.log"

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
