"""A worker outlives its database: it waits in silence and goes on within two seconds."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from tests.fakes.handlers import install_handlers
from tests.fakes.site import Site, application, definition, opened, wait_until

OUTAGE = 6.0


@pytest.fixture
def outage_site(tmp_path: Path, provider, own_postgres):
    with opened(Site(tmp_path, own_postgres.url(), provider)) as made:
        # The lease is shorter than the outage: it must be renewed before anything starts.
        made.configure(execution='lease = "4s"\nrenew = "1s"\ninline = ["acme-jobs"]')
        install_handlers(made.plugins)
        made.migrate()
        yield made


def test_a_lost_database_is_waited_for_and_work_goes_on_at_once(outage_site, own_postgres, journal):
    site = outage_site
    site.add_orgs(application("org_acme"))
    params = {"journal": str(journal)}
    site.apply(definition("org_acme", "tick", "acme.inline", "every 1s", params=params, overlap="allow"))
    site.start_worker()
    wait_until(
        lambda: starts_of(own_postgres, datetime.min.replace(tzinfo=UTC)) >= 2, "runs before the outage"
    )

    own_postgres.stop(signal.SIGINT)
    lost_at = datetime.now(UTC)
    time.sleep(OUTAGE)
    own_postgres.start()
    back_at = datetime.now(UTC)

    wait_until(lambda: starts_of(own_postgres, back_at - timedelta(seconds=1)) >= 1, "a run after it")
    with psycopg.connect(own_postgres.url(), autocommit=True) as connection:
        (first,) = connection.execute(
            "SELECT min(started_at) FROM attempts WHERE started_at > %s", (lost_at + timedelta(seconds=1),)
        ).fetchone()
    assert (first - back_at).total_seconds() <= 2.0
    wait_until(lambda: "database.back" in site.log_text(), "the word that it is back")
    lines = [json.loads(line) for line in site.log_text().splitlines() if line.startswith("{")]
    told = Counter(line["event"] for line in lines)
    assert told["database.lost"] == told["database.back"] == 1
    failed = [line for line in lines if line["event"] == "loop.failed"]
    assert failed == []
    during = [line for line in lines if lost_at <= datetime.fromisoformat(line["at"]) <= back_at]
    assert len(during) <= OUTAGE, during


def starts_of(server, since: datetime) -> int:
    with psycopg.connect(server.url(), autocommit=True) as connection:
        (count,) = connection.execute(
            "SELECT count(*) FROM attempts WHERE started_at > %s", (since,)
        ).fetchone()
    return count
