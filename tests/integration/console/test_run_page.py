"""The page of a run: the answer, its changes, its log in pages, and what an org does not see there."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from html import unescape
from html.parser import HTMLParser
from typing import Any
from urllib.parse import parse_qs

import httpx
import pytest
from sqlalchemy import insert, select, update
from starlette.requests import ClientDisconnect
from starlette.types import Message

from tests.browser.hostile import strings
from tests.fakes.rows import checkpoint_row, reading
from tests.fakes.stock import Stock
from tests.integration.console.conftest import (
    OURS,
    TOKENS,
    Site,
    csrf_of,
    logged_in,
    make_run,
    on_either,
)
from worker.features.console.pages import runs as run_pages
from worker.ids import ALL_ORGS, RunId, new_id, short_id
from worker.model.runs import worker_ends
from worker.model.runs.children import ChildCounts, FamilyCap
from worker.model.runs.waits import NewWait
from worker.store import children, tables
from worker.store.lists import runs
from worker.store.sql import statements

API = "/api/v1"
EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>"
TRACE = (
    "Traceback (most recent call last):\n"
    '  File "/srv/jobs/acme/digest.py", line 41, in digest\n    fetch()\n'
    '  File "/srv/.venv/lib/python3.13/site-packages/httpx/_client.py", line 9, in get\n    raise\n'
    "CrmDown: CRM answers 503\n"
)
ERROR = {"type": "CrmDown", "message": "CRM answers 503", "trace": TRACE}


def ended(site: Site, org: str = "org_a", *, state: str = "failed", error: Any = ERROR, **values: Any) -> str:
    """A run that ended at its second attempt, with all that a run can have."""
    run_id = make_run(site, org)
    now = site.clock.now()
    with site.database.transaction() as connection:
        table = tables.runs
        row = connection.execute(select(table).where(table.c.id == run_id)).mappings().one()
        connection.execute(tables.live_runs.delete().where(tables.live_runs.c.id == run_id))
        ends = {
            "state": state,
            "reason": "error",
            "error": error,
            "attempt": 2,
            "worker_id": new_id(),
        } | values
        connection.execute(
            update(table)
            .where(table.c.id == run_id)
            .values(
                created_at=now - timedelta(seconds=90),
                started_at=now - timedelta(seconds=30),
                finished_at=now,
                **ends,
            )
        )
        for attempt in (1, 2):
            start = now - timedelta(seconds=90 - 30 * attempt)
            connection.execute(
                insert(tables.attempts).values(
                    run_id=run_id, attempt=attempt, org_id=row["org_id"], worker_id=ends["worker_id"],
                    fencing_token=attempt, handler="acme.digest", started_at=start, token_ready_at=start,
                    handler_started_at=start, ended_at=start + timedelta(seconds=30), outcome="failed",
                    error=error, error_cause="CRM answers N", claims={"org_code": org, "sub": "…"},
                )
            )  # fmt: skip
        connection.execute(checkpoint_row(run_id, row["org_id"], now, {"page": 7}))
    return run_id


def log(site: Site, run_id: str, texts: Sequence[str], attempt: int = 1) -> None:
    with site.database.transaction() as connection:
        org_id = connection.execute(
            select(tables.runs.c.org_id).where(tables.runs.c.id == run_id)
        ).scalar_one()
        rows = [
            {
                "run_id": run_id, "attempt": attempt, "seq": seq, "org_id": org_id, "at": site.clock.now(),
                "level": "info", "source": "log", "text": text,
            }
            for seq, text in enumerate(texts, 1)
        ]  # fmt: skip
        for start in range(0, len(rows), 1000):
            connection.execute(insert(tables.run_logs), rows[start : start + 1000])


class _Dangers(HTMLParser):
    """Collects tags and attributes that could run something, but our own script files."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        is_ours = tag == "script" and (given.get("src") or "").startswith("/static/")
        if tag in ("script", "img", "iframe", "object", "style", "base") and not is_ours:
            self.found.append(tag)
        self.found += [name for name in given if name == "style" or name.startswith("on")]
        self.found += [href for href in given.values() if (href or "").strip().startswith("javascript:")]


