"""OpenAI's batch API: a batch is made of a file with a request a line, and is found again by that file."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal

from worker.features.batches.remote import LONG, Http, Line, Missing, Remote, Unsure, code_of
from worker.model.batches import Result

_ENDED = ("completed", "expired", "cancelled")
# Of requests that a batch ended before.
_UNRUN: Mapping[str, Literal["expired", "canceled"]] = {
    "batch_expired": "expired",
    "batch_cancelled": "canceled",
}


@dataclass(frozen=True, slots=True)
class OpenAI:
    """Implements `BatchApi`."""

    takes_file: ClassVar[bool] = True
    http: Http

    async def upload(self, name: str, path: str, lines: Sequence[Line]) -> str:
        content = b"\n".join(_line(line, path) for line in lines)
        file = {"file": (name, content, "application/jsonl")}
        made = await self.http.ask("POST", "/v1/files", form={"purpose": "batch"}, files=file, seconds=LONG)
        return _id(made)

    async def find_files(self, name: str) -> list[str]:
        query = {"purpose": "batch", "order": "desc"}
        pages = self.http.pages("/v1/files", "after", query)
        return [str(item["id"]) async for item in pages if item.get("filename") == name]

    async def create(self, path: str, betas: str, file_id: str | None, lines: Sequence[Line]) -> Remote:
        asked = {"input_file_id": file_id, "endpoint": path, "completion_window": "24h"}
        return _remote(await self.http.ask("POST", "/v1/batches", body=json.dumps(asked).encode()))

    async def get(self, id_: str) -> Remote:
        return _remote(await self.http.ask("GET", f"/v1/batches/{id_}"))

    async def made_of(self, file_id: str) -> Remote | None:
        async with aclosing(self.http.pages("/v1/batches", "after", {})) as pages:
            async for item in pages:
                if item.get("input_file_id") == file_id:
                    return _remote(item)
        return None

    async def since(self, at: datetime) -> list[Remote]:
        return []

    async def results(self, remote: Remote) -> AsyncGenerator[Result, None]:
        for file_id in remote.files:
            async for line in self.http.lines(f"/v1/files/{file_id}/content"):
                if (result := result_of(line)) is not None:
                    yield result

    async def delete_file(self, file_id: str) -> None:
        with suppress(Missing):
            await self.http.ask("DELETE", f"/v1/files/{file_id}")

    async def forget(self, remote_id: str) -> None:
        return


def _line(line: Line, path: str) -> bytes:
    head = json.dumps({"custom_id": line.id, "method": "POST", "url": path}).encode()
    return head[:-1] + b', "body": ' + line.body + b"}"


def result_of(line: str) -> Result | None:
    """The result in a line of an output or error file; None if it is not one."""
    try:
        read = json.loads(line)
        id_, response, error = read["custom_id"], read.get("response"), read.get("error")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None
    if not isinstance(id_, str):
        return None
    if isinstance(response, dict):
        body = response.get("body")
        if isinstance(response.get("status_code"), int) and 200 <= response["status_code"] < 300:
            return Result(id_, "succeeded", json.dumps(body))
        return Result(id_, "errored", json.dumps({"status_code": response.get("status_code"), "body": body}))
    code = error.get("code") if isinstance(error, dict) else None
    if isinstance(code, str) and code in _UNRUN:
        return Result(id_, _UNRUN[code])
    return Result(id_, "errored", json.dumps({"status_code": 500, "body": {"error": error}}))


def _id(answer: Mapping[str, Any]) -> str:
    if not isinstance(id_ := answer.get("id"), str):
        raise Unsure("no_id")
    return id_


def _remote(item: Mapping[str, Any]) -> Remote:
    """Raises Unsure."""
    status, counts = item.get("status"), item.get("request_counts")
    errors = item.get("errors")
    first = (errors.get("data") or [{}])[0] if isinstance(errors, dict) else {}
    made = item.get("created_at")
    if not isinstance(made, int | float):
        raise Unsure("no_created_at")
    files = tuple(str(file) for file in (item.get("output_file_id"), item.get("error_file_id")) if file)
    return Remote(
        id=_id(item),
        state="refused" if status == "failed" else "ended" if status in _ENDED else "open",
        created_at=datetime.fromtimestamp(made, UTC),
        requests=int(counts.get("total") or 0) if isinstance(counts, dict) else 0,
        files=files,
        file_id=item.get("input_file_id"),
        error=code_of(first.get("code")) if status == "failed" and isinstance(first, dict) else None,
    )
