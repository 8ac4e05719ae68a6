"""A hot statement that exists in one dialect only does not pass."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from worker.store import sql
from worker.store.sql import postgresql, sqlite
from worker.store.sql.contract import Statements

DIALECTS = {"postgresql": postgresql, "sqlite": sqlite}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_dialect_offers_exactly_the_statements(dialect: str) -> None:
    promised = {name for name in vars(Statements) if not name.startswith("_")}

    assert {name for name, value in vars(DIALECTS[dialect]).items() if inspect.isfunction(value)} == promised


@pytest.mark.parametrize("name", sorted(name for name in vars(Statements) if not name.startswith("_")))
def test_a_statement_is_called_alike_on_both(name: str) -> None:
    one, two = (inspect.signature(getattr(module, name)) for module in DIALECTS.values())
    promise = inspect.signature(getattr(Statements, name))

    assert one == two
    assert list(one.parameters.values()) == list(promise.parameters.values())[1:]
    assert one.return_annotation == promise.return_annotation


# What the verbs of one dialect are made of.
NOUNS = {"__init__", "arrays", "values"}


def test_each_verb_has_a_file_in_both_dialects() -> None:
    folder = Path(sql.__file__).parent
    verbs = {dialect: {path.stem for path in (folder / dialect).glob("*.py")} - NOUNS for dialect in DIALECTS}

    assert verbs["sqlite"] == verbs["postgresql"]
    assert {"fire", "admit", "finish", "leases"} <= verbs["sqlite"]


# As a module: the package exports its functions only.
ADMIT = import_module("worker.store.sql.postgresql.admit")
PARAMETER = r"(?<!SELECT )%\(\w+\)s"


def test_no_parameter_changes_the_plan_of_the_crowd() -> None:
    assert not re.findall(PARAMETER, ADMIT.CROWD)
    assert re.findall(PARAMETER, ADMIT.CHOOSE)


def test_a_worker_that_places_runs_takes_no_more_than_the_slots_of_hosts() -> None:
    limited = re.findall(
        r"LIMIT GREATEST\(0, LEAST\(%\((\w+)\)s, .*?capacity->>'(\w+)'", ADMIT.PLACE, re.DOTALL
    )

    assert limited == [("child", "children"), ("inline", "inline")]


def test_sqlite_alone_needs_no_psycopg(tmp_path: Path) -> None:
    """The driver of PostgreSQL is an optional extra."""
    url = f"sqlite:///{tmp_path / 'worker.db'}"
    program = (
        "import sys; from worker.clock import SystemClock; from worker.store import schema;"
        "from worker.store.database import Database; from worker.store.worker_store import WorkerStore;"
        f"schema.upgrade({url!r}); Database.open({url!r}, clock=SystemClock()).close();"
        "print('psycopg' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "False"
