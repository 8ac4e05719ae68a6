"""`apply`: make the database match a file of orgs, definitions, templates, calendars, budgets and limits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from worker.app.verbs.templates import apply_templates
from worker.kit.options import FileArgument, option, read_text
from worker.kit.output import Format, say
from worker.kit.progress import ProgressBar
from worker.kit.session import Invocation

if TYPE_CHECKING:
    from worker.model.definitions.file import DefinitionsFile
    from worker.operations.changes import Change

# The largest iCalendar file that is read.
MAX_BYTES = 4 * 2**20
COLUMNS = ("kind", "action", "org", "name", "fields")


def apply(
    session: Invocation,
    file: FileArgument,
    dry_run: Annotated[
        bool, option("--dry-run", "Check everything and print the changes without making them.")
    ] = False,
    prune: Annotated[
        bool, option("--prune", "Close definitions, and remove budgets, of the file's orgs that it lacks.")
    ] = False,
    allow_unknown_handlers: Annotated[
        bool,
        option(
            "--allow-unknown-handlers",
            "Accept handlers that are not installed here; their runs wait for a worker that has them.",
        ),
    ] = False,
) -> None:
    """Make the database match FILE (TOML or JSON), all or nothing, and print the changes.

    The same file again changes nothing. Pauses and org states stay. Then changes the definitions
    that templates make, org by org; interrupted, the workers do the rest.
    """
    from worker.operations.apply import apply as apply_file
    from worker.process.installed_handlers import store_unknown

    wanted = _parsed(file)
    with session.database() as database:
        store_unknown(session.settings, database)
        with ProgressBar("definitions") as progress:
            changes = apply_file(
                database,
                wanted,
                actor=session.actor,
                dry_run=dry_run,
                prune=prune,
                allow_unknown_handlers=allow_unknown_handlers,
                inline=session.settings.execution.inline,
                insecure_origins=session.settings.execution.insecure_origins,
                issuers=session.settings.issuers,
                api_origins=session.settings.api_origins,
                currency=session.settings.prices.currency,
                report=progress.at,
            )
        _print(session, changes, dry_run=dry_run)
        if not dry_run:
            apply_templates(session, database)


def _print(session: Invocation, changes: Sequence[Change], *, dry_run: bool) -> None:
    rows = [change.as_row() for change in changes]
    if session.output is Format.TABLE:
        if not rows:
            say("nothing changes")
            return
        if dry_run:
            say("this would change:")
        rows = [row | {"fields": _short_form(row["fields"])} for row in rows]
    session.print_rows(rows, COLUMNS, key="name")


def _parsed(path: str) -> DefinitionsFile:
    from worker.model.definitions.file import format_of, parse_file

    text = read_text(path)
    if path == "-":
        is_json = text.lstrip().startswith("{")
        return parse_file(text, "json" if is_json else "toml", read_file=partial(_beside, Path()))
    return parse_file(text, format_of(path), read_file=partial(_beside, Path(path).parent))


def _beside(folder: Path, name: str) -> bytes:
    """A file that the applied one names, from its folder; raises ValueError."""
    path = folder / name
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES // 2**20} MiB")
    return content


def _short_form(fields: dict[str, dict[str, object]]) -> list[str]:
    """The keys that change, with both values if there was one before."""
    return [
        f"{key} {values['before']} -> {values['after']}" if values["before"] is not None else key
        for key, values in fields.items()
    ]
