"""`prices`: what models cost: list, show, update. Own prices are in `[prices]` of worker.toml."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.errors import UsageError
from worker.kit.options import OrgOption, argument, option, read_text
from worker.kit.session import Invocation, verb
from worker.model.definitions.units import parse_time
from worker.store.lists import DEFAULT_LIMIT, MAX_LIMIT

app = typer.Typer(help="What models cost: list, show, update. Own prices are in [prices] of worker.toml.")

COLUMNS = ("provider", "model", "input", "cache_read", "output", "since", "source")
COLUMNS_OF_MODEL = ("kind", "price", "per", "currency", "since", "source")

ProviderOption = Annotated[str | None, option("--provider NAME", "The provider, such as openai.")]


@verb(app, "list")
def list_(
    session: Invocation,
    provider: ProviderOption = None,
    limit: Annotated[int, option("--limit N", f"How many models, at most {MAX_LIMIT}.")] = DEFAULT_LIMIT,
    after: Annotated[str | None, option("--after MODEL", "Continue after this PROVIDER/MODEL.")] = None,
) -> None:
    """List the models of the price list with their prices now, for a million tokens, and own prices."""
    from worker.operations.prices import listed_models

    if not 1 <= limit <= MAX_LIMIT:
        raise UsageError(f"limit {limit} is not between 1 and {MAX_LIMIT}", fix="use --after for more")
    with session.connection() as connection:
        prices = session.settings.prices.prices
        rows = listed_models(
            connection, prices, at=session.clock.now(), provider=provider, limit=limit, after=after
        )
    session.print_rows(rows, COLUMNS, limit=limit)


@verb(app, "show")
def show(
    session: Invocation,
    model: Annotated[str, argument("MODEL", "The model, such as gpt-5-mini.")],
    provider: ProviderOption = None,
    org: OrgOption = None,
    batch: Annotated[bool, option("--batch", "The prices of requests in batches.")] = False,
    at: Annotated[str | None, option("--at WHEN", "The prices at another time (default: now).")] = None,
) -> None:
    """Show what each kind of a model's use costs, for an org with --org, and where the price is from."""
    from worker.operations.prices import prices_of

    when = session.clock.now() if at is None else parse_time(at, session.clock, name="--at")
    with session.connection() as connection:
        rows = prices_of(
            *(connection, session.settings.prices.prices, model),
            provider=provider,
            org=org,
            tariff="batch" if batch else "standard",
            at=when,
        )
    session.print_rows(rows, COLUMNS_OF_MODEL, key="kind")


@verb(app, "update")
def update(
    session: Invocation,
    file: Annotated[str, argument("FILE|-", "data.json or data_slim.json of genai-prices, or - for stdin.")],
) -> None:
    """Read a newer price list for all workers; it counts from the next spend on, within 2 s.

    What is stored keeps its price. The file also counts before the list of a later release of genai-prices.
    """
    from worker.operations.prices import update_list

    with session.database() as database:
        row = update_list(database, read_text(file).encode(), actor=session.actor)
    session.print_row(row, key="digest")
