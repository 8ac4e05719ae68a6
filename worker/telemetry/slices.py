"""Slices: searches a long text part by part, so that no single step holds the interpreter lock for long.

While one thread holds it, such as that which masks long texts, the worker's loop waits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# Characters that one step reads: a few milliseconds of the slowest pattern.
SLICE = 32 * 1024
# Comparisons of one step, one for each literal at each character.
_COMPARED = 1 * 1024 * 1024
_SHORTEST_STEP = 1024


class Words:
    """Finds what `pattern` matches, which has only `letters`, a set in a pattern, such as `a-z0-9`."""

    def __init__(self, letters: str, pattern: str) -> None:
        self._pattern = re.compile(pattern)
        self._seam = re.compile(f"[^{letters}]")

    def find(self, text: str) -> Iterable[re.Match[str]]:
        """The matches, as `finditer` finds them."""
        return self._pattern.finditer(text) if len(text) <= SLICE else self._by_slices(text)

    def _by_slices(self, text: str) -> Iterator[re.Match[str]]:
        start = 0
        while start < len(text):
            # No match goes on after a character that it cannot have.
            seam = self._seam.search(text, start + SLICE)
            end = seam.end() if seam else len(text)
            yield from self._pattern.finditer(text, start, end)
            start = end


class Literals:
    """Finds the longest of some texts wherever one of them is."""

    def __init__(self, texts: Iterable[str]) -> None:
        longest_first = sorted(set(texts), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))
        self._reach = len(longest_first[0])
        self._step = min(SLICE, max(_SHORTEST_STEP, _COMPARED // len(longest_first)))

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Start and end of each, as `finditer` finds them."""
        start = 0
        while start < len(text):
            end = upto = start + self._step
            for match in self._pattern.finditer(text, start, end + self._reach):
                if match.start() >= end:
                    break
                yield match.span()
                upto = max(upto, match.end())
            start = upto
