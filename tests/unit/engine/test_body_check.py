"""What the process that checks large bodies takes of them, and what it refuses before it builds anything."""

from __future__ import annotations

import io
import json
from functools import partial
from typing import Any

import pytest

from worker.features.hosts import body_check, wire
from worker.features.hosts.body_check import CALL, DONE, ENDING, FRAME, REFUSED, REQUEST, ROW, TEXT
from worker.features.hosts.checker import _Parts, joined
from worker.features.hosts.sent import END, LINE, PROGRESS, calls_of
from worker.handlers.calls import CALLS
from worker.handlers.catalogue import HandlerEntry
from worker.handlers.json_text import CheckedObject, CheckedText

NOW = "2030-01-01T00:00:00Z"
RUN = {"run": "00000000-0000-0000-0000-000000000001", "fencing_token": 3}
STEP = {
    **{"name": "s", "key": None, "occurrence": 1, "seq": 1, "result_json": '{"a":[1]}'},
    **{"spends": [["llm", 2]], "started_at": NOW, "ended_at": NOW},
    "used": [{"provider": None, "model": "m", "kinds": [["input", 2]]}],
}
LONG = 'é"\\x' * 1000
MESSAGES: dict[str, dict[str, Any]] = {
    "finish": {
        "ends": [
            {
                **RUN,
                "outcome": {"kind": "Succeeded", "result": json.dumps(LONG), "state": '{"a":1}'},
                "sealed": "k.x",
            },
            {
                **{
                    **RUN,
                    "sealed": LONG,
                    "handler_seconds": 1.5,
                    "peak_memory": 7,
                    "moved": True,
                    "asks": ["ok"],
                },
                "outcome": {"kind": "Failed", "error": {"type": "E", "message": LONG, "trace": LONG}},
                "progress": {"done": 1, "total": 2, "note": "half"},
            },
            {
                **RUN,
                "outcome": {"kind": "TimedOut", "error": {"type": "E", "message": "", "trace": ""}},
                "sealed": "",
            },
        ]
    },
    "store": {
        "steps": [{**RUN, "handler": "h", "step": STEP}, {**RUN, "handler": "h", "step": {**STEP, "seq": 2}}]
    },
    "save": {**RUN, "handler": "h", "data": json.dumps([LONG]), "number": 4},
    "logs": {"lines": [{**RUN, "seq": 1, "at": NOW, "level": "info", "source": "log", "text": LONG}]},
    "progress": {"rows": [{**RUN, "progress": {"done": 1, "total": None, "note": "n"}}]},
    "hand_back": {"runs": [RUN, RUN]},
    "wait": {
        **RUN,
        "wait": {
            **{"name": "ok", "occurrence": 1, "kind": "answer", "seconds": None, "alert": True},
            "ask_json": json.dumps(LONG),
        },
    },
    "choose": {
        **RUN,
        "wait": {
            **{"name": "ok", "occurrence": 1, "kind": "answer", "seconds": None, "alert": False},
            **{"ask_json": json.dumps(LONG), "options": ["yes", LONG[:100], 1, None]},
        },
    },
    "wait_children": {
        **RUN,
        "wait": {
            **{"name": "children:gather", "occurrence": 1, "kind": "children", "seconds": None},
            **{"ask_json": json.dumps(LONG), "alert": False},
            "children": {"spans": [[1, 5], [7, 7]], "any": False},
        },
    },
    "start_children": {
        **RUN,
        "handler": "h",
        "children": [
            {"handler": "h", "key": "k", "occurrence": 1, "params_json": json.dumps({"a": LONG})},
            {"handler": "h", "key": None, "occurrence": 2, "params_json": "{}", "map": 1, "window": 5},
        ],
        "keep": True,
    },
    "trace": {
        "spans": [
            {
                **RUN,
                "span": {
                    **{"name": "model:a", "key": "1", "occurrence": 1, "error": "ValueError"},
                    **{"started_at": NOW, "ended_at": NOW},
                    "about": {"gen_ai.operation.name": "chat", "gen_ai.usage.input_tokens": 5},
                    "texts": {"gen_ai.input.messages": LONG},
                },
            },
        ],
    },
    "ended_children": {**RUN, "spans": [[1, 5], [7, 7]], "after": 3},
    "handlers": {
        "entries": [
            wire.ENTRY.write(
                HandlerEntry("a.b", "a", "1", "a:b", scopes=("s",), params_schema={"x": LONG}, timeout="5m")
            ),
            wire.ENTRY.write(HandlerEntry("a.c", "a", "1", "a:c", error="broken")),
        ],
        "complete": True,
    },
}
READERS: dict[str, Any] = {
    **{name: partial(calls_of, name) for name in CALLS if name in MESSAGES},
    "finish": lambda message: wire.rows_of(message, "ends", END),
    "logs": lambda message: wire.rows_of(message, "lines", LINE),
    "progress": lambda message: wire.rows_of(message, "rows", PROGRESS),
    "hand_back": lambda message: wire.rows_of(message, "runs", wire.FENCE),
    "handlers": lambda message: (wire.entries_of(message), message["complete"]),
}


