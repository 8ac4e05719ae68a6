"""The newcomer's path, from an empty folder to the explanation of a first failure."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import forked
from tests.fakes.environments import make_environment
from tests.fakes.site import AUDIENCE, Completed, application, definition, wait_until
from worker.demo.provider import Provider

# Whoever opens a connection under this, or asks for an address, gets an error.
NO_NETWORK = """\
import sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        raise RuntimeError(f"{event} in a test that needs no network")

sys.addaudithook(refuse)
"""


class Newcomer:
    """An empty folder, and an environment in which orgworker is installed and nothing else of theirs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "home"
        self.folder.mkdir()
        self._bin = make_environment(folder / "venv")
        bins = str(self._bin)
        if forked.is_possible():
            bins = f"{forked.commands(folder / 'bin', str(self._bin / 'python'))}:{bins}"
        self._environment = {"PATH": f"{bins}:/usr/bin:/bin", "HOME": str(folder)}
        self._worker: subprocess.Popen[bytes] | None = None

    def __call__(self, *command: str, stdin: str = "", code: int = 0, **environment: str) -> Completed:
        """Run one command in the folder; it must end with `code`."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self._environment | environment,
            input=stdin,
            text=True,
            capture_output=True,
            timeout=90,
        )
        assert done.returncode == code, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return Completed(done.returncode, done.stdout, done.stderr)

    def worker(self, *arguments: str, stdin: str = "", code: int = 0) -> Completed:
        return self("python", "-m", "worker", *arguments, stdin=stdin, code=code)

    def start(self) -> None:
        """Start `python -m worker`; its log is in the folder."""
        with (self.folder / "worker.log").open("wb") as log:
            command = ["python", "-m", "worker"]
            self._worker = subprocess.Popen(
                [str(self._bin / command[0]), *command[1:]],
                cwd=self.folder,
                env=self._environment,
                stdout=log,
                stderr=log,
            )

    def run_now(self, org: str, name: str) -> dict[str, object]:
        """Let a definition run now; its run as it ended."""
        run = self.worker("definitions", "run", org, name, "-o", "id").out.strip()
        return self.ended(run)

    def ended(self, run: str) -> dict[str, object]:
        with contextlib.closing(sqlite3.connect(self.folder / "worker.db", timeout=10)) as connection:
            finished = "SELECT finished_at FROM runs WHERE id = ?"
            wait_until(
                lambda: connection.execute(finished, [run]).fetchone()[0],
                f"the end of run {run}; the log is {self.folder}/worker.log",
                timeout=60,
            )
        row: dict[str, object] = self.worker("runs", "show", run, "-o", "json").json()
        return row

    def close(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()


@pytest.fixture
def newcomer(tmp_path: Path) -> Iterator[Newcomer]:
    made = Newcomer(tmp_path)
    yield made
    made.close()


@pytest.mark.timeout(180)
def test_from_an_empty_folder_to_a_failed_run_that_is_explained_and_mended(
    newcomer: Newcomer, provider: Provider, tmp_path: Path
):
    # A handler, and its test without a network, right after its installation.
    newcomer.worker("new-job", "acme.digest")
    newcomer("pip", "install", "--quiet", "-e", "./acme-digest[test]")
    offline = tmp_path / "offline"
    offline.mkdir()
    (offline / "sitecustomize.py").write_text(NO_NETWORK)
    online = "import socket; socket.create_connection(('127.0.0.1', 9))"
    assert "needs no network" in newcomer("python", "-c", online, code=1, PYTHONPATH=str(offline)).err
    tested = newcomer("python", "-m", "pytest", "-q", "acme-digest", PYTHONPATH=str(offline))
    assert "2 passed" in tested.out

    # Tried by hand: first without what it needs, then with a property of the org's token.
    lacking = newcomer.worker("try", "acme.digest", code=1)
    assert "fix: --param NAME=VALUE; the handler takes items (needed)" in lacking.err
    wish = ["--param", 'items=["Ada"]', "--property", "greeting=Hallo"]
    tried = newcomer.worker("try", "acme.digest", "--org", "org_acme", *wish, "-o", "json")
    assert tried.json()["result"] == {"org": "org_acme", "items": 1}
    assert tried.json()["settings"] == [{"name": "greeting", "from": "property", "value": "Hallo"}]
    assert "Hallo, Ada" in tried.err
    assert sorted(file.name for file in newcomer.folder.iterdir()) == ["acme-digest"]

    # A worker, an org, a definition, a run.
    provider.add(application("org_acme", properties={"greeting": "Hallo"}))
    (newcomer.folder / "worker.toml").write_text(
        f'[database]\nurl = "sqlite:///worker.db"\n[web]\nlisten = ""\n[issuers.main]\nprofile = "kinde"\n'
        f'url = "{provider.url}"\naudience = "{AUDIENCE}"\n'
    )
    org = {"code": "org_acme", "issuer": "main", "client_id": "m2m-org_acme"}
    newcomer.worker("db", "upgrade")
    newcomer.worker(
        "orgs", "import", "-", stdin=json.dumps({**org, "client_secret": "secret-of-org_acme"}) + "\n"
    )
    (newcomer.folder / "definitions.toml").write_text(
        definition("org_acme", "digest", "acme.digest", params={"items": ["Ada", "Alan"]}, max_attempts=1)
    )
    assert "digest" in newcomer.worker("apply", "definitions.toml").out
    newcomer.start()
    ran = newcomer.run_now("org_acme", "digest")
    assert (ran["state"], ran["result"]) == ("succeeded", {"org": "org_acme", "items": 2})
    assert "Hallo, Alan" in newcomer.worker("runs", "logs", str(ran["id"])).out

    # Somebody breaks the handler: the next run takes its code as it is then.
    module = newcomer.folder / "acme-digest" / "acme_digest.py"
    right = module.read_text()
    module.write_text(right.replace("        done += 1\n", "        done += len(ctx.params.itmes)\n"))
    failed = newcomer.run_now("org_acme", "digest")
    assert (failed["state"], failed["reason"]) == ("failed", "error")
    why = " ".join(newcomer.worker("runs", "why", str(failed["id"])).out.split())
    assert "AttributeError" in why
    assert "itmes" in why
    assert f"runs retry {failed['id']}" in why

    # Mended and retried.
    module.write_text(right)
    retried = newcomer.worker("runs", "retry", str(failed["id"]), "-o", "id").out.strip()
    assert newcomer.ended(retried)["state"] == "succeeded"
