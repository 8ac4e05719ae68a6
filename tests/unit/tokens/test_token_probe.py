"""What `orgs check` and `credentials verify` find in a token, and what they say about it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import pytest

from tests.fakes.clock import ManualClock
from tests.fakes.issuer import AUDIENCE, ORG, App, FakeCredentials, FakeIssuer, kinde_issuer, make_token
from worker.errors import Diagnostic
from worker.tokens.token_probe import Need, ProbeResult, TokenProbe, watch

NEED = Need(AUDIENCE, frozenset({"read:kb"}), definitions=("nightly",))


@dataclass
class Look:
    """An issuer, one org's application, and an examiner."""

    clock: ManualClock
    issuer: FakeIssuer
    app: App
    examiner: TokenProbe

    async def find(self, need: Need = NEED) -> ProbeResult:
        credential = FakeCredentials().add(ORG, "client-a", "secret-a")
        return await self.examiner.probe(credential, need)


@pytest.fixture
async def look(clock: ManualClock) -> AsyncIterator[Look]:
    issuer = FakeIssuer(clock)
    app = issuer.add(App("org_a", "client-a", "secret-a"))
    async with issuer.client() as client:
        watch(client)
        examiner = TokenProbe(kinde_issuer(), client, clock=clock)
        yield Look(clock, issuer, app, examiner)
        await examiner.close()


def named(found: ProbeResult, check: str) -> Diagnostic:
    return next(finding for finding in found.diagnostics if finding.check == check)


async def test_a_good_token_is_told_of_without_any_value(look: Look) -> None:
    """Properties and flags by name and type: a property may be a secret."""
    look.app.properties = {"api_key": "canary-value", "beta": True}
    look.app.flags = {"agent-v2": {"t": "b", "v": True}, "model": {"t": "s", "v": "canary-flag"}}

    found = await look.find()

    assert found.ok
    assert named(found, "properties").detail == "api_key (text), beta (boolean)"
    assert named(found, "flags").detail == "agent-v2 (boolean), model (string)"
    assert named(found, "lifetime").detail == "86400 s"
    assert "canary" not in str(found)
    assert look.issuer.count() == 1


async def test_scopes_that_nothing_needs_are_named_and_are_no_failure(look: Look) -> None:
    found = await look.find()

    unused = named(found, "unused")
    assert (unused.ok, unused.detail) == (True, "write:kb")
    assert "client-a" in unused.fix
    need = Need(AUDIENCE, frozenset({"read:kb"}), definitions=("nightly",), elsewhere=frozenset({"write:kb"}))
    assert "unused" not in {each.check for each in (await look.find(need)).diagnostics}


async def test_a_missing_scope_is_named_with_what_to_do(look: Look) -> None:
    need = Need(AUDIENCE, frozenset({"read:kb", "ask:model"}), definitions=("nightly",))

    found = await look.find(need)

    scopes = named(found, "scopes")
    assert not scopes.ok
    assert "missing: ask:model" in scopes.detail
    assert "grant ask:model to the client client-a" in scopes.fix and "orgs check org_a" in scopes.fix


async def test_a_provider_that_gives_only_what_is_asked_for_is_asked_for_it(look: Look) -> None:
    """Logto's tokens have no scope unless it is named."""
    look.issuer.answer = lambda form: (
        None
        if "scope" in form
        else httpx.Response(
            200, json={"access_token": look.issuer.token(look.app, scope=""), "token_type": "bearer"}
        )
    )

    assert (await look.find()).ok
    assert [form.get("scope") for _, path, form in look.issuer.requests if path == "/oauth2/token"] == [
        None,
        "read:kb",
    ]


async def test_a_secret_that_is_rejected_says_how_to_give_another(look: Look) -> None:
    look.app.secret = "another"

    found = await look.find()

    assert (found.ok, found.rejected, found.transient) == (False, "invalid_client", False)
    token = named(found, "token")
    assert "credentials rotate org_a --client-id client-a --secret-file" in token.fix
    assert look.issuer.count() == 1


async def test_an_issuer_that_is_away_is_no_verdict_on_the_org(look: Look) -> None:
    look.issuer.answer = lambda form: httpx.Response(503)

    found = await look.find()

    assert (found.ok, found.transient, found.rejected) == (False, True, None)
    assert "curl" in named(found, "token").fix


async def test_a_token_that_is_too_large_says_what_to_take_out_of_it(look: Look) -> None:
    look.issuer.answer = lambda form: httpx.Response(200, content=b" " * 70_000)

    found = await look.find()

    assert (found.ok, found.transient, found.rejected) == (False, False, "answer_too_large")
    token = named(found, "token")
    assert "its answer is too large" in token.detail
    assert "fewer permissions and properties" in token.fix
    assert "client-a" in token.fix and "orgs check org_a" in token.fix


async def test_a_client_of_another_org_is_found_out(look: Look) -> None:
    look.app.replace["org_code"] = "org_other"

    found = await look.find()

    assert named(found, "org").detail == "the token says 'org_other', not 'org_a'"
    assert "credentials rotate org_a" in named(found, "org").fix


async def test_a_required_property_that_is_not_set_is_named(look: Look) -> None:
    found = await look.find(Need(AUDIENCE, properties=frozenset({"collection"}), definitions=("nightly",)))

    assert (named(found, "properties").ok, named(found, "properties").detail) == (
        False,
        "missing: collection",
    )


async def test_a_token_that_does_not_verify_shows_nothing_of_itself(look: Look) -> None:
    forged = make_token(look.issuer.payload(look.app), {"kid": "k1"}, key="other")
    look.issuer.answer = lambda form: httpx.Response(
        200, json={"access_token": forged, "token_type": "bearer"}
    )

    found = await look.find()

    assert found.claims is None
    assert not named(found, "verification").ok
    assert "org" not in [finding.check for finding in found.diagnostics]


@pytest.mark.parametrize(("seconds", "ok"), [(9, True), (11, False), (-11, False)])
async def test_a_clock_that_differs_is_told(look: Look, seconds: int, ok: bool) -> None:
    now = int(look.clock.now().timestamp())
    look.app.replace |= {"iat": now + seconds, "exp": now + 3600}

    clock = named(await look.find(), "clock")

    assert clock.ok is ok
    assert ("behind" if seconds > 0 else "ahead of") in clock.detail
    assert bool(clock.fix) is not ok


async def test_rate_headers_are_repeated(look: Look) -> None:
    def answer(form: dict[str, str]) -> httpx.Response:
        granted = look.issuer.grant(form)
        granted.headers["RateLimit-Remaining"] = "41"
        return granted

    look.issuer.answer = answer

    assert named(await look.find(), "rate").detail == "ratelimit-remaining: 41"


async def test_a_discovery_document_that_is_not_needed_may_be_absent(look: Look) -> None:
    discovery = await look.examiner.discovery()

    assert discovery.ok
    assert "not used" in discovery.detail
