"""The Kinde adapter over HTTP, against a provider held to Kinde's OpenAPI document, with all its faults."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes.kinde import webhooks
from tests.fakes.kinde.faults import Script
from tests.fakes.kinde.server import MANAGER, Kinde, serve_kinde
from worker.clock import SystemClock
from worker.errors import (
    ConfigurationError,
    ForeignApplication,
    NotFound,
    ProviderRefused,
    ProviderUnavailable,
    Unclear,
    WebhookRefused,
    WorkerError,
)
from worker.features.provisioning.management.contract import Management, OrgApplication
from worker.features.provisioning.management.kinde import KindeManagement
from worker.features.provisioning.management_wiring import management_secret, open_management
from worker.model.provider import ApplicationName
from worker.process.confinement import readable_management_secrets

AUDIENCE = "https://api.acme.com"
Opened = Callable[[], AbstractAsyncContextManager[Management]]


@pytest.fixture(scope="module")
def served() -> Iterator[Kinde]:
    with serve_kinde() as kinde:
        yield kinde


@pytest.fixture
def kinde(served: Kinde) -> Iterator[Kinde]:
    served.reset()
    served.api.add_api("Acme's API", AUDIENCE, ("read:kb", "write:kb"))
    yield served
    assert served.undocumented() == []


async def allowed() -> None:
    """Every change is this installation's."""


@pytest.fixture
async def management(kinde: Kinde, tmp_path: Path) -> AsyncIterator[Management]:
    (tmp_path / "management__main").write_text(f"{kinde.secret}\n")
    async with open_management(kinde.settings(tmp_path), "main", SystemClock(), permit=allowed) as opened:
        yield opened


def name_of(org: str, key: str = "0193abcd") -> ApplicationName:
    return ApplicationName("3f9a", key, org)


async def listed(pages: AsyncIterator[Any]) -> list[Any]:
    return [item async for page in pages for item in page]


async def token_claims(kinde: Kinde, application: OrgApplication) -> dict[str, Any]:
    """The claims of a token that the application gets for the audience."""
    form = {
        "grant_type": "client_credentials",
        "client_id": application.client_id,
        "client_secret": application.secret.reveal(),
        "audience": AUDIENCE,
    }
    async with httpx.AsyncClient() as client:
        body = (await client.post(f"{kinde.url}/oauth2/token", data=form)).json()
    return kinde.provider.keys.read(body["access_token"], audience=AUDIENCE)


async def test_an_org_gets_an_application_with_exactly_its_scopes_in_few_requests(
    kinde: Kinde, management: Management
):
    kinde.add_orgs(2)

    made = await management.make(name_of("org_1"))
    await management.authorise(made, AUDIENCE)
    await management.add_scopes(made, AUDIENCE, ["read:kb"])

    claims = await token_claims(kinde, made)
    assert (claims["org_code"], claims["azp"], claims["scp"]) == ("org_1", made.client_id, ["read:kb"])
    # Made, read for its name, authorised, and one for the scope; the list of APIs counts once for all orgs.
    assert kinde.carried_out() == sum(management.carried_out.values()) == 5
    assert kinde.api.carried_out["GET /api/v1/apis"] == 1

    await management.add_scopes(made, AUDIENCE, ["read:kb", "write:kb"])
    await management.remove_scopes(made, AUDIENCE, ["read:kb"])
    await management.remove_scopes(made, AUDIENCE, ["read:kb"])
    assert (await token_claims(kinde, made))["scp"] == ["write:kb"]


async def test_pages_end_and_each_org_and_application_comes_once(kinde: Kinde, management: Management):
    kinde.add_orgs(1_001)
    kinde.api.others.append({"id": "spa", "name": "A web app", "type": "spa"})
    made = [await management.make(name_of(f"org_{n}")) for n in (1, 2)]

    pages = [page async for page in management.orgs()]
    applications = await listed(management.applications())

    assert [len(page) for page in pages] == [500, 500, 1]
    assert [org.code for page in pages for org in page] == list(kinde.api.orgs)
    assert [(each.id, each.made_as) for each in applications] == [
        (MANAGER, None),
        *((each.id, ApplicationName.parse(each.name)) for each in made),
    ]


async def test_exactly_full_pages_end(kinde: Kinde, management: Management):
    kinde.add_orgs(1_000)

    assert [len(page) async for page in management.orgs()] == [500, 500]
    assert kinde.api.carried_out["GET /api/v1/organizations"] == 2


