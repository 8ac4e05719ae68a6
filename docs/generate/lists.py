"""The lists of the API: their parameters, and their columns."""

from __future__ import annotations

from docs.generate.tables import code, codes, table
from worker.store.lists import LISTS
from worker.store.lists.rows import columns_of
from worker.store.redaction import rules_of


def parameters() -> str:
    """Return a table of the lists with their parameters."""
    rows = []
    for listing in LISTS:
        states = f"states {codes(listing.states)}" if listing.states else ""
        named = ", ".join(listing.parameters)
        rows.append((code(f"GET /{listing.name}"), "; ".join(filter(None, (named, states, listing.note)))))
    return table(("request", "parameters"), rows)


def columns() -> str:
    """Return a table of the columns of each list, without those that an org never sees."""
    rows = []
    for listing in LISTS:
        names = columns_of(listing.row)
        seen = rules_of(listing.row)
        rows.append((code(listing.name), codes(names), codes(name for name in names if name not in seen)))
    return table(("list", "keys, in this order", "only for operators"), rows)
