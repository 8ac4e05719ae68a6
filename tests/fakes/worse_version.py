"""A rollout on real workers that are killed: a version that becomes worse at a known instant is halted.

`tests/acceptance/test_rollouts.py` has it with few orgs, `tests/faults/test_rollouts.py` with 300.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from tests.fakes.site import Site, application, wait_until
from worker.clock import from_text, to_text

# Seconds after a halt in which it takes effect: the transaction that halts ends, and a poll.
WITHIN = timedelta(seconds=2)
EXECUTION = 'lease = "6s"\nrenew = "1s"\npoll = "500ms"\ninline = ["acme-jobs"]'
FILE = """
[[template]]
name = "digest"
orgs = "all"
handler = "acme.v1"
schedule = "every {every:g}s"
params = {{ worse = "{worse}" }}

[[rollout]]
name = "digest-v2"
definitions = "digest"
from = "acme.v1"
to = "acme.v2"
steps = ["40%", "100%"]
watch = {{ failed = "+2 points", refused = "+1 point" }}
"""
# Attempts whose handler was called since the rollout began, as the first of their run, without a version.
WITHOUT = """
SELECT a.run_id FROM attempts a LEFT JOIN run_versions v ON v.run_id = a.run_id
WHERE v.run_id IS NULL AND a.attempt = 1 AND a.handler_started_at > ?
"""
# Attempts of another version than that of their run.
TWO = """
SELECT v.run_id FROM run_versions v JOIN attempts a ON a.run_id = v.run_id
WHERE a.handler <> v.handler AND a.handler_started_at IS NOT NULL
"""
# What the evidence says, from the runs themselves.
RECOUNT = """
SELECT v.side, count(*) AS runs, count(DISTINCT v.org_id) AS orgs,
sum(CASE WHEN r.state = 'failed' THEN 1 ELSE 0 END) AS failed
FROM run_versions v JOIN runs r ON r.id = v.run_id
WHERE v.counted AND v.step = 1 AND r.state IN ('succeeded', 'failed')
AND NOT (r.state = 'failed' AND r.reason = 'lost') GROUP BY v.side
"""


@dataclass
class WorseVersion:
    """One installation with a rollout over its orgs, whose runs come `every` so many seconds."""

    site: Site
    orgs: int
    every: float = 5.0
    # How many workers run at a time, and the least number of kills; one of them is before the new version is
    # worse, and one after the halt.
    workers: int = 1
    kills: int = 1
    _running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _killed: int = 0

    def run(self) -> dict[str, Any]:
        """From the first runs to a round of runs after the halt; returns the row of the rollout."""
        site, worse = self.site, self.site.out / "worse"
        site.configure(execution=EXECUTION)
        site.add_orgs(*(application(f"org_{number}") for number in range(self.orgs)))
        self._running = [site.start_worker() for _ in range(self.workers)]
        site.wait_for_handlers("acme.v1", "acme.v2")
        site.apply(FILE.format(worse=worse, every=self.every))
        ended = "SELECT count(*) AS n FROM runs WHERE state IS NOT NULL"
        self._wait(lambda: site.query(ended)[0]["n"] >= 3 * self.orgs, "a time before")

        site.cli("rollouts", "advance", "digest-v2", "--reason", "try it")
        self._wait(lambda: self._count("counted") > self.orgs, "runs of both versions")
        assert self._count("side = 'to'") > 0
        self._kill()
        began = time.time()
        worse.touch()
        self._wait(self._is_halted, "the rollout to be halted")
        [rollout] = site.query("SELECT * FROM rollouts")
        while self._killed < self.kills:
            self._kill()
        after = self._at(rollout, WITHIN)
        self._wait(lambda: self._count("started_at > ?", after) >= self.orgs, "runs after the halt")
        assert _instant(rollout["halted_at"]).timestamp() >= began
        return rollout

    def check(self, rollout: dict[str, Any]) -> None:
        """What must be true of it afterwards."""
        site, halted_at = self.site, rollout["halted_at"]
        assert (rollout["state"], rollout["halted_by"]) == ("halted", "worker")
        later = "SELECT run_id FROM run_versions WHERE started_at > ? AND side = 'to'"
        assert site.query(later, self._at(rollout, WITHIN)) == []
        assert site.query(WITHOUT, rollout["began_at"]) == []
        assert site.query(TWO) == []
        self._check_evidence()
        self._check_moves(halted_at)
        [moved] = site.query("SELECT run_id FROM run_versions ORDER BY run_id DESC LIMIT 1")
        assert "digest-v2" in site.cli("runs", "why", str(moved["run_id"])).out

    def _check_evidence(self) -> None:
        shown = self.site.cli("rollouts", "show", "digest-v2", "-o", "json").json()
        totals = shown["evidence"]["totals"]
        rows = self.site.query(RECOUNT)
        assert {row["side"] for row in rows} == {"from", "to"}
        for row in rows:
            of, found = totals[row["side"]], (row["orgs"], row["runs"], row["failed"])
            assert (of["orgs"], of["metrics"]["failed"]["runs"], of["metrics"]["failed"]["total"]) == found

    def _check_moves(self, halted_at: Any) -> None:
        """An org moves at most once in the step: once on the new version, it has no run of the old one."""
        query = "SELECT org_id, side FROM run_versions WHERE step = 1 AND why = 'step' AND started_at < ? "
        sides: dict[str, list[str]] = {}
        for row in self.site.query(f"{query} ORDER BY started_at, run_id", halted_at):
            seen = sides.setdefault(str(row["org_id"]), [])
            if not seen or seen[-1] != row["side"]:
                seen.append(row["side"])
        assert sides and all(len(seen) == 1 for seen in sides.values()), sides

    def _is_halted(self) -> bool:
        # The last kill is for after the halt.
        if self._killed < self.kills - 1:
            time.sleep(2.0)
            self._kill()
        return bool(self.site.query("SELECT state FROM rollouts")[0]["state"] == "halted")

    def _kill(self) -> None:
        """Kill the worker that has run longest, and start another one."""
        worker = self._running.pop(0)
        worker.kill()
        worker.wait()
        self._running.append(self.site.start_worker())
        self._killed += 1

    def _at(self, rollout: dict[str, Any], more: timedelta) -> Any:
        """An instant after the halt, as this database has it."""
        halted_at = rollout["halted_at"]
        at = _instant(halted_at) + more
        return to_text(at) if isinstance(halted_at, str) else at

    def _count(self, where: str, *parameters: Any) -> int:
        [row] = self.site.query(f"SELECT count(*) AS n FROM run_versions WHERE {where}", *parameters)
        return int(row["n"])

    @staticmethod
    def _wait(probe: Callable[[], Any], what: str) -> None:
        wait_until(probe, what, timeout=600.0)


def _instant(at: Any) -> Any:
    return from_text(at) if isinstance(at, str) else at
