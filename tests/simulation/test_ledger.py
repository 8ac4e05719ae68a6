"""The ledger keeps what was run where, also after it was folded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.simulation import ledger


def line(first: int, last: int, *violated: int, dialect: str = "sqlite", commit: str = "c1") -> str:
    told = {"dialect": dialect, "commit": commit, "seeds": [[first, last]], "violated": violated}
    return json.dumps(told | {"runs": 100, "virtual": 300, "faults": {"freeze": 2}}) + "\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "seeds.jsonl"


def test_seeds_that_were_run_one_by_one_become_one_line_that_says_the_same(file: Path):
    file.write_text("".join(line(seed, seed, *[seed] * (seed == 6)) for seed in (7, 5, 6, 9)))
    before, told = ledger.read(file), ledger.report(file)

    ledger.fold(file)

    [folded] = map(json.loads, file.read_text().splitlines())
    assert (folded["seeds"], folded["violated"]) == ([[5, 7], [9, 9]], [6])
    assert (folded["runs"], folded["faults"]) == (400, {"freeze": 8})
    assert ledger.read(file) == before
    assert ledger.report(file) == told


def test_a_folded_ledger_is_gone_on_with(file: Path):
    file.write_text(
        line(1, 50) + line(51, 51, 51) + line(1, 3, dialect="postgresql") + line(1, 9, commit="c2")
    )

    kept = ledger.read(file)

    assert kept["sqlite", "c1"].seeds == {*range(1, 52)}
    assert kept["sqlite", "c1"].violated == {51}
    assert len(kept["postgresql", "c1"].seeds) == 3
    assert len(kept["sqlite", "c2"].seeds) == 9


def test_a_seed_counts_once(file: Path):
    file.write_text(line(1, 50) + line(50, 50))
    assert ledger.read(file)["sqlite", "c1"].runs == 100

    file.write_text(line(1, 50) + line(50, 51))
    with pytest.raises(ValueError, match="twice; remove a line"):
        ledger.read(file)


def test_no_ledger_has_no_seeds(tmp_path: Path):
    assert ledger.read(None) == ledger.read(tmp_path / "none.jsonl") == {}
