"""`python -m worker`."""

import os
import sys

# Without -P, Python puts the working directory first on its path, which runs inherit. Handlers may be
# allowed to write there, so keep the directory only if it contains this code.
if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()] != [os.path.dirname(os.path.dirname(__file__))]:
    del sys.path[0]

from worker.cli import main

main()
