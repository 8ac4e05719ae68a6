"""The viewer's time zone: a cookie, set by the console's script or by the form in the footer."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from worker.definitions.zones import parse_zone
from worker.errors import UsageError, WorkerError
from worker.web.pages.base import MOST_OF_ZONE, ZONE_COOKIE, Pages


class ZonePages:
    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def routes(self) -> Sequence[Route]:
        return (Route("/zone", self._choose, methods=["POST"]),)

    async def _choose(self, request: Request) -> Response:
        _, form = await self._pages.checked_form(request)
        name = form.get("zone", "").strip()
        try:
            zone = parse_zone(name[: MOST_OF_ZONE + 1])
        except WorkerError as error:
            raise UsageError(error.message, fix=error.fix) from None
        response = RedirectResponse(_own_path(form.get("back", "/")), 303)
        self._pages.forms.set_cookie(request, response, ZONE_COOKIE, zone.key)
        return response


def _own_path(path: str) -> str:
    """The path if it is one of this server; a browser would read `//` or a backslash as another host."""
    is_own = path.startswith("/") and not path.startswith("//") and "\\" not in path
    return path if is_own and path.isprintable() else "/"
