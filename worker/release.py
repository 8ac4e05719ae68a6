"""The release: the version of this installation, and the commit that it was built from."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path

# A build writes the commit here; a checkout does not have the file.
BUILT_FROM = Path(__file__).with_name("commit")
UNKNOWN = "unknown"


def version() -> str:
    """The version of the installed distribution."""
    return metadata.version("orgworker")


def commit() -> str:
    """The full hash of the commit, with `+changes` if files differ from it; `unknown` without a repository.

    In a checkout it starts git.
    """
    if BUILT_FROM.exists():
        return BUILT_FROM.read_text(encoding="ascii").strip()
    checkout = BUILT_FROM.parents[1]
    # A repository further up, such as one around a virtual environment, does not contain this code.
    if not (checkout / ".git").exists():
        return UNKNOWN
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", checkout, *command], check=True, capture_output=True, text=True, timeout=30
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
    return f"{head}+changes" if changes else head
