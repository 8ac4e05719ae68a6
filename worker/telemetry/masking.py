"""Masking: replaces every known secret and token in text, in all of its encodings.

A text that an org can read is masked with the secrets of that org, and with what is secret for all. An org
that chooses a text would otherwise find out which of its guesses is another org's secret.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from worker.ids import AllOrgs, OrgId
from worker.telemetry.cut_secrets import LEAST_PIECE, Span
from worker.telemetry.secret_forms import SHORTEST
from worker.telemetry.secret_index import Search, SecretCharacters, SecretIndex, to_search
from worker.telemetry.slices import SLICE

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
_LONG_ENOUGH = 12
_LONGER = 16


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
# Spans that are sorted in one step.
_FEW = 4 * 1024
# A secret, the org that it belongs to, and whether it is masked only in that org's texts.
_Key = tuple[str, OrgId | None, bool]


class Masker:
    """Replaces registered and held secrets in text; thread-safe.

    Keeps the last `limit` registered secrets, all held ones, and the last `kept` that were released, of
    private ones apart from others.

    A secret may belong to an org. One that is `private` is masked in the org's texts and in those for all
    orgs, such as the worker's log. All others are masked everywhere; pieces of them, which could be guessed
    one after another, only in the org's texts and in those for all orgs.
    """

    def __init__(self, limit: int = 50_000, kept: int = 1_000) -> None:
        self._limit = limit
        self._kept = kept
        self._lock = threading.Lock()
        self._letters = SecretCharacters()
        self.clear()

    def clear(self) -> None:
        """Forget every secret."""
        with self._lock:
            self._registered: OrderedDict[_Key, None] = OrderedDict()
            self._held: dict[_Key, int] = {}
            self._released: dict[bool, OrderedDict[_Key, None]] = {False: OrderedDict(), True: OrderedDict()}
            self._all = SecretIndex(self._letters, pieces=True)
            self._shared = SecretIndex(self._letters, pieces=False)
            self._orgs: dict[OrgId, SecretIndex] = {}

    def register(self, secret: str, org: OrgId | None = None, *, private: bool = False) -> None:
        """Mask this secret from now on; one shorter than six characters is ignored."""
        key = secret, org, private
        with self._lock:
            if key in self._registered:
                self._registered.move_to_end(key)
                return
            if len(secret.strip()) < SHORTEST:
                return
            self._begin(key)
            self._registered[key] = None
            while len(self._registered) > self._limit:
                self._end(self._registered.popitem(last=False)[0])

    def forget(self, secret: str, org: OrgId | None = None, *, private: bool = False) -> None:
        """Undo `register`."""
        key = secret, org, private
        with self._lock:
            if key in self._registered:
                del self._registered[key]
                self._end(key)

    def hold(
        self, secret: str, org: OrgId | None = None, *, private: bool = False, is_token: bool = False
    ) -> None:
        """Mask this secret until `release` is called as often, such as the token of a run.

        Cheap for a token: it is prepared only when a text might contain one. `is_token` says that it is
        one in base64, whose many characters are then not looked at.
        """
        key = secret, org, private
        with self._lock:
            holders = self._held.get(key, 0)
            if not holders:
                if len(secret.strip()) < SHORTEST:
                    return
                released = self._released[private]
                if key in released:
                    del released[key]
                else:
                    self._begin(key, is_token=is_token)
            self._held[key] = holders + 1

    def release(self, secret: str, org: OrgId | None = None, *, private: bool = False) -> None:
        """End a `hold`. The secrets released last are still masked: output may come late."""
        key = secret, org, private
        with self._lock:
            holders = self._held.get(key, 0)
            if holders > 1:
                self._held[key] = holders - 1
            elif holders:
                del self._held[key]
                released = self._released[private]
                released[key] = None
                if len(released) > self._kept:
                    self._end(released.popitem(last=False)[0])

    def note(self, secret: str, org: OrgId | None = None) -> None:
        """Mask this secret for now, as one that was just released."""
        self.hold(secret, org)
        self.release(secret, org)

    def mask(self, text: str, org: OrgId | AllOrgs | None) -> str:
        """The text with every secret replaced by `[masked]`; JSON stays JSON.

        `org` is whose text it is: that of a run or of an answer to it, ALL_ORGS for what only operators
        read, None for what any org may read.
        """
        if len(text) <= LEAST_PIECE:
            return text
        indexes = to_search(text, self._indexes(org))
        found = Search(text, indexes, self._letters).find() if indexes else None
        if not found:
            return text
        parts, at = [], 0
        for start, end in _in_order(found):
            if start >= at:
                parts += [text[at:start], MASK]
            at = max(at, end)
        return "".join([*parts, text[at:]])

    def _indexes(self, org: OrgId | AllOrgs | None) -> list[SecretIndex]:
        if isinstance(org, AllOrgs):
            return [self._all]
        own = None if org is None else self._orgs.get(org)
        return [self._shared] if own is None else [self._shared, own]

    def _begin(self, key: _Key, *, is_token: bool = False) -> None:
        secret, org, private = key
        self._all.add(secret, is_token=is_token)
        if not private:
            self._shared.add(secret, is_token=is_token)
        if org is not None:
            if org not in self._orgs:
                self._orgs[org] = SecretIndex(self._letters, pieces=True)
            self._orgs[org].add(secret, is_token=is_token)

    def _end(self, key: _Key) -> None:
        """Drop one reason to mask a secret."""
        secret, org, private = key
        self._all.remove(secret)
        if not private:
            self._shared.remove(secret)
        if org is not None:
            self._orgs[org].remove(secret)
            if not self._orgs[org]:
                del self._orgs[org]


def _in_order(spans: list[Span]) -> Iterator[Span]:
    """The spans, sorted a few at once: a hostile text may have 200,000."""
    if len(spans) < _FEW:
        return iter(sorted(spans))
    places: dict[int, list[Span]] = {}
    for span in spans:
        places.setdefault(span[0] // SLICE, []).append(span)
    return (span for place in sorted(places) for span in sorted(places[place]))


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
