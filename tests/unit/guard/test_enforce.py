"""Enforcement: org, client, scopes and properties hold, or nothing starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.fakes.clock import START
from worker.errors import TokenRefused
from worker.guard.claims import Claims
from worker.guard.decode import enforce

CLAIMS = Claims(
    org_code="org_a",
    client_id="client-a",
    scopes=frozenset({"read:kb"}),
    properties={"region": "eu"},
    flags={},
    issued_at=START,
    expires_at=START,
)


def test_claims_that_fit_pass() -> None:
    """More scopes or properties than needed do not matter."""
    enforce(CLAIMS, org_code="org_a", client_id="client-a", scopes={"read:kb"}, properties=["region"])
    enforce(CLAIMS, org_code="org_a", client_id=None)


@pytest.mark.parametrize(
    ("claims", "needed", "reason", "detail"),
    [
        ({"org_code": "org_b"}, {}, "org_mismatch", "other_org"),
        ({"org_code": ""}, {}, "org_mismatch", "org_missing"),
        ({"org_code": ""}, {"org_code": ""}, "org_mismatch", "org_missing"),
        ({"client_id": "client-b"}, {}, "client_mismatch", "other_client"),
        ({"client_id": ""}, {}, "client_mismatch", "client_missing"),
        ({"client_id": ""}, {"client_id": ""}, "client_mismatch", "client_missing"),
        ({}, {"scopes": {"z", "b", "read:kb"}}, "scope_missing", "b"),
        ({}, {"properties": ["region", "tier"]}, "property_missing", "tier"),
        ({"org_code": "org_b"}, {"scopes": {"z"}}, "org_mismatch", "other_org"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(
    claims: dict[str, Any], needed: dict[str, Any], reason: str, detail: str
) -> None:
    """The org is compared first; the first missing scope or property is named."""
    with pytest.raises(TokenRefused) as refused:
        enforce(replace(CLAIMS, **claims), **({"org_code": "org_a", "client_id": "client-a"} | needed))

    assert (refused.value.reason, refused.value.detail) == (reason, detail)


def test_a_foreign_org_is_shown_harmlessly() -> None:
    """A claim in a message is short and moves no terminal."""
    with pytest.raises(TokenRefused) as refused:
        enforce(replace(CLAIMS, org_code="\x1b[2J" + "x" * 500), org_code="org_a", client_id=None)

    assert "\x1b" not in str(refused.value)
    assert len(str(refused.value)) < 200
