"""Installs the handlers of the acceptance tests, stores them in a catalogue, and reads what they wrote."""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.plugins import make_plugin
from worker.clock import SystemClock
from worker.handlers.catalogue import HandlerEntry, read_catalogue
from worker.store import catalogue
from worker.store.database import Database

SOURCE = Path(__file__).with_name("acceptance_jobs.py")


def install_handlers(folder: Path) -> None:
    """Put the distribution `acme-jobs` with all handlers into a folder of PYTHONPATH.

    The handler `acme.NAME` is the function NAME.
    """
    source = SOURCE.read_text()
    names = re.findall(r'^@job\("acme\.(\w+)"', source, re.MULTILINE)
    targets = {f"acme.{name}": f"acme_jobs:{name}" for name in names}
    make_plugin(folder, modules={"acme_jobs": source}, entry_points=targets)


def store_handlers(url: str) -> None:
    """Store these handlers, and those of orgworker, in the catalogue of a database."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patched:
        install_handlers(Path(name))
        patched.syspath_prepend(name)
        patched.setenv("PYTHONPATH", name)
        entries = asyncio.run(_installed())
    database = Database.open(url, clock=SystemClock())
    with database.transaction() as connection:
        catalogue.put(connection, entries, at=database.now(connection))
    database.close()


async def _installed() -> list[HandlerEntry]:
    return [entry async for found in read_catalogue() for entry in found]


def read_journal(path: Path, who: str | None = None) -> list[dict[str, Any]]:
    """The lines that handlers wrote, in order; an incomplete last line is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    entries = [json.loads(line) for line in lines if line]
    return [entry for entry in entries if who is None or entry["who"] == who]
