"""`@job`: a function becomes a handler, with its models, scopes and defaults."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pydantic import BaseModel

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")


class Job:
    """A handler as its author declared it. Calling it calls the function, as tests want to."""

    name: str
    """The handler's name, and that of its entry point: letters, digits, `.`, `_` and `-`."""
    params: type[BaseModel] | None
    """A pydantic model of the definition's params; without one `ctx.params` is a plain mapping."""
    settings: type[BaseModel] | None
    """A pydantic model of the token's properties, over its defaults; without one a plain mapping."""
    scopes: frozenset[str]
    """The scopes that its token is asked for and must have, unless the definition names others."""
    timeout: str | None
    """How long an attempt may take, as text such as `2h`; else an hour. A definition's comes first."""
    max_attempts: int | None
    """Attempts that may fail, time out or ask for a retry; else 3. A definition's comes first."""
    isolation: Literal["child", "inline"]
    """`child`: a process of its own; `inline`: a task of the worker, async, where the operator allows it."""
    memory: str | None
    """The cap on a run's memory, as text such as `512MiB`; else none. A definition's comes first."""
    max_concurrent: int | None
    """The handler's runs at once, over all workers and orgs; else no limit of its own."""

    def __init__(
        self,
        function: Callable[[Any], Any],
        name: str,
        *,
        params: type[BaseModel] | None,
        settings: type[BaseModel] | None,
        scopes: frozenset[str],
        timeout: str | None,
        max_attempts: int | None,
        isolation: Literal["child", "inline"],
        memory: str | None,
        max_concurrent: int | None,
    ) -> None:
        self.function = function
        self.name = name
        self.params = params
        self.settings = settings
        self.scopes = scopes
        self.timeout = timeout
        self.max_attempts = max_attempts
        self.isolation = isolation
        self.memory = memory
        self.max_concurrent = max_concurrent
        self.__name__ = getattr(function, "__name__", name)
        self.__doc__ = function.__doc__
        self.__wrapped__ = function

    @property
    def is_async(self) -> bool:
        """Whether the handler gets a `Context` and is awaited; else it blocks in its own process."""
        return inspect.iscoroutinefunction(self.function)

    def __call__(self, ctx: Any) -> Any:
        return self.function(ctx)

    def __repr__(self) -> str:
        return f"<Job {self.name}>"

    def params_schema(self) -> dict[str, Any] | None:
        """The JSON Schema that a definition's params must meet, or None where anything goes."""
        if self.params is None:
            return None
        schema = self.params.model_json_schema()
        if self.params.model_config.get("extra") != "allow":
            schema["additionalProperties"] = False  # a misspelt param is an error when it is saved
        return schema

    def settings_schema(self) -> dict[str, Any] | None:
        """The JSON Schema of the settings that a token's properties are read into."""
        return None if self.settings is None else self.settings.model_json_schema()


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
) -> Callable[[Callable[..., Any]], Job]:
    """Declare a handler, to be registered as an entry point of group `worker.jobs` under `name`.

    `params` and `settings` are pydantic models: of the definition's params, and of
    the token's properties over the model's defaults. `timeout` is text such as `2h`,
    `memory` such as `512MiB`; `max_concurrent` counts over all workers.

    Raises:
        TypeError: the declaration makes no sense, such as a sync handler that is inline.
    """
    if not _NAME.fullmatch(name):
        raise TypeError(f"{name!r} is no handler name: letters, digits, '.', '_' and '-' only")
    if isolation not in ("child", "inline"):
        raise TypeError(f"isolation of {name} is 'child' or 'inline', not {isolation!r}")
    if isinstance(scopes, str):
        raise TypeError(f"scopes of {name} are a set of texts, not one text")
    for what, count in (("max_attempts", max_attempts), ("max_concurrent", max_concurrent)):
        if count is not None and count < 1:
            raise TypeError(f"{what} of {name} is at least 1")

    def declare(function: Callable[..., Any]) -> Job:
        if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
            raise TypeError(f"{name} is a generator; a handler returns its result")
        declared = Job(
            function,
            name,
            params=params,
            settings=settings,
            scopes=frozenset(scopes),
            timeout=timeout,
            max_attempts=max_attempts,
            isolation=isolation,
            memory=memory,
            max_concurrent=max_concurrent,
        )
        if isolation == "inline" and not declared.is_async:
            raise TypeError(f"{name} is inline, so it must be an async def: it would block the worker")
        return declared

    return declare
