"""Issuers from the settings, and secrets in files of `secrets_dir`."""

from __future__ import annotations

from pathlib import Path

from worker.errors import ConfigurationError
from worker.guard import profile
from worker.guard.issuer import Issuer
from worker.settings import Settings
from worker.telemetry.masking import masker


def issuers_of(settings: Settings) -> dict[str, Issuer]:
    """The issuers of `worker.toml` by name.

    Raises ConfigurationError for an unknown profile or a URL that must not receive a secret.
    """
    return {
        name: Issuer(
            name=name,
            profile=profile.load(issuer.profile),
            url=issuer.url,
            audience=issuer.audience or None,
            api_origins=issuer.api_origins,
            max_requests_per_second=issuer.max_requests_per_second,
            token_endpoint=issuer.token_endpoint,
            keys_url=issuer.keys_url,
        )
        for name, issuer in settings.issuers.items()
    }


def login_secret(issuer: str, secrets_dir: str) -> str:
    """The secret of the console's own client at an issuer: the file `login__NAME` in `secrets_dir`.

    Raises ConfigurationError if it cannot be read.
    """
    name = f"login__{issuer}"
    fix = f"put the client's secret into the file {name} in secrets_dir, readable by the worker's user"
    if not secrets_dir:
        raise ConfigurationError("web.login needs a client secret, and secrets_dir is not set", fix=fix)
    return read_secret(name, secrets_dir, "web.login: ", fix)


def read_secret(name: str, secrets_dir: str, whose: str, fix: str) -> str:
    """The text of a secret file, masked from now on. Raises ConfigurationError, which begins with `whose`."""
    try:
        secret = (Path(secrets_dir) / name).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigurationError(f"{whose}the secret {name} cannot be read: {why}", fix=fix) from None
    if not secret:
        raise ConfigurationError(f"{whose}the secret {name} is empty", fix=fix)
    masker.register(secret)
    return secret
