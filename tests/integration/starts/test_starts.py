"""Runs that a product starts in its own transactions: one a key, in order, and what becomes of each."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.fakes.closing import close_definition
from tests.fakes.product import Product, start
from tests.fakes.rows import reading
from tests.fakes.site import definition, one_definition
from worker.diagnosis.why import why
from worker.errors import NotFound
from worker.ids import ALL_ORGS
from worker.model.runs.clauses import sentence
from worker.operations.definitions import pause_definition
from worker.operations.orgs import set_org_state
from worker.store import start_functions, starts
from worker.store.lists import runs as run_lists


def runs_of(product: Product, definition: str = "digest") -> list[dict]:
    query = """
        SELECT r.*, l.state AS live, l.reason AS why, l.available_at AS starts_at FROM runs r
        JOIN definitions d ON d.id = r.definition_id LEFT JOIN live_runs l ON l.id = r.id
        WHERE d.name = %s ORDER BY r.id
    """
    return product.query(query, definition)


def test_a_committed_start_becomes_a_run_with_its_id(product: Product) -> None:
    id_ = product.start("order-1", params={"n": 1})

    assert runs_of(product) == []
    assert product.make() == 1

    [run] = runs_of(product)
    assert (str(run["id"]), run["live"], run["why"], run["origin"]) == (id_, "waiting", "due", "manual")
    assert run["params"] == {"n": 1}
    assert run["created_by"] == f"product:{product.login}"
    assert str(run["idempotency_key"]) == id_
    shown = reading(product.database, run_lists.run, ALL_ORGS, id_)
    assert (shown["created_by"], shown["request_key"]) == (f"product:{product.login}", "order-1")
    [kept] = product.query("SELECT * FROM starts")
    assert (kept["state"], kept["params"], kept["key"]) == ("made", None, "order-1")
    assert kept["created_at"] == run["created_at"] == run["scheduled_for"] <= run["starts_at"]


def test_a_rolled_back_start_becomes_none(product: Product) -> None:
    with product.transaction() as connection:
        start(connection, "order-1")
        connection.rollback()

    assert product.make() == 0
    assert product.query("SELECT * FROM starts") == runs_of(product) == []


def test_a_key_makes_one_run_and_returns_its_id(product: Product) -> None:
    with product.transaction() as connection:
        first = start(connection, "order-1", params={"n": 1})
        assert start(connection, "order-1", params={"n": 2}) == first
    assert product.make() == 1

    assert product.start("order-1") == first
    assert product.make() == 0
    assert [run["params"] for run in runs_of(product)] == [{"n": 1}]


def test_a_key_is_of_a_definition(product: Product, define) -> None:
    define(definition("org_acme", "other", "acme.plain", "@yearly"))

    assert product.start("order-1") != product.start("order-1", "other")
    assert product.make() == 2


def test_a_key_ends_after_its_time_and_starts_again(product: Product) -> None:
    first = product.start("order-1")
    product.make()
    with product.database.transaction() as connection:
        assert starts.forget(connection, timedelta(days=7), limit=10) == 0
    product.change("UPDATE starts SET made_at = made_at - interval '8 days'")

    with product.database.transaction() as connection:
        assert starts.forget(connection, timedelta(days=7), limit=10) == 1
    again = product.start("order-1")

    assert again != first
    assert product.make() == 1
    assert len(runs_of(product)) == 2


def test_a_start_that_has_no_run_yet_keeps_its_key(product: Product) -> None:
    product.start("order-1", not_before=datetime.now(UTC) + timedelta(days=30))
    product.change("UPDATE starts SET created_at = created_at - interval '300 days'")

    with product.database.transaction() as connection:
        assert starts.forget(connection, timedelta(0), limit=10) == 0


def test_the_runs_of_a_definition_are_made_in_the_order_of_insertion(product: Product) -> None:
    with product.transaction() as connection:
        ids = [start(connection, f"{99 - n}") for n in range(50)]
        entries = [{"org": "org_acme", "definition": "digest", "key": f"k{99 - n}"} for n in range(50)]
        row = connection.execute("SELECT orgworker_start_many(%s)", (Jsonb(entries),)).fetchone()
        ids += map(str, row[0])
    assert ids == sorted(ids)

    assert product.make() == 100

    order = product.query("SELECT id FROM live_runs ORDER BY available_at, id")
    assert [str(row["id"]) for row in order] == ids


def test_a_start_that_is_committed_late_is_not_passed_over(product: Product) -> None:
    with product.transaction() as late:
        first = start(late, "first")
        second = product.start("second")
        assert product.make() == 1
        assert [str(run["id"]) for run in runs_of(product)] == [second]

    assert product.make() == 1
    assert first < second
    assert {str(run["id"]) for run in runs_of(product)} == {first, second}


def test_a_second_transaction_with_the_key_waits_for_the_first_only(product: Product) -> None:
    with product.transaction() as first, product.transaction() as second:
        id_ = start(first, "order-1")
        second.execute("SET lock_timeout = '100ms'")
        assert start(second, "order-2") != id_
        second.commit()
        with pytest.raises(psycopg.errors.LockNotAvailable):
            start(second, "order-1")
        second.rollback()
        first.commit()
        assert start(second, "order-1") == id_


def test_a_start_with_a_time_becomes_a_run_when_it_has_come(product: Product) -> None:
    at = datetime.now(UTC) + timedelta(hours=1)
    id_ = product.start("later", not_before=at)
    product.start("past", not_before=at - timedelta(days=9))
    assert product.make() == 1

    with pytest.raises(NotFound, match=f"run {id_} is not made yet: it was started for"):
        reading(product.database, run_lists.run, ALL_ORGS, id_)
    product.change("UPDATE starts SET not_before = clock_timestamp() WHERE key = 'later'")

    assert product.make() == 1
    assert str(runs_of(product)[-1]["id"]) == id_


def test_it_is_said_of_a_start_whose_run_is_not_made_yet(product: Product) -> None:
    id_ = product.start("order-1")

    with pytest.raises(NotFound, match=f"run {id_} is not made yet") as caught:
        reading(product.database, why, id_)
    assert "execution.poll" in caught.value.fix
    with pytest.raises(NotFound, match="there is no run"):
        reading(product.database, why, id_, org="org_globex")


@pytest.mark.parametrize("state", ["paused"])
def test_a_run_of_a_paused_org_waits(product: Product, state: str) -> None:
    set_org_state(product.database, "org_acme", state, actor="tester", note="unpaid")
    id_ = product.start("order-1")

    assert product.make() == 1

    [run] = runs_of(product)
    assert run["live"] == "waiting"
    assert "its org was paused by tester" in said(product, id_)
    set_org_state(product.database, "org_acme", "active", actor="tester")
    assert "paused" not in said(product, id_)


@pytest.mark.parametrize("state", ["suspended", "removed"])
def test_a_run_of_a_suspended_or_removed_org_is_refused_with_the_text_of_the_api(
    product: Product, state: str
) -> None:
    id_ = product.start("order-1")
    set_org_state(product.database, "org_acme", state, actor="tester")

    assert product.make() == 1

    [run] = runs_of(product)
    assert (run["state"], run["reason"]) == ("refused", "org_inactive")
    assert run["detail"] == f"org org_acme is {state}: none of its runs start"
    assert run["detail"] in said(product, id_)


def test_a_removed_org_is_taken_from_the_logins(product: Product) -> None:
    set_org_state(product.database, "org_acme", "removed", actor="tester")

    with pytest.raises(psycopg.errors.UndefinedObject):
        product.start("order-1")


def test_a_run_of_a_closed_definition_is_refused(product: Product) -> None:
    product.start("order-1")
    close_definition(product.database, "org_acme", "digest", actor="tester")

    assert product.make() == 1

    [run] = runs_of(product)
    assert (run["state"], run["reason"]) == ("refused", "definition_closed")
    assert run["detail"] == "definition org_acme/digest is closed"


def test_a_paused_definition_is_started_as_by_hand(product: Product) -> None:
    pause_definition(product.database, "org_acme", "digest", actor="tester")
    product.start("order-1")

    assert product.make() == 1
    assert runs_of(product)[0]["live"] == "waiting"


def test_an_edited_definition_runs_as_it_is_when_the_run_is_made(product: Product, define) -> None:
    product.start("order-1", params={"n": 1})
    define(one_definition(handler="acme.plain", overlap="allow", params={"of": "definition", "n": 0}))

    assert product.make() == 1
    [run] = runs_of(product)
    assert (run["revision"], run["params"]) == (2, {"of": "definition", "n": 1})


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"times": "many"}, "params.times: 'many' is not of type integer"),
        ({"text": [[[[[[[]]]]]]]}, "params.text"),
        ({"text": "a", "more": 1}, "params"),
    ],
)
def test_a_run_with_wrong_params_is_refused_with_the_text_of_the_api(
    product: Product, define, params: dict, text: str
) -> None:
    define(one_definition(handler="acme.note", overlap="allow", params={"text": "hello"}))
    id_ = product.start("order-1", params=params)
    right = product.start("order-2", params={"text": "right"})

    assert product.make() == 2

    refused, waiting = runs_of(product)
    assert (refused["state"], refused["reason"], str(refused["id"])) == ("refused", "params_invalid", id_)
    assert text in refused["detail"]
    assert text in said(product, id_)
    assert (str(waiting["id"]), waiting["live"]) == (right, "waiting")
    counted = product.query("SELECT runs FROM rollup_hours WHERE state = 'refused'")
    assert [row["runs"] for row in counted] == [1]
    assert product.query("SELECT * FROM run_words WHERE run_id = %s AND word = 'digest'", id_)


def deep(levels: int) -> str:
    return '{"text": ' + "[" * levels + "]" * levels + "}"


@pytest.mark.parametrize(
    "params",
    [deep(100), deep(5_000), '{"text": 1' + "0" * 6000 + "}", '{"text": 1e5000}'],
    ids=["deep", "deeper than Python", "long integer", "large exponent"],
)
def test_params_that_are_json_but_not_ours_keep_no_other_start(product: Product, params: str) -> None:
    with product.transaction() as connection:
        connection.execute("SELECT orgworker_start('org_acme', 'digest', %s::jsonb, 'strange')", (params,))
    product.start("usual")

    assert product.make() == 2

    strange, usual = runs_of(product)
    assert (strange["state"], strange["reason"]) == ("refused", "params_invalid")
    assert usual["live"] == "waiting"


@pytest.mark.parametrize(
    ("overlap", "became"),
    [
        ("skip", ["waiting", "refused", "refused"]),
        ("queue_one", ["waiting", "held", "refused"]),
        ("replace", ["cancelled", "cancelled", "waiting"]),
        ("allow", ["waiting", "waiting", "waiting"]),
    ],
)
def test_starts_that_overlap_follow_the_definition(
    product: Product, define, overlap: str, became: list[str]
) -> None:
    define(one_definition(handler="acme.plain", overlap=overlap))
    ids = [product.start(f"order-{n}") for n in range(3)]

    assert product.make() == 3

    runs = runs_of(product)
    assert [str(run["id"]) for run in runs] == ids
    assert [run["state"] or run["live"] for run in runs] == became
    for run in runs:
        if run["state"] == "refused":
            waiting = ids[1] if overlap == "queue_one" else ids[0]
            state = "held back already" if overlap == "queue_one" else "waiting"
            text = f"run {waiting} of this definition is {state}, and its overlap is {overlap}"
            assert (run["reason"], run["detail"]) == ("overlap", text)


def test_one_definition_with_many_starts_keeps_no_other_waiting(product: Product, define) -> None:
    define(definition("org_acme", "other", "acme.plain", "@yearly", overlap="allow"))
    entries = [{"org": "org_acme", "definition": "digest", "key": f"{n}"} for n in range(1000)]
    with product.transaction() as connection:
        for part in range(2):
            many = [{**entry, "key": f"{part} {entry['key']}"} for entry in entries]
            connection.execute("SELECT orgworker_start_many(%s)", (Jsonb(many),))
    product.start("only", "other")

    first = next(product.steps())

    assert first.made < 2000
    assert len(runs_of(product, "other")) == 1


def said(product: Product, run_id: str) -> str:
    return sentence(reading(product.database, why, run_id))


def test_the_functions_are_installed_again_without_a_change(product: Product) -> None:
    with product.database.transaction() as connection:
        assert start_functions.install(connection)
        assert start_functions.is_installed(connection)
    assert product.start("order-1")
