"""The page of a run: the answer first, then its attempts, log and values; and the changes of a run."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import Connection
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Send

from worker.clock import to_text
from worker.diagnosis import why as explanations
from worker.errors import Conflict, DefinitionError, NotFound, UsageError, WorkerError
from worker.features.console.callers import Caller, caller_of
from worker.features.console.charts import Lane, LanePiece, gantt
from worker.features.console.pages.base import PageGroup, allowed, query
from worker.features.console.pages.forms import as_text, from_json, from_typed, problem_of, reason_of
from worker.features.console.pages.links import cause_path, step_path
from worker.features.console.pages.rendering import in_words
from worker.ids import OrgId, RunId, given_id
from worker.kit.output import printable
from worker.model.claims import claims_in_words
from worker.model.definitions.budgets import MONEY, amount_text
from worker.model.runs.clauses import clauses, up
from worker.model.runs.egress import waited_for
from worker.model.runs.run import step_label
from worker.model.runs.traces import Part, parts_of
from worker.model.runs.waits import is_open_question
from worker.model.runs.why import Why
from worker.model.runs.worker_ends import SOURCE
from worker.operations.runs import require_run
from worker.store.lists import runs
from worker.store.lists.rows import LogRow, Run, RunDetail, StepRow, WaitRow
from worker.store.lists.run_ids import id_of
from worker.store.orgs import scope_of
from worker.store.prices import currency_of

# Characters of a value such as params that a page shows at most.
VALUE = 8_000
# Attempts that the table lists, the newest.
ATTEMPTS = 25
# Steps that the table lists, the newest, and characters of the result of each.
STEPS = 50
STEP_TEXT = 160
# Waits that the page shows, the newest, and the answers to one that have a button.
WAITS = 25
OPTIONS = 10
_OCCURRENCE = re.compile(r"[1-9][0-9]{0,4}")
# Attempts that the chart draws; a run without a token may have thousands.
MAX_LANES = 12

Row = Mapping[str, Any]
Place = tuple[int, int]

# Lines of a page of a log, and the characters that it shows at most: of one line, and of all.
LINES = 200
LINE = 2_000
TEXT = 120_000
# Seconds for which a client may take nothing of a file.
STALLED = 30.0
# The largest number of a column.
_MAX_NUMBER = 2**31 - 1


class RunPages(PageGroup):
    def routes(self) -> Sequence[Route]:
        return (
            Route("/runs/{run}", self._run, methods=["GET"]),
            Route("/runs/{run}/log", self._log, methods=["GET"]),
            Route("/runs/{run}/log.txt", self._log_file, methods=["GET"]),
            Route("/runs/{run}/cancel", self._cancel, methods=["POST"]),
            Route("/runs/{run}/retry", self._retry, methods=["POST"]),
            Route("/runs/{run}/answer", self._answer, methods=["POST"]),
        )

    async def _run(self, request: Request) -> Response:
        if (there := await self._by_whole_id(request)) is not None:
            return there
        query(request)
        return await self._page(request)

    async def _by_whole_id(self, request: Request, rest: str = "") -> Response | None:
        """The way to this page by the run's whole id; None if its address has that."""
        caller, text = caller_of(request), request.path_params["run"]
        given = given_id(text)
        if given is None or text == given.first == given.last:
            return None

        def work(connection: Connection) -> RunId:
            return id_of(connection, scope_of(connection, caller.scope()), text)

        id_ = await self._pages.database.read(caller, work)
        asked = f"?{request.url.query}" if request.url.query else ""
        return RedirectResponse(f"/runs/{id_}{rest}{asked}", 303)

    async def _page(self, request: Request, problem: WorkerError | None = None) -> Response:
        """The page of a run; after a change that was refused, with its problem."""
        caller, run_id = caller_of(request), request.path_params["run"]
        now = self._pages.clock.now()

        def work(connection: Connection) -> dict[str, Any]:
            run = caller.sees(RunDetail, runs.run(connection, caller.scope(), run_id))
            failed = next((each for each in reversed(run["attempts"]) if each["error"]), None)
            cause = failed and failed["error_cause"]
            has_money = any(spent["meter"] == MONEY for spent in run["spends"])
            currency = currency_of(connection) or "" if has_money else ""
            others = cause_path(cause) if cause and caller.org is None else None
            return {
                "run": run,
                "attempts": run["attempts"][: -ATTEMPTS - 1 : -1],
                "steps": _steps_of(run),
                "amount": partial(amount_text, currency=currency),
                "by_name": by_name(run["steps"]),
                "neighbours": runs.neighbours(connection, caller.scope(), run["id"]),
                "answer": answer_of(connection, caller, run),
                "chart": gantt(lanes_of(run, now), title="Waiting and running, by attempt", now=now),
                "trace": _trace_of(failed),
                "failed": failed,
                "log": page_before(connection, caller, run["id"]),
                "is_live": run["state"] in ("waiting", "held", "running"),
                "questions": _questions_of(run),
                "waited": waited_for(run["egress"]),
                "waits": [wait for wait in run["waits"][::-1] if wait["opened_at"] is not None][:WAITS],
                "values": _values_of(run),
                **problem_of(problem),
                "may": allowed(request),
                "others_href": others,
                "now": now,
            }

        return await self._pages.show(request, "run.html", work)

    async def _log(self, request: Request) -> Response:
        if (there := await self._by_whole_id(request, "/log")) is not None:
            return there
        caller, given = caller_of(request), query(request, "before", "after")
        places = {name: place_of(text) for name, text in given.items()}

        def work(connection: Connection) -> dict[str, Any]:
            run = caller.sees(Run, shown(connection, caller, request.path_params["run"]))
            if "after" in places:
                log = page_after(connection, caller, run["id"], places["after"])
            else:
                log = page_before(connection, caller, run["id"], places.get("before"))
            return {"run": run, "log": log}

        return await self._pages.show(request, "run_log.html", work)

    async def _log_file(self, request: Request) -> Response:
        """The whole log as this caller sees it, read in pages while it is sent."""
        caller = caller_of(request)
        query(request)
        database, scope = self._pages.database, caller.scope()
        run = await database.read(caller, lambda found: shown(found, caller, request.path_params["run"]))

        def read(connection: Connection, after: Place) -> tuple[str, Place | None]:
            lines = runs.lines(connection, scope, run["id"], after=after, limit=LINES)
            text = "".join(line_text(caller.sees(LogRow, line)) for line in lines)
            return text, (lines[-1]["attempt"], lines[-1]["seq"]) if len(lines) == LINES else None

        async def parts() -> AsyncIterator[str]:
            after: Place | None = runs.START
            while after is not None:
                text, after = await database.read(caller, partial(read, after=after))
                yield text

        return LogFile(f"run-{run['id']}.log", parts())

    async def _cancel(self, request: Request) -> Response:
        _, form = await self._pages.checked_form(request)
        caller, run_id = caller_of(request), request.path_params["run"]
        try:
            await self._pages.database.cancel(caller, run_id, reason=reason_of(form))
        except (Conflict, DefinitionError) as error:
            return await self._page(request, error)
        return RedirectResponse(f"/runs/{run_id}", 303)

    async def _answer(self, request: Request) -> Response:
        _, form = await self._pages.checked_form(request)
        caller, run_id = caller_of(request), request.path_params["run"]
        name, occurrence = form.get("name", ""), form.get("occurrence", "1")
        if not _OCCURRENCE.fullmatch(occurrence):
            raise UsageError(
                f"occurrence {occurrence!r:.80} is not a number", fix="open the run's page again"
            )
        # The value of a button is JSON; what people type may be plain text.
        data = from_json(form["choice"], "choice") if "choice" in form else from_typed(form.get("data", ""))
        try:
            await self._pages.database.answer(caller, run_id, name, data=data, occurrence=int(occurrence))
        except (Conflict, UsageError) as error:
            return await self._page(request, error)
        return RedirectResponse(f"/runs/{run_id}", 303)

    async def _retry(self, request: Request) -> Response:
        _, form = await self._pages.checked_form(request)
        caller, run_id = caller_of(request), request.path_params["run"]
        try:
            run = await self._pages.database.retry(
                caller,
                run_id,
                from_checkpoint="from_checkpoint" in form,
                again="again" in form,
                only_children="only_children" in form,
                reason=reason_of(form),
            )
        except (Conflict, DefinitionError) as error:
            return await self._page(request, error)
        return RedirectResponse(f"/runs/{run['id']}", 303)


