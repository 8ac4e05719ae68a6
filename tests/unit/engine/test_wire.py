"""The attempt API's messages: what one side writes the other reads, and a host's are not trusted."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from tests.fakes.clock import START
from tests.fakes.exchanges import ENTRY, RUN, TAKEN, WORK
from worker.engine.runners.child.messages import frame, work_message, work_of
from worker.errors import Throttled, Unavailable
from worker.features.hosts import sent as sent_module
from worker.features.hosts import wire
from worker.features.hosts.sent import END, LINE, End, LineRow, Sent, calls_of, sent_message
from worker.features.hosts.wire import Malformed, Registration
from worker.handlers import calls
from worker.handlers.calls import MAX_METERS, OpenWait, StoreStep
from worker.handlers.json_text import check_json_text
from worker.ids import RunId
from worker.model.egress import BoundSecret
from worker.model.runs import outcome as outcomes
from worker.model.runs.egress import MAX_ORIGIN, MAX_ORIGINS, MAX_TOTAL, EgressRow
from worker.model.runs.run import NewStep
from worker.model.runs.waits import MAX_WAITS, NewWait

ENDED = End(RunId("r1"), 7, outcomes.Succeeded('{"n":1}'), "c2VhbGVk", handler_seconds=1.5)
STEP = NewStep("fetch", None, 1, 1, '{"n":1}', START, START)


def sent(message: Any) -> Any:
    """A message as the other side gets it."""
    return json.loads(json.dumps(message))


def test_secrets_come_with_the_attempt_and_are_in_no_repr() -> None:
    taken = replace(TAKEN, work=replace(WORK, secrets={"openai": "sk-canary-1234567890"}))
    read = wire.taken_of(sent(wire.taken_message(taken)))

    assert read.work.secrets == {"openai": "sk-canary-1234567890"}
    assert "sk-canary" not in repr(read)


def test_bound_secrets_come_with_the_attempt_and_go_to_no_process_of_a_run() -> None:
    bound = BoundSecret(
        "openai", "sk-canary-1234567890", "https://api.openai.com", "x-api-key", "placeholder"
    )
    taken = replace(TAKEN, work=replace(WORK, secrets={"openai": "placeholder"}, bound=(bound,)))
    message = sent(wire.taken_message(taken))
    read = wire.taken_of(message)

    assert (read.work.bound, read.work.secrets) == ((bound,), {"openai": "placeholder"})
    assert "sk-canary" not in repr(read)
    # The control: the message to the host has the value.
    assert "sk-canary" in json.dumps(message)
    assert b"sk-canary" not in frame(work_message(read.work, 60.0))
    assert work_of(work_message(read.work, 60.0)).bound == ()


def test_a_worker_of_the_previous_version_sends_no_secrets() -> None:
    message = sent(wire.taken_message(TAKEN))
    del message["work"]["secrets"]

    assert wire.taken_of(message).work.secrets == {}
    assert wire.taken_of(message).work.bound == ()


@pytest.mark.parametrize("secrets", ["all", {"openai": 1}, ["a b"], [7], ["a"] * 21])
def test_a_host_offers_only_names_of_secrets(secrets: Any) -> None:
    with pytest.raises(Malformed):
        wire.entries_of({"entries": [{**sent(wire.ENTRY.write(ENTRY)), "secrets": secrets}]})


@pytest.mark.parametrize("egress", [None, (), ("api", "https://*.example.com")])
def test_a_hosts_egress_arrives_as_it_was_declared(egress: Any) -> None:
    declared = replace(ENTRY, egress=egress, audiences=("mcp",))

    [read] = wire.entries_of({"entries": [sent(wire.ENTRY.write(declared))]})

    assert (read.egress, read.audiences) == (egress, ("mcp",))


def test_a_host_without_one_sends_what_the_previous_version_does() -> None:
    message = wire.ENTRY.write(replace(ENTRY, egress=None, audiences=()))

    assert message.keys().isdisjoint({"egress", "audiences"})


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("egress", [["api"]], "an item is not a text"),
        ("egress", ["internal.example"], "'internal.example' is not allowed here"),
        ("egress", ["https://*.s3.amazonaws.com"], "which is a public suffix"),
        ("egress", [f"https://{n}.example" for n in range(101)], "more than 100 items"),
        ("audiences", [{}], "an audience is a text"),
        ("audiences", ["a\nb"], "an audience is a text"),
        ("audiences", ["a"] * 21, "more than 20 items"),
    ],
)
def test_a_list_that_no_handler_could_declare_breaks_this_handler_only(
    key: str, value: Any, error: str
) -> None:
    wrong = {**sent(wire.ENTRY.write(ENTRY)), key: value}

    broken, other = wire.entries_of({"entries": [wrong, sent(wire.ENTRY.write(ENTRY))]})

    assert error in str(broken.error)
    assert (broken.egress, broken.scopes, broken.name) == (None, (), ENTRY.name)
    assert other == ENTRY


@pytest.mark.parametrize("value", ["api", {"api": 1}, 5])
@pytest.mark.parametrize("key", ["egress", "audiences"])
def test_what_is_not_a_list_is_malformed(key: str, value: Any) -> None:
    with pytest.raises(Malformed, match=f"{key} of .* is not a list"):
        wire.entries_of({"entries": [{**sent(wire.ENTRY.write(ENTRY)), key: value}]})


def test_a_host_of_the_previous_version_ignores_new_keys() -> None:
    message = sent(wire.taken_message(TAKEN)) | {"new": 1}
    for part in (message["run"], message["work"], message["work"]["granted"]["claims"]):
        part["new"] = 1

    assert wire.taken_of(message).run == RUN


def test_a_worker_ignores_new_keys_and_takes_defaults() -> None:
    registration = {
        "host": "gpu1",
        "pid": 7,
        "version": "9",
        "slots": {"child": 2, "threads": 3},
        "handlers": [{**sent(wire.ENTRY.write(ENTRY)), "new": {"nested": True}}],
    }
    assert wire.REGISTRATION.read(registration) == Registration(
        "gpu1", 7, "9", {"child": 2, "inline": 0}, [ENTRY]
    )

    bare = {
        "run": "r1",
        "fencing_token": 7,
        "outcome": {"kind": "Succeeded"},
        "sealed": "c2VhbGVk",
        "new": 1,
    }
    assert wire.rows_of({"ends": [bare]}, "ends", END) == [
        End(RunId("r1"), 7, outcomes.Succeeded(), "c2VhbGVk")
    ]


@pytest.mark.parametrize(
    "changed",
    [
        {"fencing_token": "7"},
        {"fencing_token": True},
        {"run": "r\n1"},
        {"sealed": None, "run": None},
    ],
)
def test_an_end_that_names_no_run_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        wire.rows_of({"ends": [END.write(ENDED) | changed]}, "ends", END)


EGRESS = {
    "origin": "https://api.example.com",
    "requests": 3,
    "bytes_out": 300,
    "bytes_in": 9_000,
    "denied": 1,
    "statuses": {"200": 2, "429": 1},
    "waited_seconds": 1.5,
    "reason": "not listed",
}


def test_an_end_names_what_was_sent_and_only_if_anything_was() -> None:
    """A worker of the previous release ignores the key; a host of it leaves it out."""
    row = EgressRow("https://api.example.com", 3, 300, 9_000, {"200": 2, "429": 1}, 1, 1.5, "not listed")

    message = sent(END.write(replace(ENDED, egress=(row,))))

    assert message["egress"] == [EGRESS]
    assert END.read(message, check_json_text).egress == (row,)
    assert END.read(message, check_json_text).egress[0].reason == "not listed"
    assert "egress" not in END.write(ENDED)


@pytest.mark.parametrize(
    "changed",
    [
        {"peak_memory": -1},
        {"handler_seconds": "soon"},
        {"progress": {"done": float("nan"), "total": None, "note": None}},
        {"asks": "approve"},
        {"asks": ["a\n"]},
        {"egress": "none"},
        {"egress": [EGRESS] * (MAX_ORIGINS + 2)},
        {"egress": [EGRESS | {"origin": "https://" + "a" * MAX_ORIGIN}]},
        {"egress": [EGRESS | {"origin": "https://a\n"}]},
        {"egress": [EGRESS | {"requests": -1}]},
        {"egress": [EGRESS | {"bytes_in": MAX_TOTAL + 1}]},
        {"egress": [EGRESS | {"denied": 0.5}]},
        {"egress": [EGRESS | {"statuses": {"200": "1"}}]},
        {"egress": [EGRESS | {"statuses": ["200"]}]},
        {"egress": [EGRESS | {"waited_seconds": float("nan")}]},
        {"egress": [EGRESS | {"waited_seconds": -1}]},
        {"egress": [None]},
        {"egress": [{}]},
    ],
)
@pytest.mark.parametrize("alone", [True, False], ids=["", "control"])
def test_an_invalid_end_fails_its_own_attempt_and_no_other(
    changed: dict[str, Any], alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control is a reader that refuses the call, and with it all ends of the host."""
    rows = [END.write(ENDED) | changed, END.write(ENDED)]
    if not alone:
        monkeypatch.setattr(type(END), "read", lambda self, row, check: sent_module.REPORTED.read(row, check))
        with pytest.raises(Malformed):
            wire.rows_of({"ends": rows}, "ends", END)
        return

    bad, good = wire.rows_of({"ends": rows}, "ends", END)

    assert isinstance(bad.outcome, outcomes.Failed)
    assert bad.outcome.reason == "handler_exited"
    assert "its host sent an invalid end: " in (bad.outcome.detail or "")
    assert (*bad.key, bad.sealed) == (*ENDED.key, ENDED.sealed)
    assert good == ENDED


