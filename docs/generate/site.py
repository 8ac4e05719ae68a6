"""The documentation site: `python -m docs.generate.site [FOLDER]` builds it, into dist/site by default.

The pages are for GitHub and for the site. The site gets copies, in which

- a link to another file of the repository leads to a page that shows this file,
- a Mermaid figure is its picture from docs/images, so that the site loads no script for it,
- a fenced block has a title if it is output, or of another product; other marks are for the tests,
- what belongs to an item of a list is indented by four, as Python-Markdown requires.

Any warning fails the build: a dead link or heading, or a page that is not in `nav` of config/mkdocs.yml.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from docs.generate import llms
from docs.generate.figures import FIGURE, picture_of

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CONFIG = ROOT / "config" / "mkdocs.yml"
# Where the site shows files that are outside of docs/.
FILES = "repository"
# For the search, which lists the pages about a word before the files that contain it.
LESS_IMPORTANT = "---\nsearch:\n  boost: 0.2\n---\n\n"

_FENCED = re.compile(
    r"^(?P<fence> *```)(?P<language>[a-z]+)(?P<marks>[^\n]*)\n(?P<text>.*?)(?P<end>^ *```\n)",
    re.DOTALL | re.MULTILINE,
)
_ITEM = re.compile(r"(?:[-*]|\d+\.) ")
_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
_LANGUAGES = {
    ".py": "python",
    ".toml": "toml",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".service": "ini",
    ".sh": "sh",
}


def build(folder: Path, settings: Path = CONFIG) -> None:
    """Build the site into the folder; logs warnings, and raises `mkdocs.exceptions.Abort` for one."""
    # Its advice for other projects; set before the theme is imported.
    os.environ["NO_MKDOCS_2_WARNING"] = "1"
    from mkdocs.commands.build import build as build_site
    from mkdocs.config import load_config

    with tempfile.TemporaryDirectory(prefix="orgworker-site-") as temporary:
        pages = Path(temporary, "pages")
        nav = stage(pages)
        config = load_config(str(settings), docs_dir=str(pages), site_dir=str(folder))
        config.nav = [*(config.nav or []), {"Files": nav}]
        config.plugins.on_startup(command="build", dirty=False)
        try:
            build_site(config)
        finally:
            config.plugins.on_shutdown()


def stage(pages: Path) -> list[dict[str, str]]:
    """Write what the site is made of; returns the navigation of the repository's other files."""
    wanted = [ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]
    for page in sorted(DOCS.rglob("*.md")):
        for target in _other_files(page):
            if target not in wanted:
                wanted.append(target)
        _write(pages / page.relative_to(DOCS), for_site(page))
    _write(pages / llms.FILE.name, llms.text(".html"))
    for folder in ("images", "vendor"):
        shutil.copytree(DOCS / folder, pages / folder)
    names = {}
    for file in wanted:
        names[str(file.relative_to(ROOT))] = _shown_at(file)
        _write(pages / _shown_at(file), f"{LESS_IMPORTANT}{shown(file)}")
    return [{name: names[name]} for name in sorted(names, key=lambda name: (name.count("/") > 0, name))]


def for_site(page: Path) -> str:
    """The text of a page of docs/ as the site has it."""
    text = FIGURE.sub(lambda found: _figure(page, found[1]), page.read_text(encoding="utf-8"))
    return _linked(page, _titled(_indented(text)))


def shown(file: Path) -> str:
    """The page that shows a file or folder outside of docs/."""
    name = file.relative_to(ROOT)
    if file.suffix == ".md":
        return _linked(file, _titled(_indented(file.read_text(encoding="utf-8"))))
    if file.is_dir():
        texts = [f"## {each.name}\n\n{_fenced(each)}" for each in sorted(file.iterdir()) if each.is_file()]
        return f"# {name}\n\nA folder of the repository.\n\n" + "\n".join(texts)
    return f"# {name}\n\nA file of the repository.\n\n{_fenced(file)}"


def _indented(text: str) -> str:
    """The text with each item's further lines indented by four, and a blank line after one of several blocks.

    On GitHub an indentation by the width of the item's mark is enough.
    """
    lines: list[str] = []
    width, in_fence, has_blocks = 0, False, False
    for line in text.splitlines(keepends=True):
        if line.startswith("```"):
            in_fence = not in_fence
        if width and line.startswith(" " * width):
            has_blocks = has_blocks or not lines[-1].strip()
            line = "    " + line[width:]
        elif line.strip() and not in_fence:
            item = _ITEM.match(line)
            if item and has_blocks and lines[-1].strip():
                lines.append("\n")
            width, has_blocks = (len(item[0]) if item else 0), False
        lines.append(line)
    return "".join(lines)


def _titled(text: str) -> str:
    """The text with titles above the blocks that are not the reader's to run."""
    before = ""

    def block(found: re.Match[str]) -> str:
        nonlocal before
        marks = dict(word.partition("=")[::2] for word in found["marks"].split())
        is_output = "output" in marks or (found["language"] == "text" and before == "sh" and not marks)
        before = found["language"]
        title = "output" if is_output else marks.get("other", "")
        shown = f' title="{title}"' if title else ""
        return f"{found['fence']}{before}{shown}\n{found['text']}{found['end']}"

    return _FENCED.sub(block, text)


def _fenced(file: Path) -> str:
    language = _LANGUAGES.get(file.suffix, "text")
    return f"````{language}\n{file.read_text(encoding='utf-8')}````\n"


def _figure(page: Path, source: str) -> str:
    picture = os.path.relpath(picture_of(source), page.parent)
    return f"![The figure of this page]({picture})\n"


def _other_files(page: Path) -> list[Path]:
    """What a page links to outside of docs/."""
    text = page.read_text(encoding="utf-8")
    targets = [(page.parent / found[1]).resolve() for found in _LINK.finditer(text)]
    return [target for target in targets if not target.is_relative_to(DOCS) and target.exists()]


def _shown_at(file: Path) -> str:
    name = str(file.relative_to(ROOT))
    return f"{FILES}/{name if file.suffix == '.md' else f'{name}.md'}"


def _linked(page: Path, text: str) -> str:
    """The text with its links as they are from the page's place on the site."""
    here = _shown_at(page) if not page.is_relative_to(DOCS) else str(page.relative_to(DOCS))

    def link(found: re.Match[str]) -> str:
        target = (page.parent / found[1]).resolve()
        if target == ROOT / "README.md":
            place = "index.md"
        elif target.is_relative_to(DOCS):
            place = str(target.relative_to(DOCS))
        else:
            place = _shown_at(target)
        return f"]({os.path.relpath(place, os.path.dirname(here) or '.')}{found[2] or ''})"

    return _LINK.sub(link, text)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0] if arguments else ROOT / "dist" / "site").absolute()
    from click import ClickException

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        build(folder)
    except ClickException as error:
        print(error.format_message(), file=sys.stderr)
        return 1
    print(f"the site: {folder}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
