"""A relay of an SQLite outbox, and an API that fails in every way; tests/integration/client has real ones."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.unit.client.api import TOKEN, URL, FakeApi, problem
from worker.client import (
    AsyncClient,
    ClientError,
    ConfigurationError,
    Conflict,
    InvalidRequest,
    Outbox,
    RelayCounts,
)
from worker.client.plans import StartRequest
from worker.client.relay import MAX_TRIES, Relay
from worker.client.results import Started

What = tuple[str, str, str]


class Product:
    """A product's database with an outbox, and the API."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outbox = Outbox("sqlite", connect=self.connect)
        self.connection = self.connect()
        for statement in self.outbox.ddl:
            self.connection.execute(statement)
        self.api = FakeApi()
        self.reported: list[tuple[str, dict[str, Any]]] = []

    def connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, check_same_thread=False)

    def start(self, key: str, org: str = "org_a", definition: str = "export", **params: Any) -> None:
        self.outbox.start(self.connection, org, definition, params, key=key)
        self.connection.commit()

    def client(self) -> AsyncClient:
        return AsyncClient(URL, TOKEN, transport=httpx.MockTransport(self.api))

    async def relay(self, **how: Any) -> RelayCounts:
        report = lambda event, **fields: self.reported.append((event, fields))  # noqa: E731
        return await self.client().relay(self.outbox, once=True, report=report, **how)

    def rows(self, *columns: str) -> list[Any]:
        query = f"SELECT {', '.join(columns)} FROM orgworker_outbox ORDER BY id"
        found = self.connection.execute(query).fetchall()
        return [row[0] for row in found] if len(columns) == 1 else found

    def passed(self, milliseconds: int) -> None:
        """Let time pass for every row."""
        for column in ("next_at", "first_sent_at", "ended_at", "created_at", "not_before"):
            self.connection.execute(f"UPDATE orgworker_outbox SET {column} = {column} - ?", (milliseconds,))
        self.connection.commit()

    @property
    def keys(self) -> list[str]:
        return [key for _, _, key in self.api.runs]


@pytest.fixture
def product(tmp_path: Path) -> Iterator[Product]:
    made = Product(tmp_path / "product.db")
    yield made
    made.connection.close()


async def test_what_is_committed_is_started_once_and_in_order(product: Product):
    for number in range(250):
        product.start(f"k{number}", page=number)
    product.outbox.start(product.connection, "org_a", "export", key="rolled-back")
    product.connection.rollback()

    counts = await product.relay()
    again = await product.relay()

    assert product.keys == [f"k{number}" for number in range(250)]
    assert (counts.sent, counts.replayed, again.sent) == (250, 0, 0)
    assert set(product.rows("state")) == {"sent"}
    found = product.outbox.find(product.connection, "org_a", "export", "k7")
    assert found is not None and (found["state"], found["run_id"]) == ("sent", "run-8")


async def test_a_lost_answer_makes_no_second_run(product: Product):
    product.start("k1")
    product.start("k2")
    lost = [httpx.ReadTimeout("lost")]
    product.api.after = lambda what: lost.pop() if lost else None

    with pytest.raises(ClientError, match="did not answer"):
        await product.relay()
    assert product.keys == ["k1"]
    counts = await product.relay()

    assert product.keys == ["k1", "k2"]
    assert (counts.sent, counts.replayed) == (2, 1)
    assert product.rows("run_id", "error") == [("run-1", None), ("run-2", None)]


class Killed(BaseException):
    """As kill -9: nothing is marked."""


