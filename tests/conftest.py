"""Fixtures for all tests: a clock moved by hand, asyncio for async tests, a database of either kind."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest

from tests import speed, suites
from tests.fakes import postgres, shared, shifted
from tests.fakes.clock import ManualClock
from worker.app.features import FEATURES
from worker.kit.feature import use
from worker.store import schema
from worker.telemetry import events
from worker.telemetry.masking import masker

HERE = Path(__file__).parent
FULL = os.environ.get("FAULTS") == "full"


speed.begin()
use(FEATURES)

# Timings say nothing on a shared machine; a gate that all changes pass tries the same examples each time.
hypothesis.settings.register_profile("worker", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("worker")


# Each file runs in one process: those that take longest begin first, so that none begins last.
LONGEST = (
    *(
        "test_docs",
        "test_alerts",
        "test_container",
        "test_systemd",
        "test_hostile_handlers",
    ),
    *("test_rotation", "test_serve", "test_definitions_alive", "test_health"),
    *("test_outage", "test_drain", "test_cluster_chaos", "test_kills"),
)
ROOMS = ("acceptance", "integration", "migrations", "unit")


def _leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out single tests of other features than those of the suite that runs."""
    others = [
        item
        for item in items
        for mark in item.iter_markers("feature")
        if suites.is_left_out(suites.features_of(item.path) | {mark.args[0]})
    ]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out what is of other features than those of the suite that runs; a folder by its conftest."""
    if (beside := collection_path / "conftest.py").exists():
        return True if suites.is_lacking(suites.features_of(beside)) else None
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if is_test and suites.is_left_out(suites.features_of(collection_path)) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _leave_out(config, items)

    @functools.cache
    def place(path: Path) -> tuple[int, int]:
        name, room = path.stem, path.relative_to(HERE).parts[0]
        return (
            LONGEST.index(name) if name in LONGEST else len(LONGEST),
            ROOMS.index(room) if room in ROOMS else 0,
        )

    items.sort(key=lambda item: place(item.path))


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Let one process of a run compile the tests, which takes half of a first collection, for the others."""
    folders = [path for arg in session.config.args if (path := session.config.rootpath / arg).is_dir()]
    sources, compiled = (
        sum(1 for folder in folders for _ in folder.rglob(pattern))
        for pattern in ("test_*.py", "test_*-pytest-*.pyc")
    )
    if not hasattr(session.config, "workerinput") or compiled >= sources:
        return (yield)
    descriptor = os.open(folders[0], os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # Then all others at once.
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    try:
        return (yield)
    finally:
        os.close(descriptor)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    speed.collected()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--start-at", help="start the clock there: INSTANT [ZONE]; see tests/fakes/shifted.py")


def pytest_configure(config: pytest.Config) -> None:
    text = config.getoption("--start-at")
    # xdist's controller runs no test, and its clock would be its processes' from the start.
    if text and (hasattr(config, "workerinput") or not config.getoption("numprocesses", None)):
        config.pluginmanager.register(shifted.ShiftedClock(shifted.parsed(text)))


def pytest_sessionfinish() -> None:
    """Save what coverage has measured: xdist kills a process that takes ten seconds to end."""
    if "coverage" in sys.modules and (measuring := sys.modules["coverage"].Coverage.current()) is not None:
        measuring.save()


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio only, as the worker does."""
    return "asyncio"


@pytest.fixture
def clock() -> ManualClock:
    """A clock at 2030-01-01T00:00Z that stands still."""
    return ManualClock()


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether all of the fault suite runs (`./dev faults`), or in two minutes what only processes show."""
    return FULL


@pytest.fixture(autouse=True)
def _clean_telemetry() -> Iterator[None]:
    """No listener and no secret stays behind for the next test."""
    yield
    events.listeners.clear()
    masker.clear()


@pytest.fixture
def emitted() -> list[events.Emitted]:
    """The events emitted during the test, in order."""
    seen: list[events.Emitted] = []
    events.listen(seen.append)
    return seen


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of an SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'worker.db'}"


