"""A day of history for the demo: the runs of yesterday and last night, replayed through the store.

The worker's own statements write every row, under a clock that is moved along; only the handlers did
not run. It works on SQLite alone, whose time is the injected clock.
"""

from __future__ import annotations

import heapq
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from sqlalchemy import Connection, update

from worker.demo.installation import SCOPE, last_night
from worker.demo.management import Organization
from worker.engine.attempt.inflight import record_claims
from worker.guard.claims import Claims, Flag
from worker.ids import OrgId, RunId, WorkerId
from worker.model.claims import ClaimsRecord
from worker.model.definitions.definition import from_spec
from worker.model.definitions.pools import DEFAULT_POOL
from worker.model.runs.outcome import (
    Cancelled,
    Error,
    Failed,
    Lost,
    NoToken,
    Outcome,
    Refused,
    Succeeded,
    Trail,
)
from worker.model.runs.outcome import end_attempt as end_of
from worker.model.runs.run import AdmittedRun, Isolation, LogLine, NewRun
from worker.operations.definitions import pause_definition
from worker.operations.handlers import Handlers
from worker.operations.runs import new_run
from worker.store import audit, credentials, definitions, firing, orgs, sweeps, tables, workers
from worker.store.database import Database
from worker.store.dialect import Row
from worker.store.sql import statements
from worker.store.sql.contract import Taker

SPAN = timedelta(hours=25)
# Nothing of the past ends later than this before the demo starts.
GAP = timedelta(minutes=1)
# How long ago a person paused Globex's usage report.
PAUSED_FOR = timedelta(hours=3)
PERSON = "operator:ada"
FREE: Mapping[Isolation, int] = {"child": 8, "inline": 0}


class ReplayClock:
    """A clock that stands where it was put; satisfies `worker.clock.Clock`."""

    def __init__(self, now: datetime) -> None:
        self.at = now

    def now(self) -> datetime:
        return self.at

    def monotonic(self) -> float:
        return self.at.timestamp()

    async def sleep(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)


@dataclass(frozen=True)
class Try:
    """What one attempt did: how it ended, after how many seconds, what it wrote and saved."""

    outcome: Outcome
    seconds: float
    lines: Sequence[tuple[str, str]] = ()
    saved: object = None
    done: int = 0


@dataclass
class Scripted:
    """A run and its attempts; the last one is repeated while the retry policy asks for another."""

    run: NewRun
    org: Organization
    row: Row
    tries: list[Try]

    def next_try(self) -> Try:
        return self.tries.pop(0) if len(self.tries) > 1 else self.tries[0]