def dangers(html: str) -> list[str]:
    """What of a page could run a script."""
    parser = _Dangers()
    parser.feed(html)
    return parser.found


async def test_the_answer_comes_first_with_the_next_step_in_the_console(staffed: Site):
    run, other = ended(staffed), ended(staffed, "org_b")
    async with logged_in(staffed, TOKENS["operator"]) as client:
        page = await client.get(f"/runs/{run}")

    assert page.status_code == 200
    text = page.text
    for sentence in (
        "Failed at attempt 2: CrmDown: CRM answers 503.",
        "1 other org had the same error in the hour around it.",
        "Retained: its last checkpoint ({&#34;page&#34;: 7}), its attempts and their log.",
        "Its handler had started: a retry is safe if it sends the idempotency key, which stays the same.",
    ):
        assert sentence in text
    assert text.index("Failed at attempt 2") < text.index('<form method="post" action="/runs/')
    assert '<a href="#retry-from-checkpoint">Retry it from its checkpoint</a>' in text
    assert "runs retry" not in text
    assert "1 frame in httpx" in text
    assert "/srv/jobs/acme/digest.py" in text
    assert "attempt 2" in text.lower()
    assert "<desc>waiting" in text
    assert other not in text


def sent(site: Site, run_id: str, *origins: str) -> None:
    """Let a run have sent three requests to each of these origins, and tried another one."""
    with site.database.transaction() as connection:
        org_id = connection.execute(
            select(tables.runs.c.org_id).where(tables.runs.c.id == run_id)
        ).scalar_one()
        numbers = {"requests": 3, "bytes_out": 1_200, "bytes_in": 56_000, "denied": 1, "attempt": 1}
        row = numbers | {"statuses": {"429": 1, "200": 2}, "waited_seconds": 12.0}
        rows = [row | {"run_id": run_id, "org_id": org_id, "origin": origin} for origin in origins]
        connection.execute(insert(tables.run_egress), rows)


@on_either
async def test_a_run_shows_what_it_sent_to_its_org_and_to_operators(staffed: Site):
    run, other = make_run(staffed), make_run(staffed, "org_b")
    sent(staffed, run, "https://api.example.com")
    sent(staffed, other, "https://canary.example.com")

    for token in (TOKENS["viewer"], staffed.token("org_a")):
        text = (await staffed.get(f"/runs/{run}", token)).text
        shown = (await staffed.get(f"{API}/runs/{run}", token)).json()

        for cell in ("https://api.example.com", "200: 2, 429: 1", "12.0 s", "1,200", "56,000"):
            assert cell in text
        assert "It waited 12 s for https://api.example.com." in text
        assert shown["egress"] == [
            {
                "origin": "https://api.example.com", "requests": 3, "bytes_out": 1_200, "bytes_in": 56_000,
                "statuses": {"200": 2, "429": 1}, "denied": 1, "waited_seconds": 12.0,
            }
        ]  # fmt: skip
        assert "canary" not in text
    assert (await staffed.get(f"/runs/{other}", staffed.token("org_a"))).status_code == 404
    assert 'id="requests"' not in (await staffed.get(f"/runs/{make_run(staffed)}", TOKENS["viewer"])).text


async def test_origins_that_a_run_chose_run_nothing_in_a_page(staffed: Site):
    run = make_run(staffed)
    hostile = [text for text in strings() if text.isprintable()]
    sent(staffed, run, EVIL, *hostile[:50])

    page = await staffed.get(f"/runs/{run}", TOKENS["viewer"])

    assert page.status_code == 200
    assert "&lt;script&gt;" in page.text
    assert dangers(page.text) == []


CAUSES = [
    ({}, "CrmDown: CRM answers 503"),
    ({"reason": "lost"}, "its worker died too often without a new checkpoint"),
    (
        {"state": "refused", "reason": "scope_missing", "detail": "read:kb"},
        "its token lacks the scope read:kb",
    ),
    ({"state": "skipped", "reason": "flag_off", "detail": "<b>"}, "the flag <b> is off for its org"),
    ({"state": "cancelled", "reason": "requested"}, "it was cancelled on request"),
]


