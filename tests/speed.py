"""All that makes the tests cheaper than the processes of users, each with its reason.

Nothing here changes a result, which `./dev test --plain` shows: it runs every test without any of it. That
also starts each worker as a new interpreter, where `tests/fakes/forked.py` forks one that has imported it.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import os
import ssl
import sys
import types
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import httpx
from httpx._transports import default
from sqlalchemy import Connection, Dialect, Engine, event

from tests.fakes import unsynced
from tests.fakes.issuer import rsa_key
from worker.demo import keys
from worker.guard import http

PLAIN = bool(os.environ.get("ORGWORKER_TEST_PLAIN"))


def begin() -> None:
    """Before the first test is imported."""
    if PLAIN:
        return
    postpone_parsers()
    # Imported modules and collected tests are never garbage; looking for some took a quarter of the CPU time.
    gc.disable()
    unsynced.begin()
    reuse_keys()
    reuse_authorities()
    event.listen(Engine, "engine_connect", compile_once)


def collected() -> None:
    """Collect garbage in the tests themselves as ever, without looking at what was imported for them."""
    if not PLAIN:
        gc.freeze()
        # The defaults let full collections, which look at all that survives, take 3 % of the CPU time.
        gc.set_threshold(20_000, 20, 20)
        gc.enable()


# jsonschema imports it to check IRIs; its 38 parsers take a second of CPU time in each process.
_PARSERS = "rfc3987_syntax"
_later = types.ModuleType(_PARSERS)


def postpone_parsers() -> None:
    vars(_later)["is_valid_syntax"] = _is_valid_syntax
    sys.modules.setdefault(_PARSERS, _later)


def _is_valid_syntax(rule: str, text: str) -> bool:
    if sys.modules[_PARSERS] is _later:
        del sys.modules[_PARSERS]
    valid: bool = importlib.import_module(_PARSERS).is_valid_syntax(rule, text)
    return valid


def reuse_keys() -> None:
    """Have the development providers sign with eight RSA keys by turns: a new one takes 60 ms of CPU time.

    No test is about the numbers in a key. A provider never has eight keys at once.
    """
    numbers = itertools.cycle(range(8))
    keys.new_private_key = lambda: rsa_key(f"provider-{next(numbers)}")


def reuse_authorities() -> None:
    """Load the authorities of TLS once a process: it takes 20 ms of CPU time, and each client loads its own.

    Tests that trust an authority of their own name it, or set one of these variables.
    """

    def reused(load: Callable[[], ssl.SSLContext]) -> Callable[..., ssl.SSLContext]:
        loaded: dict[tuple[str | None, ...], ssl.SSLContext] = {}

        def context(verify: Any = True, cert: Any = None, trust_env: bool = True) -> ssl.SSLContext:
            if verify is not True or cert is not None:
                return httpx.create_ssl_context(verify, cert, trust_env)
            key = (os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"), str(trust_env))
            if key not in loaded:
                loaded[key] = load() if trust_env else httpx.create_ssl_context(trust_env=False)
            return loaded[key]

        return context

    for module, name in ((http, "_tls_context"), (default, "create_ssl_context")):
        vars(module)[name] = reused(vars(module)[name])


class Compiled(dict[Any, Any]):
    """Statements compiled for engines whose dialects are equal in all that the compiler reads.

    SQLAlchemy's key begins with the dialect itself. Each test has an engine, and so a dialect, of its own;
    compiling its statements again takes a fifth of the CPU time of tests with a database.
    """

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get((_equal(key[0]), *key[1:]), default)

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__((_equal(key[0]), *key[1:]), value)


def _equal(dialect: Dialect) -> tuple[Any, ...]:
    return (type(dialect), dialect.server_version_info, dialect.default_schema_name, dialect.paramstyle)


_compiled: dict[str, Compiled] = defaultdict(Compiled)


def compile_once(connection: Connection) -> None:
    connection.execution_options(compiled_cache=_compiled[connection.dialect.driver])
