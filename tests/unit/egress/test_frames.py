"""Frames of a stream: cut anywhere they are the same, and what our code does not send ends the stream."""

from __future__ import annotations

import struct

import pytest

from worker.handlers.frames import (
    ANSWER,
    DATA,
    END,
    FAILED,
    HEAD,
    MAX_DATA,
    MAX_HEAD,
    SENDING,
    BrokenFrame,
    Frame,
    Frames,
    data_frames,
    frame,
    json_frame,
)


def test_frames_are_read_wherever_they_are_cut() -> None:
    data = json_frame(HEAD, {"a": 1}) + frame(SENDING) + frame(DATA, b"xyz") + frame(END)
    whole = list(Frames().feed(data))
    assert [found.kind for found in whole] == [HEAD, SENDING, DATA, END]
    for at in range(len(data) + 1):
        frames = Frames()
        assert [*frames.feed(data[:at]), *frames.feed(data[at:])] == whole
    frames = Frames()
    assert [found for at in range(len(data)) for found in frames.feed(data[at : at + 1])] == whole


@pytest.mark.parametrize(
    ("kind", "length"),
    [
        (0, 0),
        (7, 0),
        (255, 1),
        (END, 1),
        (SENDING, 1),
        (DATA, MAX_DATA + 1),
        (HEAD, MAX_HEAD + 1),
        (ANSWER, 2**32 - 1),
    ],
)
def test_a_frame_that_is_none_is_refused_before_its_body(kind: int, length: int) -> None:
    with pytest.raises(BrokenFrame):
        list(Frames().feed(struct.pack("!BI", kind, length)))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"1",
        b"[]",
        b"null",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"a":' + b"9" * 5000 + b"}",
    ],
)
def test_a_head_that_is_no_object_is_broken(body: bytes) -> None:
    with pytest.raises(BrokenFrame):
        Frame(HEAD, body).fields()


def test_what_is_too_long_is_not_written() -> None:
    for kind, most in ((HEAD, MAX_HEAD), (ANSWER, MAX_HEAD), (FAILED, MAX_HEAD), (DATA, MAX_DATA), (END, 0)):
        frame(kind, bytes(most))
        with pytest.raises(ValueError):
            frame(kind, bytes(most + 1))


def test_a_long_part_is_several_frames() -> None:
    parts = [found.body for data in data_frames(bytes(MAX_DATA * 2 + 1)) for found in Frames().feed(data)]
    assert [len(part) for part in parts] == [MAX_DATA, MAX_DATA, 1]
    assert list(data_frames(b"")) == []
