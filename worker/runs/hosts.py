"""A host as the workers know it when it makes a call. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from worker.ids import WorkerId

# Handlers that one host may declare.
MOST_HANDLERS = 500


class TooManyHandlers(ValueError):
    """A host declares more handlers than are stored for one token; the message names the limit."""


@dataclass(frozen=True, slots=True)
class HostCaller:
    """A host that makes a call, and its incarnation: None if that is another host's or unknown.

    `ended` if the incarnation has ended, `moved` if it serves another pool than its host has now.
    """

    id: str
    name: str
    pool: str
    worker: WorkerId | None = None
    ended: bool = False
    moved: bool = False
    token_sha256: str = field(default="", repr=False)
