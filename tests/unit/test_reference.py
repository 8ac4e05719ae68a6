"""The reference is what the code says: `./dev docs` brings it up to date."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.generate import database, handlers, pages, settings
from worker.handlers.context import BlockingContext, Context
from worker.handlers.given import BlockingCancellation, Cancellation

GENERATED = [page for page in pages.PAGES if pages.parts_of(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", GENERATED, ids=lambda page: page.name)
def test_a_generated_page_is_up_to_date(page: Path):
    text = page.read_text(encoding="utf-8")

    assert pages.renewed(text) == text, "./dev docs brings it up to date"


def test_every_part_stands_on_a_page():
    assert sorted(part for page in GENERATED for part in pages.parts_of(page.read_text())) == sorted(
        pages.PARTS
    )


def test_a_part_that_is_out_of_date_is_made_anew():
    stale = "before\n<!-- generated: claims -->\n| old |\n<!-- end -->\nafter\n"

    fresh = pages.renewed(stale)

    assert fresh.startswith("before\n<!-- generated: claims -->\n| member | meaning |\n")
    assert fresh.endswith("|\n<!-- end -->\nafter\n")
    assert "old" not in fresh


def test_every_setting_has_its_meaning_in_the_shipped_file():
    found = list(settings.parts(settings.SHIPPED.read_text(encoding="utf-8")))

    assert [f"{part.name}.{entry.name}" for part in found for entry in part.entries if not entry.words] == []
    assert {"execution", "issuers.main", "web"} <= {part.name for part in found}


def test_every_member_of_a_context_is_documented():
    for owner in (Context, BlockingContext):
        members = handlers.members(owner)
        documented = handlers.context()

        assert members
        assert {name for name in members if f"ctx.{name}" not in documented} == set()


def test_the_blocking_forms_have_the_same_members():
    assert handlers.members(Context) == handlers.members(BlockingContext)
    assert handlers.members(Cancellation) - {"note"} == handlers.members(BlockingCancellation)


def test_every_column_has_its_meaning():
    assert list(database.unexplained()) == []
