"""The lines of `orgs import`: read whole before anything is written, secrets never repeated."""

from __future__ import annotations

import json

import pytest

from worker.errors import UsageError
from worker.operations.orgs import read_lines

SECRET = "canary-98f6bcd4621d373c"


def test_a_line_has_an_org_and_its_credential():
    text = json.dumps(
        {"code": "org_a", "issuer": "main", "client_id": "c1", "client_secret": SECRET, "tags": ["b", "a"]}
    )

    [line] = read_lines(["", text, "\n"])

    assert (line.number, line.org.code, line.org.name) == (2, "org_a", "org_a")
    assert line.org.tags == {"a", "b"}
    assert (line.client_id, line.secret) == ("c1", SECRET)
    assert SECRET not in repr(line)


def test_an_org_may_come_without_a_credential():
    [line] = read_lines(['{"code": "org_a", "issuer": "main"}'])

    assert (line.client_id, line.secret) == (None, None)


def test_the_line_is_named_and_its_secret_is_not_repeated():
    broken = '{"code": "org_b", "client_secret": "' + SECRET

    with pytest.raises(UsageError) as refused:
        read_lines(['{"code": "org_a", "issuer": "main"}', broken])

    assert refused.value.message == "line 2: not JSON; nothing was imported"
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__
