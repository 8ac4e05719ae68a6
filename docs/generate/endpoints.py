"""The endpoints of the API, besides its lists, and the tools for MCP clients."""

from __future__ import annotations

from docs.generate.tables import code, table
from worker.features.console.api import ENDPOINTS, LIST_ENDPOINTS
from worker.features.console.api.endpoints import Endpoint
from worker.features.console.mcp.tools import TOOLS

_PLACES = {
    "{run}": "ID",
    "{org}": "ORG",
    "{name}": "NAME",
    "{generation}": "GENERATION",
    "{rollout}": "ROLLOUT",
}


def endpoints() -> str:
    """Return a table of the endpoints with what they take and answer."""
    rows = [
        (code(f"{one.method} {_path(one)}"), _takes(one), _answers(one))
        for one in ENDPOINTS
        if one not in LIST_ENDPOINTS
    ]
    return table(("request", "takes", "does"), rows)


def tools() -> str:
    """Return a table of the tools for MCP clients with their arguments and what they answer."""
    rows = [
        (
            code(tool.name),
            ", ".join(map(code, tool.parameters["properties"])),
            _answers(tool.endpoint) if not tool.is_plan else f"Plans: {_answers(tool.endpoint)}",
        )
        for tool in TOOLS.values()
    ]
    return table(("tool", "arguments", "says"), rows)


def _path(one: Endpoint) -> str:
    path = one.path
    for name, place in _PLACES.items():
        path = path.replace(name, place)
    return path


def _takes(one: Endpoint) -> str:
    given = [code(field.name) for field in (*one.query, *one.headers)]
    if one.method == "PATCH":
        return ", ".join([*given, "the keys of a definition", code("reason")])
    return ", ".join([*given, *(code(field.name) for field in one.body or ())])


def _answers(one: Endpoint) -> str:
    status = "" if one.status == 200 else f" {one.status}."
    return f"{one.about.replace('|', '/')}{status}"
