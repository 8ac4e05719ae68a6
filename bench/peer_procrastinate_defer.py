"""Defers Procrastinate's jobs within one open transaction, with the Python of a separate virtual environment.

    VENV/bin/python bench/peer_procrastinate_defer.py URL JOBS     (pip install procrastinate psycopg[binary])

Prints the median milliseconds of a job. Its own SQL function is called over the product's connection, which
is how a job joins the transaction of an application.
"""

import statistics
import sys
import time

import psycopg
from procrastinate.schema import SchemaManager

DEFER = """
SELECT unnest(procrastinate_defer_jobs_v1(ARRAY[
  ROW('default', 'noop', 0, NULL, NULL, %s, NULL)::procrastinate_job_to_defer_v1]))
"""
PARAMS = '{"order": "o-1234567", "amount": 1200, "lines": [1, 2, 3]}'


def main(url: str, jobs: int) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(SchemaManager.get_schema())
        connection.commit()
        times = []
        for _ in range(jobs):
            began = time.perf_counter()
            connection.execute(DEFER, (PARAMS,))
            times.append(time.perf_counter() - began)
        connection.rollback()
    print(f"{statistics.median(times[jobs // 10 :]) * 1000:.4f}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
