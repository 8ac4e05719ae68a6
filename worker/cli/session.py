"""What a command uses: its settings, its database, and the user who runs it."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import typer

from worker.cli.output import Format, print_row
from worker.clock import Clock, SystemClock
from worker.errors import ConfigurationError, NotFound, WorkerError, did_you_mean
from worker.ids import ALL_ORGS

if TYPE_CHECKING:
    from worker.settings import Settings
    from worker.store.database import Database

UPGRADE = "python -m worker db upgrade"


@dataclass
class Invocation:
    """One call of the command line; settings and database are opened on first use."""

    config: str | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    clock: Clock = field(default_factory=SystemClock)

    @cached_property
    def settings(self) -> Settings:
        """The settings in force.

        Raises:
            ConfigurationError: they cannot be read.
        """
        from worker.settings import load

        return load(self.config, self.overrides)

    @property
    def actor(self) -> str:
        """The OS user, or its number if it has no name."""
        try:
            return pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            return str(os.getuid())

    def require_database(self) -> None:
        """Check that the SQLite file exists, since opening would create it, perhaps in the wrong place.

        Raises:
            ConfigurationError: there is no such file.
        """
        file = self.settings.database.sqlite_file
        if file is not None and not file.exists():
            raise ConfigurationError(f"there is no database {file.absolute()}", fix=f"`{UPGRADE}` creates it")

    @contextmanager
    def database(self, *, any_schema: bool = False) -> Iterator[Database]:
        """The database of the settings; checks its schema unless `any_schema`.

        Raises:
            ConfigurationError: there is no database, or its schema has another version.
            StoreUnavailable: it does not answer.
        """
        from worker import wiring

        if not any_schema:
            self.require_database()
        database = wiring.open_database(self.settings)
        try:
            if not any_schema:
                from worker.store import schema

                with database.autocommit() as connection:
                    schema.check(connection)
            yield database
        except NotFound as error:
            if error.sought is not None:
                error.fix = _with_suggestion(database, error)
            raise
        finally:
            database.close()


def _with_suggestion(database: Database, error: NotFound) -> str:
    """The fix of an error, after the names that are close to the one that was sought."""
    from worker.search import Query
    from worker.store.lists import Page, search
    from worker.store.names import around

    # If the database is gone meanwhile, the first error is the one to report.
    with suppress(WorkerError), database.autocommit() as connection:
        kind, name, org = error.sought or ("org", "", None)
        question = did_you_mean(name, around(connection, kind, name, org))
        if kind == "org" and not question:
            # A customer is known by its name; one that fits several says nothing.
            found = search.orgs_of(connection, ALL_ORGS, Query(words=(name,)), Page(limit=2))
            if len(found) == 1:
                question = f"did you mean {found[0]['code']} ({found[0]['name']})?"
        return f"{question} {error.fix}".strip()
    return error.fix


def session_of(context: typer.Context) -> Invocation:
    """The session made by the options before the verb. No secret is read before this call."""
    from worker.execution.runners.child.linux import hide_memory

    # Again: `--help` can be the value of an option, which skips the first call.
    hide_memory()
    return cast(Invocation, context.obj)


def change(context: typer.Context, output: Format, operation: Callable[..., Mapping[str, Any]]) -> None:
    """Call an operation with the database and the actor, and print the row that it returns."""
    session = session_of(context)
    with session.database() as database:
        row = operation(database, actor=session.actor)
    print_row(row, output)
