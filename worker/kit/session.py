"""What a command uses: its settings, its database, and the user who runs it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec, TypeVar, cast

import typer

from worker.clock import Clock, SystemClock
from worker.errors import ConfigurationError, NotFound, UsageError, WorkerError, did_you_mean
from worker.ids import ALL_ORGS
from worker.kit.feature import refuse_settings
from worker.kit.output import Cells, Format, Row, print_row, print_rows

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from worker.settings import Settings
    from worker.store.database import Database

P = ParamSpec("P")
F = TypeVar("F", bound=Callable[..., Any])

OutputOption = Annotated[
    Format, typer.Option("--output", "-o", help="Output format: for people, for programs, or ids only.")
]
_BY_NAME = inspect.Parameter.POSITIONAL_OR_KEYWORD
_CONTEXT = inspect.Parameter("context", _BY_NAME, annotation=typer.Context)
_OUTPUT = inspect.Parameter("output", _BY_NAME, annotation=OutputOption, default=Format.TABLE)
UPGRADE = "python -m worker db upgrade"


@dataclass
class Invocation:
    """One call of the command line; settings and database are opened on first use."""

    config: str | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    clock: Clock = field(default_factory=SystemClock)
    output: Format = Format.TABLE

    @cached_property
    def settings(self) -> Settings:
        """The settings in force.

        Raises:
            ConfigurationError: they cannot be read, or are for a feature that is not installed.
        """
        from worker.settings import load

        settings = load(self.config, self.overrides)
        refuse_settings(settings)
        return settings

    @property
    def actor(self) -> str:
        """The OS user, or its number if it has no name."""
        from worker.wiring import os_user

        return os_user()

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

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A connection for reading; errors as of `database`."""
        with self.database() as database, database.autocommit() as connection:
            yield connection

    def show(
        self, read: Callable[Concatenate[Connection, P], Mapping[str, Any]], *given: P.args, **named: P.kwargs
    ) -> None:
        """Read a row, and print it."""
        with self.connection() as connection:
            row = read(connection, *given, **named)
        self.print_row(row)

    def change(
        self,
        operation: Callable[..., Mapping[str, Any]],
        *given: object,
        key: str = "id",
        cells: Cells | None = None,
        **named: Any,
    ) -> None:
        """Call an operation with the database and the actor, and print the row that it returns."""
        with self.database() as database:
            row = operation(database, *given, **named, actor=self.actor)
        self.print_row(row, key=key, cells=cells)

    def print_row(
        self, row: Row, *, key: str = "id", verbatim: bool = False, cells: Cells | None = None
    ) -> None:
        """Print a row in the format that was asked for, as `output.print_row`."""
        print_row(row, self.output, key=key, verbatim=verbatim, cells=cells)

    def print_rows(self, rows: Sequence[Row], columns: Sequence[str], **how: Any) -> None:
        """Print a list in the format that was asked for, as `output.print_rows`."""
        print_rows(rows, self.output, columns=columns, **how)


def _with_suggestion(database: Database, error: NotFound) -> str:
    """The fix of an error, after the names that are close to the one that was sought."""
    from worker.model.search import Query
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


def only_issuer(session: Invocation) -> str:
    """The only issuer of worker.toml; raises UsageError if there are several, or none."""
    found = sorted(session.settings.issuers)
    if len(found) != 1:
        raise UsageError(
            f"--issuer is missing; worker.toml has {', '.join(found) or 'none'}",
            fix="name one of them" if found else "add a table [issuers.main] to worker.toml",
        )
    return found[0]


def session_of(context: typer.Context, output: Format = Format.TABLE) -> Invocation:
    """The session made by the options before the verb. No secret is read before this call."""
    from worker.engine.runners.child.linux import hide_memory

    # Again: `--help` can be the value of an option, which skips the first call.
    hide_memory()
    session = cast(Invocation, context.obj)
    session.output = output
    return session


def verb(app: typer.Typer, name: str) -> Callable[[F], F]:
    """Add a verb to `app`: a function that is called with the session; its last option is `--output`."""

    def add(function: F) -> F:
        app.command(name)(as_command(function))
        return function

    return add


def as_command(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as Typer calls it, if it takes a session."""
    signature = inspect.signature(function, eval_str=True)
    if "session" not in signature.parameters:
        return function

    @wraps(function)
    def command(context: typer.Context, output: Format, **given: Any) -> Any:
        return function(session_of(context, output), **given)

    _, *parameters = signature.parameters.values()
    vars(command)["__signature__"] = signature.replace(parameters=[_CONTEXT, *parameters, _OUTPUT])
    return command
