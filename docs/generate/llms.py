"""docs/llms.txt (https://llmstxt.org): the site's menu for programs, with a line about each page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

DOCS = Path(__file__).parents[1]
CONFIG = DOCS.parent / "config" / "mkdocs.yml"
FILE = DOCS / "llms.txt"
FIRST = "index.md"

# Neither a comment nor a fenced block is prose.
_OTHER = re.compile(r"<!--.*?-->\n?|^```.*?^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"!?\[([^]]*)]\([^)]*\)")
_SENTENCES = re.compile(r"(?<=[.?]) ")
# Characters that a line has at least, if the paragraph has more than one sentence.
_SHORT = 40


def text(suffix: str = ".md") -> str:
    """Return the file; its links are relative, and end as the pages do where it is."""
    settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    lines = [f"# {settings['site_name']}", "", f"> {_paragraph(FIRST)}"]
    section = None
    for heading, title, page in menu(settings["nav"]):
        if heading != section:
            lines += ["", f"## {heading}", ""]
            section = heading
        address = f"{page.removesuffix('.md')}{suffix}"
        lines.append(f"- [{title}]({address}): {about(page)}")
    return "".join(f"{line}\n" for line in lines)


def menu(nav: object, above: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield section, title and page of each entry; a page without a title is the first one of its section."""
    for entry in nav if isinstance(nav, list) else [nav]:
        if isinstance(entry, str):
            yield above or "Start", above.rpartition(": ")[2] or "Overview", entry
            continue
        for title, below in entry.items():
            if isinstance(below, str):
                yield above or "Start", title, below
            else:
                yield from menu(below, f"{above}: {title}" if above else title)


def about(page: str) -> str:
    """Return the first sentence of a page's first paragraph, and the next ones if it is short."""
    line = ""
    for sentence in _SENTENCES.split(_paragraph(page)):
        if len(line) < _SHORT:
            line = f"{line} {sentence}".strip()
    return line if line.endswith("?") else line.rstrip(".:") + "."


def _paragraph(page: str) -> str:
    """Return the first paragraph of a page on one line, without links and emphasis."""
    prose = _OTHER.sub("", (DOCS / page).read_text(encoding="utf-8"))
    for block in re.split(r"\n\s*\n", prose):
        if not re.match(r"\s*(#|\||\[!|!\[|- |$)", block):
            return " ".join(_LINK.sub(r"\1", block).replace("**", "").split())
    raise ValueError(f"docs/{page} has no paragraph")
