"""Masking: removes every known secret and token, in each of its forms, from text."""

from __future__ import annotations

import binascii
import json
import re
import string
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, quote_plus, unquote

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


# Of a URL only what matches is shown: a malformed one may have its password anywhere.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}")
_USER = re.compile(r"[\w.%+-]{0,63}", re.ASCII)
_PLACE = re.compile(
    r"(?P<host>(?:[\w.,%-]*|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?)(?P<path>/[^?#\s]*)?(?:\?(?P<query>[^#]*))?(?:#.*)?",
    re.ASCII | re.DOTALL,
)
# Parameters of a database's URL whose values are no secret; libpq takes a password there, too.
_OPEN = frozenset({"host", "port", "user", "dbname", "sslmode", "connect_timeout", "target_session_attrs"})
_CLOSED = frozenset(
    {"password", "sslpassword", "options", "application_name", "sslrootcert", "sslcert", "sslkey"}
)
# A shorter piece of a URL is also found in texts that have nothing to do with it.
_LONG_ENOUGH, _LONGER = 12, 16


def shown_url(url: str, *, path: bool = True) -> str:
    """A URL without password, secret parameters and fragment, and with its path unless that is secret too.

    A malformed URL may have its password anywhere, so what is not understood becomes `***`. Everything
    up to the last `@` counts as user and password. A user is shown for databases only: elsewhere it may
    be a token.
    """
    scheme, parted, rest = url.partition("://")
    if not parted or not _SCHEME.fullmatch(scheme):
        return "***"
    if scheme.startswith("sqlite") and rest.startswith("/"):
        file, asked, _ = rest.partition("?")
        return f"{scheme}://{file}{'?***' if asked else ''}"
    userinfo, at, place = rest.rpartition("@")
    found = _PLACE.fullmatch(place)
    if found is None:
        return f"{scheme}://***"
    user, colon, _ = userinfo.partition(":")
    if not scheme.startswith("postgres") or not _USER.fullmatch(user):
        user, colon = ("***", "") if at else ("", "")
    shown = f"{scheme}://{user}{':***' if colon else ''}{at}{found['host']}"
    if not path:
        return shown + ("/***" if (found["path"] or "/") != "/" or found["query"] else "")
    parameters = (part.partition("=") for part in (found["query"] or "").split("&") if part)
    query = "&".join(
        f"{key}={value}" if key in _OPEN else f"{key}=***" if key in _CLOSED else "***"
        for key, _, value in parameters
    )
    return f"{shown}{found['path'] or ''}{f'?{query}' if query else ''}"


def secrets_of_url(url: str, *, path: bool = False) -> Iterator[str]:
    """What the masker should know of a URL: password, the pieces around an @ in it, parameters, the path."""
    _, parted, rest = url.partition("://")
    userinfo, _, place = (rest if parted else url).rpartition("@")
    password = userinfo.partition(":")[2] or userinfo
    way, _, query = place.partition("#")[0].partition("?")
    parameters = (part.partition("=") for part in query.split("&"))
    found = [password, *password.split("@"), *(value for key, _, value in parameters if key not in _OPEN)]
    if path:
        # The whole path, and of its parts those that are longer than a word.
        found += [way.partition("/")[2], *(part for part in way.split("/")[1:] if len(part) >= _LONGER)]
    for piece in found:
        for form in {piece, unquote(piece)}:
            if len(form) >= _LONG_ENOUGH:
                yield form


MASK = "[masked]"
# Letters that secrets are made of; others are added as they are registered.
ORDINARY = string.ascii_letters + string.digits + "_-.+/=~"
# What may be base64; ids, which stand in every log line, are not.
BASE64 = re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b|([A-Za-z0-9+/_-]{16,})")
STANDARD = str.maketrans("-_", "+/")
# A stream holds back no more than this while a word goes on: twice the largest token.
LONGEST_WORD = 32_768

Span = tuple[int, int]


@dataclass(slots=True)
class _Entry:
    """The forms of one secret, by how they are looked for."""

    tokens: list[int] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    literals: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Patterns:
    letters: str
    words: re.Pattern[str]
    literals: re.Pattern[str] | None
    longest_literal: int


