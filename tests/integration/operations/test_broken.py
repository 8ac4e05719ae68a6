"""Broken orgs: a newest run that failed, unless a retry succeeded; or a credential that is dead."""

from __future__ import annotations

import pytest
from sqlalchemy import update

from tests.conftest import on_either
from tests.fakes.closing import close_definition
from tests.fakes.rows import reading, within
from tests.fakes.site import one_definition
from worker.ids import ALL_ORGS
from worker.operations.credentials import add_credential
from worker.operations.orgs import set_org_state
from worker.operations.runs import retry, run_now
from worker.store import failing, roles, tables
from worker.store.lists import ORGS, Page
from worker.store.lists.grid import broken
from worker.store.lists.read import read

FILE = one_definition("{org}", "{name}", overlap="allow")


@pytest.fixture
def site(apply, database, rows):
    apply(FILE.format(org="org_acme", name="digest"))
    apply(FILE.format(org="org_beta", name="digest"))

    class Site:
        def run(self, state="failed", org="org_acme", name="digest"):
            run = run_now(database, org, name, actor="tester")["id"]
            self.end(run, state)
            return run

        def retry(self, run, state):
            new = retry(database, run, actor="tester", again=True)["id"]
            self.end(new, state)
            return new

        def end(self, run, state):
            if state is not None:
                rows.set_ended(run, state, None if state == "succeeded" else "error")

        def broken(self, scope=ALL_ORGS, **page):
            with database.acting(roles.ALL_ORGS).autocommit() as connection:
                return [row["code"] for row in read(connection, ORGS, scope, Page(broken=True, **page))]

        def rows(self, scope=ALL_ORGS, **page):
            return reading(database.acting(roles.ALL_ORGS), broken, scope, Page(**page))

        def prune(self):
            with database.transaction() as connection:
                failing.remove(connection, failing.check(connection).sound)
            return len(rows.failing_definitions)

    return Site()


@pytest.mark.parametrize("state", ["failed", "refused"])
def test_an_org_is_broken_from_a_failure_to_a_success(site, state):
    assert site.broken() == []
    run = site.run(state)

    assert (site.broken(), site.prune()) == (["org_acme"], 1)
    [row] = site.rows()
    assert (row["org"], row["definition"], row["run"], row["state"]) == ("org_acme", "digest", run, state)
    for other in ("cancelled", "skipped", None):
        site.run(other)
        assert site.broken() == ["org_acme"], other

    site.run("succeeded")
    assert (site.broken(), site.rows(), site.prune()) == ([], [], 0)


def test_a_retry_that_succeeded_mends_its_own_run_only(site):
    first, second = site.run(), site.run()
    site.retry(first, "succeeded")
    assert site.broken() == ["org_acme"]

    again = site.retry(second, "failed")
    assert site.broken() == ["org_acme"]
    site.retry(again, None)
    assert (site.broken(), site.prune()) == (["org_acme"], 1)
    site.retry(again, "succeeded")

    assert (site.broken(), site.prune()) == ([], 0)


def test_what_is_closed_or_removed_is_not_broken(site, database, apply):
    site.run()
    site.run(org="org_beta")
    apply(FILE.format(org="org_acme", name="export"))
    site.run(name="export")
    assert [(row["org"], row["definition"]) for row in site.rows()] == [
        ("org_acme", "export"),
        ("org_beta", "digest"),
        ("org_acme", "digest"),
    ]

    close_definition(database, "org_acme", "digest", actor="tester")
    assert site.broken() == ["org_beta", "org_acme"]
    close_definition(database, "org_acme", "export", actor="tester")
    set_org_state(database, "org_beta", "removed", actor="tester")

    # Its definitions are closed or not: a removed org is left out by its state.
    assert site.broken() == []


@on_either
def test_a_credential_is_dead_if_every_active_one_was_rejected(site, database):
    def reject(generation, error):
        with database.transaction() as connection:
            table = tables.credentials
            connection.execute(update(table).where(table.c.generation == generation).values(last_error=error))

    add_credential(database, None, "org_acme", client_id="m2m", actor="tester", reference="absent")
    assert site.broken() == []
    reject(1, "invalid_client")
    assert site.broken() == ["org_acme"]
    [row] = site.rows()
    assert (row["org"], row["definition"], row["state"], row["detail"]) == (
        *("org_acme", None, "credential_dead", "invalid_client"),
    )

    add_credential(database, None, "org_acme", client_id="m2m", actor="tester", reference="absent2")
    assert site.broken() == []
    reject(2, "invalid_client")
    assert site.broken() == ["org_acme"]
    reject(1, None)
    assert (site.broken(), site.rows()) == ([], [])


@on_either
def test_pages_and_scopes_are_those_of_the_list(site):
    site.run()
    site.run(org="org_beta")

    assert site.broken() == ["org_beta", "org_acme"]
    assert site.broken("org_acme") == ["org_acme"]
    assert [row["org"] for row in site.rows("org_acme")] == ["org_acme"]
    [first] = site.rows(limit=1)
    [second] = site.rows(limit=1, after=first["id"])
    assert (first["org"], second["org"]) == ("org_beta", "org_acme")
    assert site.broken(limit=1) == ["org_beta"]


@on_either
def test_a_failure_while_it_is_checked_is_kept(site, database, rows):
    site.run()
    site.run("succeeded")
    checked = reading(database, failing.check)
    site.run()
    within(database, failing.remove, checked.sound)

    assert (len(checked.sound), site.broken()) == (1, ["org_acme"])
