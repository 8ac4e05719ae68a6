"""The products of docs/recipes: one suite for their "sync now" buttons, against a fake of orgworker's API."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import httpx
import jsonschema
import pytest
from django.conf import settings
from django.test import RequestFactory
from django.urls import Resolver404, clear_url_caches, resolve
from fastapi.testclient import TestClient

from tests.fakes import recipes
from worker.features.console.api.openapi import document

KEY = "5f0c7a52-6f0e-4c3c-9d3f-1f2f6a3b7c11"
RUN = "01a2110e-bab7-768d-b763-6fff063ae9bd"
SECRET = "Traceback in /srv/crm: password hunter2"
Respond = Callable[[httpx.Request], httpx.Response]


def run(state: str = "waiting", **changes: Any) -> dict[str, Any]:
    """A run as the API shows it to an operator."""
    row = {"id": RUN, "org": "org_acme", "state": state, "reason": "due", "result": None, "error": None}
    return row | changes


class Product(Protocol):
    """A product with the people Ada, of org_acme, and Grace, of org_globex; `asked` is what orgworker got."""

    asked: list[httpx.Request]

    def connect(self, respond: Respond) -> None: ...

    def press(self, person: str, key: str | None = KEY) -> httpx.Response: ...

    def watch(self, person: str, run: str = RUN) -> httpx.Response: ...


class Connected:
    """What is alike in both: the client that their module `sync` has for orgworker."""

    client: type[httpx.Client] | type[httpx.AsyncClient]

    def __init__(self, modules: dict[str, Any]) -> None:
        self._sync = modules["sync"]
        self.asked: list[httpx.Request] = []

    def connect(self, respond: Respond) -> None:
        def record(request: httpx.Request) -> httpx.Response:
            self.asked.append(request)
            return respond(request)

        base = {"base_url": self._sync.jobs.base_url, "headers": self._sync.jobs.headers}
        self._sync.jobs = self.client(transport=httpx.MockTransport(record), **base)


class FastApi(Connected):
    client = httpx.AsyncClient

    def __init__(self, modules: dict[str, Any]) -> None:
        super().__init__(modules)
        self._client = TestClient(modules["crm"].app)

    def press(self, person: str, key: str | None = KEY) -> httpx.Response:
        headers = {"Cookie": f"session=session-of-{person}"} | ({"Idempotency-Key": key} if key else {})
        return self._client.post("/sync", headers=headers)

    def watch(self, person: str, run: str = RUN) -> httpx.Response:
        return self._client.get(f"/sync/{run}", headers={"Cookie": f"session=session-of-{person}"})


class Django(Connected):
    """Its views, found by address. A process has one set of settings, so none of the product's is needed."""

    client = httpx.Client

    def __init__(self, modules: dict[str, Any]) -> None:
        if not settings.configured:
            settings.configure()
        # Else the address of a view leads to the modules of the test before.
        clear_url_caches()
        super().__init__(modules)

    def press(self, person: str, key: str | None = KEY) -> httpx.Response:
        headers = {"Idempotency-Key": key} if key else {}
        return self._answer(person, RequestFactory().post("/sync", headers=headers))

    def watch(self, person: str, run: str = RUN) -> httpx.Response:
        return self._answer(person, RequestFactory().get(f"/sync/{run}"))

    def _answer(self, person: str, request: Any) -> httpx.Response:
        org = {"ada": "org_acme", "grace": "org_globex"}.get(person)
        group = SimpleNamespace(name=org) if org else None
        request.user = SimpleNamespace(groups=SimpleNamespace(first=lambda: group))
        try:
            view = resolve(request.path, urlconf="urls")
        except Resolver404:
            return httpx.Response(404)
        response = view.func(request, **view.kwargs)
        return httpx.Response(response.status_code, headers=response.headers, content=response.content)


PRODUCTS: dict[str, Callable[[dict[str, Any]], Product]] = {"fastapi": FastApi, "django": Django}


@pytest.fixture(params=PRODUCTS)
def product(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Product]:
    with recipes.product(request.param, tmp_path) as modules:
        yield PRODUCTS[request.param](modules)


def test_the_button_starts_a_run_of_the_persons_org(product: Product):
    product.connect(lambda request: httpx.Response(201, json=run()))

    pressed = product.press("ada")

    [asked] = product.asked
    assert asked.url.path == "/api/v1/definitions/org_acme/contacts-sync/run"
    assert asked.headers["authorization"] == "Bearer token-of-crm"
    assert asked.headers["idempotency-key"] == KEY
    assert pressed.status_code == 202
    assert pressed.json() == {
        "run": RUN,
        "state": "waiting",
        "text": "Your sync starts in a moment.",
        "result": None,
    }


def test_a_lost_response_is_asked_for_again_with_the_same_key(product: Product):
    """The run may exist: another key would start a second one."""

    def respond(request: httpx.Request) -> httpx.Response:
        if len(product.asked) == 1:
            raise httpx.ReadError("connection lost")
        return httpx.Response(201, json=run())

    product.connect(respond)

    assert product.press("ada").status_code == 202
    assert [request.headers["idempotency-key"] for request in product.asked] == [KEY, KEY]


