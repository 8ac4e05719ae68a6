"""The ways in which a secret may be written, and which piece of a token gives something away."""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote, quote_plus

SHORTEST = 6  # a shorter secret would be found in any text
BLOCK = 12  # what is looked up in a table at each place of a text
SIGNED = re.compile(r"[\w-]+\.[\w-]+\.[\w-]{16,}", re.ASCII)
# From this length on a secret of one word counts as a token, whose pieces are masked too.
LONG = 40


@dataclass(frozen=True, slots=True)
class Token:
    """A long secret of which pieces count.

    `header` is where its header ends, `signature` where its signature begins; both 0 where it has none.
    """

    text: str
    header: int
    signature: int

    def blocks(self) -> Iterator[int]:
        """The offsets at which a block of it is looked up: denser in what is worth most."""
        yield from range(0, self.signature - BLOCK, 2 * BLOCK)
        yield from range(self.signature, len(self.text) - BLOCK + 1, 8)

    def tells(self, start: int, end: int) -> bool:
        """Whether the piece from start to end gives anything away, and is no chance likeness."""
        if end - max(start, self.signature) >= 16 or end - start == len(self.text):
            return True
        return (end > self.header and end - start >= 24) or (start == 0 and end == self.header)


def as_token(text: str) -> Token | None:
    """The text as a signed or opaque token, where it is one."""
    if SIGNED.fullmatch(text):
        return Token(text, text.index("."), text.rindex(".") + 1)
    return Token(text, 0, 0) if len(text) >= LONG and text.isascii() else None


def lines_of(secret: str) -> list[str]:
    """A text of several lines, such as a private key, is a secret in each of its lines."""
    lines = [line.strip() for line in secret.splitlines()]
    return [line for line in lines if len(line) >= SHORTEST and not line.startswith("-----")]


def written(secret: str) -> set[str]:
    """The secret as it is, URL-encoded, JSON-escaped, and as UTF-8 bytes taken for letters."""
    forms = {secret, quote(secret, safe=""), quote(secret), quote_plus(secret)}
    forms |= {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    return forms | {secret.encode(errors="replace").decode("latin-1")}


def in_base64(secret: str) -> Iterator[str]:
    """The letters of its base64 that do not depend on what stands before and after it, thrice."""
    for before, first in ((0, 0), (1, 2), (2, 3)):
        raw = b"\0" * before + secret.encode(errors="replace")
        letters = binascii.b2a_base64(raw, newline=False).rstrip(b"=").decode()
        fixed = letters[first : len(letters) - (1 if len(raw) % 3 else 0)]
        if len(fixed) >= SHORTEST:
            yield fixed
            yield fixed.replace("+", "-").replace("/", "_")
