"""`http.request`: call a URL with the org's token, the cron job that everyone needs."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any, Literal
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ConfigDict, Field, field_validator

from worker import Context, PermanentError, Retry, job

# Params are stored in the clear; the org's token is added by `ctx.public_http` itself.
FORBIDDEN_HEADERS = frozenset({"authorization", "proxy-authorization", "cookie"})
MAX_BODY = 64 * 1024


class Params(BaseModel):
    """What to call."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    url: str = Field(pattern=r"^https?://")
    """The address; `{org_code}` and `{scheduled_for}` in it are filled in."""
    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"] = "GET"
    """How it is called."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Headers to send; the token and the idempotency key are sent by themselves."""
    body: Any = None
    """What is sent as JSON."""
    expect: list[int] = Field(default_factory=list)
    """The statuses that are a success; without any all 2xx are."""
    timeout: float = Field(30.0, gt=0, le=3600)
    """Seconds until an answer."""

    @field_validator("headers")
    @classmethod
    def _holds_no_secret(cls, value: dict[str, str]) -> dict[str, str]:
        if forbidden := sorted(name for name in value if name.lower() in FORBIDDEN_HEADERS):
            raise ValueError(f"{forbidden[0]} may not stand here: the org's token is sent by itself")
        return value


class UnexpectedAnswer(Exception):
    """The server answered what another try may mend."""


@job("http.request", params=Params, timeout="1h", max_attempts=4)
async def http_request(ctx: Context[Params, Any]) -> dict[str, Any] | Retry:
    """Send the request and return the status and the body, the first 64 KiB of it.

    It reaches public addresses, and the origins that the operator lists. Redirects are not followed.

    Without `expect` any 2xx is success. 429 and 503 wait as long as they ask for;
    other 4xx are not tried again; 5xx and lost connections are.
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
    ctx.log.info("%s %s answered %d", ctx.params.method, url, status)
    if status in ctx.params.expect or (not ctx.params.expect and response.is_success):
        return {"status": status, "body": as_json(response, content)}
    if status in (429, 503) and (wait := retry_after(response)) is not None:
        return Retry(after=wait)
    message = f"{ctx.params.method} {url} answered {status}"
    if 400 <= status < 500 and status not in (408, 425, 429):
        raise PermanentError(message)
    raise UnexpectedAnswer(message)


def fill_in(url: str, org_code: str, scheduled_for: str) -> str:
    """The URL with its placeholders filled in, each escaped so that it stays one path segment."""
    return url.replace("{org_code}", quote(org_code, safe="")).replace(
        "{scheduled_for}", quote(scheduled_for, safe="")
    )


def is_url(text: str) -> bool:
    """Whether a request can be sent there: it can be read as a URL, and has a host."""
    try:
        return bool(httpx.URL(text).host)
    except httpx.InvalidURL:
        return False


async def read_capped(response: httpx.Response) -> bytes:
    """At most MAX_BODY bytes of the body; the rest is not read."""
    content = b""
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) >= MAX_BODY:
            break
    return content[:MAX_BODY]


def as_json(response: httpx.Response, content: bytes) -> Any:
    """The body as the handler's result holds it: JSON where it is JSON, else text, None if empty."""
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
    """What Retry-After asks for in seconds, at most an hour; None where it says nothing usable."""
    value = response.headers.get("retry-after", "")
    return timedelta(seconds=min(int(value), 3600)) if value.isdigit() else None
