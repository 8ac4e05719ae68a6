"""Failure classes: what is parked, what pauses the issuer, and how few requests a failure costs."""

from __future__ import annotations

import asyncio
import contextlib
import random
from datetime import timedelta
from email.utils import format_datetime

import httpx
import pytest

from tests.fakes.clock import settle
from tests.fakes.issuer import ORG, App
from tests.unit.tokens.conftest import World
from worker.engine.attempt.attempt import outcome_of_error
from worker.errors import (
    AnswerTooLarge,
    ConfigurationError,
    CredentialsRejected,
    IssuerUnavailable,
    RequestRejected,
    Throttled,
    TokenError,
    Unavailable,
    WorkerError,
)
from worker.model.orgs import OrgRef, TokenWant
from worker.tokens import breaker


async def ensure_in_time(world: World, of: OrgRef = ORG, **asked: object) -> None:
    """Ensure a token while time passes."""
    waiting = asyncio.ensure_future(world.ensure(of, **asked))
    while not waiting.done():
        await settle(30)
        if not waiting.done():
            await world.clock.pass_time(0.5)
    await waiting


async def poll(world: World, orgs: list[OrgRef], seconds: int, every: int = 5) -> list[float]:
    """Ask for each org every few seconds, as waiting runs do; the times at which a token came."""
    came = []
    for _ in range(0, seconds, every):
        for of in orgs:
            try:
                await ensure_in_time(world, of)
                came.append(world.clock.monotonic())
            except (TokenError, Unavailable):
                pass
        await world.clock.pass_time(every)
    return came


async def test_a_wrong_secret_costs_at_most_five_requests_in_ten_minutes(world: World, emitted: list) -> None:
    """The org is parked for 1 min, doubling; the others do not notice."""
    world.app.secret = "another"
    other = world.add_org(1)
    started = world.clock.monotonic()
    while world.clock.monotonic() - started < 600:
        with pytest.raises(CredentialsRejected) as rejected:
            await world.ensure()
        assert rejected.value.detail == "invalid_client"
        assert "credentials add org_a" in rejected.value.fix
        assert 0 < rejected.value.retry_after <= 3600
        before = world.clock.monotonic()
        await world.ensure(other)
        assert world.clock.monotonic() == before
        world.clock.advance(5)

    asked = [form for _, _, form in world.issuer.requests if form.get("client_id") == "client-a"]
    assert len(asked) <= 5
    parked = [seen.fields["seconds"] for seen in emitted if seen.event.name == "org.parked"]
    assert parked == [60, 120, 240, 480]


async def test_two_wrong_secrets_cost_no_more(world: World) -> None:
    """With two generations that are rejected, they are tried in turn, not both each time."""
    world.app.secret = "another"
    world.credentials.add(ORG, "client-a", "wrong-too")
    for _ in range(120):
        with pytest.raises(CredentialsRejected):
            await world.ensure()
        world.clock.advance(5)

    assert world.issuer.count() <= 5
    assert {use for use, _ in world.credentials.uses} == {"org_a-1", "org_a-2"}


@pytest.mark.parametrize("same_generation", [False, True], ids=["a new secret", "a secret file that changed"])
async def test_another_secret_releases_a_parked_org_at_once(world: World, same_generation: bool) -> None:
    """Nobody waits for the hour to pass; one read from `secrets_dir` can keep its generation."""
    world.app.secret = "another"
    with pytest.raises(CredentialsRejected):
        await world.ensure()
    if same_generation:
        world.credentials.orgs.clear()
    world.credentials.add(ORG, "client-a", "another")

    assert (await world.ensure()).claims.org_code == "org_a"


async def test_the_generation_before_is_tried_once_and_remembered(world: World) -> None:
    """Rotation with overlap: a new secret that the issuer does not know yet costs one request more, once."""
    world.credentials.add(ORG, "client-a", "not-yet-known")

    await world.ensure()
    await world.ensure(fresh=True)

    assert world.credentials.uses == [("org_a-2", "invalid_client"), ("org_a-1", None), ("org_a-1", None)]


async def test_the_newest_generation_is_tried_again_after_a_while(world: World) -> None:
    """The remembered one does not stay first for ever."""
    world.credentials.add(ORG, "client-a", "secret-new")
    await world.ensure()
    world.app.secret = "secret-new"
    world.clock.advance(900)
    await world.ensure(fresh=True)

    assert world.credentials.uses[-1] == ("org_a-2", None)


