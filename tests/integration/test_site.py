"""The documentation site builds without a warning, is complete, and loads nothing from elsewhere."""

from __future__ import annotations

import html.parser
import json
import logging
import re
import socket
from pathlib import Path

import pytest
from click import ClickException

from docs.generate import site

pytestmark = pytest.mark.feature("checkout")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built on a machine without a network."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patched:
        for name in ("connect", "connect_ex"):
            patched.setattr(socket.socket, name, no_network)
        patched.setattr(socket, "getaddrinfo", no_network)
        site.build(folder)
    return folder


def no_network(*given: object) -> None:
    raise AssertionError("the build asks for the network")


class Loaded(html.parser.HTMLParser):
    """The addresses that a browser loads by itself when it shows a page, and the figures of Mermaid."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        relation = (given.get("rel") or "").split()
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed"):
            self.addresses.append(given.get("src") or "")
        elif tag == "link" and not {"next", "prev", "canonical"} & set(relation):
            self.addresses.append(given.get("href") or "")


def test_every_page_is_on_the_site(built: Path):
    for page in site.DOCS.rglob("*.md"):
        assert built.joinpath(page.relative_to(site.DOCS)).with_suffix(".html").is_file(), page


def test_no_page_loads_anything_from_another_site(built: Path):
    for page in built.rglob("*.html"):
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        foreign = [
            each for each in loaded.addresses if re.match(r"\w+:|//", each) and not each.startswith("data:")
        ]
        assert foreign == [], page
        assert 'class="mermaid"' not in page.read_text(encoding="utf-8"), (
            f"{page}: its script is not on the site"
        )
    for style in built.rglob("*.css"):
        assert (
            re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")) == []
        )


def test_a_link_to_a_file_outside_of_the_pages_leads_to_its_text(built: Path):
    page = (built / "quickstart.html").read_text(encoding="utf-8")
    assert 'href="repository/config/worker.toml.html"' in page
    shown = (built / "repository/config/worker.toml.html").read_text(encoding="utf-8")
    assert "lease" in shown


def test_no_text_is_taken_for_a_tag(built: Path):
    """As `<name>` outside of code is: a browser does not show it."""
    tags = set()
    for page in built.rglob("*.html"):
        article = page.read_text(encoding="utf-8").partition("<article")[2].partition("</article>")[0]
        tags |= set(re.findall(r"<([\w:-]+)", article))

    text = {"a", "blockquote", "br", "code", "em", "hr", "img", "input", "p", "pre", "span", "strong", "del"}
    blocks = {"div", "h1", "h2", "h3", "h4", "li", "ol", "table", "tbody", "td", "th", "thead", "tr", "ul"}
    assert tags <= text | blocks


def test_lists_are_lists(built: Path):
    """Python-Markdown makes a paragraph of the rest of a list if something in it is indented too little."""
    for page in built.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert re.search(r"<p>(?:(?!</p>).)*\n(?:\d+\.|[-*]) ", text, re.DOTALL) is None, page
    okta = (built / "providers/okta.html").read_text(encoding="utf-8")
    assert re.search(r"<li>\s*<p>Set the org in the app's profile.*?<pre>.*?</li>", okta, re.DOTALL)


def test_the_search_knows_every_page_and_works_without_a_server(built: Path):
    index = json.loads((built / "search/search_index.json").read_text(encoding="utf-8"))
    found = {each["location"].partition("#")[0] for each in index["docs"]}

    for page in site.DOCS.rglob("*.md"):
        assert str(page.relative_to(site.DOCS).with_suffix(".html")) in found
    boosted = {each["location"].partition("#")[0] for each in index["docs"] if each.get("boost") == 0.2}
    assert boosted == {location for location in found if location.startswith("repository/")}
    assert (built / "search/search_index.js").is_file()
    assert "IFrameWorker" in (built / "vendor/iframe-worker.js").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("[a page](pages.md)", "pages.md"),
        ("[a heading](other.md#nowhere)", "#nowhere"),
        ("![a picture](images/none.png)", "images/none.png"),
        ("no link", 'not included in the "nav"'),
        ("", None),
    ],
)
def test_a_warning_fails_the_build(
    text: str,
    warning: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def stage(pages: Path) -> list[dict[str, str]]:
        pages.mkdir()
        (pages / "index.md").write_text(f"# Pages\n\n{text}\n")
        (pages / "other.md").write_text("# Other\n")
        return [] if text == "no link" else [{"Other": "other.md"}]

    monkeypatch.setattr(site, "stage", stage)
    settings = tmp_path / "mkdocs.yml"
    settings.write_text(f"INHERIT: {site.CONFIG}\nnav: [index.md]\n")

    with caplog.at_level(logging.INFO, "mkdocs"):
        if warning is None:
            site.build(tmp_path / "site", settings)
            return
        with pytest.raises(ClickException):
            site.build(tmp_path / "site", settings)
    assert warning in caplog.text
