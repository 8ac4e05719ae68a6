"""Sums of what runs spend, on both databases: at most `MAX_SUM`, however much a host says that it was.

A sum that no column holds would fail its transaction, and with it those of other orgs in the same batch.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from worker.model.definitions.budgets import MAX_SUM

# A number is summed up in two parts on SQLite, each of which fits for billions of rows.
PART = 10**9


class Capped(FunctionElement[int]):
    """A number, or `MAX_SUM` if it is larger."""

    type = BigInteger()
    inherit_cache = True


class CappedSum(FunctionElement[int]):
    """The sum of a column of numbers from 0, 0 without rows; exact."""

    type = BigInteger()
    inherit_cache = True


@compiles(Capped)
def _capped(element: Capped, compiler: Any, **how: Any) -> str:
    least = {"postgresql": "LEAST", "sqlite": "min"}[compiler.dialect.name]
    return f"{least}({compiler.process(element.clauses, **how)}, {MAX_SUM})"


@compiles(CappedSum)
def _capped_sum(element: CappedSum, compiler: Any, **how: Any) -> str:
    column = compiler.process(element.clauses, **how)
    if compiler.dialect.name == "postgresql":  # where the sum of a bigint column is numeric
        return f"CAST(LEAST(COALESCE(sum({column}), 0), {MAX_SUM}) AS bigint)"
    # Where `sum` of integers raises an error, the sums of their upper and lower digits do not.
    high, low = (f"COALESCE(sum({column} {sign} {PART}), 0)" for sign in ("/", "%"))
    total = f"min({high} * {PART} + {low}, {MAX_SUM})"
    return f"CASE WHEN {high} >= {MAX_SUM // PART} THEN {MAX_SUM} ELSE {total} END"
