"""While a release is rolled out, workers of the one before it run on the schema of the new one.

Active from the second migration on: the first has no release before it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.fakes.handlers import install_handlers
from tests.fakes.site import Site, application, definition, opened, wait_until
from worker.demo.provider import serve_provider
from worker.store import schema

ROOT = Path(__file__).parents[2]
NEWEST = max(schema.folder().glob("versions/[0-9]*_*.py"))


@pytest.mark.skipif(schema.head() == "0001", reason="there is no migration before this one")
def test_the_worker_of_the_commit_before_the_newest_migration_runs_on_its_schema(
    tmp_path: Path, database_url: str
):
    before = tmp_path / "before"
    check_out_the_commit_before(NEWEST, before)
    provider, thread = serve_provider()
    with thread, opened(Site(tmp_path, database_url, provider)) as site:
        site.configure()
        install_handlers(site.plugins)
        site.migrate()
        site.add_orgs(application("org_acme"))
        params = {"journal": str(tmp_path / "journal")}
        site.apply(definition("org_acme", "tick", "acme.note", "every 1s", params=params))

        old = start_old_worker(site, before)
        try:
            wait_until(
                lambda: [run for run in site.runs() if run["state"] == "succeeded"],
                "a run by the worker of the release before",
                timeout=60,
            )
            assert not [run for run in site.runs() if run["state"] == "failed"]
        finally:
            old.send_signal(signal.SIGTERM)
            assert old.wait(timeout=60) == 0


def check_out_the_commit_before(migration: Path, folder: Path) -> None:
    """The tree of the commit before the one that added the migration."""
    added = git("log", "--diff-filter=A", "--format=%H", "--", str(migration.relative_to(ROOT))).split()[-1]
    folder.mkdir()
    archive = folder / "tree.tar"
    git("archive", "--output", str(archive), f"{added}^")
    with tarfile.open(archive) as tree:
        tree.extractall(folder, filter="data")


def start_old_worker(site: Site, code: Path) -> subprocess.Popen[bytes]:
    """A worker of that tree, on the database of the new one."""
    environment = os.environ | {"PYTHONPATH": f"{code}:{site.plugins}"}
    with site.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "worker", "--config", str(site.settings), "run"],
            cwd=code,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout
