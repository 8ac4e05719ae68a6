"""Org, client, scopes and properties hold, or nothing starts."""

from __future__ import annotations

from collections.abc import Iterable

from worker.claims.claims import Claims
from worker.errors import TokenRefused


def enforce(
    claims: Claims,
    *,
    org_code: str,
    client_id: str | None,
    scopes: Iterable[str] = (),
    properties: Iterable[str] = (),
) -> None:
    """Compare what a verified token says with what the run needs, byte for byte.

    `client_id` is None only where whoever checks cannot know it, as an API behind
    the guard. Scopes the token has beyond the needed ones do not matter.

    Raises:
        TokenRefused: org_mismatch, client_mismatch, scope_missing or property_missing; for the last
            two, `detail` names the first one that is missing.
    """
    # An empty code or client never holds, whatever the other side is.
    if not claims.org_code:
        raise TokenRefused("org_mismatch", "org_missing", f"the token names no org, not {org_code}")
    if claims.org_code != org_code:
        raise TokenRefused(
            "org_mismatch",
            "other_org",
            f"the token is for the org {_shown(claims.org_code)}, not for {org_code}",
        )
    if client_id is not None and (not claims.client_id or claims.client_id != client_id):
        raise TokenRefused(
            "client_mismatch",
            "other_client" if claims.client_id else "client_missing",
            f"the token was issued to another client than {org_code}'s",
        )
    if missing := frozenset(scopes) - claims.scopes:
        scope = min(missing)
        raise TokenRefused("scope_missing", scope, f"the token of {org_code} lacks the scope {scope}")
    if absent := frozenset(properties) - claims.properties.keys():
        name = min(absent)
        raise TokenRefused("property_missing", name, f"the token of {org_code} lacks the property {name}")


def _shown(text: str) -> str:
    """A claim as a message may show it: short, and nothing that a terminal would obey."""
    return repr(text[:64])
