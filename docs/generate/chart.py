"""The chart of the README, drawn from the table of docs/benchmarks.md: `./dev docs` brings it up to date."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

DOCS = Path(__file__).parents[1]
PAGE = DOCS / "benchmarks.md"
FILE = DOCS / "images" / "nine-o-clock.svg"

# A row of the table: where the tokens are, the first start, and when all have started.
_ROW = re.compile(r"^\| ([^|]+?) \| [\d.]+ s \| ([\d.]+) s \|", re.MULTILINE)
_WIDTH = 800
_LABELS = 330
_BAR = 390
_STEP = 40
_TOP = 78
_TITLE = "100,000 orgs are due at nine o'clock: seconds until the last run has started"
_HEAD = "where the orgs' tokens are"
_STYLE = (
    "text{font:14px system-ui,sans-serif;fill:#1f2328}.title{font-size:16px;font-weight:600}"
    ".small{font-size:12px;fill:#59636e}.bar{fill:#4051b5}"
)


def rows() -> list[tuple[str, float]]:
    """Return the cases of the table with their seconds."""
    part = PAGE.read_text(encoding="utf-8").partition("\n## Nine o'clock\n")[2].partition("\n## ")[0]
    return [(name, float(seconds)) for name, seconds in _ROW.findall(part)]


def drawn() -> str:
    """Return the chart as SVG: a bar for each case, with its seconds."""
    cases = rows()
    longest = max(seconds for _, seconds in cases)
    height = _TOP + _STEP * len(cases) + 34
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        f"<title>{escape(_TITLE)}</title>",
        f"<style>{_STYLE}</style>",
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text class="title" x="20" y="34">{escape(_TITLE)}</text>',
        f'<text class="small" x="{_LABELS - 10}" y="{_TOP - 12}" text-anchor="end">{_HEAD}</text>',
    ]
    for place, (name, seconds) in enumerate(cases):
        top, width = _TOP + _STEP * place, seconds / longest * _BAR
        lines += [
            f'<text x="{_LABELS - 10}" y="{top + 18}" text-anchor="end">{escape(name)}</text>',
            f'<rect class="bar" x="{_LABELS}" y="{top}" width="{width:.1f}" height="26" rx="3"/>',
            f'<text x="{_LABELS + width + 8:.1f}" y="{top + 18}">{seconds:g} s</text>',
        ]
    where = "Four workers, PostgreSQL and the identity provider share one machine with two processors."
    lines += [f'<text class="small" x="20" y="{height - 16}">{where}</text>', "</svg>"]
    return "".join(f"{line}\n" for line in lines)
