"""The ways in which a secret may be written, and which piece of a token or URL gives something away."""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
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