@pytest.mark.parametrize("after", range(1, 8))
async def test_a_relay_killed_anywhere_leaves_its_rows_to_the_next_one(product: Product, after: int):
    for number in range(4):
        product.start(f"k{number}")
    product.start("b", org="org_b")

    def kill(what: What) -> None:
        if len(product.api.requests) >= after:
            raise Killed

    product.api.before = kill if after % 2 else product.api.before
    product.api.after = product.api.after if after % 2 else kill
    with suppress(Killed):
        await product.relay()
    product.api.before = product.api.after = lambda what: None
    # The lease holds the rows back.
    assert (await product.relay()).sent == 0 or after > 5
    product.passed(100_000)
    await product.relay()

    assert sorted(product.keys) == ["b", "k0", "k1", "k2", "k3"]
    assert [key for key in product.keys if key != "b"] == ["k0", "k1", "k2", "k3"]
    assert set(product.rows("state")) == {"sent"}


class Stopped:
    """A relay's client that is stopped at its first start for longer than the lease: others act meanwhile."""

    def __init__(self, meanwhile: Callable[[], Awaitable[None]], then: Exception) -> None:
        self._meanwhile, self._then, self._stopped = meanwhile, then, False

    async def send_start(self, request: StartRequest, *, retry_for: float | None = None) -> Started:
        if not self._stopped:
            self._stopped = True
            await self._meanwhile()
        raise self._then


@pytest.mark.parametrize(
    "then", [ConfigurationError("no token"), InvalidRequest("wrong"), Conflict("paused")], ids=repr
)
async def test_a_relay_beyond_its_lease_changes_nothing_of_the_next_one(product: Product, then: Exception):
    """Its marks come late: the next one has sent k2 without an answer, and put it off."""
    for number in range(1, 5):
        product.start(f"k{number}")
    columns = ("start_key", "state", "next_at", "first_sent_at IS NULL", "tries", "error")
    stop, left = asyncio.Event(), list[Any]()

    async def meanwhile() -> None:
        product.passed(100_000)
        lost = [httpx.ReadTimeout("lost")]
        product.api.after = lambda what: lost.pop() if lost and what[2] == "k2" else None
        with pytest.raises(ClientError, match="did not answer"):
            await product.relay()
        left.extend(product.rows(*columns))
        stop.set()

    await Relay(Stopped(meanwhile, then), product.outbox).run(stop=stop)

    assert product.rows(*columns) == left
    assert [(key, state, unsent) for key, state, _, unsent, *_ in left[:2]] == [
        ("k1", "sent", 0),
        ("k2", "waiting", 0),
    ]
    # So k2 is not sent again once the API may have forgotten its key.
    product.passed(int(6.5 * 86_400_000))
    product.api.runs.clear()
    await product.relay()
    assert product.rows("start_key", "state")[:2] == [("k1", "sent"), ("k2", "refused")]
    assert product.keys == []


async def test_a_start_that_was_accepted_is_sent_however_late_it_is_marked(product: Product):
    """The next relay's start was refused meanwhile; the run is there."""
    product.start("k1")
    stopped = product.client()
    send = stopped.send_start

    async def send_and_stop(request: StartRequest, **how: Any) -> Started:
        started = await send(request, **how)
        product.passed(100_000)
        product.api.before = lambda what: problem(422, "definition")
        await product.relay()
        return started

    stopped.send_start = send_and_stop  # type: ignore[method-assign]
    await Relay(stopped, product.outbox).run(once=True)

    assert product.rows("state", "run_id", "error") == [("sent", "run-1", None)]


async def test_a_row_refused_for_good_blocks_none_and_is_shown(product: Product):
    product.start("a1")
    product.start("bad", color="red")
    product.start("a2")
    product.start("gone", definition="nothing")
    product.start("b1", org="org_b")
    refusals = {"bad": problem(422, "definition", field="params.color"), "gone": problem(404, "not_found")}
    product.api.before = lambda what: refusals.get(what[2])

    counts = await product.relay()

    assert sorted(product.keys) == ["a1", "a2", "b1"]
    assert (counts.sent, counts.refused) == (3, 2)
    shown = product.outbox.show(product.connection)
    assert {row["key"]: row["error"] for row in shown} == {
        "bad": "definition: the detail of definition (the fix)",
        "gone": "not_found: the detail of not_found (the fix)",
    }
    assert [event for event, _ in product.reported].count("relay.refused") == 2

    # After it was mended.
    refusals.clear()
    product.outbox.again(product.connection, shown[0]["id"])
    product.connection.commit()
    await product.relay()
    assert sorted(product.keys) == ["a1", "a2", "b1", shown[0]["key"]]


