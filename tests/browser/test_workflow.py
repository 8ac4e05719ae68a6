"""The workflow for Kinde, run by a browser with what Kinde's runtime gives it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import Browser

from tests.fakes.pages import ROOT

FOLDER = ROOT / "config" / "kinde" / "kindeSrc" / "environment" / "workflows"
DOMAIN = "https://acme.kinde.com"
RUN = """
async ([source, audience, properties]) => {
  const claims = {}, asked = [];
  globalThis.kinde = {m2mToken: {setCustomClaim: (name, value) => { claims[name] = value; }}};
  globalThis.createKindeAPI = async () => ({
    get: async ({endpoint}) => { asked.push(endpoint); return {data: {properties}}; },
  });
  const url = URL.createObjectURL(new Blob([source], {type: "text/javascript"}));
  const {default: workflow, workflowSettings: settings} = await import(url);
  await workflow({
    request: {auth: {audience: [audience], scope: []}, ip: "192.0.2.1"},
    context: {
      domains: {kindeDomain: "https://acme.kinde.com"},
      application: {clientId: "3f/0c"},
      workflow: {trigger: settings.trigger},
    },
  });
  return {claims, asked, settings};
}
"""


def run(browser: Browser, audience: str, properties: list[dict[str, Any]]) -> Any:
    """What the workflow does with an application's properties: its claims, requests and settings."""
    # Kinde takes only files of this name.
    [file] = FOLDER.rglob("*Workflow.js")
    source, found = re.subn(r"import \{ createKindeAPI \} from .*\n", "", file.read_text(encoding="utf-8"))
    assert found == 1
    page = browser.new_page()
    try:
        return page.evaluate(RUN, [source, audience, properties])
    finally:
        page.close()


def test_the_properties_of_the_application_become_a_claim(browser: Browser) -> None:
    properties = [
        {"id": "prop_1", "key": "model_version", "name": "Model", "value": "gpt-4o"},
        {"id": "prop_2", "key": "agent-v2", "name": "Agent", "value": False},
        {"id": "prop_3", "key": "unset", "name": "Unset", "value": None},
        {"id": "prop_4", "key": "emptied", "name": "Emptied", "value": ""},
    ]

    done = run(browser, "https://api.acme.com", properties)

    assert done["claims"] == {
        "application_properties": {"model_version": {"v": "gpt-4o"}, "agent-v2": {"v": False}}
    }
    assert done["asked"] == ["applications/3f%2F0c/properties"]
    assert done["settings"]["trigger"] == "m2m:token_generation"
    assert done["settings"]["failurePolicy"] == {"action": "stop"}


@pytest.mark.parametrize("properties", [[], [{"key": "model_version", "value": "gpt-4"}]])
def test_a_token_for_kindes_own_api_stays_as_it_is(browser: Browser, properties: Any) -> None:
    done = run(browser, f"{DOMAIN}/api", properties)

    assert (done["claims"], done["asked"]) == ({}, [])
