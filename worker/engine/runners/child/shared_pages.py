"""Pages that a zygote shares with the processes that it forks: what makes a run copy few of them.

A page is copied when one side writes to it. Such copies are half of the cost of a run. Few of them are for
data: most hold reference counts, and counters and caches of the interpreter.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import sysconfig
import types
from collections.abc import Iterator
from typing import Any

_MADV_COLLAPSE = 25
_HUGE_PAGE = 2 * 1024 * 1024
# Objects that become immortal in one slice, which takes about a millisecond.
_SLICE = 2_000


def share_pages() -> Iterator[None]:
    """Advance it to its end once everything is imported, when many forks are to be expected.

    It takes a tenth of a second, and many times that on a busy machine, so it comes in slices: between
    them the zygote must still freeze and kill. The caller ends by `os._exit`: the interpreter cannot free
    what it leaves.
    """
    gc.collect()
    gc.freeze()
    yield
    yield from _make_immortal()
    yield from _collapse()


def _make_immortal() -> Iterator[None]:
    """Have the interpreter not count references to what exists now (PEP 683), which is never freed anyway.

    It sets the count that None has. Without immortal objects (Python 3.11), or with another layout of
    objects, it does nothing.
    """
    count = ctypes.c_uint32.from_address
    if sysconfig.get_config_var("Py_GIL_DISABLED") or sys.byteorder != "little" or sys.maxsize < 2**32:
        return
    immortal = count(id(None)).value
    more = [None] * 1000
    if count(id(None)).value != immortal:
        return
    del more
    todo: list[Any] = gc.get_objects()
    for kind in _classes():
        if count(id(kind)).value == immortal:  # a static one, which the collector does not know
            todo += [kind.__mro__, *gc.get_referents(kind.__dict__)]
    while todo:
        yield
        fresh = []
        for found in todo[-_SLICE:]:
            counted = count(id(found))
            if counted.value != immortal:
                counted.value = immortal
                fresh.append(found)
        del todo[-_SLICE:]
        todo += gc.get_referents(*fresh)
        for found in fresh:
            if type(found) is types.CodeType:  # the collector does not know these either
                todo += (found.co_consts, found.co_names, found.co_name, found.co_qualname)
                todo += (found.co_filename, found.co_linetable, found.co_exceptiontable)


def _classes() -> Iterator[type]:
    found, todo = {object}, [object]
    while todo:
        kind = todo.pop()
        yield kind
        for below in type.__subclasses__(kind):
            if below not in found:
                found.add(below)
                todo.append(below)


def _collapse() -> Iterator[None]:
    """Put memory into huge pages as far as the kernel can, since fork copies the entry of each page."""
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with open("/proc/self/maps") as maps:
        lines = [line.split() for line in maps]
    for fields in lines:
        if fields[1] == "rw-p" and (len(fields) < 6 or fields[5] == "[heap]"):
            start, end = (int(number, 16) for number in fields[0].split("-"))
            for place in range(-(-start // _HUGE_PAGE) * _HUGE_PAGE, end - _HUGE_PAGE + 1, _HUGE_PAGE):
                libc.madvise(place, _HUGE_PAGE, _MADV_COLLAPSE)
                yield
