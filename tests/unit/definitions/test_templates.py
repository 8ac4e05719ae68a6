"""Templates: one definition for many orgs."""

from __future__ import annotations

import json

from worker.definitions.file import from_template_spec, parse_template

VALUES = {
    "name": "usage-export",
    "orgs": {"tags": ["pro"], "issuer": "main"},
    "handler": "usage.export",
    "schedule": "@hourly",
    "enabled": False,
}


def test_a_template_makes_the_same_definition_for_each_org():
    template = parse_template(VALUES, entry="template usage-export")

    acme, beta = template.definition_for("org_acme"), template.definition_for("org_beta")

    assert (acme.org, acme.name, acme.schedule, acme.enabled) == (
        "org_acme",
        "usage-export",
        "@hourly",
        False,
    )
    assert (beta.org, beta.handler) == ("org_beta", "usage.export")


def test_a_stored_template_reads_back():
    template = parse_template(VALUES, entry="template usage-export")
    selector, spec = json.loads(json.dumps([template.selector.as_json(), template.spec]))

    assert from_template_spec("usage-export", selector, spec) == template
