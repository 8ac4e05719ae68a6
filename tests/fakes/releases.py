"""The release before this tree's, from the git history, and a next one with one migration more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from alembic import command
from alembic.config import Config

from tests.fakes.site import Site
from worker.store import schema

ROOT = Path(__file__).parents[2]


def check_out_the_commit_before(migration: Path, folder: Path, repository: Path = ROOT) -> None:
    """Put into `folder` the tree of the commit before the one that added the migration.

    Raises:
        RuntimeError: the history is not there; says how to get it.
    """
    if git(repository, "rev-parse", "--is-shallow-repository").strip() == "true":
        raise RuntimeError(
            "this clone is shallow, and the release before the newest migration stands in the history: "
            "`git fetch --unshallow`, or clone with all of it"
        )
    name = str(migration.relative_to(repository))
    added = git(repository, "log", "--diff-filter=A", "--format=%H", "--", name).split()
    if not added:
        raise RuntimeError(f"no commit adds {name}: commit it, so that the one before it can be tried")
    folder.mkdir()
    archive = folder / "tree.tar"
    git(repository, "archive", "--output", str(archive), f"{added[-1]}^")
    with tarfile.open(archive) as tree:
        tree.extractall(folder, filter="data")


def make_the_next(folder: Path, *, upgrade: str, downgrade: str) -> Path:
    """A copy of this tree's worker with one migration more, written from the template; that migration."""
    for part in ("worker", "migrations"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    config = Config(ROOT / "alembic.ini")
    config.set_main_option("script_location", str(folder / "migrations"))
    number = f"{int(schema.head()) + 1:04}"
    command.revision(config, "Keep a note", rev_id=number)
    (made,) = (folder / "migrations").glob(f"versions/{number}_*.py")
    up, name, down = made.read_text().partition("def downgrade")
    up, down = up.replace("    pass", f"    {upgrade}"), down.replace("    pass", f"    {downgrade}")
    made.write_text(up + name + down)
    return made


def start(site: Site, tree: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """`python -m worker` of a tree in a site; what it says goes to the site's log."""
    environment = os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{site.plugins}"}
    with site.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "worker", "--config", str(site.settings), *arguments],
            cwd=tree,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def git(repository: Path, *arguments: str) -> str:
    """What a git command prints.

    Raises:
        RuntimeError: it failed, with what it said.
    """
    done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"git {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
