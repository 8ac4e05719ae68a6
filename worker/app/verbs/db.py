"""`db`: the schema of the database."""

from __future__ import annotations

import typer

from worker.kit.output import Format, say
from worker.kit.session import Invocation, verb

# Changes of one upgrade that are printed; all are in the audit.
MAX_REVIEWED = 200

app = typer.Typer(help="The database's schema: upgrade it, or check it.")


@verb(app, "upgrade")
def upgrade(session: Invocation) -> None:
    """Create the database or upgrade its schema to this release; repeating it changes nothing.

    On PostgreSQL it connects as the role of database.owner_url, if that is set. Stores the
    installation of worker.toml if the database has none. Names on stderr, and as `review` in JSON,
    what it changed that somebody should look at.
    """
    from worker.store import installation, roles, schema

    settings, word = session.settings.database, session.settings.installation
    with session.database(any_schema=True) as database:
        review: list[str] = []
        before = schema.upgrade(
            settings.url,
            settings.owner_url,
            then=lambda connection: word and installation.store_word(connection, word),
            report=review.append,
        )
        missing = ""
        if database.dialect == "postgresql":
            with database.autocommit() as connection:
                missing = roles.missing(connection)
        session.print_row(
            {
                "database": database.url_shown,
                "before": before,
                "version": schema.head(),
                **({} if session.output is Format.TABLE else {"review": review}),
            },
            key="version",
        )
    for line in review[:MAX_REVIEWED]:
        say(f"review: {line}")
    if len(review) > MAX_REVIEWED:
        say(f"{len(review) - MAX_REVIEWED} more are in the audit: `audit list`")
    if missing:
        say(f"warning: {missing}")


@verb(app, "check")
def check(session: Invocation) -> None:
    """Check that the database has this release's schema; exit 78 if not, with the command that fixes it.

    On PostgreSQL it warns about a login that has more rights than it needs, or that cannot act
    for callers of the web side. It works with the logins of a worker and of `serve`.
    """
    from worker.store import roles, schema

    session.require_database()
    with session.database(any_schema=True) as database:
        schema.check_as_login(database)
        warnings: list[str] = []
        if database.dialect == "postgresql":
            with database.autocommit() as connection:
                warnings = roles.warnings(connection)
        row = {"database": database.url_shown, "version": schema.head(), "warnings": warnings}
        session.print_row(row, key="version")
    for warning in warnings:
        say(f"warning: {warning}")
