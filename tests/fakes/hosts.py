"""The hosts of an installation: real processes, each with its own folder, token and configuration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.fakes import forked
from tests.fakes.site import Site


class Hosts:
    """Starts hosts that ask the workers at these ports, over TLS with `ca_file`."""

    def __init__(self, site: Site, *ports: int, ca_file: Path | None = None) -> None:
        self.site = site
        self.ports = ports
        self.ca_file = ca_file
        self._processes: list[subprocess.Popen[bytes]] = []

    def prepare(
        self,
        name: str = "h1",
        pool: str = "default",
        execution: str = "",
        *,
        ports: Sequence[int] = (),
        extra: str = "",
    ) -> Path:
        """The folder of a host of its own name; prepared again, it has the same token."""
        folder = self.folder(name)
        token = folder / "token"
        if not folder.exists():
            folder.mkdir()
            added = json.loads(self.site.cli("hosts", "add", name, "--pool", pool, "-o", "json").out)
            token.write_text(added["token"])
            token.chmod(0o600)
        scheme = "http" if self.ca_file is None else "https"
        control = [f"{scheme}://127.0.0.1:{port}" for port in ports or self.ports]
        (folder / "host.toml").write_text(
            f"""\
[host]
control = {json.dumps(control)}
token_file = "{token}"
ca_file = "{self.ca_file or ""}"
[execution]
sandbox = "auto"
write_paths = ["{self.site.out}"]
{execution}
{extra}
"""
        )
        return folder

    def command(self, name: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "worker", "--config", str(self.folder(name) / "host.toml"), *arguments]

    def launch(
        self,
        name: str,
        *arguments: str,
        environment: dict[str, str] | None = None,
        tree: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start one that is prepared. `tree` has another release."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("WORKER_")}
        release = [] if tree is None else [str(tree)]
        path = os.pathsep.join([*release, str(self.site.plugins), os.environ.get("PYTHONPATH", "")])
        with self.log(name).open("ab") as log:
            process = forked.start(
                self.command(name, "host", *arguments),
                cwd=self.folder(name),
                env=kept | {"PYTHONPATH": path} | (environment or {}),
                output=log,
                fork=tree is None,
            )
        self._processes.append(process)
        return process

    def start(
        self,
        name: str = "h1",
        pool: str = "default",
        execution: str = "",
        *,
        ports: Sequence[int] = (),
        environment: dict[str, str] | None = None,
        tree: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        self.prepare(name, pool, execution, ports=ports)
        return self.launch(name, environment=environment, tree=tree)

    def folder(self, name: str = "h1") -> Path:
        return self.site.folder / f"host-{name}"

    def log(self, name: str = "h1") -> Path:
        return self.folder(name) / "host.log"

    def events(self, event: str, name: str = "h1") -> list[dict[str, Any]]:
        lines = self.log(name).read_text(errors="replace").splitlines() if self.log(name).exists() else []
        rows = [json.loads(line) for line in lines if line.startswith("{")]
        return [row for row in rows if row.get("event") == event]

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()


@contextmanager
def opened_hosts(site: Site, *ports: int, ca_file: Path | None = None) -> Iterator[Hosts]:
    """Kill its hosts at the end."""
    hosts = Hosts(site, *ports, ca_file=ca_file)
    try:
        yield hosts
    finally:
        hosts.close()