def shown(connection: Connection, caller: Caller, run_id: str) -> Run:
    """The row of a run that this caller may see, as `runs list` has it; raises NotFound."""
    found = require_run(connection, run_id, caller.org)
    return runs.row(connection, OrgId(found["org_id"]), RunId(found["id"]))


def _steps_of(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The newest steps, newest first, with the beginning of each result."""
    shown = []
    for step in run["steps"][: -STEPS - 1 : -1]:
        text = None
        if step["result"] is not None or step["size"] == len("null"):
            text = json.dumps(step["result"], ensure_ascii=False)
            text = text if len(text) <= STEP_TEXT else text[: STEP_TEXT - 1] + "…"
        shown.append(
            {**step, "label": step_label(step["name"], step["key"], step["occurrence"]), "text": text}
        )
    return shown


class NamedSteps(NamedTuple):
    """The steps of one name: how many there are, the time that their calls took together, what they spent."""

    name: str
    steps: int
    took: timedelta
    spends: Mapping[str, int]


def by_name(steps: Sequence[StepRow]) -> list[NamedSteps]:
    """Steps by their names, those that took longest first; nothing if no name is used twice."""
    rows: dict[str, list[StepRow]] = {}
    for step in steps:
        rows.setdefault(step["name"], []).append(step)
    if len(rows) == len(steps):
        return []
    named = []
    for name, of_name in rows.items():
        together = sum((step["ended_at"] - step["started_at"] for step in of_name), timedelta())
        spends: Counter[str] = Counter()
        for step in of_name:
            spends.update(step["spends"])
        named.append(NamedSteps(name, len(of_name), together, spends))
    return sorted(named, key=lambda one: one.took, reverse=True)[:STEPS]


def _trace_of(attempt: Mapping[str, Any] | None) -> list[Part]:
    trace = attempt["error"].get("trace") if attempt is not None else None
    return parts_of(trace) if trace else []


class OpenQuestion(NamedTuple):
    """An open wait for an answer: what the handler asks, and the answers that it offers, as JSON texts.

    With `bound` it takes no other answer. `refused` is an early one that it did not take, as JSON.
    """

    wait: WaitRow
    ask: Value | None
    choices: Sequence[tuple[str, str]]
    bound: bool
    refused: str | None


def _questions_of(run: Mapping[str, Any]) -> list[OpenQuestion]:
    """What a person can answer now, with a button for each option, or for those that `ask` lists."""
    if run["state"] not in ("waiting", "running"):
        return []
    questions = []
    for wait in run["waits"]:
        if not is_open_question(wait):
            continue
        ask, bound, refused = wait["ask"], wait["options"], wait["refused"]
        options = ask.get("options") if isinstance(ask, Mapping) else None
        offered = bound or (options[:OPTIONS] if isinstance(options, list) else [True, False])
        choices = [(as_text(each) or json.dumps(each), json.dumps(each)) for each in offered]
        shown_ask = None if ask is None else value_of("what it asks", ask)
        early = None if refused is None else json.dumps(refused["answer"], ensure_ascii=False)[:STEP_TEXT]
        questions.append(OpenQuestion(wait, shown_ask, choices, bound is not None, early))
    return questions[:WAITS]


class Value(NamedTuple):
    """A value of a run as JSON text; `left` is the number of characters that do not fit."""

    name: str
    text: str
    left: int


def _values_of(run: Mapping[str, Any]) -> list[Value]:
    """Result, checkpoint, params, claims and spec, those that the run has."""
    values = {**run, "claims": claims_in_words(run.get("claims"))}
    names = ("result", "checkpoint", "params", "claims", "spec")
    return [value_of(name, values[name]) for name in names if values.get(name) is not None]


def value_of(name: str, value: Any) -> Value:
    """A value as indented JSON, cut to what a page shows."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    return Value(name, text[:VALUE], max(len(text) - VALUE, 0))


def lanes_of(run: Mapping[str, Any], now: datetime) -> list[Lane]:
    """One lane an attempt, oldest first, and one for what the run waits for now."""
    attempts: Sequence[Mapping[str, Any]] = run["attempts"]
    lanes = []
    since: datetime = run["created_at"]
    for attempt in attempts:
        end = attempt["ended_at"] or now
        # When an attempt got its token is stored at its end.
        is_running = attempt["ended_at"] is None
        marks = (
            ("waiting", "waiting", since),
            ("token", "token", None if is_running else attempt["started_at"]),
            ("starting", "starting", attempt["token_ready_at"]),
            ("running", "running", attempt["started_at" if is_running else "handler_started_at"]),
        )
        lanes.append(
            Lane(f"Attempt {attempt['attempt']}", _pieces(marks, end), attempt["outcome"] or "running")
        )
        since = end
    if run["state"] == "waiting" and now > since:
        note = run["reason"] or ""
        lanes.append(Lane("Now", [LanePiece("waiting", "waiting", since, now)], note.replace("_", " ")))
    return lanes[-MAX_LANES:]


def _pieces(marks: Sequence[tuple[str, str, datetime | None]], end: datetime) -> list[LanePiece]:
    """Each mark until the next one that was reached; none without a length."""
    reached = [(name, kind, at) for name, kind, at in marks if at is not None]
    pieces = []
    for at, (name, kind, start) in enumerate(reached):
        until = reached[at + 1][2] if at + 1 < len(reached) else end
        if until > start or (name == "running" and until == start):
            pieces.append(LanePiece(name, kind, start, until))
    return pieces


_TONES = {"failed": "bad", "refused": "bad", "waiting": "warn", "skipped": "warn", "cancelled": "warn"}


@dataclass(frozen=True, slots=True)
class StepLink:
    """A next step: its text and the page that it leads to; `right` is a change that this page offers."""

    text: str
    href: str
    right: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """Sentences in the order in which they are read; None for one that does not apply.

    `customer` is a text without internals, to copy.
    """

    lead: str
    whose: str | None
    since_then: str | None
    others: str | None
    other_orgs: int | None
    question: str | None
    kept: str
    retry: str
    customer: str
    step: StepLink | None
    tone: str


def answer_of(connection: Connection, caller: Caller, run: Mapping[str, Any]) -> Answer:
    """The answer about a run as this caller sees it; an org learns nothing of other orgs and of workers."""
    return answer(explanations.explain(connection, run, across_orgs=caller.org is None), run)


def answer(why: Why, run: Mapping[str, Any]) -> Answer:
    """The clauses as sentences; `run` is its row."""
    tried = f" at attempt {run['attempt']}" if run["attempt"] else ""
    said = clauses(why, in_words)
    own = f"/runs/{run['id']}"
    href = step_path(why.step)
    return Answer(
        lead=_sentence(f"{run['state']}{tried}: {said.cause}") or "",
        whose=_sentence(said.whose),
        since_then=_sentence(said.since_then),
        others=_sentence(said.others),
        other_orgs=why.other_orgs,
        question=_sentence(said.question),
        kept=_sentence(said.kept) or "",
        retry=_sentence(said.retry) or "",
        customer=said.customer,
        # A part of this page, or another page; not this page as a whole.
        step=None
        if href == own
        else StepLink(why.step.text, href.removeprefix(own), why.step.declared.right),
        tone=_TONES.get(str(run["state"]), "good" if run["state"] == "succeeded" else "busy"),
    )


def _sentence(clause: str | None) -> str | None:
    return clause and up(clause) + ("" if clause.endswith((".", "!", "?")) else ".")


class LogPage(NamedTuple):
    """Lines of a log, oldest first, and the places around which other pages begin, None at an end.

    Pages go by key, the newest first, and are small enough to send at once.
    """

    lines: Sequence[Row]
    older: str | None = None
    newer: str | None = None
    newest: str = "0.0"
    """The place of the last line, from which a stream continues."""


def page_before(connection: Connection, caller: Caller, run_id: str, before: Place | None = None) -> LogPage:
    """The newest lines, or those just before a place, as this caller sees them."""
    lines = runs.newest_lines(connection, caller.scope(), RunId(run_id), before=before, limit=LINES + 1)
    kept = _fitting(reversed(lines), caller)[::-1]
    newest = _text(kept[-1]) if kept else "0.0"
    return LogPage(
        kept,
        older=_text(kept[0]) if len(kept) < len(lines) else None,
        newer=None if before is None else newest if kept else f"{before[0]}.{max(before[1] - 1, 0)}",
        newest=newest,
    )


def page_after(connection: Connection, caller: Caller, run_id: str, after: Place) -> LogPage:
    """The lines just after a place, as this caller sees them."""
    lines = runs.lines(connection, caller.scope(), RunId(run_id), after=after, limit=LINES + 1)
    kept = _fitting(lines, caller)
    newest = _text(kept[-1]) if kept else f"{after[0]}.{after[1]}"
    # Pages before this one end with the line `after` itself.
    older = _text(kept[0]) if kept else f"{after[0]}.{min(after[1] + 1, _MAX_NUMBER)}"
    return LogPage(kept, older, newest if len(kept) < len(lines) else None, newest)


class LogFile(StreamingResponse):
    """A text file to save; a client that takes none of it for `STALLED` seconds is given up."""

    media_type = "text/plain"

    def __init__(self, name: str, parts: AsyncIterator[str]) -> None:
        super().__init__(parts, headers={"content-disposition": f'attachment; filename="{name}"'})

    async def stream_response(self, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(STALLED):
                await send(message)

        try:
            await super().stream_response(send_in_time)
        except TimeoutError:
            raise ClientDisconnect from None


def line_text(line: Row) -> str:
    """A line as `runs logs` prints it, but whole.

    What follows a line break is indented, so that it cannot pass for another line of the log.
    """
    # What a worker says of the attempt, no handler can print.
    level = SOURCE if line["source"] == SOURCE else line["level"]
    first, *more = line["text"].splitlines() or [""]
    head = f"{to_text(line['at'])} {level:<7} {printable(first)}".rstrip()
    return "".join(f"{each}\n" for each in (head, *(f"    {printable(part)}" for part in more)))


def place_of(text: str) -> Place:
    """The place of a line, from its text `attempt.seq`; raises NotFound for another form."""
    attempt, dot, seq = text.partition(".")
    if not (dot and text.isascii() and attempt.isdecimal() and seq.isdecimal() and len(text) < 24):
        raise NotFound(
            "that is not a place in a log", fix="open the page of the run, and page back from there"
        )
    return min(int(attempt), _MAX_NUMBER), min(int(seq), _MAX_NUMBER)


def _fitting(lines: Iterable[Row], caller: Caller) -> list[Row]:
    """The first of the lines that fit on a page, each shortened, at least one."""
    kept: list[Row] = []
    room = TEXT
    for line in lines:
        text = line["text"]
        if len(text) > LINE:
            text = f"{text[:LINE]} … {len(line['text']) - LINE:,} more characters"
        room -= len(text)
        if len(kept) == LINES or (kept and room < 0):
            break
        at = line["at"]
        when = {"instant": to_text(at), "day": f"{at:%Y-%m-%d}", "clock": f"{at:%H:%M:%S}"}
        kept.append({**caller.sees(LogRow, {**line, "text": text}), **when})
    return kept


def _text(line: Row) -> str:
    return f"{line['attempt']}.{line['seq']}"