@pytest.fixture(scope="session")
def postgres_server() -> postgres.Server:
    """The one PostgreSQL server of this test session, shared by all its processes."""
    return postgres.shared_server()


@pytest.fixture
def postgres_url(postgres_server: postgres.Server) -> Iterator[str]:
    """The URL of a fresh, empty PostgreSQL database, dropped after the test."""
    with postgres_server.new_database() as url:
        yield url


@pytest.fixture
def own_postgres() -> Iterator[postgres.Server]:
    """A running server for one test alone, which may stop, kill and restart it; it syncs to disk."""
    # Not in tmp_path: that is closed to the user the server runs as where the tests run as root.
    folder = Path(tempfile.mkdtemp(prefix="orgworker-pg-own-"))
    server = postgres.Server(folder, durable=True)
    try:
        server.start()
        yield server
    finally:
        server.stop(signal.SIGQUIT)
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def migrated_sqlite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with the current schema, to copy; made once for all processes."""
    folder = shared.made_once(shared.folder(tmp_path_factory) / "migrated", migrate)
    return folder / "worker.db"


def migrate(folder: Path) -> None:
    folder.mkdir()
    schema.upgrade(f"sqlite:///{folder / 'worker.db'}")


@pytest.fixture
def migrated_sqlite_url(tmp_path: Path, migrated_sqlite_file: Path) -> str:
    """The URL of a fresh SQLite file with the current schema."""
    return copied(migrated_sqlite_file, tmp_path)


def copied(file: Path, folder: Path) -> str:
    """The URL of a copy of an SQLite file in the folder, under the same name."""
    for path in file.parent.glob(f"{file.name}*"):
        shutil.copy(path, folder / path.name)
    return f"sqlite:///{folder / file.name}"


class Filled:
    """Databases with what `fill` puts into one with the current schema: filled once, and copied."""

    def __init__(self, name: str, fill: Callable[[str], object]) -> None:
        self._name = name
        self._fill = fill

    @contextmanager
    def url(self, kind: str, request: pytest.FixtureRequest) -> Iterator[str]:
        """The URL of a fresh copy, on `sqlite` or `postgresql`."""
        if kind == "postgresql":
            server: postgres.Server = request.getfixturevalue("postgres_server")
            migrated = server.template("migrated", schema.upgrade)
            with server.new_database(server.template(self._name, self._fill, base=migrated)) as url:
                yield url
            return
        migrated_file: Path = request.getfixturevalue("migrated_sqlite_file")

        def make(folder: Path) -> None:
            folder.mkdir()
            self._fill(copied(migrated_file, folder))

        factory = request.getfixturevalue("tmp_path_factory")
        folder = shared.made_once(shared.folder(factory) / self._name, make)
        yield copied(folder / migrated_file.name, request.getfixturevalue("tmp_path"))


@pytest.fixture
def migrated_postgres_url(postgres_server: postgres.Server) -> Iterator[str]:
    """The URL of a fresh PostgreSQL database with the current schema, dropped after the test."""
    with postgres_server.new_database(postgres_server.template("migrated", schema.upgrade)) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of a fresh, empty database: the test runs on SQLite and on PostgreSQL."""
    name = {"sqlite": "sqlite_url", "postgresql": "postgres_url"}[request.param]
    url: str = request.getfixturevalue(name)
    return url


# Where a test has SQLite unless it says so: `migrated_url` of the command line and the operations.
on_either = pytest.mark.parametrize("migrated_url", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def migrated_url(request: pytest.FixtureRequest) -> str:
    """The same, with the current schema already in it, which is much quicker than a migration."""
    return migrated_on(request.param, request)


def migrated_on(kind: str, request: pytest.FixtureRequest) -> str:
    name = {"sqlite": "migrated_sqlite_url", "postgresql": "migrated_postgres_url"}[kind]
    url: str = request.getfixturevalue(name)
    return url