async def test_rotation_with_a_gap_fails_nobody_who_has_a_token(world: World) -> None:
    """The old secret is dead and the new one not there yet: live tokens serve, and then the new one does."""
    world.app.lifetime = 600
    await world.ensure()
    world.app.secret = "secret-new"
    for _ in range(110):
        await world.ensure()
        await settle(50)
        world.clock.advance(5)
    world.credentials.add(ORG, "client-a", "secret-new")
    world.clock.advance(10)

    assert (await world.ensure()).claims.org_code == "org_a"


async def test_a_refused_scope_parks_only_that_request(world: World) -> None:
    """Fifteen minutes for these scopes of this org; its other tokens are not touched."""
    for _ in range(3):
        with pytest.raises(RequestRejected) as rejected:
            await world.ensure(scopes=frozenset({"admin:all"}))
        assert rejected.value.detail == "invalid_scope"
    assert world.issuer.count() == 1
    assert rejected.value.retry_after == 900
    await world.ensure(scopes=frozenset({"read:kb"}))

    world.app.scopes = (*world.app.scopes, "admin:all")
    world.clock.advance(900)
    await world.ensure(scopes=frozenset({"admin:all"}))
    assert world.issuer.count() == 3


@pytest.mark.parametrize(
    ("headers", "least", "most"),
    [
        ({"Retry-After": "30"}, 30, 30),
        ({"RateLimit-Reset": "45"}, 45, 45),
        ({"RateLimit-Reset": "EPOCH"}, 40, 40),
        ({"Retry-After": "DATE"}, 20, 20),
        ({"Retry-After": "0"}, 1, 10),
        ({"Retry-After": "soon"}, 10, 10),
        ({}, 10, 10),
        ({"Retry-After": "99999999"}, 3600, 3600),
    ],
)
async def test_a_throttle_pauses_the_issuer_for_as_long_as_it_asks(
    world: World, headers: dict, least: int, most: int
) -> None:
    """Nothing is asked meanwhile, for any org; seconds, a date and RateLimit-Reset are understood."""
    now = world.clock.now()
    written = {"DATE": format_datetime(now + timedelta(seconds=20), usegmt=True)}
    written["EPOCH"] = str(int(now.timestamp()) + 40)
    sent = {name: written.get(value, value) for name, value in headers.items()}
    world.issuer.answer = lambda form: httpx.Response(429, headers=sent, json={"error": "slow_down"})
    other = world.add_org(1)

    with pytest.raises(Throttled) as throttled:
        await world.ensure()
    assert least <= throttled.value.retry_after <= most
    with pytest.raises(Throttled):
        await world.ensure(other)
    assert world.issuer.count() == 1

    world.issuer.answer = None
    world.clock.advance(throttled.value.retry_after)
    await world.ensure(other)


@pytest.mark.parametrize("recovers", [False, True])
async def test_an_org_that_used_up_its_quota_pauses_the_others_once(
    world: World, emitted: list, recovers: bool
) -> None:
    """Its second throttle, with others answered in between, is its own, even if it is answered at times."""
    other = world.add_org(1)
    asked = 0

    def quota(form: dict[str, str]) -> httpx.Response | None:
        nonlocal asked
        if form["client_id"] != "client-a":
            return None
        asked += 1
        if recovers and asked % 2 == 0:
            return None
        return httpx.Response(429, headers={"Retry-After": "3600" if not recovers else "600"})

    world.issuer.answer = quota
    with pytest.raises(Throttled) as throttled:
        await world.ensure()
    assert throttled.value.retry_after == (600 if recovers else 3600)
    with pytest.raises(Throttled) as waits:
        await world.ensure(other, fresh=True)
    assert waits.value.retry_after == 60

    for _ in range(9):
        world.clock.advance(800)
        await world.ensure(other, fresh=True)
        with contextlib.suppress(Throttled):
            await world.ensure(fresh=True)
        await world.ensure(other, scopes=frozenset({"read:kb"}), fresh=True)
    names = [seen.event.name for seen in emitted]
    assert asked >= 2
    assert names.count("issuer.paused") == names.count("issuer.resumed") == 1
    assert names.count("org.parked") == (asked + 1) // 2 - 1 if recovers else asked - 1


