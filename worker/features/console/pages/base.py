"""What every page needs: its caller, its query, the database in the caller's role, and checked forms."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args
from urllib.parse import unquote, urlencode
from zoneinfo import ZoneInfo

from sqlalchemy import Connection
from starlette.requests import HTTPConnection, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Scope

from worker.clock import Clock
from worker.errors import TokenError, UsageError, WorkerError
from worker.features.console.access import Access
from worker.features.console.callers import Action, Caller, CallerDatabase, caller_of
from worker.features.console.live_lists import stream_from_now
from worker.features.console.pages.docs import place_of
from worker.features.console.pages.links import org_path
from worker.features.console.pages.rendering import page
from worker.features.console.sessions import SESSION_COOKIE, Forms, Session, Sessions
from worker.model.definitions.zones import find_zone, parse_zone
from worker.model.search import hint_of
from worker.store.lists.tabs import BoundedCount

# Rows of a page of a list.
ROWS = 25
ZONE_COOKIE = "orgworker_zone"
MAX_ZONE = 64
# Links of the navigation: address, text, whether only admins see them.
_OF_OPERATORS = (
    ("/", "Overview", False),
    ("/orgs", "Orgs", False),
    ("/definitions", "Definitions", False),
    ("/search", "Runs", False),
    ("/failures", "Failures", False),
    ("/usage", "Usage", False),
    ("/rollouts", "Rollouts", False),
    ("/templates", "Templates", False),
    ("/handlers", "Handlers", False),
    ("/credentials", "Credentials", True),
    ("/workers", "Workers", False),
    ("/audit", "Audit", True),
)
_OF_ORGS = (
    ("/search", "Runs"),
    ("/definitions", "Definitions"),
    ("/usage", "Usage"),
    ("/handlers", "Handlers"),
    ("/credentials", "Credentials"),
    ("/audit", "Audit"),
)


class Pages:
    """What pages share. A session can change things; a bearer token can only read."""

    def __init__(
        self, database: CallerDatabase, clock: Clock, access: Access, sessions: Sessions, forms: Forms
    ) -> None:
        self.database = database
        self.clock = clock
        self.access = access
        self.sessions = sessions
        self.forms = forms

    async def show(
        self,
        request: Request,
        template: str,
        work: Callable[[Connection], dict[str, Any]],
        *,
        stream: str | None = None,
    ) -> Response:
        """Read and render in a database thread: a large page must not delay the loop.

        Of the values that `work` returns, `status` is the response's; default 200. `stream` is the path of
        the stream of what changes afterwards.
        """
        caller, frame = caller_of(request), self.frame(request.scope)

        def rendered(connection: Connection) -> Response:
            # Before anything is read: what changes meanwhile may be missing on the page.
            since = {"stream": stream_from_now(connection, stream)} if stream else {}
            # A page may set what the frame shows, such as the text that was searched for.
            values = frame | since | work(connection)
            return page(template, values.pop("status", 200), **values)

        return await self.database.read(caller, rendered)

    def frame(self, scope: Scope) -> dict[str, Any]:
        """What the base template shows around every page: caller, session, navigation, search text."""
        caller: Caller | None = scope.get("caller")
        session: Session | None = scope.get("session")
        place = place_of(scope["path"])
        return {
            "caller": caller,
            "session": session,
            "csrf": self.forms.csrf(session.key) if session else None,
            "navigation": _links(caller),
            "here": scope["path"],
            "menu": place.menu,
            "docs": place.docs,
            "is_filtered": bool(scope.get("query_string")),
            "searched": "",
            "stream": "",
            "zone": self.zone(HTTPConnection(scope)),
            "now": self.clock.now(),
        }

    def zone(self, connection: HTTPConnection) -> ZoneInfo | None:
        """The viewer's time zone, by their cookie; None for UTC or an unknown one."""
        name = unquote(self.forms.cookie(connection, ZONE_COOKIE) or "").strip('"')
        return _zone(name) if name and name != "UTC" and len(name) <= MAX_ZONE else None

    async def checked_form(self, request: Request) -> tuple[Session, dict[str, str]]:
        """The session whose page sent this form, and its fields.

        Raises:
            TokenError: the request has no session.
            AccessDenied, UsageError: as `Forms.read`.
        """
        session: Session | None = request.scope.get("session")
        if session is None:
            raise TokenError("log in first", fix="open / and log in, or send Authorization: Bearer TOKEN")
        return session, await self.forms.read(request, SESSION_COOKIE)


