"""No adapter changes anything at a provider without a permit."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import worker
from tests.fakes.clock import ManualClock
from worker.errors import InstallationMismatch
from worker.features.provisioning.management.calls import Calls
from worker.features.provisioning.management.contract import Management, OrgApplication
from worker.features.provisioning.management_wiring import ADAPTERS
from worker.model.provider import ApplicationName
from worker.outbound import open_client
from worker.secret import Secret

NAME = ApplicationName("3f9a", "0193abcd", "org_a")
MADE = OrgApplication("org_a", "app_1", "client_1", Secret("s3cret"), str(NAME))
# A new method is to be added to one of the two.
READS = {"orgs", "org", "org_properties", "applications", "application", "scopes", "properties"}
CHANGES: dict[str, tuple[Any, ...]] = {
    "make": (NAME,),
    "delete": ("app_1",),
    "authorise": (MADE, "https://api.acme.com"),
    "add_scopes": (MADE, "https://api.acme.com", ["read:kb"]),
    "remove_scopes": (MADE, "https://api.acme.com", ["read:kb"]),
    "set_property": (MADE, "plan", "pro"),
}
OPTIONS: dict[str, dict[str, Any]] = {"delete": {"org": "org_a", "name": NAME}}
# Neither has a request to the management API.
OTHERS = {"carried_out", "webhook"}


class Provider:
    """Answers as Kinde does, and keeps every request."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.exists = True

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        path = request.url.path
        if request.method == "DELETE" and path == "/api/v1/applications/app_1":
            self.exists = False
        if path.startswith("/api/v1/applications/") and path.endswith("/properties"):
            return httpx.Response(200, json={"code": "OK", "properties": []})
        if path.startswith("/api/v1/applications/") and request.method == "GET" and not self.exists:
            return httpx.Response(400, json={"errors": [{"code": "APPLICATION_NOT_FOUND"}]})
        if path.startswith("/api/v1/applications/") and request.method == "GET":
            application = {
                "id": "app_1",
                "type": "m2m",
                "name": str(NAME),
                "client_id": "client_1",
                "client_secret": "s3cret",
            }
            return httpx.Response(200, json={"code": "OK", "application": application})
        if path == "/api/v1/apis":
            scopes = [{"id": "scope_1", "key": "read:kb"}]
            api = {"id": "api_1", "audience": "https://api.acme.com", "scopes": scopes}
            return httpx.Response(200, json={"code": "OK", "apis": [api]})
        made = {"id": "app_1", "client_id": "client_1", "client_secret": "s3cret"}
        return httpx.Response(200, json={"code": "OK", "application": made})

    @property
    def changes(self) -> list[str]:
        return [f"{each.method} {each.url.path}" for each in self.requests if each.method != "GET"]


async def bearer(*, rejected: Secret | None = None) -> Secret:
    return Secret("token")


async def no_message(audience: str, message: Any) -> dict[str, Any]:
    return {}


def adapter_of(name: str, provider: Provider, permit: Callable[[], Awaitable[None]]) -> Management:
    client = open_client(httpx.MockTransport(provider))
    clock = ManualClock()
    calls = Calls("main", "https://acme.test", client, bearer, permit=permit, clock=clock, per_second=1000)
    return ADAPTERS[name](calls, no_message, clock=clock)


async def refused() -> None:
    raise InstallationMismatch("a copy")


async def allowed() -> None:
    pass


def methods() -> set[str]:
    return {name for name, _ in inspect.getmembers(Management) if not name.startswith("_")}


def test_every_method_of_the_contract_is_a_read_or_a_change() -> None:
    assert methods() == READS | CHANGES.keys() | OTHERS


@pytest.mark.parametrize("adapter", sorted(ADAPTERS))
@pytest.mark.parametrize("method", sorted(CHANGES))
async def test_a_change_is_sent_with_a_permit_only(adapter: str, method: str) -> None:
    options = OPTIONS.get(method, {})
    without, control = Provider(), Provider()

    with pytest.raises(InstallationMismatch):
        await getattr(adapter_of(adapter, without, refused), method)(*CHANGES[method], **options)
    assert without.changes == []

    # The control: the same call with a permit changes something.
    await getattr(adapter_of(adapter, control, allowed), method)(*CHANGES[method], **options)
    assert len(control.changes) == 1


@pytest.mark.parametrize("adapter", sorted(ADAPTERS))
async def test_reads_need_no_permit(adapter: str) -> None:
    provider = Provider()
    opened = adapter_of(adapter, provider, refused)

    assert await opened.application("app_1", org="org_a", name=NAME)
    await opened.properties(MADE)
    await opened.scopes(MADE, "https://api.acme.com")

    assert provider.changes == []


async def test_each_repetition_asks_again() -> None:
    """A copy that was adopted during a pause sends nothing after it."""
    sent: list[str] = []
    asked: list[None] = []

    def throttling(request: httpx.Request) -> httpx.Response:
        sent.append(request.method)
        return httpx.Response(429, headers={"Retry-After": "1"})

    async def once() -> None:
        asked.append(None)
        if len(asked) > 1:
            raise InstallationMismatch("adopted meanwhile")

    class NoWait(ManualClock):
        async def sleep(self, seconds: float) -> None:
            self.advance(seconds)

    client = open_client(httpx.MockTransport(throttling))
    calls = Calls("main", "https://acme.test", client, bearer, permit=once, clock=NoWait(), per_second=1000)
    with pytest.raises(InstallationMismatch):
        await calls.write("POST", "/x", "/x", scope="create:x", repeatable=True)

    assert sent == ["POST"] and len(asked) == 2


def test_only_the_seam_sends_requests_to_a_management_api() -> None:
    """What an adapter imports: another HTTP client would go past the permit."""
    folder = Path(worker.__file__).parent / "features" / "provisioning" / "management"
    imports = {
        path.name: {name for node in ast.walk(ast.parse(path.read_text())) for name in _imported(node)}
        for path in folder.glob("*.py")
    }

    sends = {"httpx", "httpx.AsyncClient", "worker.guard.http", "worker.outbound", "socket", "urllib.request"}
    assert imports["calls.py"] & sends
    assert {name for name, found in imports.items() if found & sends} == {"calls.py"}


def test_every_management_api_is_opened_with_the_permit_of_the_database() -> None:
    """And by these modules only: a new one is to be added to the verbs of test_installation too."""
    package = Path(worker.__file__).parent
    found: dict[str, list[str]] = {}
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("open_management", "Calls"):
                permits = [ast.unparse(each.value) for each in node.keywords if each.arg == "permit"]
                found.setdefault(str(path.relative_to(package)), []).extend(permits)
    # The parameter of `open_management` goes to `Calls`.
    assert found == {
        "features/provisioning/verbs.py": ["ownership.permit"],
        "features/provisioning/wiring.py": ["ownership.permit"],
        "features/provisioning/management_wiring.py": ["permit"],
    }


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [each.name for each in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return []
