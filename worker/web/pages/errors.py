"""The page of an error: what is wrong, and where to go in the console instead of commands to type."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from starlette.responses import Response
from starlette.types import Scope

from worker.web.callers import Caller
from worker.web.pages.links import org_path
from worker.web.pages.rendering import page

_TITLES = {
    400: "This request is not complete",
    403: "You may not do this",
    404: "There is nothing here",
    405: "This page cannot do that",
    409: "The state does not allow this",
    413: "This is too large",
    422: "A value is not valid",
    429: "Too many requests",
    503: "Not available right now",
}
# A command of the command line, an option, or a setting, as the fixes of errors name them.
_COMMAND = re.compile(r"`[^`]*`|\[\[?[a-z_.]+\]\]?|worker\.toml|Authorization:")


def error_page(scope: Scope, frame: dict[str, Any], status: int, message: str, fix: str) -> Response:
    """An error page that keeps its person logged in."""
    fix = fix_of(fix)
    values = {
        "code": status,
        "title": _TITLES.get(status, "This did not work"),
        "message": f"{message[:1].upper()}{message[1:].rstrip('.')}.",
        "fix": fix,
        "ways": _ways(scope, frame["caller"], status),
    }
    return page("error.html", status, **frame, **values)


def fix_of(fix: str) -> str:
    """The fix as a sentence; empty if it is for the command line or for worker.toml."""
    return "" if not fix or _COMMAND.search(fix) else f"{fix[:1].upper()}{fix[1:].rstrip('.')}."


def _ways(scope: Scope, caller: Caller | None, status: int) -> Sequence[tuple[str, str]]:
    """Where the person can go from here: what the path is about, then what they may see."""
    if caller is None:
        return [("/", "Log in")]
    path: str = scope["path"]
    if caller.org is not None:
        return [(org_path(caller.org), "The page of your org")]
    ways = [("/", "What needs attention")]
    parts = path.split("/")
    if parts[1] == "orgs" and len(parts) > 3:
        ways.insert(0, (org_path(parts[2]), f"The page of {parts[2]}"))
    elif parts[1] == "orgs":
        ways.insert(0, ("/orgs", "All orgs"))
    elif parts[1] == "runs":
        ways.insert(0, ("/failures", "Failed runs by cause"))
    elif status == 400 and scope["method"] == "GET":
        ways.insert(0, (quote(path), "This page without filters"))
    return ways
