"""Egress: what a run may reach, as handlers, definitions and operators list it. Pure.

A list has `api` (the origins that the org's token may go to), `public` (any public address), `open` (today's
network), origins such as `https://api.openai.com`, and wildcards such as `https://*.example.com`. A handler
declares one, a definition narrows it and an operator caps it: a request must be allowed by each of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from worker.guard.urls import Origin, is_loopback, origin_of

if TYPE_CHECKING:
    from publicsuffixlist import PublicSuffixList

API = "api"
PUBLIC = "public"
OPEN = "open"
WORDS = (API, PUBLIC, OPEN)
# Items of a list, and characters of one.
MAX_ITEMS = 100
MAX_ITEM = 300
MAX_AUDIENCES = 20
_WILDCARD = re.compile(r"https://\*\.([a-z0-9-]+(?:\.[a-z0-9-]+)+)(?::(\d{1,5}))?/?")
_ORIGIN = re.compile(r"https?://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?/?")
EXAMPLE = (
    'write "api", "public", "open", or an origin such as https://api.openai.com or https://*.example.com'
)
AUDIENCE = 'write it as ["https://mcp.example.com"]'


@dataclass(frozen=True, slots=True)
class Rule:
    """One item of a list, read. `below` is a name whose subdomains it allows."""

    word: str = ""
    origin: Origin | None = None
    below: str = ""
    port: int = 0

    def allows(self, origin: Origin, api: Collection[Origin]) -> bool:
        if self.word:
            return self.word != API or origin in api
        if self.below:
            inside = origin.host.endswith(f".{self.below}")
            return inside and (origin.scheme, origin.port) == ("https", self.port)
        return origin == self.origin


def parse_item(text: object) -> Rule:
    """One item of a list. Raises ValueError that says what to write instead.

    Whether a wildcard's name is a public suffix is left to `check_wildcards`, which reads a long list.
    """
    if not isinstance(text, str) or not 0 < len(text) <= MAX_ITEM:
        raise ValueError(f"an item is not a text of 1 to {MAX_ITEM} characters; {EXAMPLE}")
    if text in WORDS:
        return Rule(word=text)
    lower = text.lower()
    if (found := _WILDCARD.fullmatch(lower)) is not None:
        port = int(found[2] or 443)
        if not 0 < port < 65536:
            raise ValueError(f"{text!r} has no valid port; {EXAMPLE}")
        return Rule(below=found[1], port=port)
    if _ORIGIN.fullmatch(lower) is None:
        raise ValueError(f"{text!r} is not allowed here; {EXAMPLE}")
    try:
        if urlsplit(lower).port == 0:
            raise ValueError
        origin = origin_of(lower)
    except ValueError:
        raise ValueError(f"{text!r} has no valid port; {EXAMPLE}") from None
    if origin.scheme == "http" and not is_loopback(origin.host):
        raise ValueError(f"{text!r} must be https; http is for loopback addresses only")
    return Rule(origin=origin)


def parse_items(texts: object) -> tuple[str, ...]:
    """A list as it is stored: checked, without repetition, in its order. Raises ValueError."""
    items = _listed(texts, EXAMPLE, MAX_ITEMS)
    for item in items:
        parse_item(item)
    return tuple(dict.fromkeys(items))


def parse_audiences(texts: object) -> tuple[str, ...]:
    """Audiences as they are stored: checked, without repetition, in their order. Raises ValueError."""
    found = _listed(texts, AUDIENCE, MAX_AUDIENCES)
    for one in found:
        if not isinstance(one, str) or not 0 < len(one) <= MAX_ITEM or not one.isprintable() or one.isspace():
            raise ValueError(f"an audience is a text of 1 to {MAX_ITEM} printable characters; {AUDIENCE}")
    return tuple(dict.fromkeys(found))


def _listed(texts: object, example: str, most: int) -> list[Any]:
    if isinstance(texts, str | Mapping) or not isinstance(texts, Iterable):
        raise ValueError(f"it must be a list of texts, not {type(texts).__name__}; {example}")
    # A set has another order in each process.
    items = sorted(texts, key=str) if isinstance(texts, set | frozenset) else list(texts)
    if len(items) > most:
        raise ValueError(f"it has more than {most} items")
    return items


def check_wildcards(items: Iterable[str]) -> None:
    """Raise ValueError for a wildcard at or above a public suffix: names below that belong to anyone.

    The list of public suffixes has a private section too, in which `s3.amazonaws.com` is (publicsuffix.org).
    So `https://*.amazonaws.com` is refused too: it has everyone's buckets.
    """
    for item in items:
        below = parse_item(item).below
        if below and (_suffixes().is_public(below) or below in _above()):
            raise ValueError(
                f"{item!r}: anyone can have a name below {below}, which is a public suffix or above one; "
                "write the origins, or a longer name"
            )


@cache
def _suffixes() -> PublicSuffixList:
    # Imported where a list has a wildcard: it takes 60 ms.
    from publicsuffixlist import PublicSuffixList

    return PublicSuffixList()


@cache
def _above() -> frozenset[str]:
    """The names above public suffixes."""
    from publicsuffixlist import PSLFILE

    found = set()
    for line in Path(PSLFILE).read_text("utf-8").splitlines():
        if line and not line.startswith("//"):
            labels = line.split()[0].lstrip("!").removeprefix("*.").split(".")
            found |= {".".join(labels[at:]) for at in range(1, len(labels))}
    return frozenset(found)


# Whose a list is, and where it is written.
Owner = Literal["handler", "definition", "operator"]
PLACES: Mapping[Owner, str] = {
    "handler": "egress of its @job(...)",
    "definition": "egress of its definition",
    "operator": "[execution] egress of worker.toml",
}


def not_listed(origin: str, owners: Iterable[Owner]) -> str:
    """What an error says of an origin that the lists of these owners deny; they may be unknown."""
    denied = f"{origin} is not in the egress list of this run"
    if origin.startswith("http:") and not is_loopback(origin_of(origin).host):
        return f"{denied}, and http can be listed for loopback addresses only: use https"
    places = " and to ".join(PLACES[owner] for owner in owners)
    if not places:
        places = f"{PLACES['handler']}, and to the lists that narrow it"
    return f'{denied}: add "{origin}" to {places}'


def denial(owners: Sequence[Owner]) -> str:
    """Why an origin was denied, in short: these owners' lists lack it."""
    places = " and ".join(PLACES[owner] for owner in owners)
    return f"not listed in {places}" if places else "not listed"


