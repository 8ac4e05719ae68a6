"""`doctor`: looks for what goes wrong slowly or silently."""

from __future__ import annotations

import typer

from worker.cli.options import OutputOption
from worker.cli.output import Format, print_rows, say
from worker.cli.session import session_of

FAILED = 1


def doctor(context: typer.Context, output: OutputOption = Format.TABLE) -> int:
    """Look for what goes wrong slowly or silently; exit 1 if any check fails. Changes nothing."""
    from worker.operations.doctor import examine

    with session_of(context).database() as database:
        findings = examine(database)
    rows = [finding.as_row() for finding in findings]
    print_rows(rows, output, columns=("check", "ok", "detail"), key="check")
    failed = [finding for finding in findings if not finding.ok]
    for finding in failed:
        say(f"fix: {finding.check}: {finding.fix}")
    return FAILED if failed else 0
