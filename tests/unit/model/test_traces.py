"""Traces as people read them."""

from __future__ import annotations

from pathlib import Path

import worker
from worker.model.runs.traces import Part, parts_of, trimmed

SITE = "/opt/orgworker/lib/python3.13/site-packages"


def frame(path: str, number: int, code: str = "work()") -> str:
    return f'  File "{path}", line {number}, in work\n    {code}\n    ~~~~^^\n'


def trace(*frames: str, error: str = "ValueError: boom") -> str:
    return "Traceback (most recent call last):\n" + "".join(frames) + error + "\n"


def test_frames_of_libraries_are_counted_and_those_of_the_handler_stay():
    given = trace(
        frame("/home/kim/acme/jobs.py", 10, "await ctx.http.get(url)"),
        frame(f"{SITE}/worker/handlers/http.py", 200),
        frame(f"{SITE}/httpx/_client.py", 1500),
        frame(f"{SITE}/httpx/_client.py", 1600),
        frame("/usr/lib/python3.13/asyncio/tasks.py", 3),
        frame("/home/kim/acme/hooks.py", 5, "raise ValueError('boom')"),
        frame(f"{SITE}/six.py", 1),
    )

    assert trimmed(given).splitlines() == [
        "Traceback (most recent call last):",
        '  File "/home/kim/acme/jobs.py", line 10, in work',
        "    await ctx.http.get(url)",
        "    ~~~~^^",
        "  … 4 frames of orgworker, httpx, Python",
        '  File "/home/kim/acme/hooks.py", line 5, in work',
        "    raise ValueError('boom')",
        "    ~~~~^^",
        "  … 1 frame of six",
        "ValueError: boom",
    ]


def test_an_installed_handler_is_no_library():
    given = trace(frame(f"{SITE}/acme_jobs/crm.py", 10), frame(f"{SITE}/httpx/_api.py", 9))

    assert f'"{SITE}/acme_jobs/crm.py"' in trimmed(given)
    assert "  … 1 frame of httpx" in trimmed(given)


def test_each_exception_of_a_chain_keeps_its_message_and_the_handler_begins_the_last():
    """httpx maps the exceptions of its transport, so the first of the chain begins inside it."""
    cause = trace(frame(f"{SITE}/httpx/_transports/default.py", 101), error="httpcore.ConnectError: refused")
    last = trace(
        frame(f"{SITE}/acme_jobs/crm.py", 10),
        frame(f"{SITE}/httpx/_client.py", 9),
        error="httpx.ConnectError",
    )
    link = "\nThe above exception was the direct cause of the following exception:\n\n"

    assert trimmed(cause + link + last).splitlines() == [
        "Traceback (most recent call last):",
        "  … 1 frame of httpx",
        "httpcore.ConnectError: refused",
        "",
        "The above exception was the direct cause of the following exception:",
        "",
        "Traceback (most recent call last):",
        f'  File "{SITE}/acme_jobs/crm.py", line 10, in work',
        "    work()",
        "    ~~~~^^",
        "  … 1 frame of httpx",
        "httpx.ConnectError",
    ]


def test_what_has_no_frame_of_its_own_or_no_frames_stays_as_it_is():
    ours = trace(frame("/usr/lib/python3.13/json/decoder.py", 3))
    assert trimmed(ours) == ours
    for text in ("", "ValueError: boom", "…\nrest of a long one", "a\n\n    indented"):
        assert trimmed(text) == text


def test_a_message_of_several_lines_and_repeated_frames_stay():
    repeated = frame("/home/kim/acme/jobs.py", 3) + "  [Previous line repeated 96 more times]\n"
    given = trace(repeated, frame(f"{SITE}/six.py", 1), error="E: first\n  second\nthird")

    assert trimmed(given).splitlines()[4:] == [
        "  [Previous line repeated 96 more times]",
        "  … 1 frame of six",
        "E: first",
        "  second",
        "third",
    ]


OWN = '  File "/srv/jobs/acme/digest.py", line 12, in digest\n    rows = ctx.http.get(url)\n           ^^^^^^'
HTTPX = (
    '  File "/srv/.venv/lib/python3.13/site-packages/httpx/_client.py", line 1, in get\n'
    "    return self.request()"
)
CORE = '  File "/srv/.venv/lib/python3.13/site-packages/httpcore/_sync.py", line 2, in handle'
ASYNCIO = '  File "/usr/lib/python3.13/asyncio/base.py", line 3, in run'
HEAD = "Traceback (most recent call last):"
END = "httpx.ConnectError: refused"


def test_frames_of_libraries_are_folded_between_own_ones():
    trace = "\n".join([HEAD, OWN, HTTPX, CORE, ASYNCIO, END]) + "\n"

    assert parts_of(trace) == [
        Part(f"{HEAD}\n{OWN}"),
        Part(f"{HTTPX}\n{CORE}\n{ASYNCIO}", ("httpx", "httpcore", "Python"), 3),
        Part(END),
    ]


def test_nothing_is_lost():
    trace = "\n".join(
        [
            "…",
            OWN,
            CORE,
            END,
            "",
            "During handling of the above …",
            "",
            HEAD,
            OWN,
            "  [Previous line repeated 3 more times]",
            END,
        ]
    )

    assert "\n".join(part.text for part in parts_of(trace)) == trace


def test_a_handler_that_is_an_installed_package_is_no_library():
    own = OWN.replace("/srv/jobs", "/srv/.venv/lib/python3.13/site-packages")

    assert [part.libraries for part in parts_of("\n".join([HEAD, own, HTTPX, own, END]))] == [
        (),
        ("httpx",),
        (),
    ]


def test_frames_of_this_package_count_as_a_library():
    ours = f'  File "{Path(worker.__file__).parent}/handlers/http.py", line 3, in get'

    assert parts_of("\n".join([OWN, ours]))[1] == Part(ours, ("orgworker",), 1)


def test_a_text_without_frames_is_one_part():
    assert parts_of("killed") == [Part("killed")]
    assert parts_of("") == [Part("")]
