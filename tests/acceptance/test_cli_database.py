"""The schema, the speed of a list, and how commands end when the world is not as they need it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.fakes.site import Site


def test_the_schema_is_upgraded_once_and_checked(bare_site: Site):
    missing = bare_site.cli("runs", "list", "-o", "json", check=False)
    assert missing.code == 78
    assert "python -m worker db upgrade" in json.loads(missing.err)["error"]["fix"]
    assert bare_site.cli("db", "check", check=False).code == 78
    assert not (bare_site.folder / "worker.db").exists()

    first = bare_site.cli("db", "upgrade", "-o", "json").json()
    second = bare_site.cli("db", "upgrade", "-o", "json").json()

    assert (first["before"], first["version"]) == (None, second["before"])
    assert second["before"] == second["version"]
    assert bare_site.cli("db", "check", "-o", "json").json()["version"] == second["version"]


def test_a_reader_that_has_seen_enough_is_no_error(site: Site):
    site.cli("orgs", "add", "org_acme")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        ended = subprocess.run(
            [sys.executable, "-m", "worker", "--config", str(site.settings), "orgs", "list"],
            cwd=site.folder,
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
        )

    assert ended.stderr == ""


def test_a_list_imports_little(site: Site):
    """What only the worker, apply or a migration need costs a list nothing."""
    command = [sys.executable, "-X", "importtime", "-m", "worker", "--config", str(site.settings)]
    ended = subprocess.run(
        [*command, "runs", "list"], cwd=site.folder, capture_output=True, text=True, check=True
    )

    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines() if "|" in line}
    heavy = {"alembic", "apscheduler", "httpx", "rich", "uvicorn", "worker.engine.loops.supervisor"}
    assert "sqlalchemy" in imported
    assert imported & heavy == set()
