"""Logging in and out, as a person does it."""

from __future__ import annotations

from datetime import UTC, datetime

from tests.fakes import browser as browsers
from worker.clock import SystemClock
from worker.features.console.operators import make_link
from worker.store.database import Database


def test_an_operator_logs_in_with_a_token_and_out_again(browser, console):
    with browsers.tab(browser, console.base) as tab:
        tab.log_in(console.token)
        tab.page.get_by_text("operator:you").first.wait_for()

        tab.page.get_by_role("button", name="Log out").click()

        tab.page.get_by_label("Token").wait_for()
        tab.go("/orgs/org_acme")
        assert tab.page.get_by_text("nightly-digest").count() == 0
        assert tab.wrongs == []


def test_a_wrong_token_is_refused_with_a_reason(browser, console):
    with browsers.tab(browser, console.base) as tab:
        tab.log_in("wrong")

        tab.page.get_by_text("the token is invalid").first.wait_for()
        assert tab.wrongs == []


def test_a_person_logs_in_at_the_provider_and_out_there_too(browser, console):
    """The form that logs out leads to another origin, which the pages' policy has to allow."""
    with browsers.tab(browser, console.base) as tab:
        tab.go("/orgs/org_acme")
        tab.page.get_by_role("link", name="Log in with Kinde").click()
        tab.page.get_by_role("button", name="Acme, manager").click()

        tab.page.get_by_text("person:kp_acme_manager@org_acme").first.wait_for()
        assert tab.page.url == f"{console.base}/orgs/org_acme"
        tab.page.get_by_role("button", name="Log out", exact=True).click()

        tab.page.get_by_role("link", name="Log in with Kinde").wait_for()
        assert tab.page.url == f"{console.base}/login"
        tab.go("/orgs/org_acme")
        assert tab.page.get_by_text("nightly-digest").count() == 0
        assert tab.wrongs == []


def test_a_link_logs_in_once(browser, console):
    database = Database.open(console.url, clock=SystemClock())
    link = make_link(database, "tester", at=datetime.now(UTC))
    database.close()
    for works in (True, False):
        with browsers.tab(browser, console.base) as tab:
            tab.go(link)
            tab.page.get_by_role("button", name="Log in", exact=True).click()

            if works:
                tab.page.get_by_role("button", name="Log out", exact=True).wait_for()
            else:
                tab.page.get_by_text("the link was used already").first.wait_for()
            assert tab.wrongs == []
