"""Ends: how attempts ended, as their hosts report it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from worker.execution.hosts.wire import FENCE, Fence, Label, ShownProgress, reason_of
from worker.execution.runners.child import messages
from worker.execution.runners.child.frames import MALFORMED, Message
from worker.execution.runners.contract import handler_exited
from worker.handlers.calls import MAX_BYTES
from worker.handlers.json_text import clean
from worker.handlers.parts import CallPart, Count, Maybe, Number, Text, TextCheck, Truth, row_of
from worker.runs.outcome import Error, Outcome, TimedOut
from worker.runs.waits import MAX_WAITS


class _ReportedOutcome(CallPart[Outcome]):
    """An outcome as a host reports it: that of a run's process, or that it has timed out.

    An invalid one ends its attempt, as that of a process does: it must not keep the other ends of the call.
    """

    def write(self, value: Outcome) -> Message:
        return messages.outcome_message(value)

    def read(self, value: Any, check: TextCheck) -> Outcome:
        try:
            if value["kind"] != TimedOut.__name__:
                return messages.outcome_of_message(value, check)
            failed = messages.outcome_of_message({**value, "kind": "Failed"}, check)
            return TimedOut(cast(Error, getattr(failed, "error")))  # noqa: B009 - of Failed
        except MALFORMED:
            return handler_exited("its host sent an invalid outcome")

    def json_paths(self) -> Iterator[tuple[str, ...]]:
        yield from (("result",), ("state",))


class _Asks(CallPart[tuple[str, ...]]):
    """The waits that ask. A host of the previous release names each as often as its handler opened it."""

    def write(self, value: tuple[str, ...]) -> list[str]:
        return list(value)

    def read(self, value: Any, check: TextCheck) -> tuple[str, ...]:
        if not isinstance(value, list):
            raise ValueError("not a list")
        return tuple(Label().read(name, check) for name in value[:MAX_WAITS])


@dataclass(frozen=True, slots=True)
class End(Fence):
    """How a host's attempt ended. `handler_seconds` is the time since its handler was called, or None."""

    outcome: Annotated[Outcome, _ReportedOutcome()]
    sealed: Annotated[str, Text(MAX_BYTES)] = field(repr=False)
    handler_seconds: Annotated[float | None, Maybe(Number())] = None
    peak_memory: Annotated[int | None, Maybe(Count(2**63 - 1))] = None
    progress: Annotated[Mapping[str, Any] | None, Maybe(ShownProgress())] = None
    moved: Annotated[bool, Truth()] = False
    asks: Annotated[tuple[str, ...], _Asks()] = ()


REPORTED = row_of(End)


class _Ends(CallPart[End]):
    """An end as a host reports it. An invalid one fails its attempt, so that the host need not repeat it."""

    def write(self, value: End) -> Message:
        return REPORTED.write(value)

    def read(self, value: Any, check: TextCheck) -> End:
        try:
            return REPORTED.read(value, check)
        except MALFORMED as error:
            fence = FENCE.read(value, check)
            outcome = handler_exited(clean(f"its host sent an invalid end: {reason_of(error)}", 300))
            sealed = value.get("sealed")
            return End(*fence.key, outcome, sealed if isinstance(sealed, str) else "")

    def json_paths(self) -> Iterator[tuple[str, ...]]:
        return REPORTED.json_paths()


END = _Ends()
