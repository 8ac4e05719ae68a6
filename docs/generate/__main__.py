"""`python -m docs.generate`: update the generated parts and print the pages that changed."""

from __future__ import annotations

from pathlib import Path

from docs.generate import chart, llms
from docs.generate.pages import COMMANDS, PAGES, new_pages, renewed


def main() -> None:
    COMMANDS.mkdir(exist_ok=True)
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES} | new_pages()
    for page, text in texts.items():
        _write(page, renewed(text))
    # These two are made from the pages.
    _write(chart.FILE, chart.drawn())
    _write(llms.FILE, llms.text())


def _write(file: Path, text: str) -> None:
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")
        print(file)


if __name__ == "__main__":
    main()