async def test_one_org_is_read_with_its_fields_and_an_unknown_one_is_none(
    kinde: Kinde, management: Management
):
    kinde.api.add_org("org/../a b?", "Odd", external_id="c-17", handle="odd", is_default=True)

    org = await management.org("org/../a b?")

    assert org is not None
    assert (org.name, org.external_id, org.handle, org.is_default) == ("Odd", "c-17", "odd", True)
    assert await management.org("org_gone") is None


async def test_properties_are_set_shown_and_emptied(kinde: Kinde, management: Management):
    kinde.add_orgs(1)
    kinde.api.application_properties = {"plan", "beta.x"}
    kinde.api.org_properties = {"tier"}
    made = await management.make(name_of("org_1"))

    await management.set_property(made, "plan", "pro & more")
    await management.set_property(made, "beta.x", True)
    kinde.api.orgs["org_1"].properties["tier"] = "gold"
    assert await management.properties(made) == {"plan": "pro & more", "beta.x": "true"}
    assert await management.org_properties("org_1") == {"tier": "gold"}

    await management.set_property(made, "plan", None)
    kinde.api.orgs["org_1"].properties["tier"] = ""
    assert await management.properties(made) == {"beta.x": "true"}
    assert await management.org_properties("org_1") == {}
    with pytest.raises(ProviderRefused) as raised:
        await management.set_property(made, "unknown", "x")
    assert raised.value.detail == "PROPERTY_NOT_FOUND"
    assert "define the property" in raised.value.fix


async def test_what_is_gone_counts_as_deleted(kinde: Kinde, management: Management):
    kinde.add_orgs(1)
    made = await management.make(name_of("org_1"))

    assert await management.delete(made.id, org="org_1", name=name_of("org_1")) is True
    assert await management.delete(made.id, org="org_1", name=name_of("org_1")) is False
    assert await management.application(made.id, org="org_1", name=name_of("org_1")) is None
    assert kinde.applications_of("org_1") == []


async def test_an_unknown_audience_or_scope_is_named_and_nothing_is_written(
    kinde: Kinde, management: Management
):
    kinde.add_orgs(1)
    made = await management.make(name_of("org_1"))
    before = kinde.carried_out()

    with pytest.raises(ProviderRefused, match="no API with the audience https://other"):
        await management.authorise(made, "https://other.example")
    with pytest.raises(ProviderRefused, match="no scope write:all"):
        await management.add_scopes(made, AUDIENCE, ["write:all"])
    await management.remove_scopes(made, AUDIENCE, ["write:all"])
    # The management API itself is none that an org's application is let use.
    with pytest.raises(ProviderRefused):
        await management.authorise(made, f"{kinde.url}/api")

    assert kinde.carried_out() - before == kinde.api.carried_out["GET /api/v1/apis"]


async def test_scopes_that_the_list_of_apis_leaves_out_are_read_by_api(
    kinde: Kinde, management: Management, monkeypatch: pytest.MonkeyPatch
):
    kinde.add_orgs(1)
    made = await management.make(name_of("org_1"))

    def without(code: str, body: dict[str, Any]) -> None:
        for api in body.get("apis", ()):
            api.pop("scopes", None)

    async with lying(kinde, monkeypatch, without):
        await management.authorise(made, AUDIENCE)
        await management.add_scopes(made, AUDIENCE, ["write:kb"])

    assert kinde.applications_of("org_1")[0].scopes == ("write:kb",)


async def test_a_scope_that_was_made_again_is_found_by_its_new_id(kinde: Kinde, management: Management):
    kinde.add_orgs(1)
    made = await management.make(name_of("org_1"))
    await management.authorise(made, AUDIENCE)
    api = next(api for api in kinde.api.apis.values() if api.audience == AUDIENCE)

    api.scopes = {f"new-{id}": key for id, key in api.scopes.items()}
    await management.add_scopes(made, AUDIENCE, ["read:kb"])

    assert kinde.applications_of("org_1")[0].scopes == ("read:kb",)
    kinde.provider.applications.pop(made.client_id)
    with pytest.raises(ProviderRefused, match="APPLICATION_NOT_FOUND"):
        await management.add_scopes(made, AUDIENCE, ["read:kb"])


