"""The filter of system calls, run as the kernel does: for each architecture, and for each way around it."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from worker.engine.runners.child import landlock, sandbox, seccomp
from worker.errors import ConfigurationError
from worker.process.confinement import confinement_of
from worker.settings import Settings
from worker.settings.sections import DatabaseSettings, ExecutionSettings

ALLOWED = 0x7FFF0000
DENIED = 0x50000 | errno.EACCES
NO_CALL = 0x50000 | errno.ENOSYS
KILLED = 0x80000000
X86_64 = 0xC000003E
I386 = 0x40000003
AARCH64 = 0xC00000B7
ARM = 0x40000028
RISCV64 = 0xC00000F3
# Numbers as the kernel's tables have them, with the result for each.
CALLS: Mapping[str, Mapping[int, Mapping[int, int]]] = {
    "x86_64": {
        X86_64: {254: DENIED, 301: DENIED, 29: DENIED, 64: DENIED, 68: DENIED}
        | dict.fromkeys((0, 1, 30, 63, 157, 253, 255, 300, 302, 319, 444, 0x3FFFFFFF), ALLOWED)
        # x32: `shmget` there, and anything else.
        | dict.fromkeys((0x40000000, 0x40000000 + 29, 0x40000000 + 254, 0xFFFFFFFF), NO_CALL),
        I386: dict.fromkeys((292, 339, 395, 393, 399, 117), DENIED)
        | dict.fromkeys((1, 29, 254, 396), ALLOWED),
        ARM: {0: KILLED},
    },
    "aarch64": {
        AARCH64: dict.fromkeys((27, 263, 194, 190, 186), DENIED) | dict.fromkeys((26, 28, 29, 254), ALLOWED),
        ARM: dict.fromkeys((317, 368, 307, 299, 303), DENIED) | dict.fromkeys((1, 27, 316), ALLOWED),
        RISCV64: {0: KILLED},
    },
}


def result(program: bytes, architecture: int, number: int) -> int:
    """What the kernel does with a call: classic BPF with the instructions that the filter has."""
    code = list(struct.iter_unpack("=HBBI", program))
    data = {0: number, 4: architecture}
    at, accumulator = 0, -1
    while True:
        kind, if_true, if_false, value = code[at]
        at += 1
        if kind == 0x06:
            return int(value)
        if kind == 0x20:
            accumulator = data[value]
        else:
            holds = accumulator == value if kind == 0x15 else accumulator >= value
            at += if_true if holds else if_false


@pytest.mark.parametrize("machine", CALLS)
def test_each_interface_of_a_kernel_is_filtered(machine: str):
    program = seccomp.program(seccomp.MACHINES[machine])

    found = {
        architecture: {number: result(program, architecture, number) for number in numbers}
        for architecture, numbers in CALLS[machine].items()
    }

    assert found == CALLS[machine]
    assert len(CALLS) == len(seccomp.MACHINES)


def test_the_control_lets_the_32_bit_interface_through():
    """A filter that knows only the machine's own numbers: `shmget` of i386 would not be seen."""
    own = seccomp.MACHINES["x86_64"][:1]
    without_check = seccomp.program(own)[16:]

    assert result(without_check, I386, 395) == ALLOWED


def on(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    named = os.uname_result(("Linux", "host", "6.18", "1", machine))
    monkeypatch.setattr("worker.engine.runners.child.seccomp.os.uname", lambda: named)


@pytest.fixture
def settings(tmp_path: Path) -> Callable[[str], Settings]:
    """The settings with this mode of the sandbox, away from the code that handlers may read."""
    database = DatabaseSettings(url=f"sqlite:///{tmp_path}/worker.db")
    return lambda mode: Settings(
        database=database, execution=ExecutionSettings.model_validate({"sandbox": mode})
    )


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_another_architecture_has_the_rest_of_the_sandbox_and_says_so(
    settings: Callable[[str], Settings], mode: str, monkeypatch: pytest.MonkeyPatch, emitted: list
):
    on("riscv64", monkeypatch)

    confinement = confinement_of(settings(mode), version=landlock.SCOPES)

    assert confinement.rules is not None and not confinement.rules.filtered
    assert not confinement.seals
    assert confinement.level == (
        "partial: Landlock 6 without seccomp (no filter for riscv64), which does not confine "
        "watches of folders and System V IPC"
    )
    confinement.warn()
    assert [event.event.name for event in emitted] == ["sandbox.incomplete"]


def test_a_kernel_without_filters_is_refused_where_the_sandbox_is_required(
    settings: Callable[[str], Settings], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(seccomp, "lacking", lambda: "the kernel has none, or it is filtered")

    with pytest.raises(ConfigurationError, match="without seccomp") as refused:
        confinement_of(settings("require"), version=landlock.SCOPES)

    assert refused.value.exit_code == 78
    rules = confinement_of(settings("auto"), version=landlock.SCOPES).rules
    assert rules is not None and not rules.filtered


def test_off_filters_nothing(settings: Callable[[str], Settings]):
    assert confinement_of(settings("off"), version=landlock.SCOPES).rules is None


def test_this_kernel_filters():
    assert seccomp.lacking() is None
    assert sandbox.level(7, seccomp.lacking()) == "full: Landlock 7 and seccomp"
