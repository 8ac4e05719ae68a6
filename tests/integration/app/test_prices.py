"""`prices` and `usage`: as an operator types them, with the commands of prices.md."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest

from tests.conftest import copied
from tests.fakes.cli import CommandLine, as_process
from tests.fakes.pages import ROOT, blocks
from tests.fakes.stock import Stock
from tests.integration.store.test_prices import step_using, use
from tests.integration.store.test_spending import add_budget, admitted
from worker import settings
from worker.clock import SystemClock
from worker.model.definitions.budgets import MONEY
from worker.model.money import NANO
from worker.store import spending, tables
from worker.store.database import Database
from worker.store.prices import load

LISTED = [
    {
        "id": "anthropic",
        "name": "Anthropic",
        "api_pattern": "https://api\\.anthropic\\.com",
        "model_match": {"contains": "claude"},
        "models": [
            {
                "id": "claude-9",
                "match": {"equals": "claude-9"},
                "prices": {"input_mtok": 3, "output_mtok": 15},
            }
        ],
    },
    {
        "id": "openai",
        "name": "OpenAI",
        "api_pattern": "https://api\\.openai\\.com",
        "model_match": {"starts_with": "gpt"},
        "models": [
            {
                "id": "gpt-5-mini",
                "match": {"equals": "gpt-5-mini"},
                "prices": {"input_mtok": 0.3, "output_mtok": 2},
                "price_variants": [
                    {"when": {"processing": "batch"}, "prices": {"input_mtok": 0.15, "output_mtok": 1}}
                ],
            }
        ],
    },
]
OWN = """
[prices]
currency = "USD"
[[prices.own]]
model = "house-*"
input = 0.10
output = 0.40
[[prices.own]]
org = "org_1"
model = "*"
factor = 1.2
"""


@pytest.fixture
def shop(tmp_path: Path, migrated_sqlite_file: Path, plugins: Path) -> CommandLine:
    """An installation with own prices."""
    cli = CommandLine(tmp_path, copied(migrated_sqlite_file, tmp_path))
    with cli.settings.open("a") as file:
        file.write(OWN)
    return cli


@pytest.fixture
def stock(shop: CommandLine) -> Iterator[Stock]:
    found = re.search(r'url = "(sqlite[^"]*)"', shop.settings.read_text())
    assert found is not None
    database = Database.open(found[1], clock=SystemClock())
    yield Stock(database)
    database.close()


def test_a_raise_of_money_and_a_wrong_list_are_for_people(shop: CommandLine, stock: Stock):
    org_id = stock.org()
    add_budget(stock, org_id, MONEY, limit=20 * NANO, per="month")
    raised = shop("budgets", "raise", "org_1", "money", "--by", "5 USD", "--per", "month").out.split()
    wrong = shop("prices", "update", "-", stdin="[1]", check=False)

    assert (raised[raised.index("amount") + 1], raised[raised.index("limit") + 1]) == ("5.00", "25.00")
    assert wrong.code == 2 and "genai-prices: 0: Input should be a dictionary" in wrong.err
    assert "errors.pydantic.dev" not in wrong.err


def code_of(cli: CommandLine, *arguments: str) -> tuple[int, str]:
    done = cli(*arguments, check=False)
    return done.code, done.err


def test_the_commands_of_the_page(shop: CommandLine, tmp_path: Path):
    (tmp_path / "data_slim.json").write_text(json.dumps(LISTED))
    page = (ROOT / "docs" / "reference" / "prices.md").read_text(encoding="utf-8")
    [block] = [block for block in blocks(page) if block.marks.get("by") == "test_prices"]
    lines = re.findall(r"(?m)^\$ python -m worker (.*)", block.text)

    with as_process(tmp_path, {}):
        update, show, listed = (shop(*line.split(), "-o", "json").json() for line in lines)
        again = shop(*lines[0].split(), "-o", "json").json()

    assert (update["models"], again) == (2, update)
    assert [(row["kind"], row["price"], row["per"]) for row in show][::4] == [
        ("input", "0.15", "1,000,000 tokens"),
        ("output", "1.00", "1,000,000 tokens"),
    ]
    assert [(row["id"], row["input"], row["output"]) for row in listed] == [
        ("anthropic/claude-9", "3.00", "15.00")
    ]
    assert {row["source"] for row in show} == {f"file of {update['created_at'][:10]}"}
    [audited] = [
        row for row in shop("audit", "list", "-o", "json").json() if row["action"] == "prices.update"
    ]
    assert audited["detail"] == {"digest": update["digest"], "models": 2}


def test_a_price_says_where_it_is_from_and_an_error_what_to_do(shop: CommandLine, stock: Stock):
    stock.org()
    [house, *_] = shop("prices", "show", "house-7", "-o", "json").json()
    [listed, *_] = shop("prices", "show", "gpt-5-mini", "-o", "json").json()
    [customer, *_] = shop("prices", "show", "gpt-5-mini", "--org", "org_1", "-o", "json").json()

    assert (house["price"], house["source"]) == ("0.10", "worker.toml")
    assert (listed["price"], customer["price"], customer["source"]) == ("0.25", "0.30", "worker.toml")
    assert listed["source"].startswith("genai-prices ")
    for arguments, code, said in (
        (("prices", "show", "nothing-9"), 3, "[[prices.own]]"),
        (("prices", "show", "gpt-5-mini", "--org", "org_9"), 3, "org_9"),
        (("prices", "show", "two words"), 2, "printable"),
        (("prices", "list", "--provider", "nobody"), 3, "no provider nobody"),
        (("prices", "list", "--limit", "0"), 2, "limit 0"),
        (("prices", "update", str(ROOT / "README.md")), 2, "data_slim.json"),
    ):
        found, text = code_of(shop, *arguments)
        assert (found, said in text) == (code, True), (arguments, found, text)


def test_an_invoice_has_a_line_an_org_whose_sums_are_the_stored_spends(shop: CommandLine, stock: Stock):
    """As text for spreadsheets, and as JSON; the verb `list` may be left out."""
    own = settings.load(str(shop.settings), environ={}).prices.prices
    names = []
    for _ in range(2):
        org_id = stock.org()
        names.append(stock.code(org_id))
        add_budget(stock, org_id, MONEY, limit=20 * NANO, per="month")
        _, [run] = admitted(stock, org_id)
        steps = [step_using(run, 1, use(input=1001, cache_read=1), use("unheard-of", None, output=7))]
        with stock.database.transaction() as connection:
            spending.store_steps(connection, steps, load(connection, own)[0])
    stored = [row["money"] or 0 for row in stock.all(tables.model_spends)]

    text = shop("usage", "--by", "org,model,definition,month", "-o", "csv").out
    lines = list(csv.DictReader(io.StringIO(text)))
    rows = shop("usage", "list", "--by", "org,model", "-o", "json").json()
    [first, second] = shop("usage", "--by", "org", "-o", "json").json()
    people = shop("usage", "--by", "org").out

    assert sum(int(line["money"]) for line in lines) == sum(stored) == first["money"] + second["money"]
    assert {line["month"] for line in lines} == {f"{date.today():%Y-%m}"}
    assert [(line["org"], line["model"]) for line in lines] == [
        (name, model) for name in names for model in ("gpt-5-mini", "unheard-of")
    ]
    assert [row["unpriced"] for row in rows] == [0, 7, 0, 7]
    # The first org pays a fifth more than the price of the list.
    assert (first["amount"], second["amount"]) == ("0.00030033", "0.000250275")
    assert people.split()[:2] == ["org", "tokens"] and "0.000250275" in people
    code, said = code_of(shop, "usage", "--by", "week")
    assert code == 2 and "org,definition,provider,model,kind,tariff,day,month" in said
