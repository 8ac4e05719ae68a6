"""Quoting: nothing that a job writes leaves the quotation, in a result of a bounded size without secrets."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.fakes.hostile_texts import TEXTS
from worker.features.console.mcp.quoting import CLOSE, HEAD, MAX_RESULT, OPEN, quoted, shortened
from worker.ids import ALL_ORGS, OrgId
from worker.telemetry.masking import MASK, masker


def data_of(text: str) -> Any:
    """What a result quotes, after a look at what surrounds it."""
    head, opened, line, closed = text.split("\n")
    assert (head, opened, closed) == (HEAD, OPEN, CLOSE)
    # One line that a terminal, a browser and a tokenizer take as it is.
    assert line.isascii() and line.isprintable() and not set("<>&") & set(line)
    return json.loads(line)


def naive(value: Any) -> str:
    """The quotation without the defence: readable JSON between the tags."""
    text = json.dumps(value, ensure_ascii=False).replace("\\n", "\n").replace("\\r", "\r")
    return f"{HEAD}\n{OPEN}\n{text}\n{CLOSE}"


def test_there_are_fifty_hostile_texts():
    assert len(set(TEXTS)) == 50


@pytest.mark.parametrize("text", TEXTS)
def test_a_hostile_text_stays_inside(text: str):
    value = {"rows": [{"text": text, text: [text]}], "error": text}

    assert data_of(quoted(value, ALL_ORGS)) == value


def test_without_escapes_they_leave_the_quotation():
    """The control: most of them do, if the text is only put between the tags."""
    left = 0
    for text in TEXTS:
        try:
            data_of(naive({"text": text}))
        except (AssertionError, ValueError):
            left += 1
    assert left >= 40


@pytest.mark.parametrize(
    "value",
    [
        {"rows": [{"text": "x" * 100_000}] * 50},
        {"rows": [{str(n): "<" * 300 for n in range(500)}] * 50},
        [[[[[[["deep" * 50] * 9] * 5] * 5] * 5] * 3] * 3],
        {"\u202e" * 50_000: "\u202e" * 50_000},
        {"rows": [[{"a": [{"b": "\x00" * 50}] * 10}] * 100] * 20},
    ],
)
def test_a_result_is_short(value: Any):
    text = quoted(value, ALL_ORGS)

    assert len(text) < MAX_RESULT + len(HEAD) + len(OPEN) + len(CLOSE) + 10
    data_of(text)


def test_a_short_result_is_whole_and_a_long_one_says_what_it_lacks():
    short = {"rows": [{"text": "a" * 900}]}
    assert shortened(short) == short

    cut = shortened({"rows": [{"text": "a" * 9_000, "id": 7}] * 30})
    assert cut["rows"][0]["id"] == 7
    assert cut["rows"][0]["text"].endswith("a…")
    assert len(cut["rows"]) == 30


def test_secrets_are_masked_also_where_a_text_is_cut(monkeypatch: pytest.MonkeyPatch):
    org, secret = OrgId("0190b6c0-0000-7000-8000-000000000001"), "s3cret-of-the-crm-0123456789"
    masker.register(secret, org, private=True)
    try:
        for length in range(960, 1_000):
            found = quoted({"a": ["x" * length + secret] * 30, secret: 1}, org)
            assert secret[:5] not in found and MASK in found
        # Another org's text says nothing of it, and the control: unmasked it would be there.
        assert secret in quoted({"a": secret}, OrgId("0190b6c0-0000-7000-8000-000000000002"))
    finally:
        masker.forget(secret, org, private=True)


@pytest.mark.parametrize(
    "secret",
    [
        "orgworker_op_" + "aB3-" * 10,
        "orgworker_mcp_" + "aB3_" * 10,
        "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJrcF9hbm4ifQ.c2lnbmF0dXJlLW9mLXRoZS10b2tlbg",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_what_looks_like_a_token_is_masked_though_no_one_knows_it(secret: str):
    assert masker.mask(secret, ALL_ORGS) == secret
    found = data_of(quoted({"text": f"the job printed {secret}"}, ALL_ORGS))

    assert found == {"text": f"the job printed {MASK}"}


def test_random_json_comes_back():
    chosen = random.Random(35)
    letters = "ab<>&\"'\\/\n\r\t\x00\x1b\u2028\u202e\U000e0041é漢"

    def value(depth: int) -> Any:
        text = "".join(chosen.choices(letters, k=chosen.randrange(9)))
        if not depth:
            return chosen.choice([text, chosen.randrange(9), None, True, 1.5])
        if chosen.random() < 0.5:
            return [value(depth - 1) for _ in range(chosen.randrange(4))]
        return {f"{text}{n}": value(depth - 1) for n in range(chosen.randrange(4))}

    for _ in range(300):
        made = value(4)
        assert data_of(quoted(made, ALL_ORGS)) == made
