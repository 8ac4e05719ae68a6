"""`relay` and `outbox`: what people see of a product's outbox, and what `[relay]` may be."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import forked
from tests.fakes.cli import CommandLine, Completed
from tests.fakes.ports import free_port
from worker.client import ConfigurationError as ClientConfigurationError
from worker.client import Outbox
from worker.features.outbox.relaying import _token_for_client
from worker.settings.sections import RelaySettings

pytestmark = pytest.mark.feature("outbox")
PASSWORD = "s3cret-of-the-product"


class Relayed:
    """A command line with `[relay]`, and the product's outbox on SQLite."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cli = CommandLine(folder, f"sqlite:///{folder / 'worker.db'}")
        self.token = folder / "relay.token"
        self.token.write_text("orgworker_op_canary-4711\n")
        self.token.chmod(0o600)
        self.connection = sqlite3.connect(folder / "product.db")
        self.outbox = Outbox("sqlite")
        for line in json.loads(self.cli("outbox", "ddl", "sqlite", "-o", "json").out):
            self.connection.execute(line["sql"])
        self.configure()

    def configure(self, **changes: str) -> None:
        values = {
            "api": f"http://127.0.0.1:{free_port()}",
            "token_file": str(self.token),
            "outbox_url": f"sqlite:///{self.folder / 'product.db'}",
        }
        lines = [f'{name} = "{value}"' for name, value in (values | changes).items()]
        self.cli.settings.write_text("\n".join(["[relay]", *lines, ""]))

    def relay(self) -> Completed:
        """In a process of its own, since it takes signals."""
        command = [sys.executable, "-m", "worker", "--config", str(self.cli.settings), "relay", "--once"]
        return forked.run(command, cwd=self.folder, env=os.environ)

    def insert(self, key: str, error: str | None = None) -> None:
        self.outbox.start(self.connection, "org_a", "export", key=key)
        if error:
            update = "UPDATE orgworker_outbox SET state = 'refused', error = ? WHERE start_key = ?"
            self.connection.execute(update, (error, key))
        self.connection.commit()

    def rows(self, *arguments: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.cli("outbox", "list", *arguments, "-o", "json").json()
        return found


@pytest.fixture
def relayed(tmp_path: Path) -> Any:
    made = Relayed(tmp_path)
    yield made
    made.connection.close()


def test_what_was_refused_is_listed_and_waits_again(relayed: Relayed):
    """No database of orgworker is there."""
    relayed.insert("k1")
    relayed.insert("k2", error="not_found: there is no definition export")

    [row] = relayed.rows()
    assert (row["key"], row["state"], row["error"]) == (
        "k2", "refused", "not_found: there is no definition export",
    )  # fmt: skip
    assert row["created_at"].endswith("Z")
    assert [one["key"] for one in relayed.rows("--state", "waiting")] == ["k1"]
    assert "k2" in relayed.cli("outbox", "list").out

    relayed.cli("outbox", "retry", str(row["id"]))
    assert [one["key"] for one in relayed.rows("--state", "waiting")] == ["k2", "k1"]
    again = relayed.cli("outbox", "retry", str(row["id"]), check=False)
    assert (again.code, "`outbox list`" in again.err) == (3, True)
    assert not (relayed.folder / "worker.db").exists()


@pytest.mark.parametrize("dialect", ["postgresql", "mysql", "sqlite"])
def test_the_ddl_is_printed_as_it_is_used(relayed: Relayed, dialect: Any):
    printed = relayed.cli("outbox", "ddl", dialect, "--table", "shop.outbox").out

    assert printed == "".join(f"{one};\n" for one in Outbox(dialect, table="shop.outbox").ddl)


def test_an_api_that_is_away_exits_75_and_keeps_the_rows(relayed: Relayed):
    relayed.insert("k1")

    done = relayed.relay()

    assert (done.code, "relay.waiting" in done.err, "canary" in done.err + done.out) == (75, True, False)
    assert [one["key"] for one in relayed.rows("--state", "waiting")] == ["k1"]


def test_an_empty_outbox_is_done(relayed: Relayed):
    assert relayed.relay().code == 0


def test_an_outbox_without_its_table_exits_69(relayed: Relayed):
    relayed.connection.execute("DROP TABLE orgworker_outbox")

    done = relayed.relay()

    assert (done.code, "outbox ddl" in done.err) == (69, True)
    listed = relayed.cli("outbox", "list", check=False)
    assert (listed.code, "outbox ddl" in listed.err) == (69, True)


def test_a_token_that_goes_away_while_it_relays_is_an_error_of_the_client(relayed: Relayed):
    """So the relay waits for it, and does not take it for one of the database."""
    read = partial(_token_for_client, RelaySettings(token_file=str(relayed.token)))
    assert read() == "orgworker_op_canary-4711"
    relayed.token.chmod(0o644)
    with pytest.raises(ClientConfigurationError, match="others may read"):
        read()
    relayed.token.unlink()
    with pytest.raises(ClientConfigurationError, match="No such file"):
        read()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"api": ""}, "relay.api is not set"),
        ({"api": "http://jobs.acme.com"}, "would send the token in clear"),
        ({"token_file": ""}, "relay.token_file is not set"),
        ({"token_file": "/nowhere/token"}, "relay.token_file: /nowhere/token cannot be read"),
        ({"outbox_url": ""}, "relay.outbox_url is not set"),
        ({"outbox_url": "not a URL"}, "relay.outbox_url is not the URL of a database"),
        ({"outbox_url": f"oracle://shop:{PASSWORD}@db/shop"}, "there is no outbox for oracle"),
        ({"outbox_url": f"mysql+absent://shop:{PASSWORD}@db/shop"}, "is not the URL of a database"),
        ({"outbox_url": f"mysql+mysqldb://shop:{PASSWORD}@db/shop"}, "the driver MySQLdb is not installed"),
        ({"table": "a; b"}, "relay.table: 'a; b' is not the name of a table"),
        ({"ca_file": "/nowhere/ca.pem"}, "relay: ca_file /nowhere/ca.pem cannot be used"),
    ],
)
def test_what_cannot_be_used_exits_78_and_says_why(relayed: Relayed, changes: dict[str, str], said: str):
    relayed.configure(**changes)

    done = relayed.relay()

    assert (done.code, said in done.err) == (78, True), done.err
    assert PASSWORD not in done.err and "canary" not in done.err


def test_a_token_that_others_may_read_exits_78(relayed: Relayed):
    relayed.token.chmod(0o644)

    done = relayed.relay()

    assert (done.code, f"others may read {relayed.token}" in done.err) == (78, True)
