"""What a worker costs its PostgreSQL server: the sessions it opens, and keeps, under load."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.handlers import install_handlers
from tests.fakes.site import Site, application, definition, opened, wait_until

SESSIONS = """
SELECT application_name AS name, pid FROM pg_stat_activity
WHERE datname = current_database() AND application_name LIKE 'orgworker %' AND pid <> pg_backend_pid()
"""
ORGS = 8
RUNS = 120
# Whatever was there for so many seconds is no passer-by.
STAYS = 0.5


@pytest.fixture
def busy(tmp_path: Path, provider, migrated_postgres_url: str) -> Iterator[Site]:
    """Children and inline runs are due all the time."""
    with opened(Site(tmp_path, migrated_postgres_url, provider)) as site:
        # As most services write such a URL.
        site.environment["WORKER_DATABASE__URL"] = migrated_postgres_url.replace(
            "postgresql://", "postgres://"
        )
        # The heartbeat and the watchman, whose threads ask for themselves, come often.
        site.configure(execution='inline = ["acme-jobs"]\nrenew = "500ms"', extra='[alerts]\noverdue = "2s"')
        install_handlers(site.plugins)
        site.migrate()
        params = {"journal": str(tmp_path / "out" / "journal")}
        orgs = [f"org_{number}" for number in range(ORGS)]
        site.add_orgs(*map(application, orgs))
        site.apply(
            "".join(
                definition(org, name, name, "every 1s", params=params, overlap="allow", spread="off")
                for org in orgs
                for name in ("acme.note", "acme.inline")
            )
        )
        yield site


def test_three_for_work_one_for_the_lease_and_one_that_listens(busy: Site):
    since: dict[tuple[str, int], float] = {}
    there: dict[tuple[str, int], float] = {}

    def carried() -> bool:
        now = time.monotonic()
        there.clear()
        for row in busy.query(SESSIONS):
            session = (row["name"], row["pid"])
            there[session] = now - since.setdefault(session, now)
        return busy.query("SELECT count(*) AS n FROM runs WHERE state = 'succeeded'")[0]["n"] >= RUNS

    worker = busy.start_worker()
    wait_until(carried, f"{RUNS} runs", timeout=60)

    # One more is there for a moment where heartbeat and watchman meet. On a busy machine a session may be
    # given up for being late; then another takes its place.
    stayed = [name for (name, _), seconds in there.items() if seconds > STAYS]
    assert Counter(stayed) == {"orgworker worker": 4, "orgworker listener": 1}, there
    assert busy.stop_worker(worker) == 0
