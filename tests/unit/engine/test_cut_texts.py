"""A text is masked before it is cut to its final size; a secret that the first cut halves is masked too."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, cast
from urllib.parse import quote

import pytest

from tests.fakes.clock import ManualClock
from tests.unit.engine.runs import admitted
from worker.engine.attempt.answers import Acts, Running
from worker.engine.attempt.inflight import InflightRun
from worker.engine.attempt.run_log import AHEAD, RunLogWriter, mask_trail, masked_progress, redacted
from worker.engine.runners.child import messages
from worker.engine.runners.contract import StopSignal
from worker.engine.runners.output import LINE_LIMIT, RunOutput, marked
from worker.handlers.calling import MESSAGE_LIMIT, TRACE_LIMIT, error_of, outcome_of
from worker.handlers.calls import Progress, read
from worker.handlers.json_text import UNMASKED_LIMIT, clean
from worker.handlers.results import Retry
from worker.handlers.shared_context import NOTE_LIMIT
from worker.ids import OrgId
from worker.model.runs.outcome import Error, Failed, Retried, Succeeded, Trail
from worker.model.runs.run import LogLine
from worker.telemetry.cut_secrets import LEAST_PIECE
from worker.telemetry.masking import MASK, masker
from worker.telemetry.secret_index import SecretIndex

ORG = OrgId("o1")
SECRETS = {
    "plain": "canary-5ecret-value-0123456789",
    "awkward": 'cañary"5ecret\\value&with%more☃',
    "long": "canary" + "0123456789abcdef" * 20,
}
WRITTEN: Mapping[str, Callable[[str], str]] = {
    "as it is": str,
    "json": lambda text: json.dumps(text)[1:-1],
    "json in json": lambda text: json.dumps(json.dumps(text))[3:-3],
    "repr of bytes": lambda text: repr(text.encode())[2:-1],
    "percent": lambda text: quote(text, safe=""),
    "html": html.escape,
    "base64": lambda text: base64.b64encode(b"x" * 60 + text.encode()).decode(),
}


@pytest.fixture(params=SECRETS.values(), ids=SECRETS)
def secret(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    InflightRun(admitted(), StopSignal()).hold_secrets({"key": value})
    return value


class Store:
    def __init__(self) -> None:
        self.lines: list[LogLine] = []
        self.progress: list[Any] = []

    async def append_logs(self, rows: Any) -> None:
        self.lines += rows

    async def write_progress(self, rows: Any) -> None:
        self.progress += rows


def sent(failed: Failed) -> Failed:
    """As the worker gets it from the run's process."""
    outcome = messages.outcome_of_message(json.loads(json.dumps(messages.outcome_message(failed))))
    assert isinstance(outcome, Failed)
    return outcome


async def test_the_end_of_an_error_is_cut_after_it_is_masked(secret: str) -> None:
    """The control is the order of before: cut to 4,000, and mask what is left."""
    for left in range(LEAST_PIECE, len(secret), 3):
        text = "." * (MESSAGE_LIMIT - 1 - left) + secret + " and more" * 600
        stored = await redacted(sent(Failed(error_of(ValueError(text)))), ORG)
        before = clean(text, MESSAGE_LIMIT)

        assert isinstance(stored, Failed)
        assert len(stored.error.message) == MESSAGE_LIMIT
        assert secret[:LEAST_PIECE] not in stored.error.message
        assert secret[:LEAST_PIECE] not in stored.error.trace
        assert secret[:left] in before


@pytest.mark.parametrize("form", WRITTEN)
def test_what_is_left_of_a_secret_at_the_mark_of_a_cut_is_masked(secret: str, form: str) -> None:
    written, is_base64 = WRITTEN[form](secret), form == "base64"
    # In base64 the letters at its ends also hold what stands around the secret.
    first = 80 + 8 if is_base64 else len(WRITTEN[form](secret[:LEAST_PIECE]))
    last = 8 if is_base64 else len(WRITTEN[form](secret[-LEAST_PIECE:]))

    for left in range(first, len(written)):
        masked = masker.mask(f"so {written[:left]}…", ORG)
        assert masked == f"so {written[:80] if is_base64 else ''}{MASK}…", left
    for left in range(80 * is_base64 + 1, len(written) - last):
        masked = masker.mask(f"…{written[left:]} it is", ORG)
        assert re.fullmatch(rf"…\[masked\]{'.{0,3}' if is_base64 else ''} it is", masked), masked


