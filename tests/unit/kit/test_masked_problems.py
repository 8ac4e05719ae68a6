"""A problem repeats what its caller sent: it must not tell whether that is another org's secret."""

from __future__ import annotations

import json

import pytest

from worker.ids import OrgId
from worker.kit.web.responses import error_response
from worker.telemetry.masking import MASK, Masker, masker

SECRET = "sk-041234"


@pytest.mark.parametrize("scoped", [True, False])
def test_a_problem_tells_nothing_of_an_orgs_secret(scoped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control is one mask for all orgs."""
    if not scoped:
        monkeypatch.setattr(Masker, "_indexes", lambda self, org: [self._all])
    masker.register(SECRET, OrgId("acme"), private=True)
    masker.register("a-secret-of-the-settings")

    response = error_response(400, "usage", f"{SECRET}, a-secret-of-the-settings: not a run", SECRET)

    problem = json.loads(bytes(response.body))
    shown = SECRET if scoped else MASK
    assert problem["detail"] == problem["error"]["message"] == f"{shown}, {MASK}: not a run"
    assert problem["fix"] == shown
