"""Installs the handlers of the acceptance tests as a distribution, and reads what they wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.fakes.plugins import make_plugin

SOURCE = Path(__file__).with_name("acceptance_jobs.py")

NAMES = {
    "acme.note": "note",
    "acme.inline": "inline",
    "acme.configured": "configured",
    "acme.steps": "steps",
    "acme.os_exit": "os_exit",
    "acme.sys_exit": "sys_exit",
    "acme.segfault": "segfault",
    "acme.block": "block",
    "acme.stuck_inline": "stuck_inline",
    "acme.fetch": "fetch",
    "acme.fetch_blocking": "fetch_blocking",
    "acme.traced": "traced",
    "acme.traced_inline": "traced_inline",
    "acme.poll": "poll",
    "acme.chatty": "chatty",
    "acme.wants_file": "wants_file",
    "acme.leak": "leak",
    "acme.leak_result": "leak_result",
}


def install_handlers(folder: Path) -> None:
    """Put the distribution `acme-jobs` with all handlers into a folder of PYTHONPATH."""
    make_plugin(
        folder,
        dist="acme-jobs",
        version="1.0",
        modules={"acme_jobs": SOURCE.read_text()},
        entry_points={name: f"acme_jobs:{function}" for name, function in NAMES.items()},
    )


def read_journal(path: Path, who: str | None = None) -> list[dict[str, Any]]:
    """The lines that handlers wrote, in order; a last line that is not complete yet is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    entries = [json.loads(line) for line in lines if line]
    return [entry for entry in entries if who is None or entry["who"] == who]