def test_an_end_with_more_questions_than_a_run_may_have_is_cut() -> None:
    """Hosts of the previous release name a wait as often as its handler opened it."""
    [end] = wire.rows_of({"ends": [END.write(ENDED) | {"asks": ["ok"] * (MAX_WAITS + 1)}]}, "ends", END)

    assert end.asks == ("ok",) * MAX_WAITS
    assert end.outcome == ENDED.outcome


@pytest.mark.parametrize(
    "outcome",
    [
        {"kind": "Gated", "reason": "flag_off"},
        {"kind": "Succeeded", "result": "{"},
        {"kind": "Parked", "reason": "forever"},
        {"kind": "Snoozed", "after": 1e300},
        {"kind": "Snoozed", "after": 10**400},
        {"kind": "TimedOut"},
        {},
        "Succeeded",
        None,
    ],
)
def test_an_invalid_outcome_ends_its_own_attempt_and_no_other(outcome: Any) -> None:
    """A refused call would be sent again, for ever, with the other ends of the host."""
    rows = [{**END.write(ENDED), "outcome": outcome}, END.write(ENDED)]

    bad, good = wire.rows_of({"ends": rows}, "ends", END)

    assert isinstance(bad.outcome, outcomes.Failed)
    assert (bad.outcome.reason, bad.outcome.detail) == (
        "handler_exited",
        "its host sent an invalid outcome",
    )
    assert good == ENDED


