"""The verb `list`, from its declaration in `store.lists`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer

from worker.ids import ALL_ORGS, OrgScope
from worker.kit.options import (
    AfterOption,
    DefinitionOption,
    LimitOption,
    OrgOption,
    PoolOption,
    QueryOption,
    SinceOption,
    StateOption,
    argument,
    option,
    read_pool,
    read_query,
    read_since,
)
from worker.kit.output import Format, Row, print_rows, say
from worker.kit.session import OutputOption, session_of
from worker.store.lists import DEFAULT_LIMIT, FoundRows, Listing, Page

if TYPE_CHECKING:
    from sqlalchemy import Connection

R = TypeVar("R")
_OrgArgument = Annotated[str | None, argument("[ORG]", "Only this org's.", of="org")]
_FILTERS: Mapping[str, tuple[Any, Any]] = {
    "org": (OrgOption, None),
    "definition": (DefinitionOption, None),
    "state": (StateOption, None),
    "since": (SinceOption, None),
    "q": (QueryOption, None),
    "pool": (PoolOption, None),
    "broken": (
        Annotated[
            bool,
            option(
                "--broken",
                "Only those with a dead credential, or a newest run that failed and no retry fixed.",
            ),
        ],
        False,
    ),
    "late": (
        Annotated[
            bool,
            option("--late", "Only those with a definition that is not done by its deadline."),
        ],
        False,
    ),
}
_WordsArgument = Annotated[
    list[str] | None, argument("[WORD]...", "Only those whose name or code has words that begin so.")
]


def add_list(
    app: typer.Typer,
    listing: Listing[R],
    verb: str = "list",
    *,
    cells: Mapping[str, Callable[[R], Any]] | None = None,
    org_argument: bool = False,
    words_argument: bool = False,
    titles: bool = False,
    short: bool = False,
) -> None:
    """Add the verb with an option for each of the filters.

    `cells` computes columns of the table for people, whose names are in capitals with `titles`, and ids
    short on a narrow terminal with `short`.
    With `org_argument` the org may also be given without `--org`; with `words_argument` the
    words of a search without `-q`.
    """
    options: dict[str, tuple[Any, Any]] = {"code": (_OrgArgument, None)} if org_argument else {}
    if words_argument:
        options["words"] = (_WordsArgument, None)
    options["output"] = (OutputOption, Format.TABLE)
    options |= {name: _FILTERS[name] for name in listing.filters}
    options |= {"limit": (LimitOption, DEFAULT_LIMIT), "after": (AfterOption, None)}

    def list_(context: typer.Context, **given: Any) -> None:
        from worker.store.lists.read import page_of, place_of

        session, output = session_of(context), given.pop("output")
        org = given.pop("code", None) or given.pop("org", None)
        given.pop("org", None)
        text = " ".join([*(given.pop("words", None) or ()), *filter(None, [given.pop("q", None)])])
        given["query"] = read_pool(read_query(text or None, session.clock), given.pop("pool", None))
        after = given.pop("after")
        page = Page(**given | {"since": read_since(given.get("since"), session.clock)})
        scope = ALL_ORGS if org is None else org
        with session.database() as database, database.autocommit() as connection:
            page = replace(page, after=place_of(connection, listing, scope, after))
            found = page_of(connection, listing, scope, page)
            hints = _hints(connection, listing, scope, page, found)
        rows = cast(list[Row], found.rows)
        print_rows(
            rows,
            output,
            columns=listing.table,
            limit=page.limit,
            titles=titles,
            cells=cells,
            short=short,
        )
        for hint in hints:
            say(hint)

    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(name, kind, default=default, annotation=annotation)
        for name, (annotation, default) in options.items()
    ]
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    vars(list_)["__signature__"] = inspect.Signature([context, *parameters])
    app.command(verb, help=listing.about)(list_)


def _hints(
    connection: Connection, listing: Listing[R], scope: OrgScope, page: Page, found: FoundRows[R]
) -> list[str]:
    """For a search that found few rows: the words and names that are unknown, and where it stopped."""
    is_listed = page.query is None and (page.definition is None or listing.name == "definitions")
    if is_listed or len(found.rows) == page.limit:
        return []
    from worker.model.search import Query
    from worker.store.lists.search import suggestions

    hints = []
    query = page.query or Query(definition=page.definition)
    for wrong in suggestions(connection, scope, query) if not found.rows else ():
        near = f"; did you mean {' or '.join(wrong.near)}?" if wrong.near else ""
        hints.append(f"{wrong.what}{near}")
    if found.next is not None and not hints:
        hints.append(f"only the newest runs were searched: --after {found.next} continues")
    return hints
