"""Step tracing: reports the steps of an attempt for its spans, if its worker or host wants them."""

from __future__ import annotations

import threading
from datetime import datetime
from typing import Any

from worker.clock import Clock
from worker.handlers.calls import Port, TraceStep
from worker.handlers.given import Given
from worker.handlers.json_text import check_json_text, clean
from worker.handlers.span_parts import ABOUT, ABOUT_LIMIT, TEXTS_LIMIT
from worker.handlers.steps import OpenStep, StepId, StepNotes
from worker.model.runs.run import NewStep
from worker.telemetry.tracing import MAX_REPLAYED, MAX_STEPS, StepSpan


class StepTracing:
    """What an attempt reports of its steps, up to the most that become spans and events. Thread-safe."""

    def __init__(self, port: Port, clock: Clock, *, texts: bool) -> None:
        self._port = port
        self._clock = clock
        self._texts = texts
        self._lock = threading.Lock()
        self._left = {"step": MAX_STEPS, "replayed": MAX_REPLAYED}

    @classmethod
    def of(cls, given: Given[Any, Any], port: Port) -> StepTracing | None:
        """None if nothing is to be reported."""
        if given.traces == "none":
            return None
        return cls(port, given.held.clock, texts=given.traces == "texts")

    def begin(self, opened: OpenStep) -> None:
        """Let the function of a step say what it is about."""
        opened.notes = StepNotes(texts={} if self._texts else None)

    def stored(self, opened: OpenStep, step: NewStep) -> None:
        """Report a step whose result is stored."""
        error = None if opened.notes is None else opened.notes.error
        self._ended(opened, step.started_at, step.ended_at, error)

    def failed(self, opened: OpenStep, started_at: datetime, error: BaseException) -> None:
        """Report a step whose function has raised."""
        self._ended(opened, started_at, self._clock.now(), type(error).__name__)

    def _ended(self, opened: OpenStep, started_at: datetime, ended_at: datetime, error: str | None) -> None:
        notes = opened.notes
        if notes is None or not self._takes("step"):
            return
        error = None if error is None else clean(error, ABOUT_LIMIT)
        about, texts = ABOUT.read(notes.about, check_json_text), _cut(notes.texts or {})
        self._tell(StepSpan(*_id(opened.id), started_at, ended_at, False, error, about, texts))

    def replayed(self, step: StepId) -> None:
        """Report a stored result that is returned."""
        if self._takes("replayed"):
            now = self._clock.now()
            self._tell(StepSpan(*_id(step), now, now, replayed=True))

    def _takes(self, kind: str) -> bool:
        with self._lock:
            self._left[kind] -= 1
            return self._left[kind] >= 0

    def _tell(self, span: StepSpan) -> None:
        self._port.tell(TraceStep(span))


def _id(step: StepId) -> tuple[str, str | None, int]:
    return step.name, step.key, step.occurrence


def _cut(texts: dict[str, str]) -> dict[str, str]:
    """The texts, each cut to its share of what a span may have before it is masked."""
    return {name: clean(text, TEXTS_LIMIT // len(texts)) for name, text in texts.items()}
