"""Pages: templates as HTML that runs no script and loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from starlette.responses import Response

from worker.clock import to_text

_FOLDER = Path(__file__).with_name("templates")
_CSS = (_FOLDER / "style.css").read_text(encoding="utf-8")
_CSS_HASH = base64.b64encode(hashlib.sha256(_CSS.encode()).digest()).decode()
_HEADERS = {
    "content-security-policy": f"default-src 'none'; style-src 'sha256-{_CSS_HASH}'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
}


def _instant(value: datetime | None) -> str:
    return "" if value is None else to_text(value)[:19].replace("T", " ") + " UTC"


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_FOLDER),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
)
_templates.filters |= {"instant": _instant, "pretty": _pretty}
_templates.globals |= {"css": Markup(_CSS), "caller": None, "session": None}  # noqa: S704 - a file of ours


def render(name: str, **values: Any) -> bytes:
    """One page; every value is escaped."""
    return _templates.get_template(name).render(values).encode()


def page(body: bytes, status: int = 200) -> Response:
    """What `render` made, as a response."""
    return Response(body, status, _HEADERS, media_type="text/html")
