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
    """The attempt that wrote it, from 1."""
    level: str
    """`debug`, `info`, `warning`, `error` or `critical`; what is printed is `info`."""
    text: str
    """What it says."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of the run."""

    number: int
    """From 1."""
    handler: str
    """The handler that was chosen: the definition's, or a variant's."""
    outcome: str
    """How it ended, as `runs show` has it: `succeeded`, `failed`, `lost`, `handed_back`, …"""
    state: str
    """The run's state after it: `waiting`, or the one in which it ended."""
    reason: str | None
    """The reason for that state."""
    detail: str | None
    """What the reason is about, such as a property's name."""
    error: Mapping[str, str] | None
    """What went wrong: `type`, `message` and `trace`."""
    started_at: datetime
    """When it began, by the test's clock."""
    ended_at: datetime
    """When it ended, by the test's clock."""

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
    """A run as it stands after its last attempt, in the words and values of `runs show`."""

    state: str
    """How it ended; `waiting` where the attempts that the test allows were not enough."""
    reason: str | None
    """Why; None for `succeeded`."""
    detail: str | None
    """What the reason is about, such as the scope that is missing."""
    result: Any
    """What the handler returned, as it is after JSON."""
    error: Mapping[str, str] | None
    """What went wrong: `type`, `message` and `trace`."""
    checkpoint: Any
    """What the run saved last."""
    progress: Mapping[str, Any] | None
    """What it showed last: `done`, `total` and `note`."""
    attempts: tuple[Attempt, ...]
    """All attempts, in order."""
    logs: tuple[LogLine, ...]
    """What they gave to `ctx.log`; in a child also what they printed, or logged in another way."""
    requests: tuple[httpx.Request, ...] = field(repr=False)
    """The requests that reached `api`."""

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
