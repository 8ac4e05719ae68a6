"""Secrets leave no trace in text, in whichever form they are written."""

from __future__ import annotations

import base64
import json
import random
import re
import string
import time
import timeit
import tracemalloc
from collections.abc import Callable
from urllib.parse import quote, quote_plus

import pytest

from worker.ids import ALL_ORGS
from worker.telemetry.masking import MASK, Masker
from worker.telemetry.secret_forms import parts_of

LETTERS = string.ascii_letters + string.digits


def made_up(length: int, seed: int = 1, letters: str = LETTERS) -> str:
    return "".join(random.Random(seed).choices(letters, k=length))


def made_up_token(seed: int = 1) -> str:
    """A signed token's three parts, with a signature as long as RS256 makes it."""

    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    claims = {
        "iss": "https://acme.example",
        "aud": ["api"],
        "org_code": f"org_{seed}",
        "jti": made_up(20, seed),
    }
    return f"{part({'alg': 'RS256', 'kid': 'k1'})}.{part(claims)}.{made_up(342, seed, LETTERS + '-_')}"


TOKEN = made_up_token()
SECRETS = {
    "long": made_up(50),
    "short": "k3y!s",
    "pass phrase": "correct horse battery staple",
    "awkward": 'pa"ss\\wo/rd+%&=é~ß☃' + made_up(8),
    "awkward and short": 'a"b\\c&%é',
    "token": TOKEN,
}


def known(*secrets: str) -> Masker:
    masker = Masker()
    for secret in secrets:
        masker.register(secret)
    return masker


@pytest.mark.parametrize("secret", [s for s in SECRETS.values() if len(s) >= 6], ids=lambda s: s[:8])
@pytest.mark.parametrize(
    "write",
    [
        str,
        lambda s: quote(s, safe=""),
        quote,
        quote_plus,
        lambda s: json.dumps(s)[1:-1],
        lambda s: json.dumps(s, ensure_ascii=False)[1:-1],
        lambda s: base64.b64encode(s.encode()).decode().rstrip("="),
        lambda s: base64.b64encode(b"x" + s.encode() + b"yz").decode(),
        lambda s: base64.b64encode(b"xy" + s.encode() + b"z").decode(),
        lambda s: base64.urlsafe_b64encode(b"user:" + s.encode()).decode().rstrip("="),
    ],
    ids=[
        "raw",
        "url",
        "url path",
        "url form",
        "json",
        "json utf-8",
        "base64",
        "base64+1",
        "base64+2",
        "basic",
    ],
)
def test_a_secret_is_masked_in_each_form(secret, write):
    written = write(secret)

    masked = known(secret).mask(f"before {written} after", ALL_ORGS)

    # Of base64 the outermost letters also hold what stands around the secret.
    assert re.fullmatch(r"before .{0,8}\[masked\].{0,6} after", masked), masked


def test_text_without_a_secret_stays_as_it_is():
    text = f'{{"run": "019a-7c", "url": "https://acme.example/a?b=c", "blob": "{made_up(4000, seed=9)}"}}'

    assert known(*SECRETS.values()).mask(text, ALL_ORGS) == text


def test_a_secret_is_masked_whole_and_its_surroundings_kept():
    secret = made_up(50)

    assert known(secret).mask(f"a={secret}&b={secret}.", ALL_ORGS) == f"a={MASK}&b={MASK}."


def test_json_stays_json():
    masked = known(*SECRETS.values()).mask(
        json.dumps({"said": SECRETS["awkward"], "n": [1, TOKEN]}), ALL_ORGS
    )

    assert json.loads(masked) == {"said": MASK, "n": [1, MASK]}