@on_either
async def test_the_lists_say_the_cause_with_which_the_page_begins(staffed: Site):
    for values, cause in CAUSES:
        run = ended(staffed, **values)
        for token in (TOKENS["viewer"], staffed.token("org_a")):
            listed = await staffed.get("/search?q=org:org_a", token)
            page = await staffed.get(f"/runs/{run}", token)

            newest = re.search(r'data-label="Why"[^>]*>(.*?)</td>', listed.text, re.DOTALL)
            lead = re.search(r'<p class="lead">(.*?)</p>', page.text, re.DOTALL)
            assert newest is not None
            assert lead is not None
            assert cause in re.sub("<[^>]+>", "", newest[1]).replace("&lt;", "<").replace("&gt;", ">")
            assert f" at attempt 2: {cause}" in unescape(lead[1])


@on_either
async def test_a_list_says_no_more_to_an_org_than_the_page(staffed: Site):
    """The worker's own text in `detail` is not for an org. The control: operators read it."""
    run = make_run(staffed)
    with staffed.database.transaction() as connection:
        live = tables.live_runs
        values = {"reason": "no_token", "detail": "issuer_unavailable: no file /srv/secrets/org_b"}
        connection.execute(
            update(live).where(live.c.id == run).values(available_at=staffed.clock.now(), **values)
        )
    shown = [
        re.sub("<[^>]+>", "", (await staffed.get("/search?q=state:waiting", token)).text)
        for token in (TOKENS["viewer"], staffed.token("org_a"))
    ]

    assert "its org has no token (issuer_unavailable: no file /srv/secrets/org_b); it is" in shown[0]
    assert "its org has no token (issuer_unavailable); it is requested again at 20" in shown[1]
    assert "secrets" not in shown[1]


@on_either
async def test_a_retry_from_the_checkpoint_says_why_and_a_second_one_only_again(staffed: Site):
    run = ended(staffed)
    async with logged_in(staffed, TOKENS["operator"]) as client:
        csrf = csrf_of(await client.get(f"/runs/{run}"))
        form = {"csrf": csrf, "from_checkpoint": "1", "reason": " the CRM is back "}
        retried = await client.post(f"/runs/{run}/retry", data=form, headers=OURS)
        new = retried.headers["location"].rpartition("/")[2]
        detail = {"retry_of": run, "from_checkpoint": True, "reason": "the CRM is back"}
        assert staffed.last_change() == ("operator:operator", "run.retry", detail)

        page = await client.get(f"/runs/{run}")
        assert f'It was retried as <a href="/runs/{new}" title="{new}">' in page.text
        assert f"run <code>{short_id(new)}</code>" in page.text
        assert "This run was retried already." in page.text
        assert f'This is a retry of <a href="/runs/{run}" ' in (await client.get(f"/runs/{new}")).text

        refused = await client.post(f"/runs/{run}/retry", data={"csrf": csrf}, headers=OURS)
        assert (refused.status_code, "Nothing was changed." in refused.text) == (409, True)
        assert "Log out" in refused.text
        again = await client.post(f"/runs/{run}/retry", data={"csrf": csrf, "again": "1"}, headers=OURS)

    assert again.status_code == 303
    row = reading(staffed.database, runs.run, ALL_ORGS, new)
    assert (row["checkpoint"], row["retry_of"]) == ({"page": 7}, run)


# What no button of the page sends.
NOT_JSON = {
    "text": "yes",
    "a beginning": '{"a":',
    "two values": "1 2",
    "no number": "NaN",
    "too large a number": "1" * 5000,
    "an infinite number": "1e999",
    "too deep to read": "[" * 50_000,
    "too deep to store": "[" * 201 + "]" * 201,
    "half a character": '"\\ud800"',
    "a NUL": '"\\u0000"',
}


async def test_a_choice_that_is_not_json_is_a_mistake_of_the_caller(
    staffed: Site, monkeypatch: pytest.MonkeyPatch
):
    run = make_run(staffed)
    async with logged_in(staffed, TOKENS["operator"]) as client:
        form = {"csrf": csrf_of(await client.get(f"/runs/{run}")), "name": "approval"}

        async def answer(choice: str) -> httpx.Response:
            return await client.post(f"/runs/{run}/answer", data=form | {"choice": choice}, headers=OURS)

        answers = {name: await answer(choice) for name, choice in NOT_JSON.items()}
        assert {name: each.status_code for name, each in answers.items()} == dict.fromkeys(NOT_JSON, 400)
        assert "hoice is not JSON" in answers["text"].text
        assert (await answer('{"by": 1}')).status_code == 303
        # The control: read without care, it is an error of the server.
        monkeypatch.setattr(run_pages, "from_json", lambda text, name: json.loads(text))
        unread = ("text", "too large a number", "too deep to read")
        assert [(await answer(NOT_JSON[name])).status_code for name in unread] == [500] * 3