@pytest.mark.parametrize(
    "changed",
    [
        {"name": ""},
        {"name": "x" * 1000},
        {"isolation": "thread"},
        {"scopes": "read:kb"},
        {"scopes": [1]},
        {"timeout": "soon"},
        {"memory": "much"},
        {"max_concurrent": -1},
        {"max_attempts": "3"},
        {"params_schema": "any"},
    ],
)
def test_a_handler_that_is_none_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        wire.entries_of({"entries": [wire.ENTRY.write(ENTRY) | changed]})


def test_more_rows_than_a_call_may_have_are_refused() -> None:
    line = LINE.write(LineRow(RunId("r1"), 7, 1, START, "info", "log", "x"))

    assert len(wire.rows_of(sent({"lines": [line]}), "lines", LINE)) == 1
    with pytest.raises(Malformed, match="list of at most"):
        wire.rows_of({"lines": [line] * (wire.MAX_ROWS + 1)}, "lines", LINE)
    with pytest.raises(Malformed, match="not a valid lines: level: not one of"):
        wire.rows_of({"lines": [line | {"level": "shout"}]}, "lines", LINE)


FENCE = {"run": "r1", "fencing_token": 7}


def spend(key: str) -> Sent:
    [sent] = calls_of("spend", {**FENCE, "meter": "tokens", "amount": 5, "key": key})
    return sent


