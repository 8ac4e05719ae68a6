"""The page about the attempt API names each call and limit as the code has it."""

from __future__ import annotations

import re
from pathlib import Path

from worker.features.hosts.attempt_api import CALLS

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "attempts.md").read_text()


def test_the_page_lists_every_call() -> None:
    listed = set(re.findall(r"^\| `([a-z_]+)` \|", PAGE, re.MULTILINE))

    assert listed - {"Authorization"} == {"register", "take", *CALLS}
