"""`apply` of limits: idempotent, all or nothing, audited; and their removal."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import select

from tests.conftest import on_either
from tests.fakes.rows import reading, within
from tests.fakes.site import one_definition
from worker.diagnosis.why import why
from worker.errors import DefinitionError, NotFound
from worker.features.egress.limits import remove_limit
from worker.ids import ALL_ORGS, new_id
from worker.model.definitions.file import parse_file
from worker.model.definitions.limits import LimitEntry
from worker.model.limits import Ask, BucketKey
from worker.model.orgs import OrgEntry
from worker.model.runs.clauses import sentence
from worker.operations.apply import apply as apply_file
from worker.operations.orgs import add_org, set_org_state
from worker.operations.runs import run_now
from worker.store import limits, tables
from worker.store.database import Database
from worker.store.limits import Pause
from worker.store.lists import LIMITS, read
from worker.store.lists.limits import limit, waiting_for

OPENAI = """
[[limit]]
origin = "https://api.openai.com/"
per = "org"
rate = "40/s"
concurrent = 8
max_wait = "15s"

[[limit]]
origin = "https://API.openai.com"
per = "all"
rate = "1000/m"
"""


@pytest.fixture
def org_id(database: Database) -> str:
    return add_org(database, OrgEntry("org_acme", "Acme", "main"), actor="ops")["id"]


def changes(database: Database, text: str, **options) -> list[tuple[str, str, str]]:
    found = apply_file(database, parse_file(text), actor="anna", **options)
    return [(each.kind, each.action, each.name) for each in found]


def audited(database: Database) -> list[tuple[str, str, str]]:
    audit = tables.audit.c
    with database.autocommit() as connection:
        rows = connection.execute(select(audit.actor, audit.action, audit.subject).order_by(audit.id))
        return [tuple(row) for row in rows if row.action.startswith("limit.")]


@on_either
def test_apply_adds_limits_once(database: Database):
    dry = changes(database, OPENAI, dry_run=True)
    first, again = changes(database, OPENAI), changes(database, OPENAI)

    assert (
        dry
        == first
        == [
            ("limit", "add", "https://api.openai.com per org"),
            ("limit", "add", "https://api.openai.com per all"),
        ]
    )
    assert again == []
    assert audited(database) == [
        ("anna", "limit.add", "https://api.openai.com per org"),
        ("anna", "limit.add", "https://api.openai.com per all"),
    ]
    listed = reading(database, read.read, LIMITS, ALL_ORGS)
    assert [(row["per"], row["rate"], row["burst"], row["max_wait"]) for row in listed] == [
        ("all", "1000/m", 17, "10s"),
        ("org", "40/s", 40, "15s"),
    ]


def test_apply_changes_the_limit_of_that_origin_and_per(database: Database):
    changes(database, OPENAI)
    before = reading(database, limits.every)

    found = apply_file(database, parse_file(OPENAI.replace("40/s", "20/s")), actor="ben")

    after = reading(database, limits.every)
    assert [each.fields for each in found] == [{"rate": ("40/s", "20/s"), "burst": (40, 20)}]
    org = ("https://api.openai.com", "org")
    assert after[org]["id"] == before[org]["id"]
    assert after[org]["updated_by"] == "ben"


def test_apply_changes_nothing_if_one_entry_is_wrong(database: Database):
    wrong = OPENAI + '[[definition]]\norg = "absent"\nname = "x"\nhandler = "x"\nschedule = "@daily"\n'

    with pytest.raises(DefinitionError):
        changes(database, wrong)

    assert reading(database, limits.every) == {}


@pytest.mark.parametrize(
    ("entry", "field", "problem"),
    [
        ('per = "org"\nrate = "1/s"', "origin", "origin is missing"),
        ('origin = "https://x.example"\nrate = "1/s"', "per", "per is missing"),
        ('origin = "https://x.example"\nper = "day"\nrate = "1/s"', "per", "not one of org, all"),
        ('origin = "https://x.example"\nper = "org"', "rate", "limits nothing"),
        ('origin = "https://x.example/v1"\nper = "org"\nrate = "1/s"', "origin", "not an origin"),
        ('origin = "https://*.x.example"\nper = "org"\nrate = "1/s"', "origin", "not an origin"),
        ('origin = "https://x.example"\nper = "org"\nrate = "1/d"', "rate", "write 40/s"),
        (
            'origin = "https://x.example"\nper = "org"\nconcurrent = 1\nburst = 2',
            "burst",
            "belongs to a rate",
        ),
        ('origin = "https://x.example"\nper = "org"\nconcurrent = 0', "concurrent", "not between"),
        (
            'origin = "https://x.example"\nper = "org"\nrate = "1/s"\nmax_wait = "2h"',
            "max_wait",
            "longer than 1h",
        ),
        ('origin = "https://x.example"\nper = "org"\nrates = "1/s"', "rates", "unknown key"),
    ],
)
def test_what_is_wrong_with_a_limit(entry: str, field: str, problem: str):
    with pytest.raises(DefinitionError, match=problem) as caught:
        parse_file(f"[[limit]]\n{entry}\n")

    assert caught.value.field == field
    assert caught.value.entry.startswith("limit number 1")


def test_an_origin_has_one_limit_of_each_per():
    text = OPENAI + '[[limit]]\norigin = "https://api.openai.com:443"\nper = "all"\nrate = "1/s"\n'

    with pytest.raises(DefinitionError, match="appear twice"):
        parse_file(text)


def test_the_defaults_of_an_entry():
    [entry] = parse_file('[[limit]]\norigin = "http://10.0.0.1:8080"\nper = "org"\nrate = "90/m"\n').limits

    assert entry == LimitEntry("http://10.0.0.1:8080", "org", "90/m", 2, None, timedelta(seconds=10))


@on_either
def test_a_limit_is_shown_with_what_is_used_and_removed_with_it(database: Database, org_id: str):
    changes(database, OPENAI)
    row = reading(database, limits.every)["https://api.openai.com", "org"]
    key = BucketKey(row["id"], org_id)
    within(database, limits.add_rows, [key])
    within(database, limits.share, [("a", Ask(key, 60, slots=9))])
    within(database, limits.pause, [Pause(org_id, "https://api.openai.com", 20)])

    shown = reading(database, limit, "https://api.openai.com", "org")
    waits = reading(database, waiting_for, org_id)

    assert shown["used"] == [{"org": "org_acme", "tokens": 0.0, "waiting": 4, "slots": 8}]
    assert [pause["org"] for pause in shown["pauses"]] == ["org_acme"]
    assert waits == [
        "the limit of https://api.openai.com per org (40/s)",
        "https://api.openai.com, which asked for a pause",
    ]

    removed = remove_limit(database, "https://api.openai.com", "org", actor="anna")

    assert removed["rate"] == "40/s"
    assert audited(database)[-1] == ("anna", "limit.remove", "https://api.openai.com per org")
    with pytest.raises(NotFound):
        remove_limit(database, "https://api.openai.com", "org", actor="anna")


def test_why_names_the_limits_that_requests_of_the_org_of_a_running_run_wait_for(
    database: Database, apply, rows
):
    apply(one_definition())
    run = run_now(database, "org_acme", "digest", actor="ops")
    rows.set_running(run["id"])
    within(database, limits.pause, [Pause(rows.orgs[0]["id"], "https://api.openai.com", 20)])

    found = reading(database, why, run["id"])

    text = "requests of its org wait for https://api.openai.com, which asked for a pause"
    assert text in sentence(found)


def test_nothing_of_an_org_that_is_removed_stays(database: Database, org_id: str, rows):
    changes(database, OPENAI)
    row = reading(database, limits.every)["https://api.openai.com", "org"]
    within(database, limits.add_rows, [BucketKey(row["id"], org_id)])
    within(database, limits.pause, [Pause(org_id, "https://api.openai.com", 20)])
    assert (len(rows.limit_shares), len(rows.origin_pauses)) == (1, 1)

    set_org_state(database, "org_acme", "removed", actor="ops")

    assert (rows.limit_shares, rows.origin_pauses) == ([], [])
    assert len(rows.limits) == 2


def test_a_share_of_no_limit_is_not_stored(database: Database, org_id: str):
    within(database, limits.add_rows, [BucketKey(new_id(), org_id)])

    with database.autocommit() as connection:
        assert connection.execute(select(tables.limit_shares.c.id)).all() == []
