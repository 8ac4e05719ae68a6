"""Requests of the API: the caller, the query and the body, checked against the endpoint's declaration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from starlette.requests import Request

from worker.errors import NotFound, UsageError
from worker.features.console.api.endpoints import BOOLEAN, SECRET, Endpoint, Field
from worker.handlers.schema import Schema
from worker.kit.web.responses import read_body
from worker.model.definitions import fields
from worker.model.definitions.units import TOO_DEEP, plain_json
from worker.model.search import hint_of
from worker.store.lists import MAX_LIMIT


def query_of(request: Request, known: Sequence[str], what: str) -> dict[str, str]:
    """The parameters of the query.

    Raises:
        UsageError: one is unknown or given twice; the fix names the known ones.
    """
    items = request.query_params.multi_items()
    given = dict(items)
    if len(given) != len(items):
        raise UsageError("a parameter is given twice", fix="give each parameter once")
    if unknown := given.keys() - set(known):
        fix = f"{hint_of(min(unknown), known)}it has {', '.join(known) or 'none'}"
        raise UsageError(f"{what} has no parameter {', '.join(sorted(unknown))}", fix=fix)
    for name, value in given.items():
        check_storable(value, name)
    return given


async def body_of(request: Request, endpoint: Endpoint) -> dict[str, Any]:
    """The members of the body, a JSON object, which may be left out if it needs none.

    Raises:
        UsageError: it is not such an object; the message names the member.
        DefinitionError: it nests too deeply, or has text that no database can store.
        HTTPException: it is too large (413).
    """
    members = endpoint.body or ()
    names = ", ".join(member.name for member in members) or "no members"
    fix = f"send a JSON object with {names}"
    text = await read_body(request)
    try:
        body = plain_json(text) if text.strip() else {}
    except RecursionError:
        # The parser does not say which member it was; only params may nest.
        raise fields.refusal(TOO_DEEP, "the body", "params") from None
    except ValueError:
        raise UsageError("the body is not JSON", fix=fix) from None
    if not isinstance(body, dict):
        raise UsageError("the body is not a JSON object", fix=fix)
    if unknown := sorted(body.keys() - {member.name for member in members}):
        hint = hint_of(unknown[0], (member.name for member in members))
        raise UsageError(
            f"the body has an unknown member {unknown[0]!r:.80}", fix=f"{hint}it may have {names}"
        )
    for member in members:
        if member.schema is SECRET and member.name in body:
            _check_secret(body[member.name], member.name)
        if member.schema is BOOLEAN and not isinstance(body.get(member.name, False), bool):
            raise UsageError(f"{member.name} must be true or false", fix=fix)
    problem = _schema_of(endpoint).problem(body)
    if problem is not None:
        raise UsageError(f"{'.'.join(problem.path) or 'the body'}: {problem.message}", fix=fix)
    for name, value in body.items():
        if isinstance(value, str):
            check_storable(value, name)
    return body


def _check_secret(value: Any, name: str) -> None:
    """Refuse an invalid secret without quoting it, as the schema's messages would."""
    if not isinstance(value, str) or not 0 < len(value) <= SECRET["maxLength"]:
        raise UsageError(
            f"{name} must be a string of 1 to {SECRET['maxLength']} characters",
            fix=f'send {{"{name}": "..."}} with the secret that the provider shows',
        )


@cache
def _schema_of(endpoint: Endpoint) -> Schema:
    return Schema(object_of(endpoint.body or ()))


def object_of(members: Sequence[Field]) -> dict[str, Any]:
    """The schema of a body."""
    properties = {member.name: {**member.schema, "description": member.about} for member in members}
    found: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    if required := [member.name for member in members if member.required]:
        found["required"] = required
    return found


def limit_of(given: Mapping[str, str], name: str = "limit") -> int | None:
    """A parameter that is a number of rows; raises UsageError unless it is between 1 and MAX_LIMIT."""
    text = given.get(name)
    if text is None:
        return None
    number = int(text[:9]) if text.isascii() and text.isdecimal() else 0
    if not 1 <= number <= MAX_LIMIT:
        raise UsageError(f"{name} {text!r:.80} is not between 1 and {MAX_LIMIT}", fix=f"such as {name}=50")
    return number


def flag_of(given: Mapping[str, str], name: str) -> bool:
    """A parameter that is true or false."""
    text = given.get(name, "false")
    if text not in ("true", "false"):
        raise UsageError(f"{name} {text!r:.80} is not true or false", fix=f"such as {name}=true")
    return text == "true"


def log_place(text: str) -> tuple[int, int]:
    """The place of a log line, `attempt.seq`.

    Raises:
        NotFound: it is not one.
    """
    attempt, dot, seq = text.partition(".")
    if not (dot and attempt.isascii() and attempt.isdecimal() and seq.isascii() and seq.isdecimal()):
        raise NotFound(f"{text!r:.80} is not a log line: after is attempt.seq, such as 1.200")
    if len(text) >= 20 or int(attempt) >= 2**31 or int(seq) >= 2**31:
        raise NotFound(f"there is no log line {text!r:.80}")
    return int(attempt), int(seq)


def check_storable(value: str, name: str) -> None:
    """Raise UsageError for a text that no database can store."""
    try:
        fields.check_text(value, name)
    except ValueError as error:
        raise UsageError(str(error), fix="leave that character out") from None
