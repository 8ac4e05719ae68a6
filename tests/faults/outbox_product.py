"""A product that starts runs in its own transactions: `python -m tests.faults.outbox_product KIND URL UNTIL`.

Each transaction inserts an order and its start into the outbox, and is rolled back now and then. Killed and
started again, it goes on after its last order. Exit code 0 once it has tried order UNTIL.
"""

from __future__ import annotations

import random
import sqlite3
import sys
from typing import Any

import psycopg
import pymysql
from sqlalchemy.engine import make_url

from worker.client import Outbox

ORGS = 5
ROLLED_BACK = 0.3
TABLE = "CREATE TABLE orders (id INTEGER NOT NULL PRIMARY KEY, org VARCHAR(20) NOT NULL)"


def connect(kind: str, url: str) -> Any:
    """A DB-API connection to the product's database; `url` is SQLAlchemy's."""
    if kind == "sqlite":
        return sqlite3.connect(url.removeprefix("sqlite:///"), timeout=60)
    if kind == "postgresql":
        return psycopg.connect(url.replace("+psycopg", ""))
    where = make_url(url)
    return pymysql.connect(host=where.host or "", port=where.port or 0, user="root", database=where.database)


def outbox_of(kind: str) -> Outbox:
    return Outbox({"mariadb": "mysql"}.get(kind, kind))  # type: ignore[arg-type]


def execute(connection: Any, statement: str) -> list[Any]:
    cursor = connection.cursor()
    cursor.execute(statement)
    rows = list(cursor.fetchall()) if cursor.description else []
    cursor.close()
    return rows


def main(kind: str, url: str, until: int) -> None:
    connection, outbox = connect(kind, url), outbox_of(kind)
    [(last,)] = execute(connection, "SELECT COALESCE(MAX(id), 0) FROM orders")
    connection.commit()
    for number in range(last + 1, until + 1):
        org = f"org_{random.randrange(ORGS)}"
        # Whichever of the two is first.
        if number % 2:
            execute(connection, f"INSERT INTO orders VALUES ({number}, '{org}')")
        outbox.start(connection, org, "note", {"order": number}, key=f"order-{number}")
        if not number % 2:
            execute(connection, f"INSERT INTO orders VALUES ({number}, '{org}')")
        connection.rollback() if random.random() < ROLLED_BACK else connection.commit()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
