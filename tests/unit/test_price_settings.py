"""`[prices]`: own prices are read exactly, and a wrong one is refused by name."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from fractions import Fraction
from pathlib import Path

import pytest

from worker.errors import ConfigurationError
from worker.model.prices import ModelUsage
from worker.settings import load

NOW = datetime(2027, 1, 2, tzinfo=UTC)


def read(tmp_path: Path, text: str):
    file = tmp_path / "worker.toml"
    file.write_text(text)
    return load(str(file), environ={}).prices.prices


def test_own_prices_of_the_file(tmp_path: Path):
    prices = read(
        tmp_path,
        """
        [prices]
        currency = "EUR"
        per_usd = 0.92
        [[prices.own]]
        model = "gpt-5*"
        from = 2027-01-01
        org = "acme"
        input = 0.1
        output = "2.30"
        request = 0.000001
        [[prices.own]]
        model = "*"
        factor = 1.2
        """,
    )

    first, second = prices.own
    assert (prices.currency, prices.per_usd) == ("EUR", Fraction(23, 25))
    assert (first.start, first.org) == (date(2027, 1, 1), "acme")
    assert dict(first.rates) == {
        "input": Fraction(1, 10), "output": Fraction(23, 10), "request": Fraction(1, 10**6),
    }  # fmt: skip
    assert (second.factor, dict(second.rates)) == (Fraction(6, 5), {})
    usage = ModelUsage(None, "gpt-5-mini", (("input", 10), ("request", 1)))
    assert prices.price(usage, at=NOW, org="acme").money == 1000 + 1000
    assert prices.price(usage, at=NOW).money is None


def test_the_default_is_usd_without_own_prices(tmp_path: Path):
    prices = read(tmp_path, "")

    assert (prices.currency, prices.per_usd, list(prices.own)) == ("USD", Fraction(1), [])


def test_own_prices_of_a_variable():
    own = json.dumps([{"model": "m", "input": 1, "from": "2027-01-01"}])

    prices = load(environ={"WORKER_PRICES__OWN": own}).prices.prices

    assert prices.own[0].start == date(2027, 1, 1)


OF_MODEL = '[[prices.own]]\nmodel = "m"\n'


@pytest.mark.parametrize("text, named", [
    ('currency = "usd"', "currency"), ('currency = "EUR"\nper_usd = -1', "per_usd"),
    (OF_MODEL, "give a price"), ("[[prices.own]]\ninput = 1", "model"),
    (OF_MODEL + "input = -1", "not a price"), (OF_MODEL + "input = nan", "price"),
    (OF_MODEL + 'input = "1e9"', "not a price"), (OF_MODEL + "inptu = 1", "inptu"),
    (OF_MODEL + "input = true", "a number"),
    (OF_MODEL + 'input = 1\nfrom = "soon"', "from: 'soon' is not a day"),
    ('[[prices.own]]\nmodel = "m 1"\ninput = 1', "model: 'm 1' is not the name of a model"),
])  # fmt: skip
def test_a_wrong_price_is_refused_by_name(tmp_path: Path, text: str, named: str):
    with pytest.raises(ConfigurationError, match=named):
        read(tmp_path, f"[prices]\n{text}")
