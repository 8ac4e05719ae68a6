"""Digests tell whether a value changed, and nothing else about it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from worker.guard.claims import Claims, Flag
from worker.model.claims import DIGESTS, ClaimChange, Digests, claims_in_words, compare

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CLAIMS = Claims(
    org_code="org_a",
    client_id="client",
    scopes=frozenset({"read:kb"}),
    properties={"model": "gpt-4", "plan": "pro"},
    flags={"beta": Flag("boolean", True)},
    issued_at=NOW,
    expires_at=NOW,
)
DIGEST = Digests("k1", b"x" * 32)


def redacted(claims: Claims, digests: Digests | None = DIGEST) -> dict[str, Any]:
    """As a run keeps them."""
    kept: dict[str, Any] = {
        "scopes": sorted(claims.scopes),
        "properties": {name: type(value).__name__ for name, value in claims.properties.items()},
    }
    return kept if digests is None else kept | {DIGESTS: digests.of(claims)}


def test_equal_claims_have_equal_digests_and_no_value_in_them():
    assert compare(redacted(CLAIMS), CLAIMS, DIGEST) == []
    text = str(DIGEST.of(CLAIMS)) + repr(DIGEST)
    assert "gpt-4" not in text and "pro'" not in text and "xxxx" not in text


def test_what_changed_is_named():
    now = replace(
        CLAIMS,
        scopes=frozenset({"write:kb"}),
        properties={"model": "gpt-5", "region": "eu"},
        flags={"beta": Flag("string", "true")},
    )

    assert compare(redacted(CLAIMS), now, DIGEST) == [
        ClaimChange("scope", "write:kb", "added"),
        ClaimChange("scope", "read:kb", "removed"),
        ClaimChange("property", "model", "changed"),
        ClaimChange("property", "plan", "removed"),
        ClaimChange("property", "region", "added"),
        ClaimChange("flag", "beta", "changed"),
    ]


def test_equal_values_of_two_orgs_or_keys_have_different_digests():
    ours = DIGEST.of(CLAIMS)
    theirs = DIGEST.of(replace(CLAIMS, org_code="org_b"))
    other_key = Digests("k2", b"y" * 32).of(CLAIMS)

    assert ours["properties"]["plan"] not in (theirs["properties"]["plan"], other_key["properties"]["plan"])


def test_a_value_is_unknown_without_the_key_of_the_run():
    unknown = [
        ClaimChange("property", "model", "unknown"),
        ClaimChange("property", "plan", "unknown"),
        ClaimChange("flag", "beta", "unknown"),
    ]
    assert compare(redacted(CLAIMS), CLAIMS, None) == unknown
    assert compare(redacted(CLAIMS), CLAIMS, Digests("k2", b"y" * 32)) == unknown
    assert compare(redacted(CLAIMS, None), CLAIMS, DIGEST) == unknown


def test_people_read_of_a_property_that_it_is_hidden_and_of_which_type():
    stored = {
        "org_code": "org_a",
        "properties": {"plan": "str", "seats": "int", "of": "newer"},
        "digests": {},
    }

    assert claims_in_words(stored) == {
        "org_code": "org_a",
        "properties": {"plan": "text, hidden", "seats": "number, hidden", "of": "newer, hidden"},
    }
    assert claims_in_words({"org_code": "org_a"}) == {"org_code": "org_a"}
    assert claims_in_words(None) is None