@pytest.mark.parametrize("fault", ["cut", "late_error"])
async def test_an_application_made_without_a_clear_answer_is_found_by_its_name(
    kinde: Kinde, management: Management, fault: Any
):
    kinde.add_orgs(2)
    kinde.script = Script(only=lambda method, path: method == "POST", first=[fault])

    with pytest.raises(Unclear):
        await management.make(name_of("org_1"))

    (found,) = [each for each in await listed(management.applications()) if each.made_as]
    adopted = await management.application(found.id, org="org_1", name=name_of("org_1"))
    assert adopted is not None
    assert [app.client_id for app in kinde.applications_of("org_1")] == [adopted.client_id]
    assert kinde.api.carried_out["POST /api/v1/applications"] == 1


async def test_an_application_that_was_made_and_cannot_be_read_is_unclear(
    kinde: Kinde, management: Management
):
    kinde.add_orgs(1)
    kinde.script = Script(only=lambda method, path: method == "GET", first=["throttle"], retry_after="3600")

    with pytest.raises(Unclear, match="does not show it"):
        await management.make(name_of("org_1"))

    assert len(kinde.applications_of("org_1")) == 1


@pytest.mark.parametrize("fault", ["cut", "late_error", "error"])
async def test_a_deletion_without_a_clear_answer_is_looked_up(
    kinde: Kinde, management: Management, fault: Any
):
    kinde.add_orgs(1)
    made = await management.make(name_of("org_1"))
    kinde.script = Script(only=lambda method, path: method == "DELETE", first=[fault])

    gone_already = await management.delete(made.id, org="org_1", name=name_of("org_1")) is False

    assert gone_already == (fault != "error")
    assert kinde.applications_of("org_1") == []
    assert kinde.api.carried_out["DELETE /api/v1/applications/{application_id}"] == 1


async def test_thirty_orgs_through_a_storm_of_faults_have_one_application_each(kinde: Kinde, tmp_path: Path):
    """Throttled, failing, slow, and cut off after the change: 0 duplicates, each with exactly its scopes."""
    kinde.add_orgs(30)
    kinde.script = Script(
        seed=7, throttle=0.04, error=0.04, late_error=0.04, slow=0.05, cut=0.05, retry_after="0.1"
    )
    (tmp_path / "management__main").write_text(kinde.secret)

    async def provision(management: Management, org: str) -> None:
        name, made = name_of(org), None
        while made is None:
            try:
                made = await management.make(name)
            except Unclear:
                found = [each for each in await listed(management.applications()) if each.made_as == name]
                if found:
                    made = await management.application(found[0].id, org=org, name=name)
        await management.authorise(made, AUDIENCE)
        await management.add_scopes(made, AUDIENCE, ["read:kb"])

    async with open_management(kinde.settings(tmp_path), "main", SystemClock(), permit=allowed) as management:
        await asyncio.gather(*(provision(management, code) for code in kinde.api.orgs))

    for code in kinde.api.orgs:
        (app,) = kinde.applications_of(code)
        assert (app.scopes, app.audiences) == (("read:kb",), (AUDIENCE,))
    assert kinde.api.carried_out["POST /api/v1/applications"] == 30
    assert all(kinde.script.done[kind] for kind in ("throttle", "error", "late_error", "slow", "cut"))


@asynccontextmanager
async def lying(
    kinde: Kinde, monkeypatch: pytest.MonkeyPatch, change: Callable[[str, dict[str, Any]], None]
) -> AsyncIterator[None]:
    """Responses changed by `change`, which gets the method and route and the body."""
    from starlette.responses import JSONResponse

    real = JSONResponse.render

    def render(response: JSONResponse, content: Any) -> bytes:
        if isinstance(content, dict):
            change(content.get("code", ""), content)
        return real(response, content)

    with monkeypatch.context() as patch:
        patch.setattr(JSONResponse, "render", render)
        yield


def state(kinde: Kinde) -> list[Any]:
    apps = kinde.provider.applications.values()
    return [(app.client_id, app.org_code, app.scopes, app.audiences, app.properties) for app in apps]


