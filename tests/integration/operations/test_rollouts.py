"""Rollouts: versions of runs, their comparison by org, the halt with its evidence, and what people do."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from random import Random
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from tests.conftest import on_either
from tests.fakes.clock import ManualClock, settle
from tests.fakes.rows import reading, within
from worker.errors import Conflict, DefinitionError
from worker.features.rollouts import evaluation
from worker.features.rollouts.evaluation import Evaluation, Passed, evaluate
from worker.features.rollouts.operations import advance, move, plan_steps
from worker.ids import OrgId, RunId, WorkerId, new_id, new_id_at
from worker.model.definitions.file import parse_file
from worker.model.prices import ModelUsage, OwnPrice, Prices
from worker.model.rollouts.rollout import Rollout, VersionAsk, place_of
from worker.operations.apply import apply as apply_file
from worker.store import rollout_sums, rollouts, spending, tables
from worker.store.database import Database
from worker.store.lists.rollouts import rollout as shown
from worker.store.prices import ModelUse
from worker.store.spending import Spend

ROLLOUT = """
[[template]]
name = "digest"
orgs = "all"
handler = "acme.plain"
schedule = "@daily"

[[rollout]]
name = "digest-v2"
definitions = "digest"
from = "acme.plain"
to = "acme.also"
orgs = {{ tags = ["pro"] }}
flag = "agent-v2"
steps = ["25%", "50%", "100%"]
auto = {auto}
watch = {{ failed = "+2 points", refused = "+1 point" }}
"""
ORG = '[[org]]\ncode = "org_{0}"\nissuer = "main"\ntags = ["{1}"]\n'


@dataclass
class Site:
    """A database with a rollout over many orgs, whose runs a test makes."""

    database: Database
    clock: ManualClock
    random: Random

    @property
    def row(self) -> dict[str, Any]:
        return reading(self.database, rollouts.require, "digest-v2")

    @property
    def rollout(self) -> Rollout:
        return Rollout.of(self.row)

    def definitions(self) -> dict[OrgId, Any]:
        table = tables.definitions
        with self.database.autocommit() as connection:
            return {org: id_ for id_, org in connection.execute(select(table.c.id, table.c.org_id))}

    def insert_runs(
        self, which: list[tuple[OrgId, Any]], *, finished: bool = False, **more: Any
    ) -> list[RunId]:
        """Runs of these orgs: ended with 3 % failures, or running under fencing token 1."""
        at, ids, runs, live = self.clock.now(), [], [], []
        for org_id, definition_id in which:
            run_id = RunId(new_id_at(at))
            ids.append(run_id)
            both = {
                "id": run_id,
                "org_id": org_id,
                "definition_id": definition_id,
                "revision": 1,
                "handler": "acme.plain",
                "origin": "manual",
                "scheduled_for": at,
                "idempotency_key": new_id(),
                **more,
            }
            state = ("failed" if self.random.random() < 0.03 else "succeeded") if finished else None
            ended = {"state": state, "reason": "error" if state == "failed" else None}
            ended |= {"started_at": at, "finished_at": at if finished else None}
            runs.append(both | ended | {"created_at": at})
            if not finished:
                owned = {"isolation": "child", "serial": False, "state": "running", "available_at": at}
                owned |= {"worker_id": WorkerId(new_id()), "fencing_token": 1, "started_at": at}
                live.append(both | owned)
        with self.database.transaction() as connection:
            connection.execute(insert(tables.runs), runs)
            if live:
                connection.execute(insert(tables.live_runs), live)
        return ids

    def versions(
        self, ids: list[RunId], which: list[tuple[OrgId, Any]], **changed: Any
    ) -> dict[RunId, tuple[str, str]]:
        """What `keep_versions` gives these runs: handler and side."""
        asked = [
            VersionAsk(id_, 1, 1, "manual", org_id, self.rollout.id, True, None)._replace(**changed)
            for id_, (org_id, _) in zip(ids, which, strict=True)
        ]
        found = within(self.database, rollouts.keep_versions, asked)
        return {ask.run_id: tuple(version) for ask, version in found.items()}

    def end(self, ids: list[RunId], fails: Callable[[RunId], float], **ended: Any) -> None:
        at, runs, live = self.clock.now(), tables.runs, tables.live_runs
        with self.database.transaction() as connection:
            bad = {id_ for id_ in ids if self.random.random() < fails(id_)}
            for some, state in ((bad, "failed"), (set(ids) - bad, "succeeded")):
                values = {"state": state, "reason": "error" if some is bad else None, "finished_at": at}
                connection.execute(update(runs).where(runs.c.id.in_(some)).values(**{**values, **ended}))
            connection.execute(live.delete().where(live.c.id.in_(ids)))

    def round(self, *, worse: float) -> None:
        """A run of each org: 3 % fail, of the new version `worse` more."""
        which = list(self.definitions().items())
        ids = self.insert_runs(which)
        sides = self.versions(ids, which)
        self.end(ids, lambda id_: 0.03 + (worse if id_ in sides and sides[id_][1] == "to" else 0.0))

    def evaluate(self) -> None:
        while evaluate(self.database, self.rollout.id).again:
            pass


@pytest.fixture
def site(database: Database, clock: ManualClock) -> Site:
    return Site(database, clock, Random(7))


def begin(
    site: Site,
    *,
    orgs: int = 120,
    auto: str = "false",
    history: int = 10,
    file: str = ROLLOUT,
    start: bool = True,
) -> None:
    text = file.format(auto=auto) + "".join(
        ORG.format(number, "pro" if number % 20 else "free") for number in range(orgs)
    )
    apply_file(site.database, parse_file(text), actor="anna")
    for _ in range(history):
        site.clock.advance(3600)
        site.insert_runs(list(site.definitions().items()), finished=True)
    site.clock.advance(3600)
    if start:
        advance(site.database, "digest-v2", actor="anna")


@on_either
def test_a_version_is_decided_once_and_kept(site: Site):
    begin(site, orgs=60)
    which = list(site.definitions().items())
    ids = site.insert_runs(which)

    first = site.versions(ids, which)
    again = site.versions(ids, which, attempt=2)
    move(site.database, "digest-v2", "halt", reason="a test", actor="ben")
    after_halt = site.versions(ids, which)
    new = site.insert_runs(which)
    later = site.versions(new, which)

    assert {side for _, side in first.values()} == {"from", "to"}
    assert all(handler == ("acme.also" if side == "to" else "acme.plain") for handler, side in first.values())
    assert first == again == after_halt
    assert set(later.values()) == {("acme.plain", "from")}
    with site.database.autocommit() as connection:
        stored = connection.execute(select(tables.run_versions.c.run_id)).scalars().all()
    assert sorted(stored) == sorted([*ids, *new])


@on_either
def test_a_run_that_another_worker_owns_gets_no_version(site: Site):
    begin(site, orgs=20)
    which = list(site.definitions().items())
    ids = site.insert_runs(which)

    assert site.versions(ids, which, fencing_token=2) == {}
    # The control: with the token that they run under.
    assert len(site.versions(ids, which)) == len(which)


def test_a_run_that_was_lost_before_its_start_gets_its_version_at_its_next_attempt(site: Site):
    begin(site, orgs=30)
    site.clock.advance(60)
    which = list(site.definitions().items())
    ids = site.insert_runs(which)

    assert {side for _, side in site.versions(ids, which, attempt=2).values()} == {"from", "to"}


def test_an_org_moves_with_the_first_step_above_its_place_and_stays(site: Site):
    begin(site, orgs=60)
    which = list(site.definitions().items())
    sides: dict[OrgId, list[str]] = {org_id: [] for org_id, _ in which}
    for step in range(3):
        if step:
            advance(site.database, "digest-v2", anyway=True, actor="anna")
        ids = site.insert_runs(which)
        found = site.versions(ids, which)
        for id_, (org_id, _) in zip(ids, which, strict=True):
            sides[org_id].append(found[id_][1])

    places = {org_id: place_of(site.rollout.id, org_id) for org_id, _ in which}
    for org_id, seen in sides.items():
        assert seen == ["to" if places[org_id] < share else "from" for share in (0.25, 0.5, 1.0)]


@pytest.mark.parametrize(
    ("changed", "side", "why", "compared"),
    [
        ({"flag_on": False}, "from", "flag", False),
        ({"stored": "acme.also"}, "to", "stored", False),
        ({"stored": "acme.plain"}, "from", "stored", False),
        # It began before the rollout did.
        ({"attempt": 2}, "from", "stored", False),
        ({"origin": "retry"}, None, "step", False),
        ({"origin": "backfill"}, None, "step", False),
        ({}, None, "step", True),
    ],
)
def test_why_a_run_gets_its_version(site: Site, changed: Any, side: str | None, why: str, compared: bool):
    begin(site, orgs=30)
    which = list(site.definitions().items())
    site.versions(site.insert_runs(which), which, **changed)

    table = tables.run_versions
    with site.database.autocommit() as connection:
        rows = connection.execute(select(table.c.side, table.c.why, table.c.compared)).all()
    assert {row.why for row in rows} == {why}
    assert {row.compared for row in rows} == {compared}
    assert {row.side for row in rows} == ({side} if side else {"from", "to"})


@on_either
def test_a_worse_version_halts_and_its_evidence_is_a_recount(site: Site):
    begin(site, orgs=160)
    rounds = 0
    while site.row["state"] == "running" and rounds < 60:
        site.clock.advance(600)
        site.round(worse=0.25)
        site.evaluate()
        rounds += 1

    row = site.row
    assert (row["state"], row["halted_by"]) == ("halted", "worker")
    assert row["evidence"]["halted_by"] == ["failed"]
    # A recount from the runs themselves.
    runs, versions = tables.runs, tables.run_versions
    query = (
        select(versions.c.side, runs.c.org_id, runs.c.state)
        .join(versions, versions.c.run_id == runs.c.id)
        .where(versions.c.compared, runs.c.state.is_not(None), versions.c.step == row["evidence"]["step"])
    )
    counted: dict[str, dict[str, Any]] = {}
    with site.database.autocommit() as connection:
        for side, org_id, state in connection.execute(query):
            of = counted.setdefault(side, {"orgs": set(), "runs": 0, "failed": 0})
            of["orgs"].add(org_id)
            of["runs"] += 1
            of["failed"] += state == "failed"
    totals = row["evidence"]["totals"]
    for side, of in counted.items():
        assert totals[side]["orgs"] == len(of["orgs"])
        assert totals[side]["metrics"]["failed"] == {"runs": of["runs"], "total": of["failed"]}
    # Runs that start later have the old version, and an audit row says why.
    which = list(site.definitions().items())
    assert {side for _, side in site.versions(site.insert_runs(which), which).values()} == {"from"}
    with site.database.autocommit() as connection:
        audit = tables.audit.c
        halts = connection.execute(select(audit.actor).where(audit.action == "rollout.halt")).scalars().all()
    assert halts == ["worker"]
    detail = reading(site.database, shown, "digest-v2")
    assert detail["metrics"]["failed"]["exceeds"] is True
    assert detail["orgs_moved"] == totals["to"]["orgs"]
    assert {day["side"] for day in detail["days"]} == {"from", "to"}


def test_a_version_that_is_no_worse_does_not_halt(site: Site):
    begin(site, orgs=120)
    for _ in range(12):
        site.clock.advance(600)
        site.round(worse=0.0)
        site.evaluate()

    assert site.row["state"] == "running"
    assert site.row["verdict"]["failed"]["effect"] is not None


def test_faults_of_issuers_and_workers_count_on_neither_side(site: Site):
    begin(site, orgs=120)
    which = list(site.definitions().items())
    for state, reason in (("refused", "token_invalid"), ("failed", "lost"), ("skipped", "expired")):
        ids = site.insert_runs(which)
        site.versions(ids, which)
        site.end(ids, lambda id_: 0.0, state=state, reason=reason)
    site.evaluate()

    assert rollout_sums.totals(reading(site.database, rollout_sums.compared, None, site.rollout.id)) == {
        "from": {"orgs": 0, "metrics": {}},
        "to": {"orgs": 0, "metrics": {}},
    }
    # The control: an error of the handler counts.
    ids = site.insert_runs(which)
    site.versions(ids, which)
    site.end(ids, lambda id_: 1.0)
    site.evaluate()
    runs = reading(site.database, rollout_sums.compared, None, site.rollout.id)
    assert sum(one.after["failed"].total for one in runs) == len(which)


MODEL = Prices(own=[OwnPrice("m", {"input": Fraction(1)})])


def spend(site: Site, which: list[tuple[RunId, OrgId]], meter: str, amount: int) -> None:
    """Tokens of a model, which cost money, or what runs spend of another meter."""
    definitions = site.definitions()
    given = [(id_, org_id, definitions[org_id], meter, "1:1") for id_, org_id in which]
    usage = ModelUsage(None, "m", (("input", amount),))
    with site.database.transaction() as connection:
        now = site.database.now(connection)
        spends = [Spend(*each, amount) for each in given]
        used = [ModelUse(*each[:3], "1:1", usage) for each in given if meter == "tokens"]
        spending.record(connection, spends, now, used, MODEL)


@on_either
@pytest.mark.parametrize(
    ("metric", "allowed", "values", "ratio"),
    [
        ("money", "1.3x", ({"tokens": 100}, {"tokens": 300}), 3.0),
        ("pages", "1.3x", ({"pages": 2}, {"pages": 6}), 3.0),
        ("score", "0.9x", ({"score": 0.9}, {"score": 0.5}), 0.556),
    ],
)
def test_a_version_that_costs_more_or_scores_less_is_halted(
    site: Site, metric: str, allowed: str, values: tuple[dict[str, Any], dict[str, Any]], ratio: float
):
    """`money` is what requests to models cost by the prices, and `score` is in what the handler returns."""
    watch = f'watch = {{{{ failed = "+2 points", {metric} = "{allowed}" }}}}'
    begin(site, orgs=80, history=0, file=re.sub(r"watch = .*", watch, ROLLOUT), start=False)
    which = list(site.definitions().items())
    rounds = 0
    while site.row["state"] in ("planned", "running") and rounds < 40:
        if rounds == 6:
            advance(site.database, "digest-v2", actor="anna")
        site.clock.advance(600)
        ids = site.insert_runs(which)
        sides = site.versions(ids, which) if rounds >= 6 else {}
        for of_side, given in zip(("from", "to"), values, strict=True):
            mine = [id_ for id_ in ids if sides.get(id_, ("", "from"))[1] == of_side]
            orgs = dict(zip(ids, (org_id for org_id, _ in which), strict=True))
            for name, value in given.items():
                if name != "score":
                    spend(site, [(id_, orgs[id_]) for id_ in mine], name, value)
            site.end(mine, lambda id_: 0.0, result=given)
        if rounds >= 6:
            site.evaluate()
        rounds += 1

    row = site.row
    assert (row["state"], (row["evidence"] or {}).get("halted_by")) == ("halted", [metric])
    found = row["verdict"][metric]
    assert (found["unit"], found["effect"]) == ("x", pytest.approx(ratio, rel=0.02))
    assert row["verdict"]["failed"]["exceeds"] is False


@on_either
@pytest.mark.parametrize("score", [1e200, 1e-200])
def test_scores_of_one_org_do_not_end_the_evaluation(site: Site, score: float):
    """The square of the large one is infinite, and that of the small one is zero."""
    watch = 'watch = {{ score = "0.9x" }}'
    begin(site, orgs=120, history=0, file=re.sub(r"watch = .*", watch, ROLLOUT), start=False)
    which = list(site.definitions().items())
    for number in range(12):
        if number == 6:
            advance(site.database, "digest-v2", actor="anna")
        site.clock.advance(600)
        ids = site.insert_runs(which)
        if number >= 6:
            site.versions(ids, which)
        site.end(ids[1:], lambda id_: 0.0, result={"score": 0.5})
        site.end(ids[:1], lambda id_: 0.0, result={"score": score})
        if number >= 6:
            site.evaluate()

    verdict = site.row["verdict"]["score"]
    assert verdict["exceeds"] is False
    assert verdict["effect"] == pytest.approx(1.0, abs=0.01)


async def test_a_pass_that_has_begun_ends_before_its_worker_does(clock: ManualClock):
    """A halt that is stored and not reported would raise no alert."""
    stored, reported = asyncio.Event(), asyncio.Event()

    class Passes:
        def evaluated(self) -> list[str]:
            return ["r1"]

        async def run(self, *work: Any) -> Passed:
            await stored.wait()
            reported.set()
            return Passed(halted=True)

    passes: Any = Passes()
    loop = asyncio.create_task(Evaluation(passes, passes, clock, 1.0).run())
    await settle()
    loop.cancel()
    await settle()
    stored.set()
    await asyncio.wait({loop})

    assert loop.cancelled()
    assert reported.is_set()


def test_what_children_spend_is_of_their_parent(site: Site):
    begin(site, orgs=2, history=0)
    [(org_id, definition), *_] = site.definitions().items()
    [id_] = site.insert_runs([(org_id, definition)])
    spend(site, [(id_, org_id)], "pages", 2)
    with site.database.transaction() as connection:
        tree = {"run_id": id_, "meter": "pages", "org_id": org_id, "used": 5}
        connection.execute(insert(tables.tree_spends).values(**tree))

    found = reading(site.database, rollout_sums._spends_of, {"pages": "1.3x"}, [id_])

    assert found == {id_: {"pages": 7}}


def test_each_run_counts_once_whoever_looks(site: Site):
    begin(site, orgs=80)
    site.clock.advance(60)
    site.round(worse=0.0)
    site.evaluate()
    before = reading(site.database, rollout_sums.compared, None, site.rollout.id)
    site.evaluate()

    assert reading(site.database, rollout_sums.compared, None, site.rollout.id) == before
    assert sum(one.after["failed"].runs for one in before) == 80


def test_a_side_without_runs_alerts_and_makes_nothing_ready(site: Site, monkeypatch: pytest.MonkeyPatch):
    begin(site, orgs=80)
    said: list[tuple[str, Any]] = []
    monkeypatch.setattr(evaluation, "emit", lambda name, **fields: said.append((name, fields)))
    site.clock.advance(60)
    site.round(worse=0.0)
    site.evaluate()
    for _ in range(3):
        site.clock.advance(86_400)
        which = list(site.definitions().items())
        ids = site.insert_runs(which)
        sides = site.versions(ids, which)
        site.end([id_ for id_ in ids if sides[id_][1] == "from"], lambda id_: 0.0)
        site.evaluate()

    assert said == [("rollout.stalled", {"rollout": "digest-v2", "side": "to"})]
    assert (site.row["state"], site.row["ready"]) == ("running", False)


@on_either
def test_people_move_a_rollout_with_a_reason(site: Site):
    begin(site, orgs=20)
    with pytest.raises(Conflict, match="has not shown yet"):
        advance(site.database, "digest-v2", actor="anna")
    assert advance(site.database, "digest-v2", anyway=True, reason="small", actor="anna")["step"] == 2
    assert move(site.database, "digest-v2", "halt", reason="bad", actor="ben")["halted_by"] == "ben"
    with pytest.raises(Conflict, match="is halted"):
        advance(site.database, "digest-v2", actor="anna")
    resumed = move(site.database, "digest-v2", "resume", reason="fixed", actor="ben")
    assert (resumed["state"], resumed["step"]) == ("running", 2)
    assert move(site.database, "digest-v2", "finish", reason="good", actor="ben")["state"] == "finished"
    which = list(site.definitions().items())
    assert {side for _, side in site.versions(site.insert_runs(which), which).values()} == {"to"}
    assert move(site.database, "digest-v2", "undo", reason="no", actor="ben")["state"] == "undone"
    with pytest.raises(Conflict, match="is undone"):
        move(site.database, "digest-v2", "resume", reason="no", actor="ben")

    audit = tables.audit.c
    with site.database.autocommit() as connection:
        rows = connection.execute(
            select(audit.action, audit.detail).where(audit.subject == "digest-v2").order_by(audit.id)
        ).all()
    assert [row.action.partition(".")[2] for row in rows] == [
        *("add", "advance", "advance", "halt", "resume", "finish", "undo"),
    ]
    assert [row.detail.get("reason") for row in rows[2:]] == ["small", "bad", "fixed", "good", "no"]


def test_a_rollout_to_a_handler_that_nobody_offers_does_not_begin(site: Site):
    for handler in ("acme.absent", "acme.broken"):
        text = ROLLOUT.format(auto="false").replace("acme.also", handler).replace("digest-v2", handler)
        apply_file(site.database, parse_file(text), actor="anna")
        with pytest.raises(Conflict, match="no worker or host offers"):
            advance(site.database, handler, actor="anna")
        move(site.database, handler, "undo", reason="absent", actor="anna")


@pytest.mark.parametrize(
    ("found", "instead"), [('"digest"', '"digset"'), ('"acme.plain"', '"acme.pln"'), ('["pro"]', '["none"]')]
)
def test_a_rollout_of_no_orgs_does_not_begin(site: Site, found: str, instead: str):
    head, _, entry = ROLLOUT.format(auto="false").partition("[[rollout]]")
    text = f"{head}[[rollout]]{entry.replace(found, instead)}" + ORG.format(1, "pro")
    apply_file(site.database, parse_file(text), actor="anna")

    with pytest.raises(Conflict, match="rollout digest-v2 has no orgs"):
        advance(site.database, "digest-v2", actor="anna")

    assert (site.row["state"], site.row["began_at"]) == ("planned", None)


@on_either
def test_a_plan_says_what_each_step_needs(site: Site):
    begin(site, orgs=120, history=20)

    first, second, last = reading(site.database, plan_steps, "digest-v2")

    assert first["orgs"] < second["orgs"] < last["orgs"] == 114
    assert (last["days"], last["note"]) == (None, "no org is left to compare with")
    assert second["runs_per_day"] == pytest.approx(second["orgs"] * 20 / 28, abs=0.1)


def test_apply_refuses_what_would_become_another_rollout(site: Site):
    begin(site, orgs=5)
    text = ROLLOUT.format(auto="false")

    assert apply_file(site.database, parse_file(text), actor="anna") == []
    [change] = apply_file(site.database, parse_file(ROLLOUT.format(auto="true")), actor="anna")
    assert change.fields == {"auto": (False, True)}
    with pytest.raises(DefinitionError, match="it has begun"):
        apply_file(site.database, parse_file(text.replace("25%", "5%")), actor="anna")
    with pytest.raises(DefinitionError, match="digest-v2 is for the same definitions"):
        other = text[text.index("[[rollout]]") :].replace("digest-v2", "other")
        apply_file(site.database, parse_file(other), actor="anna")


def test_auto_begins_the_next_step_once_it_has_shown_what_it_must(
    site: Site, monkeypatch: pytest.MonkeyPatch
):
    begin(site, orgs=80, auto="true")
    monkeypatch.setattr("worker.model.rollouts.verdict.shows", lambda *given, **named: True)
    site.clock.advance(60)
    site.round(worse=0.0)
    site.evaluate()
    assert site.row["step"] == 1
    site.clock.advance(timedelta(days=1).total_seconds())
    site.round(worse=0.0)
    site.evaluate()

    assert (site.row["state"], site.row["step"]) == ("running", 2)
    runs = reading(site.database, rollout_sums.compared, None, site.rollout.id)
    assert runs == []
