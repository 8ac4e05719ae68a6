"""Tokens in files: only this user may read them, and logs mask them."""

from __future__ import annotations

import stat
from pathlib import Path

from worker.errors import ConfigurationError
from worker.settings import MOUNTED_SECRETS
from worker.telemetry.masking import masker


def read_token(path: str, *, setting: str, made_by: str) -> str:
    """The token in the file that a setting names, from a file that others cannot read; masked from now on.

    `made_by` is the command that prints the token. In a container the engine sets the mode, and the
    container has no other user.

    Raises:
        ConfigurationError: there is no token, or others may read it.
    """
    fix = f"put the token that `{made_by}` printed into it, readable by this user only"
    try:
        file = Path(path)
        mode = file.stat().st_mode
        token = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
        raise ConfigurationError(f"{setting}: {path} cannot be read: {why}", fix=fix) from None
    if mode & stat.S_IRWXO and not file.resolve().is_relative_to(MOUNTED_SECRETS):
        raise ConfigurationError(f"{setting}: others may read {path}", fix=f"chmod o= {path}")
    if not token or not token.isprintable():
        raise ConfigurationError(f"{setting}: there is no token in {path}", fix=fix)
    masker.register(token)
    return token