@pytest.mark.parametrize(
    "piece",
    [
        TOKEN.split(".")[2],
        TOKEN.split(".")[1],
        TOKEN.split(".")[0],
        TOKEN[: len(TOKEN) // 2],
        TOKEN[len(TOKEN) // 2 :],
        TOKEN[-20:],
        TOKEN[10:60],
        TOKEN[:-1],
        "Bearer " + TOKEN,
        base64.b64encode(TOKEN.encode()[7:]).decode(),
    ],
)
def test_a_piece_of_a_token_is_masked(piece):
    masked = known(TOKEN, made_up_token(2)).mask(f"<{piece}>", ALL_ORGS)

    assert masked in (f"<{MASK}>", f"<Bearer {MASK}>", f"<{MASK}==>")


def test_tokens_that_begin_alike_are_each_masked_whole():
    tokens = [made_up_token(seed) for seed in range(5)]

    masked = known(*tokens).mask(" ".join(tokens), ALL_ORGS)

    assert masked == " ".join([MASK] * 5)


def test_of_secrets_that_begin_alike_the_longest_is_masked():
    secrets = ["a-common-beginning", "a-common-beginning-and-more", "a-common-beginning-of-another"]

    assert known(*secrets).mask(" ".join(secrets), ALL_ORGS) == " ".join([MASK] * 3)


def test_a_secret_of_several_lines_is_masked_line_by_line():
    key = (
        "-----BEGIN PRIVATE KEY-----\n"
        + "\n".join(made_up(64, n) for n in range(3))
        + "\n-----END PRIVATE KEY-----\n"
    )

    masked = known(key).mask(key, ALL_ORGS)

    assert masked == f"-----BEGIN PRIVATE KEY-----\n{MASK}\n{MASK}\n{MASK}\n-----END PRIVATE KEY-----\n"


def test_what_is_too_short_to_tell_from_text_is_not_masked():
    assert known("", "the", SECRETS["short"]).mask("the k3y!s", ALL_ORGS) == "the k3y!s"


def test_a_forgotten_secret_is_masked_no_longer():
    masker = known(*SECRETS.values())
    for secret in SECRETS.values():
        masker.forget(secret)
    masker.forget("never known")

    assert masker.mask(" ".join(SECRETS.values()), ALL_ORGS) == " ".join(SECRETS.values())


def grown(come_and_go: Callable[[range], None], first: range, then: range) -> int:
    """The bytes that secrets leave behind which come and go after the first ones.

    A token that stays takes over 500; what the interpreter keeps for itself does not grow with them.
    """
    tracemalloc.start()
    try:
        come_and_go(first)
        before = tracemalloc.get_traced_memory()[0]
        come_and_go(then)
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("make", [made_up_token, lambda seed: made_up(30, seed)], ids=["token", "word"])
def test_a_forgotten_secret_leaves_no_memory_behind(make):
    def come_and_go(seeds: range) -> None:
        for seed in seeds:
            secret = make(seed)
            masker.register(secret)
            masker.forget(secret)

    masker = known(TOKEN)
    # One number for each secret would be more.
    assert grown(come_and_go, range(100, 120), range(200, 400)) < 600 * 50


def test_a_forgotten_token_does_not_unmask_one_that_begins_alike():
    first, second = made_up_token(1), made_up_token(2)
    for old, kept in ((first, second), (second, first)):
        masker = known(first, second)
        masker.forget(old)

        assert masker.mask(kept, ALL_ORGS) == MASK


def test_only_so_many_are_kept_and_the_one_used_last_stays():
    masker = Masker(limit=2)
    first, second, third = (made_up(50, seed) for seed in range(3))
    for secret in (first, second, first, third):
        masker.register(secret)

    assert masker.mask(f"{first} {second} {third}", ALL_ORGS) == f"{MASK} {second} {MASK}"


def test_the_cost_does_not_grow_with_the_number_of_secrets():
    """A thousand tokens: what is looked at per letter of text is one table."""
    few, many = (known(*(made_up_token(seed) for seed in range(count))) for count in (10, 1000))
    text = made_up(20_000, seed=-1)

    assert many.mask(f"x {made_up_token(777)} y", ALL_ORGS) == f"x {MASK} y"
    # A search for each of them would take a hundred times as long.
    assert seconds_to_mask(many, text) < 10 * seconds_to_mask(few, text)


def seconds_to_mask(masker: Masker, text: str) -> float:
    """The shortest of some tries, of the processor's time."""
    return min(timeit.repeat(lambda: masker.mask(text, ALL_ORGS), timer=time.thread_time, number=1, repeat=5))


def test_each_held_token_is_masked_however_many_there_are():
    masker = Masker(limit=10, kept=5)
    tokens = [made_up_token(seed) for seed in range(200)]
    for token in tokens:
        masker.hold(token, is_token=True)

    assert masker.mask(" ".join(tokens), ALL_ORGS) == " ".join([MASK] * 200)
    assert masker.mask(f"<{tokens[7][-20:]}>", ALL_ORGS) == f"<{MASK}>"
    assert masker.mask(base64.b64encode(tokens[8].encode()).decode(), ALL_ORGS).startswith(MASK)


def test_a_token_is_held_until_all_of_its_runs_have_released_it():
    masker = Masker(kept=0)
    for _ in range(2):
        masker.hold(TOKEN)

    masker.release(TOKEN)
    assert masker.mask(TOKEN, ALL_ORGS) == MASK
    masker.release(TOKEN)
    assert masker.mask(TOKEN, ALL_ORGS) == TOKEN
    masker.release(TOKEN)
    masker.hold(TOKEN)
    assert masker.mask(TOKEN, ALL_ORGS) == MASK


def test_the_tokens_released_last_are_still_masked():
    masker = Masker(kept=2)
    tokens = [made_up(50, seed) for seed in range(3)]
    for token in tokens:
        masker.note(token)

    assert masker.mask(" ".join(tokens), ALL_ORGS) == f"{tokens[0]} {MASK} {MASK}"


def test_what_is_registered_and_held_is_masked_until_neither():
    for end_first, end_last in ((Masker.forget, Masker.release), (Masker.release, Masker.forget)):
        masker = Masker(kept=0)
        masker.register(TOKEN)
        masker.hold(TOKEN)

        end_first(masker, TOKEN)
        assert masker.mask(TOKEN, ALL_ORGS) == MASK
        end_last(masker, TOKEN)
        assert masker.mask(TOKEN, ALL_ORGS) == TOKEN


@pytest.mark.parametrize("secret", [s for s in SECRETS.values() if len(s) >= 6], ids=lambda s: s[:8])
def test_a_held_secret_of_any_form_is_masked(secret):
    masker = Masker(kept=0)
    masker.hold(secret)

    assert masker.mask(f"before {secret} after", ALL_ORGS) == f"before {MASK} after"
    masker.release(secret)
    assert masker.mask(f"before {secret} after", ALL_ORGS) == f"before {secret} after"


@pytest.mark.parametrize("token", ["short-token", f"{TOKEN}=="])
def test_a_held_token_is_masked_whatever_its_form(token):
    masker = Masker()
    masker.hold(token, is_token=True)

    assert masker.mask(f"before {token} after", ALL_ORGS) == f"before {MASK} after"
    # Its forms begin alike; each is masked to its end, whatever their order.
    assert masker.mask(f"before {quote(token)} after", ALL_ORGS) == f"before {MASK} after"


@pytest.mark.parametrize("at", range(1, 24))
def test_a_piece_of_a_held_token_across_its_last_dot_is_masked(at):
    """Each side of the dot is shorter than what is looked for."""
    dot = TOKEN.rindex(".")
    piece = TOKEN[dot - at : dot + 24 - at]
    masker = Masker()
    masker.hold(TOKEN)

    assert masker.mask(f"<{piece}>", ALL_ORGS) == known(TOKEN).mask(f"<{piece}>", ALL_ORGS)


def test_a_held_token_is_not_prepared_for_text_that_cannot_contain_it():
    """A line of the log for each run, with run ids and names, costs no table for its token."""
    masker = Masker()
    masker.hold(TOKEN)
    line = '{"event": "run.ended", "run": "019a8f3c-5b7e-7c1d-9e2f-0123456789ab", "org": "org_acme"}'

    blocks = vars(masker)["_all"].blocks
    before = set(blocks)
    assert masker.mask(line, ALL_ORGS) == line
    assert set(blocks) == before
    assert masker.mask(line + TOKEN, ALL_ORGS) == line + MASK
    assert set(blocks) != before


def test_released_tokens_leave_no_memory_behind():
    masker = Masker(kept=10)

    def come_and_go(seeds: range) -> None:
        for seed in seeds:
            token = made_up_token(seed)
            masker.note(token)
            assert masker.mask(token, ALL_ORGS) == MASK

    # Tables that entries come to and go from grow for a while.
    assert grown(come_and_go, range(100, 200), range(200, 800)) < 600 * 100


def test_the_long_texts_of_a_secret_in_json_are_secrets_too():
    """A library that reads a service account's key can print the private key alone."""
    account = {"type": "service_account", "private_key": "-----BEGIN-----\nMIIEvQIBADANBg\n-----END-----\n"}
    held = list(parts_of(json.dumps(account)))

    assert held[0] == json.dumps(account)
    assert account["private_key"] in held
    assert list(parts_of("sk-plain")) == ["sk-plain"]
    assert list(parts_of("{not json")) == ["{not json"]
