"""Plug-ins that break at import are listed with what is wrong; the others run, the worker is unharmed."""

from __future__ import annotations

from tests.fakes.plugins import make_plugin
from tests.fakes.site import application, definition, wait_until

BROKEN = {
    "acme-raises": ("raise RuntimeError('no licence')", "no licence"),
    "acme-exits": ("import sys\nsys.exit(4)", "4"),
    "acme-sleeps": ("import time\ntime.sleep(60)", "30"),
}


def test_a_broken_plugin_is_listed_and_the_others_run(site, journal):
    for dist, (source, _) in BROKEN.items():
        module = dist.replace("-", "_")
        make_plugin(
            site.plugins,
            dist=dist,
            version="2.1",
            modules={module: source},
            entry_points={f"{dist}.job": f"{module}:job"},
        )
    site.add_orgs(application("org_acme"))
    worker = site.start_worker()
    site.wait_for_handlers("acme.note", timeout=10)

    tick = definition(
        "org_acme", "tick", "acme.note", "every 2s", spread="off", params={"journal": str(journal)}
    )
    site.apply(tick)
    site.wait_for_end(definition="tick", timeout=10)

    # An import has 30 s; the command is called only then, because it costs more than a query.
    errors = "SELECT COUNT(*) AS n FROM catalogue WHERE error IS NOT NULL"
    wait_until(lambda: site.query(errors)[0]["n"] == len(BROKEN), "errors of all three", timeout=50)
    rows = {row["name"]: row for row in site.cli("handlers", "list", "-o", "json").json()}
    assert rows["acme.note"]["error"] is None
    assert (rows["acme.note"]["distribution"], rows["acme.note"]["version"]) == ("acme-jobs", "1.0")
    for dist, (_, error) in BROKEN.items():
        row = rows[f"{dist}.job"]
        assert (row["distribution"], row["version"]) == (dist, "2.1")
        assert error in row["error"]
    assert worker.poll() is None
    before = len(site.runs(definition="tick"))
    wait_until(lambda: len(site.runs(definition="tick")) > before + 1, "the ticks to go on")
    states = {run["state"] for run in site.runs(definition="tick")[:-2]}
    assert states == {"succeeded"}
    assert site.stop_worker(worker) == 0
