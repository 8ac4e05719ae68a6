"""`@job`: declares a function as a handler, with its models, scopes and defaults."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from worker.model.egress import OPEN, parse_audiences, parse_items
from worker.model.runs.children import MAX_CHILD_HANDLERS

if TYPE_CHECKING:
    from pydantic import BaseModel

HANDLER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
SECRET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
# Secrets of one handler, and the bytes of a value.
MAX_SECRETS = 20
MAX_SECRET_BYTES = 16 * 1024
MAX_DESCRIPTION = 200
# Where a sentence ends: not after "e.g.", which goes on in lower case.
_END = re.compile(r"(?<=[.!?])\s++(?![a-z])")


@dataclass(eq=False, repr=False)
class Job:
    """A handler as its author declared it. Calling it calls the function, which tests use."""

    function: Callable[[Any], Any]
    name: str
    """The name of the handler and of its entry point: letters, digits, `.`, `_` and `-`."""
    params: type[BaseModel] | None = None
    """A pydantic model of the definition's params; without one `ctx.params` is a plain mapping."""
    settings: type[BaseModel] | None = None
    """A pydantic model of the token's properties, over its defaults; without one a plain mapping."""
    scopes: frozenset[str] = frozenset()
    """The scopes requested for its token, all required, unless the definition names others."""
    timeout: str | None = None
    """Maximum duration of an attempt, such as `2h`; default an hour. The definition overrides it."""
    max_attempts: int | None = None
    """Attempts that may fail, time out or ask for a retry; default 3. The definition overrides it."""
    isolation: Literal["child", "inline"] = "child"
    """`child`: a process of its own; `inline`: an async task of the worker, if the operator allows it."""
    memory: str | None = None
    """Memory limit of a run, such as `512MiB`; default unlimited. The definition overrides it."""
    max_concurrent: int | None = None
    """Maximum concurrent runs of the handler, over all workers and orgs; default unlimited."""
    state: bool = False
    """Whether it uses `ctx.state`, which a definition with `overlap = "allow"` cannot have."""
    checkpoint: type[BaseModel] | None = None
    """A pydantic model of its checkpoints; without one `ctx.checkpoint` is plain JSON data."""
    pool: str | None = None
    """The pool that its runs execute in; default the org's, else `default`. The definition overrides it, and
    a host's is ignored."""
    secrets: frozenset[str] = frozenset()
    """The org's secrets that it gets as `ctx.secret(NAME)`; a run whose org lacks one is refused."""
    egress: tuple[str, ...] | None = None
    """What its runs may reach: `"api"` (the `api_origins`), `"public"` (any public address), `"open"` and
    origins such as `https://api.openai.com` or `https://*.example.com`. None declares nothing."""
    audiences: tuple[str, ...] = ()
    """The audiences for which it may ask for another token, by `ctx.token(audience=…)`."""
    children: frozenset[str] = frozenset()
    """The handlers that it may start, by `ctx.start`; none of them gets more than this one has."""
    keep_children: bool = False
    """Whether children that wait go on if it fails; by default they are cancelled."""

    def __post_init__(self) -> None:
        self.__name__ = getattr(self.function, "__name__", self.name)
        self.__doc__ = self.function.__doc__
        self.__wrapped__ = self.function

    @cached_property
    def is_async(self) -> bool:
        """Whether the handler is awaited with a `Context`; else it gets a `BlockingContext`."""
        return inspect.iscoroutinefunction(self.function)

    def __call__(self, ctx: Any) -> Any:
        return self.function(ctx)

    def __repr__(self) -> str:
        return f"<Job {self.name}>"

    @property
    def description(self) -> str | None:
        """The first sentence of its docstring, or None."""
        paragraph, *_ = re.split(r"\n\s*\n", str(self.__doc__ or "").strip(), maxsplit=1)
        return one_line(_END.split(paragraph, maxsplit=1)[0])

    def params_schema(self) -> dict[str, Any] | None:
        """The JSON Schema of a definition's params, or None if any are valid."""
        if self.params is None:
            return None
        schema = self.params.model_json_schema()
        if self.params.model_config.get("extra") != "allow":
            schema["additionalProperties"] = False  # so a misspelt param is an error on apply
        return schema

    def settings_schema(self) -> dict[str, Any] | None:
        """The JSON Schema of the settings that are read from a token's properties."""
        return None if self.settings is None else self.settings.model_json_schema()


