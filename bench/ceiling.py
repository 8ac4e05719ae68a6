"""The upper bound of the raw driver: claims a hundred rows and marks them ended, in one process.

No limits, no fairness, no token, no handler, no sums: the least that a durable queue with
history can write for a run. What the worker is measured beside.
"""

from __future__ import annotations

import sqlite3
import time

import psycopg

BATCH = 100
TABLES = """
CREATE TABLE ceiling_live (id integer PRIMARY KEY, state text NOT NULL, owner text);
CREATE TABLE ceiling_runs (id integer PRIMARY KEY, state text, finished_at text);
CREATE TABLE ceiling_attempts (run_id integer PRIMARY KEY, outcome text NOT NULL);
"""


def postgresql(url: str, runs: int) -> float:
    """Runs per second on PostgreSQL."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(TABLES.encode())
        numbers = f"FROM generate_series(1, {int(runs)}) n"
        connection.execute(f"INSERT INTO ceiling_live (id, state) SELECT n, 'waiting' {numbers}".encode())
        connection.execute(f"INSERT INTO ceiling_runs (id) SELECT n {numbers}".encode())
        connection.execute("CREATE INDEX ON ceiling_live (id) WHERE state = 'waiting'")
        connection.execute("VACUUM ANALYZE")
        began = time.perf_counter()
        while True:
            claimed = connection.execute(
                "UPDATE ceiling_live SET state = 'running', owner = 'me' WHERE id = ANY(ARRAY("
                "SELECT id FROM ceiling_live WHERE state = 'waiting' ORDER BY id LIMIT %s "
                "FOR UPDATE SKIP LOCKED)) RETURNING id",
                (BATCH,),
            ).fetchall()
            if not claimed:
                return runs / (time.perf_counter() - began)
            connection.execute(
                "WITH gone AS (DELETE FROM ceiling_live WHERE id = ANY(%s) RETURNING id), "
                "kept AS (INSERT INTO ceiling_attempts SELECT id, 'succeeded' FROM gone) "
                "UPDATE ceiling_runs r SET state = 'succeeded', finished_at = now()::text "
                "FROM gone WHERE r.id = gone.id",
                ([id_ for (id_,) in claimed],),
            )


def sqlite(path: str, runs: int) -> float:
    """Runs per second on SQLite, as durable as the worker: WAL, synchronous FULL, one commit per batch."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;" + TABLES)
    connection.execute("BEGIN")
    connection.executemany(
        "INSERT INTO ceiling_live (id, state) VALUES (?, 'waiting')", ((n,) for n in range(runs))
    )
    connection.executemany("INSERT INTO ceiling_runs (id) VALUES (?)", ((n,) for n in range(runs)))
    connection.execute("CREATE INDEX ceiling_waiting ON ceiling_live (id) WHERE state = 'waiting'")
    connection.execute("COMMIT")
    began = time.perf_counter()
    while True:
        connection.execute("BEGIN IMMEDIATE")
        claimed = connection.execute(
            "SELECT id FROM ceiling_live WHERE state = 'waiting' ORDER BY id LIMIT ?", (BATCH,)
        ).fetchall()
        update = "UPDATE ceiling_live SET state = 'running', owner = 'me' WHERE id = ?"
        connection.executemany(update, claimed)
        connection.execute("COMMIT")
        if not claimed:
            connection.close()
            return runs / (time.perf_counter() - began)
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("DELETE FROM ceiling_live WHERE id = ?", claimed)
        connection.executemany(
            "UPDATE ceiling_runs SET state = 'succeeded', finished_at = datetime('now') WHERE id = ?", claimed
        )
        connection.executemany("INSERT INTO ceiling_attempts VALUES (?, 'succeeded')", claimed)
        connection.execute("COMMIT")
