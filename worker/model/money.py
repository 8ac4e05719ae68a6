"""Money: whole nano-units of the installation's one currency, read from text and shown as text. Pure."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

# Nano-units in one unit of the currency.
NANO = 10**9
# The most that one amount may be: 100 million units, with room for sums in a column of 64 bits.
MAX_MONEY = 10**17
DEFAULT_CURRENCY = "USD"

_MONEY = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ([A-Z]{3})")
_CURRENCY = re.compile(r"[A-Z]{3}")


def parse_currency(value: Any) -> str:
    """A currency by its three letters (ISO 4217); raises ValueError."""
    if not isinstance(value, str) or not _CURRENCY.fullmatch(value):
        raise ValueError(f'{str(value)[:60]!r} is not a currency; write its three letters, such as "USD"')
    return value


def parse_money(value: Any) -> tuple[int, str]:
    """Nano-units and currency of a text such as `20 USD` or `0.50 USD`; raises ValueError."""
    found = _MONEY.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f'{str(value)[:60]!r} is not an amount of money; write "20 USD" or "0.50 USD"')
    nano = nano_of(found[1])
    if nano > MAX_MONEY:
        raise ValueError(f"{value} is more than {MAX_MONEY // NANO:,}, the largest amount of money")
    return nano, found[2]


def nano_of(value: str | int | Decimal) -> int:
    """Nano-units of a number of units with at most nine decimals."""
    return int(Decimal(value).scaleb(9))


def money_text(nano: int, currency: str = "") -> str:
    """Nano-units for people: at least two decimals, and as many as are not zero."""
    units, rest = divmod(abs(nano), NANO)
    decimals = f"{rest:09d}".rstrip("0").ljust(2, "0")
    text = f"{'-' if nano < 0 else ''}{units:,}.{decimals}"
    return f"{text} {currency}" if currency else text
