"""Templates: one definition for every org that is meant, now and later, batch by batch."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import select, update

from tests.conftest import on_either
from tests.fakes.closing import close_definition
from tests.fakes.rows import reading
from worker.errors import Conflict, DefinitionError, NotFound
from worker.ids import ALL_ORGS
from worker.model.definitions.file import parse_file
from worker.model.orgs import OrgEntry
from worker.operations import templates as module
from worker.operations.apply import apply as apply_file
from worker.operations.definitions import pause_definition
from worker.operations.orgs import add_org, import_orgs, set_org_state
from worker.operations.templates import close_template, materialise
from worker.store import audit, tables
from worker.store.database import Database
from worker.store.lists import DEFINITIONS, TEMPLATES, Page
from worker.store.lists import read as lists

TEMPLATE = """
[[template]]
name = "export"
orgs = { tags = ["pro"] }
handler = "acme.plain"
schedule = "@hourly"
"""


def org(code: str, *tags: str, issuer: str = "main") -> str:
    return f'[[org]]\ncode = "{code}"\nissuer = "{issuer}"\ntags = {list(tags)}\n'


def made(database, state: str | None = None) -> dict[str, tuple[str, str, int]]:
    """By org: schedule, template and revision of what it has."""
    rows = reading(database, lists.read, DEFINITIONS, ALL_ORGS, Page(state=state, limit=1000))
    return {row["org"]: (row["schedule"], row["template"], row["revision"]) for row in rows}


def template(database, name: str = "export"):
    return reading(database, lists.template, ALL_ORGS, name)


def carry_on(database) -> int:
    """As the workers' chore does; how many batches it took."""
    batches = 0
    while materialise(database).orgs:
        batches += 1
    return batches


@pytest.mark.parametrize(
    ("selector", "meant"),
    [
        ('"all"', {"org_a", "org_b", "org_c"}),
        ('{ tags = ["pro"] }', {"org_a", "org_b"}),
        ('{ tags = ["pro", "eu"] }', {"org_b"}),
        ('{ issuer = "other" }', {"org_c"}),
    ],
)
def test_a_template_makes_its_definition_for_the_orgs_it_means(apply, database, selector, meant):
    apply(org("org_a", "pro") + org("org_b", "pro", "eu") + org("org_c", issuer="other"))

    (change,) = apply(TEMPLATE.replace('{ tags = ["pro"] }', selector))

    assert (change.kind, change.action, change.org, change.name) == ("template", "add", None, "export")
    assert made(database) == {code: ("@hourly", "export", 1) for code in meant}


def test_what_a_template_makes_is_due_with_its_spread(apply, rows):
    apply(org("org_a", "pro") + org("org_b", "pro") + TEMPLATE)

    first, second = rows.schedule
    assert first["next_scheduled_for"] == second["next_scheduled_for"]
    assert first["next_fire_at"] != second["next_fire_at"]


def test_the_same_template_again_changes_nothing(apply, rows):
    apply(org("org_a", "pro") + TEMPLATE)
    before = rows.everything()

    assert apply(org("org_a", "pro") + TEMPLATE) == []
    assert rows.everything() == before


def test_a_new_org_inherits_however_it_comes(apply, database, keyring):
    apply(TEMPLATE)

    apply(org("org_a", "pro"))
    add_org(database, OrgEntry("org_b", "B", "main", tags=frozenset({"pro"})), actor="tester")
    import_orgs(
        database,
        keyring,
        ['{"code": "org_c", "issuer": "main", "tags": ["pro"]}', '{"code": "org_d", "issuer": "main"}'],
        actor="tester",
    )

    assert made(database).keys() == {"org_a", "org_b", "org_c"}


@on_either
def test_an_org_that_is_no_longer_meant_loses_it_and_gets_it_back(apply, database, rows):
    apply(org("org_a", "pro") + TEMPLATE)

    apply(org("org_a"))
    assert made(database) == {}
    assert made(database, state="closed") == {"org_a": ("@hourly", "export", 1)}
    assert rows.schedule[0]["next_fire_at"] is None

    apply(org("org_a", "pro"))
    assert made(database) == {"org_a": ("@hourly", "export", 1)}
    assert rows.schedule[0]["next_fire_at"] is not None


def test_a_changed_template_settles_the_old_revision_first(apply, database, rows):
    apply(org("org_a", "pro") + TEMPLATE.replace("@hourly", "every 10m"))
    since = rows.schedule[0]["next_scheduled_for"] - timedelta(minutes=30)
    rows.make_due_since(since)

    apply(TEMPLATE)

    assert made(database) == {"org_a": ("@hourly", "export", 2)}
    (run,) = rows.runs
    assert run["revision"] == 1
    assert sum(skip["count"] for skip in rows.skips) in (1, 2)


def test_a_pause_outlives_a_changed_template(apply, database, rows):
    apply(org("org_a", "pro") + TEMPLATE)
    pause_definition(database, "org_a", "export", actor="tester", note="broken")

    apply(TEMPLATE.replace("@hourly", "@daily"))

    (definition,) = rows.definitions
    assert (definition["revision"], definition["pause_note"]) == (2, "broken")
    assert rows.schedule[0]["next_fire_at"] is None