def one_line(text: str | None) -> str | None:
    """A description as it is stored: printable, in one line, of at most MAX_DESCRIPTION characters."""
    if text is None:
        return None
    # What is cut off anyway is not looked at: a host may declare anything.
    start = "".join(char if char.isprintable() else " " for char in text[: 4 * MAX_DESCRIPTION])
    line = " ".join(start.split())
    return (line if len(line) <= MAX_DESCRIPTION else f"{line[: MAX_DESCRIPTION - 1]}…") or None


def job(
    name: str,
    *,
    params: type[BaseModel] | None = None,
    settings: type[BaseModel] | None = None,
    scopes: Iterable[str] = (),
    timeout: str | None = None,
    max_attempts: int | None = None,
    isolation: Literal["child", "inline"] = "child",
    memory: str | None = None,
    max_concurrent: int | None = None,
    state: bool = False,
    checkpoint: type[BaseModel] | None = None,
    pool: str | None = None,
    secrets: Iterable[str] = (),
    egress: Iterable[str] | None = None,
    audiences: Iterable[str] = (),
    children: Iterable[str] = (),
    keep_children: bool = False,
) -> Callable[[Callable[..., Any]], Job]:
    """Declare a handler; register it as an entry point of group `worker.jobs` under `name`.

    `params` and `settings` are pydantic models: of the definition's params, and of
    the token's properties over the model's defaults. `timeout` is text such as `2h`,
    `memory` such as `512MiB`; `max_concurrent` holds over all workers. With `state` the
    handler has `ctx.state`; `checkpoint` is the pydantic model of what it saves. `pool` names where its
    runs execute, such as `eu-gpu`. `secrets` are names of the org's own secrets, for `ctx.secret`.
    `egress` lists what a run may reach, `audiences` those of other tokens that it may ask for. `children` are
    the handlers that it may start; with `keep_children` those that wait go on if it fails.

    Raises:
        TypeError: the declaration is invalid, such as an inline handler that is not async.
    """
    if not HANDLER_NAME.fullmatch(name):
        raise TypeError(f"{name!r} is not a handler name: use letters, digits, '.', '_' and '-'")
    if isolation not in ("child", "inline"):
        raise TypeError(f"isolation of {name} must be 'child' or 'inline', not {isolation!r}")
    for what, texts in (("scopes", scopes), ("secrets", secrets), ("children", children)):
        if isinstance(texts, str):
            raise TypeError(f"{what} of {name} must be a set of strings, not a string")
    named = frozenset(secrets)
    for secret in named:
        if not isinstance(secret, str) or not SECRET_NAME.fullmatch(secret):
            raise TypeError(
                f"{secret!r} of {name} is not the name of a secret: "
                "use at most 64 letters, digits, '.', '_' and '-'"
            )
    if len(named) > MAX_SECRETS:
        raise TypeError(f"secrets of {name} must be at most {MAX_SECRETS}")
    started = frozenset(children)
    for child in started:
        if not isinstance(child, str) or not HANDLER_NAME.fullmatch(child):
            raise TypeError(f"{child!r} in children of {name} is not a handler name")
    if len(started) > MAX_CHILD_HANDLERS:
        raise TypeError(f"children of {name} must be at most {MAX_CHILD_HANDLERS}")
    if keep_children and not started:
        raise TypeError(f"keep_children of {name} needs children")
    reached = None if egress is None else _listed(name, "egress", egress, parse_items)
    if reached is not None and isolation == "inline" and OPEN not in reached:
        raise TypeError(
            f'egress of {name} needs a process of its own, and {name} is inline: write isolation="child", or '
            'egress=["open"]'
        )
    also = _listed(name, "audiences", audiences, parse_audiences)
    for what, count in (("max_attempts", max_attempts), ("max_concurrent", max_concurrent)):
        if count is not None and count < 1:
            raise TypeError(f"{what} of {name} must be at least 1")

    def declare(function: Callable[..., Any]) -> Job:
        if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
            raise TypeError(f"{name} is a generator; a handler must return its result")
        declared = Job(
            function,
            name,
            params,
            settings,
            frozenset(scopes),
            timeout,
            max_attempts,
            isolation,
            memory,
            max_concurrent,
            state,
            checkpoint,
            pool,
            named,
            reached,
            also,
            started,
            keep_children,
        )
        if isolation == "inline" and not declared.is_async:
            raise TypeError(f"{name} is inline and must be an async def, or it would block the worker")
        return declared

    return declare


def _listed(
    name: str, what: str, texts: Iterable[str], parse: Callable[[object], tuple[str, ...]]
) -> tuple[str, ...]:
    """A list of a declaration as it is stored. Raises TypeError that names the handler."""
    try:
        return parse(texts)
    except ValueError as error:
        raise TypeError(f"{what} of {name}: {error}") from None
