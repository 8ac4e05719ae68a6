"""`import`: schedules of cron, Celery beat and APScheduler as a file for `apply`."""

from __future__ import annotations

import json
import pickletools
import sys
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated

import typer

from worker.errors import InvalidTrigger, NothingImported, UsageError
from worker.kit.options import argument, option, read_text
from worker.kit.output import Format, printable, say
from worker.kit.session import Invocation, verb
from worker.model.definitions import fields
from worker.model.definitions.zones import parse_zone

if TYPE_CHECKING:
    from worker.features.importing.entries import Import

app = typer.Typer(
    help="Import: print the schedules of cron, Celery beat or APScheduler as a file for `apply`."
)

SourceArgument = Annotated[
    str, argument("FILE|-", "The source, or - for standard input. It is never executed.")
]
OrgOption = Annotated[str, option("--org ORG", "The code of the org that gets the definitions.")]
HandlerOption = Annotated[
    str | None, option("--handler NAME", "The handler of all definitions (default: the task's name).")
]
ZoneOption = Annotated[
    str | None, option("--zone ZONE", "The time zone, such as Europe/Berlin, if the source names none.")
]


@verb(app, "crontab")
def crontab(
    session: Invocation,
    file: SourceArgument,
    org: OrgOption,
    handler: Annotated[str, option("--handler NAME", "The handler that gets each command as `command`.")],
    zone: ZoneOption = None,
    user_column: Annotated[
        bool | None,
        option(
            "--user-column/--no-user-column",
            "Whether lines have a user before the command (default: in /etc/crontab and /etc/cron.d).",
        ),
    ] = None,
) -> None:
    """Print the lines of a crontab as definitions: schedules unchanged, commands in `params.command`.

    Variables, users, @reboot and lines with standard input (%) are reported on stderr.
    """
    from worker.features.importing.crontab import has_user_column, read_crontab

    imported = _started(org, handler, zone)
    text = _text(file)
    with_user = has_user_column(text, file) if user_column is None else user_column
    read_crontab(text, imported, with_user=with_user)
    _print(session, imported, file)


@verb(app, "celery-beat")
def celery_beat(
    session: Invocation,
    file: SourceArgument,
    org: OrgOption,
    handler: HandlerOption = None,
    zone: ZoneOption = None,
) -> None:
    """Print the beat schedule in a Python file as definitions; kwargs become params, args `params.args`.

    Reads `beat_schedule` in all its forms, and `add_periodic_task`. Entries that only running the code
    would tell, solar schedules, and crontabs that restrict both day fields are reported on stderr.
    """
    from worker.features.importing.celery_beat import read_celery_beat

    imported = _started(org, handler, zone)
    module = "" if file == "-" else PurePath(file).stem
    read_celery_beat(_text(file), imported, module=module)
    _print(session, imported, file)


@verb(app, "apscheduler")
def apscheduler(
    session: Invocation,
    file: SourceArgument,
    org: OrgOption,
    handler: HandlerOption = None,
    zone: ZoneOption = None,
) -> None:
    """Print the jobs that a Python file adds to APScheduler 3 as definitions.

    Reads `add_job` and `scheduled_job` with cron, interval and date triggers. Jobs that only running
    the code would tell, and cron triggers that restrict both day fields, are reported on stderr.
    """
    from worker.clock import SystemClock
    from worker.features.importing.apscheduler_jobs import read_apscheduler

    imported = _started(org, handler, zone)
    read_apscheduler(_text(file), imported, now=SystemClock().now())
    _print(session, imported, file)


def _started(org: str, handler: str | None, zone: str | None) -> Import:
    """An empty import with these options; raises UsageError if one is invalid."""
    from worker.features.importing.entries import Import

    for typed, value, read in (("--org", org, fields.name), ("--handler", handler, fields.text)):
        try:
            if value is not None:
                read(value)
        except ValueError as error:
            raise UsageError(f"{typed}: {error}", fix=f"name one after {typed}") from None
    try:
        if zone is not None:
            parse_zone(zone)
    except InvalidTrigger as error:
        raise UsageError(f"--zone: {error.message}", fix=error.fix) from None
    return Import(org.strip(), handler, zone)


def _text(file: str) -> str:
    """The source; raises UsageError for a pickle, which only executing it could read."""
    try:
        start = b"" if file == "-" else Path(file).read_bytes()[:1_000_000]
    except OSError:
        start = b""
    if not (_is_pickle(start) or start.startswith((b"SQLite format 3\0", b"\x13\x57\x9a\xce"))):
        text = read_text(file)
        if "\0" not in text and not _is_pickle(text.encode()):
            return text.removeprefix("\ufeff")
    raise UsageError(
        f"{file} holds pickles or a database, not a source: reading pickles would execute what is in them",
        fix="name the crontab, or the Python file that defines the schedule",
    )


def _is_pickle(data: bytes) -> bool:
    """Whether the data is a pickle of any protocol; only its opcodes are read."""
    if data.startswith(b"\x80"):
        return True
    try:
        # Protocol 0 is text.
        return sum(1 for _ in pickletools.genops(data)) > 1
    except Exception:
        return False


def _print(session: Invocation, imported: Import, file: str) -> None:
    """Print the file for `apply`, and the remarks on stderr.

    Raises:
        NothingImported: there is no definition.
    """
    from worker.features.importing.entries import to_toml

    rows, output = imported.definitions, session.output
    if rows and output is Format.TABLE:
        title = "standard input" if file == "-" else PurePath(file).name
        print(to_toml(imported, f"Imported from {printable(title)}"), end="")
    elif output is Format.JSON and rows:
        print(json.dumps({"definition": rows}, indent=2))
    else:
        for row in rows:
            print(json.dumps(row) if output is Format.JSONL else row["name"])
    # Before the remarks, also in one file with them.
    sys.stdout.flush()
    remarks = sorted(imported.remarks, key=lambda remark: remark.line)
    left = [remark for remark in remarks if not remark.taken]
    if not rows:
        first = f": {left[0]}" if left else ""
        if output in (Format.TABLE, Format.ID):
            for remark in remarks:
                say(str(remark))
        raise NothingImported(
            f"no entry of {file} was taken over{first}" if left else f"{file} has no entries",
            fix="check that it is the right file; the documentation's page Migrating from cron, Celery "
            "beat and APScheduler lists what each import reads",
        )
    for remark in remarks:
        say(str(remark))
    say(f"{len(rows)} taken over, {len(left)} not")