async def test_a_response_that_names_another_orgs_application_is_refused_and_changes_nothing(
    kinde: Kinde, management: Management, monkeypatch: pytest.MonkeyPatch
):
    kinde.add_orgs(2)
    theirs = await management.make(name_of("org_2"))
    ours = await management.make(name_of("org_1"))
    before = state(kinde)

    def made_as_theirs(code: str, body: dict[str, Any]) -> None:
        if code == "APPLICATION_CREATED":
            body["application"] |= {"id": theirs.id, "client_id": theirs.client_id}

    async with lying(kinde, monkeypatch, made_as_theirs):
        with pytest.raises(ForeignApplication):
            await management.make(name_of("org_1", "0193beef"))
    # What it made is there under its name; nothing else has changed.
    assert state(kinde)[: len(before)] == before

    def shows_theirs(**changes: str) -> Callable[[str, dict[str, Any]], None]:
        def change(code: str, body: dict[str, Any]) -> None:
            if code == "OK" and "application" in body:
                body["application"] |= changes

        return change

    lies = [
        {"id": theirs.id},
        {"client_id": theirs.client_id},
        {"name": theirs.name},
        {"org_code": "org_2"},
        {"type": "spa"},
        {"name": "renamed by hand"},
    ]
    for lie in lies:
        async with lying(kinde, monkeypatch, shows_theirs(**lie)):
            with pytest.raises(ForeignApplication) as raised:
                await management.application(ours.id, org="org_1", name=name_of("org_1"))
            with pytest.raises(ForeignApplication):
                await management.delete(ours.id, org="org_1", name=name_of("org_1"))
            assert ours.secret.reveal() not in f"{raised.value!r}{raised.value.fix}"

    def connects_theirs(code: str, body: dict[str, Any]) -> None:
        if code == "API_APPLICATIONS_UPDATED":
            body["applications_connected"] = [theirs.client_id]

    async with lying(kinde, monkeypatch, connects_theirs):
        with pytest.raises(ForeignApplication):
            await management.authorise(ours, AUDIENCE)
    # The lies were not in the document, nor is an exchange of theirs of interest.
    kinde.recorded.exchanges.clear()


async def test_an_application_that_another_made_is_the_orgs_by_its_client_id_only(
    kinde: Kinde, management: Management
):
    kinde.add_orgs(2)
    by_hand = kinde.provider.management.make_application("Made by hand", "org_1")
    theirs = await management.make(name_of("org_2"))

    found = await management.application(by_hand.client_id, org="org_1", client_id=by_hand.client_id)
    assert found is not None and found.name == "Made by hand"
    with pytest.raises(ForeignApplication):
        await management.application(by_hand.client_id, org="org_1", client_id=theirs.client_id)
    # Its name says that it is another org's, whatever client id the caller believes in.
    with pytest.raises(ForeignApplication):
        await management.application(theirs.id, org="org_1", client_id=theirs.client_id)
    with pytest.raises(ValueError, match="pass the name or the client id"):
        await management.application(theirs.id, org="org_1")


