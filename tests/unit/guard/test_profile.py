"""Profiles: what comes with the worker, and what a file of one's own may say."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from worker.errors import ConfigurationError
from worker.guard.profile import ALGORITHMS, load, parse, shipped

MINIMAL = 'name = "mine"\ntitle = "Mine"\norg_asserted_by = "client"\norg = ["org"]\nclient = ["azp"]\n'


def test_nine_profiles_come_with_the_worker() -> None:
    """By the names that worker.toml uses."""
    assert shipped() == (
        *("auth0", "entra", "keycloak", "kinde", "logto", "okta", "rfc9068", "workos", "zitadel"),
    )


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_profile_says_what_a_token_needs(name: str) -> None:
    """Each binds the org, uses public keys only and bounds the life of a token."""
    profile = load(name)

    assert profile.name == name
    assert profile.org_asserted_by in ("client", "grant")
    assert profile.org and profile.client
    assert profile.algorithms <= ALGORITHMS
    assert profile.max_lifetime <= timedelta(days=31)
    assert bool(profile.token) == bool(profile.keys)


def test_kinde_is_asked_and_read_as_it_documents() -> None:
    """The facts of Kinde's M2M tokens."""
    kinde = load("kinde")

    assert (kinde.token, kinde.keys) == ("/oauth2/token", "/.well-known/jwks")
    assert (kinde.client_authentication, kinde.audience_parameter) == ("post", "audience")
    assert (kinde.org, kinde.client, kinde.scopes) == (("org_code",), ("azp",), ("scope",))
    assert kinde.algorithms == {"RS256"}


def test_a_profile_of_ones_own_is_a_file(tmp_path: Path) -> None:
    """A name with a slash or `.toml` is a path."""
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL + 'max_lifetime = "2h"\n[parameters]\nextra = "1"\n')

    profile = load(str(path))

    assert (profile.name, profile.org, profile.max_lifetime) == ("mine", ("org",), timedelta(hours=2))
    assert profile.parameters == {"extra": "1"}


def test_a_profile_whose_callers_choose_the_org_is_refused() -> None:
    """That would be no boundary."""
    with pytest.raises(ConfigurationError, match="does not separate orgs"):
        parse(MINIMAL.replace('"client"\norg', '"caller"\norg'), source="mine")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('orgs = ["x"]', "orgs"),
        ('scopes = "scope"', "scopes"),
        ('leeway = "1h"', "leeway"),
        ('max_lifetime = "never"', "max_lifetime"),
        ('max_lifetime = "0s"', "max_lifetime"),
        ('algorithms = ["HS256"]', "algorithms"),
        ('algorithms = ["none"]', "algorithms"),
        ("algorithms = []", "algorithms"),
        ('client_authentication = "none"', "client_authentication"),
        ("ask_scopes = 1", "ask_scopes"),
        ('org_shape = "prefixed"', "org_prefix"),
        ('scopes_shape = "keys"', "scopes_shape"),
        ('[errors]\nodd = "fatal"', "errors"),
        ("[parameters]\nextra = 1", "parameters"),
        ("= 1", "TOML"),
    ],
)
def test_a_mistake_in_a_profile_is_named(line: str, named: str) -> None:
    """By the key that is wrong."""
    with pytest.raises(ConfigurationError, match=named):
        parse(MINIMAL + line, source="mine")


@pytest.mark.parametrize("key", ["name", "title", "org_asserted_by", "org", "client"])
def test_a_profile_without_a_needed_key_is_refused(key: str) -> None:
    """Each is named."""
    lines = [line for line in MINIMAL.splitlines() if not line.startswith(f"{key} =")]

    with pytest.raises(ConfigurationError, match=key):
        parse("\n".join(lines), source="mine")


def test_an_unknown_profile_says_which_there_are() -> None:
    """And that a path is possible."""
    with pytest.raises(ConfigurationError) as unknown:
        load("kindle")
    assert "kinde" in unknown.value.fix

    with pytest.raises(ConfigurationError, match="cannot be read"):
        load("/nowhere/mine.toml")