def test_a_run_that_blocks_is_shown_to_the_second_person(product: Product):
    def respond(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(409, json={"detail": SECRET})
        assert dict(request.url.params) == {
            "org": "org_acme",
            "definition": "contacts-sync",
            "state": "waiting,running",
            "limit": "1",
        }
        return httpx.Response(200, json=[run("running", reason=None)])

    product.connect(respond)
    pressed = product.press("ada")

    assert (pressed.status_code, pressed.json()["run"], pressed.json()["state"]) == (202, RUN, "running")


def documented(request: httpx.Request) -> dict[str, Any]:
    """The operation that a request calls; its parameters and body must be those of the document."""
    api = document()
    path = request.url.path.removeprefix(api["servers"][0]["url"])
    [found] = [
        operations[request.method.lower()]
        for template, operations in api["paths"].items()
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path)
    ]
    known = {(each["in"], each["name"]): each["schema"] for each in found["parameters"]}
    assert {("query", name) for name in request.url.params} <= known.keys()
    assert int(request.url.params.get("limit", 1)) <= 1000
    if "idempotency-key" in request.headers:
        assert ("header", "Idempotency-Key") in known
    if request.content:
        body = found["requestBody"]["content"]["application/json"]["schema"]
        jsonschema.validate(json.loads(request.content), body)
    return dict(found)


def test_all_requests_are_those_of_the_documented_api(product: Product):
    """The fake would answer anything."""

    def respond(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(409, json={})
        return httpx.Response(200, json=[run()] if request.url.path.endswith("/runs") else run())

    product.connect(respond)
    product.press("ada")
    product.watch("ada")

    called = [documented(request)["operationId"] for request in product.asked]
    assert called == ["run_definition", "list_runs", "show_run"]
    shown = document()["components"]["schemas"]["Run"]["properties"]
    assert run().keys() <= shown.keys()


def test_a_sync_that_is_switched_off_says_so(product: Product):
    product.connect(
        lambda request: httpx.Response(409 if request.method == "POST" else 200, json=[])  # none unfinished
    )
    pressed = product.press("ada")

    assert (pressed.status_code, pressed.json()) == (
        409,
        {"detail": "The sync of your account is switched off."},
    )


def test_a_run_of_another_org_does_not_exist(product: Product):
    """The product's token may read it, so only the product keeps it from Grace."""
    product.connect(
        lambda request: httpx.Response(200, json=run("succeeded", result={"body": {"contacts": 3}}))
    )

    assert product.watch("ada").json()["result"] == {"contacts": 3}
    others = product.watch("grace")
    product.connect(lambda request: httpx.Response(404, json={}))
    missing = product.watch("grace")

    assert (others.status_code, others.json()) == (404, {"detail": "There is no such sync."})
    assert (missing.status_code, missing.json()) == (404, others.json())


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_what_orgworker_answers_in_trouble_is_not_shown(product: Product, status: int):
    product.connect(lambda request: httpx.Response(status, json={"detail": SECRET}))

    for shown in (product.press("ada"), product.watch("ada")):
        assert (shown.status_code, shown.headers["retry-after"]) == (503, "60")
        assert "try again" in shown.json()["detail"]
        assert "hunter2" not in shown.text


def test_an_orgworker_that_is_down_is_not_asked_for_ever(product: Product):
    def respond(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    product.connect(respond)

    assert product.press("ada").status_code == 503
    assert len(product.asked) == 2


@pytest.mark.parametrize(
    ("row", "state"),
    [
        (run("failed", reason="error", error={"message": SECRET, "trace": SECRET}), "failed"),
        (run("refused", reason="org_mismatch", error={"message": SECRET}), "failed"),
        (run("waiting", reason="no_token"), "delayed"),
        (run("waiting", reason="held"), "waiting"),
        (run("cancelled", reason="requested"), "cancelled"),
        (run("skipped", reason="flag_off"), "skipped"),
    ],
)
def test_people_get_a_sentence_and_no_exception(product: Product, row: dict[str, Any], state: str):
    product.connect(lambda request: httpx.Response(200, json=row))
    shown = product.watch("ada")

    assert (shown.json()["state"], shown.json()["run"]) == (state, RUN)
    assert shown.json()["text"].endswith(".")
    assert "hunter2" not in shown.text


@pytest.mark.parametrize("key", [None, "", "again", "x" * 300])
def test_a_press_without_a_proper_key_starts_nothing(product: Product, key: str | None):
    product.connect(lambda request: httpx.Response(201, json=run()))

    assert product.press("ada", key).status_code in (400, 422)
    assert product.asked == []


def test_a_stranger_starts_and_sees_nothing(product: Product):
    product.connect(lambda request: httpx.Response(200, json=run()))

    assert [product.press("eve").status_code, product.watch("eve").status_code] == [401, 401]
    assert product.asked == []


@pytest.mark.parametrize("path", ["x", "..%2F..%2Fcredentials%2Forg_acme", "../credentials/org_acme"])
def test_the_id_of_a_run_reaches_no_other_address_of_the_api(product: Product, path: str):
    product.connect(lambda request: httpx.Response(200, json=run()))

    assert product.watch("ada", path).status_code in (404, 422)
    assert product.asked == []
