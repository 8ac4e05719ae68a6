"""The place of a page: its entry of the menu, and what the documentation says of it, served as it is shipped.

The documentation has no public address; what is shipped fits the release.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from worker.features.console.sessions import DOCS, LOGIN

# Pictures, and comments for the tests.
_CLUTTER = re.compile(r"^!\[[^\n]*\)\n\n?|^<!--.*?-->\n\n?", re.DOTALL | re.MULTILINE)


class Place(NamedTuple):
    """The address of an entry of the menu, and a page of the documentation with one of its headings."""

    menu: str
    page: str
    heading: str = ""

    @property
    def docs(self) -> str | None:
        """The address of the documentation, at the heading; None if it is not installed."""
        if self.page not in PAGES:
            return None
        # The pages are plain texts, which have no ids: browsers look for the text.
        heading = quote(f"## {self.heading}", safe="").replace("-", "%2D")
        return f"{DOCS}{self.page}" + (f"#:~:text={heading}" if self.heading else "")


# By the beginning of a path; the first that fits.
PLACES: Mapping[str, Place] = {
    r"/orgs/[^/]+/definitions/[^/]+/edit$": Place("/definitions", "reference/files.md"),
    r"/orgs/[^/]+/definitions/": Place("/definitions", "console.md", "A definition"),
    r"/orgs\b": Place("/orgs", "console.md", "Orgs"),
    r"/runs/": Place("/search", "console.md", "A run"),
    r"/(search|retry|cancel)$": Place("/search", "operating/support.md", "Search"),
    r"/failures$": Place("/failures", "console.md", "Failures"),
    r"/definitions$": Place("/definitions", "reference/schedules.md"),
    r"/templates$": Place("/templates", "reference/files.md"),
    r"/handlers$": Place("/handlers", "reference/handlers.md"),
    r"/credentials$": Place("/credentials", "secrets.md", "Change a secret"),
    r"/rollouts\b": Place("/rollouts", "console.md", "Rollouts"),
    r"/usage\b": Place("/usage", "reference/budgets.md"),
    r"/(workers|pools/approve)$": Place("/workers", "console.md", "Workers and audit"),
    r"/plans/": Place("", "reference/mcp.md", "Plans"),
    r"/audit$": Place("/audit", "console.md", "Workers and audit"),
    rf"{LOGIN}\b": Place("", "operating/login.md"),
    r"/$": Place("/", "console.md", "What needs attention"),
}
ELSEWHERE = Place("", "console.md")


def _read() -> Mapping[str, bytes]:
    """These pages by name: of the installed package, or beside it in a checkout; those that are there."""
    package = Path(__file__).resolve().parents[3]
    inside = package / "docs"
    folder = inside if inside.is_dir() else package.parent / "docs"
    names = {place.page for place in (*PLACES.values(), ELSEWHERE)}
    texts = {name: folder / name for name in sorted(names) if (folder / name).is_file()}
    return {name: _CLUTTER.sub("", file.read_text(encoding="utf-8")).encode() for name, file in texts.items()}


PAGES: Mapping[str, bytes] = _read()


def place_of(path: str) -> Place:
    """The place of a page of the console."""
    return next((place for start, place in PLACES.items() if re.match(start, path)), ELSEWHERE)


async def _page(request: Request) -> Response:
    body = PAGES[request.url.path.removeprefix(DOCS)]
    return Response(body, headers={"cache-control": "no-cache"}, media_type="text/plain")


def docs_routes() -> tuple[Route, ...]:
    """One route a page, without a login: the login page has a link to its own."""
    return tuple(Route(DOCS + name, _page) for name in PAGES)
