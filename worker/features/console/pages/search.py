"""The search over orgs and runs, with the grammar of the command line; failed and refused runs by cause."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, timedelta
from typing import Any, Literal

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from worker.errors import AccessDenied, UsageError
from worker.features.console.callers import Caller, caller_of
from worker.features.console.live_lists import RUNS, stream_from_now
from worker.features.console.pages.base import ROWS, PageGroup, Pages, Tab, page_after, query
from worker.features.console.pages.links import search_path
from worker.features.console.pages.morning import EndedByHour, last_hours, totals
from worker.features.console.pages.rendering import page
from worker.ids import ALL_ORGS, RunId, given_id
from worker.model.definitions.pools import DEFAULT_POOL
from worker.model.runs.outcome import Error, fingerprint
from worker.model.search import Query, parsed, terms, with_term, without
from worker.store import orgs
from worker.store.dialect import Row
from worker.store.lists import Page, failures, search, tabs
from worker.store.lists.failures import cause_part, cause_text
from worker.store.lists.matching import few_orgs
from worker.store.lists.rows import OrgRow, Run
from worker.store.lists.run_ids import fitting
from worker.store.lists.search import suggestions
from worker.store.lists.tabs import BoundedCount

# Orgs that the page shows above the runs.
MAX_ORGS = 8
# What can be done to all runs of a search, and the states that they must be in.
CHANGEABLE: Mapping[Literal["retry", "cancel"], frozenset[str]] = {
    "retry": frozenset({"failed", "refused", "cancelled"}),
    "cancel": frozenset({"waiting", "running"}),
}


# The tabs of the page, but for all runs.
_STATES = ("waiting", "running", "failed", "refused", "succeeded", "cancelled", "skipped")
# Links to when runs were made.
_TIMES = {
    "last hour": ("1h", ""),
    "today": ("today", ""),
    "yesterday": ("yesterday", "today"),
    "7 days": ("7d", ""),
}
# Values of a key among the runs of a page that are offered as filters.
_OFFERED = 5


class SearchPages(PageGroup):
    def __init__(self, pages: Pages, hours: EndedByHour) -> None:
        super().__init__(pages)
        self._hours = hours

    def routes(self) -> Sequence[Route]:
        return (Route("/search", self._search),)

    async def _search(self, request: Request) -> Response:
        caller, given = caller_of(request), query(request, "q", "after")
        text = given.get("q", "").strip()
        frame = {**self._pages.frame(request.scope), "searched": text, "keys": caller.search_keys}
        try:
            wanted = self.query_of(request, text)
        except UsageError as error:
            return page("search.html", 400, **frame, error=error)

        def work(connection: Connection) -> Response:
            try:
                if (run_id := _only_run(connection, caller, text)) is not None:
                    return RedirectResponse(f"/runs/{run_id}", 303)
                if "after" not in given:
                    frame["stream"] = stream_from_now(connection, RUNS, q=text)
                found = _found(connection, caller, wanted, given)
            except UsageError as error:
                return page("search.html", 400, **frame, error=error)
            counts = self._counts(connection, caller, wanted)
            links = {
                "tabs": _tabs(text, wanted, counts),
                "filters": _filters(text, wanted),
                "times": _times(text),
                "offers": _offers(text, wanted, found["runs"]),
            }
            return page("search.html", **frame | found | links, error=None)

        return await self._pages.database.read(caller, work)

    def query_of(self, request: Request, text: str) -> Query:
        """The query of a text, its days in the viewer's time zone; raises UsageError."""
        zone = self._pages.zone(request) or UTC
        return parsed(text, now=self._pages.clock.now(), zone=zone, keys=caller_of(request).search_keys)

    def _counts(
        self, connection: Connection, caller: Caller, wanted: Query
    ) -> Mapping[str, BoundedCount | int]:
        """Runs by state: those that wait and run now, and those that ended in the last 24 hours.

        Of the orgs that `org:` names, if they are few; none if anything else narrows the runs.
        """
        if replace(wanted, org=None, states=frozenset()) != Query():
            return {}
        now = self._pages.clock.now()
        if wanted.org is None and caller.org is None:
            return {
                **totals(self._hours.read(connection, now)),
                **tabs.unfinished(connection, ALL_ORGS),
            }
        scope = orgs.scope_of(connection, caller.scope())
        org_ids = few_orgs(connection, scope, Query(org=wanted.org))
        if org_ids is None:
            return {}
        ended = tabs.ended(connection, org_ids, last_hours(now))
        return dict.fromkeys(_STATES, 0) | ended | tabs.unfinished(connection, org_ids)


def _tabs(text: str, wanted: Query, counts: Mapping[str, BoundedCount | int]) -> list[Tab]:
    """A tab for each state: the search with that state instead of its own."""
    return [
        Tab(
            state or "all",
            _address(with_term(text, "state", state)),
            wanted.states == ({state} if state else set()),
            counts.get(state),
        )
        for state in ("", *_STATES)
    ]


def _times(text: str) -> list[Tab]:
    """The search for the runs that were made in some time."""
    given = {term.key: term.value for term in terms(text)}
    current = given.get("since", ""), given.get("until", "")
    return [
        Tab(
            name,
            _address(with_term(with_term(text, "since", since), "until", until)),
            current == (since, until),
        )
        for name, (since, until) in _TIMES.items()
    ]


