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


def test_a_stored_template_reads_back():
    template = parse_template(VALUES, entry="template usage-export")
    selector, spec = json.loads(json.dumps([template.selector.as_json(), template.spec]))

    assert from_template_spec("usage-export", selector, spec) == template
