"""`try`: one run of one handler, with fake claims or the token of a real org; nothing is stored."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from worker.clock import Clock
from worker.engine.attempt.tools import Batches, GivenSecrets, NoBatches, SecretSource, TokenSource
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.inline import Blocking, Inline
from worker.engine.trial import FakeTokens, Subject, Trial, definition_of
from worker.engine.trial_attempts import OnError, interrupt, run_to_end, with_on_error
from worker.engine.trial_children import Family
from worker.errors import Conflict
from worker.handlers.catalogue import HandlerEntry
from worker.handlers.models import load
from worker.ids import OrgId, new_id
from worker.kit.broker import broker_of
from worker.kit.feature import Point
from worker.model.bindings import OrgSecrets
from worker.model.orgs import OrgRef
from worker.model.runs.children import FamilyCap, NewChild
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import LogLine
from worker.outbound import open_client
from worker.process.confinement import confinement_of, network_of
from worker.process.installed_handlers import children_of
from worker.settings import Settings
from worker.store import orgs
from worker.store.database import Database
from worker.tokens.cache import Tokens
from worker.tokens.credentials import Credential
from worker.wiring import find_keyring
from worker.wiring.addition import MakeTrialBatches
from worker.wiring.issuers import issuers_of
from worker.wiring.secrets import OpenedCredentials, OpenedSecrets

# What takes the model requests of a trial into batches.
BATCHES: Point[MakeTrialBatches] = Point("batches.trial", "`try --batch`")
# The handler's timeout interrupts neither a debugger nor a wait for a batch.
NO_TIMEOUT = "365d"


@dataclass(frozen=True, slots=True)
class TryRequest:
    """What to try: with fake claims, or with the token of a real org if there is a `database`.

    `scopes` None means all that the handler declares; `state` is that of its definition, `budgets`
    are limits by meter. `secrets` are those of the org, or replace those that a real one has. `answers`
    are given by the name of the wait. With `batch` its model requests go into batches. `on_resume` gets
    what the run waited for each time it goes on. With `on_error` the handler runs in this process; it is
    called with the exception of the handler while its frames still exist.
    """

    org: str
    params: Mapping[str, Any] = field(default_factory=dict)
    properties: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    scopes: Sequence[str] | None = None
    state: Mapping[str, Any] | None = None
    answers: Mapping[str, Any] = field(default_factory=dict)
    budgets: Mapping[str, int] = field(default_factory=dict)
    secrets: OrgSecrets = field(default_factory=dict, repr=False)
    database: Database | None = None
    batch: bool = False
    on_error: OnError | None = None
    on_line: Callable[[LogLine], None] = lambda line: None
    on_progress: Callable[[Mapping[str, Any]], None] = lambda progress: None
    on_resume: Callable[[str], None] = lambda text: None


@dataclass(frozen=True, slots=True)
class Tried:
    """The outcome, the last checkpoint or None, the definition's state afterwards, and what it spent."""

    ended: EndedAttempt
    checkpoint: Any
    state: Any
    spends: Mapping[str, int]


async def try_once(settings: Settings, entry: HandlerEntry, request: TryRequest, clock: Clock) -> Tried:
    """Run one attempt, and the children that it starts one after another; they spend from no budget.

    Ctrl-C cancels the run that is under way, a second Ctrl-C kills it.

    Raises:
        NotFound: there is no such org, or a handler of `children` is not installed.
        Conflict: the org is suspended or removed.
        ConfigurationError: an issuer or the key ring is not usable.
        DefinitionError: the scopes or the timeout of the handler are invalid.
    """
    subject = _subject(settings, entry, request)
    children = await children_of(entry, settings)
    async with AsyncExitStack() as stack:
        # The zygote and the broker start before any key is read.
        runner = _runner(settings, entry, request, clock, stack)
        tokens, secrets = await _sources(settings, request, clock, stack)
        batches = _batches(settings, secrets, clock, request)
        stack.push_async_callback(batches.close)
        trials: list[Trial] = []
        entries = [entry, *children]
        shared: dict[str, Any] = {
            "secrets": secrets,
            "live": True,
            "brokered": runner.broker is not None,
            "on_line": request.on_line,
        }

        async def run_child(new: NewChild, cap: FamilyCap, depth: int) -> EndedAttempt:
            of = replace(subject, definition=replace(subject.definition, handler=new.handler))
            family, params = Family(run_child, cap, depth), json.loads(new.params_json)
            trials.append(Trial(of, entries, tokens, runner, clock, family=family, params=params, **shared))
            try:
                return await run_to_end(trials[-1], request.on_resume)
            finally:
                trials.pop()

        trial = Trial(
            subject,
            entries,
            tokens,
            runner,
            clock,
            state=request.state,
            answers=request.answers,
            budgets=request.budgets,
            on_progress=request.on_progress,
            family=Family(run_child),
            batches=batches,
            **shared,
        )
        trials.append(trial)
        if request.on_error is None:
            # The run that is under way: the handler, or a child while its parent waits.
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, lambda: interrupt(trials[-1]))
        ended = await run_to_end(trial, request.on_resume)
        return Tried(ended, trial.checkpoint, trial.state, trial.spent)