def _filters(text: str, wanted: Query) -> list[tuple[str, str]]:
    """The terms of the search, each with the search without it; a single state has its tab."""
    return [
        (f"{term.key}: {term.value}" if term.key else term.value, _address(without(text, term)))
        for term in terms(text)
        if term.key != "state" or len(wanted.states) > 1
    ]


def _offers(text: str, wanted: Query, found: Sequence[Row]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The most frequent values of the runs of a page, by key; its table has orgs and definitions."""
    offers = []
    for key, value_of in _VALUES.items():
        counted = Counter(value for run in found if (value := value_of(run)))
        is_apart = key != "pool" or set(counted) != {DEFAULT_POOL}
        # Numbers of revisions mean something for one definition only.
        is_meant = key != "revision" or wanted.definition is not None
        if counted and is_apart and is_meant and getattr(wanted, key) is None:
            few = [value for value, _ in counted.most_common(_OFFERED)]
            offers.append((key, [(value, _address(with_term(text, key, value))) for value in few]))
    return offers


def _cause_of(run: Row) -> str:
    error = run["error"]
    return cause_part(fingerprint(Error(error["type"], error["message"]))) if error else ""


# The value of a run for a key; an empty one if it has none. A worker is known by the end of its id.
_VALUES: Mapping[str, Callable[[Row], str]] = {
    "handler": lambda run: run["handler"],
    "cause": _cause_of,
    "reason": lambda run: run["reason"] or "",
    "origin": lambda run: run["origin"],
    "pool": lambda run: run["pool"],
    "worker": lambda run: (run["worker"] or "")[-12:],
    "revision": lambda run: str(run["revision"]),
}


def _address(text: str) -> str:
    return search_path(text) if text else "/search"


def _found(connection: Connection, caller: Caller, wanted: Query, given: dict[str, str]) -> dict[str, Any]:
    """The orgs and runs of a query; near words if there are none."""
    scope, after = caller.scope(), given.get("after")
    has_words = bool(wanted.words or wanted.org)
    has_names = has_words or bool(wanted.definition or wanted.handler)
    orgs = search.orgs_of(connection, scope, wanted, Page(limit=MAX_ORGS)) if has_words and not after else []
    found = search.runs_of(connection, scope, wanted, Page(limit=ROWS, after=after))
    near = suggestions(connection, scope, wanted) if has_names and not (orgs or found.rows) else []
    text = given.get("q", "")
    return {
        "orgs": [caller.sees(OrgRow, row) for row in orgs],
        "runs": [caller.sees(Run, row) for row in found.rows],
        # A cell narrows the search to its value, until it is narrowed so: then it leads to the value's page.
        "narrowed": {
            "org": wanted.org is not None or caller.org is not None,
            "definition": wanted.definition is not None,
        },
        "narrow": lambda key, value: _address(with_term(text, key, value)),
        # The search may have stopped before the page was full.
        "next": page_after("/search", given, found.next),
        "near": [
            (each.what, [(word, search_path(text.replace(each.word, word, 1))) for word in each.near])
            for each in near
        ],
        "changes": [
            action
            for action, states in CHANGEABLE.items()
            if wanted.states and wanted.states <= states and caller.may(action)
        ],
    }


def _only_run(connection: Connection, caller: Caller, text: str) -> RunId | None:
    """The run, if the whole text is an id that fits one that the caller sees."""
    if (known := given_id(text)) is None:
        return None
    found = fitting(connection, orgs.scope_of(connection, caller.scope()), known, 2)
    return found[0] if len(found) == 1 else None


STATES = ("failed", "refused")
# How far back the page looks, and the words for it.
DAY = timedelta(days=1)
SPANS = {"1h": timedelta(hours=1), "1d": DAY, "7d": 7 * DAY, "30d": 30 * DAY}


class FailurePages(PageGroup):
    def routes(self) -> Sequence[Route]:
        return (Route("/failures", self._failures),)

    async def _failures(self, request: Request) -> Response:
        if caller_of(request).org is not None:
            raise AccessDenied("failures over all orgs are for operators", fix="open the page of your org")
        given = query(request, "state", "since")
        state, since = given.get("state", "failed"), given.get("since", "1d")
        if state not in STATES:
            raise UsageError(f"{state!r} is not a state of a failure", fix=f"one of {', '.join(STATES)}")
        if since not in SPANS:
            raise UsageError(f"{since!r} is not a span of this page", fix=f"one of {', '.join(SPANS)}")
        start = self._pages.clock.now() - SPANS[since]

        def work(connection: Connection) -> dict[str, Any]:
            causes, more = failures.by_cause(connection, ALL_ORGS, state, start)
            return {
                "causes": [
                    {
                        **cause,
                        "text": cause_text(cause),
                        "href": search_path(cause_text(cause)),
                    }
                    for cause in causes
                ],
                "more": more,
                "most": failures.MAX_RUNS,
                "state": state,
                "since": since,
                "states": STATES,
                "spans": list(SPANS),
            }

        return await self._pages.show(request, "failures.html", work)
