"""Hostile schemas of plug-ins: the worker's check withstands what holds the reference implementation."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from worker.handlers.schema import Schema

BAD_PATTERN = r"^([a-zA-Z0-9_.-]+)+@acme\.com$"
OF_THE_REVIEW = {"type": "object", "properties": {"mail": {"type": "string", "pattern": BAD_PATTERN}}}
CHECK = """
import signal
{imports}
schema = {schema!r}
value = {value!r}
signal.setitimer(signal.ITIMER_PROF, 0.3)
print({call})
"""


def _in_a_process(imports: str, call: str, *, schema: Any, value: Any) -> str | None:
    """What a Python of its own prints, or None where it computes for more than 0.3 s."""
    code = CHECK.format(imports=imports, schema=schema, value=value, call=call)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if ended.returncode == -signal.SIGPROF:
        return None
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_the_pattern_of_the_review_cannot_hold_the_interpreter() -> None:
    """The control: the reference implementation backtracks for years over these letters."""
    params = {"mail": "a" * 60}

    ours = _in_a_process(
        "from worker.handlers.schema import Schema",
        "Schema(schema).problem(value).path",
        schema=OF_THE_REVIEW,
        value=params,
    )
    control = _in_a_process(
        "from jsonschema import Draft202012Validator",
        "Draft202012Validator(schema).is_valid(value)",
        schema=OF_THE_REVIEW,
        value=params,
    )

    assert ours == "('mail',)"
    assert control is None
    assert Schema(OF_THE_REVIEW).problem({"mail": "someone@acme.com"}) is None
    # A quarter of a million letters are too many to promise; the run's own process looks at them.
    assert Schema(OF_THE_REVIEW).problem({"mail": "a" * 250_000}) is None


def _doubling(levels: int) -> dict[str, Any]:
    """A few hundred bytes that name each other: 2 to the power of `levels` paths."""
    steps = {
        f"d{level}": {"allOf": [{"$ref": f"#/$defs/d{level - 1}"}, {"$ref": f"#/$defs/d{level - 1}"}]}
        for level in range(1, levels + 1)
    }
    return {"$defs": {"d0": {"type": "integer"}, **steps}, "$ref": f"#/$defs/d{levels}"}


def test_references_that_double_cannot_hold_the_interpreter() -> None:
    """The control: the reference implementation follows 2 to the 40th paths."""
    ours = _in_a_process(
        "from worker.handlers.schema import Schema",
        "Schema(schema).problem(value).message",
        schema=_doubling(40),
        value="x",
    )
    control = _in_a_process(
        "from jsonschema import Draft202012Validator",
        "Draft202012Validator(schema).is_valid(value)",
        schema=_doubling(40),
        value=1,
    )

    assert ours == "'x' is not of type integer"
    assert control is None


@pytest.fixture
def sink() -> Iterator[tuple[str, list[str]]]:
    """An HTTP server that answers any path with a schema nothing fits, and the paths it was asked for."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"false")

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_remote_reference_is_never_fetched(sink: tuple[str, list[str]], tmp_path: Path) -> None:
    """The control: the reference implementation asks the server."""
    url, asked = sink
    (tmp_path / "schema.json").write_text("false")

    for reference in (f"{url}/schema", (tmp_path / "schema.json").as_uri()):
        schema = {"properties": {"a": {"$ref": reference}}}
        assert Schema(schema).problem({"a": 1}) is None
        [left] = Schema(schema).unchecked()
        assert "nothing is fetched" in left.reason
    assert asked == []

    assert not Draft202012Validator({"$ref": f"{url}/schema"}).is_valid(1)
    assert asked == ["/schema"]
