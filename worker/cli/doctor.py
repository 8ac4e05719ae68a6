"""`doctor`: find slow or silent faults, and collect a support bundle."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.options import OutputOption
from worker.cli.output import Format, as_json, print_rows, say
from worker.cli.session import Invocation, session_of
from worker.errors import Conflict, UsageError

if TYPE_CHECKING:
    from worker.store.database import Database

FAILED = 1


def doctor(
    context: typer.Context,
    bundle: Annotated[
        str | None,
        typer.Option("--bundle", metavar="FILE", help="Also write a redacted support bundle to FILE."),
    ] = None,
    output: OutputOption = Format.TABLE,
) -> int:
    """Find slow or silent faults; exit 1 if any check fails. Changes nothing.

    The bundle is one readable JSON file: versions, settings without secrets, sizes, workers
    and the last failures. Numbers replace the names of orgs, definitions and machines; it has
    no secrets, tokens, params, results, logs or error messages.
    """
    from worker.operations.doctor import examine

    session = session_of(context)
    with session.database() as database:
        findings = examine(database, session.settings)
        if bundle is not None:
            _write(bundle, session, database)
    rows = [asdict(finding) for finding in findings]
    print_rows(rows, output, columns=("check", "ok", "detail"), key="check")
    for finding in findings:
        if not finding.ok:
            say(f"fix: {finding.check}: {finding.fix}")
        elif finding.fix:
            say(f"warning: {finding.check}: {finding.detail}; {finding.fix}")
    if bundle is not None:
        say(f"wrote {bundle}; read it before you send it")
    return 0 if all(finding.ok for finding in findings) else FAILED


def _write(path: str, session: Invocation, database: Database) -> None:
    """Write the bundle to a new file that only its owner can read."""
    from worker.operations.doctor import gather
    from worker.wiring.secrets import issuers_of

    text = as_json(gather(database, session.settings, issuers_of(session.settings)))
    try:
        file = os.open(Path(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise Conflict(f"there is a file {path} already", fix="name another file") from None
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror}", fix="name a file in a folder that you can write to"
        ) from None
    with os.fdopen(file, "w", encoding="utf-8") as bundle:
        bundle.write(text + "\n")
