"""Faults that a test may order; each happens once, at its place, counted over all attempts of the run."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from worker.execution.runners.contract import StopReason

Duration = timedelta | float | str


@dataclass(frozen=True, slots=True)
class _Timed:
    """When it happens: one of the two must be said."""

    after_save: int | None = None
    """Right after the checkpoint of that number, from 1."""
    after: Duration | None = None
    """So long after the run began: a timedelta, seconds, or text such as `90s`."""

    def __post_init__(self) -> None:
        if (self.after_save is None) == (self.after is None):
            raise ValueError(f"{type(self).__name__} needs after_save=N or after=DURATION, and not both")
        if self.after_save is not None and self.after_save < 1:
            raise ValueError("after_save counts from 1")


@dataclass(frozen=True, slots=True)
class Crash(_Timed):
    """The run's process is killed; the next attempt gets the checkpoint, as after a machine's death."""


@dataclass(frozen=True, slots=True)
class Stop(_Timed):
    """The run is asked to end, with the definition's `cancel_grace` to do so.

    A `drain` hands it back, after which another attempt goes on; `timeout` counts as a
    failure; for `cancel`, `suspended`, `replaced` and `closed` the run ends cancelled.
    """

    reason: StopReason = "cancel"
    """`cancel`, `drain`, `timeout`, `suspended`, `replaced` or `closed`."""


@dataclass(frozen=True, slots=True)
class ProviderDown:
    """The identity provider does not answer: the run waits, `no_token`, which counts as nothing."""

    after: int = 0
    """How many tokens it gives before."""
    times: int = 1
    """How many requests for a token it does not answer."""


@dataclass(frozen=True, slots=True)
class WrongOrg:
    """The provider gives a token of another org: the run ends `refused(org_mismatch)`."""

    org: str = "org_other"
    """The code of that org."""
    after: int = 0
    """How many right tokens it gives before."""


@dataclass(frozen=True, slots=True)
class SecretRotated:
    """The API turns down the token that the run has, as 401; a new one it takes."""

    after: int = 0
    """How many requests with a token it answers before."""


Fault = Crash | Stop | ProviderDown | WrongOrg | SecretRotated
