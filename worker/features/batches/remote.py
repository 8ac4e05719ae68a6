"""A provider's batch API over HTTP: what it was asked, and what is known if no answer comes."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar, Literal, Protocol

import httpx

from worker.model.batches import Result

# Seconds for a request; for one with the bodies of a batch, in either direction.
SHORT = 30.0
LONG = 600.0
# Bytes of an answer that is JSON, and of a line of results.
MAX_ANSWER = 16 * 1024 * 1024
# Batches or files on one page of a list, and pages that are read.
PAGE = 100
PAGES = 20
_CODE = re.compile(r"[A-Za-z0-9_.-]{1,100}")


class Failure(Exception):
    """A request was not answered as expected; `code` has no secret and no text of an org."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class Declined(Failure):
    """The provider has not done it, and will not."""


class Missing(Declined):
    """The provider does not have it."""


class SlowDown(Failure):
    """The provider has not done it now; `after` is in seconds, None if it does not say."""

    def __init__(self, code: str, after: float | None) -> None:
        super().__init__(code)
        self.after = after


class Unsure(Failure):
    """The provider may have done it."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A batch as its provider has it. `files` are those with its results, `error` why it was refused."""

    id: str
    state: Literal["open", "ended", "refused"]
    created_at: datetime
    requests: int
    files: tuple[str, ...] = ()
    file_id: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """A request of a batch."""

    id: str
    body: bytes


class BatchApi(Protocol):
    """The batch API of a provider, with the key of one account. All methods raise Failure."""

    takes_file: ClassVar[bool]
    """Whether a batch is made of a file that was uploaded before, by which it is found again."""

    async def upload(self, name: str, path: str, lines: Sequence[Line]) -> str:
        """Upload the requests of a batch as a file, and return its id."""

    async def find_files(self, name: str) -> list[str]:
        """The ids of the files of this name."""

    async def create(self, path: str, betas: str, file_id: str | None, lines: Sequence[Line]) -> Remote:
        """Submit a batch: of a file, or of these lines."""

    async def get(self, id_: str) -> Remote:
        """A batch as it is now."""

    async def made_of(self, file_id: str) -> Remote | None:
        """The batch that was made of a file, whatever the provider's clock says."""

    async def since(self, at: datetime) -> list[Remote]:
        """The batches without files that were made since then, newest first."""

    def results(self, remote: Remote) -> AsyncGenerator[Result, None]:
        """The results of a batch that has ended, in any order."""

    async def delete_file(self, file_id: str) -> None:
        """Delete a file; one that is gone is deleted."""

    async def forget(self, remote_id: str) -> None:
        """Delete what the provider keeps of a batch whose results are stored, besides its files."""


@dataclass(eq=False)
class Http:
    """Requests to an API with the headers of one account."""

    client: httpx.AsyncClient
    base_url: str
    headers: Mapping[str, str] = field(repr=False)

    async def ask(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        query: Mapping[str, str | int] | None = None,
        form: Mapping[str, Any] | None = None,
        files: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        seconds: float = SHORT,
    ) -> dict[str, Any]:
        """The JSON object of an answer. Raises Failure."""
        sent = {**self.headers, **(headers or {})}
        if body is not None:
            sent["Content-Type"] = "application/json"
        try:
            async with asyncio.timeout(seconds):
                response = await self.client.request(
                    method,
                    f"{self.base_url}{path}",
                    content=body,
                    params=query,
                    data=form,
                    files=files,
                    headers=sent,
                    timeout=seconds,
                )
        except httpx.ConnectError as error:
            raise SlowDown("unreachable", None) from error
        except (TimeoutError, httpx.HTTPError) as error:
            raise Unsure(type(error).__name__) from error
        _check(response.status_code, response.headers, response.content)
        return _object(response.content)

    async def lines(self, path: str) -> AsyncIterator[str]:
        """The lines of an answer, as they come. Raises Failure."""
        try:
            async with self.client.stream(
                "GET", f"{self.base_url}{path}", headers=dict(self.headers), timeout=LONG
            ) as response:
                if response.status_code >= 300:
                    _check(response.status_code, response.headers, await response.aread())
                async for line in response.aiter_lines():
                    if line.strip():
                        yield line
        except httpx.HTTPError as error:
            raise Unsure(type(error).__name__) from error

    async def pages(
        self, path: str, cursor: str, query: Mapping[str, str | int]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The items of a list, newest first; `cursor` is the parameter with the last id of a page."""
        after: str | None = None
        for _ in range(PAGES):
            given = {**query, "limit": PAGE, **({} if after is None else {cursor: after})}
            page = await self.ask("GET", path, query=given)
            items = [item for item in page.get("data") or () if isinstance(item, dict)]
            for item in items:
                yield item
            if not page.get("has_more") or not items:
                return
            after = str(items[-1].get("id"))


def code_of(value: object) -> str:
    """An error code of a provider; it may say anything else."""
    return value if isinstance(value, str) and _CODE.fullmatch(value) else "error"


def _check(status: int, headers: Mapping[str, str], content: bytes) -> None:
    if status < 300:
        return
    error: Any = {}
    if len(content) <= MAX_ANSWER:
        try:
            error = json.loads(content)
        except (ValueError, RecursionError):
            error = {}
    inner = error.get("error") if isinstance(error, dict) else None
    said = (inner.get("code") or inner.get("type")) if isinstance(inner, dict) else None
    code = f"{status} {code_of(said)}" if said else str(status)
    if status == 404:
        raise Missing(code)
    if status in (429, 529):
        raise SlowDown(code, _seconds(headers.get("retry-after")))
    if status in (408, 409, 425) or status >= 500:
        raise Unsure(code)
    raise Declined(code)


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else min(max(float(text), 0.0), 3600.0)
    except ValueError:
        return None


def _object(content: bytes) -> dict[str, Any]:
    """Raises Unsure: it was done, but what it is called is not known."""
    if len(content) > MAX_ANSWER:
        raise Unsure("too_large")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Unsure("not_json") from error
    if not isinstance(found, dict):
        raise Unsure("not_json")
    return found