def answered(name: str, body: bytes) -> list[tuple[int, bytes]]:
    """The frames that the process writes."""
    out = io.BytesIO()
    body_check.serve(io.BytesIO(REQUEST.pack(len(name), len(body)) + name.encode() + body), out)
    written, frames = out.getvalue(), []
    while written:
        kind, size = FRAME.unpack(written[: FRAME.size])
        frames.append((kind, written[FRAME.size : FRAME.size + size]))
        written = written[FRAME.size + size :]
    return frames


def refusal(name: str, body: bytes) -> str:
    *before, (kind, content) = answered(name, body)
    assert (kind, [one for one, _ in before if one != ENDING]) == (REFUSED, [])
    return content.decode()


def parts(name: str, message: dict[str, Any]) -> list[dict[str, Any]]:
    read = _Parts(name)
    for kind, content in answered(name, json.dumps(message).encode()):
        if kind == TEXT:
            read.text(content)
        elif kind in (CALL, ROW):
            read.add(kind, content)
    return read.whole()


def test_every_call_that_may_be_large_is_checked() -> None:
    assert MESSAGES.keys() == READERS.keys() == wire.BODY_BYTES.keys()
    assert body_check.ROWS.keys() | CALLS.keys() >= wire.BODY_BYTES.keys()


@pytest.mark.parametrize("name", MESSAGES)
def test_what_is_left_of_a_call_reads_as_the_call_itself(name: str) -> None:
    message = json.loads(json.dumps(MESSAGES[name]))

    [part] = parts(name, message)

    assert READERS[name](part) == READERS[name](message)


def test_checked_texts_are_not_checked_again_and_others_are() -> None:
    [part] = parts("finish", MESSAGES["finish"])
    first, second, _ = part["ends"]

    assert type(first["outcome"]["result"]) is type(first["outcome"]["state"]) is CheckedText
    assert type(second["sealed"]) is type(second["outcome"]["error"]["trace"]) is str
    [part] = parts("handlers", MESSAGES["handlers"])
    assert type(part["entries"][0]["params_schema"]) is CheckedObject