@pytest.mark.parametrize(
    "answer",
    [
        problem(429, "too_many_requests", Retry_After=7),
        problem(503, "busy", Retry_After=2),
        problem(401, "token"),
        problem(403, "denied"),
        httpx.Response(502, text="<html>"),
        # Another service at the address: no verdict on the row.
        httpx.Response(404, text="not here"),
        httpx.Response(302, headers={"location": "https://evil.test/"}),
        httpx.Response(200, text="<html>"),
        httpx.ConnectError("refused"),
    ],
    ids=lambda answer: str(getattr(answer, "status_code", "refused")),
)
async def test_the_apis_own_trouble_refuses_no_row(product: Product, answer: Any):
    product.start("k1")
    product.start("k2", org="org_b")
    product.api.before = lambda what: answer

    with pytest.raises(ClientError):
        await product.relay()
    assert (product.rows("state"), product.keys) == (["waiting"] * 2, [])
    product.api.before = lambda what: None
    counts = await product.relay()

    assert (counts.sent, sorted(product.keys)) == (2, ["k1", "k2"])


async def test_a_proxy_that_refuses_one_row_stops_no_other(product: Product):
    product.start("bad")
    for number in range(40):
        product.start(f"k{number}", org=f"org_{number}")
    product.api.before = lambda what: httpx.Response(403, text="<html>") if what[2] == "bad" else None

    for _ in range(2):
        with pytest.raises(ClientError):
            await product.relay()

    assert sorted(product.keys) == sorted(f"k{number}" for number in range(40))
    assert product.rows("state") == ["waiting", *["sent"] * 40]


async def test_a_token_that_is_away_for_a_moment_marks_no_row_as_sent(product: Product):
    product.start("k1")
    error = ConfigurationError("the token file cannot be read")

    def absent() -> str:
        raise error

    client = AsyncClient(URL, absent, transport=httpx.MockTransport(product.api))
    with pytest.raises(ConfigurationError):
        await client.relay(product.outbox, once=True)
    assert product.rows("state", "first_sent_at", "claim") == [("waiting", None, None)]

    assert (await product.relay()).sent == 1


async def test_a_conflict_holds_back_its_definition_alone(product: Product):
    product.start("a1")
    product.start("a2")
    product.start("b1", definition="other")
    product.api.before = lambda what: problem(409, "conflict") if what[2] == "a1" else None

    counts = await product.relay()
    assert (product.keys, counts.later) == (["b1"], 1)
    # Not before its pause is over.
    product.api.before = lambda what: None
    assert (await product.relay()).sent == 0
    product.passed(2_000)
    await product.relay()

    assert product.keys == ["b1", "a1", "a2"]


async def test_a_conflict_that_lasts_is_refused_in_the_end(product: Product):
    product.start("a1")
    product.connection.execute("UPDATE orgworker_outbox SET tries = ?", (MAX_TRIES,))
    product.connection.commit()
    product.api.before = lambda what: problem(409, "conflict")

    assert (await product.relay()).refused == 1


async def test_a_row_that_makes_the_api_fail_stops_no_other(product: Product):
    product.start("poison")
    product.start("b", org="org_b")
    product.api.before = lambda what: problem(500, "unexpected") if what[2] == "poison" else None

    await product.relay()

    assert product.keys == ["b"]


async def test_a_row_committed_late_is_not_passed_over(product: Product):
    """A smaller id becomes visible after larger ones were sent."""
    product.start("first")
    product.start("second")
    product.connection.execute("UPDATE orgworker_outbox SET state = 'uncommitted' WHERE start_key = 'first'")
    product.connection.commit()
    await product.relay()
    assert product.keys == ["second"]

    product.connection.execute("UPDATE orgworker_outbox SET state = 'waiting' WHERE start_key = 'first'")
    product.connection.commit()
    await product.relay()

    assert product.keys == ["second", "first"]


