"""Cut secrets: finds what is left of a secret where a text was cut, in all of its encodings."""

from __future__ import annotations

import re
from collections.abc import Sequence

from worker.telemetry.escapes import ESCAPES
from worker.telemetry.secret_forms import STANDARD, decoded_from

# Shows that a text was cut there.
CUT = "…"
# Characters of the beginning of a secret that are masked where a text is cut.
LEAST_PIECE = 4
# Most characters that an escape of an escape takes, and that are left of one that was cut.
LONGEST_ESCAPE = 24

Span = tuple[int, int]


def is_cut(text: str) -> bool:
    """Whether the text begins or ends with the mark of a cut."""
    return text.startswith(CUT) or text.endswith(CUT)


def pieces_at_cuts(text: str, forms: Sequence[str]) -> list[Span]:
    """The beginning of a secret before the mark of a cut, and the end of one after such a mark."""
    if not forms:
        return []
    found: list[Span] = []
    reach = max(map(len, forms)) * LONGEST_ESCAPE
    if text.endswith(CUT):
        core = text[:-1]
        tail = core[-reach:]
        start = _begun(tail, forms, depth=2)
        if start < len(tail):
            found.append((len(core) - len(tail) + start, len(core)))
    if text.startswith(CUT):
        first = len(CUT + "\n" if text.startswith(CUT + "\n") else CUT)
        end = _ended(text[first : first + reach], forms, depth=2)
        if end:
            found.append((first, first + end))
    return found


def _begun(text: str, forms: Sequence[str], depth: int) -> int:
    """Where the beginning of a secret begins with which the text ends; the text's length if none does."""
    best = len(text)
    for form in forms:
        start = text.find(form[:LEAST_PIECE], max(0, len(text) - len(form)))
        while 0 <= start < best:
            if form.startswith(text[start:]):
                best = start
                break
            start = text.find(form[:LEAST_PIECE], start + 1)
    if depth:
        for escape in ESCAPES:
            whole = escape.unfinished.sub("", text)
            undone = escape.undo(whole)
            if undone is not None:
                start = _begun(undone.text, forms, depth - 1)
                if start < len(undone.text):
                    best = min(best, undone.original(start))
            elif whole != text:
                start = _begun(whole, forms, depth - 1)
                if start < len(whole):
                    best = min(best, start)
        *_, word = [None, *re.finditer(r"[A-Za-z0-9+/_-]{6,}=*\Z", text)]
        if word is not None:
            letters = word[0].rstrip("=").translate(STANDARD)
            for shift in range(4):
                decoded = decoded_from(letters, shift)
                start = _begun(decoded, forms, 0)
                if start < len(decoded):
                    best = min(best, word.start() + shift + start * 4 // 3)
    return best


def _ended(text: str, forms: Sequence[str], depth: int, junk: int = LONGEST_ESCAPE // 2) -> int:
    """Where the end of a secret ends with which the text begins; 0 if it does not.

    Before it may be up to `junk` characters of an escape that was cut.
    """
    best = 0
    for form in forms:
        end = min(len(text), len(form) + junk)
        while (found := text.rfind(form[-LEAST_PIECE:], 0, end)) >= 0 and found + LEAST_PIECE > best:
            end = found + LEAST_PIECE
            if any(form.endswith(text[first:end]) for first in range(min(junk, found) + 1)):
                best = end
                break
            end -= 1
    if depth:
        for escape in ESCAPES:
            undone = escape.undo(text)
            if undone is not None:
                end = _ended(undone.text, forms, depth - 1)
                if end:
                    best = max(best, undone.original(end))
        word = re.match(r"[A-Za-z0-9+/_-]{6,}", text)
        if word is not None:
            letters = word[0].translate(STANDARD)
            for shift in range(4):
                end = _ended(decoded_from(letters, shift), forms, 0, 0)
                if end:
                    best = max(best, min(shift - (-end * 4 // 3), len(letters)))
    return best
