"""The page about the attempt API names each call and limit as the code has it."""

from __future__ import annotations

import re
from pathlib import Path

from worker.execution.hosts import wire
from worker.execution.hosts.attempt_api import CALLS
from worker.handlers.calls import MAX_BYTES

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "attempts.md").read_text()


def test_the_page_lists_every_call() -> None:
    listed = set(re.findall(r"^\| `([a-z_]+)` \|", PAGE, re.MULTILINE))

    assert listed - {"Authorization"} == {"register", "take", *CALLS}


def test_the_page_has_the_limits_and_the_version() -> None:
    assert f"| `finish`, `store` | {MAX_BYTES // 2**20} MiB |" in PAGE
    assert f"| all others | {wire.OWN_BYTES // 2**10} KiB |" in PAGE
    assert re.search(rf"at\s+most {wire.MAX_ROWS} rows", PAGE)
    assert f"at most {wire.LONGEST_WAIT:g}" in PAGE
    assert f"POST {wire.PREFIX}/CALL" in PAGE
    assert all(f"Version `{version}`" in PAGE for version in wire.VERSIONS)
