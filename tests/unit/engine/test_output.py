"""A run's log: lines of three sources, head and tail within a cap, the rest counted."""

from __future__ import annotations

from datetime import datetime

import pytest

from tests.fakes.clock import START, ManualClock
from worker.engine.runners.output import LINE_COST, LINE_LIMIT, RunOutput, marked, stored_lines, unmarked
from worker.handlers.json_text import UNMASKED_LIMIT


class Log:
    """What came out, and when."""

    def __init__(self, clock: ManualClock, cap: int = 256 * 1024) -> None:
        self.lines: list[tuple[str, str, str]] = []
        self.instants: list[datetime] = []
        self.output = RunOutput(self.take, clock, cap=cap)

    def take(self, level: str, source: str, text: str, at: datetime) -> None:
        self.lines.append((level, source, text))
        self.instants.append(at)

    def texts(self) -> list[str]:
        return [text for _, _, text in self.lines]


@pytest.fixture
def log(clock: ManualClock) -> Log:
    return Log(clock)


def test_lines_come_as_soon_as_they_are_whole(log: Log) -> None:
    log.output.feed("stdout", b"one\ntw")
    assert log.lines == [("info", "stdout", "one")]

    log.output.feed("stdout", b"o\n")
    assert log.lines[1:] == [("info", "stdout", "two")]


def test_each_source_has_its_own_unfinished_line(log: Log) -> None:
    log.output.feed("stdout", b"out ")
    log.output.feed("stderr", b"err ")
    log.output.feed("stdout", b"put\n")
    log.output.close()

    assert log.lines == [("info", "stdout", "out put"), ("error", "stderr", "err ")]


def test_a_log_record_keeps_its_level_and_its_lines(log: Log) -> None:
    log.output.feed("stderr", b"before\n" + marked("warning", "one\ntwo\0") + b"after\n")

    assert log.lines == [
        ("error", "stderr", "before"),
        ("warning", "log", "one\ntwo�"),
        ("error", "stderr", "after"),
    ]


@pytest.mark.parametrize(
    "line", [b"\x1e", b"\x1enull", b'\x1e["info"]', b'\x1e["loud", "x"]', b"\x1e[[], 1]"]
)
def test_what_only_looks_like_a_record_is_an_ordinary_line(line: bytes) -> None:
    assert unmarked(line) is None


def test_a_long_record_is_cut_and_stays_one(log: Log) -> None:
    log.output.feed("stderr", marked("info", "ü\n" * 50_000))

    ((level, source, text),) = log.lines
    assert (level, source) == ("info", "log")
    assert text.endswith("…")
    assert len(marked("info", text)) <= UNMASKED_LIMIT
    ((stored),) = stored_lines(source, text)
    assert stored.endswith("…")
    assert len(stored) <= LINE_LIMIT


def test_bytes_that_are_no_text_are_shown_all_the_same(log: Log) -> None:
    log.output.feed("stdout", b"\xff\x00\r\n")

    assert log.texts() == ["��"]


def test_a_line_without_end_is_cut_where_no_token_is(log: Log) -> None:
    word = b"x" * 3000
    log.output.feed("stdout", b" ".join([word] * 45))
    log.output.close()

    texts = log.texts()
    assert len(texts) > 1
    assert max(len(text.encode()) for text in texts) <= UNMASKED_LIMIT
    assert {piece for text in texts for piece in text.replace("…", "").split()} == {word.decode()}
    # The cut is marked on both sides, so that the masker looks for what it has left of a secret.
    assert [text.endswith("…") for text in texts] == [True] * (len(texts) - 1) + [False]
    assert [text.startswith("…") for text in texts] == [False] + [True] * (len(texts) - 1)


@pytest.mark.parametrize("letter", ["x", "é", "☃"])
def test_a_long_line_is_stored_as_several(letter: str) -> None:
    text = letter * (40_000 // len(letter.encode()))

    lines = stored_lines("stdout", text)

    assert len(lines) == 3
    assert "".join(lines) == text
    assert max(len(line.encode()) for line in lines) <= LINE_LIMIT


def test_what_exceeds_the_cap_leaves_head_and_tail_and_a_count(clock: ManualClock) -> None:
    log = Log(clock, cap=2000)
    for number in range(1000):
        log.output.feed("stdout", f"line {number:04}\n".encode())
    log.output.close()

    texts = log.texts()
    cost = len("line 0000\n") + LINE_COST
    head = 1000 // cost
    assert texts[:head] == [f"line {number:04}" for number in range(head)]
    assert texts[-1] == "line 0999"
    told = next(index for index, line in enumerate(log.lines) if line[1] == "log")
    assert told == head
    kept = len(texts) - 1
    assert texts[told] == f"{1000 - kept} lines ({(1000 - kept) * 10} bytes) of this log were dropped"
    assert kept * cost <= 2000
    assert texts[told + 1 :] == [f"line {number:04}" for number in range(1000 - (kept - head), 1000)]


def test_one_block_larger_than_the_cap_is_trimmed_from_its_front(clock: ManualClock) -> None:
    log = Log(clock, cap=2000)
    log.output.feed("stdout", b"".join(b"line %04d\n" % number for number in range(1000)))
    log.output.close()

    assert log.texts()[0] == "line 0000"
    assert log.texts()[-1] == "line 0999"
    assert sum(map(len, log.texts())) < 2000


def test_kept_lines_have_the_time_at_which_they_came(clock: ManualClock) -> None:
    log = Log(clock, cap=200)
    log.output.feed("stdout", b"first\n")
    clock.advance(60)
    log.output.feed("stdout", b"x\n" * 100)
    clock.advance(60)
    log.output.close()

    assert log.instants[0] == START
    assert (log.instants[-1] - START).total_seconds() == 60


def test_a_small_log_is_passed_on_whole_and_no_drop_is_told(log: Log) -> None:
    log.output.feed("stdout", b"only\n")
    log.output.close()

    assert log.lines == [("info", "stdout", "only")]
