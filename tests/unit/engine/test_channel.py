"""Frames and messages between a run's process and the worker."""

from __future__ import annotations

import json
import struct
from datetime import timedelta
from typing import Any

import pytest

from tests.fakes.running import NOW, claims, token, work
from worker.engine.attempt.run_log import redacted
from worker.engine.runners.child.messages import MAX_FRAME, BrokenMessage, Unframer, frame, outcome_of_message
from worker.handlers.calls import NotACall, StoreStep, message_of, read
from worker.ids import OrgId
from worker.model.runs.outcome import Failed
from worker.model.runs.run import NewStep


def test_messages_come_out_whole_however_they_are_cut() -> None:
    data = frame({"a": "é"}) + frame({"b": [1]})
    unframer = Unframer()

    found = [message for byte in data for message in unframer.feed(bytes([byte]))]

    assert found == [{"a": "é"}, {"b": [1]}]
    assert list(Unframer().feed(data)) == found


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("!I", MAX_FRAME + 1),
        struct.pack("!I", 2) + b"{]",
        struct.pack("!I", 2) + b"[]",
        struct.pack("!I", 1) + b"\xff",
        struct.pack("!I", 200_000) + b"[" * 200_000,
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(BrokenMessage):
        list(Unframer().feed(data))


def test_a_lone_surrogate_does_not_break_a_frame() -> None:
    assert list(Unframer().feed(frame({"text": "\ud800"}))) == [{"text": "?"}]


def test_work_shows_neither_token_nor_claims() -> None:
    shown = repr(work("ok", token=token("secret-text"), claims=claims(key="secret-property")))

    assert "secret" not in shown


@pytest.mark.parametrize(
    "message",
    [
        {"kind": []},
        {"kind": "Failed"},
        {"kind": "Succeeded", "result": 5},
        {"kind": "Succeeded", "result": "{"},
        {"kind": "Succeeded", "result": "[NaN]"},
        {"kind": "Succeeded", "result": '"\\u0000"'},
        {"kind": "Succeeded", "result": '"\\ud800"'},
        {"kind": "Succeeded", "result": f'"{"x" * 1024 * 1024}"'},
        {"kind": "Succeeded", "result": "[" * 201 + "]" * 201},
        {"kind": "Succeeded", "result": "[" * 500_000},
        {"kind": "Succeeded", "result": "[" * 500_000 + "]" * 500_000},
        {"kind": "Failed", "error": {"type": "E", "message": 5, "trace": ""}},
        {"kind": "Failed", "error": {"type": "E", "message": [], "trace": ""}},
        {"kind": "Cancelled", "reason": None},
        {"kind": "Snoozed", "after": None},
        {"kind": "Snoozed", "after": -1},
        {"kind": "Snoozed", "after": 4e9},
        {"kind": "Snoozed", "after": float("nan")},
        {"kind": "NoToken", "retry_after": None},
    ],
)
def test_a_hostile_process_cannot_send_what_nobody_can_read(message: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        outcome_of_message(message)


async def test_texts_of_an_outcome_are_cut_and_cleaned_on_arrival() -> None:
    error = {"type": "E" * 9_000, "message": "_" * 8_000_000, "trace": "t\0" * 1_000_000}

    outcome = outcome_of_message({"kind": "Failed", "error": error, "permanent": "yes"})

    assert isinstance(outcome, Failed)
    assert (len(outcome.error.type), len(outcome.error.message)) == (9_000, 65_536)
    assert len(outcome.error.trace) == 65_538
    assert "\0" not in outcome.error.trace
    assert outcome.permanent is False
    stored = await redacted(outcome, OrgId("acme"))
    assert isinstance(stored, Failed)
    assert (len(stored.error.type), len(stored.error.message)) == (500, 4_000)
    assert len(stored.error.trace) == 16_002


STEP = NewStep("ask", "k", 2, 3, '{"a":"é"}', NOW, NOW + timedelta(seconds=1.5), (("llm_tokens", 5),))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "no name"},
        {"name": 5},
        {"key": 5.5},
        {"key": "x" * 201},
        {"seq": 0},
        {"seq": 10_001},
        {"seq": True},
        {"seq": "1"},
        {"occurrence": 0},
        {"occurrence": 2**31},
        {"result_json": 5},
        {"result_json": "{"},
        {"result_json": '"' + "x" * 256 * 1024 + '"'},
        {"result_json": '"\\u0000"'},
        {"started_at": 5},
        {"ended_at": "yesterday"},
        {"spends": [["llm_tokens", -1]]},
        {"spends": [["llm_tokens", 1.5]]},
        {"spends": [["no name", 1]]},
        {"spends": [5]},
    ],
)
def test_a_hostile_process_cannot_store_what_is_no_step(changes: dict[str, Any]) -> None:
    message = message_of(StoreStep(STEP))
    assert read("store", json.loads(json.dumps(message))) == StoreStep(STEP)

    with pytest.raises(NotACall):
        read("store", {"step": message["step"] | changes})