def test_prune_leaves_what_a_template_made(apply, database):
    apply(org("org_a", "pro") + TEMPLATE)

    assert apply(org("org_a", "pro"), prune=True) == []
    assert made(database).keys() == {"org_a"}


def test_a_closed_template_closes_what_it_made_and_apply_opens_it_again(apply, database, rows):
    apply(org("org_a", "pro") + TEMPLATE)

    closed = close_template(database, "export", actor="tester")

    assert (closed["state"], closed["orgs_done"], closed["orgs_total"]) == ("closed", 1, 1)
    assert made(database) == {}
    with pytest.raises(Conflict, match="closed already"):
        close_template(database, "export", actor="tester")
    with pytest.raises(NotFound):
        close_template(database, "import", actor="tester")
    (change,) = apply(TEMPLATE)
    assert change.action == "reopen"
    assert made(database) == {"org_a": ("@hourly", "export", 1)}


@on_either
def test_a_definition_of_the_orgs_own_stands_until_it_is_closed(apply, database):
    own = '[[definition]]\norg = "org_a"\nname = "export"\nhandler = "acme.plain"\nschedule = "@daily"\n'
    apply(org("org_a", "pro") + own)

    apply(TEMPLATE)
    assert made(database) == {"org_a": ("@daily", None, 1)}

    close_definition(database, "org_a", "export", actor="tester")
    carry_on(database)
    assert made(database) == {"org_a": ("@hourly", "export", 2)}
    with pytest.raises(DefinitionError, match="a template makes a definition of this name"):
        apply(own)


def test_a_removed_org_has_none_and_gets_them_again_when_it_comes_back(apply, database):
    apply(org("org_a", "pro") + TEMPLATE)

    set_org_state(database, "org_a", "removed", actor="tester")
    carry_on(database)
    assert made(database) == {}

    add_org(database, OrgEntry("org_a", "A", "main", tags=frozenset({"pro"})), actor="tester")
    assert made(database).keys() == {"org_a"}


@pytest.mark.parametrize(
    ("template", "field"),
    [
        (TEMPLATE.replace("acme.plain", "acme.gone"), "handler"),
        (TEMPLATE.replace("@hourly", "@sometimes"), "schedule"),
        (TEMPLATE.replace('{ tags = ["pro"] }', '{ issuer = "gone" }'), "orgs.issuer"),
        (TEMPLATE.replace('{ tags = ["pro"] }', '{ plan = "pro" }'), "orgs.plan"),
        (TEMPLATE.replace("acme.plain", "acme.note"), "params.text"),
    ],
)
def test_a_template_that_cannot_work_is_refused_with_its_field(apply, rows, template, field):
    with pytest.raises(DefinitionError) as refused:
        apply(org("org_a", "pro") + template, issuers=["main"])

    assert (refused.value.entry, refused.value.field) == ("template export", field)
    assert rows.orgs == []


def test_many_orgs_follow_in_batches_with_progress(apply, database, monkeypatch, rows):
    monkeypatch.setattr(module, "BATCH", 10)
    apply("".join(org(f"org_{n}", "pro") for n in range(45)))

    apply(TEMPLATE)

    shown = template(database)
    assert (shown["orgs_done"], shown["orgs_total"], shown["materialised_at"]) == (10, 45, None)
    assert len(made(database)) == 10
    steps = [materialise(database, limit=10) for _ in range(5)]
    assert [step.progress[0][1] for step in steps if step.orgs] == [20, 30, 40, 45]
    assert steps[-1].orgs == 0
    shown = template(database)
    assert (shown["orgs_done"], shown["orgs_total"]) == (45, 45)
    assert shown["materialised_at"] is not None
    assert len(made(database)) == 45


def reach(database, org_scope=ALL_ORGS) -> dict[str, int | None]:
    """What the list counts, by template."""
    rows = reading(database, lists.read, TEMPLATES, org_scope)
    return {row["name"]: row["definitions"] for row in rows}


@on_either
def test_a_list_counts_the_orgs_that_have_the_definition(apply, database, rows):
    """Neither orgs that the selector leaves out, nor one whose own definition has the name; up to a limit."""
    own = '[[definition]]\norg = "org_own"\nname = "export"\nhandler = "acme.plain"\nschedule = "@daily"\n'
    every = TEMPLATE.replace('{ tags = ["pro"] }', '"all"').replace("export", "sync")
    apply(TEMPLATE + every)
    assert reach(database) == {"export": 0, "sync": 0}
    apply(org("org_a", "pro") + org("org_b", "pro") + org("org_own", "pro") + org("org_free") + own)

    # The progress of the template's last change says nothing about orgs that came later.
    assert template(database)["orgs_total"] == 0
    assert reach(database) == {"export": 2, "sync": 4}
    assert template(database)["definitions"] == 2
    some = reading(database, module.templates.reach, ALL_ORGS, [template(database, "sync")["id"]], most=3)
    assert list(some.values()) == [3]
    set_org_state(database, "org_a", "removed", actor="tester")
    carry_on(database)
    assert reach(database) == {"export": 1, "sync": 3}


