"""`@job`: what can be declared, and what makes no sense."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

import worker
from worker.handlers.job import MAX_DESCRIPTION, Job, job, one_line


class Params(BaseModel):
    collection: str


def test_a_declared_handler_keeps_what_was_said_of_it_and_can_still_be_called() -> None:
    @job("acme.digest", params=Params, scopes={"read:kb"}, timeout="2h", max_attempts=4, memory="1GiB")
    def digest(ctx: Any) -> str:
        """Digests."""
        return f"called with {ctx}"

    assert isinstance(digest, Job)
    assert digest("a context") == "called with a context"
    assert (digest.name, digest.__name__, digest.__doc__) == ("acme.digest", "digest", "Digests.")
    assert (digest.scopes, digest.timeout, digest.max_attempts) == (frozenset({"read:kb"}), "2h", 4)
    assert not digest.is_async
    assert digest.isolation == "child"


@pytest.mark.parametrize(
    ("docstring", "description"),
    [
        (None, None),
        ("   ", None),
        ("Digests.", "Digests."),
        ("Digest a collection", "Digest a collection"),
        ("Send a letter to each customer. Each is a step.", "Send a letter to each customer."),
        ("Is it up? It answers.", "Is it up?"),
        ("Digest what is new,\n        e.g.\n        mails. Then stop.", "Digest what is new, e.g. mails."),
        ("Digest what is new\n\n    Stops at the first error.", "Digest what is new"),
        ("Wait 1.5 s. Then go on.", "Wait 1.5 s."),
        ("x" * 300, "x" * (MAX_DESCRIPTION - 1) + "…"),
    ],
)
def test_a_handler_is_described_by_its_first_sentence(docstring: str | None, description: str) -> None:
    def digest(ctx: Any) -> None: ...

    digest.__doc__ = docstring

    assert job("acme.digest")(digest).description == description


def test_a_description_is_one_printable_line() -> None:
    hostile = "a\0b\x1b[2J\u202ec\ud800\n\td"

    assert one_line(hostile) == "a b [2J c d"
    assert one_line("\u202e\n") is None
    assert len(one_line("W " * 10**6) or "") == MAX_DESCRIPTION


def test_an_unknown_param_is_an_error_unless_the_model_allows_extras() -> None:
    class Open(BaseModel):
        model_config = ConfigDict(extra="allow")

    def schema(model: type[BaseModel]) -> Any:
        return job("x", params=model)(lambda ctx: None).params_schema()

    assert schema(Params)["additionalProperties"] is False
    assert schema(Open)["additionalProperties"] is True


def test_no_model_means_no_schema() -> None:
    declared = job("x")(lambda ctx: None)

    assert declared.params_schema() is None
    assert declared.settings_schema() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"isolation": "inline"}, "must be an async def"),
        ({"isolation": "thread"}, "isolation of x must be"),
        ({"max_attempts": 0}, "max_attempts of x must be at least 1"),
        ({"max_concurrent": 0}, "max_concurrent of x must be at least 1"),
        ({"scopes": "read:kb"}, "not a string"),
        ({"secrets": "openai"}, "secrets of x must be a set of strings"),
        ({"secrets": {"a b"}}, "is not the name of a secret"),
        ({"secrets": {"../openai"}}, "is not the name of a secret"),
        ({"secrets": {f"s{n}" for n in range(21)}}, "secrets of x must be at most 20"),
        ({"egress": "api"}, "egress of x: it must be a list of texts, not str; write"),
        ({"egress": ["api.openai.com"]}, "egress of x: 'api.openai.com' is not allowed here; write"),
        ({"egress": [["api"]]}, "egress of x: an item is not a text"),
        ({"egress": ["http://api.openai.com"]}, "egress of x: .* must be https"),
        ({"audiences": "mcp"}, "audiences of x: it must be a list of texts"),
        ({"audiences": ["a\nb"]}, "audiences of x: an audience is a text of 1 to 300 printable"),
        ({"audiences": [" "]}, "audiences of x: an audience is a text"),
        ({"audiences": [str(n) for n in range(21)]}, "audiences of x: it has more than 20 items"),
    ],
)
def test_a_declaration_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        job("x", **options)(lambda ctx: None)


def test_it_declares_what_it_reaches_in_its_own_order() -> None:
    one = job("x", egress=["https://b.example", "api", "api"], audiences=["m", "k", "m"])(lambda ctx: None)

    assert (one.egress, one.audiences) == (("https://b.example", "api"), ("m", "k"))
    assert job("x", egress={"public", "api"})(lambda ctx: None).egress == ("api", "public")


def test_to_declare_nothing_is_not_to_declare_an_empty_list() -> None:
    assert job("x")(lambda ctx: None).egress is None
    assert job("x", egress=[])(lambda ctx: None).egress == ()


def test_an_inline_handler_can_only_be_open() -> None:
    async def function(ctx: Any) -> None: ...

    with pytest.raises(TypeError, match='egress of x needs a process of its own.*isolation="child"'):
        job("x", isolation="inline", egress=["api"])(function)

    assert job("x", isolation="inline", egress=["open"])(function).egress == ("open",)


@pytest.mark.parametrize("name", ["", " x", "a b", "ä", "../x", ".x"])
def test_a_name_is_plain(name: str) -> None:
    with pytest.raises(TypeError, match="not a handler name"):
        job(name)


def test_a_generator_is_no_handler() -> None:
    async def pages(ctx: Any) -> Any:
        yield 1

    with pytest.raises(TypeError, match="generator"):
        job("x")(pages)


def test_a_handlers_author_finds_everything_in_the_package_itself() -> None:
    for name in worker.__all__:
        assert getattr(worker, name).__name__ == name

    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = worker.Nothing
