"""What a test learns of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self

import httpx

from worker.runs.outcome import EndedAttempt


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of the run's log; secrets in it are masked."""

    attempt: int
    level: str
    text: str


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt; `state` and `reason` are the run's after it, `error` has type, message and trace."""

    number: int
    handler: str
    outcome: str
    state: str
    reason: str | None
    detail: str | None
    error: Mapping[str, str] | None
    started_at: datetime
    ended_at: datetime

    @classmethod
    def of(cls, ended: EndedAttempt) -> Self:
        return cls(
            number=ended.attempt,
            handler=ended.trail.handler,
            outcome=ended.outcome,
            state=ended.state,
            reason=ended.reason,
            detail=ended.detail,
            error=ended.error,
            started_at=ended.started_at,
            ended_at=ended.ended_at,
        )


@dataclass(frozen=True, slots=True)
class Finished:
    """A run as it stands after its last attempt: words and values as `runs show` has them.

    `state` is `waiting` where the attempts that the test allows were not enough.
    `progress` has done, total and note; `requests` are those that reached the API.
    """

    state: str
    reason: str | None
    detail: str | None
    result: Any
    error: Mapping[str, str] | None
    checkpoint: Any
    progress: Mapping[str, Any] | None
    attempts: tuple[Attempt, ...]
    logs: tuple[LogLine, ...]
    requests: tuple[httpx.Request, ...] = field(repr=False)

    @classmethod
    def of(
        cls,
        ends: list[EndedAttempt],
        checkpoint: Any,
        progress: Mapping[str, Any] | None,
        logs: list[LogLine],
        requests: list[httpx.Request],
    ) -> Self:
        last = ends[-1]
        return cls(
            state=last.state,
            reason=last.reason,
            detail=last.detail,
            result=None if last.result is None else json.loads(last.result),
            error=last.error,
            checkpoint=checkpoint,
            progress=progress,
            attempts=tuple(map(Attempt.of, ends)),
            logs=tuple(logs),
            requests=tuple(requests),
        )
