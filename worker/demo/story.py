"""The demo's narrator: a line for each change of a run's state, and once for each org what it means."""

from __future__ import annotations

from collections import Counter

from worker.clock import Clock, to_text
from worker.demo.changes import Change, Journal

COLUMNS = ("time", "org", "definition", "state", "reason", "detail")


class Narrator:
    """Prints each change of a run's state, and once for each org what it means."""

    def __init__(self, journal: Journal, clock: Clock, started: float) -> None:
        self._journal = journal
        self._clock = clock
        self._started = started
        self._explained: set[tuple[str, str, str | None]] = set()
        self._ends: Counter[tuple[str, str]] = Counter()
        self._latest: dict[str, Change] = {}
        self._succeeded = False

    def narrate(self) -> None:
        for change in self._journal.read():
            at = to_text(self._clock.now())[:-4] + "Z"
            print(
                line_of(at, change.org, change.definition, change.state, change.reason, change.detail),
                flush=True,
            )
            self._latest[change.org] = change
            if change.state not in ("waiting", "running"):
                self._ends[change.org, change.state] += 1
            key = (change.org, change.state, change.reason)
            if key not in self._explained:
                self._explained.add(key)
                self._explain(change)

    def _explain(self, change: Change) -> None:
        handler, handler_started = self._journal.last_attempt(change.run_id) or ("", False)
        if change.state == "succeeded":
            if not self._succeeded:
                self._succeeded = True
                elapsed = self._clock.monotonic() - self._started
                say(f"the first run succeeded {elapsed:.1f} s after the worker's start")
            which = "on: the new agent" if handler.endswith("_v2") else "off: the old agent"
            say(f"{change.org}: the flag agent-v2 is {which}, {handler}, answered")
        elif change.state == "refused":
            began = "was started" if handler_started else "was not started"
            say(f"{change.org}: the provider answered with a token of another org; the handler {began}")
        elif change.reason == "no_token":
            say(f"{change.org}: the provider no longer takes its secret; its runs wait. What to do:")
            say(
                f"    python -m worker credentials add {change.org}"
                f" --client-id m2m-{change.org} --secret-file FILE"
            )

    def sum_up(self) -> None:
        """What came of each org's runs; of one that none has ended for, where it stands."""
        for org, latest in sorted(self._latest.items()):
            ends = [f"{count} {state}" for (of, state), count in sorted(self._ends.items()) if of == org]
            say(f"{org}: {', '.join(ends) or f'still {latest.state} ({latest.reason})'}")


def say(text: str) -> None:
    print(f"# {text}", flush=True)


def line_of(time: str, org: str, definition: str, state: str, reason: str | None, detail: str | None) -> str:
    """One line in columns; an empty one shows as a dash."""
    flat = " ".join((detail or "-").split())
    return f"{time:<24}  {org:<12}  {definition:<14}  {state:<9}  {reason or '-':<16}  {flat}"
