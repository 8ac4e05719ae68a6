"""The OpenAPI document: valid, complete, and true of generated requests (schemathesis)."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from sqlalchemy import insert

from tests.integration.console.conftest import TOKENS, Site, on_either
from tests.suites import is_here
from worker.features.console.api import BASE, ENDPOINTS
from worker.features.console.api.openapi import document
from worker.model.definitions.file import parse_file
from worker.operations.apply import apply
from worker.operations.runs import cancel, run_now
from worker.store import orgs, rollouts, tables
from worker.tokens.sealing import KeyRing

# Requests for each operation as the document says, and as many others; PostgreSQL refuses more.
EXAMPLES = {"sqlite": 1, "postgresql": 3}
NUMBERS = itertools.count(1)
# A rollout in the state in which it can be moved, for each move.
ROLLOUTS = {"show": "planned", "advance": "planned", "halt": "running", "resume": "halted"}
ROLLOUTS |= {"finish": "running", "undo": "running"}
ROLLOUT = {
    "definitions": "digest",
    "from_handler": "acme.digest",
    "to_handler": "acme.other",
    "orgs": "all",
    "steps": ["50%", "100%"],
    "auto": False,
    "watch": {"failed": "+2 points"},
}


def test_the_document_is_valid_openapi():
    from openapi_spec_validator import OpenAPIV31SpecValidator

    assert [error.message for error in OpenAPIV31SpecValidator(document()).iter_errors()] == []


def test_every_operation_has_its_own_id_and_every_error_a_problem():
    operations = [one for path in document()["paths"].values() for one in path.values()]

    assert len({one["operationId"] for one in operations}) == len(operations) == len(ENDPOINTS)
    problems = document()["components"]["responses"]
    assert {"application/problem+json"} == {kind for one in problems.values() for kind in one["content"]}


@pytest.fixture
def seeded(staffed: Site, tmp_path: Path) -> dict[str, str]:
    """Names of things that exist, for half of the path parameters."""
    database = staffed.database
    ring = KeyRing.load_or_generate(tmp_path / "keyring")
    staffed.open_ring = lambda: ring
    budget = '[[budget]]\norg = "org_a"\nmeter = "calls"\nlimit = 9\nper = "day"\n'
    apply(database, parse_file(budget), actor="tester")
    run, waiting, on = (str(run_now(database, "org_a", "digest", actor="tester")["id"]) for _ in range(3))
    cancel(database, run, actor="tester")
    with database.transaction() as connection:
        org_id, now = orgs.require(connection, "org_a")["id"], database.now(connection)
        for verb, state in ROLLOUTS.items():
            rollouts.put(connection, f"of {verb}", ROLLOUT, None, at=now, actor="tester")
            if state != "planned":
                began = {"state": state, "step": 1, "began_at": now, "step_began_at": now}
                id_ = rollouts.require(connection, f"of {verb}")["id"]
                rollouts.change(connection, id_, began)
        for seq in range(1, 4):
            row = {"run_id": run, "org_id": org_id, "attempt": 1, "seq": seq, "at": now}
            connection.execute(
                insert(tables.run_logs).values(**row, level="info", source="log", text=f"line {seq}")
            )
    return {
        "run": run,
        "org": "org_a",
        "name": "digest",
        "waiting": waiting,
        "waiting_on": on,
        "generation": "1",
        "rollout": "of show",
    }


@on_either
async def test_generated_requests_get_documented_answers_and_no_5xx(staffed: Site, seeded: dict[str, str]):
    app: Any = staffed.client()._transport.app  # type: ignore[attr-defined]

    asked = await asyncio.to_thread(ask_everything, app, seeded, EXAMPLES[staffed.database.dialect])

    assert all(status < 500 for statuses in asked.values() for status in statuses)
    # Something succeeded everywhere, so not only refusals were checked.
    refused = {label for label, statuses in asked.items() if min(statuses) >= 300}
    assert {label for label in refused if is_here("rollouts") or "/rollouts/" not in label} == set()


def ask_everything(app: Any, seeded: dict[str, str], examples: int) -> dict[str, set[int]]:
    """Ask generated requests, valid and invalid; returns the statuses by operation."""
    import schemathesis
    from schemathesis import GenerationMode, checks
    from schemathesis.specs.openapi import checks as of_openapi

    checks.load_all_checks()
    true = [
        checks.not_a_server_error,
        of_openapi.status_code_conformance,
        of_openapi.content_type_conformance,
        of_openapi.response_headers_conformance,
        of_openapi.response_schema_conformance,
        of_openapi.unsupported_method,
    ]
    headers = {"authorization": f"Bearer {TOKENS['admin']}"}
    schema = schemathesis.openapi.from_asgi(f"{BASE}/openapi.json", app, headers=headers)
    asked: dict[str, set[int]] = {}

    def ask(case: Any) -> None:
        for known in (False, True):
            if known:
                case.path_parameters = {name: seeded[name] for name in case.path_parameters or {}}
                if case.operation.label.endswith("/cancel"):
                    case.path_parameters["run"] = seeded["waiting"]
                if case.operation.label.endswith("/raise"):
                    case.body = {"meter": "calls", "by": 1}
                if (verb := case.operation.label.rpartition("/")[2]) in ROLLOUTS:
                    case.path_parameters["rollout"] = f"of {verb}"
                if "/runs:" in case.operation.label:
                    case.body = {
                        "q": f"state:{'waiting' if 'cancel' in case.operation.label else 'succeeded'}"
                    }
                if "/answers/" in case.operation.label:
                    # An answer to a wait that the run has not reached yet, each time another one.
                    case.path_parameters |= {"run": seeded["waiting_on"], "name": f"wait-{next(NUMBERS)}"}
                    case.body = {"data": {"yes": True}}
                if case.operation.label.endswith("/backfill"):
                    case.body = {"from": "2020-01-01", "until": "2020-01-03", "dry_run": True}
            send(case)
        if case.operation.label.endswith("/credentials/{org}"):
            # Of what the document cannot say: one of the two.
            case.body = {"client_id": "m2m", "client_secret": "canary-secret"}
            send(case)

    def send(case: Any) -> None:
        response = case.call_and_validate(headers=headers, checks=true)
        asked.setdefault(case.operation.label, set()).add(response.status_code)

    bounded = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for found in schema.get_all_operations():
        for mode in GenerationMode:
            seed(13)(bounded(given(case=found.ok().as_strategy(generation_mode=mode))(ask)))()
    return asked