async def test_a_key_with_other_params_is_the_first_run_and_says_so(product: Product):
    product.start("k", page=1)
    product.start("k", page=2)
    product.start("k", org="org_b", page=3)

    counts = await product.relay()

    assert (counts.sent, counts.replayed, len(product.api.runs)) == (3, 1, 2)
    assert product.api.runs["org_a", "export", "k"]["params"] == {"page": 1}
    assert product.rows("run_id", "error")[1][1] == "the key had made this run with other params"
    assert [fields for event, fields in product.reported if event == "relay.other_params"] == [
        {"row": 2, "org": "org_a", "definition": "export", "key": "k"}
    ]


async def test_a_row_whose_key_may_be_forgotten_is_not_sent_again(product: Product):
    """Sent a week ago, and the answer lost: the run may be deleted by now, and its key with it."""
    product.start("k1")
    lost = [httpx.ReadTimeout("lost")]
    product.api.after = lambda what: lost.pop() if lost else None
    with pytest.raises(ClientError):
        await product.relay()
    product.passed(7 * 86_400_000)

    counts = await product.relay()

    assert (counts.refused, product.rows("state")) == (1, ["refused"])
    assert "it may have run" in product.rows("error")[0]


async def test_a_week_without_the_api_loses_no_row(product: Product):
    product.start("k1")
    product.api.before = lambda what: httpx.ConnectError("refused")
    with pytest.raises(ClientError):
        await product.relay()
    product.passed(7 * 86_400_000)
    product.api.before = lambda what: None

    assert (await product.relay()).sent == 1


async def test_a_time_before_1970_is_at_once(product: Product):
    product.start("k1")
    product.connection.execute("UPDATE orgworker_outbox SET not_before = ?", (-(10**17),))
    product.connection.commit()

    assert (await product.relay()).sent == 1


async def test_a_start_for_later_waits_and_holds_nothing_back(product: Product):
    later = datetime.now(UTC) + timedelta(hours=1)
    product.outbox.start(product.connection, "org_a", "export", key="later", not_before=later)
    product.start("now")

    await product.relay()
    assert product.keys == ["now"]
    product.passed(3_700_000)
    await product.relay()

    assert product.keys == ["now", "later"]
    # The server has the last word on the time, by its own clock.
    assert b"not_before" in product.api.requests[-1].content


async def test_sent_rows_are_deleted_after_a_while_and_refused_ones_stay(product: Product):
    product.start("k1")
    product.start("bad")
    product.api.before = lambda what: problem(422, "definition") if what[2] == "bad" else None
    await product.relay()
    product.passed(8 * 86_400_000)

    await product.relay()

    assert product.rows("start_key") == ["bad"]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("params", "not JSON"),
        ("params", "[]"),
        ("params", '{"a":' * 100_000),
        ("org", ".."),
        ("definition", ""),
        ("start_key", "a\nb"),
        ("start_key", "é"),
        ("not_before", 10**18),
    ],
)
async def test_a_row_that_another_program_wrote_wrongly_is_refused(product: Product, column: str, value: Any):
    product.start("wrong")
    product.start("right", definition="other")
    update = f"UPDATE orgworker_outbox SET {column} = ? WHERE start_key = 'wrong'"
    product.connection.execute(update, (value,))
    product.connection.commit()

    await product.relay()

    assert product.keys == ["right"]
    # A time that never comes is not due.
    expected = "waiting" if column == "not_before" else "refused"
    assert product.rows("state") == [expected, "sent"]


async def test_an_outbox_without_connect_cannot_be_relayed(product: Product):
    with pytest.raises(ClientError, match="no connect"):
        await product.client().relay(Outbox("sqlite"), once=True)