def deniers(message: str) -> tuple[Owner, ...]:
    """The owners that a message of `not_listed` names."""
    return tuple(owner for owner, place in PLACES.items() if place in message)


@dataclass(frozen=True, slots=True)
class Egress:
    """What one attempt may reach: each of `lists` has to allow it. Without any, it is `open`.

    `owners` are those of the lists; empty if a worker of an older release made it. With `reveal_token` a
    sealed run gets the org's token itself; without, a placeholder. `audiences` are those for which it may
    ask for another token.
    """

    lists: tuple[tuple[str, ...], ...] = ()
    reveal_token: bool = False
    audiences: tuple[str, ...] = ()
    owners: tuple[Owner, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether nothing is denied. A run that is not open is sealed."""
        return all(OPEN in items for items in self.lists)


# Of a run whose handler, definition and operator list nothing.
OPEN_EGRESS = Egress()


def effective(
    declared: Sequence[str] | None,
    narrowed: Sequence[str] | None,
    cap: Sequence[str] | None,
    *,
    required: bool,
) -> Mapping[Owner, tuple[str, ...]]:
    """The lists of an attempt by their owners.

    A list is None if its owner gives none. If the operator has `required` sealed runs, what declares
    nothing gets `["api"]`.
    """
    if required and declared is None and narrowed is None:
        declared = (API,)
    lists: Mapping[Owner, Sequence[str] | None] = {
        "handler": declared,
        "definition": narrowed,
        "operator": cap,
    }
    return {owner: tuple(items) for owner, items in lists.items() if items is not None}


def wider(items: Iterable[str], than: Collection[str]) -> Iterator[str]:
    """The items that allow something which no item of the other list does."""
    rules = [parse_item(item) for item in than]
    for item in items:
        if item not in than:
            rule = parse_item(item)
            if not any(_covers(outer, rule) for outer in rules):
                yield item


def is_wider(items: Iterable[str], than: Collection[str]) -> bool:
    return next(wider(items, than), None) is not None


def _covers(outer: Rule, inner: Rule) -> bool:
    """Whether an item allows all that another one does."""
    if outer.word:
        return outer.word in (OPEN, inner.word) or (outer.word == PUBLIC and not inner.word)
    if inner.origin is not None:
        return outer.allows(inner.origin, ())
    same_port = inner.port == outer.port
    below = inner.below == outer.below or inner.below.endswith(f".{outer.below}")
    return bool(inner.below and outer.below) and same_port and below


class Gate:
    """Says which origins the lists of one attempt allow, and which addresses are checked for them."""

    def __init__(
        self,
        lists: Sequence[Sequence[str]],
        api_origins: Iterable[str],
        private_origins: Iterable[str] = (),
        owners: Sequence[Owner] = (),
    ) -> None:
        self.api = frozenset(map(origin_of, api_origins))
        self._trusted = self.api | frozenset(map(origin_of, private_origins))
        self._lists = [[parse_item(item) for item in items] for items in lists]
        self._is_open = all(OPEN in items for items in lists)
        self._owners = owners

    def allows(self, origin: Origin) -> bool:
        """Whether each list has an item for the origin."""
        return all(self._allow(rules, origin) for rules in self._lists)

    def deniers(self, origin: Origin) -> list[Owner]:
        """The owners of the lists that deny the origin, as far as they are known."""
        owned = zip(self._owners, self._lists, strict=False)
        return [owner for owner, rules in owned if not self._allow(rules, origin)]

    def _allow(self, rules: Iterable[Rule], origin: Origin) -> bool:
        return any(rule.allows(origin, self.api) for rule in rules)

    def checks_address(self, origin: Origin, *, public: bool = False) -> bool:
        """Whether its addresses must be public: listing an origin exempts nothing from that.

        With `public` they must be in any case, as `ctx.public_http` promises.
        """
        return origin not in self._trusted and (public or not self._is_open)


@dataclass(frozen=True, slots=True)
class BoundSecret:
    """A secret that a run does not get: the broker puts `value` in the place of its placeholder.

    Only in headers of requests to `origin`; with `header` it sets that header itself.
    """

    name: str
    value: str = field(repr=False)
    origin: str
    header: str | None = None
    placeholder: str = ""


# How placeholders begin.
PLACEHOLDER = "orgworker-placeholder-"
# The name under which the placeholder of the org's token is made.
TOKEN = ""


def token_name(audience: str | None = None, resource: str | None = None) -> str:
    """The name under which the placeholder of a token for another audience or resource is made."""
    return f"audience\n{audience}" if audience else f"resource\n{resource}" if resource else TOKEN


def placeholder_of(run_id: str, name: str) -> str:
    """The text that a run gets in the place of a secret: one per run and name, on every attempt.

    Knowing it is worth nothing: the broker replaces only those that it was given for the same attempt.
    """
    digest = sha256(f"{run_id}\n{name}".encode()).hexdigest()
    return f"{PLACEHOLDER}{digest[:32]}"
