"""Addresses of the console: the page of an org or a definition, and searches with their filters."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime, timedelta
from urllib.parse import quote, urlencode

from worker.model.runs.next_steps import NextStep
from worker.model.search import quoted
from worker.store.lists.failures import cause_term


def org_path(org: str) -> str:
    """The address of an org's page."""
    return f"/orgs/{quote(org, safe='')}"


def definition_path(org: str, name: str) -> str:
    """The address of a definition's page."""
    return f"{org_path(org)}/definitions/{quote(name, safe='')}"


def search_path(text: str) -> str:
    """The address of a search."""
    return f"/search?{urlencode({'q': text})}"


def search_of(*terms: tuple[str, str]) -> str:
    """The address of the search for runs with these keys and values, those without a value left out."""
    return search_path(" ".join(f"{key}:{quoted(value)}" for key, value in terms if value))


def step_path(step: NextStep) -> str:
    """The address of the page for a next step."""
    verb = step.declared
    if verb.search:
        terms = [(key, value.format_map(step.subject)) for key, value in verb.search]
        return search_path(" ".join(f"{key}:{quoted(value)}" if key else value for key, value in terms))
    return verb.page.format_map({name: quote(value, safe="") for name, value in step.subject.items()})


def cause_path(cause: str) -> str:
    """The search for the runs that failed with a cause."""
    return search_path(cause_term(cause))


def hour_path(hour: datetime, by_state: Mapping[str, int]) -> str:
    """The search for the runs made in an hour, of those that failed or were refused if there are any."""
    harmed = [state for state in ("failed", "refused") if by_state.get(state)]
    until = hour + timedelta(hours=1)
    return search_of(
        ("state", ",".join(harmed)),
        ("since", f"{hour:%Y-%m-%dT%H:%MZ}"),
        ("until", f"{until:%Y-%m-%dT%H:%MZ}"),
    )


def day_path(org: str, definition: str, day: date, worst: str) -> str:
    """The search for a definition's runs of a UTC day, or only for the failed or refused ones, if any."""
    harmed = worst if worst in ("failed", "refused") else ""
    since, until = (f"{one:%Y-%m-%d}T00:00Z" for one in (day, day + timedelta(days=1)))
    return search_of(
        ("org", org), ("definition", definition), ("state", harmed), ("since", since), ("until", until)
    )
