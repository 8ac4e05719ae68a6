"""Requests and results at rest: compressed, then sealed for their row."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from worker.ids import OrgId, RunId
from worker.tokens.sealing import KeyRing

What = Literal["request", "result"]
LEVEL = 6


@dataclass(frozen=True, slots=True)
class Sealer:
    """Seals with the key ring; `ring` returns it, read again if it lacks the given key."""

    ring: Callable[[str | None], KeyRing | None]

    def seal(self, what: What, text: str, *, item: str, org: OrgId, run: RunId) -> bytes | None:
        """The text, which opens for this row only; None without a key ring."""
        ring = self.ring(None)
        if ring is None:
            return None
        return ring.seal_request(zlib.compress(text.encode(), LEVEL), (what, org, run, item))

    def open(self, what: What, sealed: bytes | None, *, item: str, org: OrgId, run: RunId) -> str | None:
        """The text; None if it does not open: its key is gone, or it was sealed for another row."""
        if sealed is None:
            return None
        ring = self.ring(sealed.partition(b".")[0].decode("ascii", "replace"))
        opened = None if ring is None else ring.open_request(sealed, (what, org, run, item))
        if opened is None:
            return None
        # Sealed by this installation: it is what was compressed.
        return zlib.decompress(opened).decode()