def asks(site: Site, *waits: NewWait) -> str:
    """A run whose handler waits for these."""
    stock = Stock(site.database)
    worker = stock.worker(handlers=("acme.digest",))
    run_id = make_run(site)
    [run] = stock.admit(worker, offered={"acme.digest": None})
    for wait in waits:
        with site.database.transaction() as connection:
            statements(connection).open_wait(
                connection, run.id, run.fencing_token, attempt=run.attempt, wait=wait
            )
    stock.finish(worker, stock.ended(run, "parked", outcome="parked", reason="answer", result=None))
    assert run.id == run_id
    return run_id


def forms_of(page: str) -> tuple[list[str], int]:
    """The values of the buttons of the questions, and how many fields take any answer."""
    card = page.partition('id="waits"')[2].partition("</section>")[0]
    return [unescape(value) for value in re.findall(r'name="choice" value="([^"]*)"', card)], card.count(
        "<textarea"
    )


@on_either
async def test_options_bind_on_the_page_and_in_the_api(staffed: Site):
    """The control is an `ask` with options: its buttons are beside a field for any answer, which is taken."""
    options = ("yes", '"<no>"', True, None, *range(20))
    run = asks(
        staffed,
        NewWait("approval", 1, "answer", ask_json='{"options":["maybe"]}', options=options),
        NewWait("free", 1, "answer", ask_json='{"options":["a","b"]}'),
    )
    headers = {"authorization": f"Bearer {TOKENS['operator']}"}
    async with logged_in(staffed, TOKENS["operator"]) as client:
        page = await client.get(f"/runs/{run}")
        values, fields = forms_of(page.text)
        assert sorted(values) == sorted(map(json.dumps, [*options, "a", "b"]))
        assert fields == 1
        form = {"csrf": csrf_of(page)}
        for given in ({"data": "maybe"}, {"choice": "1.5"}, {"data": '"yes" '.upper()}):
            refused = await client.post(
                f"/runs/{run}/answer", data=form | given | {"name": "approval"}, headers=OURS
            )
            assert refused.status_code == 400
            assert "The answer to approval is one of " in refused.text
        free = await client.post(
            f"/runs/{run}/answer", data=form | {"data": "maybe", "name": "free"}, headers=OURS
        )
        assert free.status_code == 303
    async with staffed.client() as client:
        path = f"/api/v1/runs/{run}/answers"
        refused = await client.post(f"{path}/approval", json={"data": "maybe"}, headers=headers)
        misspelt = await client.post(f"{path}/aproval", json={"data": "yes"}, headers=headers)
        taken = await client.post(f"{path}/approval", json={"data": "yes"}, headers=headers)
    assert (refused.status_code, misspelt.status_code, taken.status_code) == (400, 409, 200)
    assert refused.headers["content-type"] == "application/problem+json"
    assert "is one of" in refused.json()["detail"]
    assert misspelt.json()["error"]["fix"].startswith("did you mean approval? ")
    assert taken.json()["options"] == list(options)


@on_either
async def test_what_no_person_answers_is_no_question_on_the_page(staffed: Site):
    run = asks(
        staffed,
        NewWait("approval", 1, "answer", options=("yes",)),
        NewWait("children:gather", 1, "children"),
        NewWait("batch:openai", 1, "batch"),
    )
    async with logged_in(staffed, TOKENS["operator"]) as client:
        assert forms_of((await client.get(f"/runs/{run}")).text) == (['"yes"'], 0)


