"""`python -m docs.generate`: update the generated parts and print the pages that changed."""

from __future__ import annotations

from docs.generate.pages import PAGES, renewed


def main() -> None:
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = renewed(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(page)


if __name__ == "__main__":
    main()
