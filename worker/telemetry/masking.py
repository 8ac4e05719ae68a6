"""Masking: replaces every registered secret and token in text, in all of its encodings."""

from __future__ import annotations

import binascii
import functools
import json
import os
import re
import string
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote

SHORTEST = 6  # a shorter secret would match ordinary text
BLOCK = 12  # characters that are looked up in a table at each place of a text
SIGNED = re.compile(r"[\w-]+\.[\w-]+\.[\w-]{16,}", re.ASCII)
# A single-word secret of at least this length is a token: pieces of it are masked too.
LONG = 40
# Texts of this length in a JSON secret are secrets; shorter ones are often ordinary words.
LONG_TEXT = 16


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


def encodings(secret: str) -> set[str]:
    """The secret in plain text, URL-encoded, JSON-escaped, and as UTF-8 read as Latin-1."""
    forms = {secret, quote(secret, safe=""), quote(secret), quote_plus(secret)}
    forms |= {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    return forms | {secret.encode(errors="replace").decode("latin-1")}


def in_base64(secret: str) -> Iterator[str]:
    """Its base64 at each of three alignments, without the characters that depend on its neighbours."""
    for before, first in ((0, 0), (1, 2), (2, 3)):
        raw = b"\0" * before + secret.encode(errors="replace")
        letters = binascii.b2a_base64(raw, newline=False).rstrip(b"=").decode()
        fixed = letters[first : len(letters) - (1 if len(raw) % 3 else 0)]
        if len(fixed) >= SHORTEST:
            yield fixed
            yield fixed.replace("+", "-").replace("/", "_")


# Only matching parts of a URL are shown: a malformed one may contain its password anywhere.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}")
_USER = re.compile(r"[\w.%+-]{0,63}", re.ASCII)
_PLACE = re.compile(
    r"(?P<host>(?:[\w.,%-]*|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?)(?P<path>/[^?#\s]*)?(?:\?(?P<query>[^#]*))?(?:#.*)?",
    re.ASCII | re.DOTALL,
)
# Parameters of a database URL whose values are not secret; libpq also accepts a password there.
_OPEN = frozenset({"host", "port", "user", "dbname", "sslmode", "connect_timeout", "target_session_attrs"})
_CLOSED = frozenset(
    {"password", "sslpassword", "options", "application_name", "sslrootcert", "sslcert", "sslkey"}
)
# Ends user, password, host and port, if no password has such a character (RFC 3986, section 3.2).
_BEYOND = re.compile(r"[/?#]")
# Shorter pieces of a URL match ordinary text.
_LONG_ENOUGH, _LONGER = 12, 16


def shown_url(url: str, *, path: bool = True) -> str:
    """A URL without password, secret parameters and fragment, and without its path unless `path`.

    Parts that cannot be parsed become `***`, as does all of a URL whose last `@` may end a password with a
    `/`, `?` or `#`. The user is shown for databases only: elsewhere it may be a token.
    """
    scheme, parted, rest = url.partition("://")
    if not parted or not _SCHEME.fullmatch(scheme):
        return "***"
    if scheme.startswith("sqlite") and rest.startswith("/"):
        file, asked, _ = rest.partition("?")
        return f"{scheme}://{file}{'?***' if asked else ''}"
    is_database = scheme.startswith("postgres")
    split = _split(rest, is_database=is_database)
    found = _PLACE.fullmatch(split[2]) if split else None
    if split is None or found is None:
        return f"{scheme}://***"
    userinfo, at, _ = split
    user, colon, _ = userinfo.partition(":")
    if not is_database or not _USER.fullmatch(user):
        user, colon = ("***", "") if at else ("", "")
    shown = f"{scheme}://{user}{':***' if colon else ''}{at}{found['host']}"
    if not path:
        return shown + ("/***" if (found["path"] or "/") != "/" or found["query"] else "")
    query = "&".join(_shown_parameter(part) for part in (found["query"] or "").split("&") if part)
    return f"{shown}{found['path'] or ''}{f'?{query}' if query else ''}"


def _shown_parameter(part: str) -> str:
    key, _, value = part.partition("=")
    if key in _OPEN and "@" not in value:
        return part
    return f"{key}=***" if key in _OPEN or key in _CLOSED else "***"


def _split(rest: str, *, is_database: bool) -> tuple[str, str, str] | None:
    """User and password, `@` or "", and the rest of what follows `://`; None if the password may go on.

    A user without a password ends at its `@`. So if no `:` comes before a database's query, an `@` in the
    query belongs to a parameter.
    """
    authority = _BEYOND.split(rest, maxsplit=1)[0]
    beyond = rest[len(authority) :]
    path = beyond.partition("?")[0]
    if "@" in beyond and (not is_database or ":" in authority + path or "@" in path):
        return None
    userinfo, at, host = authority.rpartition("@")
    return userinfo, at, host + beyond


def secrets_of_url(url: str, *, path: bool = False) -> Iterator[str]:
    """The secrets in a URL: password, the pieces around an @ in it, parameters, with `path` also the path.

    Where a password may end in two places, those of both readings.
    """
    _, parted, rest = url.partition("://")
    rest = rest if parted else url
    authority = _BEYOND.split(rest, maxsplit=1)[0]
    beyond = rest[len(authority) :]
    yield from _secrets_of(*rest.rpartition("@")[::2], path=path)
    if "@" in beyond:
        userinfo, _, host = authority.rpartition("@")
        yield from _secrets_of(userinfo, host + beyond, path=path)


def _secrets_of(userinfo: str, place: str, *, path: bool) -> Iterator[str]:
    password = userinfo.partition(":")[2] or userinfo
    way, _, query = place.partition("?")
    way = way.partition("#")[0]
    parameters = (part.partition("=") for part in query.split("&"))
    values = [value for key, _, value in parameters if key not in _OPEN]
    # Drivers differ on whether a fragment ends a value.
    found = [password, *password.split("@"), *values, *(value.partition("#")[0] for value in values)]
    if path:
        # The whole path and its long segments.
        found += [way.partition("/")[2], *(part for part in way.split("/")[1:] if len(part) >= _LONGER)]
    for piece in found:
        for form in {piece, unquote(piece)}:
            if len(form) >= _LONG_ENOUGH:
                yield form


MASK = "[masked]"
# Characters of secrets; registered secrets add theirs.
ORDINARY = string.ascii_letters + string.digits + "_-.+/=~"
RUN_ID = r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"
# Possible base64; excludes run ids, which are in every log line.
BASE64 = re.compile(RUN_ID + r"|([A-Za-z0-9+/_-]{16,})")
# Text without such a word has no PLAIN secret and no piece of a token: 16 characters are the shortest.
LEAST = 16
PERHAPS_TOKEN = re.compile(RUN_ID + r"|([A-Za-z0-9+/_.=~-]{16,})")
# A secret that is written in the same way everywhere but in base64.
PLAIN = re.compile(r"[\w.-]{16,}", re.ASCII)
STANDARD = str.maketrans("-_", "+/")

Span = tuple[int, int]


@dataclass(slots=True)
class _Entry:
    """The encodings of one secret, by lookup method."""

    tokens: list[int] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    literals: list[str] = field(default_factory=list)


class Masker:
    """Replaces registered and held secrets in text; thread-safe.

    Keeps the last `limit` registered secrets, all held ones, and the last `kept` that were released.
    """

    def __init__(self, limit: int = 50_000, kept: int = 1_000) -> None:
        self._limit = limit
        self._kept = kept
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._registered: OrderedDict[str, None] = OrderedDict()
        self._held: dict[str, int] = {}
        self._released: OrderedDict[str, None] = OrderedDict()
        # Held and released secrets that no text has been compared with yet.
        self._pending: dict[str, None] = {}
        self._tokens: dict[int, Token] = {}
        self._next_token = 0
        # Hash of a block -> token and offset, packed into one number.
        self._blocks: dict[int, int] = {}
        # Words match as a whole: hash of the first block -> the lengths to try.
        self._words: Counter[str] = Counter()
        self._starts: dict[int, Counter[int]] = {}
        self._letters = set(ORDINARY)
        self._patterns: tuple[re.Pattern[str], re.Pattern[str] | None] | None = None

    def register(self, secret: str) -> None:
        """Mask this secret from now on; one shorter than six characters is ignored."""
        with self._lock:
            if secret in self._registered:
                self._registered.move_to_end(secret)
                return
            if len(secret.strip()) < SHORTEST:
                return
            self._registered[secret] = None
            self._index(secret)
            while len(self._registered) > self._limit:
                self._drop(self._registered.popitem(last=False)[0])

    def forget(self, secret: str) -> None:
        """Undo `register`."""
        with self._lock:
            if secret in self._registered:
                del self._registered[secret]
                self._drop(secret)

    def hold(self, secret: str, *, is_token: bool = False) -> None:
        """Mask this secret until `release` is called as often, such as the token of a run.

        Cheap for a token: it is prepared only when a text might contain one. `is_token` says that it is
        one in base64, whose many characters are then not looked at.
        """
        with self._lock:
            holders = self._held.get(secret, 0)
            if not holders:
                if len(secret.strip()) < SHORTEST:
                    return
                if secret in self._released:
                    del self._released[secret]
                elif secret not in self._entries:
                    if (is_token and len(secret) >= LEAST) or PLAIN.fullmatch(secret):
                        self._pending[secret] = None
                    else:
                        self._index(secret)
            self._held[secret] = holders + 1

    def release(self, secret: str) -> None:
        """End a `hold`. The secrets released last are still masked: output may come late."""
        with self._lock:
            holders = self._held.get(secret, 0)
            if holders > 1:
                self._held[secret] = holders - 1
            elif holders:
                del self._held[secret]
                self._released[secret] = None
                if len(self._released) > self._kept:
                    self._drop(self._released.popitem(last=False)[0])

    def note(self, secret: str) -> None:
        """Mask this secret for now, as one that was just released."""
        self.hold(secret)
        self.release(secret)

    def clear(self) -> None:
        """Forget every secret."""
        with self._lock:
            for memory in (self._registered, self._held, self._released, self._pending):
                memory.clear()
            while self._entries:
                self._remove(self._entries.popitem()[1])

    def mask(self, text: str) -> str:
        """The text with every registered secret replaced by `[masked]`; JSON stays JSON."""
        if not self._entries and not self._pending:
            return text
        parts, at = [], 0
        for start, end in self.spans(text):
            if start >= at:
                parts += [text[at:start], MASK]
            at = max(at, end)
        return "".join([*parts, text[at:]])

    def spans(self, text: str) -> list[Span]:
        """Start and end of each secret in the text, sorted; they may overlap."""
        if self._pending and any(word[1] for word in PERHAPS_TOKEN.finditer(text)):
            self._index_pending()
        found = self._plain(text)
        for word in BASE64.finditer(text):
            if word[1]:
                found += self._encoded(word[1], word.start())
        return sorted(found)

    def _plain(self, text: str) -> list[Span]:
        words, literals = self._compiled()
        found = [match.span() for match in literals.finditer(text)] if literals else []
        starts, blocks = self._starts, self._blocks
        for word in words.finditer(text):
            at, end = word.span()
            while at <= end - BLOCK:
                # The hot loop: it runs once for each character.
                key = hash(text[at : at + BLOCK])
                if (key in blocks or key in starts) and (span := self._at(text, at, key)):
                    found.append(span)
                    at = span[1]
                else:
                    at += 1
        return found

    def _at(self, text: str, at: int, key: int) -> Span | None:
        # Longest first; the copy protects against changes by other threads.
        for length in sorted(tuple(self._starts.get(key, ())), reverse=True):
            if text[at : at + length] in self._words:
                return at, at + length
        packed = self._blocks.get(key)
        return None if packed is None else self._piece(text, at, packed)

    def _piece(self, text: str, at: int, packed: int) -> Span | None:
        """The longest piece of the token around the block at `at`, if it is revealing."""
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
        return (start, end) if token.is_revealing(first, last) else None

    def _encoded(self, word: str, position: int) -> list[Span]:
        """Start and end of each base64-encoded secret in a word, at any alignment."""
        found = []
        standard = word.translate(STANDARD)
        for shift in range(4):
            left = (len(word) - shift) % 4
            # One remaining character is less than a byte; two or three are one or two bytes.
            letters = standard[shift:-1] if left == 1 else standard[shift:] + "=" * (-left % 4)
            for start, end in self._plain(binascii.a2b_base64(letters).decode("latin-1")):
                upto = min(shift - (-end * 4 // 3), len(word))
                found.append((position + shift + start * 4 // 3, position + upto))
        return found

    def _index_pending(self) -> None:
        with self._lock:
            while self._pending:
                self._index(next(iter(self._pending)))

    def _index(self, secret: str) -> None:
        """Compare texts with this secret from now on."""
        self._pending.pop(secret, None)
        if secret not in self._entries:
            self._entries[secret] = entry = _Entry()
            for line in (secret,) if PLAIN.fullmatch(secret) else lines_of(secret):
                forms = {line} if PLAIN.fullmatch(line) else encodings(line)
                for form in forms:
                    self._add(entry, form, is_only=len(forms) == 1)

    def _drop(self, secret: str) -> None:
        """Forget a secret for which there is no reason any more."""
        if secret in self._registered or secret in self._held or secret in self._released:
            return
        self._pending.pop(secret, None)
        entry = self._entries.pop(secret, None)
        if entry is not None:
            self._remove(entry)

    def _add(self, entry: _Entry, form: str, *, is_only: bool) -> None:
        if len(form) < BLOCK or re.search(r"\s", form):
            entry.literals += [form, *in_base64(form)]
            self._patterns = None
            return
        if not self._letters.issuperset(form):
            self._letters.update(form)
            self._patterns = None
        token = as_token(form)
        if token is None or not is_only:
            # The forms of a secret begin alike, and the table of blocks knows one: each counts as a whole.
            entry.words.append(form)
            self._words[form] += 1
            self._starts.setdefault(hash(form[:BLOCK]), Counter())[len(form)] += 1
        if token is None:
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

    def _compiled(self) -> tuple[re.Pattern[str], re.Pattern[str] | None]:
        """The patterns of words that may contain a secret, and of literals."""
        patterns = self._patterns
        if patterns is None:
            with self._lock:
                letters = re.escape("".join(sorted(self._letters)))
                literals = {text for entry in self._entries.values() for text in entry.literals}
                longest_first = sorted(literals, key=len, reverse=True)
                patterns = self._patterns = (
                    re.compile(f"[{letters}]{{{BLOCK},}}"),
                    re.compile("|".join(map(re.escape, longest_first))) if literals else None,
                )
        return patterns


def _drop_one(counter: Counter[Any], key: str | int) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


masker = Masker()


# Top-level folders of a server, besides those that this process uses.
_FOLDERS = {
    *("bin", "boot", "dev", "etc", "home", "lib", "lib32", "lib64", "media", "mnt", "nix", "opt", "private"),
    *("proc", "root", "run", "sbin", "snap", "srv", "sys", "tmp", "usr", "var"),
}


def without_paths(text: str) -> str:
    """The text with `<path>` for each absolute path of a file on the server."""
    return _paths().sub("<path>", text) if "/" in text else text


@functools.cache
def _paths() -> re.Pattern[str]:
    import tempfile

    own = [sys.prefix, sys.base_prefix, os.getcwd(), tempfile.gettempdir(), *sys.path]
    folders = _FOLDERS | {parts[1] for path in own if len(parts := Path(path).parts) > 1}
    names = "|".join(sorted(map(re.escape, folders)))
    # After a word it is part of a URL or of another path.
    return re.compile(rf"(?<![\w.~/-])/+(?:{names})(?:/[^\s'\"<>|:;,)\]}}]*)+")
