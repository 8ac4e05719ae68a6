"""During a rolling deploy, workers of the previous release run on the schema of the new one.

Tested twice: this tree's worker on the schema of a made-up next release, and the worker of the commit
before the newest migration on this tree's schema (from the second migration on).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config

from tests.fakes import forked
from tests.fakes.handlers import install_handlers
from tests.fakes.history import commit_before, git
from tests.fakes.site import Site, application, definition, opened
from worker.demo.provider import serve_provider
from worker.store import schema

pytestmark = pytest.mark.feature("checkout")
ROOT = Path(__file__).parents[2]
NEWEST = max(schema.folder().glob("versions/[0-9]*_*.py"))
ADD = 'op.add_column("runs", sa.Column("note", sa.Text(), nullable=True))'
DROP = 'op.drop_column("runs", "note")'


def test_this_worker_runs_on_the_schema_of_a_next_release_that_expands_it(tmp_path: Path, migrated_url: str):
    after = tmp_path / "after"
    migration = make_the_next(after, upgrade=ADD, downgrade=DROP)

    assert_the_older_runs(tmp_path, migrated_url, older=ROOT, newer=after)

    assert "Expand first" in migration.read_text()
    assert f"works_with = '{schema.head()}'" in migration.read_text()


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of the commit before the newest migration."""
    folder = tmp_path_factory.mktemp("release") / "before"
    check_out_the_commit_before(NEWEST, folder)
    return folder


@pytest.mark.skipif(schema.head() == "0001", reason="there is no migration before this one")
def test_the_worker_of_the_commit_before_the_newest_migration_runs_on_its_schema(
    tmp_path: Path, migrated_url: str, before: Path
):
    assert_the_older_runs(tmp_path, migrated_url, older=before, newer=ROOT)


def assert_the_older_runs(folder: Path, database_url: str, *, older: Path, newer: Path) -> None:
    """The older tree's worker, started on the newer one's schema, carries a run to its end and drains."""
    provider, thread = serve_provider()
    with thread, opened(Site(folder, database_url, provider)) as site:
        site.configure()
        install_handlers(site.plugins)
        site.migrate()
        assert start(site, newer, "db", "upgrade").wait(timeout=60) == 0, site.log_text()
        site.add_orgs(application("org_acme"))
        params = {"journal": str(site.out / "journal")}
        site.apply(definition("org_acme", "tick", "acme.note", "every 1s", params=params))
        worker = start(site, older, "run")
        try:
            site.wait_for_end(definition="tick", timeout=60)
            ended = [(run["state"], run["reason"], run["error"]) for run in site.runs()]
            assert {state for state, *_ in ended} <= {"waiting", "running", "succeeded"}, ended
        finally:
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(timeout=60) == 0, site.log_text()


def test_the_older_tree_is_that_of_the_commit_before_the_migration(tmp_path: Path):
    repository = tmp_path / "repository"
    migration = repository / "versions" / "0002_more.py"
    commit(repository, "0001_first.py")
    commit(repository, "0002_more.py")
    commit(repository, "0003_other.py")

    check_out_the_commit_before(migration, tmp_path / "before", repository)

    assert [path.name for path in (tmp_path / "before" / "versions").iterdir()] == ["0001_first.py"]


def test_a_clone_without_its_history_fails_and_says_how_to_get_it(tmp_path: Path):
    repository, shallow = tmp_path / "repository", tmp_path / "shallow"
    for name in ("0001_first.py", "0002_more.py"):
        commit(repository, name)
    git(tmp_path, "clone", "--quiet", "--depth", "1", f"file://{repository}", str(shallow))

    with pytest.raises(RuntimeError, match="git fetch --unshallow"):
        check_out_the_commit_before(shallow / "versions" / "0002_more.py", tmp_path / "before", shallow)
    with pytest.raises(RuntimeError, match="no commit adds versions/0003_new.py"):
        check_out_the_commit_before(repository / "versions" / "0003_new.py", tmp_path / "before", repository)


def commit(repository: Path, name: str) -> None:
    """One commit that adds a migration; the first makes the repository."""
    (repository / "versions").mkdir(parents=True, exist_ok=True)
    git(repository, "init", "--quiet")
    (repository / "versions" / name).write_text("")
    git(repository, "add", "--all")
    named = ("-c", "user.name=tester", "-c", "user.email=tester@example.com")
    git(repository, *named, "commit", "--quiet", "--message", f"Add {name}")


def check_out_the_commit_before(migration: Path, folder: Path, repository: Path = ROOT) -> None:
    """Put the tree of the commit before the one that added the migration into `folder`.

    Raises:
        RuntimeError: the history is missing; the message says how to get it.
    """
    commit = commit_before(str(migration.relative_to(repository)), repository)
    folder.mkdir()
    archive = folder / "tree.tar"
    git(repository, "archive", "--output", str(archive), commit)
    with tarfile.open(archive) as tree:
        tree.extractall(folder, filter="data")


def make_the_next(folder: Path, *, upgrade: str, downgrade: str) -> Path:
    """Copy this tree's worker and add a migration made from the template; returns that migration."""
    for part in ("worker", "migrations"):
        shutil.copytree(ROOT / part, folder / part)
    config = Config(ROOT / "alembic.ini")
    config.set_main_option("script_location", str(folder / "migrations"))
    number = f"{int(schema.head()) + 1:04}"
    command.revision(config, "Keep a note", rev_id=number)
    (made,) = (folder / "migrations").glob(f"versions/{number}_*.py")
    up, name, down = made.read_text().partition("def downgrade")
    up, down = up.replace("    pass", f"    {upgrade}"), down.replace("    pass", f"    {downgrade}")
    made.write_text(up + name + down)
    return made


def start(site: Site, tree: Path, *arguments: str) -> forked.Process | subprocess.Popen[bytes]:
    """Start `python -m worker` of a tree in a site; its output goes to the site's log."""
    if tree == ROOT:
        with site.log.open("ab") as log:
            return forked.start(
                site.command(*arguments), cwd=tree, env=site.process_environment(), output=log
            )
    environment = site.process_environment()
    environment["PYTHONPATH"] = f"{tree}{os.pathsep}{environment['PYTHONPATH']}"
    with site.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "worker", "--config", str(site.settings), *arguments],
            cwd=tree,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
