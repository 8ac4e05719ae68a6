"""The simulator: a seed is repeated exactly, and a defence that is taken out is noticed."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.simulation.plan import plan_of
from tests.simulation.simulate import ABLATIONS

ROOT = Path(__file__).parents[2]


def simulate(*arguments: str, check: bool = True, **environment: str) -> str:
    command = [sys.executable, "-m", "tests.simulation.simulate", *arguments]
    env = os.environ | environment
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("dialect", "seed"), [("sqlite", "121"), ("postgresql", "352")])
def test_a_seed_gives_the_same_trace_in_each_process(dialect: str, seed: str):
    """The traces have each statement, each event, and where the choices ended.

    Another allocator gives objects other addresses, as other runs before it in a process do: a set of those
    that have no hash of their own has another order then.

    Both seeds call services, and have trees of runs, batches and a rollout, whose versions follow the ids of
    orgs; the second has a product.
    """
    once, again = (
        simulate(
            "--dialect", dialect, "--seed", seed, "--replays", "1", "--jobs", "1", PYTHONMALLOC=allocator
        )
        for allocator in ("pymalloc", "malloc")
    )

    assert once.startswith(f"seed {seed}: 1 replays, traces ")
    assert once == again


@pytest.mark.timeout(600)
def test_a_defence_that_is_taken_out_is_noticed_and_the_timeline_says_what_was_done():
    told = simulate("--seed", "1", "--ablate", "replay", check=False)

    assert " VIOLATED: " in told
    assert "was stored by attempt 1 and paid for again" in told
    assert " ACTION " in told
    assert " paid {'step': " in told


@pytest.mark.parametrize("name", sorted(ABLATIONS))
def test_each_defence_is_where_its_ablation_looks_for_it(name: str, migrated_postgres_url: str):
    """Else the simulation fails, which says nothing of the defence."""
    with ExitStack() as stack:
        ABLATIONS[name].cut(stack, migrated_postgres_url)


@pytest.mark.timeout(600)
def test_a_violation_is_the_same_each_time():
    """`--replays 100 --failing 20` is the whole of it."""
    told = simulate(
        "--ablate", "child-key", "--first", "1", "--failing", "1", "--replays", "3", "--jobs", "2"
    )

    assert "1 failing seeds on sqlite, 3 replays each; 0 differ" in told


def test_what_people_do_to_a_definition_is_left_out_with_it():
    plan = plan_of(0, "sqlite")
    [number] = [place for place, entry in enumerate(plan.entries) if entry.name == "pays"]
    assert "1/pays" in {act.target for act in plan.acts}

    left = plan.without(frozenset(), frozenset(), frozenset({number}))

    assert left.acts == tuple(act for act in plan.acts if act.target != "1/pays")
