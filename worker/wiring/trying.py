"""Trying a handler: one run in front of its author, under made-up claims or a real org's token."""

from __future__ import annotations

import asyncio
import copy
import inspect
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from worker.clock import Clock
from worker.definitions.policies import CANCEL_GRACE
from worker.errors import Conflict, NotFound
from worker.execution.attempts.run_services import TokenSource
from worker.execution.runners.child.pool import ChildPool
from worker.execution.runners.contract import Runner
from worker.execution.runners.inline import Blocking, Inline
from worker.execution.trial import FakeTokens, Subject, Trial, definition_of
from worker.handlers.catalogue import HandlerEntry, read_catalogue
from worker.handlers.installed import distributions
from worker.handlers.job import Job
from worker.handlers.models import load
from worker.ids import OrgId, new_id
from worker.operations.confinement import confinement_of
from worker.orgs import OrgRef
from worker.runs.outcome import EndedAttempt
from worker.runs.run import LogLine
from worker.settings import Settings
from worker.store import orgs
from worker.store.database import Database
from worker.tokens.cache import Tokens
from worker.tokens.http import open_client
from worker.wiring import find_keyring
from worker.wiring.secrets import OpenedCredentials, issuers_of

# A debugger is not to be cut short by the handler's timeout.
NO_TIMEOUT = "365d"

OnError = Callable[[Exception], None]


@dataclass(frozen=True, slots=True)
class Wish:
    """What to try: under made-up claims, or those of a real org where a database is given.

    `scopes` None means all that the handler declares; `on_error` has it run in this
    process, and is called with what the handler raises while its frames are still there.
    """

    org: str
    params: Mapping[str, Any] = field(default_factory=dict)
    properties: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    scopes: Sequence[str] | None = None
    database: Database | None = None
    on_error: OnError | None = None
    on_line: Callable[[LogLine], None] = lambda line: None
    on_progress: Callable[[Mapping[str, Any]], None] = lambda progress: None


@dataclass(frozen=True, slots=True)
class Tried:
    """How it ended, and the checkpoint that it saved last."""

    ended: EndedAttempt
    checkpoint: Any


async def find_handler(name: str, settings: Settings) -> HandlerEntry:
    """The handler of that name as its distribution offers it, read in a process of its own.

    Raises:
        NotFound: no installed distribution offers it, or it does not load.
    """
    homes = [found.name for found in distributions() if any(point.name == name for point in found.points)]
    command = confinement_of(settings).describe
    reading = read_catalogue(homes, pass_environment=settings.execution.pass_environment, command=command)
    found = [entry async for entry in reading if entry.name == name]
    if not found:
        raise NotFound(
            f"no installed distribution offers a handler {name}",
            fix=f"install its distribution here, or `new-job {name}` makes one",
        )
    entry = found[0]
    if entry.error is not None:
        raise NotFound(
            f"handler {name} of {entry.distribution} {entry.version} does not load: {entry.error}",
            fix=f"mend {entry.entry_point.partition(':')[0]}, or its entry point in pyproject.toml",
        )
    return entry


async def try_once(settings: Settings, entry: HandlerEntry, wish: Wish, clock: Clock) -> Tried:
    """Carry one run through one attempt; Ctrl-C cancels it, and a second one kills it.

    Nothing is stored; with a real org its issuer is asked for a token as for any run.

    Raises:
        NotFound: there is no such org.
        Conflict: the org is suspended or removed.
        ConfigurationError: an issuer, or the key ring, is not usable.
        DefinitionError: the handler's own scopes or timeout are none.
    """
    subject = _subject(settings, entry, wish)
    async with _runner(settings, entry, wish, clock) as runner, _tokens(settings, wish, clock) as tokens:
        trial = Trial(
            subject,
            [entry],
            tokens,
            runner,
            clock,
            live=True,
            on_line=wish.on_line,
            on_progress=wish.on_progress,
        )
        if wish.on_error is None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, partial(_interrupt, trial))
        return Tried(await trial.attempt(), trial.checkpoint)


def _subject(settings: Settings, entry: HandlerEntry, wish: Wish) -> Subject:
    # One attempt: what would be tried again is shown as it failed.
    keys: dict[str, Any] = {"params": dict(wish.params), "max_attempts": 1, "max_recoveries": 0}
    if wish.on_error is not None:
        keys["timeout"] = NO_TIMEOUT
    execution = settings.execution
    if wish.database is None:
        org = OrgRef(OrgId(new_id()), wish.org)
        definition = definition_of(wish.org, entry.name, keys)
        return Subject(org, wish.org, definition, private_origins=execution.private_origins)
    if wish.scopes is not None:
        keys["scopes"] = list(wish.scopes)
    with wish.database.autocommit() as connection:
        row = orgs.require(connection, wish.org)
    if row["state"] in ("suspended", "removed"):
        raise Conflict(
            f"org {wish.org} is {row['state']}: nothing acts for it",
            fix=f"`orgs resume {wish.org}` lifts a suspension"
            if row["state"] == "suspended"
            else "try another",
        )
    issuer = settings.issuers.get(row["issuer"])
    return Subject(
        OrgRef(row["id"], row["code"]),
        row["name"],
        definition_of(wish.org, entry.name, keys),
        issuer=row["issuer"],
        api_origins=issuer.api_origins if issuer else (),
        private_origins=execution.private_origins,
        insecure_origins=execution.insecure_origins,
    )


@asynccontextmanager
async def _runner(settings: Settings, entry: HandlerEntry, wish: Wish, clock: Clock) -> AsyncIterator[Runner]:
    if wish.on_error is not None:
        job = load(entry.entry_point)
        find = partial(_watched, on_error=wish.on_error)
        yield Inline(clock, find=find, watched=False) if job.is_async else Blocking(clock, find=find)
        return
    # Also a handler that asks to be inline: it gets along in a process, and one run gains nothing.
    children = ChildPool(
        clock,
        freezing=False,
        pass_environment=settings.execution.pass_environment,
        sandbox=confinement_of(settings).rules,
    )
    children.start()
    try:
        yield children
    finally:
        await children.close()


@asynccontextmanager
async def _tokens(settings: Settings, wish: Wish, clock: Clock) -> AsyncIterator[TokenSource]:
    if wish.database is None:
        yield FakeTokens(clock, properties=wish.properties, flags=wish.flags, scopes=wish.scopes)
        return
    source = _UncountedCredentials(wish.database, find_keyring(settings), settings.secrets_dir, clock)
    async with open_client() as client:
        tokens = Tokens(issuers_of(settings), source, client=client, clock=clock)
        try:
            yield tokens
        finally:
            await tokens.close()


class _UncountedCredentials(OpenedCredentials):
    """Credentials whose uses leave no trace."""

    async def used(self, credential_id: str, error: str | None) -> None:
        return


def _interrupt(trial: Trial) -> None:
    stop = trial.inflight.stop
    if stop.requested.is_set():
        stop.kill()
    else:
        stop.request("cancel", CANCEL_GRACE.total_seconds())


def _watched(entry_point: str, *, on_error: OnError) -> Job:
    """The handler, which calls `on_error` with what it raises before anybody else sees it."""
    job = copy.copy(load(entry_point))
    function = job.function

    async def call(ctx: Any) -> Any:
        try:
            return await function(ctx)
        except Exception as error:
            on_error(error)
            raise

    def call_blocking(ctx: Any) -> Any:
        try:
            return function(ctx)
        except Exception as error:
            on_error(error)
            raise

    job.function = call if inspect.iscoroutinefunction(function) else call_blocking
    return job