@on_either
async def test_the_page_says_which_early_answer_was_not_taken(staffed: Site):
    run = asks(staffed, NewWait("approval", 1, "answer", options=("yes", "no")))
    Stock(staffed.database).change(tables.waits, run, refused={"answer": EVIL})
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        page = (await client.get(f"/runs/{run}")).text
    assert "not one of the options: <code>" in page and "alert(1)" in page
    assert dangers(page) == []


async def test_a_waiting_run_is_cancelled_after_its_confirmation(staffed: Site):
    run = make_run(staffed)
    async with logged_in(staffed, TOKENS["operator"]) as client:
        page = await client.get(f"/runs/{run}")
        assert "ends as cancelled and does not start" in page.text
        form = {"csrf": csrf_of(page), "reason": "by mistake"}
        answer = await client.post(f"/runs/{run}/cancel", data=form, headers=OURS)
        assert (answer.status_code, answer.headers["location"]) == (303, f"/runs/{run}")
        assert staffed.last_change()[1:] == ("run.cancel", {"definition": "digest", "reason": "by mistake"})
        twice = await client.post(f"/runs/{run}/cancel", data=form, headers=OURS)
        long = await client.post(f"/runs/{run}/retry", data=form | {"reason": "x" * 501}, headers=OURS)

    assert (twice.status_code, long.status_code) == (409, 400)


async def test_those_who_may_not_change_a_run_see_no_forms(staffed: Site):
    run, waiting = ended(staffed), make_run(staffed)
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        pages = [await client.get(f"/runs/{each}") for each in (run, waiting)]
    pages.append(await staffed.get(f"/runs/{run}", TOKENS["admin"]))

    for page in pages:
        assert page.status_code == 200
        assert re.search(r"/runs/\S+/(retry|cancel)", page.text) is None
        assert "#retry" not in page.text


@on_either
async def test_an_org_sees_neither_trace_nor_worker_nor_path_nor_other_orgs(staffed: Site):
    message = {**ERROR, "message": "no file /srv/secrets/org_b.json"}
    run = ended(staffed, error=message)
    ended(staffed, "org_b", error=message)
    log(staffed, run, ["opened /srv/secrets/key", "and read it"])
    org, operator = [
        await staffed.get(f"/runs/{run}", token) for token in (staffed.token("org_a"), TOKENS["viewer"])
    ]

    assert org.status_code == operator.status_code == 200
    worker = str(reading(staffed.database, runs.run, ALL_ORGS, run)["worker"])
    # The control: the same page shows an operator all of it.
    for hidden in (worker, "/srv/jobs/acme", "Traceback", "1 other org", "/srv/secrets/key"):
        assert hidden in operator.text
        assert hidden not in org.text
    assert "CrmDown: no file &lt;path&gt;" in org.text
    assert "and read it" in org.text
    assert (await staffed.get(f"/runs/{run}", staffed.token("org_c"))).status_code in (403, 404)


async def test_the_log_shows_its_tail_and_pages_back_and_forth(staffed: Site):
    run = ended(staffed)
    log(staffed, run, [f"line <{n}>" for n in range(1, 451)])
    log(staffed, run, ["the last"], attempt=2)
    pages, path = [], f"/runs/{run}"
    while path:
        page = await staffed.get(path, TOKENS["viewer"])
        pages.append(re.findall(r"line &lt;(\d+)&gt;", page.text))
        found = re.search(rf'href="(/runs/{run}/log\?before=[\d.]+)"', page.text)
        path = found[1] if found else ""

    assert [len(page) for page in pages] == [199, 200, 51]
    assert [int(n) for page in reversed(pages) for n in page] == list(range(1, 451))
    forth = await staffed.get(f"/runs/{run}/log?after=1.400", TOKENS["viewer"])
    assert re.findall(r"line &lt;(\d+)&gt;", forth.text) == [str(n) for n in range(401, 451)]
    assert "the last" in forth.text
    for query, status in (
        ("before=1", 404),
        ("before=-1.2", 404),
        ("page=2", 400),
        ("before=9999999999.1", 200),
    ):
        assert (await staffed.get(f"/runs/{run}/log?{query}", TOKENS["viewer"])).status_code == status