class PageGroup:
    """The pages of one subject."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages


class ZonePages(PageGroup):
    """The form that chooses the viewer's time zone; the console's script sets the same cookie."""

    def routes(self) -> Sequence[Route]:
        return (Route("/zone", self._choose, methods=["POST"]),)

    async def _choose(self, request: Request) -> Response:
        _, form = await self._pages.checked_form(request)
        name = form.get("zone", "").strip()
        try:
            zone = parse_zone(name[: MAX_ZONE + 1])
        except WorkerError as error:
            raise UsageError(error.message, fix=error.fix) from None
        response = RedirectResponse(_own_path(form.get("back", "/")), 303)
        self._pages.forms.set_cookie(request, response, ZONE_COOKIE, zone.key)
        return response


def _links(caller: Caller | None) -> Sequence[tuple[str, str]]:
    if caller is None:
        return ()
    if caller.org is None:
        is_admin = caller.role == "admin"
        return [
            (address, text) for address, text, only_admins in _OF_OPERATORS if is_admin or not only_admins
        ]
    return [(org_path(caller.org), "Your org"), *_OF_ORGS]


_zone = functools.lru_cache(maxsize=1000)(find_zone)


@dataclass(frozen=True, slots=True)
class Tab:
    """A link to the rows of a list in one state, and how many there are, if that is known."""

    text: str
    href: str
    is_current: bool
    count: BoundedCount | int | None = None


def tabs_of(
    path: str,
    given: Mapping[str, str],
    choices: Mapping[str, Mapping[str, str]],
    counts: Mapping[str, BoundedCount],
) -> list[Tab]:
    """The tabs of a list: the parameters of each choice, with the other filters. The current one is added."""
    names = {name for choice in choices.values() for name in choice}
    others = {name: value for name, value in given.items() if name not in (*names, "after")}
    current = {name: value for name, value in given.items() if name in names}
    if current not in choices.values():
        choices = {**choices, " ".join(current.values()): current}
    return [
        Tab(
            text, f"{path}?{urlencode({**others, **choice})}".rstrip("?"), choice == current, counts.get(text)
        )
        for text, choice in choices.items()
    ]


def next_page(path: str, given: Mapping[str, str], rows: Sequence[Any], limit: int = ROWS) -> str | None:
    """The address of the rows below these, with the same filters; None if there are no more."""
    return page_after(path, given, rows[-1]["id"] if len(rows) == limit else None)


def page_after(path: str, given: Mapping[str, str], after: str | None) -> str | None:
    """The address of the rows below `after`, with the same filters; None without it."""
    return None if after is None else f"{path}?{urlencode({**given, 'after': after})}"


def allowed(request: Request) -> frozenset[Action]:
    """What this caller may change with the pages' forms; nothing without a session."""
    caller = caller_of(request)
    if request.scope.get("session") is None:
        return frozenset()
    return frozenset(action for action in get_args(Action) if caller.may(action))


def query(request: Request, *names: str) -> dict[str, str]:
    """The parameters of the query, empty ones left out.

    Raises:
        UsageError: one is unknown or given twice; the fix names the known ones.
    """
    items = request.query_params.multi_items()
    known = ", ".join(names) or "none"
    if unknown := sorted({name for name, _ in items} - set(names)):
        raise UsageError(
            f"this page has no parameter {', '.join(unknown)}",
            fix=f"{hint_of(unknown[0], names)}it has: {known}",
        )
    if len(dict(items)) != len(items):
        raise UsageError("a parameter is given twice", fix="give each parameter once")
    return {name: value for name, value in items if value}


def _own_path(path: str) -> str:
    """The path if it is one of this server; a browser would read `//` or a backslash as another host."""
    is_own = path.startswith("/") and not path.startswith("//") and "\\" not in path
    return path if is_own and path.isprintable() else "/"