async def test_a_throttle_of_all_orgs_is_asked_again_less_and_less(world: World, emitted: list) -> None:
    """For an hour, as the issuer asks; a few requests see whether it is meant for all."""
    orgs = [ORG, *(world.add_org(number) for number in range(40))]
    until = world.clock.monotonic() + 3600
    world.issuer.answer = lambda form: (
        httpx.Response(429, headers={"Retry-After": str(int(until - world.clock.monotonic()))})
        if world.clock.monotonic() < until
        else None
    )
    served = await poll(world, orgs, 3700, every=20)

    throttled = world.issuer.count() - len(served)
    assert throttled <= 12
    assert min(served) <= until + 60
    names = [seen.event.name for seen in emitted]
    assert names[-1] != "issuer.paused" and names.count("issuer.resumed") == 1
    assert "org.parked" not in names


async def test_throttles_of_requests_that_were_under_way_together_count_once(world: World) -> None:
    """Six at once, without a word of how long: the pause is twenty seconds, not five minutes."""
    orgs = [world.add_org(number) for number in range(6)]
    world.issuer.answer = lambda form: httpx.Response(429)
    await asyncio.gather(*(world.ensure(of) for of in orgs), return_exceptions=True)

    with pytest.raises(Throttled) as throttled:
        await world.ensure()
    assert throttled.value.retry_after <= 20


async def test_the_issuer_is_reported_as_resumed_after_a_throttle(world: World, emitted: list) -> None:
    """The gauge of paused issuers goes back to 0 with the next token."""
    world.issuer.answer = lambda form: httpx.Response(429)
    with pytest.raises(Throttled):
        await world.ensure()
    world.issuer.answer = None
    world.clock.advance(10)
    await world.ensure()

    names = [seen.event.name for seen in emitted if seen.event.name.startswith("issuer.")]
    assert names == ["issuer.paused", "issuer.resumed"]


async def test_applications_that_hang_leave_connections_to_the_others(world: World) -> None:
    """Sixty of them, before anybody knows; and a request that hangs is given up after ten seconds."""
    hanging = {f"client-{number}" for number in range(60)}
    orgs = [world.add_org(number) for number in range(60)]

    async def hang(form: dict[str, str]) -> httpx.Response:
        if form["client_id"] in hanging:
            await asyncio.Event().wait()
        return world.issuer.grant(form)

    world.issuer.answer = hang
    asking = [asyncio.ensure_future(world.ensure(of)) for of in orgs]
    await settle(30)
    started = world.clock.monotonic()
    waiting = asyncio.ensure_future(world.ensure())
    while not waiting.done():
        await world.clock.pass_time(0.1)

    # Ten requests a second is all that the issuer is asked.
    assert world.clock.monotonic() - started <= 60 / 10 * 1.1 + 1.5
    assert (await waiting).claims.org_code == "org_a"
    for each in asking:
        each.cancel()
    await asyncio.gather(*asking, return_exceptions=True)


async def test_an_outage_of_five_minutes_costs_a_request_an_org_and_a_few(
    world: World, emitted: list
) -> None:
    """The breaker opens for the issuer; afterwards all are served."""
    orgs = [ORG, *(world.add_org(number) for number in range(20))]
    world.issuer.answer = lambda form: httpx.Response(503)

    assert await poll(world, orgs, 300) == []
    assert world.issuer.count() <= len(orgs) + 30
    assert [seen.event.name for seen in emitted].count("issuer.paused") == 1

    world.issuer.answer = None
    assert len(await poll(world, orgs, 65)) >= len(orgs)
    assert "issuer.resumed" in [seen.event.name for seen in emitted]


async def test_an_outage_with_all_orgs_at_once_costs_a_request_an_org_and_a_few(world: World) -> None:
    """Those that were under way when it began are counted as well."""
    orgs = [ORG, *(world.add_org(number) for number in range(50))]
    world.issuer.answer = lambda form: httpx.Response(503)
    started = world.clock.monotonic()
    while world.clock.monotonic() - started < 300:
        asking = asyncio.gather(*(world.ensure(of) for of in orgs), return_exceptions=True)
        while not asking.done():
            await world.clock.pass_time(0.5)
        assert all(isinstance(answer, IssuerUnavailable) for answer in asking.result())
        await world.clock.pass_time(5)

    assert world.issuer.count() <= len(orgs) + 30


