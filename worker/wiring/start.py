"""The start of a worker's or host's process, before its secrets are read."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Literal

from worker.clock import Clock
from worker.engine.incarnation import ProcessTools, VitalsReader
from worker.engine.runners.child.pool import SHARE_AFTER, ChildPool
from worker.engine.runners.egress import EgressBroker
from worker.errors import ConfigurationError
from worker.model.runs.run import Isolation
from worker.process.confinement import Confinement
from worker.process.guarded_files import FileWatch
from worker.settings import Settings
from worker.telemetry.vitals import Notifier

VERSION = version("orgworker")
# What sends the requests of runs, made by the feature that has it.
MakeBroker = Callable[[Settings, Clock, Confinement], EgressBroker]
# Seconds for which a thread keeps the interpreter while another asks for it. The database threads ask
# at each step: with Python's default of 5 ms a busy loop slows them to a tenth of their speed.
SWITCH = 0.0001
BROKER_FIX = (
    "fix what it says: the log has details. SSL_CERT_FILE may name a file without a certificate, or the "
    "service may have no memory or process left (MemoryMax, TasksMax)"
)


def start(
    kind: Literal["worker", "host"],
    settings: Settings,
    clock: Clock,
    notifier: Notifier,
    health: VitalsReader,
    confinement: Confinement,
    broker: EgressBroker | None,
    *,
    collect: tuple[int, int, int],
    freezing: bool = True,
    lock_fd: int | None = None,
    farewell: float = 0.0,
) -> ProcessTools:
    """Start the zygote, and set how this process collects garbage and switches threads.

    Call it before this process holds a secret: the zygote is forked from it. The `broker` starts too.

    Raises:
        ConfigurationError: sealed runs are required, and no broker is there to send their requests.
    """
    execution = settings.execution
    slots: dict[Isolation, int] = {"child": execution.max_children, "inline": execution.max_inline}
    children = ChildPool(
        clock,
        freezing=freezing,
        max_freeze=execution.max_freeze,
        preload=execution.preload,
        pass_environment=execution.pass_environment,
        lock_fd=lock_fd,
        sandbox=confinement.rules,
        spares=min(execution.spare_children, execution.max_children),
        share_after=SHARE_AFTER,
        describes=True,
        broker=broker,
    )
    children.start()
    if execution.network == "require":
        fault = "the feature egress is not installed" if broker is None else broker.await_start()
        if fault is not None:
            asyncio.run(children.close())
            raise ConfigurationError(
                f'[execution] network = "require": the broker, which sends the requests of runs, does not '
                f"start: {fault}",
                fix=BROKER_FIX,
            )
    # The collector skips what is loaded now and runs less often: each time it walks what all runs in
    # flight hold. By default it runs every few runs and takes a quarter of the time of an inline run.
    gc.freeze()
    gc.set_threshold(*collect)
    sys.setswitchinterval(SWITCH)
    files, passed, describe = FileWatch(settings, clock), execution.pass_environment, confinement.describe
    return ProcessTools(
        kind, children, notifier, clock, health, files, slots, execution.drain, passed, describe, farewell
    )
