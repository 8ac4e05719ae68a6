"""The page of the FastAPI recipe in a browser: its script sends the key, and shows how the run goes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.fakes import recipes
from worker.demo.serving import ServerThread, bind_loopback

RUN = "01a2110e-bab7-768d-b763-6fff063ae9bd"


class Orgworker:
    """Answers as the API does: a key makes one run, which succeeds when it is looked at the second time."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.looks = 0
        self.is_down = False

    def respond(self, request: httpx.Request) -> httpx.Response:
        if self.is_down:
            return httpx.Response(503)
        row: dict[str, Any] = {
            "id": RUN,
            "org": "org_acme",
            "state": "waiting",
            "reason": "due",
            "result": None,
        }
        if request.method == "POST":
            self.keys.append(request.headers["idempotency-key"])
            return httpx.Response(201, json=row)
        self.looks += 1
        if self.looks > 1:
            row |= {"state": "succeeded", "result": {"body": {"contacts": 3}}}
        return httpx.Response(200, json=row)


@pytest.fixture
def orgworker() -> Orgworker:
    return Orgworker()


@pytest.fixture
def page(browser: Browser, orgworker: Orgworker, tmp_path: Path) -> Iterator[Page]:
    """The product's page, as Ada sees it."""
    with recipes.product("fastapi", tmp_path) as modules:
        sync = modules["sync"]
        base = {"base_url": sync.jobs.base_url, "headers": sync.jobs.headers}
        sync.jobs = httpx.AsyncClient(transport=httpx.MockTransport(orgworker.respond), **base)
        with ServerThread(modules["crm"].app, bind_loopback()) as server:
            context = browser.new_context()
            context.add_cookies([{"name": "session", "value": "session-of-ada", "url": server.url}])
            opened = context.new_page()
            opened.goto(server.url)
            yield opened
            context.close()


def test_a_double_click_is_one_sync_whose_end_is_shown(page: Page, orgworker: Orgworker):
    page.get_by_role("button", name="Sync now").dblclick()

    expect(page.locator("output")).to_have_text("Your contacts are up to date.", timeout=10_000)
    assert len(orgworker.keys) == 2
    assert len(set(orgworker.keys)) == 1


def test_a_page_that_is_opened_again_starts_another_sync(page: Page, orgworker: Orgworker):
    for _ in range(2):
        page.get_by_role("button").click()
        expect(page.locator("output")).to_have_text("Your contacts are up to date.", timeout=10_000)
        page.reload()

    assert len(set(orgworker.keys)) == 2


def test_trouble_is_a_sentence(page: Page, orgworker: Orgworker):
    orgworker.is_down = True
    page.get_by_role("button").click()

    expect(page.locator("output")).to_have_text(
        "The sync is not available now. Please try again in a minute.", timeout=10_000
    )
