"""`config`: the settings in force, and who said each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer

from worker.cli.options import OutputOption
from worker.cli.output import Format, print_row, print_rows
from worker.cli.session import session_of

app = typer.Typer(help="The settings in force, from flags, variables, secret files and worker.toml.")

DEFAULT = "default"
# Settings that are a secret by another name: whoever knows a dead man's URL can keep it quiet.
_SECRET = ("headers", "deadman_url")
# The password of a URL's authority, and those that libpq takes in its query.
_PASSWORD = re.compile(r"(//[^/?#@]*?:)[^/?#]*(@)|([?&](?:ssl)?password=)[^&#]*")


@app.command("show")
def show(context: typer.Context, output: OutputOption = Format.TABLE) -> None:
    """Print every setting with its value and who said it; passwords and secrets are masked.

    With -o json one object, as worker.toml has it.
    """
    from worker.settings import check, gather

    session = session_of(context)
    said = gather(session.config, session.overrides)
    tree = masked(check(said).model_dump())
    if output is Format.JSON:
        print_row(tree, output)
        return
    rows = [
        {"setting": ".".join(keys), "value": value, "said_by": _said_by(said, keys)}
        for keys, value in _flat(tree)
    ]
    print_rows(rows, output, columns=("setting", "value", "said_by"), key="setting")


def masked(value: Any) -> Any:
    """The value with no password in any URL, and no secret of a setting that is one."""
    if isinstance(value, dict):
        return {
            key: "***" if entry and (key.endswith("_secret") or key in _SECRET) else masked(entry)
            for key, entry in value.items()
        }
    if isinstance(value, str):
        return _PASSWORD.sub(lambda found: f"{found[1] or found[3]}***{found[2] or ''}", value)
    return value


def _flat(tree: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, (*above, key))
        else:
            yield (*above, key), value


def _said_by(said: dict[tuple[str, ...], tuple[Any, str]], keys: tuple[str, ...]) -> str:
    return said[keys][1] if keys in said else DEFAULT