LARGE = "x" * 70_000
# Answers for one org: its token does not fit, or what surrounds it does not.
TOO_LARGE: dict[str, httpx.Response] = {
    "a token of 17 KiB": httpx.Response(200, json={"access_token": "x" * 17_000, "token_type": "bearer"}),
    "a body of 70 kB": httpx.Response(200, json={"access_token": LARGE, "token_type": "bearer"}),
    "70 kB of no type": httpx.Response(200, content=LARGE.encode()),
}


async def pauses_of_two(world: World, emitted: list, answer: httpx.Response) -> list[str]:
    """The pauses of an issuer that gives one org this answer, while it fails once for another."""
    failing, other = world.add_org(1), world.add_org(2)
    for each in (failing, other):
        await world.ensure(each)
    await world.clock.pass_time(3600 * 24)
    faulty = {"client-a": answer, "client-1": httpx.Response(503)}
    world.issuer.answer = lambda form: faulty.get(form["client_id"])
    for each in (ORG, failing):
        with pytest.raises(IssuerUnavailable):
            await ensure_in_time(world, each)
    return [seen.event.name for seen in emitted if seen.event.name == "issuer.paused"]


@pytest.mark.parametrize("name", TOO_LARGE)
async def test_an_answer_that_is_too_large_is_its_orgs_alone(world: World, emitted: list, name: str) -> None:
    """It parks the request, as its configuration does, and counts for no pause of the issuer."""
    assert await pauses_of_two(world, emitted, TOO_LARGE[name]) == []

    with pytest.raises(AnswerTooLarge) as large:
        await world.ensure()
    asked = [form for _, _, form in world.issuer.requests if form.get("client_id") == "client-a"]
    assert len(asked) == 1
    assert 800 < large.value.retry_after <= 900
    outcome = outcome_of_error(large.value, None, random.Random(1))
    assert outcome.detail == (
        "answer_too_large: issuer main gives org org_a no usable token: its answer is too large"
    )
    assert "client-a" in large.value.fix
    [parked] = [seen.fields for seen in emitted if seen.event.name == "org.parked"]
    assert (parked["org"], parked["error"], parked["seconds"]) == ("org_a", "answer_too_large", 900)
    # The org goes on at once with other credentials, and the others meanwhile.
    world.issuer.answer = None
    world.credentials.add(ORG, "client-a", "secret-a")
    await world.clock.pass_time(3)
    await world.ensure()


