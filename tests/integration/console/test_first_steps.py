"""What the pages of a new installation say: what to do first, how to get in, and where it is written down."""

from __future__ import annotations

from collections.abc import Iterator
from html import unescape

import pytest

from tests.conftest import Filled
from tests.fakes.clock import ManualClock
from tests.fakes.site import org_entry
from tests.integration.console.conftest import TOKENS, Site
from worker.model.definitions.file import parse_file
from worker.operations.apply import apply
from worker.operations.credentials import add_credential
from worker.store.database import Database


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
