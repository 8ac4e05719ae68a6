"""One fake for every store and source that an attempt asks: scripted answers, and all calls in order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any


class Answering:
    """Answers each method with what `answers` has under its name, raised if that is an exception.

    An answer that is a function gets the arguments. What is not in `answers` is answered with None; names
    in `at_once` are no coroutines.
    """

    def __init__(self, answers: Mapping[str, Any], at_once: Collection[str] = ()) -> None:
        self.answers = answers
        self.at_once = at_once
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def answer(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, *args, *kwargs.values()))
            given = self.answers.get(name)
            if isinstance(given, Exception):
                raise given
            return given(*args, **kwargs) if callable(given) else given

        async def later(*args: Any, **kwargs: Any) -> Any:
            return answer(*args, **kwargs)

        return answer if name in self.at_once else later

    def asked(self, *names: str) -> list[tuple[Any, ...]]:
        """The calls of these methods, each as its name and arguments."""
        return [call for call in self.calls if call[0] in names]
