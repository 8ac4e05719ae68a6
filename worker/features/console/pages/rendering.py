"""Rendering: templates whose values are all escaped, an error's page, and static files by content hash."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote
from zoneinfo import ZoneInfo

import jinja2
from jinja2.runtime import Context
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from worker.clock import to_text
from worker.features.console.callers import Caller
from worker.features.console.pages.docs import place_of
from worker.features.console.pages.links import definition_path, org_path
from worker.features.console.sentences import actor_name, sentence
from worker.features.console.sessions import LOGIN, STATIC
from worker.ids import short_ids
from worker.kit.web.responses import Candidates
from worker.model.definitions.units import took
from worker.model.definitions.words import in_brief
from worker.model.orgs import selector_in_words
from worker.model.runs.clauses import listed
from worker.model.runs.egress import statuses_in_words

_WEB = Path(__file__).parents[1]
_TYPES = {".css": "text/css", ".js": "text/javascript"}
_FILES: Mapping[str, bytes] = {
    file.name: file.read_bytes() for file in sorted((_WEB / "static").iterdir()) if file.suffix in _TYPES
}
_HASHES = {name: hashlib.sha256(body).hexdigest()[:16] for name, body in _FILES.items()}
_YEAR = "public, max-age=31536000, immutable"

# No inline script or style, and nothing from elsewhere. The icon is a data URI.
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
}

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
# What the filter `short` gives.
_RUN = re.compile("\ue000([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")
# Characters of a name that is never broken.
WORD = 16
# An element that is left as it is, a text, which may be that of a link, or a tag.
_LEFT = r"<(pre|select|svg|textarea)\b.*?</\1>|<span class=\"cut\">.*?</span></span>"
_HTML = re.compile(rf"{_LEFT}|(<a [^>]*>)?([^<]+)|<[^>]*>", re.DOTALL)
# East Asian text breaks between any two characters by itself. An id that is shortened stays whole.
_CHAR = r"[^\s\u2e80-\ud7ff\uf900-\uffef]"
_LONG = re.compile(rf"(?<!{_CHAR})(?!\ue000|[0-9a-f]{{8}}-[0-9a-f…-]{{5,11}}(?!\S))({_CHAR}{{{WORD + 1},}})")
# Behind these a line may break, but not between digits: numbers and times stay whole.
_MARKS = r"[-_:/.,;@=&?+|]{1,3}"
_MARK = re.compile(rf"(?<=[^\W\d_]){_MARKS}(?=[^\W_])|(?<=\d){_MARKS}(?=[^\W\d_])")
_CUT = Markup('<span class="cut"><span>{}</span></span>')
_MINUTE = timedelta(minutes=1)
_UTC = ZoneInfo("UTC")
# A command of the command line, an option, or a setting, as the fixes of errors name them.
_COMMAND = re.compile(r"`[^`]*`|\[\[?[a-z_.]+\]\]?|worker\.toml|Authorization:")


@jinja2.pass_context
def _when(context: Context, value: datetime | None, *, seconds: bool = False, utc: bool = False) -> Markup:
    """A time in the viewer's zone, which the footer names, with UTC as its title; empty for None.

    `utc`: the time in UTC, marked so, with the viewer's as title. For places that have other times in UTC.
    """
    if value is None:
        return Markup()
    zone: ZoneInfo = context.get("zone") or _UTC
    shown, other = (_UTC, zone) if utc else (zone, _UTC)
    form = "%Y-%m-%d %H:%M:%S"
    title = f"{value.astimezone(other):{form}} {other.key}"
    text = f"{value.astimezone(shown):{form if seconds else form[:-3]}}{' UTC' if utc else ''}"
    return Markup('<time datetime="{}" title="{}">{}</time>').format(to_text(value), title, text)


def _seconds_apart(times: Iterable[datetime | None]) -> bool:
    """Whether a list with these times shows seconds: two of them are less than a minute apart."""
    ordered = sorted({time.replace(microsecond=0) for time in times if time is not None})
    return any(later - earlier < _MINUTE for earlier, later in pairwise(ordered))


def _fitted(value: Markup | str) -> Markup:
    """Rows of a table, or a text, whose lines break between words only.

    In a name of more than WORD characters, lines may break behind marks such as `_` and `:`. A part of it
    that is still longer ends in "…" where there is no room, and the title has the whole text.
    """
    fitted = _HTML.sub(
        lambda found: _fitted_text(found[3], found[2] or "") if found[3] else found[0], escape(value)
    )
    return Markup(fitted)  # noqa: S704 - tags of the templates; each text is escaped again


def _fitted_text(html: str, link: str) -> str:
    text = unescape(html)
    # Every second piece is a long name.
    pieces: list[str] = _LONG.split(text)
    if len(pieces) == 1:
        # Short links stay on one line.
        return f"{link}<span>{html}</span>" if link and len(text) > WORD else link + html
    pieces[1::2] = map(_broken, pieces[1::2])
    made = Markup().join(pieces)
    title = Markup(' title="{}"').format(text.strip()) if '"cut"' in made else ""
    return link + str(Markup("<span{}>{}</span>").format(title, made))


def _broken(name: str) -> Markup:
    parts = _MARK.sub(r"\g<0>\n", name).split("\n")
    return Markup("<wbr>").join(_CUT.format(part) if len(part) > WORD else part for part in parts)


def in_words(time: datetime) -> str:
    """A time within a sentence."""
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"


@jinja2.pass_context
def _ago(context: Context, value: datetime | None) -> str:
    """How long ago a time is, or how far ahead, to about one digit."""
    if value is None:
        return ""
    now: datetime = context["now"]
    span = took(abs(now - value))
    return f"{span} ago" if value <= now else f"in {span}"


def _with_commands(text: str) -> Markup:
    """A text of ours as HTML, with what is in backticks as code."""
    pieces = enumerate(text.split("`"))
    return Markup().join(Markup("<code>{}</code>").format(piece) if at % 2 else piece for at, piece in pieces)


def _path(value: object) -> str:
    """A value as one segment of a path."""
    return quote(str(value), safe="")


def _short(id_: str) -> str:
    """A run's id that `page` shortens: only the whole page tells which tails keep its ids apart."""
    marked = f"\ue000{id_}"
    return marked if _RUN.fullmatch(marked) else id_


