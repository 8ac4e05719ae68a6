"""What tokens have said, for a batch of attempts: it comes, and is parsed, once for each token."""

from __future__ import annotations

from collections.abc import Sequence

from worker.runs.outcome import Trail
from worker.store.engine import shared_json
from worker.store.sql.postgresql.arrays import numbers, texts


class Said:
    """`columns` are the tokens' numbers, claims, flags, jti and hashes; `places` each attempt's number."""

    def __init__(self, trails: Sequence[Trail]) -> None:
        said = {_token(trail): trail for trail in trails}
        place_of = {token: place for place, token in enumerate(said, 1)}
        tokens = said.values()
        self.places = numbers(place_of[_token(trail)] for trail in trails)
        self.columns = (
            numbers(place_of.values()),
            texts(None if trail.claims is None else shared_json(trail.claims) for trail in tokens),
            texts(None if trail.flags is None else shared_json(trail.flags) for trail in tokens),
            texts(trail.jti for trail in tokens),
            texts(trail.claims_hash for trail in tokens),
        )


def _token(trail: Trail) -> tuple[int, int, str | None, str | None]:
    """What tells one token's words from another's: they are the same objects in each of its attempts."""
    return id(trail.claims), id(trail.flags), trail.jti, trail.claims_hash
