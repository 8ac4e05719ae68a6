"""The verb `list`, from its declaration in `store.lists`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar, cast

import typer

from worker.cli.completion import names
from worker.cli.options import (
    AfterOption,
    DefinitionOption,
    LimitOption,
    OrgOption,
    OutputOption,
    SinceOption,
    StateOption,
    read_since,
)
from worker.cli.output import Format, Row, print_rows
from worker.cli.session import session_of
from worker.ids import ALL_ORGS
from worker.store.lists import AUDIT, DEFAULT_LIMIT, SKIPS, Listing, Page

R = TypeVar("R")
_OrgArgument = Annotated[
    str | None, typer.Argument(metavar="[ORG]", help="Only this org's.", autocompletion=names("org"))
]
_FILTERS = {"org": OrgOption, "definition": DefinitionOption, "state": StateOption, "since": SinceOption}


def add_list(
    app: typer.Typer,
    listing: Listing[R],
    verb: str = "list",
    *,
    cells: Mapping[str, Callable[[R], Any]] | None = None,
    org_argument: bool = False,
) -> None:
    """Add the verb with an option for each of the filters.

    `cells` computes columns of the table for people. With `org_argument` the org may also be
    given without `--org`.
    """
    options: dict[str, tuple[Any, Any]] = {"code": (_OrgArgument, None)} if org_argument else {}
    options["output"] = (OutputOption, Format.TABLE)
    options |= {name: (_FILTERS[name], None) for name in listing.filters}
    options |= {"limit": (LimitOption, DEFAULT_LIMIT), "after": (AfterOption, None)}

    def list_(context: typer.Context, **given: Any) -> None:
        from worker.store.lists.read import read

        session, output = session_of(context), given.pop("output")
        org = given.pop("code", None) or given.pop("org", None)
        given.pop("org", None)
        page = Page(**given | {"since": read_since(given.get("since"), session.clock)})
        with session.database() as database, database.autocommit() as connection:
            found = read(connection, listing, ALL_ORGS if org is None else org, page)
        rows = cast(list[Row], found)
        if output is Format.TABLE and cells:
            computed = [{name: cell(row) for name, cell in cells.items()} for row in found]
            rows = [{**row, **more} for row, more in zip(rows, computed, strict=True)]
        print_rows(rows, output, columns=listing.table, limit=page.limit)

    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(name, kind, default=default, annotation=annotation)
        for name, (annotation, default) in options.items()
    ]
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    vars(list_)["__signature__"] = inspect.Signature([context, *parameters])
    app.command(verb, help=listing.about)(list_)


skips = typer.Typer(help="Scheduled times that never became a run, because they were missed or overlapped.")
add_list(skips, SKIPS)

audit = typer.Typer(help="Who changed what: every change made by a person, or by a program for one.")
add_list(audit, AUDIT)
