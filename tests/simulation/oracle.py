"""What a simulation must show: promises that hold at every commit, and those that its whole history keeps.

It knows only documented columns, the journal of the handlers, and what was done to whom.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import psycopg
import psycopg.types.json
from psycopg.rows import dict_row

from tests.faults.checker import FINAL, History, falling_tokens, holes, late_writes, two_owners
from tests.faults.cluster import instants
from tests.simulation import jobs
from tests.simulation.batches import Batches
from tests.simulation.calls import Calls
from tests.simulation.calm import Calm
from tests.simulation.database import EPOCH
from tests.simulation.deadlines import Deadlines
from tests.simulation.families import WINDOWS, Families, Waking
from tests.simulation.models import ORIGINS
from tests.simulation.product import REFUSED, Starts
from tests.simulation.rollouts import Rollouts
from tests.simulation.stage import Stage
from tests.simulation.world import LEASE, POLL, RENEW, World

Row = Mapping[str, Any]

# At every commit: more runs than a limit allows.
LIMITS = """
SELECT 'org ' || o.code, count(*) FROM live_runs r JOIN orgs o ON o.id = r.org_id WHERE r.state = 'running'
GROUP BY o.code, o.max_concurrent_runs HAVING count(*) > o.max_concurrent_runs
UNION ALL
SELECT 'definition ' || r.definition_id, count(*) FROM live_runs r
WHERE r.state = 'running' AND r.max_concurrent IS NOT NULL
GROUP BY r.definition_id HAVING count(*) > min(r.max_concurrent)
"""
TABLES = (
    *("runs", "attempts", "workers", "checkpoints", "steps", "waits", "spends", "meter_days", "live_runs"),
    *("run_egress", "parents", "children", "starts", "definitions"),
    *("rollouts", "rollout_orgs", "run_versions", "audit"),
    *("batches", "batch_items", "meters"),
)
NAMED = """
SELECT {columns} FROM {table} t JOIN definitions d ON d.id = t.definition_id JOIN orgs o ON o.id = d.org_id
"""

# Seconds for which a machine has to stand still before its lease may expire, with what its answers take.
STILL = LEASE - 2 * RENEW
# Seconds after that in which it may get a run that is taken from it again.
NOT_NOTICED = RENEW + 3.0


class Watch:
    """Looks at each commit after an admission, and now and then at another, over a connection of its own."""

    # Commits until one is looked at in any case.
    EVERY = 16

    def __init__(self, world: World) -> None:
        self.found: list[str] = []
        self._world = world
        self._look = _looking(world.url)
        self._left = self.EVERY
        self._limits = LIMITS
        # Of runs with children, where there are such.
        self.waking: Waking | None = None

    def watch_trees(self) -> None:
        self._limits = f"{LIMITS} UNION ALL {WINDOWS}"
        self.waking = Waking(self._world, self._look)

    def committed(self) -> None:
        self._left -= 1
        if self._left <= 0:
            self.look()

    def runs(self) -> int:
        [(count,)] = self._look("SELECT count(*) FROM runs")
        return int(count)

    def look(self) -> None:
        self._left = self.EVERY
        for what, count in self._look(self._limits):
            self.found.append(f"at {self._world.loop.time():.3f} {what} had {count} running runs")
        if self.waking is not None:
            self.waking.look()


def _looking(url: str) -> Callable[[str], Sequence[tuple[Any, ...]]]:
    if url.startswith("sqlite"):
        file = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
        return lambda query: file.execute(query).fetchall()
    server = psycopg.connect(url, autocommit=True)
    return lambda query: server.execute(query.encode()).fetchall()


def rows_of(url: str, query: str) -> list[dict[str, Any]]:
    """The rows of a query on either database."""
    if url.startswith("sqlite"):
        with sqlite3.connect(url.removeprefix("sqlite:///")) as file:
            file.row_factory = sqlite3.Row
            return instants([dict(row) for row in file.execute(query)])
    with psycopg.connect(url, row_factory=dict_row) as server:
        # As SQLite has it.
        psycopg.types.json.set_json_loads(
            lambda text: text.decode() if isinstance(text, bytes) else text, server
        )
        return instants(server.execute(query.encode()).fetchall())


class Oracle:
    """Judges one simulation that has ended."""

    def __init__(self, world: World, stage: Stage) -> None:
        self.world = world
        self.stage = stage
        self.rows: dict[str, list[dict[str, Any]]] = {
            table: rows_of(world.url, f"SELECT * FROM {table}") for table in TABLES
        }
        names = "t.id, d.name AS definition, o.code AS org"
        by_id = {row["id"]: row for row in rows_of(world.url, NAMED.format(columns=names, table="runs"))}
        for run in self.rows["runs"]:
            run.update(definition=by_id[run["id"]]["definition"], org=by_id[run["id"]]["org"])
        self.skips = rows_of(
            world.url, NAMED.format(columns="t.*, d.name AS definition, o.code AS org", table="skips")
        )
        self.states = rows_of(
            world.url,
            NAMED.format(columns="t.*, d.name AS definition, o.code AS org", table="definition_states"),
        )
        self.entries = {(f"org_{entry.org}", entry.name): entry for entry in stage.plan.entries}
        self.history = History(
            runs=self.rows["runs"],
            attempts=self.rows["attempts"],
            skips=self.skips,
            workers=self.rows["workers"],
            checkpoints=[row for row in self.rows["checkpoints"] if "step" in _json(row["data"])],
            journal=[line | {"at": EPOCH + timedelta(seconds=line["at"])} for line in jobs.JOURNAL.lines],
            lease=timedelta(seconds=LEASE),
            poll=timedelta(seconds=POLL),
            by_lease=not world.on_file,
        )
        for row in self.history.checkpoints:
            row["data"] = _json(row["data"])  # type: ignore[index]
        # By incarnation its machine, and when it began.
        self.machines = {
            fields["worker"]: process.partition("/")[0]
            for _, process, name, fields in world.emitted
            if name in ("worker.started", "host.started")
        }
        self.begun = {
            fields["worker"]: at
            for at, _, name, fields in world.emitted
            if name in ("worker.started", "host.started")
        }
        # When the end of an attempt was heard of. Its row has the clock of its machine, also on PostgreSQL.
        self.ends = {
            (fields["run"], fields["attempt"]): at
            for at, _, name, fields in world.emitted
            if name == "run.ended"
        }
        # On SQLite the rows have the worker's wall clock, which a fault may have moved.
        self.wrong_clock = any(fault.kind in ("clock", "drift") for fault in stage.plan.faults)

    def judge(self) -> list[str]:
        return list(dict.fromkeys(self._objections()))

    def _objections(self) -> Iterator[str]:
        yield from self.world.watch.found[:5]
        yield from self.world.loop.failures[:5]
        yield from self._inner_failures()
        yield from self._unfinished()
        yield from self._wrong_ends()
        yield from holes(self.history)
        yield from falling_tokens(self.history)
        history = replace(self.history, journal=self._fenced_acts())
        if not self.wrong_clock:
            yield from two_owners(history)
            yield from late_writes(self.history)
        else:
            yield from self._acts_of_two_owners(history)
        yield from self._lost_without_cause()
        yield from self._ends_lost()
        yield from self._instants()
        yield from self._payments()
        yield from self._states()
        yield from self._spends()
        yield from self._answers()
        yield from self._request_keys()
        yield from self._orgs()
        of_services = [row for row in self.rows["run_egress"] if row["origin"] not in ORIGINS]
        rows = self.rows["runs"], of_services
        yield from Calls(self.world, self.stage.plan.faults, *rows).objections()
        calm = Calm(self.world, self.stage.plan.faults)
        by_clock = not (self.world.on_file and self.wrong_clock)
        if (waking := self.world.watch.waking) is not None:
            yield from Families(self.world, waking, calm, self.rows, by_clock=by_clock).objections()
        if self.stage.plan.has_rollout:
            yield from Rollouts(self.rows, calm, by_clock=by_clock).objections()
        if self.stage.plan.has_batches:
            yield from Batches(
                self.world.models, self.stage.plan.faults, self.rows, by_clock=by_clock
            ).objections()
        yield from Starts(self.stage.product, self.rows).objections()
        if by_clock:
            found = Deadlines(self.world, self.stage, calm, self.entries, self.rows["runs"], self.skips)
            yield from found.objections()

    def _inner_failures(self) -> Iterator[str]:
        for at, process, name, fields in self.world.emitted:
            if name in ("loop.failed", "handler.broken", "checker.died"):
                yield f"{process} at {at:.3f}: {name} {dict(fields)}"

    def _unfinished(self) -> Iterator[str]:
        for run in self.rows["live_runs"]:
            yield f"run {run['id']} is left {run['state']} ({run['reason']}, {run['detail']})"
        for machine in self.stage.forgotten:
            yield f"{machine} lives and has no lease, so it gets no runs"

    def _wrong_ends(self) -> Iterator[str]:
        """A run ends as its handler says, unless somebody or a fault that may do so ended it."""
        kinds = {action.kind for action in (*self.stage.plan.acts, *self.stage.plan.faults)}
        for run in self.rows["runs"]:
            state, reason = run["state"], run["reason"]
            entry = self.entries.get((run["org"], run["definition"]))
            if state not in FINAL or entry is None or (state in entry.ends and run["origin"] != "child"):
                continue
            is_leaf = run["handler"] == "sim.leaf" and state in ("succeeded", "failed")
            if run["origin"] == "child" and (is_leaf or state == "succeeded" or reason == "parent"):
                continue  # see `families`
            if state == "refused" and reason in REFUSED and (run["created_by"] or "").startswith("product:"):
                continue
            if state == "cancelled" and reason in (
                "requested",
                "suspended",
                "replaced",
                "closed",
                "backfill",
            ):
                continue
            if state == "skipped" and reason in ("expired", "misfire", "overlap", "paused"):
                continue
            if (state, reason) == ("refused", "org_mismatch") and "wrong token" in kinds and entry.org == 3:
                continue
            if (state, reason) == ("refused", "token_invalid") and kinds & {"clock", "drift"}:
                continue  # by the clock of its machine the token has expired, or is not valid yet
            why = f"{reason}, {run['detail']}, {run['error']}"
            yield f"run {run['id']} of {run['definition']} ended {state} ({why})"

    def _fenced_acts(self) -> list[Row]:
        """What handlers did, but not inline on a worker that stood still, until a renewal says that it lost.

        They cannot be frozen: see docs/limits.md.
        """
        lost = [(process, at) for at, process, name, _ in self.world.emitted if name == "lease.lost"]
        unfenced = [
            (still.machine, still.until, at)
            for still in self.world.struck
            for process, at in lost
            if still.kind == "still"
            and process == still.machine
            and still.until <= at <= still.until + NOT_NOTICED
        ]
        return [
            line
            for line in self.history.journal
            if not any(
                line.get("by") == machine and since <= (line["at"] - EPOCH).total_seconds() <= until
                for machine, since, until in unfenced
            )
        ]

    def _acts_of_two_owners(self, history: History) -> Iterator[str]:
        """As `two_owners`, from what the handlers did alone."""
        last: dict[str, tuple[int, datetime]] = {}
        for line in history.journal:
            attempt, _ = last.get(line["run"], (0, line["at"]))
            if line["attempt"] < attempt:
                yield f"run {line['run']}: attempt {line['attempt']} acted after attempt {attempt} had begun"
            last[line["run"]] = max((attempt, line["at"]), (line["attempt"], line["at"]))

    def _lost_without_cause(self) -> Iterator[str]:
        """No run is taken from a worker or host that lived and reached those who grant its lease."""
        if self.world.on_file and self.wrong_clock:
            return  # the rows have the times of that clock, which ends the leases of hosts, too
        for attempt in self.rows["attempts"]:
            machine = self.machines.get(attempt["worker_id"], "?")
            if attempt["outcome"] == "lost" and not self._may_lose(machine, attempt):
                which = f"attempt {attempt['attempt']} of {machine}"
                yield f"run {attempt['run_id']}: {which} was lost without a cause"

    def _may_lose(self, machine: str, attempt: Row) -> bool:
        """Whether it was killed or stood still, or was cut off for long enough, while it had the attempt."""
        began, ended = (
            (attempt[name] - EPOCH).total_seconds() - (NOT_NOTICED if name == "started_at" else 0.0)
            for name in ("started_at", "ended_at")
        )
        if self.wrong_clock:
            ended = max(ended, self.ends.get((attempt["run_id"], attempt["attempt"]), ended))
        # On SQLite a host has one worker to ask; that it is killed is no cause, as it is there again at once.
        its_worker = "w1" if self.world.on_file and machine.startswith("h") else ""
        here = (machine, "*", its_worker)
        struck = [each for each in self.world.struck if each.machine in here and each.since <= ended]
        still, incarnated = 0.0, self.begun.get(attempt["worker_id"], 0.0)
        for each in sorted(struck, key=lambda each: each.since):
            if each.kind == "still":
                still += each.until - each.since if each.until >= began else 0.0
            elif each.machine == machine and each.since >= (incarnated if each.kind == "killed" else began):
                return True
        return still >= STILL

    def _ends_lost(self) -> Iterator[str]:
        """A handler that acts once and returns is not called again, unless a drain overtook its end."""
        drained = {action.target for action in self.stage.plan.faults if action.kind == "drain"}
        acted = {(line["run"], line["attempt"]) for line in self.history.journal if line["who"] == "effect"}
        handlers = {run["id"]: run["handler"] for run in self.rows["runs"]}
        for attempt in self.rows["attempts"]:
            run, number = attempt["run_id"], attempt["attempt"]
            at_once = handlers.get(run) in ("sim.note", "sim.versioned", "sim.versioned_2")
            handed_back = attempt["outcome"] == "handed_back"
            if self.machines.get(attempt["worker_id"]) in drained:
                continue
            if at_once and handed_back and (run, number) in acted:
                yield f"run {run}: attempt {number} had done its work and was handed back"

    def _instants(self) -> Iterator[str]:
        """Each instant of a schedule came once, as a run or within a skip; without edits none is missing."""
        rested = {
            place
            for action in self.stage.plan.acts
            if action.kind in ("pause", "suspend", "pause org")
            for place in (action.target, action.target[0] if action.kind != "pause" else "")
        }
        for (org, name), entry in self.entries.items():
            if entry.schedule:
                continue
            period = timedelta(seconds=entry.period)
            # While a definition or its org is paused nothing is due.
            rests = rested & {f"{entry.org}/{name}", str(entry.org)}
            found: list[datetime] = [
                run["scheduled_for"]
                for run in self.rows["runs"]
                if (run["org"], run["definition"], run["origin"]) == (org, name, "schedule")
            ]
            for skip in self.skips:
                if (skip["org"], skip["definition"]) == (org, name):
                    since, until = skip["skipped_from"], skip["skipped_until"]
                    span = [since + n * period for n in range((until - since) // period + 1)]
                    if skip["count"] == len(span):
                        found += span
                    elif not rests or skip["count"] > len(span):
                        yield f"{org} {name}: a skip of {skip['count']} from {since} ends at {until}"
            counted = Counter(found)
            for instant, times in counted.items():
                if times > 1:
                    yield f"{org} {name}: {instant} came {times} times"
            if len(counted) > 1 and not rests:
                expected = int((max(counted) - min(counted)) / period) + 1
                if len(counted) != expected:
                    yield f"{org} {name}: {expected - len(counted)} of {expected} instants are missing"

    def _payments(self) -> Iterator[str]:
        """Each step is paid for once more per interrupted attempt at most, and never once it is stored."""
        paid: dict[tuple[str, str, int], list[int]] = defaultdict(list)
        for line in jobs.JOURNAL.lines:
            if line["who"] == "wrong":
                yield f"run {line['run']}: its steps returned {line['found']}"
            if line["who"] == "paid":
                paid[line["run"], line.get("name", ""), line["step"]].append(line["attempt"])
        stored = {
            (row["run_id"], str(row["key"])): row["attempt"]
            for row in self.rows["steps"]
            if row["key"] is not None
        }
        for (run, _, step), attempts in paid.items():
            if len(set(attempts)) != len(attempts):
                yield f"run {run}: step {step} was paid for twice in one attempt: {attempts}"
            known = stored.get((run, str(step)))
            if known is not None and max(attempts) > known:
                yield f"run {run}: step {step} was stored by attempt {known} and paid for again in {attempts}"

    def _states(self) -> Iterator[str]:
        """A state counts each run that succeeded once, but for those of a backfill and their retries."""
        backfilled = {run["id"] for run in self.rows["runs"] if run["origin"] == "backfill"}
        for run in sorted(self.rows["runs"], key=lambda run: run["id"]):
            if run["retry_of"] in backfilled:
                backfilled.add(run["id"])
        for state in self.states:
            data = _json(state["data"])
            succeeded = [
                run["id"]
                for run in self.rows["runs"]
                if run["id"] not in backfilled
                and (run["org"], run["definition"], run["state"])
                == (state["org"], state["definition"], "succeeded")
            ]
            if data.get("total", 0) != len(succeeded) or sorted(data.get("runs", [])) != sorted(succeeded):
                yield (
                    f"{state['org']} {state['definition']}: the state counts {data.get('total', 0)} of "
                    f"{len(succeeded)} runs"
                )

    def _spends(self) -> Iterator[str]:
        """What the meters say is what was spent, and each step's spend counts once."""
        spent: Counter[str] = Counter()
        for row in self.rows["spends"]:
            if row["meter"] == "calls":
                spent[row["org_id"]] += row["amount"]
        counted: Counter[str] = Counter()
        for row in self.rows["meter_days"]:
            if row["meter"] == "calls":
                counted[row["org_id"]] += row["used"]
        if spent != counted:
            yield f"the meters say {dict(counted)}, and {dict(spent)} was spent"
        steps = Counter(row["run_id"] for row in self.rows["steps"] if row["name"] in ("pay", "more"))
        spends = Counter(row["run_id"] for row in self.rows["spends"] if row["meter"] == "calls")
        for run, count in spends.items():
            if count != steps[run]:
                yield f"run {run}: {count} spends of {steps[run]} steps"

    def _answers(self) -> Iterator[str]:
        """Every attempt was given the answer that is stored, which is the first one."""
        stored = {
            row["run_id"]: _json(row["answer"]) for row in self.rows["waits"] if row["answer"] is not None
        }
        for line in jobs.JOURNAL.lines:
            if line["who"] == "given" and stored.get(line["run"]) != line["answer"]:
                kept = stored.get(line["run"])
                yield f"run {line['run']} was given {line['answer']!r}, and {kept!r} is stored"
        for run, answer in self.stage.answered.items():
            if stored.get(run) != answer:
                yield f"run {run} was answered {answer!r} first, and {stored.get(run)!r} is stored"

    def _request_keys(self) -> Iterator[str]:
        """A run that is asked for twice under one request key is one run."""
        for _, action, made in self.stage.done:
            if action.kind == "run now" and isinstance(made, set) and len(made) > 1:
                yield f"{action.target} was asked for under one key, and {sorted(made)} were made"

    def _orgs(self) -> Iterator[str]:
        """A handler works for the org of its run only, with that org's token."""
        orgs = {run["id"]: run["org"] for run in self.rows["runs"]}
        for line in jobs.JOURNAL.lines:
            run, org, token_of = line["run"], line["org"], line["token_of"]
            if run in orgs and not orgs[run] == org == token_of:
                yield f"run {run} of {orgs[run]} worked for {org} by a token of {token_of}"


def _json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value