@pytest.mark.parametrize(
    "key", ["7", "x:1", "1:x", "1:0", f"1:{10**9}", "1:01", "01:1", "1:١", "١:1", " 1:1", "1:1\n", "1:1_0"]
)
def test_a_spend_without_a_number_of_the_attempt_is_refused(key: str) -> None:
    with pytest.raises(Malformed, match="not a valid spend: key: not attempt:number"):
        spend(key)


def test_each_number_of_a_spend_has_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control is a reader that takes any decimal digits: the same number counts several times."""

    def keys_taken() -> set[str]:
        taken = set()
        for key in ("1:1", "1:01", "1:001", "1:١"):
            with suppress(Malformed):
                taken.add(spend(key).call.key)
        return taken

    assert keys_taken() == {"1:1"}
    monkeypatch.setattr(calls, "_SPEND_KEY", re.compile(r"\d+:(\d+)"))
    assert len(keys_taken()) == 4


@pytest.mark.parametrize("after", [-1, 10_001, 2**70, True, "1"])
def test_the_place_after_which_steps_are_read_is_one_of_a_run(after: Any) -> None:
    assert calls_of("steps", FENCE | {"after": 10_000})[0].call.after == 10_000
    with pytest.raises(Malformed, match="not a valid steps: after"):
        calls_of("steps", FENCE | {"after": after})


@pytest.mark.parametrize("spends", [MAX_METERS, MAX_METERS + 1])
def test_a_step_has_no_more_spends_than_our_own_code_sends(spends: int) -> None:
    """Each is a row. The control is one spend less."""
    row = sent_message(Sent(RunId("r1"), 7, "h", StoreStep(STEP)))
    row["step"]["spends"] = [["tokens", 1]] * spends

    if spends <= MAX_METERS:
        assert len(calls_of("store", {"steps": [row]})[0].call.step.spends) == spends
        return
    with pytest.raises(Malformed, match="spends: not a list of at most 1000"):
        calls_of("store", {"steps": [row]})


@pytest.mark.parametrize(
    "changed", [{"run": "r\n1"}, {"fencing_token": "7"}, {"handler": ""}, {"handler": 1}]
)
def test_a_call_without_its_run_or_handler_is_refused(changed: dict[str, Any]) -> None:
    message = {**FENCE, "handler": "h", "fresh": False}

    assert [(*one.key, one.handler) for one in calls_of("token", message)] == [("r1", 7, "h")]
    with pytest.raises(Malformed, match="not a valid token: "):
        calls_of("token", message | changed)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("throttled", Throttled),
        ("something_new", Unavailable),
        (None, Unavailable),
    ],
)
def test_an_error_that_is_not_known_is_one_for_now(code: str | None, kind: type[Exception]) -> None:
    body = {} if code is None else {"error": {"code": code, "message": "no", "fix": ""}}
    assert type(wire.error_of(body, 3.0)) is kind


BOUND = NewWait("approve", 1, "answer", options=("yes", 1, True, None))


@pytest.mark.parametrize(
    "changed",
    [
        {"options": "yes"},
        {"options": []},
        {"options": ["x"] * 2},
        {"options": list(range(51))},
        {"options": [["yes"]]},
        {"options": ["\0"]},
        {"options": [float("inf")]},
        {"options": ["x" * 16_400]},
        {"kind": "sleep"},
        {"kind": "budget"},
    ],
)
def test_options_of_a_host_that_are_none_are_refused(changed: dict[str, Any]) -> None:
    message = sent_message(Sent(RunId("r1"), 7, "", OpenWait(BOUND)))
    assert calls_of("choose", message)[0].call == OpenWait(BOUND)
    message["wait"] |= changed

    with pytest.raises(Malformed):
        calls_of("choose", message)