BROKEN = {
    "no list": {"organizations": None},
    "no code": {"organizations": [{"name": "Acme"}]},
    "a code that is no text": {"organizations": [{"code": 7, "name": "Acme"}]},
    "a name that is no text": {"organizations": [{"code": "org_a", "name": 7}]},
    "not objects": {"organizations": ["org_a"]},
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
async def test_a_broken_list_of_orgs_is_an_error_and_never_a_shorter_list(
    kinde: Kinde, management: Management, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
):
    kinde.add_orgs(3)
    async with lying(kinde, monkeypatch, lambda code, body: body.update(change)):
        with pytest.raises(ProviderUnavailable, match="malformed"):
            await listed(management.orgs())
    kinde.recorded.exchanges.clear()


async def test_pages_that_lead_back_are_an_error(
    kinde: Kinde, management: Management, monkeypatch: pytest.MonkeyPatch
):
    kinde.add_orgs(3)
    async with lying(kinde, monkeypatch, lambda code, body: body.update(next_token="org_1")):
        with pytest.raises(ProviderUnavailable, match="does not end"):
            await listed(management.orgs())


@pytest.mark.parametrize("lie", [{"id": "another"}, {"name": 7}], ids=["foreign", "malformed"])
async def test_no_error_log_or_frame_has_a_secret(
    kinde: Kinde,
    management: Management,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    lie: dict[str, Any],
):
    """Some services for errors report the variables of each frame."""
    caplog.set_level(logging.DEBUG)
    kinde.add_orgs(1)
    made = await management.make(name_of("org_1"))

    def shows(code: str, body: dict[str, Any]) -> None:
        if code == "OK" and "application" in body:
            body["application"] |= lie

    async with lying(kinde, monkeypatch, shows):
        for work in (
            management.application(made.id, org="org_1", name=name_of("org_1")),
            management.make(name_of("org_1", "0193beef")),
        ):
            with pytest.raises(WorkerError) as raised:
                await work
            told = traceback.TracebackException.from_exception(raised.value, capture_locals=True)
            # The frames of this test hold the provider with all of its secrets.
            frames = [frame for frame in told.stack if "/worker/" in frame.filename]
            shown = f"{[frame.locals for frame in frames]}{raised.value!r}{caplog.text}"
            assert len(frames) >= 1
            secrets = [app.client_secret for app in kinde.provider.applications.values()]
            tokens = [token.rpartition(".")[2] for token in kinde.provider.issued]
            assert [each for each in (*secrets, *tokens) if each in shown] == []
    kinde.recorded.exchanges.clear()


async def test_a_webhook_is_read_with_the_keys_of_the_issuer(kinde: Kinde, management: Management):
    """Over HTTP, as the provisioner gets it; tests/unit has the table of what is refused."""
    kinde.add_orgs(1)
    made = await management.make(name_of("org_1"))
    await management.authorise(made, AUDIENCE)
    content = webhooks.payload("organization.created", "org_1", at=datetime.now(UTC))
    keys = kinde.provider.keys

    notice = await management.webhook(webhooks.signed(keys, content).encode())
    assert (notice.kind, notice.org) == ("org_created", "org_1")
    before = state(kinde)

    messages = {
        "signature": webhooks.signed(keys, content, forged=True),
        "token": keys.sign(await token_claims(kinde, made) | content),
        "type": webhooks.signed(keys, content, typ="at+jwt"),
    }
    for detail, message in messages.items():
        with pytest.raises(WebhookRefused) as raised:
            await management.webhook(message.encode())
        assert raised.value.detail == detail
    assert state(kinde) == before


async def test_credentials_without_a_scope_are_an_error_that_names_it(kinde: Kinde, management: Management):
    manager = kinde.provider.applications[MANAGER]
    manager.scopes = tuple(scope for scope in manager.scopes if scope != "read:applications")

    with pytest.raises(ConfigurationError) as raised:
        await listed(management.applications())

    assert "read:applications" in raised.value.fix
    assert "[issuers.main.management]" in raised.value.fix


async def test_a_management_application_that_was_deleted_is_reported(kinde: Kinde, management: Management):
    assert isinstance(management, KindeManagement)
    del kinde.provider.applications[MANAGER]

    with pytest.raises(ConfigurationError, match="rejects the management credentials"):
        await listed(management.orgs())


async def test_opening_needs_an_issuer_a_client_a_secret_an_adapter_and_encryption(
    kinde: Kinde, tmp_path: Path
):
    async def opened(settings: Any, issuer: str = "main") -> None:
        async with open_management(settings, issuer, SystemClock(), permit=allowed):
            pass

    with pytest.raises(NotFound, match="no issuer 'other'"):
        await opened(kinde.settings(tmp_path), "other")
    with pytest.raises(ConfigurationError, match="management__main cannot be read"):
        await opened(kinde.settings(tmp_path))
    with pytest.raises(ConfigurationError, match="secrets_dir is not set"):
        await opened(kinde.settings(""))
    (tmp_path / "management__main").write_text(" \n")
    with pytest.raises(ConfigurationError, match="is empty"):
        await opened(kinde.settings(tmp_path))
    (tmp_path / "management__main").write_text(kinde.secret)
    with pytest.raises(ConfigurationError, match=r"add \[issuers.main.management\]|has no management API"):
        await opened(kinde.settings(tmp_path, management={}))
    with pytest.raises(ConfigurationError, match="no management adapter for Auth0"):
        await opened(kinde.settings(tmp_path, profile="auth0"))
    insecure = {"client_id": MANAGER, "url": "http://acme.kinde.com"}
    with pytest.raises(ConfigurationError, match="must be https"):
        await opened(kinde.settings(tmp_path, management=insecure))
    assert management_secret("main", str(tmp_path)).reveal() == kinde.secret
    assert readable_management_secrets(kinde.settings(tmp_path)) == ["management__main"]
    assert readable_management_secrets(kinde.settings("")) == []
