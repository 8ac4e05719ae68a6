"""A handler in the sandbox opens files with secrets to other accounts: the worker closes them and alerts."""

from __future__ import annotations

from pathlib import Path

from tests.fakes.hook import Hook
from tests.fakes.plugins import make_plugin
from tests.fakes.site import Site, application, definition, wait_until

OPENS = """
import os
from worker import job

@job("acme.opens")
def opens(ctx):
    for path in ctx.params["files"]:
        os.chmod(path, 0o644)
"""
# A worker looks each minute.
OFTEN = "from worker.operations.guarded_files import FileWatch\nFileWatch.every = 0.2\n"


def test_files_that_a_handler_opened_are_closed_again_and_told(short_site: Site, hook: Hook) -> None:
    site = short_site
    make_plugin(
        site.plugins,
        dist="acme-opens",
        modules={"opens": OPENS, "sitecustomize": OFTEN},
        entry_points={"acme.opens": "opens:opens"},
    )
    site.configure(execution='sandbox = "require"', extra=hook.settings())
    on_file = site.database_url.startswith("sqlite")
    ring = (site.folder if on_file else site.secrets) / "keyring"
    files = [ring, site.settings]
    if on_file:
        files.append(Path(site.database_url.removeprefix("sqlite:///")))
    site.add_orgs(application("org_acme"))  # on SQLite this makes the key ring
    for file in files:
        file.chmod(0o600)
    worker = site.start_worker()
    params = {"files": [str(file) for file in files]}
    site.apply(definition("org_acme", "opens", "acme.opens", params=params))
    site.cli("definitions", "run", "org_acme", "opens")
    assert site.wait_for_end("org_acme", "opens")["state"] == "succeeded"

    for _ in files:
        hook.wait_for("files_opened", "firing")
    wait_until(lambda: len(hook.told("files_opened")) == len(files), "an alert for each file")
    assert [oct(file.stat().st_mode) for file in files] == ["0o100600"] * len(files)
    opened = [post.alert for post in hook.taken if post.alert["kind"] == "files_opened"]
    assert {alert["path"] for alert in opened} == set(params["files"])
    assert {(alert["mode"], alert["restored"]) for alert in opened} == {("0644", True)}
    # The account owns them, which the sandbox will not accept in the next release.
    assert hook.told("files_changeable") == [("files_changeable", "firing")]
    assert site.stop_worker(worker) == 0