@on_either
async def test_the_whole_log_is_a_text_file_read_in_pages(staffed: Site, monkeypatch: pytest.MonkeyPatch):
    run = ended(staffed)
    log(staffed, run, [f"line {n}" for n in range(1, 2 * run_pages.LINES + 1)])
    log(staffed, run, ["the last"], attempt=2)
    read = []
    lines = runs.lines

    def counted(*arguments: Any, **options: Any) -> Any:
        read.append(options["limit"])
        return lines(*arguments, **options)

    monkeypatch.setattr(runs, "lines", counted)
    file = await staffed.get(f"/runs/{run}/log.txt", TOKENS["viewer"])

    assert file.status_code == 200
    assert file.headers["content-type"] == "text/plain; charset=utf-8"
    assert file.headers["content-disposition"] == f'attachment; filename="run-{run}.log"'
    assert file.headers["x-content-type-options"] == "nosniff"
    texts = [text.split(" ", 1)[1] for text in file.text.splitlines()]
    assert texts == [*(f"info    line {n}" for n in range(1, 2 * run_pages.LINES + 1)), "info    the last"]
    # No more of it is in memory at once than a page.
    assert read == [run_pages.LINES] * 3
    for path, status in ((f"/runs/{run}/log.txt?x=1", 400), (f"/runs/{new_id()}/log.txt", 404)):
        assert (await staffed.get(path, TOKENS["viewer"])).status_code == status
    assert (await staffed.get(f"/runs/{make_run(staffed)}/log.txt", TOKENS["viewer"])).text == ""


@on_either
async def test_the_file_of_a_log_shows_an_org_what_the_page_shows(staffed: Site):
    run, worker = ended(staffed), f"worker {new_id()}"
    log(staffed, run, ["opened /srv/secrets/key", f"{worker} died"])
    with staffed.database.transaction() as connection:
        of_worker = update(tables.run_logs).where(tables.run_logs.c.run_id == run, tables.run_logs.c.seq == 2)
        connection.execute(of_worker.values(source=worker_ends.SOURCE))
    org, operator = [
        (await staffed.get(f"/runs/{run}/log.txt", token)).text
        for token in (staffed.token("org_a"), TOKENS["viewer"])
    ]

    for hidden in ("/srv/secrets", worker):
        assert hidden in operator
        assert hidden not in org
    assert "info    opened <path>" in org
    assert "a worker died" in org
    assert (await staffed.get(f"/runs/{run}/log.txt", staffed.token("org_b"))).status_code == 404


@on_either
async def test_no_text_in_the_file_of_a_log_is_more_than_a_text(staffed: Site):
    """No line passes for another, and none controls the terminal that shows the file."""
    run = ended(staffed)
    log(staffed, run, [*strings(), "real\n2030-01-01T03:00:00.000000Z info    forged"])
    file = await staffed.get(f"/runs/{run}/log.txt", TOKENS["viewer"])

    assert file.headers["content-type"].startswith("text/plain")
    heads = [text for text in file.text.split("\n") if text and not text.startswith("    ")]
    assert len(heads) == len(strings()) + 1
    assert file.text.endswith("    2030-01-01T03:00:00.000000Z info    forged\n")
    assert file.text.replace("\n", "").isprintable()
    # The control: as it was logged it does control a terminal.
    assert not "".join(strings()).isprintable()


async def test_a_client_that_takes_nothing_of_a_log_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_pages, "STALLED", 0.01)
    sent = []

    async def parts() -> AsyncIterator[str]:
        yield "first"
        yield "second"

    async def stalling(message: Message) -> None:
        sent.append(message["type"])
        if len(sent) > 1:
            await asyncio.Event().wait()

    with pytest.raises(ClientDisconnect):
        await run_pages.LogFile("run.log", parts()).stream_response(stalling)
    assert sent == ["http.response.start", "http.response.body"]


@on_either
async def test_a_run_leads_to_those_before_and_after_it(staffed: Site):
    """Those of its definition: neither of another one nor of another org."""
    first, second = ended(staffed), ended(staffed)
    make_run(staffed, "org_b")
    third = make_run(staffed)
    links = {}
    for run in (first, second, third):
        for who, token in (("operator", TOKENS["viewer"]), ("org", staffed.token("org_a"))):
            page = (await staffed.get(f"/runs/{run}", token)).text
            found = re.findall(r'<a rel="(prev|next)" href="/runs/([0-9a-f-]{36})">', page)
            links[run, who] = dict(found)

    for who in ("operator", "org"):
        assert links[first, who] == {"next": second}
        assert links[second, who] == {"prev": first, "next": third}
        assert links[third, who] == {"prev": second}


