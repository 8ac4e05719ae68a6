"""Span parts: what a run's process may say of a step for the spans of its attempt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from worker.handlers.json_text import UNMASKED_LIMIT, clean
from worker.handlers.parts import CallPart, Count, Masked, Maybe, Number, Row, TextCheck, Truth, When
from worker.handlers.steps import NAME_LIMIT
from worker.telemetry import genai
from worker.telemetry.tracing import StepSpan

# Characters of an attribute that names something, such as a model; and how many of these a list may have.
ABOUT_LIMIT = 200
MAX_LIST = 16
# Characters of the texts of a span before they are masked, and of each of them in the span.
TEXTS_LIMIT = UNMASKED_LIMIT
TEXT_LIMIT = 16_000
MAX_COUNT = 2**53


@dataclass(frozen=True)
class MaskedText(CallPart[str]):
    """Text for people, cut to `most` characters, which is masked."""

    most: int

    def read(self, value: Any, check: TextCheck) -> str:
        if not isinstance(value, str):
            raise TypeError("not a text")
        return clean(value, self.most)

    def texts(self, value: str) -> Iterator[str]:
        yield value

    def masked(self, value: str, mask: Masked) -> str:
        return mask(value)


_TEXT = MaskedText(ABOUT_LIMIT)
_COUNT = Count(MAX_COUNT)
_NUMBER = Number()


class About(CallPart[Mapping[str, Any]]):
    """Attributes of `genai.ATTRIBUTES`. Others, and values that do not fit, are left out.

    A newer release may have more, and what a model's client reports must not fail the run.
    """

    def read(self, value: Any, check: TextCheck) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise TypeError("not an object")
        found = {}
        for name, kind in genai.ATTRIBUTES.items():
            if name in value:
                with suppress(TypeError, ValueError):
                    found[name] = self._value(kind, value[name], check)
        return found

    def _value(self, kind: genai.Kind, value: Any, check: TextCheck) -> Any:
        match kind:
            case "count":
                return _COUNT.read(value, check)
            case "number":
                return _NUMBER.read(value, check)
            case "texts":
                if not isinstance(value, list | tuple) or len(value) > MAX_LIST:
                    raise ValueError(f"not a list of at most {MAX_LIST}")
                return tuple(_TEXT.read(each, check) for each in value)
        return _TEXT.read(value, check)

    def texts(self, value: Mapping[str, Any]) -> Iterator[str]:
        for each in value.values():
            if isinstance(each, str):
                yield each
            elif isinstance(each, tuple):
                yield from each

    def masked(self, value: Mapping[str, Any], mask: Masked) -> Mapping[str, Any]:
        def masked(each: Any) -> Any:
            if isinstance(each, str):
                return mask(each)
            return tuple(map(mask, each)) if isinstance(each, tuple) else each

        return {name: masked(each) for name, each in value.items()}


ABOUT = About()


class Said(CallPart[Mapping[str, str]]):
    """Texts of `genai.TEXTS`."""

    def read(self, value: Any, check: TextCheck) -> Mapping[str, str]:
        if not isinstance(value, dict):
            raise TypeError("not an object")
        part = MaskedText(TEXTS_LIMIT)
        said = {name: part.read(value[name], check) for name in sorted(genai.TEXTS) if name in value}
        if sum(map(len, said.values())) > TEXTS_LIMIT:
            raise ValueError(f"more than {TEXTS_LIMIT:,} characters")
        return said

    def texts(self, value: Mapping[str, str]) -> Iterator[str]:
        yield from value.values()

    def masked(self, value: Mapping[str, str], mask: Masked) -> Mapping[str, str]:
        return {name: mask(text) for name, text in value.items()}


def cut(span: StepSpan) -> StepSpan:
    """A masked span with its texts at their final size. Before, a secret that is cut would not be masked."""
    if not span.texts:
        return span
    return replace(span, texts={name: clean(text, TEXT_LIMIT) for name, text in span.texts.items()})


STEP_SPAN = Row(
    StepSpan,
    {
        "name": MaskedText(NAME_LIMIT),
        "key": Maybe(MaskedText(NAME_LIMIT)),
        "occurrence": Count(2**31 - 1, 1),
        "started_at": When(),
        "ended_at": When(),
        "replayed": Truth(),
        "error": Maybe(MaskedText(ABOUT_LIMIT)),
        "about": ABOUT,
        "texts": Said(),
    },
    lean=("replayed", "error", "about", "texts"),
)
