"""Ceiling: what a handler that a host declares may get in a pool, and what goes beyond it. Pure.

Without an approval that is nothing beyond the defaults: no secrets, scopes, audiences and children of the
handler's own, no egress but `api`, and the default timeout and attempts. What the workers themselves declare
of the handler, and what an administrator approved for it in that pool, is added.

A host that declares no egress claims nothing: its runs get what workers declare of the handler, or what is
approved, and only if neither lists anything what `[execution] network` says of undeclared ones. So neither a
plug-in that drops its list nor a host that leaves it out reaches more than before.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Self

from worker.handlers.catalogue import HandlerEntry
from worker.model.definitions import MAX_ATTEMPTS, TIMEOUT
from worker.model.definitions.units import format_duration, parse_duration
from worker.model.egress import API, is_wider

# Of the digest and of a stored ceiling. A field that a later version adds is not approved by this one.
VERSION = 1
# Hexadecimal digits of a digest: a host could search two declarations that share a shorter one.
DIGITS = 40

SECRETS = "secrets"
SCOPES = "scopes"
TIMEOUT_KEY = "timeout"
ATTEMPTS = "max_attempts"
CONCURRENCY = "max_concurrent"
EGRESS = "egress"
AUDIENCES = "audiences"
CHILDREN = "children"
KEYS = (SECRETS, SCOPES, EGRESS, AUDIENCES, CHILDREN, TIMEOUT_KEY, ATTEMPTS, CONCURRENCY)
# A definition decides these for its runs, if it sets them: the handler's value is only a default.
OF_DEFINITIONS = frozenset({SCOPES, TIMEOUT_KEY, ATTEMPTS})


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What a handler declares for itself, or may.

    `max_concurrent` is None without a limit, `egress` if nothing is listed.
    """

    secrets: frozenset[str] = frozenset()
    scopes: frozenset[str] = frozenset()
    timeout: timedelta = TIMEOUT
    max_attempts: int = MAX_ATTEMPTS
    max_concurrent: int | None = None
    egress: frozenset[str] | None = None
    audiences: frozenset[str] = frozenset()
    children: frozenset[str] = frozenset()

    @classmethod
    def of(cls, entry: HandlerEntry) -> Self:
        """What a handler declares; what it leaves out is the default."""
        return cls.from_json({key: value for key in KEYS if (value := getattr(entry, key)) is not None})

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """A stored ceiling; a field that it lacks is the default."""
        egress = stored.get(EGRESS)
        return cls(
            frozenset(stored.get(SECRETS, ())),
            frozenset(stored.get(SCOPES, ())),
            _timeout(stored.get(TIMEOUT_KEY)),
            stored.get(ATTEMPTS) or MAX_ATTEMPTS,
            stored.get(CONCURRENCY),
            None if egress is None else frozenset(egress),
            frozenset(stored.get(AUDIENCES, ())),
            frozenset(stored.get(CHILDREN, ())),
        )

    def as_json(self) -> dict[str, Any]:
        # What declares none of these has the digest that it had before they were there.
        later = {EGRESS: None if self.egress is None else sorted(self.egress)}
        later[AUDIENCES] = sorted(self.audiences) or None
        later[CHILDREN] = sorted(self.children) or None
        return {
            "version": VERSION,
            SECRETS: sorted(self.secrets),
            SCOPES: sorted(self.scopes),
            TIMEOUT_KEY: format_duration(self.timeout),
            ATTEMPTS: self.max_attempts,
            CONCURRENCY: self.max_concurrent,
            **{key: items for key, items in later.items() if items is not None},
        }

    def fills(self, egress: Sequence[str] | None) -> tuple[str, ...] | None:
        """The egress of a handler that declares this one: what is listed here, if it declares none."""
        if egress is not None:
            return tuple(egress)
        return None if self.egress is None else tuple(sorted(self.egress))


def _timeout(text: str | None) -> timedelta:
    """A declared timeout; the default for none, and for one that no attempt could have."""
    with suppress(ValueError):
        return TIMEOUT if text is None else parse_duration(text)
    return TIMEOUT


def digest(pool: str, handler: str, ceiling: Ceiling) -> str:
    """What an administrator approves: the same for every host of the pool that declares the same."""
    content = {"pool": pool, "handler": handler, **ceiling.as_json()}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"{VERSION}-{hashlib.sha256(text.encode()).hexdigest()[:DIGITS]}"


def approve_command(pool: str, handler: str, ceiling: Ceiling) -> str:
    """The command that approves a declaration."""
    return f"pools approve {pool} {shlex.quote(handler)} {digest(pool, handler, ceiling)}"


def allowed(workers: Ceiling | None = None, approved: Ceiling | None = None) -> Ceiling:
    """The ceiling of a handler in a pool: the defaults, what workers declare of it, and what is approved."""
    given = [one for one in (workers, approved) if one is not None]
    limits = [one.max_concurrent for one in given]
    lists = [one.egress for one in given if one.egress is not None]
    return Ceiling(
        frozenset[str]().union(*(one.secrets for one in given)),
        frozenset[str]().union(*(one.scopes for one in given)),
        max([TIMEOUT, *(one.timeout for one in given)]),
        max([MAX_ATTEMPTS, *(one.max_attempts for one in given)]),
        max((most for most in limits if most is not None), default=None) if None not in limits else None,
        frozenset[str]().union(*lists) if lists else None,
        frozenset[str]().union(*(one.audiences for one in given)),
        frozenset[str]().union(*(one.children for one in given)),
    )