async def _sources(
    settings: Settings, request: TryRequest, clock: Clock, stack: AsyncExitStack
) -> tuple[TokenSource, SecretSource]:
    if request.database is None:
        fake = FakeTokens(clock, properties=request.properties, flags=request.flags, scopes=request.scopes)
        return fake, GivenSecrets(request.secrets)
    keyring = find_keyring(settings)
    source = _UncountedCredentials(request.database, keyring, settings.secrets_dir, clock)
    client = await stack.enter_async_context(open_client())
    tokens = Tokens(issuers_of(settings), source, client=client, clock=clock)
    stack.push_async_callback(tokens.close)
    return tokens, _WithGiven(OpenedSecrets(request.database, source.ring), request.secrets)


def _batches(settings: Settings, secrets: SecretSource, clock: Clock, request: TryRequest) -> Batches:
    """What takes the model requests of the run: batches if that was asked, else nothing."""
    if request.batch:
        return BATCHES.require()(settings, secrets, clock, request.on_resume)
    return NoBatches()


def _subject(settings: Settings, entry: HandlerEntry, request: TryRequest) -> Subject:
    # One attempt only: a failure is shown rather than retried.
    keys: dict[str, Any] = {"params": dict(request.params), "max_attempts": 1, "max_recoveries": 0}
    if request.on_error is not None or request.batch:
        keys["timeout"] = NO_TIMEOUT
    if request.batch:
        keys["model_requests"] = "batch"
    execution = settings.execution
    if request.database is None:
        org, name, named = OrgRef(OrgId(new_id()), request.org), request.org, "made-up"
        # A made-up org uses the only issuer; with several, any choice would be a guess.
        issuer = next(iter(settings.issuers.values())) if len(settings.issuers) == 1 else None
    else:
        if request.scopes is not None:
            keys["scopes"] = list(request.scopes)
        with request.database.autocommit() as connection:
            row = orgs.require(connection, request.org)
        if row["state"] in ("suspended", "removed"):
            resume, another = f"resume it with `orgs resume {request.org}`", "choose another org"
            raise Conflict(
                f"org {request.org} is {row['state']}: no handler can run for it",
                fix=resume if row["state"] == "suspended" else another,
            )
        org, name = OrgRef(row["id"], row["code"]), row["name"]
        named, issuer = row["issuer"], settings.issuers.get(row["issuer"])
    return Subject(
        org,
        name,
        definition_of(request.org, entry.name, keys),
        issuer=named,
        api_origins=issuer.api_origins if issuer else (),
        private_origins=execution.private_origins,
        insecure_origins=execution.insecure_origins,
        api_base_url=issuer.api_base_url if issuer else "",
        network=network_of(settings),
    )


def _runner(
    settings: Settings, entry: HandlerEntry, request: TryRequest, clock: Clock, stack: AsyncExitStack
) -> ChildPool | Inline | Blocking:
    confinement = confinement_of(settings)
    broker = broker_of(settings, clock, confinement)
    if request.on_error is not None:
        if broker is not None:
            broker.start()
            stack.push_async_callback(broker.close)
        job = load(entry.entry_point)
        find = partial(with_on_error, on_error=request.on_error)
        if job.is_async:
            return Inline(clock, find=find, watched=False, broker=broker)
        return Blocking(clock, find=find, broker=broker)
    # Inline handlers too: they work in a process, and inline brings nothing for one run.
    passed = settings.execution.pass_environment
    children = ChildPool(
        clock, freezing=False, pass_environment=passed, sandbox=confinement.rules, broker=broker
    )
    children.start()
    stack.push_async_callback(children.close)
    return children


class _UncountedCredentials(OpenedCredentials):
    """Credentials whose use is not recorded."""

    async def used(self, credential: Credential, error: str | None) -> None:
        return


@dataclass(frozen=True, slots=True)
class _WithGiven:
    """The secrets of a real org, except those that are given."""

    stored: SecretSource
    given: OrgSecrets = field(repr=False)

    async def of(self, org: OrgRef, names: Collection[str]) -> OrgSecrets:
        given = {name: self.given[name] for name in names if name in self.given}
        left = [name for name in names if name not in given]
        return {**given, **(await self.stored.of(org, left) if left else {})}
