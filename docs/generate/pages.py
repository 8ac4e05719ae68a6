"""Pages with generated parts, between `<!-- generated: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from docs.generate import (
    builtin,
    commands,
    database,
    endpoints,
    files,
    handlers,
    lists,
    settings,
    signals,
    testing,
)

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = ROOT / "docs" / "reference" / "commands"

PARTS: Mapping[str, Callable[[], str]] = {
    "assistant-params": builtin.assistant_params,
    "assistant-settings": builtin.assistant_settings,
    "budget-keys": files.budget_keys,
    "calendar-keys": files.calendar_keys,
    "claims": handlers.claims,
    "commands": commands.index,
    "context": handlers.context,
    "database": database.database,
    "definition-keys": files.definition_keys,
    "endpoints": endpoints.endpoints,
    "mcp-tools": endpoints.tools,
    "events": signals.events,
    "exit-codes": commands.exit_codes,
    "http-request-params": builtin.http_request_params,
    "job": handlers.job_parameters,
    "limit-keys": files.limit_keys,
    "rollout-keys": files.rollout_keys,
    "list-columns": lists.columns,
    "list-parameters": lists.parameters,
    "metrics": signals.metrics,
    "org-keys": files.org_keys,
    "results": handlers.results,
    "rules": signals.rules,
    "settings": settings.settings,
    "testing-faults": testing.testing_faults,
    "testing-finished": testing.testing_finished,
} | {f"commands-{noun}": partial(commands.page, noun) for noun in commands.nouns()}
_PART = re.compile(r"^<!-- generated: ([\w-]+) -->\n.*?^<!-- end -->$", re.DOTALL | re.MULTILINE)


def new_pages() -> dict[Path, str]:
    """Return the pages of new nouns of the command line, to be filled by `renewed`."""
    return {
        page: f"# {commands.heading(noun)}\n\n<!-- generated: commands-{noun} -->\n<!-- end -->\n"
        for noun in commands.nouns()
        if not (page := COMMANDS / f"{noun}.md").exists()
    }


def renewed(page: str) -> str:
    """Return the page's text with its generated parts updated."""
    return _PART.sub(lambda found: f"<!-- generated: {found[1]} -->\n{PARTS[found[1]]()}<!-- end -->", page)


def parts_of(page: str) -> list[str]:
    """Return the names of a page's generated parts."""
    return [found[1] for found in _PART.finditer(page)]