@on_either
async def test_hostile_texts_of_a_run_stay_texts(staffed: Site):
    error = {"type": EVIL, "message": EVIL, "trace": f"{TRACE}{EVIL}"}
    run = ended(
        staffed, error=error, detail=EVIL, result={EVIL: EVIL}, params={EVIL: [EVIL]},
        progress={"done": 1, "total": 2, "note": EVIL}, request_key=EVIL,
    )  # fmt: skip
    log(staffed, run, [EVIL, "\u202e\x1b[31m"])
    async with logged_in(staffed, TOKENS["operator"]) as client:
        pages = [await client.get(path) for path in (f"/runs/{run}", f"/runs/{run}/log")]

    for page in pages:
        assert page.status_code == 200
        assert "alert(1)" in page.text
        assert dangers(page.text) == []


@on_either
async def test_the_page_of_a_run_with_a_long_log_and_many_attempts_stays_small_and_quick(staffed: Site):
    run = ended(staffed, result={"rows": ["x" * 100] * 5000})
    log(staffed, run, ["y" * 16_000] * 300 + [f"a line of usual length, number {n}" for n in range(20_000)])
    with staffed.database.transaction() as connection:
        row = (
            connection.execute(
                select(tables.attempts).where(tables.attempts.c.run_id == run, tables.attempts.c.attempt == 1)
            )
            .mappings()
            .one()
        )
        rows = [{**row, "attempt": attempt, "error": ERROR} for attempt in range(3, 2003)]
        connection.execute(insert(tables.attempts), rows)
    for path in (f"/runs/{run}", f"/runs/{run}/log?before=1.250"):
        took = []
        for _ in range(4):
            start = time.process_time()
            page = await staffed.get(path, TOKENS["viewer"])
            took.append(time.process_time() - start)
        assert page.status_code == 200
        assert len(gzip.compress(page.content)) < 60_000
        # Processor time, so that other tests do not matter; a page has 50 ms.
        assert min(took) < 0.25
    assert len(reading(staffed.database, runs.run, ALL_ORGS, RunId(run))["attempts"]) == 1000


async def test_a_link_searches_for_others_with_the_same_cause(staffed: Site):
    run = ended(staffed)
    ended(staffed, "org_b")
    page = await staffed.get(f"/runs/{run}", TOKENS["viewer"])

    found = re.search(r'href="/search\?([^"]+)">Show them', page.text)
    assert found is not None
    assert parse_qs(found[1]) == {"q": ['cause:"CRM answers N"']}


@on_either
async def test_the_newest_steps_are_listed_with_the_beginning_of_their_results(staffed: Site):
    run = ended(staffed)
    with staffed.database.transaction() as connection:
        org_id = connection.execute(select(tables.runs.c.org_id).where(tables.runs.c.id == run)).scalar_one()
        at = staffed.clock.now()
        shared = {"run_id": run, "org_id": org_id, "name": "ask", "attempt": 1, "fencing_token": 1}
        shared |= {
            "handler": "acme.digest",
            "started_at": at,
            "ended_at": at + timedelta(seconds=3),
            "size": 5,
        }
        rows = [
            {"seq": seq, "occurrence": seq, "key": None, "result": f"answer {seq} " + "x" * 500}
            for seq in range(1, 52)
        ]
        rows.append({"seq": 52, "occurrence": 1, "key": "<b>", "result": ["<i>"]})
        rows = [shared | row for row in rows]
        connection.execute(insert(tables.steps), rows)

    async with logged_in(staffed, TOKENS["operator"]) as client:
        page = await client.get(f"/runs/{run}")

    assert "<code>ask[&lt;b&gt;]</code>" in page.text
    assert "<code>ask#51</code>" in page.text and "<code>ask#2</code>" not in page.text
    assert "The newest 50 of 52 steps." in page.text
    assert "answer 51 xxx" in page.text and "x" * 200 not in page.text
    assert dangers(page.text) == []
    assert "its 52 steps, the last one ask[&lt;b&gt;]" in page.text


