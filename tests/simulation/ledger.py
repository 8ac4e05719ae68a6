"""The ledger of the simulator: which seeds were run on which database, at which commit, and what that showed.

A seed adds a line. `fold` makes one line of all that were run at a commit, to which seeds may be added again.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What a seed does depends on these alone.
CODE = (
    *("worker", "jobs", "migrations", "config/requirements"),
    *("tests/simulation", "tests/fakes", "tests/faults", ":!tests/simulation/seeds.jsonl"),
)


@dataclass
class Kept:
    """What the seeds of one database and commit showed; `virtual` in seconds."""

    seeds: set[int] = field(default_factory=set)
    violated: set[int] = field(default_factory=set)
    runs: int = 0
    virtual: int = 0
    faults: Counter[str] = field(default_factory=Counter)

    def add(self, line: Mapping[str, Any]) -> None:
        """Take up a line, unless its seeds were taken up before."""
        seeds = {seed for first, last in line["seeds"] for seed in range(first, last + 1)}
        if seeds <= self.seeds:
            return
        if seeds & self.seeds:
            raise ValueError(f"some of the seeds {line['seeds']} are in the ledger twice; remove a line")
        self.seeds |= seeds
        self.violated |= set(line["violated"])
        self.runs += line["runs"]
        self.virtual += line["virtual"]
        self.faults.update(line["faults"])


def read(file: Path | None) -> dict[tuple[str, str], Kept]:
    """What it has by database and commit; nothing if there is no such file."""
    kept: dict[tuple[str, str], Kept] = {}
    if file is not None and file.exists():
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            kept.setdefault((line["dialect"], line["commit"]), Kept()).add(line)
    return kept


def fold(file: Path) -> None:
    """Write it anew, with one line for each database and commit."""
    lines = [
        {
            **{"dialect": dialect, "commit": commit, "seeds": list(_ranges(each.seeds))},
            **{"violated": sorted(each.violated), "runs": each.runs, "virtual": each.virtual},
            "faults": dict(each.faults.most_common()),
        }
        for (dialect, commit), each in read(file).items()
    ]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


def report(file: Path) -> str:
    """For each database and commit: seeds, runs, virtual hours, violations, and faults by kind."""
    return "\n".join(
        f"{dialect} at {commit}: {len(each.seeds)} seeds, {each.runs} runs, "
        f"{each.virtual / 3600:.0f} virtual hours\n"
        f"    violated: {sorted(each.violated) or 'none'}; faults: "
        + ", ".join(f"{n} {kind}" for kind, n in each.faults.most_common())
        for (dialect, commit), each in read(file).items()
    )


def commit_of_code() -> str:
    """The last commit that changed what a seed does; with `-dirty` if some of that is not committed.

    So a ledger may be committed and gone on with.
    """
    code = ("--", *CODE)
    found = _git("log", "-1", "--format=%h", "--abbrev=8", *code)
    return f"{found}-dirty" if _git("status", "--porcelain", *code) else found


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()


def _ranges(seeds: set[int]) -> Iterator[tuple[int, int]]:
    """The first and last seed of each part without a gap."""
    firsts = sorted(seed for seed in seeds if seed - 1 not in seeds)
    lasts = sorted(seed for seed in seeds if seed + 1 not in seeds)
    return zip(firsts, lasts, strict=True)
