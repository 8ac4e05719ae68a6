"""Two workers on one PostgreSQL fire 3,000 definitions every 20 s: each instant once, none left out."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from tests.fakes.handlers import install_handlers
from tests.fakes.site import Site, application, opened, wait_until

ORGS = 30


@pytest.mark.simulated
def test_two_workers_leave_no_gap_and_make_no_duplicate(tmp_path, provider, migrated_postgres_url):
    each, period, seconds = 100, 20, 60
    with opened(Site(tmp_path, migrated_postgres_url, provider)) as site:
        site.configure(execution='inline = ["acme-jobs"]')
        install_handlers(site.plugins)
        site.migrate()
        site.add_orgs(*(application(f"org_{n:02}") for n in range(ORGS)))
        templates = [
            {
                "name": f"tick-{n:03}",
                "orgs": "all",
                "handler": "acme.inline",
                "schedule": f"every {period}s",
                "params": {"journal": "/dev/null"},
            }
            for n in range(each)
        ]
        path = tmp_path / "definitions.json"
        path.write_text(json.dumps({"template": templates}))
        site.cli("apply", str(path))
        assert count(site, "SELECT count(*) AS n FROM definitions") == ORGS * each

        workers = [site.start_worker(), site.start_worker()]
        since = datetime.now(UTC) + timedelta(seconds=seconds)
        wait_until(lambda: not behind(site, since), "every definition fired since then", timeout=4 * seconds)
        assert [site.stop_worker(worker, timeout=60) for worker in workers] == [0, 0]

        fired_by = site.query("SELECT DISTINCT worker_id FROM attempts")
        assert len(fired_by) == 2
        holes = site.query(
            """
            SELECT definition_id, count(*) AS runs, count(DISTINCT scheduled_for) AS instants,
                   min(scheduled_for) AS first, max(scheduled_for) AS last
            FROM runs GROUP BY definition_id"""
        )
        skipped = site.query(
            """
            SELECT definition_id, sum("count") AS n, min(skipped_from) AS first, max(skipped_until) AS last
            FROM skips GROUP BY definition_id"""
        )
        skips = {row["definition_id"]: row for row in skipped}
        assert len(holes) == ORGS * each
        for row in holes:
            assert row["runs"] == row["instants"], "an instant twice"
            # An instant that was skipped may come before the first run, or after the last.
            both = [row, *([skips[row["definition_id"]]] if row["definition_id"] in skips else [])]
            first, last = min(part["first"] for part in both), max(part["last"] for part in both)
            between = (last - first) // timedelta(seconds=period) + 1
            accounted = row["runs"] + sum(part.get("n", 0) for part in both)
            assert accounted == between, "an instant left out"


def behind(site: Site, since: datetime) -> int:
    """The number of definitions of which no instant since then became a run or was skipped."""
    return count(
        site,
        """
        SELECT count(*) AS n FROM definitions d
        WHERE NOT EXISTS (SELECT 1 FROM runs r WHERE r.definition_id = d.id AND r.scheduled_for >= ?)
          AND NOT EXISTS (SELECT 1 FROM skips s WHERE s.definition_id = d.id AND s.skipped_until >= ?)
        """,
        *(since, since),
    )


def count(site: Site, query: str, *parameters: object) -> int:
    return int(site.query(query, *parameters)[0]["n"])
