"""Input of a runner: work with fake claims, and services that record their calls."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from worker.errors import LeaseLost, WorkerError
from worker.execution.runners.contract import GivenErrors, Work
from worker.guard.claims import Claims, Flag
from worker.ids import RunId
from worker.runs.budgets import BudgetState
from worker.runs.run import NewStep, StepPage, StoredStep
from worker.runs.waits import NewWait, WaitState
from worker.secret import AccessToken

MODULE = "process_jobs"
NOW = datetime(2030, 1, 1, 3, tzinfo=UTC)


def claims(**properties: Any) -> Claims:
    """Claims of org_acme with these properties and the flag agent-v2 on."""
    return Claims(
        org_code="org_acme",
        client_id="client",
        scopes=frozenset({"read:kb"}),
        properties=properties,
        flags={"agent-v2": Flag("boolean", True)},
        issued_at=datetime.now(UTC),
        expires_at=datetime.now(UTC) + timedelta(hours=1),
    )


def token(text: str = "token-one", life: timedelta = timedelta(hours=1)) -> AccessToken:
    """A token that expires `life` from now."""
    return AccessToken(text, datetime.now(UTC) + life)


def work(handler: str, **fields: Any) -> Work:
    """The first attempt of a run of this handler of `process_jobs`."""
    given: dict[str, Any] = {
        "run_id": RunId("01234567-89ab-7def-8123-456789abcdef"),
        "attempt": 1,
        "fencing_token": 7,
        "idempotency_key": "key-1",
        "scheduled_for": NOW,
        "org_code": "org_acme",
        "org_name": "Acme",
        "handler": handler,
        "entry_point": f"{MODULE}:{handler}",
        "params": {},
        "claims": claims(),
        "token": token(),
        "api_origins": (),
        "timeout_at": NOW + timedelta(hours=1),
    }
    return Work(**given | fields)


@dataclass
class RecordingServices:
    """Records the calls of a run; a test sets the results of `save` and `token`."""

    on_save: Callable[[str], None] = lambda data: None
    renewed: tuple[AccessToken, Claims] | None = None
    refuses: WorkerError | None = None
    saved: list[Any] = field(default_factory=list)
    progressed: list[tuple[float, float | None, str | None]] = field(default_factory=list)
    lines: list[tuple[str, str, str]] = field(default_factory=list)
    steps: list[NewStep] = field(default_factory=list)
    waits: list[NewWait] = field(default_factory=list)
    states: dict[str, WaitState] = field(default_factory=dict)
    spends: list[tuple[str, int, int]] = field(default_factory=list)
    budget_states: list[BudgetState] = field(default_factory=list)
    tokens_asked: list[bool] = field(default_factory=list)
    errors: GivenErrors = field(default_factory=GivenErrors)
    has_started: bool = False
    closed: bool = False
    peak_memory: int = 0

    async def save(self, data_json: str) -> None:
        if self.closed:
            raise self._given(LeaseLost("the run has ended"))
        try:
            self.on_save(data_json)
        except WorkerError as error:
            raise self._given(error) from None
        self.saved.append(json.loads(data_json))

    async def token(self, *, fresh: bool) -> tuple[AccessToken, Claims]:
        self.tokens_asked.append(fresh)
        if self.refuses is not None:
            raise self._given(self.refuses)
        return self.renewed or (token("token-two"), claims(n="two"))

    async def load_steps(self, after: int) -> StepPage:
        return page(self.steps, after)

    async def open_wait(self, wait: NewWait) -> WaitState:
        if self.closed:
            raise self._given(LeaseLost("the run has ended"))
        self.waits.append(wait)
        return self.states.get(wait.name, WaitState(wait.kind, "pending"))

    async def budgets(self) -> list[BudgetState]:
        return self.budget_states

    async def spend(self, meter: str, amount: int, number: int) -> list[BudgetState]:
        if self.closed:
            raise self._given(LeaseLost("the run has ended"))
        self.spends.append((meter, amount, number))
        return self.budget_states

    async def store_step(self, step: NewStep) -> str:
        if self.closed:
            raise self._given(LeaseLost("the run has ended"))
        if "secret" in step.result_json:
            step = replace(step, result_json=step.result_json.replace("secret", "[masked]"))
        self.steps.append(step)
        return step.result_json

    def progress(self, done: float, total: float | None, note: str | None) -> None:
        self.progressed.append((done, total, note))

    def log(self, level: str, source: str, text: str, at: datetime | None = None) -> None:
        self.lines.append((level, source, text))

    def started(self) -> None:
        self.has_started = True

    def used(self, peak_memory: int) -> None:
        self.peak_memory = peak_memory

    def close(self) -> None:
        self.closed = True

    def _given(self, error: WorkerError) -> WorkerError:
        self.errors.note(error)
        return error

    def text(self) -> str:
        """All lines as one text."""
        return "\n".join(text for _, _, text in self.lines)


def page(steps: Sequence[NewStep], after: int, most: int = 2) -> StepPage:
    """The next page of these stored steps."""
    left = [step for step in sorted(steps, key=lambda step: step.seq) if step.seq > after]
    rows = [
        StoredStep(step.seq, step.name, step.key, step.occurrence, len(step.result_json), step.result_json)
        for step in left[:most]
    ]
    return StepPage(rows, more=len(left) > most)


async def until(condition: Callable[[], Any], *, within: float = 20.0) -> Any:
    """Wait until the condition holds, and return its result."""
    async with asyncio.timeout(within):
        while not (found := condition()):  # noqa: ASYNC110 - of other processes, which set no event
            await asyncio.sleep(0.01)
    return found


def sizes(folder: Path) -> dict[str, int]:
    """The size of each file, to see which processes still write."""
    return {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
