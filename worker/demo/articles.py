"""The knowledge base of the demo: a few help articles for each org, the same at every start."""

from __future__ import annotations

from collections.abc import Sequence

TOPICS = (
    ("Resetting a password", "Open Settings, then Security, and choose Reset. A link arrives by mail."),
    ("Inviting a colleague", "An admin invites people under Members. An invitation is good for a week."),
    ("Exporting data", "Exports are made at night. The file can be fetched for seven days."),
    ("Changing the plan", "Plans change at once and are billed by the day. Nothing is lost on the way."),
    ("Connecting a calendar", "Calendars connect under Integrations. Only free and busy times are read."),
    ("Reporting a fault", "Write to support with the page's address. Most faults are mended in a day."),
    ("Deleting an account", "Deletion takes effect after thirty days. Until then it can be taken back."),
)


def articles_of(org_name: str, topics: Sequence[tuple[str, str]] = TOPICS) -> list[dict[str, str]]:
    """The articles of one org, with ids counted from 1."""
    return [
        {"id": f"kb-{number}", "title": f"{title} at {org_name}", "text": text}
        for number, (title, text) in enumerate(topics, start=1)
    ]
