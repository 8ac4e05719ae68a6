"""Secret forms: the lines and parts of a secret, and how its characters and bytes may be read."""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import quote, quote_plus

SHORTEST = 6  # a shorter secret would match ordinary text
BLOCK = 12  # characters that are looked up in a table at each place of a text
SIGNED = re.compile(r"[\w-]+\.[\w-]+\.[\w-]{16,}", re.ASCII)
# A single-word secret of at least this length is a token: pieces of it are masked too.
LONG = 40
# Texts of this length in a JSON secret are secrets; shorter ones are often ordinary words.
LONG_TEXT = 16
# A secret that is written in the same way everywhere but in base64.
PLAIN = re.compile(r"[\w.-]{16,}", re.ASCII)
# No encoder changes these characters.
SAME = re.compile(r"[\w.~-]+", re.ASCII)
STANDARD = str.maketrans("-_", "+/")


@dataclass(frozen=True, slots=True)
class Token:
    """A long secret whose pieces are secret too.

    `header` is the end of its header, `signature` the start of its signature; both are 0 for opaque tokens.
    """

    text: str
    header: int
    signature: int

    def blocks(self) -> Iterator[int]:
        """The offsets of the blocks in the lookup table, denser in the signature."""
        yield from range(0, self.signature - BLOCK, 2 * BLOCK)
        yield from range(self.signature, len(self.text) - BLOCK + 1, 8)

    def is_revealing(self, start: int, end: int) -> bool:
        """Whether the piece from start to end is secret and long enough not to match by chance."""
        if end - max(start, self.signature) >= 16 or end - start == len(self.text):
            return True
        return (end > self.header and end - start >= 24) or (start == 0 and end == self.header)


def as_token(text: str) -> Token | None:
    """The text as a signed or opaque token, or None."""
    if SIGNED.fullmatch(text):
        return Token(text, text.index("."), text.rindex(".") + 1)
    return Token(text, 0, 0) if len(text) >= LONG and text.isascii() else None


def lines_of(secret: str) -> list[str]:
    """The lines of a multi-line secret, such as a private key; each is a secret."""
    lines = [line.strip() for line in secret.splitlines()]
    return [line for line in lines if len(line) >= SHORTEST and not line.startswith("-----")]


def parts_of(secret: str) -> Iterator[str]:
    """The secret, and the long texts in it if it is a JSON object, such as the key of a service account."""
    yield secret
    if secret.lstrip().startswith("{"):
        try:
            left = [json.loads(secret)]
        except (ValueError, RecursionError):
            return
        while left:
            value = left.pop()
            if isinstance(value, str) and len(value) >= LONG_TEXT:
                yield value
            elif isinstance(value, dict | list):
                left += value.values() if isinstance(value, dict) else value


def as_latin(secret: str) -> str:
    """Its UTF-8, read as Latin-1."""
    return secret.encode(errors="replace").decode("latin-1")


# How a short secret may be written before it is encoded in base64; longer ones are found in what is decoded.
ENCODINGS: Sequence[Callable[[str], str]] = (
    str,
    as_latin,
    lambda secret: quote(secret, safe=""),
    quote,
    quote_plus,
    lambda secret: json.dumps(secret)[1:-1],
    lambda secret: json.dumps(secret, ensure_ascii=False)[1:-1],
)


def readings(secret: str) -> Iterator[str]:
    """The secret, and its bytes as decoders read them that take each byte for a character."""
    yield secret
    if secret.isascii():
        return
    if not secret.isprintable():
        # `repr` escapes what is not printable; the rest may be read so afterwards.
        yield "".join(as_latin(letter) if letter.isprintable() else letter for letter in secret)
    for _ in range(2):
        secret = as_latin(secret)
        yield secret


def in_base64(secret: str) -> Iterator[str]:
    """Its base64 at each of three alignments, without the characters that depend on its neighbours."""
    for before, first in ((0, 0), (1, 2), (2, 3)):
        raw = b"\0" * before + secret.encode(errors="replace")
        letters = binascii.b2a_base64(raw, newline=False).rstrip(b"=").decode()
        fixed = letters[first : len(letters) - (1 if len(raw) % 3 else 0)]
        if len(fixed) >= SHORTEST:
            yield fixed
            yield fixed.replace("+", "-").replace("/", "_")


def decoded_from(word: str, shift: int) -> str:
    """A word of base64 from its letter `shift` on, each byte as a character."""
    left = (len(word) - shift) % 4
    # One remaining character is less than a byte; two or three are one or two bytes.
    whole = word[shift:-1] if left == 1 else word[shift:] + "=" * (-left % 4)
    return binascii.a2b_base64(whole).decode("latin-1")