async def test_two_orgs_pause_the_issuer_if_a_large_answer_counts(
    world: World, emitted: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: as any malformed answer, it and one failure of another org open the breaker."""
    monkeypatch.setattr(breaker, "AnswerTooLarge", CredentialsRejected)

    assert await pauses_of_two(world, emitted, TOO_LARGE["a body of 70 kB"]) == ["issuer.paused"]


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (httpx.Response(503, text=LARGE), IssuerUnavailable, "responded with status 503"),
        (httpx.Response(200, html=LARGE), IssuerUnavailable, "did not respond: protocol"),
        (httpx.Response(429, text=LARGE), Throttled, "asks for fewer requests"),
        (httpx.Response(401, text=LARGE), CredentialsRejected, "rejects the credentials"),
    ],
)
async def test_an_error_with_a_large_body_is_what_its_status_says(
    world: World, answer: httpx.Response, error: type[Exception], said: str
) -> None:
    """A page of 70 kB is no token: the issuer fails, or a server before it."""
    world.issuer.answer = lambda form: answer

    with pytest.raises(error, match=said) as raised:
        await ensure_in_time(world)
    assert type(raised.value) is error


async def test_a_rejected_secret_closes_the_breaker(world: World) -> None:
    """An answer that is not a failure says that the issuer is well."""
    orgs = [ORG, world.add_org(1)]
    world.issuer.answer = lambda form: httpx.Response(503)
    await poll(world, orgs, 15)
    world.issuer.answer = lambda form: httpx.Response(401, json={"error": "invalid_client"})
    world.clock.advance(100)
    with pytest.raises(CredentialsRejected):
        await world.ensure()
    world.issuer.answer = None

    await world.ensure(orgs[1])


async def test_many_orgs_cold_keep_to_the_rate_and_to_eight_connections(world: World) -> None:
    """One request each, never more than ten in any second, and at most 8 under way."""
    orgs = [world.add_org(number) for number in range(300)]

    async def slow(form: dict[str, str]) -> httpx.Response:
        await world.clock.sleep(0.5)
        return world.issuer.grant(form)

    world.issuer.answer = slow
    asking = asyncio.gather(*(world.ensure(of) for of in orgs))
    while not asking.done():
        world.clock.advance(0.05)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await asking

    times = [at for at, path, _ in world.issuer.requests if path == "/oauth2/token"]
    assert len(times) == 300
    assert all(later - earlier >= 1.0 for earlier, later in zip(times, times[10:], strict=False))
    assert world.issuer.most_open <= 8


async def test_an_issuer_that_hangs_is_given_up_after_ten_seconds(world: World) -> None:
    """Who waits gets an answer, and the connection is free again."""

    async def hang(form: dict[str, str]) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    world.issuer.answer = hang
    started = world.clock.monotonic()
    with pytest.raises(IssuerUnavailable):
        await ensure_in_time(world)

    assert world.clock.monotonic() - started <= 35
    assert world.issuer.open == 0


async def test_an_unreachable_key_set_is_no_verdict(world: World) -> None:
    """The run waits, the token is kept to be judged, and nothing is refused."""
    world.issuer.keys = lambda: httpx.Response(500)
    for _ in range(3):
        with pytest.raises(IssuerUnavailable) as waits:
            await world.ensure()
        world.clock.advance(waits.value.retry_after)
    world.issuer.keys = None

    assert (await world.ensure()).claims.org_code == "org_a"
    assert world.issuer.count() == 1


async def test_secrets_that_do_not_open_make_only_their_org_wait(world: World) -> None:
    """A damaged row is that org's own trouble, and says what to do."""
    world.credentials.fault = ConfigurationError("the secret does not open", fix="add it anew")

    with pytest.raises(CredentialsRejected) as rejected:
        await world.ensure()

    assert rejected.value.fix == "add it anew"
    assert world.issuer.requests == []


async def test_an_unknown_issuer_is_named(world: World) -> None:
    """An org whose issuer is not in worker.toml says which table is missing."""
    with pytest.raises(ConfigurationError) as unknown:
        await world.tokens.ensure(TokenWant(ORG, "other"))

    assert "[issuers.other]" in unknown.value.fix


async def test_no_error_carries_the_secret_or_the_request(world: World) -> None:
    """Neither message, nor cause, nor context, nor a local variable of any frame shows it."""
    for answer in (
        lambda form: httpx.Response(
            401, json={"error": "invalid_client", "error_description": form["client_secret"]}
        ),
        lambda form: httpx.Response(400, json={"error": form["client_secret"]}),
        lambda form: (_ for _ in ()).throw(httpx.ConnectError("no route")),
    ):
        world.issuer.answer = answer
        world.tokens.drop(ORG.id)
        try:
            await ensure_in_time(world)
        except WorkerError as error:
            assert "secret-a" not in _all_of(error)
        else:
            raise AssertionError("no error")


def _all_of(error: BaseException | None) -> str:
    """All that a thorough error reporter would send of an exception."""
    text = ""
    while error is not None:
        text += f"{error!r} {error.args} {vars(error)}"
        trace = error.__traceback__
        while trace is not None:
            if "/worker/" in trace.tb_frame.f_code.co_filename:
                text += repr(trace.tb_frame.f_locals)
            trace = trace.tb_next
        error = error.__cause__ or error.__context__
    return text


async def test_another_app_of_the_org_is_not_tried(world: World) -> None:
    """Only the two newest generations are ever tried in one refresh."""
    world.app.secret = "another"
    for number in range(4):
        world.credentials.add(ORG, "client-a", f"wrong-{number}")
    world.issuer.add(App("org_a", "client-z", "z"))

    with pytest.raises(CredentialsRejected):
        await world.ensure()

    assert world.issuer.count() == 2


async def test_a_retry_after_of_a_day_does_not_lose_the_day(world: World) -> None:
    """A 503 may ask for some minutes at most."""
    world.issuer.answer = lambda form: httpx.Response(503, headers={"Retry-After": "86400"})
    with pytest.raises(IssuerUnavailable) as unavailable:
        await ensure_in_time(world)
    assert unavailable.value.retry_after == 300
    assert world.issuer.count() == 1
