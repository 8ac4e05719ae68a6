"""`config`: the settings in force, and where each comes from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from worker.kit.output import Format
from worker.kit.session import Invocation, verb
from worker.telemetry.masking import shown_url

app = typer.Typer(help="The settings in force, from flags, variables, secret files and worker.toml.")

DEFAULT = "default"
# More settings that are secrets; with the deadman URL, anyone can silence the alarm.
_SECRET = ("headers", "deadman_url")
# URLs whose path can be a secret.
_SECRET_PATH = ("webhook_url", "endpoint")
# Lists of what is an origin or a wildcard, and has no place for a password.
_PLAIN = ("egress",)


@verb(app, "show")
def show(session: Invocation) -> None:
    """Print every setting with its value and its source; passwords and secrets are masked.

    With -o json, prints one object structured like worker.toml.
    """
    from worker.settings import check, gather

    said = gather(session.config, session.overrides)
    tree = masked(check(said).model_dump())
    if session.output is Format.JSON:
        session.print_row(tree)
        return
    rows = [
        {"setting": ".".join(keys), "value": value, "said_by": _source_of(said, keys)}
        for keys, value in _flat(tree)
    ]
    session.print_rows(rows, ("setting", "value", "said_by"), key="setting")


def masked(value: Any, key: str = "") -> Any:
    """The value without secrets and without passwords in URLs."""
    if isinstance(value, dict):
        return {name: masked(entry, name) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(entry if key in _PLAIN else masked(entry) for entry in value)
    if value and (key.endswith("_secret") or key in _SECRET):
        return "***"
    # A malformed URL is masked as one, too.
    if isinstance(value, str) and value and ("://" in value or key.endswith(("url", "endpoint"))):
        return shown_url(value, path=key not in _SECRET_PATH)
    return value


def _flat(tree: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, (*above, key))
        else:
            yield (*above, key), value


def _source_of(said: dict[tuple[str, ...], tuple[Any, str]], keys: tuple[str, ...]) -> str:
    # A variable can have the whole table in which a setting is; what comes last counts, as in `check`.
    sources = [where for named, (value, where) in said.items() if value != {} and keys[: len(named)] == named]
    return sources[-1] if sources else DEFAULT