@dataclass
class Replay:
    """Plays scripted runs in the order of time, in one transaction."""

    connection: Connection
    clock: ReplayClock
    random: random.Random
    until: datetime
    worker: WorkerId
    clients: dict[str, str] = field(default_factory=dict)
    _agenda: list[tuple[datetime, int, Callable[[], None]]] = field(default_factory=list)
    _scripts: dict[str, Scripted] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def new_id(self, at: datetime) -> str:
        """A UUIDv7 of this time, so that lists sort the run where it belongs."""
        head, number = f"{int(at.timestamp() * 1000):012x}", next(self._numbers)
        tail = f"{self.random.getrandbits(40):010x}{number & 0xFF:02x}"
        return f"{head[:8]}-{head[8:]}-7{number & 0xFFF:03x}-8{self.random.getrandbits(12):03x}-{tail}"

    def at(self, when: datetime, act: Callable[[], None]) -> None:
        if when < self.until:
            heapq.heappush(self._agenda, (when, next(self._numbers), act))

    def play(self) -> None:
        """Do everything on the agenda, and what follows from it."""
        while self._agenda:
            when, _, act = heapq.heappop(self._agenda)
            self.clock.at = when
            act()

    def fire(self, script: Scripted) -> None:
        """Make the run; it becomes a skip if an earlier one of its definition has not ended."""
        sweeps.expire_overdue(self.connection)
        report = firing.write(self.connection, [script.run])
        if report.inserted:
            self._scripts[script.run.id] = script
            self._admit(script.run.org_id)

    def was_made(self, run_id: RunId) -> bool:
        """Whether the run exists: one that overlapped another is a skip."""
        return run_id in self._scripts

    def _admit(self, org_id: OrgId) -> None:
        offered = dict.fromkeys(("http.request", "assistant.digest", "assistant.digest_v2"))
        taker = Taker(self.worker, offered, (DEFAULT_POOL,), FREE)
        admitted = statements(self.connection).admit_choose(self.connection, taker, {org_id: 8})
        for run in admitted:
            self._attempt(run, self._scripts[run.id])

    def _attempt(self, run: AdmittedRun, script: Scripted) -> None:
        attempted, trail = script.next_try(), Trail(run.handler)
        begun = self.clock.at + timedelta(milliseconds=self.random.randint(40, 180))
        if not isinstance(attempted.outcome, NoToken | Refused):
            claims = claims_of(script.org, self.clients[script.org.code], self.clock.at)
            record_claims(trail, ClaimsRecord.of(claims, None), begun)
            trail.handler_started_at = begun + timedelta(milliseconds=self.random.randint(5, 30))
            trail.peak_memory = self.random.randint(38, 61) * 1024 * 1024
        if attempted.done:
            trail.progress = {"done": attempted.done, "total": None, "note": None}
        ended_at = begun + timedelta(seconds=attempted.seconds)
        if attempted.saved is not None:
            self.at(ended_at - timedelta(seconds=attempted.seconds / 4), lambda: self._save(run, attempted))
        self.at(ended_at, lambda: self._end(run, script, attempted, trail, begun))

    def _save(self, run: AdmittedRun, attempted: Try) -> None:
        saved = json.dumps(attempted.saved)
        statements(self.connection).save_checkpoint(self.connection, run, run.handler, saved)

    def _end(self, run: AdmittedRun, script: Scripted, attempted: Try, trail: Trail, begun: datetime) -> None:
        hot, now = statements(self.connection), self.clock.at
        step = (now - begun) / (len(attempted.lines) + 1)
        hot.append_logs(
            self.connection,
            [
                LogLine(run.id, run.attempt, seq, run.org_id, begun + step * seq, level, "log", text)
                for seq, (level, text) in enumerate(attempted.lines, 1)
            ],
        )
        definition = from_spec(script.org.code, script.row["name"], script.row["spec"])
        policy = definition.retry_policy(4)
        ended = end_of(run, attempted.outcome, trail, policy, now=now, random=self.random)
        hot.finish(self.connection, self.worker, [ended])
        if isinstance(attempted.outcome, NoToken):
            self._note_dead_credential(run.org_id, now)
        if ended.state == "waiting":
            self.at(now + (ended.available_after or timedelta()), lambda: self._admit(run.org_id))

    def _note_dead_credential(self, org_id: OrgId, now: datetime) -> None:
        rows = credentials.active(self.connection, org_id)
        uses = [credentials.Use(row["id"], org_id, "invalid_client") for row in rows]
        credentials.used(self.connection, uses, at=now)


def claims_of(org: Organization, client_id: str, at: datetime) -> Claims:
    """The claims of a token that the demo's provider would have issued."""
    return Claims(
        org_code=org.code,
        client_id=client_id,
        scopes=frozenset({SCOPE}),
        properties=org.token_properties,
        flags={name: Flag("boolean", value) for name, value in org.token_flags.items()},
        issued_at=at,
        expires_at=at + timedelta(days=1),
        jti=f"{int(at.timestamp()):x}",
    )


def add(url: str, orgs_of_demo: Sequence[Organization], api_url: str, *, until: datetime) -> None:
    """Write the runs of the day before `until`, for orgs and definitions that are already there."""
    clock = ReplayClock(until - SPAN)
    database = Database.open(url, clock=clock, role="demo")
    try:
        with database.transaction() as connection:
            worker = WorkerId(_replayed(connection, clock, orgs_of_demo, api_url, until))
            clock.at = until - GAP
            workers.unregister(connection, worker)
        clock.at = until - PAUSED_FOR
        note = "waits for the new price list, see ticket 4711"
        pause_definition(database, "org_globex", "usage-report", actor=PERSON, note=note)
    finally:
        database.close()


