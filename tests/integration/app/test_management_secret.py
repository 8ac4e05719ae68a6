"""`check` warns of a management secret that workers of this user could read; no command shows it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fakes.cli import CommandLine


@pytest.mark.feature("provisioning")
def test_check_warns_of_a_readable_management_secret(
    tmp_path: Path, migrated_url: str, monkeypatch: pytest.MonkeyPatch
):
    cli = CommandLine(tmp_path, migrated_url)
    assert "management__" not in cli("check").err

    (tmp_path / "management__main").write_text("canary-management-secret")
    with cli.settings.open("a") as file:
        file.write('[issuers.main.management]\nclient_id = "manager"\n')

    done = cli("check")
    assert "warning: this user may read the secret management__main" in done.err
    assert (
        "warning: management_secrets: this user may read management__main" in cli("doctor", check=False).err
    )
    shown = [cli("config", "show", "-o", "json"), cli("doctor", check=False), done]
    assert not [each for each in shown if "canary" in each.out + each.err]

    # Root may read every file; another user may not.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "management__" not in cli("check").err
