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


def test_another_schema_version_is_refused_by_every_command(site: Site):
    site.query("UPDATE alembic_version SET version_num = '0000'")

    for command in (["runs", "list"], ["orgs", "add", "org_x"], ["db", "check"], ["run"]):
        refused = site.cli(*command, check=False)

        assert refused.code == 78, command
        assert "python -m worker db upgrade" in refused.err
    site.query("UPDATE alembic_version SET version_num = '9999'")
    assert "newer release" in site.cli("runs", "list", check=False).err


def test_a_database_that_does_not_answer_exits_69(site: Site):
    """Nobody listens on port 9 of the loopback address."""
    url = "postgresql://worker:hunter2@127.0.0.1:9/worker"

    down = site.cli("--set", f"database.url={url}", "runs", "list", "-o", "json", check=False)

    assert down.code == 69
    assert json.loads(down.err)["error"]["code"] == "database_unavailable"
    assert "hunter2" not in down.err


def test_a_url_that_names_no_database_exits_78(site: Site):
    wrong = site.cli("--set", "database.url=mysql://db/x", "runs", "list", check=False)

    assert wrong.code == 78
    assert "mysql" in wrong.err


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
    heavy = {"alembic", "apscheduler", "httpx", "rich", "uvicorn", "worker.execution.loops.supervisor"}
    assert "sqlalchemy" in imported
    assert imported & heavy == set()


def test_settings_are_masked(site: Site):
    url = "postgresql://worker:hunter2@127.0.0.1/worker"

    shown = site.cli("--set", f"database.url={url}", "config", "show", "-o", "json")

    assert shown.json()["database"]["url"] == "postgresql://worker:***@127.0.0.1/worker"
