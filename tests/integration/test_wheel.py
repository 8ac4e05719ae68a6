"""The wheel, built and installed in a clean environment, away from the checkout."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest

from tests.fakes.pages import blocks
from tests.fakes.plugins import make_plugin
from tests.fakes.ports import free_port
from tests.integration.test_build import built_checkout
from worker.demo.management import Application
from worker.demo.provider import serve_provider
from worker.features.console.pages.docs import ELSEWHERE, PLACES

# It is built from what git knows.
pytestmark = pytest.mark.feature("checkout")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    [built] = built_checkout(tmp_path_factory).glob("dist/orgworker-*.whl")
    return built


@pytest.fixture(scope="session")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of a new environment with the wheel; dependencies are lent, nothing is downloaded."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", wheel]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([python, "-c", where], text=True).strip())
    # Only the folder itself goes on the path: its own .pth files, such as ours of the checkout, are not read.
    (site / "lent.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def run(
    folder: Path, *command: str | Path, timeout: int = 60, also: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in an empty folder with nothing of this environment."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), **(also or {})}
    return subprocess.run(
        command, cwd=folder, env=environment, text=True, capture_output=True, timeout=timeout
    )


def test_the_wheel_holds_two_packages_and_what_they_need(wheel):
    names = zipfile.ZipFile(wheel).namelist()

    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"worker", "jobs"}
    assert "worker/features/console/templates/base.html" in names
    assert "worker/py.typed" in names
    assert "worker/guard/profiles/kinde.toml" in names
    skeleton = {name.removeprefix("worker/app/verbs/skeleton/") for name in names if "/skeleton/" in name}
    assert skeleton == {"README.md.txt", "job.py.txt", "pyproject.toml.txt", "test_job.py.txt"}
    statements = {name.rpartition("/")[2] for name in names if name.endswith(".sql")}
    assert statements == {"walk.sql", "newest.sql", "choose.sql", "admitted.sql", "crowd.sql"}
    assert "worker/migrations/env.py" in names
    docs = {name.removeprefix("worker/docs/") for name in names if name.startswith("worker/docs/")}
    assert {place.page for place in (*PLACES.values(), ELSEWHERE)} <= docs
    assert {name.rpartition(".")[2] for name in docs} == {"md", "txt"}
    assert "worker/migrations/script.py.mako" in names
    assert any(name.startswith("worker/migrations/versions/0001_") for name in names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]


# The statements of admission are files that are read while the last one is imported.
OURS = ("worker", "jobs", "worker.store.sql.postgresql")
IMPORT = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        print(importlib.import_module(name).__file__)
    except ModuleNotFoundError:
        print("none")
"""


def test_only_our_packages_can_be_imported(bin_folder, tmp_path):
    others = ("tests", "migrations", "config", "docs")

    done = run(tmp_path, bin_folder / "python", "-c", IMPORT, *OURS, *others)

    found = done.stdout.splitlines()
    assert all(path.startswith(str(bin_folder.parent)) for path in found[: len(OURS)]), done.stderr
    assert found[len(OURS) :] == ["none"] * len(others)


def test_it_makes_a_plugin_and_its_fixture_is_there_for_the_test_of_it(bin_folder, tmp_path):
    made = run(tmp_path, bin_folder / "orgworker", "new-job", "acme.digest")
    fixtures = run(tmp_path, bin_folder / "python", "-m", "pytest", "--fixtures", "acme-digest")

    assert made.returncode == 0, made.stderr
    assert (tmp_path / "acme-digest" / "acme_digest.py").exists()
    assert "orgworker -- " in fixtures.stdout, fixtures.stdout


def test_the_demo_runs_in_an_empty_folder_as_the_pages_say(bin_folder, wheel, tmp_path):
    """README.md and install.md, but for `./dev build`, pipx and how long the demo runs."""
    ours = [
        re.findall(r"(?m)^\$ (.*)", block.text)
        for page in ("README.md", "docs/install.md")
        for block in blocks((ROOT / page).read_text(encoding="utf-8"))
        if block.marks.get("by") == "test_wheel"
    ]
    [[build, install, *first], second] = ours
    assert (build, first) == ("./dev build", [second[0].replace("try-", "../try-"), second[1]])
    [_, _, file] = install.split()
    checkout = tmp_path / "orgworker"
    (checkout / "dist").mkdir(parents=True)
    (checkout / "dist" / wheel.name).symlink_to(wheel)
    assert [each.resolve() for each in checkout.glob(file)] == [wheel.resolve()]
    script = [f"PATH={bin_folder}:$PATH", "set -e", *first[:-1], f"{first[-1]} --seconds 1"]

    done = run(checkout, "sh", "-c", "\n".join(script), timeout=110)

    assert done.returncode == 0, done.stderr
    assert "OPEN THIS in a browser: http://127.0.0.1:" in done.stdout + done.stderr
    assert list((tmp_path / "try-orgworker").iterdir()) == [], "install.md: the demo leaves nothing"


