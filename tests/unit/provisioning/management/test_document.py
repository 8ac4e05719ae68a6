"""The check of exchanges against Kinde's document finds what the document does not allow."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.fakes.kinde.document import Exchange, document


def exchange(
    method: str, path: str, *, query: str = "", body: Any = None, status: int = 200, response: Any = None
):
    sent = b"" if body is None else json.dumps(body).encode()
    told = b"" if response is None else json.dumps(response).encode()
    return Exchange(method, path, query, sent, status, told)


MADE = {"name": "an app", "type": "m2m", "org_code": "org_a"}
ANSWER = {"code": "APPLICATION_CREATED", "application": {"id": "a", "client_id": "a", "client_secret": "s"}}
ORG = {"code": "org_a", "name": "Acme", "external_id": None}
APPS = "/api/v1/applications"
ORGS = "/api/v1/organizations"


@pytest.mark.parametrize(
    "allowed",
    [
        exchange("POST", APPS, body=MADE, status=201, response=ANSWER),
        exchange("GET", ORGS, query="page_size=500&next_token=x", response={"organizations": [ORG]}),
        exchange("GET", f"{APPS}/a%2Fb", status=400, response={"errors": [{"code": "X", "message": "x"}]}),
        exchange("PUT", f"{APPS}/a/properties/plan", body={"value": True}, response={"code": "OK"}),
        exchange("POST", "/api/v1/apis/a/applications/b/scopes/c"),
    ],
    ids=lambda each: f"{each.method} {each.path}",
)
def test_what_the_document_has_is_allowed(allowed: Exchange):
    assert list(document().faults(allowed)) == []


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        (exchange("GET", "/api/v1/nothing"), "no such route"),
        (exchange("DELETE", ORGS), "no such route"),
        (exchange("GET", ORGS, query="limit=5", response={"organizations": []}), "unknown parameter limit"),
        (exchange("GET", ORGS, query="sort=age", response={"organizations": []}), "sort"),
        (exchange("GET", "/api/v1/organization", response=ORG), "code is missing"),
        (exchange("POST", APPS, status=201, response=ANSWER), "needs a body"),
        (exchange("POST", APPS, body=MADE | {"type": "robot"}, status=201, response=ANSWER), "robot"),
        (exchange("POST", APPS, body=MADE | {"secret": "s"}, status=201, response=ANSWER), "'secret'"),
        (exchange("POST", APPS, body={"name": "x"}, status=201, response=ANSWER), "'type' is a required"),
        (exchange("POST", APPS, body=MADE, status=200, response=ANSWER), "status 200 is not documented"),
        (exchange("GET", ORGS, response={"organizations": [ORG | {"plan": "pro"}]}), "'plan'"),
        (exchange("GET", ORGS, response={"organizations": [ORG | {"name": None}]}), "None"),
        (exchange("PUT", f"{APPS}/a/properties/plan", body={"value": 7}, response={"code": "OK"}), "7"),
        (exchange("POST", "/api/v1/apis/a/applications/b/scopes/c", body={}), "takes no body"),
        (exchange("POST", "/api/v1/apis/a/applications/b/scopes/c", response={}), "has no body"),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_document_does_not_have_is_a_fault(wrong: Exchange, fault: str):
    assert any(fault in found for found in document().faults(wrong))
