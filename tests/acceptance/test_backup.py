"""docs/operating/backup.md, executed: a database is lost under a worker, and comes back from the copy."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.fakes import postgres
from tests.fakes.handlers import install_handlers, read_journal
from tests.fakes.pages import ROOT, blocks, missing_lines
from tests.fakes.site import FINAL, Site, application, definition, opened, wait_until
from worker.demo.provider import Provider
from worker.store import schema

PAGE = (ROOT / "docs" / "operating" / "backup.md").read_text()
ORGS = ("org_a", "org_b")


@dataclass
class Operator:
    """Runs the commands of the page, in the folder of the installation."""

    site: Site
    environment: dict[str, str]
    server: postgres.Server | None = None

    def run(self, title: str, number: int) -> str:
        """What the commands of the numbered block of a section print; one that fails fails the test."""
        section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        text = [block.text for block in blocks(section) if block.language == "console"][number]
        if self.server is not None:
            text = text.replace("db.internal:5432", f"127.0.0.1:{self.server.port}")
            text = text.replace("--host=db.internal", "--host=127.0.0.1")
            text = text.replace("--port=5432", f"--port={self.server.port}")
            assert "db.internal" not in text
        script = "\n".join(line.removeprefix("$ ") for line in text.splitlines())
        done = subprocess.run(
            ["sh", "-euxc", script],
            cwd=self.site.folder,
            env=self.site.process_environment() | self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{done.stderr}\n{done.stdout}"
        return done.stdout


@pytest.fixture(params=["sqlite", "postgresql"])
def operator(request: pytest.FixtureRequest, tmp_path: Path, provider: Provider) -> Iterator[Operator]:
    """An installation on either database; on PostgreSQL with the two logins of the documentation."""
    path = {"PATH": f"{Path(sys.executable).parent}:{os.defpath}"}
    url, owner, server = f"sqlite:///{tmp_path / 'worker.db'}", "", None
    if request.param == "postgresql":
        server = request.getfixturevalue("own_postgres")
        for statement in (
            "CREATE ROLE owner LOGIN CREATEROLE",
            "CREATE ROLE worker LOGIN",
            "CREATE DATABASE orgworker OWNER owner",
        ):
            server.execute(statement)
        url, owner = (server.url("orgworker").replace("postgres@", f"{who}@") for who in ("worker", "owner"))
        programs = postgres.binaries(server.folder / "binaries", postgres.unprivileged_user())
        path = {"PATH": f"{programs}:{path['PATH']}"}
    with opened(Site(tmp_path, url, provider)) as site:
        site.configure(execution='lease = "4s"\nrenew = "500ms"')
        if owner:
            text = site.settings.read_text()
            site.settings.write_text(text.replace("[issuers", f'owner_url = "{owner}"\n[issuers', 1))
        install_handlers(site.plugins)
        site.migrate()
        if owner:
            with psycopg.connect(owner, autocommit=True) as connection:
                connection.execute("GRANT orgworker_worker, orgworker_web, orgworker_operator TO worker")
        yield Operator(site, path, server)


@pytest.mark.timeout(240)
def test_a_lost_database_comes_back_and_its_runs_are_settled(operator: Operator, journal: Path):
    site, title = operator.site, "PostgreSQL" if operator.server else "SQLite"
    site.add_orgs(*(application(org) for org in ORGS))
    params = {"journal": str(journal), "steps": 40, "pause": 0.1}
    site.apply(
        "".join(
            definition(org, name, f"acme.{name}", params=params) for org in ORGS for name in ("note", "steps")
        )
        + definition("org_a", "often", "acme.note", "every 5s", params=params, misfire="all")
    )
    worker = site.start_worker()
    site.wait_for_handlers("acme.steps")
    site.cli("definitions", "run", "org_b", "note")
    assert site.wait_for_end("org_b", "note")["state"] == "succeeded"
    site.cli("definitions", "run", "org_a", "steps")
    wait_until(lambda: len(read_journal(journal, "step")) > 2, "a run in progress with a checkpoint")

    kept = {run["id"] for run in site.runs()}
    operator.run(title, 0)

    # What the backup does not have.
    site.cli("definitions", "run", "org_b", "steps")
    lost = wait_until(lambda: {run["id"] for run in site.runs("org_b", "steps")}, "a run after the backup")
    site.disconnect()
    worker.kill()
    worker.wait()
    steps_before = max(line["step"] for line in read_journal(journal, "step"))
    lose(operator)
    shown = operator.run(title, 1)
    dropped = operator.run("Before any worker starts", 0)

    assert re.search(r"version +\S+", shown)
    # The rights of the three roles came back too.
    assert operator.server is None or re.search(r"warnings +-", shown), shown
    [expected] = [block.text for block in blocks(PAGE) if block.language == "text"]
    assert missing_lines(expected, dropped) == []
    # The backup had tokens, and they are gone before a worker could use one.
    assert int(dropped.split()[-1]) > 0
    assert site.query("SELECT COUNT(*) AS n FROM access_tokens")[0]["n"] == 0
    found = {run["id"] for run in site.runs()}
    assert kept <= found
    assert not lost & found
    assert {run["state"] for run in site.runs("org_a", "steps")} == {"running"}
    operator.run("Before any worker starts", 1)

    requests = site.provider.requests["token"]
    again = site.start_worker()
    resumed = site.wait_for_end("org_a", "steps", timeout=60)
    site.cli("definitions", "run", "org_b", "steps")
    assert site.wait_for_end("org_b", "steps", timeout=60)["state"] == "succeeded"
    assert site.stop_worker(again) == 0

    # The one that was running was taken over from the dead worker, from the checkpoint of the backup.
    assert (resumed["state"], resumed["attempt"]) == ("succeeded", 2)
    assert [attempt["outcome"] for attempt in site.attempts(resumed["id"])] == ["lost", "succeeded"]
    starts = [line for line in read_journal(journal, "start") if line["run"] == str(resumed["id"])]
    assert 0 < starts[-1]["first"] <= steps_before
    assert site.provider.requests["token"] > requests
    assert_settled(site, kept)


def lose(operator: Operator) -> None:
    """Lose the database and the key ring."""
    site = operator.site
    if operator.server is None:
        # A damaged file, and the log of it.
        (site.folder / "worker.db").write_bytes(b"lost")
        assert (site.folder / "worker.db-wal").exists()
        (site.folder / "keyring").unlink()
    else:
        (site.secrets / "keyring").unlink()


def assert_settled(site: Site, kept: set[Any]) -> None:
    """Every run has ended or waits for a worker, and each scheduled time is one run or one skip."""
    runs = site.runs()
    left = [run for run in runs if run["state"] not in FINAL and run["state"] != "waiting"]
    assert left == []
    assert {run["state"] for run in runs if run["id"] in kept} == {"succeeded"}
    assert site.query("SELECT COUNT(*) AS n FROM live_runs")[0]["n"] == sum(
        run["state"] == "waiting" for run in runs
    )
    times = [moment(run["scheduled_for"]) for run in site.runs("org_a", "often")]
    for skip in site.query("SELECT * FROM skips"):
        first, last = moment(skip["skipped_from"]), moment(skip["skipped_until"])
        assert (last - first).total_seconds() == 5 * (skip["count"] - 1)
        times += [first + timedelta(seconds=5 * n) for n in range(skip["count"])]
    # Also those from between the backup and the restore.
    every = [min(times) + timedelta(seconds=5 * n) for n in range(len(times))]
    assert sorted(times) == every


def moment(value: Any) -> datetime:
    return value if isinstance(value, datetime) else datetime.fromisoformat(value)


def test_a_dump_without_the_option_is_refused_as_the_page_says(own_postgres: postgres.Server, tmp_path: Path):
    """The control: the owner of the tables is bound by row-level security too."""
    own_postgres.execute("CREATE ROLE owner LOGIN CREATEROLE")
    own_postgres.execute("CREATE DATABASE orgworker OWNER owner")
    owner = own_postgres.url("orgworker").replace("postgres@", "owner@")
    schema.upgrade(owner)
    programs = postgres.binaries(own_postgres.folder / "binaries", postgres.unprivileged_user())

    dump = [programs / "pg_dump", f"--file={tmp_path / 'dump'}", owner]
    done = subprocess.run(dump, capture_output=True, text=True, timeout=60)

    assert done.returncode != 0
    assert "row-level security" in done.stderr
