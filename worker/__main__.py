"""`python -m worker`."""

import os
import sys

# Without -P, Python puts the working directory first on its path, which runs inherit. Handlers may be
# allowed to write there, so keep the directory only if it contains this code.
if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()] != [os.path.dirname(os.path.dirname(__file__))]:
    del sys.path[0]

# httpx imports a command line of its own, with rich and pygments: half of the time of its import.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]

from worker.app import main  # noqa: E402

main()
