"""The faults of a plan: each method lets one befall its target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.simulation.entries import Action
from tests.simulation.loop import SimulatedProcess, outside
from tests.simulation.world import LEASE, LOST, POLL, Struck, World


class Faults:
    """Strikes the machines of a world."""

    world: World

    def _machine(self, action: Action) -> Any:
        return self.world.machines[action.target]

    def _at(self, action: Action, strike: Callable[[Action], object], *, worker: bool = False) -> None:
        """Strike at a point; at a call of a handler this is when the machine next sends something.

        With `worker` it is the worker that sends something to the database next, in place of the host.
        """
        armed, network = self.world.net.armed, "http" if action.target.startswith("h") else "db"
        who, sent = ("*", "db.sent") if worker else (action.target, f"{network}.sent")

        def struck(process: SimulatedProcess) -> bool:
            strike(replace(action, target=process.name.partition("/")[0]))
            return False

        def called(process: SimulatedProcess) -> bool:
            armed.append((who, sent, struck))
            return False

        if action.where in ("sent", "done"):
            armed.append((who, sent.replace("sent", action.where), struck))
        elif action.where.startswith("models."):
            armed.append((action.target, action.where, struck))
        else:
            armed.append((action.target, action.where, called))

    def _took(self, kind: Any, machine: str, lasting: float = 0.0) -> None:
        """This may take runs from a machine: at once, or because it stands still for so many seconds."""
        now = self.world.loop.time()
        self.world.struck.append(Struck(machine, kind, now, now + lasting))

    def _kill(self, action: Action) -> None:
        self._took("killed", action.target)
        self._machine(action).kill()

    def _kill_at(self, action: Action) -> None:
        self._at(action, self._kill)

    def _freeze(self, action: Action) -> None:
        machine = self.world.machines.get(action.target)
        process = machine.process if machine is not None else None
        if process is not None and process.alive and not process.frozen:
            self._took("still", action.target, action.size)
            process.freeze()
            self.world.loop.call_later(action.size, process.thaw, context=outside())

    def _freeze_at(self, action: Action) -> None:
        self._at(action, self._freeze)

    def _kill_run(self, action: Action) -> None:
        machine = self._machine(action)
        if machine.up and machine.children is not None:
            machine.children.kill_one(action.size)

    def _kill_zygote(self, action: Action) -> None:
        machine = self._machine(action)
        if machine.up and machine.children is not None:
            self._took("zygote", action.target)
            machine.children.kill_zygote()

    def _drain(self, action: Action) -> None:
        self._took("killed", action.target)
        self._machine(action).stop()

    def _cut_issuer(self, action: Action) -> None:
        self.world.net.part("*", "issuer", action.size)

    def _lose_answer(self, action: Action) -> None:
        self.world.net.armed.append((action.target, "db.done", lambda process: True))

    def _late_admission(self, action: Action) -> None:
        self._late(action, action.size)

    def _lose_admission(self, action: Action) -> None:
        self._late(action, float("inf"))

    def _late(self, action: Action, seconds: float) -> None:
        self.world.late_admissions[action.target] = seconds
        if self.world.on_file:  # its one thread for transactions waits so long
            self._took("still", action.target, POLL + (LOST if seconds == float("inf") else seconds))

    def _slow(self, action: Action) -> None:
        # The slowest answer is under way for 24 s then.
        self._took("still", "*", action.size + LEASE)
        loop = self.world.loop
        loop.slowness = 20.0
        loop.call_later(action.size, setattr, loop, "slowness", 1.0, context=outside())

    def _clock(self, action: Action) -> None:
        self._machine(action).skew.ahead += action.size

    def _drift(self, action: Action) -> None:
        self._machine(action).skew.drift = action.size

    def _wrong_token(self, action: Action) -> None:
        """The issuer gives org 3 the tokens of org 0 for a while."""
        app = self.world.issuer.apps["client-3"]
        app.replace = {"org_code": "org_0"}
        self.world.loop.call_later(action.size, app.replace.clear, context=outside())

    def _cut_database(self, action: Action) -> None:
        self._took("still", action.target, action.size)
        self.world.net.part(action.target, "database", action.size)

    def _outage(self, action: Action) -> None:
        self.world.net.part("*", "database", action.size)

    _kill_host = _kill

    _freeze_host = _freeze

    _freeze_host_at = _freeze_at

    def _freeze_worker_of_host_at(self, action: Action) -> None:
        self._at(action, self._freeze, worker=True)

    def _cut_host(self, action: Action) -> None:
        self._took("still", action.target, action.size)
        for worker in self.world.workers:
            self.world.net.part(action.target, worker, action.size)

    def _lose_host_answer(self, action: Action) -> None:
        self.world.net.armed.append((action.target, "http.done", lambda process: True))

    def _kill_broker(self, action: Action) -> None:
        broker = self._machine(action).broker
        if broker is not None:
            broker.kill()

    def _freeze_broker(self, action: Action) -> None:
        broker = self._machine(action).broker
        if broker is not None and not broker.process.frozen:
            broker.process.freeze()
            self.world.loop.call_later(action.size, broker.process.thaw, context=outside())

    def _freeze_broker_at(self, action: Action) -> None:
        self._at(action, self._freeze_broker)

    def _cut_models(self, action: Action) -> None:
        self.world.net.part(action.target, "models", action.size)

    def _lose_model_answer(self, action: Action) -> None:
        self.world.net.armed.append((action.target, f"models.done {action.where}", lambda process: True))

    def _late_model_request(self, action: Action) -> None:
        """Its connection breaks, and it arrives nevertheless."""

        def struck(process: SimulatedProcess) -> bool:
            self.world.models.late.append(action.size)
            return True

        self.world.net.armed.append((action.target, f"models.sent {action.where}", struck))

    def _throttle(self, action: Action) -> None:
        """The next answer to an org asks it to pause."""
        self.world.service.pauses[action.where, f"org_{action.target}"] = action.size
