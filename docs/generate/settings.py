"""Settings: texts from config/worker.toml; types, bounds and variables from the models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from docs.generate.tables import code, table
from worker.model.definitions.units import format_duration
from worker.settings import PREFIX, Settings
from worker.settings import sections as types

SHIPPED = Path(__file__).parents[2] / "config" / "worker.toml"
HEAD = ("setting", "meaning", "default", "value", "variable")

# The kind of value, by annotation.
KINDS: dict[Any, str] = {
    bool: "true or false",
    float: "a number",
    int: "a whole number",
    str: "text",
    timedelta: "a duration",
    tuple[str, ...]: "a list of texts",
    dict[str, str]: "a table of texts",
    dict[str, bool | int | float | str]: "a table of values",
    dict[str, types.BoundVariable]: "a table of origins",
}


@dataclass
class Entry:
    """One setting with its text and its default, both as in config/worker.toml."""

    name: str
    default: str
    words: str


@dataclass
class Part:
    """A section of config/worker.toml with its introduction."""

    name: str
    words: str
    entries: list[Entry] = field(default_factory=list)


def settings() -> str:
    """Return a table for each section, in the order of the file."""
    text = ""
    for part in parts(SHIPPED.read_text(encoding="utf-8")):
        model, variable = _model(part.name)
        text += f"## {code(f'[{part.name}]') if part.name else 'Before the first section'}\n\n"
        text += f"{part.words}\n\n" if part.words else ""
        rows = [_row(entry, model.model_fields[entry.name], variable) for entry in part.entries]
        text += table(HEAD, rows) + "\n"
    return text.rstrip("\n") + "\n"


def parts(text: str) -> Iterator[Part]:
    """Yield the sections of the file, including the commented-out ones."""
    # The commented-out sections are nested: their comments begin with `# # `.
    text = re.sub(r"(?m)^# ((?:# |\[issuers|\[pools|\[batches|\w+ = ).*)$", r"\1", text)
    # The text above the first setting introduces the whole file.
    part, words = Part("", ""), list[str]()
    for line in text.splitlines():
        if line.startswith("#"):
            words.append(line[1:].removeprefix(" "))
        elif found := re.fullmatch(r"\[([\w.]+)\]", line):
            yield part
            part, words = Part(found[1], _joined(words)), []
        elif found := re.fullmatch(r"(\w+) = (.*)", line):
            part.entries.append(Entry(found[1], found[2], _joined(words)))
            words = []
        elif not part.entries and not part.name:
            words = []
    yield part


def _joined(lines: list[str]) -> str:
    """Join the text to one line, without examples, which are indented."""
    return " ".join(line for line in lines if line and not line.startswith(" "))


def _model(section: str) -> tuple[type[BaseModel], str]:
    if not section:
        return Settings, PREFIX
    model: type[BaseModel] = Settings
    names = section.split(".")
    if names[0] == "issuers":
        # The name of the issuer is the operator's.
        model, names = types.IssuerSettings, names[2:]
    if names[0:1] == ["pools"]:
        model, names = types.PoolSettings, names[2:]
    if names[0:1] == ["batches"]:
        model, names = types.BatchSettings, names[2:]
    for name in names:
        model = type(model.model_fields[name].default)
    return model, f"{PREFIX}{section.upper().replace('.', '__')}__"


def _row(entry: Entry, info: FieldInfo, variable: str) -> tuple[str, ...]:
    default = "none" if info.is_required() else code(entry.default)
    return (code(entry.name), entry.words, default, _value(info), code(variable + entry.name.upper()))


def _value(info: FieldInfo) -> str:
    """Return the kind of value with its bounds."""
    if get_origin(info.annotation) is Literal:
        return ", ".join(f'`"{choice}"`' for choice in get_args(info.annotation))
    kind = KINDS.get(info.annotation, "a list of tables")
    least = [_bound(item.ge) for item in info.metadata if getattr(item, "ge", None) is not None]
    above = [_bound(item.gt) for item in info.metadata if getattr(item, "gt", None) is not None]
    most = [_bound(item.le) for item in info.metadata if getattr(item, "le", None) is not None]
    bounds = [f"at least {bound}" for bound in least] + [f"above {bound}" for bound in above]
    return ", ".join([kind, *bounds, *(f"at most {bound}" for bound in most)])


def _bound(value: Any) -> str:
    return format_duration(value) if isinstance(value, timedelta) else f"{value:,}"
