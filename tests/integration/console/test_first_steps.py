"""What the pages of a new installation say: what to do first, how to get in, and where it is written down."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Filled
from tests.fakes.clock import ManualClock
from tests.fakes.site import org_entry
from tests.integration.console.conftest import TOKENS, Site
from worker.features.console.pages import Console
from worker.features.console.pages.base import _OF_OPERATORS, _OF_ORGS
from worker.features.console.pages.docs import ELSEWHERE, PLACES, place_of
from worker.features.console.sessions import DOCS, STATIC, Forms
from worker.kit.web.clients import Addresses
from worker.model.definitions.file import parse_file
from worker.operations.apply import apply
from worker.operations.credentials import add_credential
from worker.store.database import Database

NOTHING: Any = None
DOCUMENTS = Path(__file__).parents[3] / "docs"


def fill(url: str) -> None:
    """An org that can log in, and nothing else."""
    opened = Database.open(url, clock=ManualClock())
    apply(opened, parse_file(org_entry("org_a")), actor="tester")
    add_credential(opened, None, "org_a", client_id="m2m-org_a", actor="tester", reference="absent-secret")
    opened.close()


INSTALLATIONS = {"none": Filled("nothing", lambda url: None), "one": Filled("one-org", fill)}
on_both = pytest.mark.parametrize(
    "database", [(kind, "one") for kind in ("sqlite", "postgresql")], indirect=True, ids=str
)


@pytest.fixture
def database(request: pytest.FixtureRequest, clock: ManualClock) -> Iterator[Database]:
    """Without any org, or with one, by what the test asks for."""
    kind, orgs = getattr(request, "param", ("sqlite", "none"))
    with INSTALLATIONS[orgs].url(kind, request) as url:
        opened = Database.open(url, clock=clock)
        yield opened
        opened.close()


async def read(site: Site, path: str, token: str) -> str:
    page = await site.get(path, token)
    assert page.status_code == 200, path
    return unescape(page.text)


# Of each page without rows: its title, and the command that comes first.
FIRST = {
    "/": ("No orgs yet", "orgworker orgs sync"),
    "/orgs": ("No orgs yet", "orgworker orgs import"),
    "/definitions": ("No definitions yet", "orgworker apply"),
    "/search": ("No runs yet", "orgworker definitions run ORG NAME"),
    "/templates": ("No templates yet", "orgworker apply"),
    "/handlers": ("No handlers yet", "orgworker new-job NAME"),
    "/credentials?risk=all": ("No credentials yet", "orgworker credentials add ORG"),
    "/workers": ("No worker has started yet", "orgworker run"),
}


async def test_a_new_installation_says_what_to_do_first(staffed: Site):
    for path, (title, command) in FIRST.items():
        page = await read(staffed, path, TOKENS["admin"])

        assert f"<h2>{title}</h2>" in page
        assert f"<code>{command}</code>" in page
        assert "show all" not in page


async def test_what_filters_have_left_out_is_not_what_is_missing(staffed: Site):
    for path, title in (
        ("/orgs?state=paused", "No org fits"),
        ("/definitions?state=paused", "No definition fits"),
        ("/templates?state=closed", "No template fits"),
        ("/audit?org=", "No change fits"),
    ):
        page = await read(staffed, path, TOKENS["admin"])

        assert f"<h2>{title}</h2>" in page
        assert f'<a href="{path.partition("?")[0]}">show all</a>' in page
        assert "orgworker orgs import" not in page
    assert "<h2>No run fits</h2>" in await read(staffed, "/search?q=state:failed", TOKENS["admin"])
    assert "<h2>No org is broken</h2>" in await read(staffed, "/orgs?broken=true", TOKENS["admin"])
    assert "<h2>No org is late</h2>" in await read(staffed, "/orgs?late=true", TOKENS["admin"])


@on_both
async def test_an_org_reads_no_commands(staffed: Site):
    """Its people have no command line. The control: operators read one."""
    token = staffed.token("org_a")
    for path in ("/orgs/org_a", "/definitions", "/search", "/templates", "/handlers", "/usage"):
        page = await read(staffed, path, token)

        assert "<h2>No" in page
        assert "orgworker " not in page.partition("<main")[2]
    assert "You have no definitions yet." in await read(staffed, "/orgs/org_a", token)
    assert "orgworker apply" in await read(staffed, "/orgs/org_a", TOKENS["viewer"])
    # With an org, the morning page has no first step.
    assert "No orgs yet" not in await read(staffed, "/", TOKENS["viewer"])


def test_each_page_has_a_place_in_the_documentation():
    console = Console(NOTHING, NOTHING, NOTHING, NOTHING, Forms("", Addresses(())))
    paths = {route.path for route in console.routes() if not route.path.startswith((STATIC, DOCS))}

    lost = {path for path in paths if place_of(re.sub(r"{\w+}", "x", path)) == ELSEWHERE}
    # Forms that lead back to their page.
    assert lost == {"/zone", "/logout"}
    for place in (*PLACES.values(), ELSEWHERE):
        text = (DOCUMENTS / place.page).read_text()
        assert f"\n## {place.heading}\n" in text or not place.heading, place


def test_each_entry_of_the_menu_is_the_place_of_its_page():
    for address, *_ in (*_OF_OPERATORS, *_OF_ORGS):
        assert place_of(address).menu == address


async def test_pages_lead_to_what_is_written_about_them(staffed: Site):
    for path, name, first in (
        ("/", "console.md#:~:text=%23%23%20What%20needs%20attention", "# The console"),
        ("/search", "operating/support.md#:~:text=%23%23%20Search", ""),
        ("/usage", "reference/budgets.md", "# Budgets"),
        ("/no-such-page", "console.md", "# The console"),
    ):
        page = await staffed.get(path, TOKENS["viewer"])
        assert f'<a class="docs" href="/docs/{name}">' in page.text
        text = await staffed.get(f"/docs/{name.partition('#')[0]}")
        assert (text.status_code, text.headers["content-type"]) == (200, "text/plain; charset=utf-8")
        assert text.headers["x-content-type-options"] == "nosniff"
        assert text.text.startswith(first)
    for other in ("index.md", "../pyproject.toml", "%2e%2e/README.md", "console.md/"):
        assert (await staffed.get(f"/docs/{other}")).status_code in (401, 404)


async def test_the_login_page_says_how_to_get_in(staffed: Site):
    page = (await staffed.get("/runs/x")).text

    assert "<code>orgworker login</code> prints a link" in page
    assert "<code>orgworker operators add NAME</code> makes a token" in page
    assert "No identity provider is set up" in page
    assert '<a class="docs" href="/docs/operating/login.md">' in page
