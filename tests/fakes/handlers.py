"""Installs the handlers of the acceptance tests as a distribution, and reads what they wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.fakes.plugins import make_plugin

SOURCE = Path(__file__).with_name("acceptance_jobs.py")


def install_handlers(folder: Path) -> None:
    """Put the distribution `acme-jobs` with all handlers into a folder of PYTHONPATH.

    The handler `acme.NAME` is the function NAME.
    """
    source = SOURCE.read_text()
    names = re.findall(r'^@job\("acme\.(\w+)"', source, re.MULTILINE)
    targets = {f"acme.{name}": f"acme_jobs:{name}" for name in names}
    make_plugin(folder, modules={"acme_jobs": source}, entry_points=targets)


def read_journal(path: Path, who: str | None = None) -> list[dict[str, Any]]:
    """The lines that handlers wrote, in order; an incomplete last line is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    entries = [json.loads(line) for line in lines if line]
    return [entry for entry in entries if who is None or entry["who"] == who]
