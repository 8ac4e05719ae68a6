"""The reference is what the code says: `./dev docs` brings it up to date."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.generate import chart, commands, database, handlers, llms, pages, settings
from worker.handlers.blocking_context import BlockingContext
from worker.handlers.context import Context
from worker.handlers.given import BlockingCancellation, Cancellation

pytestmark = pytest.mark.feature("checkout")

GENERATED = [page for page in pages.PAGES if pages.parts_of(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", GENERATED, ids=lambda page: str(page.relative_to(pages.ROOT)))
def test_a_generated_page_is_up_to_date(page: Path):
    text = page.read_text(encoding="utf-8")

    assert pages.renewed(text) == text, "./dev docs brings it up to date"


def test_every_part_stands_on_a_page():
    assert sorted(part for page in GENERATED for part in pages.parts_of(page.read_text())) == sorted(
        pages.PARTS
    )


def test_each_noun_of_the_command_line_has_a_page_with_its_verbs():
    for noun in commands.nouns():
        page = pages.COMMANDS / f"{noun}.md"
        assert pages.parts_of(page.read_text(encoding="utf-8")) == [f"commands-{noun}"]
    index = (pages.COMMANDS.parent / "command-line.md").read_text(encoding="utf-8")
    every = re.findall(r"\]\(commands/[\w-]+\.md#([\w-]+)\)", index)

    assert len(every) == len(set(every)) > 80
    assert {"run", "orgs-add", "definitions-state-show"} <= set(every)


def test_a_new_noun_gets_a_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert pages.new_pages() == {}
    monkeypatch.setattr(pages, "COMMANDS", tmp_path)

    text = pages.new_pages()[tmp_path / "orgs.md"]

    assert "\n## orgs add\n" in pages.renewed(text)


def test_the_chart_is_that_of_the_numbers():
    assert chart.FILE.read_text(encoding="utf-8") == chart.drawn(), "./dev docs brings it up to date"
    assert len(chart.rows()) == 4


def test_another_number_is_another_chart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    page = tmp_path / "benchmarks.md"
    page.write_text(chart.PAGE.read_text(encoding="utf-8").replace("| 10.9 s |", "| 11.9 s |"))
    monkeypatch.setattr(chart, "PAGE", page)

    assert ">11.9 s<" in chart.drawn()
    assert ">10.9 s<" not in chart.drawn()


def test_llms_txt_has_a_line_for_each_page_of_the_menu():
    text = llms.FILE.read_text(encoding="utf-8")
    assert text == llms.text(), "./dev docs brings it up to date"

    title, empty, summary, *_ = text.splitlines()
    found = re.findall(r"(?m)^- \[[^]]+\]\(([^)]+)\): \S.{15,}[.?]$", text)

    assert (title, empty) == ("# orgworker", "")
    assert summary.startswith("> orgworker runs scheduled, long-running background jobs")
    assert sorted(found) == sorted(str(page.relative_to(llms.DOCS)) for page in llms.DOCS.rglob("*.md"))


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
