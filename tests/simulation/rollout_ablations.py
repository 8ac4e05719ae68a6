"""Defences of rollouts, taken out one at a time: see `ablations`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from tests.simulation.ablations import ablation
from worker.model.rollouts.rollout import Rollout
from worker.store import rollout_sums, rollouts


@ablation("a run keeps its version")
def version_kept(stack: ExitStack, url: str) -> None:
    def insert(connection: Any, table: Any, rows: Any) -> None:
        real(connection, table, rows, key=("run_id",))

    real = rollouts.insert_many
    stack.enter_context(patch.object(rollouts, "insert_many", insert))
    stack.enter_context(patch.object(rollouts, "_stored", lambda *args: {}))


@ablation("after a halt new runs have the old version")
def halt_looked_at(stack: ExitStack, url: str) -> None:
    def version(self: Any, org_id: Any, **keys: Any) -> Any:
        return real(replace(self, state="running") if self.state == "halted" else self, org_id, **keys)

    real = Rollout.version
    stack.enter_context(patch.object(Rollout, "version", version))


@ablation("a run is counted once")
def counted_once(stack: ExitStack, url: str) -> None:
    real = rollout_sums._add_to_org

    def add_twice(connection: Any, rollout_id: Any, org_id: Any, had: Any, new: Any) -> None:
        real(connection, rollout_id, org_id, had, new)
        stored = rollout_sums._org_rows(connection, rollout_id, {org_id}).get(org_id)
        real(connection, rollout_id, org_id, stored, new)

    stack.enter_context(patch.object(rollout_sums, "_add_to_org", add_twice))