@pytest.mark.parametrize("name", [name for name in CALLS if name in MESSAGES and body_check.JSON_TEXTS[name]])
def test_each_call_has_its_json_text_checked_and_nothing_else(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control is a call that declares none: its worker checks all of it again."""

    def texts(value: Any) -> list[str]:
        inner = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
        return [type(value).__name__] * isinstance(value, str) + [
            text for one in inner for text in texts(one)
        ]

    count = len(MESSAGES[name].get(CALLS[name].way.batch, [name]))
    [part] = parts(name, json.loads(json.dumps(MESSAGES[name])))
    assert texts(part).count("CheckedText") == count
    monkeypatch.setattr(body_check, "JSON_TEXTS", {})
    [part] = parts(name, json.loads(json.dumps(MESSAGES[name])))
    assert texts(part).count("CheckedText") == 0


def test_a_message_cannot_say_that_it_was_checked() -> None:
    """The control: the same text that a worker parses itself is refused."""
    given = {**MESSAGES["save"], "data": "[1"}
    with pytest.raises(wire.Malformed):
        calls_of("save", given)
    assert "JSON" in refusal("save", json.dumps(given).encode())

    assert calls_of("save", {**given, "data": CheckedText("[1")})


def test_many_rows_come_in_parts_and_handlers_all_at_once() -> None:
    message = {"runs": [RUN] * 250}
    entries = [{**MESSAGES["handlers"]["entries"][1], "name": f"a.h{n}"} for n in range(250)]
    [part] = parts("handlers", {"entries": entries})
    assert len(part["entries"]) == 250

    found = parts("hand_back", message)

    assert [len(part["runs"]) for part in found] == [100, 100, 50]
    assert joined([{"runs": ["a"]}, {"runs": ["b"]}, {"runs": []}]) == {"runs": ["a", "b"]}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not JSON"),
        (b"\xff" * 40_000, "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'{"a":"' + b'\\"' * 500_000, "not JSON"),
        (b"[]" + b" " * 40_000, "not a JSON object"),
        (b'{"ends":[' + b"[]," * 1_000_000 + b"[]]}", "more than 1048576 bytes besides its texts"),
        (b'{"ends":[' + b'"",' * 1_000_000 + b'""]}', "more than 1048576 bytes besides its texts"),
        (b'{"ends":1}', "ends is not a list"),
    ],
)
def test_what_is_not_a_call_is_refused(body: bytes, reason: str) -> None:
    assert reason in refusal("finish", body)


def test_bodies_with_many_values_are_refused_before_they_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    body = b'{"ends":[' + b"[]," * 1_000_000 + b"[]]}"
    parsed: list[int] = []
    real = json.loads
    monkeypatch.setattr(body_check.json, "loads", lambda text: parsed.append(len(text)) or real(text))

    assert "besides its texts" in refusal("finish", body)
    assert parsed == []
    # The control: it is this limit that keeps it from being built.
    monkeypatch.setattr(body_check, "MAX_STRUCTURE", 2**30)
    assert "not a list of at most" in refusal("finish", body)
    assert parsed == [len(body)]


def test_texts_may_be_as_long_as_their_call_allows() -> None:
    message = {
        "ends": [
            {**RUN, "outcome": {"kind": "Succeeded", "result": json.dumps("[" * 900_000)}, "sealed": "s"}
        ]
    }

    [part] = parts("finish", message)

    assert part["ends"][0]["outcome"]["result"] == json.dumps("[" * 900_000)


@pytest.mark.parametrize(
    ("name", "message", "reason"),
    [
        ("take", {}, "no call take is larger than 32768 bytes"),
        (
            "finish",
            {"ends": [{**MESSAGES["finish"]["ends"][0], "sealed": "x" * 300_000}]},
            "sealed: it is longer",
        ),
        (
            "store",
            {"steps": [{**RUN, "handler": "h", "step": {**STEP, "spends": [["llm", 1]] * 2001}}]},
            "not a valid store: step: spends: not a list of at most 1000",
        ),
        ("save", {**MESSAGES["save"], "data": json.dumps("x" * 1_100_000)}, "the maximum is 1 MiB"),
    ],
)
def test_a_call_beyond_its_limits_is_refused(name: str, message: dict[str, Any], reason: str) -> None:
    assert reason in refusal(name, json.dumps(message).encode())


def test_a_process_that_has_become_large_ends_after_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps(MESSAGES["save"]).encode()
    monkeypatch.setattr(body_check, "TOO_LARGE", 2**50)
    kinds = [kind for kind, _ in answered("save", body)]
    monkeypatch.setattr(body_check, "TOO_LARGE", 0)

    assert kinds == [CALL, TEXT, DONE]
    assert [kind for kind, _ in answered("save", body)] == [CALL, TEXT, ENDING, DONE]
