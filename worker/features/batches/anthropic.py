"""Anthropic's batch API: a batch is made by one request without an idempotency key."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar

from worker.features.batches.remote import LONG, Declined, Http, Line, Missing, Remote, Unsure
from worker.model.batches import Result

PATH = "/v1/messages/batches"
_STATUSES = ("succeeded", "errored", "expired", "canceled")


@dataclass(frozen=True, slots=True)
class Anthropic:
    """Implements `BatchApi`."""

    takes_file: ClassVar[bool] = False
    http: Http

    async def upload(self, name: str, path: str, lines: Sequence[Line]) -> str:
        raise Declined("no_files")

    async def find_files(self, name: str) -> list[str]:
        return []

    async def create(self, path: str, betas: str, file_id: str | None, lines: Sequence[Line]) -> Remote:
        parts = (b'{"custom_id":%s,"params":%s}' % (json.dumps(one.id).encode(), one.body) for one in lines)
        body = b'{"requests":[%s]}' % b",".join(parts)
        headers = {"anthropic-beta": betas} if betas else {}
        return _remote(await self.http.ask("POST", PATH, body=body, headers=headers, seconds=LONG))

    async def get(self, id_: str) -> Remote:
        return _remote(await self.http.ask("GET", f"{PATH}/{id_}"))

    async def made_of(self, file_id: str) -> Remote | None:
        return None

    async def since(self, at: datetime) -> list[Remote]:
        found: list[Remote] = []
        async for item in self.http.pages(PATH, "after_id", {}):
            remote = _remote(item)
            if remote.created_at < at:
                break
            found.append(remote)
        return found

    async def results(self, remote: Remote) -> AsyncGenerator[Result, None]:
        # Not from `results_url`: the key goes to the configured API only.
        async for line in self.http.lines(f"{PATH}/{remote.id}/results"):
            if (result := result_of(line)) is not None:
                yield result

    async def delete_file(self, file_id: str) -> None:
        return

    async def forget(self, remote_id: str) -> None:
        with suppress(Missing):
            await self.http.ask("DELETE", f"{PATH}/{remote_id}")


def result_of(line: str) -> Result | None:
    """The result in a line; None if it is not one."""
    try:
        read = json.loads(line)
        id_, result = read["custom_id"], read["result"]
        status = result["type"]
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
    if not isinstance(id_, str) or status not in _STATUSES:
        return None
    has_body = status in ("succeeded", "errored")
    return Result(id_, status, json.dumps(result) if has_body else None)


def _remote(item: Mapping[str, Any]) -> Remote:
    """Raises Unsure."""
    id_, made, counts = item.get("id"), item.get("created_at"), item.get("request_counts")
    try:
        created_at = datetime.fromisoformat(str(made))
    except ValueError as error:
        raise Unsure("no_created_at") from error
    if not isinstance(id_, str) or created_at.tzinfo is None:
        raise Unsure("no_id")
    numbers = counts.values() if isinstance(counts, dict) else ()
    return Remote(
        id=id_,
        state="ended" if item.get("processing_status") == "ended" else "open",
        created_at=created_at,
        requests=sum(number for number in numbers if isinstance(number, int)),
    )
