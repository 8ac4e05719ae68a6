"""Retrying or cancelling the runs of a search: a canary first, then the rest, in parts.

The pages call the operations of the API. They keep no state: the address has the place where the change
goes on and when it began, and what has become of the changed runs is read from the audit and the runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any, Literal
from urllib.parse import urlencode

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from worker.clock import from_text, to_text
from worker.errors import UsageError
from worker.features.console.callers import Many, caller_of
from worker.features.console.pages.base import ROWS, Pages, allowed, query
from worker.features.console.pages.forms import reason_of
from worker.features.console.pages.links import search_path
from worker.features.console.pages.search import CHANGEABLE, SearchPages
from worker.ids import RunId
from worker.model.search import Query
from worker.store import orgs
from worker.store.dialect import database_now
from worker.store.lists import MAX_LIMIT, Page, live, runs, search
from worker.store.lists.rows import Run

# Runs of the search that are looked at for those to show.
LOOKED_AT = 30
# A canary has at most this many runs.
MAX_CANARY = 100


@dataclass(frozen=True, slots=True)
class BulkVerb:
    """What a page does to runs: in which states they can be, and which are meant without `state:`."""

    action: Literal["retry", "cancel"]
    done: str
    states: frozenset[str]
    default: frozenset[str]


RETRY = BulkVerb("retry", "retried", CHANGEABLE["retry"], frozenset({"failed", "refused"}))
CANCEL = BulkVerb("cancel", "cancelled", CHANGEABLE["cancel"], CHANGEABLE["cancel"])


class BulkPages:
    def __init__(self, pages: Pages, search_pages: SearchPages) -> None:
        self._pages = pages
        self._search = search_pages

    def routes(self) -> Sequence[Route]:
        return [
            Route(f"/{verb.action}", partial(handler, verb), methods=[method])
            for verb in (RETRY, CANCEL)
            for method, handler in (("GET", self._show), ("POST", self._change))
        ]

    async def _show(self, verb: BulkVerb, request: Request) -> Response:
        given = query(request, "q", "after", "began")
        # First the person has to say which runs.
        return await self._page(verb, request, given) if given.get("q") else RedirectResponse("/search", 303)

    async def _page(
        self, verb: BulkVerb, request: Request, given: Mapping[str, str], left: Sequence[str] = ()
    ) -> Response:
        """The newest runs still to be changed, what became of the changed ones, and why runs were `left`."""
        caller, (text, wanted) = caller_of(request), self._wanted(verb, request, given)
        began = _instant(given["began"]) if given.get("began") else None

        def work(connection: Connection) -> dict[str, Any]:
            found = search.runs_of(connection, caller.scope(), wanted, Page(limit=LOOKED_AT))
            changed: Mapping[RunId, str] = {}
            reason = ""
            if began is not None:
                changed, reason = live.changed_runs(
                    connection, caller.scope(), actor=caller.actor, action=f"run.{verb.action}", since=began
                )
            scope = orgs.scope_of(connection, caller.scope())
            newest = runs.rows_of(connection, scope, list(changed)[:ROWS])
            still = [row for row in found.rows if not row["retried_as"] and row["id"] not in changed]
            states = Counter(changed.values())
            return {
                "verb": verb,
                "searched": text,
                "address": _address(verb, text, given.get("began"), given.get("after")),
                "after": given.get("after", ""),
                "began": began,
                "began_text": given.get("began", ""),
                "reason": given.get("reason") or reason,
                "still": [caller.sees(Run, row) for row in still[:ROWS]],
                "more": len(still) > ROWS or found.next is not None,
                "changed": [caller.sees(Run, row) for row in newest],
                "states": states,
                "all_states": len(changed) < live.MAX_FOUND,
                "is_moving": bool(states["waiting"] or states["running"]),
                "left": list(dict.fromkeys(left)),
                "back": search_path(text),
                "may": allowed(request),
            }

        return await self._pages.show(request, "bulk.html", work)

    async def _change(self, verb: BulkVerb, request: Request) -> Response:
        _, form = await self._pages.checked_form(request)
        caller = caller_of(request)
        caller.require_may(verb.action)
        text, wanted = self._wanted(verb, request, form)
        if (reason := reason_of(form)) is None:
            raise UsageError("the reason is missing", fix="say why, in a few words: it goes to the audit")
        began = form.get("began") or to_text(await self._pages.database.read(caller, database_now))
        _instant(began)
        many = Many(
            wanted,
            canary=_number(form, "first", MAX_CANARY) if form.get("only") == "first" else None,
            reason=reason,
            limit=_number(form, "most", MAX_LIMIT) if form.get("most") else MAX_LIMIT,
            after=form.get("after") or None,
        )
        done = await self._pages.database.change_many(caller, verb.action, many)
        left = [f"{row['org']}/{row['definition']}: {row['left']}" for row in done["runs"] if row["left"]]
        if left:
            return await self._page(
                verb, request, {"q": text, "began": began, "after": done["next"] or ""}, left
            )
        return RedirectResponse(_address(verb, text, began, done["next"]), 303)

    def _wanted(self, verb: BulkVerb, request: Request, given: Mapping[str, str]) -> tuple[str, Query]:
        """The text and its query, which only finds runs that this can be done to."""
        text = given.get("q", "").strip()
        if not text:
            raise UsageError("the search is missing", fix=f"search for runs first, then {verb.action} them")
        wanted = self._search.query_of(request, text)
        if wrong := wanted.states - verb.states:
            raise UsageError(
                f"runs that are {', '.join(sorted(wrong))} cannot be {verb.done}",
                fix=f"search for state:{','.join(sorted(verb.states))}",
            )
        return text, replace(wanted, states=wanted.states or verb.default)


def _address(verb: BulkVerb, text: str, began: str | None, after: str | None) -> str:
    """The address of the page, from the place where a change goes on."""
    given = {"q": text, "began": began, "after": after}
    return f"/{verb.action}?{urlencode({name: value for name, value in given.items() if value})}"


def _number(form: Mapping[str, str], name: str, most: int) -> int:
    text = form.get(name, "")
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= most):
        raise UsageError(f"the number of runs is not between 1 and {most}", fix="correct it")
    return int(text)


def _instant(text: str) -> datetime:
    try:
        return from_text(text)
    except ValueError:
        raise UsageError("began is not a time of this page", fix="leave it out, or go back") from None
