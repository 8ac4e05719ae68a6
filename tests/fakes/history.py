"""Files of earlier releases, from this repository's history."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def git(repository: Path, *arguments: str) -> str:
    """The output of a git command."""
    done = subprocess.run(["git", "-C", repository, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"git {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def commit_before(name: str, repository: Path = ROOT, *, removes: bool = False) -> str:
    """The commit before the one that added a file, or that removed it.

    Raises:
        RuntimeError: the history is missing; the message says how to get it.
    """
    if git(repository, "rev-parse", "--is-shallow-repository").strip() == "true":
        raise RuntimeError(
            "this clone is shallow, and the test needs an earlier release: "
            "`git fetch --unshallow`, or clone with all of it"
        )
    what, verb = ("D", "removes") if removes else ("A", "adds")
    found = git(repository, "log", f"--diff-filter={what}", "--format=%H", "--", name).split()
    if not found:
        raise RuntimeError(f"no commit {verb} {name}: commit it to test the release before it")
    return f"{found[0 if removes else -1]}^"


def files_before(gone: str, *names: str) -> dict[str, str]:
    """Texts of files, or of all in a folder, before the commit that removed the file `gone`."""
    commit = commit_before(gone, removes=True)
    listed = git(ROOT, "ls-tree", "-r", "--name-only", commit, "--", *names).split()
    return {name: git(ROOT, "show", f"{commit}:{name}") for name in listed}
