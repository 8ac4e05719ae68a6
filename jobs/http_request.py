"""`http.request`: calls a URL with the org's token."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any, Literal
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ConfigDict, Field, field_validator

from worker import Context, PermanentError, Retry, job

# Params are not encrypted; `ctx.public_http` adds the org's token.
FORBIDDEN_HEADERS = frozenset({"authorization", "proxy-authorization", "cookie"})
MAX_BODY = 64 * 1024


class Params(BaseModel):
    """The request to send."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    url: str = Field(pattern=r"^https?://")
    """The URL; `{org_code}` and `{scheduled_for}` in it are replaced."""
    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"] = "GET"
    """The HTTP method."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Headers to send; the token and the idempotency key are added automatically."""
    body: Any = None
    """The body, sent as JSON."""
    expect: list[int] = Field(default_factory=list)
    """The status codes that count as success; default all 2xx."""
    timeout: float = Field(30.0, gt=0, le=3600)
    """Timeout in seconds."""

    @field_validator("headers")
    @classmethod
    def _contains_no_secret(cls, value: dict[str, str]) -> dict[str, str]:
        if forbidden := sorted(name for name in value if name.lower() in FORBIDDEN_HEADERS):
            raise ValueError(f"{forbidden[0]} is not allowed: the org's token is sent automatically")
        return value


class UnexpectedAnswer(Exception):
    """The server responded with a status that a retry may fix."""


@job("http.request", params=Params, timeout="1h", max_attempts=4, egress=["api", "public"])
async def http_request(ctx: Context[Params, Any]) -> dict[str, Any] | Retry:
    """Send the request and return the status and the first 64 KiB of the body.

    It reaches public addresses, and the origins that the operator lists. Redirects are not followed.

    Without `expect` any 2xx is success. 429 and 503 are retried after the time in Retry-After; other
    4xx are not retried; 5xx and lost connections are.
    """
    url = fill_in(ctx.params.url, ctx.org.code, ctx.run.scheduled_for.isoformat())
    if not is_url(url):
        raise PermanentError(f"{url} is not a URL")
    async with ctx.public_http.stream(
        ctx.params.method,
        url,
        headers=ctx.params.headers,
        json=ctx.params.body,
        timeout=ctx.params.timeout,
    ) as response:
        content = await read_capped(response)
    status = response.status_code
    ctx.log.info("%s %s returned %d", ctx.params.method, url, status)
    if status in ctx.params.expect or (not ctx.params.expect and response.is_success):
        return {"status": status, "body": as_json(response, content)}
    if status in (429, 503) and (wait := retry_after(response)) is not None:
        return Retry(after=wait)
    message = f"{ctx.params.method} {url} returned {status}"
    if 400 <= status < 500 and status not in (408, 425, 429):
        raise PermanentError(message)
    raise UnexpectedAnswer(message)


def fill_in(url: str, org_code: str, scheduled_for: str) -> str:
    """Replace the placeholders; values are escaped, so that each stays one path segment."""
    return url.replace("{org_code}", quote(org_code, safe="")).replace(
        "{scheduled_for}", quote(scheduled_for, safe="")
    )


def is_url(text: str) -> bool:
    """Whether the text is a URL with a host."""
    try:
        return bool(httpx.URL(text).host)
    except httpx.InvalidURL:
        return False


async def read_capped(response: httpx.Response) -> bytes:
    """Read at most MAX_BODY bytes of the body."""
    content = b""
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) >= MAX_BODY:
            break
    return content[:MAX_BODY]


def as_json(response: httpx.Response, content: bytes) -> Any:
    """The body for the result: JSON if it is JSON, else text; None if empty."""
    if not content:
        return None
    text = content.decode(response.charset_encoding or "utf-8", "replace")
    if "json" in response.headers.get("content-type", ""):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def retry_after(response: httpx.Response) -> timedelta | None:
    """The value of Retry-After, at most an hour; None if it is missing or not in seconds."""
    value = response.headers.get("retry-after", "")
    return timedelta(seconds=min(int(value), 3600)) if value.isdigit() else None
