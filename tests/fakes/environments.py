"""A virtual environment for one test, whose `pip` installs without a network."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

# As installers write it.
ORGWORKER = "#!{folder}/bin/python\nfrom worker.app import main\n\nmain()\n"
PIP = """\
#!/bin/sh
if [ "$1" = install ]; then
    shift
    set -- install --no-index --no-build-isolation --disable-pip-version-check "$@"
fi
exec {python} -m pip --python {folder}/bin/python "$@"
"""


def make_environment(folder: Path) -> Path:
    """Create a virtual environment in a new folder, and return the folder of its commands.

    It has all packages of this environment, orgworker included; packages added to it stay in it.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    [site] = (folder / "lib").glob("python3*/site-packages")
    # site.addsitedir, unlike a plain line, also reads the .pth file by which the checkout is installed.
    (site / "lent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    for name, text in {"pip": PIP, "orgworker": ORGWORKER}.items():
        script = folder / "bin" / name
        script.write_text(text.format(python=sys.executable, folder=folder))
        script.chmod(0o755)
    return folder / "bin"
