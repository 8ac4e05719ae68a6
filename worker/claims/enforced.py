"""Enforced: a token that was verified and enforced, the only one that leaves `tokens`; how long it serves."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Self

from worker.claims.record import ClaimsRecord
from worker.clock import Clock
from worker.guard.claims import Claims
from worker.orgs import TokenWant
from worker.secret import AccessToken

# The smallest `max_claims_age` of a definition, in seconds.
MIN_CLAIMS_AGE = 60.0
# Seconds. An API that answers every token with 401 must not use up the budget of all orgs.
MINTED_SERVES = 2.0
# The last part of a token's life is not handed out: a share of it, and a maximum in seconds.
MARGIN_SHARE = 0.2
MAX_MARGIN = 30.0


def usable_life(lifetime: float) -> float:
    """The part of a token's life in which it is handed out; both in seconds."""
    return lifetime - min(MAX_MARGIN, MARGIN_SHARE * lifetime)


@dataclass(slots=True)
class Enforced:
    """A token that was verified and whose org, client and scopes were enforced; its times are monotonic.

    `minted` if a caller insisted on a new one. `record` is what its first run stored of its claims.
    """

    token: AccessToken
    claims: Claims = field(repr=False)
    credential_id: str
    received_at: float
    renew_at: float
    usable_until: float
    expires_at: float
    minted: bool
    record: ClaimsRecord | None = None

    @classmethod
    def of(
        cls,
        text: str,
        claims: Claims,
        clock: Clock,
        *,
        received_at: float | None = None,
        expires_in: float | None = None,
        credential_id: str = "",
        renewed_at_share: float = 1.0,
        minted: bool = False,
    ) -> Self:
        """A token received at a monotonic time, or now, to be renewed at a share of its usable life.

        `expires_in` is what the issuer said, in seconds from then; the earlier of it and the claims counts.
        """
        if received_at is None:
            received_at = clock.monotonic()
        now, age = clock.now(), clock.monotonic() - received_at
        left = (claims.expires_at - now).total_seconds()
        if expires_in is not None:
            left = min(left, expires_in - age)
        lifetime = age + left
        usable = usable_life(lifetime)
        return cls(
            token=AccessToken(text, now + timedelta(seconds=left)),
            claims=claims,
            credential_id=credential_id,
            received_at=received_at,
            renew_at=received_at + usable * renewed_at_share,
            usable_until=received_at + usable,
            expires_at=received_at + lifetime,
            minted=minted,
        )

    def is_alive(self, clock: Clock) -> bool:
        """Whether it has not expired on either clock: the monotonic one stops while a machine sleeps."""
        return clock.monotonic() < self.expires_at and clock.now() < self.token.expires_at

    def serves(self, want: TokenWant, now: float) -> bool:
        """Whether one that is alive is usable for long enough, and as new as required."""
        if want.fresh:
            return self.minted and now - self.received_at < MINTED_SERVES
        if want.max_age is not None:
            max_age = max(want.max_age.total_seconds(), MIN_CLAIMS_AGE)
            return now - self.received_at < max_age and now < self.usable_until
        return now < self.usable_until
