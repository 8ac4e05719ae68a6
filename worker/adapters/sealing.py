"""What a worker seals for the attempts on hosts, with the key ring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from worker.errors import ConfigurationError
from worker.tokens.sealing import KeyRing


@dataclass(frozen=True, slots=True)
class RingSealer:
    """Seals with the key ring; `ring` returns it, read again if it lacks the given key."""

    ring: Callable[[str | None], KeyRing | None]

    def seal(self, text: str, place: Sequence[object]) -> str:
        ring = self.ring(None)
        if ring is None:
            raise ConfigurationError(
                "without a key ring no run can execute on a host", fix="`python -m worker keys generate`"
            )
        return ring.seal_attempt(text, place)

    def open(self, sealed: str, place: Sequence[object]) -> str | None:
        ring = self.ring(sealed.partition(".")[0])
        return None if ring is None else ring.open_attempt(sealed, place)
