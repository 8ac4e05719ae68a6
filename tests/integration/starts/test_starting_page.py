"""docs/starting-runs.md, and what docs/recipes/fastapi.md and docs/recipes/django.md say of starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any
from uuid import UUID

import httpx
import psycopg
import pytest
from fastapi import FastAPI, Header
from fastapi.testclient import TestClient
from psycopg import errors
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.orm import Session

from tests.fakes.pages import blocks
from tests.fakes.product import Product
from tests.fakes.site import one_definition
from worker.operations.product import allow
from worker.store import start_functions

DOCS = Path(__file__).parents[3] / "docs"
PAGE, FASTAPI, DJANGO = (
    DOCS / name for name in ("starting-runs.md", "recipes/fastapi.md", "recipes/django.md")
)
# As both recipes have it.
TABLE = "CREATE TABLE shop_orders (number text PRIMARY KEY, total int, org text, run uuid)"
# A project of Django with the view of the page, in a process of its own: its settings are the process's.
PROJECT = """
import sys
from urllib.parse import urlsplit
from django.conf import settings
url = urlsplit(sys.argv[1])
settings.configure(DATABASES={"default": {
    "ENGINE": "django.db.backends.postgresql", "NAME": url.path[1:], "USER": url.username,
    "HOST": url.hostname, "PORT": url.port,
}})
CODE
first = order("org_acme", "o-30")
try:
    with transaction.atomic():
        order("org_acme", "o-31")
        raise LookupError
except LookupError:
    pass
print(first)
"""


@pytest.fixture
def shop(product: Product, define) -> Product:
    """The page's orgs and definition, and the product's table, before the page's first statement."""
    for org in ("org_acme", "org_globex"):
        define(one_definition(org, "invoice", "acme.plain", overlap="allow"))
    define(one_definition("org_acme", "export", "acme.plain", overlap="allow"))
    login = product.new_login(roles="pg_monitor")
    product.change(f"{TABLE}; GRANT ALL ON shop_orders TO {login}")
    product.login = login
    return product


def code(language: str, page: Path = PAGE) -> list[str]:
    return [
        block.text
        for block in blocks(page.read_text())
        if block.language == language and "test_starting_page" in block.argument
    ]


def test_starting_page(shop: Product) -> None:
    grant, one, many = code("sql")
    shop.change(grant.replace("TO shop", f"TO {shop.login}"))
    with psycopg.connect(shop.url_of(), autocommit=True) as connection:
        with pytest.raises(errors.UndefinedObject):
            connection.execute(one.encode())
        connection.execute("ROLLBACK")
        allow(shop.database, shop.login, ["org_acme", "org_globex"], actor="tester")
        connection.execute(one.encode())
        connection.execute(many.encode())
    [python] = code("python")
    space = {"Session": Session, "UUID": UUID, "json": json, "text": text}
    exec(python, space)
    engine = create_engine(shop.url_of().replace("postgresql:", "postgresql+psycopg:"), poolclass=NullPool)
    for commits, number in ((True, "o-19"), (False, "o-20")):
        with Session(engine) as session:
            id_ = space["place"](session, "org_acme", number)  # type: ignore[operator]
            assert isinstance(id_, UUID)
            session.commit() if commits else session.rollback()
    engine.dispose()

    assert shop.make() == 4

    runs = shop.query("SELECT s.key, r.params FROM runs r JOIN starts s ON s.id = r.id ORDER BY s.key")
    assert [tuple(row.values()) for row in runs] == [
        (f"invoice of o-{number}", {"order": f"o-{number}"}) for number in (17, 18, 19, 21)
    ]
    orders = shop.query("SELECT number FROM shop_orders ORDER BY number")
    assert [row["number"] for row in orders] == ["o-17", "o-19"]
    later = shop.query("SELECT key FROM starts WHERE state = 'later'")
    assert [row["key"] for row in later] == ["invoices of May"]


def test_the_recipe_of_fastapi(shop: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed(shop)
    monkeypatch.setenv("CRM_DATABASE", shop.url_of().replace("postgresql:", "postgresql+psycopg:"))
    app, answers = FastAPI(), [httpx.Response(404), httpx.Response(200, json={"state": "succeeded"})]

    async def ask(method: str, path: str) -> httpx.Response:
        return answers.pop(0)

    modules: dict[str, dict[str, Any]] = {
        "crm": {"app": app, "Org": Annotated[str, Header(alias="X-Org")]},
        "database": {},
        "sync": {"TEXTS": {"waiting": "soon"}, "ask": ask, "shown": dict},
    }
    for name, has in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**has))
    database, orders = code("python", FASTAPI)
    assert TABLE in FASTAPI.read_text() and TABLE in DJANGO.read_text()
    exec(database, vars(sys.modules["database"]))
    exec(orders, {})

    client, mine, others = TestClient(app), {"X-Org": "org_acme"}, {"X-Org": "org_globex"}
    key = mine | {"Idempotency-Key": "5f0c7a52-6f0e-4c3c-9d3f-1f2f6a3b7c11"}
    first, second = (client.post("/orders", headers=key) for _ in range(2))
    path = f"/orders/{first.json()['run']}"
    unmade = client.get(path, headers=mine)
    assert shop.make() == 1
    made, theirs = (client.get(path, headers=headers) for headers in (mine, others))
    sys.modules["database"].engine.dispose()

    assert first.status_code == second.status_code == 202
    assert first.json() == second.json() == unmade.json()
    assert (made.json(), theirs.status_code) == ({"state": "succeeded"}, 404)
    assert len(shop.query("SELECT number FROM shop_orders")) == 1


def test_the_recipe_of_django(shop: Product, tmp_path: Path) -> None:
    allowed(shop)
    [python] = code("python", DJANGO)
    script = tmp_path / "project.py"
    script.write_text(PROJECT.replace("CODE", python))

    done = subprocess.run(
        [sys.executable, str(script), shop.url_of()], check=False, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert shop.make() == 1
    assert [str(row["id"]) for row in shop.query("SELECT id FROM runs")] == [done.stdout.strip()]


def allowed(shop: Product) -> None:
    shop.change(f"GRANT {start_functions.PRODUCT} TO {shop.login}")
    allow(shop.database, shop.login, ["org_acme"], actor="tester")
