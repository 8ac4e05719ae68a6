"""How pages write times and the cells of tables."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from markupsafe import Markup, escape

from tests.browser.hostile import strings
from worker.features.console.pages.rendering import templates

AT = datetime(2030, 3, 31, 22, 30, 15, tzinfo=UTC)
INSTANT = "2030-03-31T22:30:15.000000Z"
fitted, seconds_apart = templates.filters["fitted"], templates.filters["seconds_apart"]


def shown(call: str, zone: str | None) -> str:
    values = {"at": AT, "zone": zone and ZoneInfo(zone)}
    return templates.from_string(f"{{{{ {call} }}}}").render(values)


def time_of(title: str, text: str) -> str:
    return f'<time datetime="{INSTANT}" title="{title}">{text}</time>'


def test_a_time_is_in_the_viewers_zone_with_utc_as_title():
    assert shown("when(at)", "Europe/Berlin") == time_of("2030-03-31 22:30:15 UTC", "2030-04-01 00:30")
    assert shown("when(at, seconds=true)", None) == time_of("2030-03-31 22:30:15 UTC", "2030-03-31 22:30:15")


def test_beside_other_times_in_utc_it_is_the_other_way_round():
    title = "2030-04-01 00:30:15 Europe/Berlin"

    assert shown("when(at, utc=true)", "Europe/Berlin") == time_of(title, "2030-03-31 22:30 UTC")


@pytest.mark.parametrize(
    ("seconds", "apart"),
    [([0, 3], True), ([0, 59, 600], True), ([0, 60], False), ([0, 0.4], False), ([0], False), ([], False)],
)
def test_a_list_shows_seconds_if_two_of_its_rows_are_within_a_minute(seconds: list[float], apart: bool):
    times = [AT + timedelta(seconds=each) for each in seconds]

    assert seconds_apart([None, *times[::-1], *times]) is apart


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org_umbrella", "org_umbrella"),
        ("0 2 * * * and words", "0 2 * * * and words"),
        ("01a22a45-2bd0-7000", "01a22a45-2bd0-7000"),
        ("01a22a45-2bd0…c8fb", "01a22a45-2bd0…c8fb"),
        ("operator:ada.lovelace", "<span>operator:<wbr>ada.<wbr>lovelace</span>"),
        ("2030-03-31T22:30:15Z", None),
        ("組織" * 20, "組織" * 20),
    ],
)
def test_long_names_may_break_behind_marks(text: str, expected: str | None):
    made = fitted(Markup("<td>{}</td>").format(text))

    assert made == f"<td>{expected}</td>" if expected else "<wbr>" not in made


def test_only_short_links_stay_on_one_line():
    long, short = (
        Markup('<a href="/x">{}</a>').format(text) for text in ("the words <of> a name", "two words")
    )

    assert fitted(long) == '<a href="/x"><span>the words &lt;of&gt; a name</span></a>'
    assert fitted(short) == short


def test_what_has_no_marks_may_be_cut_and_has_the_whole_text_as_title():
    name = "x" * 17

    cut = f'org_<wbr><span class="cut"><span>{name}</span></span>'
    assert fitted(Markup("<th>org_{}</th>").format(name)) == f'<th><span title="org_{name}">{cut}</span></th>'
    assert fitted(fitted(f"<{name}>")) == fitted(f"<{name}>")
    kept = Markup("<td><pre>{0}</pre><textarea>{0}</textarea></td>").format(name)
    assert fitted(kept) == kept


class Read(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self.titles = "", set[str](), list[Any]()
        self.feed(html)
        self.close()

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.titles += [value for name, value in attrs if name == "title"]
        assert {name for name, _ in attrs} <= {"class", "title"}


@pytest.mark.parametrize("evil", strings())
def test_hostile_text_stays_the_same_text(evil: str):
    html = Markup("<td>{}</td>").format(evil)

    read, before = Read(str(fitted(html))), Read(str(html))

    assert read.text == before.text
    assert read.tags <= {"td", "span", "wbr"}
    assert read.titles in ([], [before.text.strip()])
    # The control: without escaping, tags would come through.
    assert "<" not in escape(evil)
