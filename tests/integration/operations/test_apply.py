"""Apply: all or nothing, nothing twice, and no instant lost at an edit."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest

from tests.conftest import on_either
from worker.errors import DefinitionError, InvalidTrigger, UnknownHandler
from worker.operations.definitions import pause_definition
from worker.operations.orgs import set_org_state

ORG = """
[[org]]
code = "org_acme"
name = "Acme"
issuer = "main"
tags = ["pro"]
"""

DIGEST = """
[[definition]]
org = "org_acme"
name = "digest"
handler = "acme.note"
schedule = "every 10m"
spread = "off"
params = { text = "hello" }
"""


def test_a_file_makes_orgs_and_definitions(apply, rows):
    changes = apply(ORG + DIGEST)

    assert [(each.kind, each.action, each.name) for each in changes] == [
        ("org", "add", "org_acme"),
        ("definition", "add", "digest"),
    ]
    [org] = rows.orgs
    assert (org["code"], org["issuer"], org["tags"], org["max_concurrent_runs"]) == (
        "org_acme",
        "main",
        ["pro"],
        10,
    )
    [revision] = rows.definition_revisions
    assert revision["spec"] == {
        "handler": "acme.note",
        "schedule": "every 10m",
        "spread": "off",
        "params": {"text": "hello"},
    }
    [next_] = rows.schedule
    assert next_["next_scheduled_for"] == next_["next_fire_at"]
    assert timedelta(0) <= next_["next_fire_at"] - rows.now() <= timedelta(minutes=10)
    assert [row["action"] for row in rows.audit] == ["org.add", "definition.add"]


def test_the_same_file_again_changes_nothing(apply, rows):
    apply(ORG + DIGEST)
    before, audited = rows.everything(), rows.audit

    assert apply(ORG + DIGEST) == []

    assert rows.everything() == before
    assert rows.audit == audited


def test_a_dry_run_says_what_it_would_change_and_writes_nothing(apply, rows):
    before = rows.everything()

    changes = apply(ORG + DIGEST, dry_run=True)

    assert [each.name for each in changes] == ["org_acme", "digest"]
    assert rows.everything() == before
    assert rows.audit == []


def test_a_change_is_a_new_revision_and_names_the_fields(apply, rows):
    apply(ORG + DIGEST)

    [change] = apply(ORG.replace('"Acme"', '"Acme"') + DIGEST.replace("hello", "good day"))

    assert change.as_row() == {
        "kind": "definition",
        "action": "change",
        "org": "org_acme",
        "name": "digest",
        "fields": {"params": {"before": {"text": "hello"}, "after": {"text": "good day"}}},
    }
    assert [row["revision"] for row in rows.definitions] == [2]
    assert sorted(row["revision"] for row in rows.definition_revisions) == [1, 2]


@on_either
def test_an_org_is_changed_in_place(apply, rows):
    apply(ORG)

    [change] = apply(ORG + "max_concurrent_runs = 2")

    assert change.fields == {"max_concurrent_runs": (10, 2)}
    assert [row["max_concurrent_runs"] for row in rows.orgs] == [2]


@pytest.mark.parametrize(
    ("broken", "error", "field"),
    [
        (DIGEST.replace("acme.note", "acme.nothing"), UnknownHandler, "handler"),
        (DIGEST.replace("acme.note", "acme.broken"), UnknownHandler, "handler"),
        (DIGEST.replace('"hello"', "5"), DefinitionError, "params.text"),
        (DIGEST.replace('text = "hello"', "times = 1"), DefinitionError, "params.text"),
        (DIGEST.replace('text = "hello"', 'text = "a", txet = 1'), DefinitionError, "params.txet"),
        (DIGEST.replace('text = "hello"', 'text = "a", times = 0'), DefinitionError, "params.times"),
        (DIGEST + 'params_by_hand = "text"', DefinitionError, "params_by_hand"),
        (DIGEST + "params_by_hand = [1]", DefinitionError, "params_by_hand"),
        (DIGEST + 'params_by_hand = ["text", "txet"]', DefinitionError, "params_by_hand"),
        (DIGEST.replace("every 10m", "61 * * * *"), InvalidTrigger, "schedule"),
        (DIGEST.replace("acme.note", "acme.inline"), DefinitionError, "isolation"),
        (DIGEST + 'isolation = "inline"', DefinitionError, "isolation"),
        (DIGEST + 'api_origins = ["http://api.acme.com"]', DefinitionError, "api_origins"),
        (DIGEST + 'variants = [{ flag = "v2", handler = "acme.nothing" }]', UnknownHandler, "variants"),
        (DIGEST.replace("org_acme", "org_none"), DefinitionError, "org"),
    ],
)
def test_what_could_not_run_is_refused_and_nothing_else_is_changed(apply, rows, broken, error, field):
    good = DIGEST.replace('"digest"', '"good"')
    before = rows.everything()

    with pytest.raises(error) as refused:
        apply(ORG + good + broken)

    assert refused.value.field == field
    assert refused.value.entry.endswith("/digest")
    assert "digest" in refused.value.message
    assert field in refused.value.message
    assert rows.everything() == before


def test_an_unknown_issuer_is_refused_where_the_issuers_are_known(apply):
    with pytest.raises(DefinitionError, match=r"there is no issuer 'main'; worker\.toml has other"):
        apply(ORG, issuers=["other"])


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://127.0.0.1:8080", ()),
        ("http://api.acme.com", ("http://API.acme.com:80",)),
        ("https://a.b", ()),
    ],
)
def test_an_origin_may_be_unencrypted_on_this_machine_or_where_the_operator_allows_it(
    apply, rows, origin, allowed
):
    apply(ORG + DIGEST + f'api_origins = ["{origin}"]', insecure_origins=allowed)

    [revision] = rows.definition_revisions
    assert revision["spec"]["api_origins"] == [origin]


def test_a_template_with_an_unencrypted_origin_is_refused(apply, rows):
    template = """