def _replayed(
    connection: Connection,
    clock: ReplayClock,
    orgs_of_demo: Sequence[Organization],
    api_url: str,
    until: datetime,
) -> str:
    numbers = random.Random(13)  # noqa: S311 - the same story each time
    replay = Replay(connection, clock, numbers, until - GAP, WorkerId(""))
    replay.worker = WorkerId(replay.new_id(clock.at))
    workers.register(
        connection,
        replay.worker,
        lease=SPAN,
        handlers=["assistant.digest", "assistant.digest_v2", "http.request"],
        capacity={"children": 8, "inline": 0},
        host="demo",
        pid=1,
        version="yesterday",
    )
    story = PastStory(replay, api_url, night=last_night(until))
    for org in orgs_of_demo:
        org_id = orgs.require(connection, org.code)["id"]
        replay.clients[org.code] = credentials.active(connection, org_id)[0]["client_id"]
        _predate(connection, org_id, clock.at)
        for name in STEPS:
            row = definitions.find(connection, org_id, name)
            if row is not None:
                story.schedule(org, row, Handlers(connection))
    replay.play()
    return replay.worker


def _predate(connection: Connection, org_id: OrgId, at: datetime) -> None:
    """Let an org and its definitions be as old as their history; the digest of every 3 s is new."""
    mine = tables.definitions.c.org_id == org_id, tables.definitions.c.name != "support-digest"
    connection.execute(update(tables.orgs).where(tables.orgs.c.id == org_id).values(created_at=at))
    connection.execute(update(tables.definitions).where(*mine).values(created_at=at, updated_at=at))
    revisions = tables.definition_revisions
    ids = tables.definitions.select().with_only_columns(tables.definitions.c.id).where(*mine)
    connection.execute(update(revisions).where(revisions.c.definition_id.in_(ids)).values(at=at))


TRACE = """\
Traceback (most recent call last):
  File "jobs/assistant_digest.py", line 127, in digest
    return await read_knowledge_base(ctx, append_summary, agent="v1")
  File "jobs/assistant_digest.py", line 154, in read_knowledge_base
    written = await read(chat, state["digest"], page)
  File "jobs/assistant_digest.py", line 101, in append_summary
    summary = await chat.ask("Sum up these help articles.", page.as_text())
  File "jobs/assistant_digest.py", line 88, in ask
    raise PermanentError(f"the chat endpoint responded with {response.status_code}")
worker.handlers.results.PermanentError: the chat endpoint responded with 402
"""


