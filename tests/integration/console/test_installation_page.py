"""The morning page of a copy of another installation's database."""

from __future__ import annotations

import pytest

from tests.fakes.rows import within
from tests.integration.console.conftest import TOKENS, Site
from worker.store import installation

pytestmark = pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)


@pytest.mark.parametrize(("word", "shown"), [("staging", True), ("production", False), ("", False)])
async def test_the_morning_page_says_that_the_installations_differ(
    staffed: Site, word: str, shown: bool
) -> None:
    """The control: with the same word, or none in worker.toml, there is nothing to say."""
    within(staffed.database, installation.store_word, "production")
    staffed.installation = word

    page = await staffed.get("/", TOKENS["viewer"])

    assert page.status_code == 200
    title = "The database belongs to the installation production, and worker.toml to staging"
    assert (title in page.text) == ("installation adopt --new" in page.text) == shown


async def test_the_api_has_the_same_list(staffed: Site) -> None:
    """For operators; an org gets 403, as `test_matrix` has it."""
    within(staffed.database, installation.store_word, "production")
    staffed.installation = "staging"

    answer = await staffed.get("/api/v1/status", TOKENS["viewer"])

    found = answer.json()
    assert (answer.status_code, found["running"], found["ended"]) == (200, 0, {})
    first = found["matters"][0]
    assert (first["kind"], first["whose"], first["level"]) == ("installation_differs", "operator", "bad")
    assert (first["verb"], first["next"]) == ("correct_installation", "installation show")
    assert found["matters"][1]["kind"] == "no_worker"