[[template]]
name = "digests"
orgs = { tags = ["pro"] }
handler = "acme.note"
schedule = "@daily"
params = { text = "hello" }
api_origins = ["http://api.acme.com"]
"""

    with pytest.raises(DefinitionError, match="template digests, api_origins: http://api.acme.com would"):
        apply(ORG + template)

    assert rows.definition_revisions == []
    assert apply(ORG + template, insecure_origins=["http://api.acme.com"])


def test_the_operator_may_allow_inline_and_unknown_handlers(apply, rows):
    inline = DIGEST.replace("acme.note", "acme.inline")
    unknown = DIGEST.replace("acme.note", "acme.nothing").replace('"digest"', '"other"')

    apply(ORG + inline + unknown, inline=["acme-inline"], allow_unknown_handlers=True)

    assert len(rows.definitions) == 2


LISTS = DIGEST.replace("acme.note", "acme.lists")


@pytest.mark.parametrize(
    ("text", "field", "message"),
    [
        (DIGEST.replace("acme.note", "acme.inline") + 'egress = ["api"]', "egress", "which cannot be sealed"),
        (LISTS + 'isolation = "inline"', "isolation", "acme.lists declares egress, and would run inline"),
        (LISTS + 'egress = ["api", "https://b.example"]', "egress", "does not declare 'https://b.example'"),
        (LISTS + 'egress = ["open"]', "egress", "can only narrow what its handler declares: api, https"),
        (LISTS + 'audiences = ["mcp", "other"]', "audiences", "acme.lists does not declare 'other'"),
        (DIGEST + 'egress = ["https://*.co.uk"]', "egress", "anyone can have a name below co.uk"),
    ],
)
def test_a_definition_that_asks_for_more_network_than_it_can_have_is_refused(
    apply, rows, text, field, message
):
    with pytest.raises(DefinitionError, match=re.escape(message)) as refused:
        apply(ORG + text, inline=["acme-inline", "acme-jobs"])

    assert (refused.value.field, refused.value.fix != "" or field == "egress") == (field, True)
    assert refused.value.exit_code == 78
    assert rows.definitions == []


@pytest.mark.parametrize(
    "text",
    [
        DIGEST.replace("acme.note", "acme.inline") + 'egress = ["open"]',
        DIGEST.replace("acme.note", "acme.inline") + 'egress = ["api"]\nisolation = "child"',
        LISTS + 'egress = ["https://eu.a.example"]\naudiences = ["mcp"]',
        LISTS + "egress = []\naudiences = []",
        # What declares nothing can be given a list.
        DIGEST + 'egress = ["public"]\naudiences = ["any"]\nreveal_token = true',
        # One of the handlers that a run may be of has it.
        LISTS + 'egress = ["https://c.example"]\nvariants = [{ flag = "v2", handler = "acme.also" }]',
        LISTS + 'audiences = ["other"]\nvariants = [{ flag = "v2", handler = "acme.note" }]',
    ],
)
def test_a_definition_narrows_what_its_handlers_declare(apply, rows, text):
    apply(ORG + text, inline=["acme-inline"])

    assert len(rows.definitions) == 1


STARTS = DIGEST.replace("acme.note", "acme.starts").replace('params = { text = "hello" }', "")


@pytest.mark.parametrize(
    ("text", "field", "message"),
    [
        (STARTS + "parked_counts = true", "parked_counts", "would keep a slot that they need"),
        (STARTS.replace("starts", "exceeds"), "handler", "which declares the scope read:kb"),
        (STARTS.replace("starts", "confuses"), "handler", "which declares state"),
    ],
)
def test_a_definition_whose_children_could_not_run_is_refused(apply, rows, text, field, message):
    with pytest.raises(DefinitionError, match=re.escape(message)) as refused:
        apply(ORG + text)

    assert (refused.value.field, rows.definitions) == (field, [])
    assert refused.value.fix


@pytest.mark.parametrize(
    "text",
    [
        # A child that nobody offers yet says nothing.
        STARTS,
        # The definition's scopes are those of all of its runs.
        STARTS.replace("starts", "exceeds") + 'scopes = ["read:kb"]',
    ],
)
def test_a_definition_whose_children_keep_to_their_parent_is_stored(apply, rows, text):
    apply(ORG + text)

    assert len(rows.definitions) == 1


def test_to_reveal_the_token_is_in_the_audit(apply, rows):
    apply(ORG + DIGEST + "reveal_token = true")
    apply(ORG + DIGEST)

    details = [row["detail"] for row in rows.audit if row["action"].startswith("definition.")]
    assert details[0]["reveal_token"] == {"before": None, "after": True}
    assert details[1]["reveal_token"] == {"before": True, "after": None}


def test_what_was_due_before_an_edit_is_settled_by_the_old_revision(apply, rows):
    apply(ORG + DIGEST + 'misfire = "once"')
    tick = timedelta(minutes=10)
    last = rows.schedule[0]["next_scheduled_for"] - tick
    rows.make_due_since(last - 5 * tick)

    apply(ORG + DIGEST.replace("every 10m", "every 1h"))

    [run] = rows.runs
    assert (run["scheduled_for"], run["revision"], run["origin"]) == (last, 1, "schedule")
    skips = rows.skips
    assert sum(skip["count"] for skip in skips) == 5
    assert {(skip["reason"], skip["revision"]) for skip in skips} == {("missed", 1)}
    [next_] = rows.schedule
    assert next_["next_scheduled_for"] > rows.now() - timedelta(seconds=5)
    assert next_["next_scheduled_for"].minute == 0


def test_instants_whose_spread_has_not_passed_at_an_edit_still_run(apply, rows):
    minutely = DIGEST.replace("every 10m", "every 1m") + 'overlap = "allow"'
    apply(ORG + minutely.replace('"off"', '"6h"'))
    [next_] = rows.schedule
    spread = next_["next_fire_at"] - next_["next_scheduled_for"]
    assert spread > timedelta(minutes=5)
    first = rows.now().replace(second=0, microsecond=0) - timedelta(minutes=3)
    rows.make_due_since(first, spread)

    apply(ORG + minutely)

    named = {run["id"]: run["scheduled_for"] for run in rows.runs}
    next_minute = rows.schedule[0]["next_scheduled_for"]
    assert next_minute >= first + timedelta(minutes=4)
    past = (next_minute - first) // timedelta(minutes=1)
    assert sorted(named.values()) == [first + timedelta(minutes=minute) for minute in range(past)]
    assert all(live["available_at"] == named[live["id"]] + spread for live in rows.live_runs)
    assert rows.skips == []


def test_enabled_false_means_that_nothing_is_due_and_is_no_new_revision(apply, rows):
    apply(ORG + DIGEST)

    [change] = apply(ORG + DIGEST + "enabled = false")

    assert change.fields == {"enabled": (True, False)}
    assert [(row["next_scheduled_for"], row["next_fire_at"]) for row in rows.schedule] == [(None, None)]
    assert [row["revision"] for row in rows.definitions] == [1]

    apply(ORG + DIGEST)
    assert rows.schedule[0]["next_fire_at"] is not None


def test_a_pause_is_never_lifted(apply, database, rows):
    apply(ORG + DIGEST)
    pause_definition(database, "org_acme", "digest", actor="ops", note="too loud")
    set_org_state(database, "org_acme", "paused", actor="ops")

    apply(ORG + DIGEST.replace("hello", "again"))

    [definition] = rows.definitions
    assert (definition["paused_by"], definition["pause_note"]) == ("ops", "too loud")
    assert [org["state"] for org in rows.orgs] == ["paused"]
    assert rows.schedule[0]["next_fire_at"] is None


@pytest.mark.parametrize("file", [ORG, DIGEST], ids=["org", "definition"])
def test_a_removed_org_gets_nothing_from_a_file(apply, database, rows, file):
    apply(ORG + DIGEST)
    set_org_state(database, "org_acme", "removed", actor="ops")
    before = rows.everything()

    with pytest.raises(DefinitionError, match="org org_acme was removed"):
        apply(file)

    assert rows.everything() == before


def test_prune_closes_what_the_file_has_no_more_and_apply_opens_it_again(apply, rows):
    other = DIGEST.replace('"digest"', '"other"')
    apply(ORG + DIGEST + other)

    assert apply(ORG + other) == []
    [change] = apply(ORG + other, prune=True)

    assert (change.action, change.name) == ("close", "digest")
    closed = {row["name"]: row["closed_at"] for row in rows.definitions}
    assert closed["digest"] is not None
    assert closed["other"] is None
    assert apply(ORG + other, prune=True) == []

    [again] = apply(ORG + DIGEST + other)
    assert (again.action, again.name) == ("reopen", "digest")
    assert {row["closed_at"] for row in rows.definitions} == {None}
    assert all(row["next_fire_at"] for row in rows.schedule)


@on_either
def test_a_new_zone_of_an_org_moves_the_schedules_that_name_none(apply, rows):
    nightly = DIGEST.replace("every 10m", "30 3 * * *")
    apply(ORG + nightly)
    assert rows.schedule[0]["next_scheduled_for"].hour == 3

    [change] = apply(ORG + 'timezone = "Asia/Kolkata"' + nightly)

    assert change.fields == {"timezone": (None, "Asia/Kolkata")}
    assert rows.schedule[0]["next_scheduled_for"].hour == 22
    assert [row["revision"] for row in rows.definitions] == [1]


def test_numbers_that_a_database_writes_in_another_way_are_no_change(apply):
    text = DIGEST.replace("acme.note", "acme.plain").replace('text = "hello"', "a = 1e22, b = 1.0, c = true")
    apply(ORG + text)

    assert apply(ORG + text) == []
    assert apply(ORG + text.replace("c = true", "c = 1")) != []


@on_either
def test_a_thousand_definitions_are_applied_at_once(apply, rows):
    many = "".join(DIGEST.replace('"digest"', f'"digest-{number}"') for number in range(1000))

    reported: list[tuple[int, int, str]] = []

    assert len(apply(ORG + many, report=lambda *each: reported.append(each))) == 1001
    assert reported[:1] == [(0, 1000, "definitions checked")]
    assert reported[-2:] == [(500, 1000, "definitions written"), (1000, 1000, "definitions written")]
    assert apply(ORG + many) == []
    assert len(rows.schedule) == 1000


def test_all_that_the_database_refuses_is_reported_at_once(apply, rows):
    """The control is the last one alone: it is refused just the same."""
    unknown = DIGEST.replace("acme.note", "acme.nothing")
    wrong = unknown + DIGEST.replace("org_acme", "org_nobody") + unknown.replace('"digest"', '"other"')
    with pytest.raises(UnknownHandler) as refused:
        apply(ORG + wrong)

    found = [(each.entry, each.field) for each in (refused.value, *refused.value.others)]
    assert found == [
        ("definition org_acme/digest", "handler"),
        ("definition org_nobody/digest", "org"),
        ("definition org_acme/other", "handler"),
    ]
    assert rows.orgs == []
    with pytest.raises(UnknownHandler) as alone:
        apply(ORG + unknown.replace('"digest"', '"other"'))
    assert alone.value.others == ()