@dataclass
class PastStory:
    """The CRM was down at night, a digest broke halfway, a secret died, and a token was of another org."""

    replay: Replay
    api_url: str
    night: datetime

    def schedule(self, org: Organization, row: Row, handlers: Handlers) -> None:
        """Put every scheduled time of a definition on the agenda, and what people did about it."""
        step = STEPS[row["name"]]
        at = first_of(row["name"], self.replay.clock.at, self.night)
        is_paused = (org.name, row["name"]) == ("Globex", "usage-report")
        until = self.replay.until - (PAUSED_FOR if is_paused else timedelta())
        while at < until:
            script = self._script(org, row, handlers, at)
            self.replay.at(at, lambda script=script: self.replay.fire(script))  # type: ignore[misc]
            at += step

    def _script(self, org: Organization, row: Row, handlers: Handlers, at: datetime) -> Scripted:
        definition = from_spec(org.code, row["name"], row["spec"])
        run = new_run(row, definition, handlers, origin="schedule", scheduled_for=at, at=at)
        id_ = RunId(self.replay.new_id(at))
        start_by = at + max(STEPS[row["name"]], timedelta(hours=1))
        run = replace(run, id=id_, idempotency_key=id_, start_by=start_by)
        script = Scripted(run, org, row, self._tries(org, row["name"], at))
        if org.name == "Globex" and isinstance(script.tries[0].outcome, Failed):
            self.replay.at(
                self.night + timedelta(hours=3) + (at - self.night) / 20, lambda: self._retry(script)
            )
        return script

    def _tries(self, org: Organization, name: str, at: datetime) -> list[Try]:
        since = at - self.night
        if org.name == "Initech" and since >= timedelta(hours=2):
            detail = (
                f"credentials_rejected: issuer main rejects the credentials of org {org.code} (generation 1)"
            )
            return [Try(NoToken(timedelta(minutes=15), detail), 0.2)]
        if org.name == "Umbrella" and since >= timedelta(hours=4):
            message = "the token is for the org 'org_acme', not for org_umbrella"
            return [Try(Refused("org_mismatch", "other_org", message), 0.2)]
        if name == "nightly-digest":
            return self._digest(org, at)
        if name == "crm-sync" and self._is_down(org, since):
            return [self._request(503)]
        if name == "usage-report" and org.name == "Acme" and timedelta(hours=1) > since >= timedelta():
            return [Try(Cancelled("requested"), 412.0, [("info", "asking for 41,306 rows of usage")])]
        if name == "usage-report" and org.name == "Globex" and timedelta(hours=1) > since >= timedelta():
            return [Try(Lost("worker demo:1 stopped renewing its lease"), 31.0), self._request(200)]
        return [self._request(200)]

    def _is_down(self, org: Organization, since: timedelta) -> bool:
        return org.name in ("Acme", "Globex") and timedelta(hours=1) <= since < timedelta(hours=2)

    def _request(self, status: int) -> Try:
        url = f"{self.api_url}/v1/collections/faq/articles"
        line = ("info", f"GET {url} returned {status}")
        if status == 200:
            body = {"articles": 7, "next": None}
            outcome: Outcome = Succeeded(json.dumps({"status": status, "body": body}))
            return Try(outcome, self.replay.random.uniform(0.6, 9.0), [line])
        error = Error("UnexpectedAnswer", f"GET {url} returned {status}")
        return Try(Failed(error), self.replay.random.uniform(2.0, 12.0), [line])

    def _digest(self, org: Organization, at: datetime) -> list[Try]:
        pages = [("info", f"page {number} of the knowledge base is summed up") for number in range(1, 8)]
        if org.name == "Acme" and at >= self.night:
            saved = {"next": 3, "articles": 3, "digest": "Passwords are reset under Security."}
            error = Error("PermanentError", "the chat endpoint responded with 402", TRACE)
            return [Try(Failed(error, permanent=True), 140.0, pages[:3], saved, done=3)]
        result = {"agent": "v1", "articles": 7, "digest": "Seven articles, none out of date."}
        seconds = self.replay.random.uniform(300, 2200)
        return [Try(Succeeded(json.dumps(result)), seconds, pages, done=7)]

    def _retry(self, script: Scripted) -> None:
        """A person runs a failed one again; it succeeds."""
        if not self.replay.was_made(script.run.id):
            return
        old, now = script.run, self.replay.clock.at
        id_ = RunId(self.replay.new_id(now))
        new = replace(
            old,
            id=id_,
            origin="retry",
            retry_of=old.id,
            available_at=now,
            created_by=PERSON,
            start_by=None,
            serial=False,
        )
        detail = {"retry_of": old.id, "from_checkpoint": False, "reason": "the CRM is back"}
        audit.note(self.replay.connection, old.org_id, "run.retry", id_, detail, at=now, actor=PERSON)
        self.replay.fire(Scripted(new, script.org, script.row, [self._request(200)]))


# How often each replayed definition is due. The replayed day begins before the night.
STEPS = {
    "crm-sync": timedelta(minutes=15),
    "usage-report": timedelta(hours=1),
    "nightly-digest": timedelta(days=1),
}


def first_of(name: str, start: datetime, night: datetime) -> datetime:
    """A definition's first scheduled time in the replayed day, which begins at `start`."""
    match name:
        case "crm-sync":
            return start.replace(minute=start.minute // 15 * 15, second=0, microsecond=0) + STEPS[name]
        case "usage-report":
            return start.replace(minute=5, second=0, microsecond=0) + STEPS[name]
    return night