def excess(declared: Ceiling, ceiling: Ceiling) -> frozenset[str]:
    """The keys in which a declaration goes beyond a ceiling."""
    most = ceiling.max_concurrent
    beyond = {
        SECRETS: not declared.secrets <= ceiling.secrets,
        SCOPES: not declared.scopes <= ceiling.scopes,
        EGRESS: is_wider(declared.egress or (), _listed(ceiling)),
        AUDIENCES: not declared.audiences <= ceiling.audiences,
        CHILDREN: not declared.children <= ceiling.children,
        TIMEOUT_KEY: declared.timeout > ceiling.timeout,
        ATTEMPTS: declared.max_attempts > ceiling.max_attempts,
        CONCURRENCY: most is not None and (declared.max_concurrent is None or declared.max_concurrent > most),
    }
    return frozenset(key for key, is_beyond in beyond.items() if is_beyond)


def _listed(ceiling: Ceiling) -> frozenset[str]:
    """What a ceiling lists, and `api`: the token goes there in any case."""
    return frozenset([API]) | (ceiling.egress or frozenset())


def clamped(entry: HandlerEntry, ceiling: Ceiling) -> HandlerEntry:
    """The entry without what goes beyond the ceiling, whatever becomes of its runs."""
    keys = excess(Ceiling.of(entry), ceiling)
    egress = ceiling.fills(entry.egress)
    if egress is not None and EGRESS in keys:
        listed = _listed(ceiling)
        egress = tuple(item for item in egress if item in listed)
    return replace(
        entry,
        secrets=tuple(name for name in entry.secrets if name in ceiling.secrets),
        scopes=tuple(scope for scope in entry.scopes if scope in ceiling.scopes),
        timeout=format_duration(ceiling.timeout) if TIMEOUT_KEY in keys else entry.timeout,
        max_attempts=ceiling.max_attempts if ATTEMPTS in keys else entry.max_attempts,
        max_concurrent=ceiling.max_concurrent if CONCURRENCY in keys else entry.max_concurrent,
        egress=egress,
        audiences=tuple(one for one in entry.audiences if one in ceiling.audiences),
        children=tuple(one for one in entry.children if one in ceiling.children),
    )


def may_run(
    beyond: Collection[str], own: Mapping[str, Any], *, scopes: Collection[str], is_variant: bool = False
) -> bool:
    """Whether a run may be of a handler that goes beyond its ceiling in these keys.

    It may if its definition sets all of them, so that the handler's values are not used: `own` has the values
    of the definition by key, or its spec. A variant takes its limits from the definition's handler, and adds
    the `scopes` that it declares: the definition must list them.
    """
    if not OF_DEFINITIONS.issuperset(beyond):
        return False
    if is_variant:
        return SCOPES not in beyond or set(own.get(SCOPES) or ()).issuperset(scopes)
    return all(own.get(key) is not None for key in beyond)


@dataclass(frozen=True, slots=True)
class Grant:
    """What an incarnation of a host may do with a handler that it declares.

    `entry` is within the ceiling, `beyond` are the keys in which the declaration is not. `scopes` are those
    that it declares, `command` approves it.
    """

    entry: HandlerEntry
    beyond: frozenset[str] = frozenset()
    scopes: frozenset[str] = frozenset()
    command: str = ""

    @classmethod
    def of(
        cls, pool: str, declared: HandlerEntry, workers: HandlerEntry | None, approved: Ceiling | None
    ) -> Self:
        """The grant of a declaration, where workers have the same handler or an administrator approved one.

        What workers declare is used where the host declares no more than that; a narrower egress stays.
        """
        own, of_workers = Ceiling.of(declared), None if workers is None else Ceiling.of(workers)
        ceiling = allowed(of_workers, approved)
        egress = ceiling.fills(declared.egress)
        if workers is not None and not excess(own, allowed(of_workers)):
            return cls(replace(workers, egress=egress))
        keys = excess(own, ceiling)
        if not keys:
            return cls(replace(declared, egress=egress))
        return cls(clamped(declared, ceiling), keys, own.scopes, approve_command(pool, declared.name, own))

    def may_run(self, own: Mapping[str, Any], *, is_variant: bool = False) -> bool:
        """Whether a run may be of it whose definition sets these values."""
        return may_run(self.beyond, own, scopes=self.scopes, is_variant=is_variant)


@dataclass(frozen=True, slots=True)
class Offered:
    """What an incarnation of a host may do with the handlers that it declares, by name.

    Those in `free` it may run for all definitions, those in `conditional` only for some. `admitted` are those
    of them that are due for such a definition.
    """

    pool: str
    grants: Mapping[str, Grant]
    admitted: frozenset[str] = frozenset()

    @property
    def free(self) -> list[str]:
        return [name for name, grant in self.grants.items() if not grant.beyond]

    @property
    def conditional(self) -> list[str]:
        return [name for name, one in self.grants.items() if one.beyond and one.beyond <= OF_DEFINITIONS]
