"""Edit a definition: a form with the keys of `definitions edit`, what will change, then the change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from worker.errors import Conflict, DefinitionError, WorkerError
from worker.features.console.callers import caller_of
from worker.features.console.pages.base import PageGroup, query
from worker.features.console.pages.definitions import Difference, differences
from worker.features.console.pages.forms import as_text, from_typed, problem_of, reason_of
from worker.features.console.pages.links import definition_path
from worker.model.definitions import MISFIRE_MODES, OVERLAPS
from worker.model.definitions.definition import from_spec, keys_of, parse_definition, to_spec
from worker.model.definitions.effective import GROUPS, effective
from worker.operations.changes import same
from worker.store import orgs
from worker.store.lists.read import definition
from worker.store.lists.rows import DefinitionDetail

CHOICES: Mapping[str, Sequence[str]] = {
    "overlap": OVERLAPS,
    "misfire": MISFIRE_MODES,
    "isolation": ("child", "inline"),
    "reveal_token": ("true", "false"),
    "enabled": ("true", "false"),
}
# Keys whose values people write on several lines.
LONG = ("params", "variants")
# Groups that the form shows open.
OPEN = ("What runs", "When")


@dataclass(frozen=True, slots=True)
class FormField:
    """One key of the form: the typed text, the value without one, and what is wrong with it."""

    key: str
    text: str
    default: str
    choices: Sequence[str] = ()
    is_long: bool = False
    problem: str = ""


class EditPages(PageGroup):
    def routes(self) -> Sequence[Route]:
        at = "/orgs/{org}/definitions/{name}/edit"
        return (
            Route(at, self._form, methods=["GET"]),
            Route(at, self._edit, methods=["POST"]),
        )

    async def _form(self, request: Request) -> Response:
        query(request)
        return await self._page(request)

    async def _edit(self, request: Request) -> Response:
        """The first time show what will change; with `confirmed`, change it."""
        _, form = await self._pages.checked_form(request)
        caller, org, name = caller_of(request), request.path_params["org"], request.path_params["name"]
        caller.scope(org)
        caller.require_may("edit")
        typed = {key.removeprefix("key."): text for key, text in form.items() if key.startswith("key.")}
        if "confirmed" not in form:
            return await self._page(request, typed, is_sent=True, reason=reason_of(form))
        changes = {key: from_typed(text) for key, text in typed.items()}
        # A form does not send empty fields.
        changes |= dict.fromkeys(filter(None, form.get("cleared", "").split(" ")))
        try:
            await self._pages.database.edit(
                caller, org, name, changes, revision=_revision(form), reason=reason_of(form)
            )
        except (Conflict, DefinitionError) as error:
            return await self._page(request, typed, problem=error, cleared=form.get("cleared", ""))
        return RedirectResponse(f"{definition_path(org, name)}#revisions", 303)

    async def _page(
        self,
        request: Request,
        typed: Mapping[str, str] | None = None,
        *,
        is_sent: bool = False,
        problem: WorkerError | None = None,
        cleared: str = "",
        reason: str | None = None,
    ) -> Response:
        """The form; once sent, what it will change, or what is wrong beside the field."""
        caller, org, name = caller_of(request), request.path_params["org"], request.path_params["name"]
        caller.scope(org)
        caller.require_may("edit")

        def work(connection: Connection) -> dict[str, Any]:
            row = definition(connection, org, name)
            current = _texts(row)
            given = dict(current)
            if typed is not None:
                # A sent form has each field that is not empty; a confirmed one has the changed ones.
                gone = current.keys() if is_sent else cleared.split(" ")
                given = {key: typed.get(key, "" if key in gone else text) for key, text in current.items()}
            changed = {key: text.strip() for key, text in given.items() if text.strip() != current[key]}
            fault, found = problem, list[Difference]()
            if is_sent and changed:
                try:
                    found = _planned(row, {key: from_typed(text) for key, text in changed.items()})
                except DefinitionError as error:
                    fault = error
            named = fault.field.partition(".")[0] if isinstance(fault, DefinitionError) else ""
            return {
                "definition": caller.sees(DefinitionDetail, row),
                "groups": _fields(row, orgs.require(connection, org), given, named, fault),
                "open": OPEN,
                **problem_of(fault),
                "named": named if named in current else "",
                "differences": found,
                "nothing": is_sent and fault is None and not found,
                "changed": {key: text for key, text in changed.items() if text},
                "cleared": " ".join(key for key, text in changed.items() if not text),
                "reason": reason,
                "base": definition_path(org, name),
            }

        return await self._pages.show(request, "definition_edit.html", work)


def _texts(row: DefinitionDetail) -> dict[str, str]:
    """The text of each key that the definition sets, empty for the others."""
    spec = {**row["spec"], "enabled": row["enabled"]}
    return {key: as_text(spec.get(key)) for keys in GROUPS.values() for key in keys}


def _planned(row: DefinitionDetail, changes: Mapping[str, Any]) -> list[Difference]:
    """What the changes do to the stored keys; raises DefinitionError as the edit would."""
    keys = keys_of(row["spec"])
    values = {**keys, "enabled": row["enabled"], **changes, "org": row["org"], "name": row["name"]}
    wanted = parse_definition(values, entry="")
    before = {**to_spec(from_spec(row["org"], row["name"], keys)), "enabled": row["enabled"]}
    after = {**to_spec(wanted), "enabled": wanted.enabled}
    return [] if same(before, after) else differences(before, after)


def _fields(
    row: DefinitionDetail,
    org: Mapping[str, Any],
    given: Mapping[str, str],
    named: str,
    problem: WorkerError | None,
) -> dict[str, list[FormField]]:
    bare: dict[str, Any] = {key: row["spec"][key] for key in ("handler", "schedule")}
    try:
        groups = effective(bare, enabled=True, org_timezone=org["timezone"], org_pool=org["pool"])
        defaults = {one.key: as_text(one.value) for group in groups.values() for one in group}
    except DefinitionError:
        defaults = {}
    return {
        name: [
            FormField(
                key,
                given[key],
                "" if key in bare else defaults.get(key, ""),
                CHOICES.get(key, ()),
                key in LONG,
                problem.message if problem is not None and key == named else "",
            )
            for key in keys
        ]
        for name, keys in GROUPS.items()
    }


def _revision(form: Mapping[str, str]) -> int | None:
    text = form.get("revision", "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None
