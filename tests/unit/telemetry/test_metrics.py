"""What Prometheus is told: counts of events, and the worker's own state, under documented names."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.telemetry.test_vitals import vitals
from worker.telemetry import events
from worker.telemetry import metrics as module
from worker.telemetry.events import EVENTS, emit
from worker.telemetry.metrics import METRICS, Metrics

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def metrics() -> Metrics:
    return listening(Metrics(version="1.0"))


def listening(metrics: Metrics) -> Metrics:
    events.listen(metrics.take)
    return metrics


def series(metrics: Metrics) -> Series:
    """Each sample by its name and labels."""
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return series(metrics)[f"orgworker_{name}", tuple(sorted(labels.items()))]


def end_run(org: str = "org_a", state: str = "succeeded", **fields: object) -> None:
    given = {"run": "r", "definition": "d", "handler": "acme.digest", "attempt": 1, "detail": None}
    values = given | {"org": org, "outcome": state, "state": state, "reason": None, "seconds": 2.0}
    emit("run.ended", **(values | fields))


def test_every_event_is_counted_by_its_name(metrics):
    for name, event in EVENTS.items():
        emit(name, **dict.fromkeys(event.fields))
        emit(name, **dict.fromkeys(event.fields))

    assert {name: value(metrics, "events_total", event=name) for name in EVENTS} == dict.fromkeys(EVENTS, 2)


def test_an_event_that_never_happened_is_zero_so_that_its_first_is_a_rise(metrics):
    assert value(metrics, "events_total", event="zygote.died") == 0
    assert value(metrics, "zygote_deaths_total") == 0
    assert value(metrics, "attempt_states_total", state="refused") == 0


def test_an_end_is_counted_by_what_became_of_the_run(metrics):
    end_run(state="failed", reason="timed_out", seconds=3.0)

    labels = {"handler": "acme.digest", "outcome": "failed", "state": "failed", "reason": "timed_out"}
    assert value(metrics, "attempts_total", **labels) == 1
    assert value(metrics, "attempt_seconds_sum", outcome="failed") == 3.0
    assert value(metrics, "attempt_seconds_bucket", outcome="failed", le="5.0") == 1


def test_fired_instants_are_counted_not_transactions(metrics):
    emit("runs.fired", count=100, overlapped=3, skips=7)

    assert value(metrics, "runs_fired_total") == 100
    assert value(metrics, "runs_overlapped_total") == 3
    assert value(metrics, "instants_skipped_total") == 7


def test_a_clock_that_went_back_is_counted_with_how_far(metrics):
    emit("clock.went_back", seconds=3600.0)

    assert value(metrics, "clock_went_back_total") == 1
    assert value(metrics, "clock_went_back_seconds_total") == 3600


def test_a_state_goes_up_and_down_with_its_events(metrics):
    assert value(metrics, "database_up") == 1
    emit("database.lost", error="gone")
    assert value(metrics, "database_up") == 0
    emit("database.back", seconds=4.0)
    assert value(metrics, "database_up") == 1

    emit("issuer.paused", issuer="main", error="throttled", seconds=5.0)
    assert value(metrics, "issuer_paused", issuer="main") == 1
    emit("issuer.resumed", issuer="main")
    assert value(metrics, "issuer_paused", issuer="main") == 0


def test_the_parts_of_the_worker_are_asked_at_each_scrape(metrics):
    assert ("orgworker_admitting", ()) not in series(metrics)

    metrics.watch(vitals(ages=lambda: {"scheduler": 0.5}))

    assert value(metrics, "admitting") == 1
    assert value(metrics, "slots", isolation="child") == 50
    assert value(metrics, "slots_used", isolation="child") == 3
    assert value(metrics, "loop_tick_age_seconds", loop="scheduler") == 0.5
    assert value(metrics, "lease_remaining_seconds") == 27.4


def test_loops_that_a_drain_has_ended_have_no_age(metrics):
    metrics.watch(vitals(ages=lambda: {"scheduler": 0.5}, draining=lambda: True))

    assert value(metrics, "draining") == 1
    assert "loop_tick_age_seconds{" not in metrics.text().decode()


def tell_of_orgs(count: int) -> None:
    """Each event that names an org, once for each of so many orgs, with a run and a definition of its own."""
    fixed = {
        "handler": "acme.digest",
        "outcome": "failed",
        "state": "failed",
        "reason": "error",
        "issuer": "main",
    }
    numbers = dict.fromkeys(("seconds", "lateness", "attempt", "fencing_token", "failures", "instants"), 1.0)
    naming = [event for event in EVENTS.values() if "org" in event.fields]
    for number in range(count):
        own = {
            name: f"{name}_{number}"
            for name in ("org", "run", "definition", "detail", "error", "error_cause")
        }
        values = numbers | fixed | own
        for event in naming:
            emit(event.name, **{name: values.get(name, "x") for name in event.fields})


@pytest.mark.parametrize("top_orgs", [0, 10])
def test_ten_thousand_orgs_make_no_more_series_than_ten(top_orgs: int):
    few = listening(Metrics(version="1.0", top_orgs=top_orgs))
    tell_of_orgs(10)
    events.listeners[:] = []
    many = listening(Metrics(version="1.0", top_orgs=top_orgs))
    tell_of_orgs(10_000)

    assert len(series(many)) == len(series(few)) > 100
    assert value(many, "attempt_states_total", state="failed") == 10_000
    if not top_orgs:
        assert set(series(many)) == set(series(few))
        assert "org_1" not in many.text().decode()


def test_no_more_orgs_are_counted_one_by_one_than_memory_allows(monkeypatch):
    monkeypatch.setattr(module, "MAX_ORGS", 3)
    metrics = listening(Metrics(version="1.0", top_orgs=1000))
    for org in ("org_a", "org_b", "org_c", "org_d", "org_a"):
        end_run(org)

    assert value(metrics, "org_attempts_total", org="org_a", state="succeeded") == 2
    assert "org_d" not in metrics.text().decode()
    assert value(metrics, "attempt_states_total", state="succeeded") == 5


def test_the_busiest_orgs_have_series_of_their_own_where_that_is_asked_for():
    metrics = listening(Metrics(version="1.0", top_orgs=2))
    for org, times in (("org_a", 1), ("org_b", 5), ("org_c", 3)):
        for _ in range(times):
            end_run(org, "failed")

    named = {
        dict(labels)["org"]: count
        for (name, labels), count in series(metrics).items()
        if name == "orgworker_org_attempts_total"
    }
    assert named == {"org_b": 5, "org_c": 3}


def test_every_name_is_in_the_table_and_every_name_of_the_table_is_served():
    both = [listening(Metrics(version="1.0", top_orgs=1, on_host=on_host)) for on_host in (False, True)]
    for metrics in both:
        metrics.watch(vitals(ages=lambda: {"scheduler": 0.5}))
    for name, event in EVENTS.items():
        emit(name, **{field: "1" if field == "org" else 1 for field in event.fields})

    families = [f for metrics in both for f in text_string_to_metric_families(metrics.text().decode())]
    served = {family.name + ("_total" if family.type == "counter" else "") for family in families}

    assert served == {metric.name for metric in METRICS}


def test_each_metric_follows_an_event_and_fields_that_exist():
    for metric in METRICS:
        if metric.event:
            fields = EVENTS[metric.event].fields
            assert set(metric.labels) <= set(fields), metric.name
            assert metric.value in (*fields, "", "0", "1"), metric.name


def test_a_worker_reports_the_database_and_a_host_its_workers(metrics: Metrics):
    """An alert for one of them must not fire where there is none."""
    host = listening(Metrics(version="1.0", on_host=True))
    emit("control.lost", error="ConnectError")

    assert value(host, "control_up") == 0
    emit("control.back", seconds=1.0)
    assert value(host, "control_up") == 1
    assert ("orgworker_database_up", ()) not in series(host)
    assert ("orgworker_control_up", ()) not in series(metrics)


def test_requests_are_counted_by_origin_and_class_of_status(metrics: Metrics):
    for origin, denied in (("https://a", 0), ("https://b", 3)):
        emit("egress.counted", origin=origin, denied=denied, seconds=0.0)
    for status, count in (("2xx", 3), ("5xx", 1), ("2xx", 2)):
        emit("egress.sent", origin="https://a", status=status, count=count)

    assert value(metrics, "egress_requests_total", origin="https://a", status="2xx") == 5
    assert value(metrics, "egress_requests_total", origin="https://a", status="5xx") == 1
    assert value(metrics, "egress_denied_total", origin="https://b") == 3


def test_origins_after_the_first_hundred_are_counted_together(metrics: Metrics):
    for number in range(module.MAX_ORIGINS + 50):
        emit("egress.counted", origin=f"https://{number}", denied=1, seconds=0.5)
        emit("egress.sent", origin=f"https://{number}", status="2xx", count=1)
    emit("egress.sent", origin="https://7", status="2xx", count=1)

    found = [name for name in series(metrics) if name[0] == "orgworker_egress_requests_total"]
    assert len(found) == module.MAX_ORIGINS + 1
    assert value(metrics, "egress_requests_total", origin="others", status="2xx") == 50
    assert value(metrics, "egress_denied_total", origin="others") == 50
    assert value(metrics, "egress_requests_total", origin="https://7", status="2xx") == 2
