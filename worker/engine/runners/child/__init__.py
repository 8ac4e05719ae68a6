"""The side of a run's own process: zygote, sandbox, messages. It imports neither store nor tokens."""

import sys

# Before any module of this package imports httpx, which imports a command line of its own, with rich and
# pygments: half of the time of its import.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