@pytest.mark.parametrize("most", [MESSAGE_LIMIT, AHEAD * MESSAGE_LIMIT])
async def test_a_message_that_masking_makes_short_is_stored_up_to_its_limit(secret: str, most: int) -> None:
    """Only the first part of a long one is masked at first, which may be too little."""
    filled = f"{secret} " * (most // (len(secret) + 1) + 1)
    text = filled + "." * (UNMASKED_LIMIT - len(filled))

    stored = await redacted(Failed(Error("E", text, text[::-1].replace(secret[::-1], secret))), ORG)

    assert isinstance(stored, Failed)
    assert stored.error.message == clean(text.replace(secret, MASK), MESSAGE_LIMIT)
    assert stored.error.trace == "…\n" + text[::-1].replace(secret[::-1], MASK)[-TRACE_LIMIT:]


def test_a_secret_at_the_cut_of_64_kib_is_masked(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is before it is so much shorter once it is masked that the cut is shown."""
    whole = f"{secret} " * UNMASKED_LIMIT
    for left in range(LEAST_PIECE, 16):
        raised = ValueError(whole[left + 1 - UNMASKED_LIMIT :] + secret + " more")
        message = sent(Failed(error_of(raised))).error.message
        assert message.endswith(f" {secret[:left]}…")

        assert masker.mask(message, ORG).endswith(f"{MASK} {MASK}…")
        with monkeypatch.context() as patched:  # the control
            patched.setattr(SecretIndex, "ends", lambda self, text: [])
            assert masker.mask(message, ORG).endswith(f"{MASK} {secret[:left]}…")


async def test_the_beginning_of_a_trace_is_cut_after_it_is_masked(secret: str) -> None:
    for left in range(LEAST_PIECE, len(secret), 3):
        text = secret + "." * (TRACE_LIMIT - left)
        stored = await redacted(sent(Failed(Error("E", "m", text))), ORG)
        first = await redacted(sent(Failed(Error("E", "m", "…\n" + text[-TRACE_LIMIT:]))), ORG)

        for outcome in (stored, first):
            assert isinstance(outcome, Failed)
            assert secret[-LEAST_PIECE:] not in outcome.error.trace
        # The control: as it was cut before.
        assert secret[-left:] in text[-TRACE_LIMIT:]


async def test_a_reason_and_a_note_are_cut_after_they_are_masked(secret: str) -> None:
    text = "." * (NOTE_LIMIT - 1 - LEAST_PIECE) + secret + "." * NOTE_LIMIT

    retried = outcome_of(Retry(1, text))
    assert isinstance(retried, Retried)
    stored = await redacted(retried, ORG)
    note = (await masked_progress({"note": text}, ORG))["note"]

    assert isinstance(stored, Retried)
    assert stored.detail == note == clean(text.replace(secret, MASK), NOTE_LIMIT)
    assert secret[:LEAST_PIECE] not in note
    assert secret[:LEAST_PIECE] in clean(text, NOTE_LIMIT)  # the control


async def test_progress_is_cut_after_it_is_masked(secret: str, clock: ManualClock) -> None:
    text = "." * (NOTE_LIMIT - 1 - LEAST_PIECE) + secret + "." * NOTE_LIMIT
    message = json.loads(json.dumps({"done": 1, "total": 2, "note": text}))
    store = Store()
    run_log = RunLogWriter(store, clock)
    inflight = InflightRun(admitted(), StopSignal())
    services = Running(inflight, Trail("h"), cast(Acts, None), run_log, clock)

    notice = read("progress", message)
    assert isinstance(notice, Progress)
    services.tell(notice)

    await mask_trail(services.trail, ORG)
    await run_log.flush()

    assert services.trail.progress is not None
    ((_, _, written),) = store.progress
    for progress in (services.trail.progress, written):
        assert progress["note"] == clean(text.replace(secret, MASK), NOTE_LIMIT)


async def logged(clock: ManualClock, source: str, *data: bytes) -> list[str]:
    store, run = Store(), admitted()
    run_log = RunLogWriter(store, clock)
    output = RunOutput(lambda level, source, text, at: run_log.line(run, level, source, text, at), clock)
    for part in data:
        output.feed(source, part)
    output.close()
    await run_log.flush()
    assert [line.seq for line in store.lines] == list(range(1, len(store.lines) + 1))
    return [line.text for line in store.lines]


async def test_a_record_is_cut_after_it_is_masked(secret: str, clock: ManualClock) -> None:
    for left in range(LEAST_PIECE, 20):
        text = "." * (LINE_LIMIT - 1 - left) + secret + "." * LINE_LIMIT
        [line] = await logged(clock, "stderr", marked("info", text))

        assert len(line) == LINE_LIMIT
        assert secret[:LEAST_PIECE] not in line
        assert secret[:left] in clean(text, LINE_LIMIT)  # the control


@pytest.mark.parametrize("at", [LINE_LIMIT, UNMASKED_LIMIT - 3])
async def test_a_line_without_an_end_is_cut_after_it_is_masked(
    secret: str, at: int, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 16 KiB a secret is found as a whole, at 64 KiB both pieces of it are."""
    shown: dict[bool, int] = {False: 0, True: 0}
    for control in (False, True):
        if control:
            monkeypatch.setattr(SecretIndex, "ends", lambda self, text: [])
        for left in range(LEAST_PIECE, 20, 5):
            text = "." * (at - left) + secret + "." * UNMASKED_LIMIT
            lines = await logged(clock, "stdout", text.encode())
            shown[control] += sum(
                secret[:LEAST_PIECE] in line or secret[-LEAST_PIECE:] in line for line in lines
            )

    assert shown[False] == 0
    assert (shown[True] > 0) == (at > LINE_LIMIT)


async def test_a_record_larger_than_64_kib_shows_no_piece_of_a_secret(
    secret: str, clock: ManualClock
) -> None:
    whole = f"{secret} " * (3 * UNMASKED_LIMIT // len(secret))

    [line] = await logged(clock, "stderr", marked("info", whole))

    assert secret[:LEAST_PIECE] not in line
    assert line.startswith(f"{MASK} {MASK}")


async def test_a_result_is_masked_and_never_cut(secret: str) -> None:
    outcome = outcome_of(["." * 900_000, secret])
    assert isinstance(outcome, Succeeded)

    stored = await redacted(outcome, ORG)

    assert isinstance(stored, Succeeded)
    assert json.loads(stored.result or "") == ["." * 900_000, MASK]
