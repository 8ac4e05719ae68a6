"""Every store call that reads or writes rows of orgs takes the org, or says that it is for all orgs.

A function says it by the type of a parameter: `OrgId`, `Scope`, `OrgScope` or `AllOrgs`, or a row that has
its org. None of them has a default, so a call that forgets it is a type error.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.store import roles, tables
from worker.store.tables.runs import table

STORE = Path(__file__).parents[3] / "worker" / "store"
ORG_DATA = frozenset({*roles.ORG_DATA, "run_ends"})
# Types that name the org, or rows that have it.
SAYS = (
    *("OrgId", "Scope", "AllOrgs", "AdmittedRun", "EndedAttempt", "RunStep", "NewRun", "NewSkip"),
    *(
        "Reservation",
        "Use]",
        "Spend]",
        "Costed]",
        "LogLine",
        "DefinitionUpdate",
        "Entry",
        "OrgBudget",
        "Counter",
    ),
)
CODES = frozenset({"org", "orgs", "codes", "code"})
# What the loops of workers, hosts and placers call: by keys of runs, workers and tokens, whatever their org.
LOOPS = frozenset(
    {
        *(
            "access_tokens",
            "alerts",
            "batch_requests",
            "batches",
            "deadlines",
            "failing",
            "families",
            "firing",
            "host_grants",
            "hosts",
        ),
        *(
            "limits",
            "placements",
            "pools",
            "rollout_sums",
            "starts",
            "steps",
            "sweeps",
            "worker_store",
            "workers",
        ),
    }
)
# What commands and chores of an operator call, by keys or by rows that have their org.
BY_KEY = {
    "applications": {"find", "by_name", "known_ids", "change"},
    "backfills": {"add", "is_any_unfinished"},
    "budgets": {
        *("spent_by", "spent_in_tree", "put", "by_target", "end_waits", "find", "remove"),
        "forget_counters",
    },
    "calendars": {"ending"},
    "children": {"read", "caps_of", "parent_of", "root_of", "roots_of"},
    "credentials": {"add", "insert_pending"},
    "definitions": {"add"},
    "health": {"oldest_unfired", "dead_credentials"},
    "history": {"revision_at", "last_attempts", "newest_attempts"},
    "morning": {"codes_of"},
    "org_secrets": {"add"},
    "orgs": {"add"},
    "product_logins": {"rows_of", "listed"},
    "read": {"calendar"},
    "spending": {"lock_running", "uses"},
    "templates": {
        *("find", "count_definitions", "every", "write", "is_any_org_behind", "progress", "unfinished"),
        "finish",
    },
    "usage": {"budget_rows"},
    "waits": {"answer"},
}


def unscoped(source: str) -> Iterator[str]:
    """The public functions of a module that touch rows of orgs and do not say whose."""
    tree = ast.parse(source)
    known = dict(_named(tree))
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        first, *rest = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs] or [None]
        if first is None or first.arg != "connection" or not _touches(node, known, {node.name}):
            continue
        types = [ast.unparse(each.annotation) + "]" for each in rest if each.annotation]
        if not any(each.arg in CODES for each in rest) and not any(s in text for text in types for s in SAYS):
            yield node.name


def _named(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """What the names of a module stand for."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    yield target.id, node.value
                elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    yield from (
                        (ast.unparse(a), b) for a, b in zip(target.elts, node.value.elts, strict=True)
                    )


def _touches(node: ast.AST, known: dict[str, ast.AST], seen: set[str]) -> bool:
    """Whether it mentions a table with rows of orgs, itself or by a name of its module."""
    for each in ast.walk(node):
        if isinstance(each, ast.Attribute) and ast.unparse(each.value) == "tables" and each.attr in ORG_DATA:
            return True
        if isinstance(each, ast.Name) and each.id in known and each.id not in seen:
            seen.add(each.id)
            if _touches(known[each.id], known, seen):
                return True
    return False


def test_every_store_call_takes_the_org_or_says_that_it_is_for_all():
    modules = [*STORE.glob("*.py"), *STORE.glob("lists/*.py")]
    found = {path.stem: set(unscoped(path.read_text())) for path in modules if path.stem not in LOOPS}
    assert {name: those for name, those in found.items() if those} == BY_KEY


def defaults(source: str) -> Iterator[str]:
    """The parameters for a scope that have a default: a call that forgets it would be for all orgs."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            args = [*node.args.posonlyargs, *node.args.args]
            with_default = args[len(args) - len(node.args.defaults) :]
            pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            for each in (*with_default, *(one for one, default in pairs if default is not None)):
                if each.annotation and re.fullmatch(r"(Org)?Scope|AllOrgs", ast.unparse(each.annotation)):
                    yield f"{node.name}({each.arg})"


def test_no_scope_has_a_default():
    found = {path: [*defaults(path.read_text())] for path in STORE.parent.rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}
    # The control.
    assert [*defaults("def settle(rows, *, at, scope: Scope = ALL_ORGS): ...")] == ["settle(scope)"]
    assert [*defaults("def broken(page, scope: OrgScope = ALL_ORGS): ...")] == ["broken(scope)"]


FORGETFUL = """
_live, _orgs = tables.live_runs, tables.orgs

def waiting(connection: Connection, {scope}limit: int) -> list[Row]:
    return _some(connection, limit)

def _some(connection: Connection, limit: int) -> list[Row]:
    return all_rows(connection, select(_live).limit(limit))

def versions(connection: Connection) -> list[Row]:
    return all_rows(connection, select(tables.facts))
"""


def test_a_call_that_takes_neither_is_found():
    """The control: the same function without its scope."""
    assert list(unscoped(FORGETFUL.format(scope=""))) == ["waiting"]
    for scope in ("org_id: OrgId, ", "scope: Scope, ", "_: AllOrgs, ", "org: OrgScope, "):
        assert list(unscoped(FORGETFUL.format(scope=scope))) == []


def test_a_table_names_who_reads_it():
    """There is no default: a new table is neither open nor closed by oversight."""
    with pytest.raises(TypeError, match="readers"):
        table("notes", "What people noted.")  # type: ignore[call-arg]

    assert {each.info["readers"] for each in tables.metadata.sorted_tables} == {"orgs", "operators"}
    assert tables.metadata.tables["org_secrets"].info["readers"] == "orgs"
    assert tables.metadata.tables["calendars"].info["readers"] == "operators"
