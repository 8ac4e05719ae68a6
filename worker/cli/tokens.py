"""`tokens`: the access tokens that workers share through the database."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.cli.options import option
from worker.cli.session import Invocation, verb
from worker.errors import UsageError

app = typer.Typer(help="The access tokens that workers share through the database, sealed.")


@verb(app, "drop")
def drop(
    session: Invocation,
    org: Annotated[str | None, option("--org CODE", "Only those of this org.")] = None,
    all_: Annotated[bool, option("--all", "Those of all orgs.")] = False,
) -> None:
    """Delete stored tokens, so that workers request new ones; give --org or --all.

    After the database was restored from a backup, run it before any worker starts: the
    backup has tokens of credentials that may be retired since. A worker that runs keeps the
    tokens that it holds; `credentials retire` ends those within two seconds.
    """
    from worker.operations.keys import drop_tokens

    if (org is None) != all_:
        raise UsageError("tokens drop needs --org CODE or --all", fix="give one of the two")
    session.change(drop_tokens, org, key="dropped")
