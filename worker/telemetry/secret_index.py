"""Secret index: finds secrets in text, in all of their encodings."""

from __future__ import annotations

import re
import string
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from worker.telemetry.cut_secrets import Span, is_cut, pieces_at_cuts
from worker.telemetry.escapes import ESCAPES, FORM, PERCENT, SIGNS, Undone
from worker.telemetry.secret_forms import (
    BLOCK,
    ENCODINGS,
    PLAIN,
    SAME,
    STANDARD,
    Token,
    as_token,
    decoded_from,
    in_base64,
    lines_of,
    readings,
)
from worker.telemetry.slices import Literals, Words

# Characters of secrets; registered secrets add theirs.
ORDINARY = string.ascii_letters + string.digits + "_-.+/=~"
RUN_ID = r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"
# Possible base64; excludes run ids, which are in every log line.
BASE64 = Words(r"A-Za-z0-9+/_-", RUN_ID + r"|([A-Za-z0-9+/_-]{16,})")
ESCAPED_BASE64 = Words(r"A-Za-z0-9+/_%-", r"[A-Za-z0-9+/_%-]{16,}")
# Text without such a word has no PLAIN secret and no piece of a token: 16 characters are the shortest.
LEAST = 16
PERHAPS_TOKEN = Words(r"A-Za-z0-9+/_.=~-", RUN_ID + r"|([A-Za-z0-9+/_.=~-]{16,})")
# Characters from a special one on, or before it, by which a secret is looked up.
WINDOW = 3


@dataclass(slots=True)
class _Entry:
    """The encodings of one secret, by lookup method."""

    tokens: list[int] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    literals: list[str] = field(default_factory=list)
    anchored: list[str] = field(default_factory=list)
    forms: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Start:
    """The lengths of the words that begin with a block, and the block's place in a token, packed."""

    lengths: dict[int, int] = field(default_factory=dict)
    packed: int | None = None


