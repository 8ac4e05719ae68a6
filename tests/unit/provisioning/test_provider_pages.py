"""The pages on providers say what is: their examples can be read, and every key of a profile is explained."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from worker.guard.profile import Profile, load, parse, shipped
from worker.settings import IssuerSettings

PAGES = Path(__file__).parents[3] / "docs" / "providers"


def examples(name: str) -> list[str]:
    """The TOML examples of a page."""
    return re.findall(r"```toml\n(.*?)```", (PAGES / f"{name}.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("name", shipped())
def test_each_profile_has_a_page_whose_settings_can_be_read(name: str) -> None:
    issuer = IssuerSettings(**tomllib.loads(examples(name)[0])["issuers"]["main"])

    assert issuer.audience and issuer.api_origins
    assert issuer.profile == (name if name != "rfc9068" else "/etc/orgworker/acme-id.toml")
    title = load(name).title.removeprefix("an ").removesuffix(" provider")
    assert title in (PAGES / f"{name}.md").read_text()


def test_the_profile_of_the_page_is_one() -> None:
    profile = parse(examples("rfc9068")[1], source="the page")

    assert (profile.org, profile.audience_parameter) == (("tenant", "id"), "resource")


def test_the_page_explains_every_key_of_a_profile() -> None:
    rows = [
        row.split("|")[1] for row in (PAGES / "rfc9068.md").read_text().splitlines() if row.startswith("| `")
    ]
    explained = set(re.findall(r"`(\w+)`", " ".join(rows)))

    assert explained == {item.name for item in fields(Profile)} - {"name", "title"}