def family(site: Site) -> tuple[str, str, str]:
    """A run of org_a that waits, and its two children: one has failed, the other one waits."""
    parent, failed, waiting = make_run(site), new_id(), new_id()
    with site.database.transaction() as connection:
        run, live = (
            dict(connection.execute(select(table).where(table.c.id == parent)).mappings().one())
            for table in (tables.runs, tables.live_runs)
        )
        of_parent = {"run_id": parent, "org_id": run["org_id"], "root_id": parent}
        cap = FamilyCap("acme.digest").as_json()
        connection.execute(
            insert(tables.parents).values(**of_parent, depth=0, cap=cap, keep=False, started=2, tree=2)
        )
        for place, id_ in enumerate((failed, waiting), 1):
            own = {"id": id_, "origin": "child", "handler": "acme.other", "idempotency_key": new_id()}
            end = {"state": "failed", "finished_at": site.clock.now()} if id_ == failed else {}
            connection.execute(insert(tables.runs).values(run | own | {"request_key": None} | end))
            if not end:
                place_of = {"parent_id": parent, "place": place, "serial": False}
                connection.execute(insert(tables.live_runs).values(live | own | place_of))
            link = {"parent_id": parent, "place": place, "run_id": id_, "depth": 1}
            link |= {"org_id": run["org_id"], "root_id": parent}
            key = {"handler": "acme.other", "key": f"k{place}", "occurrence": 1}
            connection.execute(insert(tables.children).values(**link, **key))
    return parent, failed, waiting


@on_either
async def test_the_children_of_a_run_are_one_bar_and_those_that_failed_start_again(
    staffed: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = staffed
    parent, failed, waiting = family(site)
    async with logged_in(site, TOKENS["operator"]) as client:
        with monkeypatch.context() as patched:
            many = ChildCounts({"succeeded": 7309, "failed": 3, "running": 8, "waiting": 2680})
            patched.setattr(children, "counts", lambda *_: many)
            page = await client.get(f"/runs/{parent}")
        text = " ".join(re.sub("<[^>]+>", "", page.text).split())
        assert "7,312 of 10,000 have ended, 3 failed" in text
        assert '<progress max="10000" value="7312"' in page.text
        # Children have no rows here but the first that failed.
        assert f"/runs/{failed}" in page.text
        assert f"/runs/{waiting}" not in page.text

        form = {"csrf": csrf_of(page), "only_children": "1"}
        answer = await client.post(f"/runs/{parent}/retry", data=form, headers=OURS)

    assert (answer.status_code, answer.headers["location"]) == (303, f"/runs/{parent}")
    stock = Stock(site.database)
    [again] = [row for row in stock.all(tables.runs) if row["retry_of"] == failed]
    assert [row["run_id"] for row in stock.all(tables.children)] == [again["id"], waiting]
    row = reading(site.database, runs.run, ALL_ORGS, parent)
    assert row["children"] is not None
    assert (row["children"]["total"], row["children"]["failed"]) == (2, 0)


@on_either
async def test_the_api_lists_children_only_to_those_who_ask_and_see_them(staffed: Site) -> None:
    site = staffed
    parent, failed, waiting = family(site)

    async def found(query: str, token: str) -> set[str]:
        answer = await site.get(f"{API}/runs?{query}", token)
        assert answer.status_code == 200, answer.text
        return {row["id"] for row in answer.json()}

    ours, others = site.token("org_a"), site.token("org_b")
    assert await found("", ours) == await found("q=definition:digest", ours) == {parent}
    assert await found(f"q=parent:{parent}", ours) == {failed, waiting}
    assert await found(f"q=parent:{parent} state:failed", ours) == {failed}
    assert await found("q=children:yes", ours) == {parent, failed, waiting}
    for query in (f"q=parent:{parent}", "q=children:yes", f"q={waiting}"):
        assert await found(query, others) == set(), query
    row = (await site.get(f"{API}/runs/{parent}", ours)).json()
    assert (row["children"]["total"], row["children"]["failed_runs"]) == (2, [failed])
    assert (await site.get(f"{API}/runs/{failed}", ours)).json()["parent"] == parent