class SecretCharacters:
    """The characters of secrets of all indexes; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._letters = set(ORDINARY)
        self._words: Words | None = None

    def add(self, form: str) -> None:
        if not self._letters.issuperset(form):
            with self._lock:
                self._letters.update(form)
                self._words = None

    @property
    def words(self) -> Words:
        """The words that may contain a secret."""
        words = self._words
        if words is None:
            with self._lock:
                letters = re.escape("".join(sorted(self._letters)))
                words = self._words = Words(letters, f"[{letters}]{{{BLOCK},}}")
        return words


class SecretIndex:
    """Secrets that texts are compared with; each is removed as often as it was added. Thread-safe.

    With `pieces` it also finds pieces of a token, and the pieces of secrets that are left where a text was
    cut. Without, it finds only whole secrets: what is masked of a piece tells how far a guess is right.
    """

    def __init__(self, letters: SecretCharacters, *, pieces: bool) -> None:
        self._letters = letters
        self._pieces = pieces
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self.entries: dict[str, _Entry] = {}
        # Secrets that no text has been compared with yet.
        self.pending: dict[str, None] = {}
        self._tokens: dict[int, Token] = {}
        self._next_token = 0
        # Hash of a block -> the words that begin with it, or token and offset, packed into one number.
        self.blocks: dict[int, int | _Start] = {}
        # Words match as a whole.
        self._words: Counter[str] = Counter()
        # A special character and those after it, or those before it -> its offset and the secret's length,
        # packed into one number; if there are several, how often there is each.
        self._anchors: dict[str, int | dict[int, int]] = {}
        # Characters that some encoder escapes, of all secrets so far.
        self.special: set[str] = set()
        self._literals: Literals | None = None
        # How often the literals have changed, and the change that `_literals` has.
        self._changes = 0
        self._compiled = 0

    def __bool__(self) -> bool:
        return bool(self._counts)

    def add(self, secret: str, *, is_token: bool = False) -> None:
        """Find this secret from now on; `is_token` as in `Masker.hold`."""
        with self._lock:
            self._counts[secret] += 1
            if self._counts[secret] > 1:
                return
            is_late = (is_token and len(secret) >= LEAST) or PLAIN.fullmatch(secret)
            # `prepare` takes one that begins like a run id for a run id.
            if is_late and not re.match(RUN_ID, secret):
                self.pending[secret] = None
            else:
                self._index(secret)

    def remove(self, secret: str) -> None:
        """Undo one `add`."""
        with self._lock:
            _drop_one(self._counts, secret)
            if secret not in self._counts:
                self.pending.pop(secret, None)
                if (entry := self.entries.pop(secret, None)) is not None:
                    self._remove(entry)

    # searching

    def prepare(self) -> None:
        """Compare texts also with the secrets that were just added."""
        while self.pending:
            # Not all of them under one lock: another thread may wait to add a secret.
            with self._lock:
                if (secret := next(iter(self.pending), None)) is not None:
                    self._index(secret)

    def literals(self) -> Literals | None:
        """The short secrets, and those with spaces."""
        if self._compiled == self._changes:
            return self._literals
        with self._lock:
            changes, entries = self._changes, tuple(self.entries.values())
        texts = {text for entry in entries for text in entry.literals}
        # Without the lock, as it may take long.
        literals = Literals(texts) if texts else None
        with self._lock:
            if self._compiled < changes:
                self._literals, self._compiled = literals, changes
        return literals

    def at(self, text: str, at: int, key: int) -> Span | None:
        """The secret with a block at this place; `key` is the block's hash."""
        found = self.blocks.get(key)
        if isinstance(found, _Start):
            # Longest first; the copy protects against changes by other threads.
            for length in sorted(tuple(found.lengths), reverse=True):
                if text[at : at + length] in self._words:
                    return at, at + length
            found = found.packed
        return None if found is None else self._piece(text, at, found)

    def _piece(self, text: str, at: int, packed: int) -> Span | None:
        """The longest piece of the token around the block at `at`, if it is revealing."""
        token, offset = self._tokens.get(packed >> 20), packed & 0xFFFFF
        if token is None or not text.startswith(token.text[offset : offset + BLOCK], at):
            return None
        secret = token.text
        if not self._pieces:
            start = at - offset
            return (start, start + len(secret)) if start >= 0 and text.startswith(secret, start) else None
        start, first = at, offset
        while start > 0 and first > 0 and text[start - 1] == secret[first - 1]:
            start, first = start - 1, first - 1
        end, last = at + BLOCK, offset + BLOCK
        while end < len(text) and last < len(secret) and text[end] == secret[last]:
            end, last = end + 1, last + 1
        return (start, end) if token.is_revealing(first, last) else None

    def around(self, undone: Undone) -> list[Span]:
        """The secrets of which a special character was escaped."""
        text, special, anchors = undone.text, self.special, self._anchors
        found: list[Span] = []
        for at, character in zip(undone.at, undone.characters, strict=True):
            if character in special:
                if (places := anchors.get(text[at : at + WINDOW])) is not None:
                    found += self._anchored(text, at, places)
                if at >= WINDOW and (places := anchors.get(text[at - WINDOW : at])) is not None:
                    found += self._anchored(text, at, places)
        return found

    def _anchored(self, text: str, at: int, places: int | dict[int, int]) -> Iterator[Span]:
        for packed in (places,) if isinstance(places, int) else tuple(places):
            start, length = at - (packed >> 20), packed & 0xFFFFF
            if start >= 0 and text[start : start + length] in self._words:
                yield start, start + length

    def ends(self, text: str) -> list[Span]:
        """What is left of secrets at the marks of cuts in the text."""
        entries = tuple(self.entries.values()) if self._pieces else ()
        return pieces_at_cuts(text, [form for entry in entries for form in entry.forms])

    # indexing

    def _index(self, secret: str) -> None:
        """Compare texts with this secret from now on."""
        self.pending.pop(secret, None)
        entry = _Entry()
        for line in (secret,) if PLAIN.fullmatch(secret) else lines_of(secret):
            is_same = SAME.fullmatch(line) is not None
            for form in readings(line):
                self._add(entry, form, is_same=is_same)
            if len(line) < BLOCK:
                written = {encode(line) for encode in ENCODINGS}
                entry.literals += [encoded for form in written for encoded in in_base64(form)]
        self.entries[secret] = entry

    def _add(self, entry: _Entry, form: str, *, is_same: bool) -> None:
        if self._pieces:
            entry.forms.append(form)
        if not is_same:
            self._anchor(entry, form)
        if len(form) < BLOCK or re.search(r"\s", form):
            entry.literals.append(form)
            self._changes += 1
            return
        self._letters.add(form)
        token = as_token(form) if is_same else None
        if token is not None and (self._pieces or token.signature):
            self._add_token(entry, token)
            return
        entry.words.append(form)
        self._words[form] += 1
        lengths = self._start(hash(form[:BLOCK])).lengths
        lengths[len(form)] = lengths.get(len(form), 0) + 1

    def _start(self, key: int) -> _Start:
        start = self.blocks.get(key)
        if not isinstance(start, _Start):
            start = self.blocks[key] = _Start(packed=start)
        return start

    def _add_token(self, entry: _Entry, token: Token) -> None:
        number = self._next_token
        self._next_token += 1
        entry.tokens.append(number)
        self._tokens[number] = token
        for offset in self._offsets(token):
            key, packed = hash(token.text[offset : offset + BLOCK]), number << 20 | offset
            found = self.blocks.get(key)
            if isinstance(found, _Start):
                found.packed = packed
            else:
                self.blocks[key] = packed

    def _offsets(self, token: Token) -> Iterable[int]:
        # Tokens begin alike, their signatures do not.
        return token.blocks() if self._pieces else (token.signature,)

    def _anchor(self, entry: _Entry, form: str) -> None:
        """Let the form be found from each kind of character that an encoder may escape."""
        entry.anchored.append(form)
        self._words[form] += 1
        for window, place, character in _anchors(form):
            known = self._anchors.setdefault(window, place)
            if known is not place:
                places = self._anchors[window] = {known: 1} if isinstance(known, int) else known
                places[place] = places.get(place, 0) + 1
            self.special.add(character)

    def _remove(self, entry: _Entry) -> None:
        for number in entry.tokens:
            token = self._tokens.pop(number)
            for offset in self._offsets(token):
                key, packed = hash(token.text[offset : offset + BLOCK]), number << 20 | offset
                found = self.blocks.get(key)
                if isinstance(found, _Start) and found.packed == packed:
                    found.packed = None
                elif found == packed:
                    del self.blocks[key]
        for form in entry.words:
            key = hash(form[:BLOCK])
            _drop_one(self._words, form)
            start = self._start(key)
            _drop_one(start.lengths, len(form))
            if not start.lengths:
                if start.packed is None:
                    del self.blocks[key]
                else:
                    self.blocks[key] = start.packed
        for form in entry.anchored:
            _drop_one(self._words, form)
            for window, place, _ in _anchors(form):
                known = self._anchors[window]
                if isinstance(known, dict):
                    _drop_one(known, place)
                if not known or isinstance(known, int):
                    del self._anchors[window]
        if entry.literals:
            self._changes += 1