class Masker:
    """Knows secrets and replaces them in text; thread-safe.

    It keeps the `limit` secrets that were registered last.
    """

    def __init__(self, limit: int = 50_000) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._tokens: dict[int, Token] = {}
        self._next_token = 0
        # Hash of a block -> token and offset, packed in one number.
        self._blocks: dict[int, int] = {}
        # Of words only the whole counts: hash of the first block -> the lengths to try.
        self._words: Counter[str] = Counter()
        self._starts: dict[int, Counter[int]] = {}
        self._letters = set(ORDINARY)
        self._patterns: _Patterns | None = None

    def register(self, secret: str) -> None:
        """Mask this secret from now on. Shorter than six characters it cannot be told from other text."""
        with self._lock:
            if secret in self._entries:
                self._entries.move_to_end(secret)
                return
            if len(secret.strip()) < SHORTEST:
                return
            self._entries[secret] = entry = _Entry()
            for line in lines_of(secret):
                for form in written(line):
                    self._add(entry, form)
            while len(self._entries) > self._limit:
                self._remove(self._entries.popitem(last=False)[1])

    def forget(self, secret: str) -> None:
        """Mask this secret no longer, as once its token has expired."""
        with self._lock:
            entry = self._entries.pop(secret, None)
            if entry is not None:
                self._remove(entry)

    def clear(self) -> None:
        """Forget every secret."""
        with self._lock:
            while self._entries:
                self._remove(self._entries.popitem()[1])

    def mask(self, text: str) -> str:
        """The text with every registered secret replaced by `[masked]`; JSON stays JSON."""
        if not self._entries:
            return text
        parts, at = [], 0
        for start, end in self.spans(text):
            if start >= at:
                parts += [text[at:start], MASK]
            at = max(at, end)
        return "".join([*parts, text[at:]])

    def spans(self, text: str) -> list[Span]:
        """Where secrets stand in the text, sorted; they may overlap."""
        found = self._plain(text)
        for word in BASE64.finditer(text):
            if word[1]:
                found += self._encoded(word[1], word.start())
        return sorted(found)

    def open_end(self, text: str) -> int:
        """From where on the text may be the beginning of a secret that is not all there yet."""
        patterns = self._compiled()
        word = max(len(text.rstrip(patterns.letters)), len(text) - LONGEST_WORD)
        return min(word, max(0, len(text) - patterns.longest_literal + 1))

    def _plain(self, text: str) -> list[Span]:
        patterns = self._compiled()
        found = [match.span() for match in patterns.literals.finditer(text)] if patterns.literals else []
        starts, blocks = self._starts, self._blocks
        for word in patterns.words.finditer(text):
            at, end = word.span()
            while at <= end - BLOCK:
                # Once a letter of text: what costs here, costs.
                key = hash(text[at : at + BLOCK])
                if (key in blocks or key in starts) and (span := self._at(text, at, key)):
                    found.append(span)
                    at = span[1]
                else:
                    at += 1
        return found

    def _at(self, text: str, at: int, key: int) -> Span | None:
        # The longest first; the copy is safe against a change by another thread.
        for length in sorted(tuple(self._starts.get(key, ())), reverse=True):
            if text[at : at + length] in self._words:
                return at, at + length
        packed = self._blocks.get(key)
        return None if packed is None else self._piece(text, at, packed)

    def _piece(self, text: str, at: int, packed: int) -> Span | None:
        """The longest piece of the token around the block at `at`, if it gives anything away."""
        token, offset = self._tokens.get(packed >> 20), packed & 0xFFFFF
        if token is None or not text.startswith(token.text[offset : offset + BLOCK], at):
            return None
        secret = token.text
        start, first = at, offset
        while start > 0 and first > 0 and text[start - 1] == secret[first - 1]:
            start, first = start - 1, first - 1
        end, last = at + BLOCK, offset + BLOCK
        while end < len(text) and last < len(secret) and text[end] == secret[last]:
            end, last = end + 1, last + 1
        return (start, end) if token.tells(first, last) else None

    def _encoded(self, word: str, position: int) -> list[Span]:
        """Where base64 of a secret stands in a word, whatever stands before and after it."""
        found = []
        standard = word.translate(STANDARD)
        for shift in range(4):
            left = (len(word) - shift) % 4
            # One letter alone holds no whole byte; two or three hold one or two.
            letters = standard[shift:-1] if left == 1 else standard[shift:] + "=" * (-left % 4)
            for start, end in self._plain(binascii.a2b_base64(letters).decode("latin-1")):
                upto = min(shift - (-end * 4 // 3), len(word))
                found.append((position + shift + start * 4 // 3, position + upto))
        return found

    def _add(self, entry: _Entry, form: str) -> None:
        if len(form) < BLOCK or re.search(r"\s", form):
            entry.literals += [form, *in_base64(form)]
            self._patterns = None
            return
        if not self._letters.issuperset(form):
            self._letters.update(form)
            self._patterns = None
        token = as_token(form)
        if token is None:
            entry.words.append(form)
            self._words[form] += 1
            self._starts.setdefault(hash(form[:BLOCK]), Counter())[len(form)] += 1
            return
        number = self._next_token
        self._next_token += 1
        entry.tokens.append(number)
        self._tokens[number] = token
        for offset in token.blocks():
            self._blocks[hash(form[offset : offset + BLOCK])] = number << 20 | offset

    def _remove(self, entry: _Entry) -> None:
        for number in entry.tokens:
            token = self._tokens.pop(number)
            for offset in token.blocks():
                key = hash(token.text[offset : offset + BLOCK])
                if self._blocks.get(key) == number << 20 | offset:
                    del self._blocks[key]
        for form in entry.words:
            start = hash(form[:BLOCK])
            _drop_one(self._words, form)
            _drop_one(self._starts[start], len(form))
            if not self._starts[start]:
                del self._starts[start]
        if entry.literals:
            self._patterns = None

    def _compiled(self) -> _Patterns:
        patterns = self._patterns
        if patterns is None:
            with self._lock:
                letters = "".join(sorted(self._letters))
                literals = {text for entry in self._entries.values() for text in entry.literals}
                longest_first = sorted(literals, key=len, reverse=True)
                patterns = self._patterns = _Patterns(
                    letters=letters,
                    words=re.compile(f"[{re.escape(letters)}]{{{BLOCK},}}"),
                    literals=re.compile("|".join(map(re.escape, longest_first))) if literals else None,
                    longest_literal=max(map(len, literals), default=1),
                )
        return patterns


def _drop_one(counter: Counter[Any], key: str | int) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


class StreamMasker:
    """Masks text that comes in pieces, also a secret that is split over several of them."""

    def __init__(self, masker: Masker) -> None:
        self._masker = masker
        self._held = ""

    def feed(self, text: str) -> str:
        """What can be passed on so far; a word that may go on is held back."""
        text = self._held + text
        cut = self._masker.open_end(text)
        # A secret across the cut stays whole, for the next call to see.
        for start, end in reversed(self._masker.spans(text)):
            if start < cut < end:
                cut = start
        self._held = text[cut:]
        return self._masker.mask(text[:cut])

    def flush(self) -> str:
        """What was held back, at the end of the stream or when nothing came for a while."""
        held, self._held = self._held, ""
        return self._masker.mask(held)


masker = Masker()
