"""Fakes that answer as scripted and record what they are asked: a worker, and its stores and sources."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from tests.fakes.running import claims, token
from worker.engine.runners.contract import GivenErrors
from worker.errors import LeaseLost, WorkerError
from worker.guard.claims import Claims
from worker.handlers.calls import (
    A,
    AskBudgets,
    AskLimits,
    AskToken,
    Call,
    CountSpend,
    KnownLimits,
    LoadSteps,
    OneWayCall,
    OpenWait,
    Progress,
    Save,
    StoreStep,
)
from worker.handlers.steps import StepError
from worker.model.runs.budgets import BudgetState, OrgBudgets
from worker.model.runs.run import NewStep, StepPage, StoredStep
from worker.model.runs.waits import NewWait, WaitState
from worker.secret import AccessToken


class Answering:
    """Answers each method with what `answers` has under its name, raised if that is an exception.

    An answer that is a function gets the arguments. What is not in `answers` is answered with None; names
    in `at_once` are no coroutines.
    """

    def __init__(self, answers: Mapping[str, Any], at_once: Collection[str] = ()) -> None:
        self.answers = answers
        self.at_once = at_once
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def answer(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, *args, *kwargs.values()))
            given = self.answers.get(name)
            if isinstance(given, Exception):
                raise given
            return given(*args, **kwargs) if callable(given) else given

        async def later(*args: Any, **kwargs: Any) -> Any:
            return answer(*args, **kwargs)

        return answer if name in self.at_once else later

    def asked(self, *names: str) -> list[tuple[Any, ...]]:
        """The calls of these methods, each as its name and arguments."""
        return [call for call in self.calls if call[0] in names]


@dataclass
class AnsweringWorker:
    """The worker as a handler and its runner see it: a `Port` and `RunServices`.

    A call is answered by what `answers` has for its class: a function of the call, which may be async. Any
    other is answered as a worker would that masks the word secret. With `suspends` no answer comes at once.
    """

    answers: Mapping[type[Call[Any]], Callable[[Any], Any]] = field(default_factory=dict)
    suspends: bool = False
    on_save: Callable[[str], None] = lambda data: None
    renewed: tuple[AccessToken, Claims] | None = None
    refuses: WorkerError | None = None
    states: dict[str, WaitState] = field(default_factory=dict)
    budget_states: list[BudgetState] = field(default_factory=list)
    calls: list[Call[Any]] = field(default_factory=list)
    saved: list[Any] = field(default_factory=list)
    progressed: list[tuple[float, float | None, str | None]] = field(default_factory=list)
    lines: list[tuple[str, str, str]] = field(default_factory=list)
    steps: list[NewStep] = field(default_factory=list)
    errors: GivenErrors = field(default_factory=GivenErrors)
    has_started: bool = False
    closed: bool = False
    org_id: str = "00000000-0000-7000-8000-000000000001"
    peak_memory: int = 0
    sent: list[Mapping[str, Any]] = field(default_factory=list)
    denials: list[tuple[str, str]] = field(default_factory=list)

    async def ask(self, call: Call[A]) -> A:
        self.calls.append(call)
        if self.suspends:
            await asyncio.sleep(0)
        scripted = self.answers.get(type(call), self._answer)
        try:
            if self.closed:
                raise LeaseLost("the run has ended")
            found = scripted(call)
            answer: A = await found if inspect.isawaitable(found) else found
        except (WorkerError, StepError) as error:
            self.errors.note(error)
            raise
        return answer

    def _answer(self, call: Call[Any]) -> Any:
        match call:
            case Save(data):
                self.on_save(data)
                self.saved.append(json.loads(data))
                return None
            case AskToken():
                if self.refuses is not None:
                    raise self.refuses
                return self.renewed or (token("token-two"), claims(n="two"))
            case AskLimits():
                return KnownLimits()
            case AskLimits():
                return KnownLimits()
            case LoadSteps(after):
                return page(self.steps, after)
            case StoreStep(step):
                text = step.result_json.replace("secret", "[masked]")
                self.steps.append(replace(step, result_json=text))
                return None if text == step.result_json else text
            case OpenWait(wait):
                return self.states.get(wait.name, WaitState(wait.kind, "pending"))
            case AskBudgets() | CountSpend():
                return OrgBudgets(self.budget_states)
        raise AssertionError(f"no answer to {call}")

    def tell(self, notice: OneWayCall) -> None:
        assert isinstance(notice, Progress)
        self.progressed.append((notice.done, notice.total, notice.note))

    def log(self, level: str, source: str, text: str, at: datetime | None = None) -> None:
        self.lines.append((level, source, text))

    def started(self) -> None:
        self.has_started = True

    def used(self, peak_memory: int) -> None:
        self.peak_memory = peak_memory

    def egress(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.sent = list(rows)

    def denied(self, origin: str, reason: str) -> None:
        self.denials.append((origin, reason))

    def close(self) -> None:
        self.closed = True

    @property
    def waits(self) -> list[NewWait]:
        return [call.wait for call in self.calls if isinstance(call, OpenWait)]

    @property
    def spends(self) -> list[tuple[str, int, str]]:
        return [(call.meter, call.amount, call.key) for call in self.calls if isinstance(call, CountSpend)]

    @property
    def tokens_asked(self) -> list[bool]:
        return [call.fresh for call in self.calls if isinstance(call, AskToken)]

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