def test_it_migrates_a_database_and_finds_its_handlers(bin_folder, tmp_path):
    module, script = [bin_folder / "python", "-m", "worker"], [bin_folder / "orgworker"]

    upgraded = run(tmp_path, *module, "db", "upgrade")
    checked = run(tmp_path, *script, "db", "check")
    handlers = run(tmp_path, *script, "handlers", "list", "-o", "json")

    assert [done.returncode for done in (upgraded, checked)] == [0, 0], upgraded.stderr
    assert (tmp_path / "var" / "worker.db").exists()
    assert '"http.request"' in handlers.stdout, handlers


@pytest.fixture(scope="session")
def core(bin_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment whose wheel has no `worker/features`."""
    folder = tmp_path_factory.mktemp("core") / "venv"
    shutil.copytree(bin_folder.parent, folder, symlinks=True)
    [features] = folder.glob("lib/python*/site-packages/worker/features")
    shutil.rmtree(features)
    return folder / "bin"


TELL = """
from pathlib import Path
from worker import job

@job("acme.tell")
async def tell(ctx) -> None:
    Path(ctx.params["to"]).write_text(ctx.org.code)
"""


def test_without_features_a_worker_starts_and_runs_what_apply_has_stored(core, tmp_path):
    plugins, told = tmp_path / "plugins", tmp_path / "told"
    plugins.mkdir()
    make_plugin(plugins, modules={"acme_tell": TELL}, entry_points={"acme.tell": "acme_tell:tell"})
    os.mkfifo(told)
    port = free_port()
    application = Application("org_a", "client", "s3cret", audiences=("api",))
    also = {"PYTHONPATH": str(plugins)}

    def command(*given: str) -> str:
        done = run(tmp_path, core / "python", "-m", "worker", *given, also=also)
        assert done.returncode == 0, done.stderr
        return done.stdout

    provider, thread = serve_provider([application])
    with thread:
        (tmp_path / "worker.toml").write_text(
            f'[web]\nlisten = "127.0.0.1:{port}"\n[execution]\nsandbox = "off"\n'
            f'[issuers.main]\nurl = "{provider.url}"\naudience = "api"\n'
        )
        (tmp_path / "jobs.toml").write_text(
            '[[org]]\ncode = "org_a"\nissuer = "main"\n[[definition]]\norg = "org_a"\nname = "sync"\n'
            f'handler = "acme.tell"\nschedule = "every 1s"\nparams = {{to = "{told}"}}\n'
        )
        (tmp_path / "secret").write_text("s3cret")
        command("db", "upgrade")
        command("apply", "jobs.toml")
        command("credentials", "add", "org_a", "--client-id", "client", "--secret-file", "secret")
        reader = os.open(told, os.O_RDWR)
        worker = subprocess.Popen(
            [core / "python", "-m", "worker"],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **also},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert select.select([reader], [], [], 60)[0], "no run has begun"
            assert os.read(reader, 5) == b"org_a"
            ready = httpx.get(f"http://127.0.0.1:{port}/readyz")
            assert (ready.status_code, ready.json()["status"]) == (200, "ok")
            assert httpx.get(f"http://127.0.0.1:{port}/api/v1/runs").status_code == 404
        finally:
            worker.terminate()
            _, log = worker.communicate(timeout=30)
            os.close(reader)
    assert worker.returncode == 0, log
    assert "succeeded" in command("runs", "list", "--state", "succeeded")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["provision"], "`provision` needs the feature provisioning"),
        (["serve"], "`serve` needs the feature console"),
        (["calendars", "list"], "`calendars` needs the feature calendars"),
        (["credentials", "rotate", "--older-than", "90d"], "needs the feature provisioning"),
    ],
)
def test_without_a_feature_its_verbs_say_so(core, tmp_path, words, says):
    done = run(tmp_path, core / "python", "-m", "worker", *words)

    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr


def test_without_a_feature_a_setting_that_only_it_reads_is_refused(core, tmp_path):
    (tmp_path / "worker.toml").write_text('[attempts]\nlisten = "127.0.0.1:9999"\n')

    refused = run(tmp_path, core / "python", "-m", "worker", "db", "check")

    assert refused.returncode == 78
    assert "[attempts] needs the feature hosts, which is not installed" in refused.stderr


def test_with_the_feature_the_setting_is_accepted(bin_folder, tmp_path):
    (tmp_path / "worker.toml").write_text('[attempts]\nlisten = "127.0.0.1:9999"\n')

    done = run(tmp_path, bin_folder / "orgworker", "db", "upgrade")

    assert done.returncode == 0, done.stderr
