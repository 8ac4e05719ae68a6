"""The handler API: `@job`, `ctx`, claims and results, from their docstrings."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

import worker
from docs.generate.docstrings import attributes
from docs.generate.tables import code, sentence, table
from worker.handlers.context import Context
from worker.handlers.given import Cancellation, Org, ThisRun
from worker.handlers.job import Job, job

# What a handler may return or raise, importable from `worker`.
RESULTS = (
    *(worker.Retry, worker.Snooze, worker.Cancel, worker.HandBack, worker.PermanentError),
    worker.RateLimited,
)
# Called by the worker to stop a handler.
NOT_FOR_HANDLERS = (Cancellation.note, Cancellation.set)


def job_parameters() -> str:
    words = attributes(Job)
    rows = []
    for name, parameter in inspect.signature(job).parameters.items():
        default = "" if parameter.default is inspect.Parameter.empty else code(repr(parameter.default))
        rows.append((code(name), default, words[name][1]))
    return table(("parameter", "default", "meaning"), rows)


def context() -> str:
    """Return a table of the members of `ctx`, data before methods."""
    rows = [(code(f"ctx.{name}"), words) for name, (_, words) in _data(Context).items()]
    for name, owner in (("org", Org), ("run", ThisRun), ("cancelled", Cancellation)):
        rows += [(code(f"ctx.{name}.{each}"), words) for each, (_, words) in attributes(owner).items()]
    rows += [(code(call), words) for call, words in _calls(Cancellation, "ctx.cancelled")]
    rows += [(code(call), words) for call, words in _calls(Context, "ctx")]
    return table(("member", "meaning"), rows)


def members(owner: type) -> set[str]:
    """Return the public members of a class, including those set in `__init__`."""
    return {name for name in {*_data(owner), *dir(owner)} if not name.startswith("_")}


def claims() -> str:
    rows = [(code(f"ctx.claims.{name}"), words) for name, (_, words) in attributes(worker.Claims).items()]
    return table(("member", "meaning"), rows)


def results() -> str:
    rows = []
    for result in RESULTS:
        name = result.__name__
        shown = f"raise {name}(…)" if issubclass(result, Exception) else _call(name, result)
        rows.append((code(shown), " ".join((result.__doc__ or "").split())))
    return table(("result", "meaning"), rows)


def _data(owner: type) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for base in reversed(owner.__mro__):
        if base.__module__.partition(".")[0] == owner.__module__.partition(".")[0]:
            found |= attributes(base)
    return found


def _calls(owner: type, above: str) -> list[tuple[str, str]]:
    found = []
    for name in dict.fromkeys(name for base in reversed(owner.__mro__) for name in vars(base)):
        member = inspect.getattr_static(owner, name)
        if name.startswith("_") or not member.__doc__ or member in NOT_FOR_HANDLERS:
            continue
        if isinstance(member, property | cached_property):
            found.append((f"{above}.{name}", sentence(member.__doc__)))
        elif inspect.isfunction(member):
            wait = "await " if _is_awaited(member) else ""
            found.append((f"{wait}{above}.{_call(name, member)}", " ".join(member.__doc__.split())))
    return found


def _is_awaited(function: Any) -> bool:
    returned = str(inspect.signature(function).return_annotation)
    return inspect.iscoroutinefunction(function) or returned.startswith("Coroutine")


def _call(name: str, function: Any) -> str:
    shown = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name != "self":
            default = "" if parameter.default is inspect.Parameter.empty else f"={parameter.default!r}"
            stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
            shown.append(stars + parameter.name + default)
    return f"{name}({', '.join(shown)})"