@on_either
def test_an_orgs_own_request_counts_no_other_org(apply, database, monkeypatch):
    apply(org("org_a", "pro") + org("org_b", "pro") + TEMPLATE)
    counted = []
    monkeypatch.setattr(lists.templates, "reach", lambda *_, **__: counted.append(1) or {})

    assert reach(database, "org_a") == {"export": None}
    assert reading(database, lists.template, "org_a", "export")["definitions"] is None
    assert counted == []
    with pytest.raises(KeyError):  # the control
        reach(database)
    assert counted == [1]


def test_a_change_amid_another_leaves_every_org_with_the_newest(apply, database, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 10)
    apply("".join(org(f"org_{n}", "pro") for n in range(25)))
    apply(TEMPLATE)

    apply(TEMPLATE.replace("@hourly", "@daily"))
    carry_on(database)

    assert {schedule for schedule, _, _ in made(database).values()} == {"@daily"}
    assert len(made(database)) == 25


@on_either
def test_an_org_that_cannot_follow_keeps_none_of_the_others_waiting(apply, database, rows, emitted):
    """As of a zone that this machine does not know, which another worker's did."""
    apply("".join(org(f"org_{n}", "pro") for n in range(4)))
    with database.transaction() as connection:
        connection.execute(
            update(tables.orgs).where(tables.orgs.c.code == "org_2").values(timezone="Mars/Olympus")
        )

    apply(TEMPLATE)
    carry_on(database)

    assert made(database).keys() == {"org_0", "org_1", "org_3"}
    assert [event.fields["org"] for event in emitted if event.event.name == "definition.failed"] == ["org_2"]


@pytest.mark.parametrize("migrated_url", ["postgresql"], indirect=True)
def test_an_org_that_cannot_follow_is_the_one_that_is_skipped_while_another_worker_tries_it(
    apply, database, migrated_url, clock, monkeypatch
):
    """The other worker has it locked from when this one has failed at it."""
    apply("".join(org(f"org_{n}", "pro") for n in range(3)))
    of_first = tables.orgs.c.code == "org_0"
    with database.transaction() as connection:
        connection.execute(update(tables.orgs).where(of_first).values(timezone="Mars/Olympus"))
    apply(TEMPLATE)
    other = Database.open(migrated_url, clock=clock)
    lock, calls = module.templates.lock_orgs_behind, []
    with contextlib.ExitStack() as stack:
        stack.callback(other.close)

        def lock_late(connection, scope, change, limit):
            calls.append(limit)
            if calls.count(1) == 2:
                held = stack.enter_context(other.transaction())
                held.execute(select(tables.orgs.c.id).where(of_first).with_for_update())
            return lock(connection, scope, change, limit)

        monkeypatch.setattr(module.templates, "lock_orgs_behind", lock_late)
        carry_on(database)
    carry_on(database)

    assert made(database).keys() == {"org_1", "org_2"}


@on_either
def test_two_workers_share_the_orgs(apply, database, migrated_url, clock, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 5)
    apply("".join(org(f"org_{n}", "pro") for n in range(60)))
    apply(TEMPLATE)
    other = Database.open(migrated_url, clock=clock)
    try:
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(carry_on, database), pool.submit(carry_on, other)]:
                done.result()
    finally:
        other.close()

    carry_on(database)
    assert len(made(database)) == 60
    assert template(database)["materialised_at"] is not None


@pytest.mark.parametrize("migrated_url", ["postgresql"], indirect=True)
def test_an_org_that_is_added_while_a_template_changes_gets_the_new_one(
    apply, database, migrated_url, clock, monkeypatch
):
    """Its transaction began before, and ends after every other org has followed."""
    apply(org("org_a", "pro") + TEMPLATE)
    other = Database.open(migrated_url, clock=clock)
    adding, followed = threading.Event(), threading.Event()
    record = audit.record

    def record_late(connection, entries, **options):
        if any(entry.subject == "org_b" for entry in entries):
            adding.set()
            assert followed.wait(10)
        record(connection, entries, **options)

    monkeypatch.setattr(audit, "record", record_late)
    try:
        with ThreadPoolExecutor(1) as pool:
            added = pool.submit(
                add_org, other, OrgEntry("org_b", "B", "main", tags=frozenset({"pro"})), actor="other"
            )
            assert adding.wait(10)
            apply_file(database, parse_file(TEMPLATE.replace("@hourly", "@daily")), actor="tester")
            carry_on(database)
            followed.set()
            added.result()
    finally:
        other.close()

    assert made(database)["org_b"][0] == "@hourly"
    carry_on(database)
    assert {schedule for schedule, _, _ in made(database).values()} == {"@daily"}


def test_each_definition_has_its_audit_row_with_the_template(apply, rows):
    apply(org("org_a", "pro") + TEMPLATE)

    actions = {row["action"]: row for row in rows.audit}
    assert actions["template.add"]["org_id"] is None
    assert actions["definition.add"]["detail"]["template"] == "export"
    assert actions["definition.add"]["subject"] == "org_a export"
