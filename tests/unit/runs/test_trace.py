"""Tracebacks for people."""

from __future__ import annotations

from worker.runs.trace import Part, parts_of

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
        Part(f"{HTTPX}\n{CORE}\n{ASYNCIO}", ("httpx", "httpcore", "asyncio"), 3),
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
    ours = '  File "/opt/orgworker/worker/handlers/http.py", line 3, in get'

    assert parts_of("\n".join([OWN, ours]))[1] == Part(ours, ("orgworker",), 1)


def test_a_text_without_frames_is_one_part():
    assert parts_of("killed") == [Part("killed")]
    assert parts_of("") == [Part("")]
