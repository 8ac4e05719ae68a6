"""Each form of the guard in its framework: hostile tokens, whose a token is, and what is answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Annotated

import httpx
import pytest
from django.http import HttpRequest, HttpResponse
from fastapi import Depends, FastAPI, WebSocket

from tests.fakes import forms
from tests.fakes.clock import ManualClock
from tests.fakes.forms import FORMS, JOINED, Answer, Form
from tests.fakes.issuer import AUDIENCE, URL, FakeIssuer, make_token
from tests.unit.guard.test_hostile_tokens import HOSTILE, claims, good
from worker.guard import Claims, ConfigurationError, Guard, RequireToken, django, fastapi, flask, wsgi
from worker.guard.access import bearer_token
from worker.guard.django import RequireTokenMiddleware

HERE = "/orgs/org_a/clients/client-a"


@pytest.fixture
def issuer(clock: ManualClock) -> FakeIssuer:
    issuer = FakeIssuer(clock)
    issuer.published = ["k1", "k2"]
    return issuer


@pytest.fixture(params=FORMS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def form(name: str, issuer: FakeIssuer, clock: ManualClock) -> Form:
    forms.reached.clear()
    return FORMS[name](Guard(URL, audience=AUDIENCE, client=issuer.client, clock=clock))


async def ask(form: Form, *tokens: str, path: str = HERE) -> Answer:
    return await form(path, [b"Bearer " + token.encode() for token in tokens])


def content(name: str, answer: Answer) -> dict[str, str]:
    """FastAPI puts the content of an error into `detail`."""
    return answer.json["detail"] if name == "fastapi" else answer.json


async def test_a_good_token_reaches_the_view_with_its_claims(form: Form) -> None:
    answer = await ask(form, good())

    assert (answer.status, answer.json) == (200, {"org": "org_a", "client": "client-a"})
    assert forms.reached[0].properties == {"model_version": "gpt-4"}


async def test_no_hostile_token_reaches_the_view(form: Form) -> None:
    """Each is answered with its own code."""
    assert (await ask(form, good())).status == 200
    forms.reached.clear()
    wrong = []
    for case, code, build in HOSTILE:
        text = build()
        if text != text.strip():
            continue  # white space around a token belongs to the header
        answer = await ask(form, text)
        reason, _, detail = code.rpartition("/")
        if bearer_token(f"Bearer {text.encode().decode('latin-1')}") is None:
            wanted, part = 401, 'Bearer realm="api"'
        elif detail in ("other_org", "other_client") or reason == "scope_missing":
            wanted, part = 403, 'error="insufficient_scope"'
        else:
            wanted, part = 401, f"the token is invalid: {detail}"
        if answer.status != wanted or part not in answer.challenge:
            wrong.append((case, answer.status, answer.challenge))

    assert wrong == []
    assert forms.reached == []
    assert len(HOSTILE) >= 90


@pytest.mark.parametrize(
    ("path", "description"),
    [
        ("/orgs/org_b/clients/client-a", "the token is for another org"),
        ("/orgs/org_a/clients/client-b", "the token was issued to another client"),
    ],
)
async def test_another_orgs_or_clients_path_is_403(
    form: Form, name: str, path: str, description: str
) -> None:
    answer = await ask(form, good(), path=path)

    assert answer.status == 403
    assert content(name, answer) == {"error": "insufficient_scope", "error_description": description}
    assert forms.reached == []


async def test_a_missing_scope_is_403_and_named(form: Form) -> None:
    answer = await ask(form, make_token(claims(scope="write:kb")))

    assert answer.status == 403
    assert 'scope="read:kb"' in answer.challenge
    assert forms.reached == []


@pytest.mark.parametrize("values", [[], [b""], [b"Basic eDp5"], [b"Bearer"]])
async def test_no_token_is_401_without_an_error_code(form: Form, values: Sequence[bytes]) -> None:
    answer = await form(HERE, values)

    assert (answer.status, answer.challenge) == (401, 'Bearer realm="api"')
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-type"] == "application/json"


async def test_two_authorization_headers_are_400(form: Form, name: str) -> None:
    """Also if both have the same good token."""
    answer = await ask(form, good(), good())

    assert answer.status == 400
    assert content(name, answer)["error"] == "invalid_request"
    assert forms.reached == []


@pytest.mark.parametrize("before", [b"", b"Basic eDp5"])
async def test_a_comma_in_the_value_is_refused(form: Form, name: str, before: bytes) -> None:
    """A client may send one header that looks like two joined ones."""
    answer = await form(HERE, [before + b", Bearer " + good().encode()])

    assert answer.status == (400 if name in JOINED else 401)
    assert forms.reached == []


async def test_keys_that_cannot_be_read_are_503(form: Form, name: str, issuer: FakeIssuer) -> None:
    issuer.keys = lambda: httpx.Response(500)

    answer = await ask(form, good())

    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert content(name, answer)["error"] == "temporarily_unavailable"


async def test_many_requests_cost_one_fetch_of_keys(form: Form, issuer: FakeIssuer) -> None:
    for _ in range(5):
        assert (await ask(form, good())).status == 200

    assert issuer.count("/.well-known/jwks") == 1


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        (None, "ORGWORKER_GUARD is not in the settings"),
        ({"issuer": URL}, "needs an audience"),
        ({"issuer": URL, "audience": AUDIENCE, "scope": ["read:kb"]}, "unknown key 'scope'"),
        ({"issuer": URL, "audience": AUDIENCE, "scopes": "read:kb"}, "scopes must be a list"),
        ({"issuer": URL, "audience": AUDIENCE, "org_of": "product.nowhere"}, "org_of 'product.nowhere'"),
        ({"issuer": URL, "audience": AUDIENCE, "open_paths": "/health"}, "open_paths must be a list"),
        ({"guard": "guard"}, "guard 'guard' cannot be imported"),
        ({"guard": URL}, "cannot be imported"),
    ],
)
def test_a_wrong_setting_stops_the_start_and_is_named(setting: object, problem: str) -> None:
    with (
        forms.django_settings(ORGWORKER_GUARD=setting),
        pytest.raises(ConfigurationError, match=problem) as error,
    ):
        RequireTokenMiddleware(lambda request: None)

    assert error.value.fix


async def test_a_django_decorator_takes_what_it_is_not_given_from_the_setting(
    issuer: FakeIssuer, clock: ManualClock
) -> None:
    """Scopes add up; its own functions come first."""
    setting = {
        "guard": Guard(URL, audience=AUDIENCE, client=issuer.client, clock=clock),
        "scopes": ["read:kb"],
        "org_of": "tests.fakes.forms.django_org",
        "client_of": lambda request: "nobody",
    }
    decorated = django.require_token(scopes={"write:kb"}, client_of=forms.django_client)(forms.django_view)
    form = forms.in_django(decorated, forms.WSGIHandler, forms.by_wsgi, ORGWORKER_GUARD=setting)

    assert (await ask(form, good())).status == 200
    assert (await ask(form, good(), path="/orgs/org_b/clients/client-a")).status == 403
    assert (await ask(form, good(), path="/orgs/org_a/clients/client-b")).status == 403
    for scope in ("read:kb", "write:kb"):
        assert (await ask(form, make_token(claims(scope=scope)))).status == 403


async def test_open_paths_need_no_token(issuer: FakeIssuer, clock: ManualClock) -> None:
    guard = Guard(URL, audience=AUDIENCE, client=issuer.client, clock=clock)

    def plain(environ: dict, start_response: Callable[..., object]) -> list[bytes]:
        assert "orgworker.claims" not in environ
        start_response("200 OK", [])
        return [b"ok"]

    def view(request: HttpRequest) -> HttpResponse:
        assert not hasattr(request, "claims")
        return HttpResponse("ok")

    setting = {"guard": guard, "open_paths": ["/health"]}
    middleware = ["worker.guard.django.RequireTokenMiddleware"]
    in_django = forms.in_django(
        view, forms.WSGIHandler, forms.by_wsgi, route="health", MIDDLEWARE=middleware, ORGWORKER_GUARD=setting
    )
    for form in (forms.by_wsgi(wsgi.RequireToken(plain, guard, open_paths={"/health"})), in_django):
        assert (await form("/health", [])).body == b"ok"
        assert (await form("/health/", [])).status == 401


@pytest.mark.parametrize("form", [flask, fastapi, django], ids=["flask", "fastapi", "django"])
def test_a_decorator_without_parentheses_is_a_mistake_that_is_named(form: ModuleType) -> None:
    with pytest.raises(ConfigurationError, match="is a guard, not function") as error:
        form.require_token(lambda request: None)

    assert "@require_token(guard)" in error.value.fix


async def test_scopes_are_needed_beside_those_of_a_guard_that_is_given(
    issuer: FakeIssuer, clock: ManualClock
) -> None:
    guard = Guard(URL, audience=AUDIENCE, client=issuer.client, clock=clock, scopes={"read:kb"})

    async def app(*ignored: object) -> None:
        raise AssertionError("reached")

    form = forms.by_asgi(RequireToken(app, guard, scopes={"admin:kb"}))

    assert 'scope="admin:kb"' in (await ask(form, good())).challenge


def test_one_text_is_no_list_of_scopes_or_open_paths() -> None:
    """`open_paths="/health"` would open "/", because a text is a series of letters."""
    with pytest.raises(ConfigurationError, match="scopes must be a list"):
        Guard(URL, audience=AUDIENCE, scopes="read:kb")
    guard = Guard(URL, audience=AUDIENCE)
    for middleware in (RequireToken, wsgi.RequireToken):
        for name in ("scopes", "open_paths"):
            with pytest.raises(ConfigurationError, match=f"{name} must be a list"):
                middleware(None, guard, **{name: "/health"})  # type: ignore[arg-type]


def test_the_document_of_a_fastapi_names_the_bearer_token() -> None:
    app = FastAPI()
    app.get("/", dependencies=[Depends(fastapi.require_token(Guard(URL, audience=AUDIENCE)))])(lambda: None)

    document = app.openapi()

    assert document["paths"]["/"]["get"]["security"] == [{"orgToken": []}]
    scheme = document["components"]["securitySchemes"]["orgToken"]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")


async def test_fastapi_closes_a_websocket_without_a_token(issuer: FakeIssuer, clock: ManualClock) -> None:
    guard = Guard(URL, audience=AUDIENCE, client=issuer.client, clock=clock)
    app = FastAPI()

    async def socket(websocket: WebSocket, claims: object) -> None:
        raise AssertionError("reached")

    needed = Annotated[Claims, Depends(fastapi.require_token(guard))]
    socket.__annotations__ = {"websocket": WebSocket, "claims": needed}
    app.websocket("/")(socket)

    sent = await forms.open_websocket(app)

    assert [(message["type"], message["code"]) for message in sent] == [("websocket.close", 1008)]