_pretty = partial(json.dumps, indent=2, ensure_ascii=False, default=str)


def static_url(name: str) -> str:
    """The address of a static file, which changes with its content; raises KeyError."""
    return f"{STATIC}{name}?v={_HASHES[name]}"


templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_WEB / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    auto_reload=False,
)
templates.filters |= {
    "pretty": _pretty,
    "ago": _ago,
    "took": took,
    "path": _path,
    "short": _short,
    "fitted": _fitted,
    "seconds_apart": _seconds_apart,
    "with_commands": _with_commands,
    "sentence": sentence,
    "actor": actor_name,
    "selector": selector_in_words,
    "schedule": in_brief,
    "statuses": statuses_in_words,
}
# What `Pages.show` sets for a caller; the login page has none of it.
templates.globals |= {
    "static": static_url,
    "org_path": org_path,
    "definition_path": definition_path,
    "listed": listed,
    "in_words": in_words,
    "caller": None,
    "session": None,
    "csrf": None,
    "navigation": (),
    "here": "",
    "menu": "",
    "docs": place_of(LOGIN).docs,
    "searched": "",
    "stream": "",
    "when": _when,
    "zone": None,
}


def page(template: str, status: int = 200, **values: Any) -> Response:
    """Render a page; every value is escaped."""
    text = templates.get_template(template).render(values)
    short = short_ids(_RUN.findall(text))
    body = _RUN.sub(lambda found: short[found[1]], text)
    return Response(body, status, HEADERS, media_type="text/html")


def error_page(
    scope: Scope, frame: dict[str, Any], status: int, message: str, fix: str, candidates: Candidates = ()
) -> Response:
    """An error page that keeps its person logged in, with links into the console instead of commands."""
    fix = fix_of(fix)
    values = {
        "code": status,
        "title": _TITLES.get(status, "This did not work"),
        "message": f"{message[:1].upper()}{message[1:].rstrip('.')}.",
        "fix": fix,
        "candidates": candidates,
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


async def _static_file(request: Request) -> Response:
    """A static file, cached for a year by the hash of its content."""
    name = request.url.path.removeprefix(STATIC)
    is_current = request.query_params.get("v") == _HASHES[name]
    headers = {"cache-control": _YEAR if is_current else "no-cache"}
    return Response(_FILES[name], headers=headers, media_type=_TYPES[Path(name).suffix])


def static_routes() -> tuple[Route, ...]:
    """One route a file, so that no path can leave the folder."""
    return tuple(Route(STATIC + name, _static_file) for name in _FILES)