def to_search(text: str, indexes: Sequence[SecretIndex]) -> list[SecretIndex]:
    """Those of the indexes that may have a secret in the text, prepared for it."""
    for index in indexes:
        if index.pending and (is_cut(text) or any(word[1] for word in PERHAPS_TOKEN.find(text))):
            for each in indexes:
                each.prepare()
            break
    return [index for index in indexes if index.entries]


class Search:
    """One search for the secrets of one or two indexes."""

    def __init__(self, text: str, indexes: Sequence[SecretIndex], letters: SecretCharacters) -> None:
        self._text = text
        self._indexes = indexes
        self._words = letters.words.find
        self._blocks = indexes[0].blocks, indexes[-1].blocks
        self._literals = [literals for index in indexes if (literals := index.literals())]
        self._special: Set[str] = indexes[0].special
        if len(indexes) > 1:
            self._special = indexes[0].special | indexes[1].special

    def find(self) -> list[Span]:
        """Start and end of each secret; they may overlap."""
        text = self._text
        found = self._plain(text)
        if self._special:
            found += self._escaped(text, 2)
        found += self._encoded(text)
        if is_cut(text):
            for index in self._indexes:
                found += index.ends(text)
        if "%2" in text:
            # A URL may escape the plus and the slash of base64.
            for word in ESCAPED_BASE64.find(text):
                undone = PERCENT.undo(word[0], frozenset("+/"))
                if undone is not None:
                    spans = _originals(undone, self._encoded(undone.text))
                    found += [(word.start() + start, word.start() + end) for start, end in spans]
        return found

    def _plain(self, text: str) -> list[Span]:
        found: list[Span] = []
        for literals in self._literals:
            found += literals.spans(text)
        first, second = self._blocks
        for word in self._words(text):
            at, end = word.span()
            while at <= end - BLOCK:
                # The hot loop: it runs once for each character.
                key = hash(text[at : at + BLOCK])
                if key in first or key in second:
                    spans = [span for index in self._indexes if (span := index.at(text, at, key))]
                    found += spans
                    at = max([at + 1, *(span[1] for span in spans)])
                else:
                    at += 1
        return found

    def _escaped(self, text: str, depth: int) -> list[Span]:
        """Secrets that are written with escapes, up to `depth` of them within each other."""
        special, found = self._special, list[Span]()
        wanted = special | SIGNS if depth > 1 else special
        for escape in ESCAPES:
            if escape is FORM and " " not in special:
                continue
            undone = escape.undo(text, wanted)
            if undone is not None:
                spans = self._escaped(undone.text, depth - 1) if depth > 1 else []
                for index in self._indexes:
                    spans += index.around(undone)
                found += _originals(undone, spans)
        return found

    def _encoded(self, text: str) -> list[Span]:
        """Secrets that are encoded in base64, at any alignment."""
        found = []
        for word in BASE64.find(text):
            if not word[1]:
                continue
            letters, first = word[1].translate(STANDARD), word.start()
            for shift in range(4):
                decoded = decoded_from(letters, shift)
                spans = self._plain(decoded)
                if self._special:
                    spans += self._escaped(decoded, 1)
                for start, end in spans:
                    upto = min(shift - (-end * 4 // 3), len(letters))
                    found.append((first + shift + start * 4 // 3, first + upto))
        return found


def _originals(undone: Undone, spans: Iterable[Span]) -> list[Span]:
    return [(undone.original(start), undone.original(end)) for start, end in spans]


def _anchors(form: str) -> Iterator[tuple[str, int, str]]:
    """For each kind of special character: the first one and those after it, its offset, the form's length.

    Those before it if it is one of the last.

    Encoders treat all characters of a kind alike.
    """
    seen: set[str] = set()
    for offset, character in enumerate(form):
        kind = "é" if not character.isascii() and character.isprintable() else character
        if kind in seen or SAME.fullmatch(character):
            continue
        seen.add(kind)
        first = offset if offset <= len(form) - WINDOW else offset - WINDOW
        yield form[first : first + WINDOW], offset << 20 | len(form), character


def _drop_one(counter: dict[Any, int], key: object) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
