"""A handler gives its token away in every way it can; no sink has it, nor a part that helps to guess it."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from tests.faults.cluster import Cluster

# So many characters of a signature may stand somewhere: fewer are nothing to begin with.
SHORTEST = 20


def test_no_sink_has_the_token_or_its_signature(on_either: Cluster) -> None:
    cluster = on_either
    cluster.start(cluster.define("org_acme", "leak", "fault.leak", max_attempts=1))
    cluster.up()
    run = cluster.run_now("leak")
    cluster.wait_for(lambda: cluster.lines("leaked"), "its last words")
    ended = cluster.wait_for_end(definition="leak")
    assert (ended["state"], ended["reason"]) == ("failed", "error")

    sinks = {name: text for name, text in everything(cluster, str(run["id"]))}
    for name, text in sinks.items():
        for token in cluster.provider.issued:
            assert parts(token).isdisjoint(windows(text)), f"a part of the token stands in {name}"
    assert "[masked]" in sinks["run_logs"]


def everything(cluster: Cluster, run: str) -> Iterator[tuple[str, str]]:
    """Every table, what the worker wrote to its log, and what the commands show."""
    tables = "SELECT table_name AS name FROM information_schema.tables WHERE table_schema = 'public'"
    if cluster.on_file:
        tables = "SELECT name FROM sqlite_master WHERE type IN ('table', 'view')"
    for row in cluster.query(tables):
        yield row["name"], repr(cluster.query(f'SELECT * FROM "{row["name"]}"'))
    yield "the worker's log", cluster.log_text()
    for verb in ("show", "logs"):
        yield f"runs {verb}", cluster.cli("runs", verb, run).out
    yield "runs show -o json", cluster.cli("runs", "show", run, "-o", "json").out
    for path in Path(cluster.folder).glob("*.db*"):
        yield path.name, path.read_bytes().decode("latin-1")


def parts(token: str) -> set[str]:
    """Every piece of the signature that is long enough to tell something."""
    signature = token.rpartition(".")[2]
    return {signature[at : at + SHORTEST] for at in range(len(signature) - SHORTEST + 1)}


def windows(text: str) -> set[str]:
    """Every piece of that length of a text as it is, URL-decoded, and of each base64 word in it, decoded."""
    found = set(pieces(text)) | set(pieces(unquote(text)))
    for word in re.findall(r"[A-Za-z0-9+/_-]{24,}", text):
        for shift in range(4):
            letters = word[shift:].translate(str.maketrans("-_", "+/"))
            letters = letters[: len(letters) // 4 * 4]
            found |= set(pieces(base64.b64decode(letters).decode("latin-1")))
    return found


def pieces(text: str) -> Iterator[str]:
    return (text[at : at + SHORTEST] for at in range(len(text) - SHORTEST + 1))
