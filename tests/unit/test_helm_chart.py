"""The Helm chart: Helm renders it, Kubernetes' schemas accept it, and it equals config/kubernetes."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.fakes.helm import MISSING, Rendered, render
from tests.fakes.pages import blocks, unknown_words
from worker import settings as places
from worker.engine.incarnation import LAST_FLUSH
from worker.features.provisioning.provision_loop import LAST_TURN
from worker.kit.web.database_health import CHECK_EVERY
from worker.kit.web.health import PATHS

pytestmark = pytest.mark.feature("checkout")

ROOT = Path(__file__).parents[2]
CHART = ROOT / "config" / "helm" / "orgworker"
KUBERNETES = ROOT / "config" / "kubernetes"
PAGE = ROOT / "docs" / "operating" / "helm.md"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
# The release that the chart names as its oldest, and the newest with a schema.
RELEASES = ("1.25", "1.37")
COMPONENTS = ("worker", "serve", "provision", "host")
UID, VOLUME = re.search(
    r"(?m)^USER (\d+):\1\nWORKDIR .+\nVOLUME (.+)$", (ROOT / "config" / "Containerfile").read_text()
).groups()  # type: ignore[union-attr]


pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def values_of(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CHART / "ci" / f"{name}-values.yaml").read_text())
    return loaded


MINIMAL = values_of("minimal")
# As config/kubernetes, with all its files.
AS_MANIFESTS = {
    "config": (KUBERNETES / "worker.toml").read_text(),
    "attempts": {"enabled": True},
    "provision": {"enabled": True},
    "host": {"enabled": True, "config": (ROOT / "config" / "host.toml").read_text()},
}
GOOD: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything enabled": {
        section: {"enabled": True}
        for section, inner in yaml.safe_load((CHART / "values.yaml").read_text()).items()
        if isinstance(inner, dict) and "enabled" in inner
    },
    **{name: values_of(name) for name in ("minimal", "all", "hosts")},
    "manifests": AS_MANIFESTS,
    "serve only": MINIMAL | {"worker": {"enabled": False}, "serve": {"enabled": True}},
    "without policies": MINIMAL | {"networkPolicy": {"enabled": False}},
    "without an owner": MINIMAL | {"secrets": {"owner": ""}},
    "named": MINIMAL | {"config": 'installation = "eu-1"\n' + MINIMAL["config"]},
    "without a job": MINIMAL | {"upgrade": {"enabled": False}},
}
# Values that are refused, and what the error names.
BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no settings": ({"config": ""}, ["config:", "--set-file config=worker.toml"]),
    "an SQLite file": (
        {"config": '[database]\nurl = "sqlite:////var/lib/orgworker/worker.db"\n'},
        ["config:", "[database]"],
    ),
    "the url of something else": (
        {"config": '[database]\n[alerts]\nwebhook_url = "https://x"\n'},
        ["config:", "[database]"],
    ),
    "a password": (
        {"config": MINIMAL["config"].replace("worker@", "worker:hunter2@")},
        ["config:", "password", "database__url"],
    ),
    "nothing enabled": ({"worker": {"enabled": False}}, ["nothing is enabled", "worker.enabled"]),
    "a host that knows no worker": (MINIMAL | {"host": {"enabled": True}}, ["host.config", "control"]),
    "an attempt API without workers": (
        values_of("hosts") | {"attempts": {"enabled": True}},
        ["attempts.enabled", "worker"],
    ),
    "an unknown key": (MINIMAL | {"workers": {}}, ["workers"]),
    "an unknown key below": (MINIMAL | {"worker": {"replica": 3}}, ["/worker", "replica"]),
    "a text for a number": (MINIMAL | {"worker": {"replicas": "3"}}, ["/worker/replicas"]),
    "a port of its own": (
        MINIMAL | {"worker": {"env": [{"name": "WORKER_WEB__HEALTH_LISTEN", "value": ":1"}]}},
        ["/worker/env/0/name"],
    ),
    "a secret's name with braces": (MINIMAL | {"secrets": {"worker": "a}, {b"}}, ["/secrets/worker"]),
    "a tag as digest": (MINIMAL | {"image": {"digest": "latest"}}, ["/image/digest"]),
}


@pytest.fixture(scope="module")
def rendered() -> dict[str, Rendered]:
    return render(CHART, GOOD | {name: values for name, (values, _) in BAD.items()})


good = pytest.mark.parametrize("case", GOOD)


@good
def test_helm_lints_and_renders_it(rendered, case: str):
    made = rendered[case]

    assert (made.findings, made.error) == ([], "")
    assert made.objects
    names = [(each["kind"], each["metadata"]["name"]) for each in made.objects]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", BAD)
def test_values_that_cannot_work_are_refused_by_name(rendered, case: str):
    made = rendered[case]

    assert made.objects == []
    assert all(word in made.error for word in BAD[case][1]), made.error
    assert "hunter2" not in made.error


@pytest.mark.parametrize("release", RELEASES)
@good
def test_the_schemas_of_kubernetes_accept_it(rendered, case: str, release: str):
    assert [why for each in rendered[case].objects if (why := invalid(each, release))] == []


@pytest.mark.parametrize("release", RELEASES)
def test_the_schemas_of_kubernetes_accept_the_manifests(release: str):
    objects = [each for each in manifests() if each["kind"] not in ("Kustomization", "PodMonitor")]

    assert len(objects) > 10
    assert [why for each in objects if (why := invalid(each, release))] == []


def test_the_schemas_find_a_mistake(rendered):
    """The control: a probe with a wrong key, a port without a number."""
    made = json.loads(json.dumps(rendered["minimal"].one("Deployment", "orgworker-worker")))
    container = made["spec"]["template"]["spec"]["containers"][0]
    assert invalid(made, "1.37") == ""

    container["livenessProbe"]["httpGett"] = {}
    assert "httpGett" in invalid(made, "1.37")
    del container["livenessProbe"]["httpGett"]
    container["ports"][0]["containerPort"] = "http"
    assert "'http'" in invalid(made, "1.37")


def invalid(made: dict[str, Any], release: str) -> str:
    """Why the schema of that release of Kubernetes rejects the object, or ""."""
    if made["kind"] == "ServiceMonitor":
        return wrong_monitor(made)
    try:
        kubernetes_validate.validate(made, release, strict=True)
    except kubernetes_validate.ValidationError as wrong:
        return f"{made['kind']} {made['metadata'].get('name')}: {list(wrong.path)}: {wrong.message}"
    return ""


def wrong_monitor(made: dict[str, Any]) -> str:
    """What is wrong with the shape of a ServiceMonitor, whose schema is not Kubernetes' own."""
    spec = made["spec"]
    if made["apiVersion"] != "monitoring.coreos.com/v1" or set(spec) != {"selector", "endpoints"}:
        return f"not a ServiceMonitor: {made['apiVersion']}, {sorted(spec)}"
    if set(spec["selector"]) != {"matchLabels"}:
        return f"selector: {spec['selector']}"
    for endpoint in spec["endpoints"]:
        if not {"port", "path", "interval"} <= set(endpoint) <= {"port", "path", "interval", "authorization"}:
            return f"endpoint: {sorted(endpoint)}"
    return ""


# ---- What the chart says


def test_the_chart_is_of_this_release():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())

    assert (chart["version"], chart["appVersion"]) == (VERSION, VERSION)
    assert chart["kubeVersion"] == f">={RELEASES[0]}.0-0"


def test_every_value_is_in_the_schema_on_the_page_and_explained():
    """A schema that lacks one would refuse the chart's own default."""
    text = (CHART / "values.yaml").read_text()
    values = yaml.safe_load(text)
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]

    assert set(schema) - {"global"} == set(values)
    for section, inner in values.items():
        if "properties" in schema[section]:
            assert set(schema[section]["properties"]) == set(inner), section
            assert schema[section]["additionalProperties"] is False
    page = PAGE.read_text()
    assert [section for section in values if f"`{section}" not in page] == []
    assert [section for section in values if not re.search(rf"(?m)^# .+\n{section}:", text)] == []


def test_a_release_has_what_is_enabled_and_nothing_else(rendered):
    deployments = {case: rendered[case].names("Deployment") for case in GOOD}

    assert deployments["minimal"] == {"orgworker-worker"}
    assert deployments["all"] == {f"orgworker-{name}" for name in COMPONENTS}
    assert deployments["hosts"] == {"orgworker-host"}
    assert deployments["serve only"] == {"orgworker-serve"}
    # Whoever has the database upgrades it; hosts do not have it.
    jobs = {case: rendered[case].names("Job") for case in GOOD}
    assert jobs["hosts"] == jobs["without a job"] == set()
    assert {"orgworker-upgrade"} == jobs["minimal"] == jobs["all"] == jobs["serve only"]
    hosts = rendered["hosts"]
    assert {each["kind"] for each in hosts.objects} == {
        *("ConfigMap", "Deployment", "PodDisruptionBudget", "NetworkPolicy")
    }
    assert "worker-secrets" not in json.dumps(hosts.objects)
    assert rendered["without policies"].names("NetworkPolicy") == set()


# The volumes that the Pod Security Standard `restricted` allows.
RESTRICTED = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral"),
    *("persistentVolumeClaim", "projected", "secret"),
}


@good
def test_each_pod_has_no_rights_and_writes_its_volume_only(rendered, case: str):
    for name, spec in pods(rendered[case]):
        assert spec["automountServiceAccountToken"] is False, name
        [container] = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert unknown_words(" ".join(container["args"])) == []
        mounts = {each["name"]: each for each in container["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in spec["volumes"]}
        writable = {each for each, mount in mounts.items() if not mount.get("readOnly")}
        assert writable - {"exports"} == {"work"}
        assert mounts["secrets"]["mountPath"] == places.MOUNTED_SECRETS
        assert mounts["work"]["mountPath"] == VOLUME
        if "config" in mounts:
            assert f"{mounts['config']['mountPath']}/worker.toml" in places.CONFIG_PLACES
        asked = {key: container[key]["httpGet"] for key in container if key.endswith("Probe")}
        assert {key: get["path"] for key, get in asked.items()} == {
            key: "/readyz" if key == "readinessProbe" else "/livez" for key in asked
        }
        assert {get["path"] for get in asked.values()} < PATHS


@good
def test_each_pod_meets_the_standard_restricted(rendered, case: str):
    for name, spec in pods(rendered[case]):
        assert {key for volume in spec["volumes"] for key in volume} - {"name"} <= RESTRICTED, name
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(spec)
        assert spec["securityContext"] == {
            **{"runAsNonRoot": True, "runAsUser": int(UID), "runAsGroup": int(UID), "fsGroup": int(UID)},
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert not any("hostPort" in port for port in spec["containers"][0].get("ports", []))


def test_each_pod_has_the_secrets_it_needs_and_no_other(rendered):
    shown = {name.removeprefix("orgworker-"): secrets(spec) for name, spec in pods(rendered["all"])}

    assert shown == {
        "worker": {"worker-secrets", "attempts-tls"},
        "serve": {"serve-secrets"},
        "provision": {"worker-secrets", "provision-secrets"},
        "host": {"host-secrets"},
        "upgrade": {"worker-secrets", "owner-secrets"},
    }
    [(_, upgrade)] = [each for each in pods(rendered["without an owner"]) if each[0].endswith("upgrade")]
    assert secrets(upgrade) == {"worker-secrets"}


def test_the_job_upgrades_before_install_and_upgrade_and_not_at_a_rollback(rendered):
    job = rendered["minimal"].one("Job", "orgworker-upgrade")

    assert job["metadata"]["annotations"] == {
        "helm.sh/hook": "pre-install,pre-upgrade",
        # Its log can be read until the next one.
        "helm.sh/hook-delete-policy": "before-hook-creation",
    }
    # A hook runs before the release's own objects are there: it may use none of them.
    assert "configMap" not in json.dumps(job)
    # Without the key a pod does not start; else it would upgrade an SQLite file of its own.
    sources = job["spec"]["template"]["spec"]["volumes"][0]["projected"]["sources"]
    assert [source["secret"]["items"][0]["key"] for source in sources] == [
        "database__url",
        "database__owner_url",
    ]
    assert rendered["all"].one("Job", "orgworker-upgrade")["spec"]["template"]["spec"]["imagePullSecrets"]


def test_the_job_stores_the_installation_of_the_settings(rendered):
    """Without the file that has it; the control has no installation."""
    named, control = (
        rendered[case].one("Job", "orgworker-upgrade")["spec"]["template"]["spec"]["containers"][0]
        for case in ("named", "minimal")
    )

    assert named["env"] == [{"name": "WORKER_INSTALLATION", "value": "eu-1"}]
    assert named | {"env": None} == control | {"env": None}
    assert "env" not in control


def test_a_pod_takes_the_settings_that_the_chart_gives_it(rendered, tmp_path: Path):
    """Settings are loaded from the rendered files and variables, as in the pod."""
    for case in ("defaults", "minimal", "all", "everything enabled", "manifests"):
        for name, spec in pods(rendered[case]):
            component = name.removeprefix("orgworker-")
            if component == "upgrade":
                continue
            [container] = spec["containers"]
            environ = {each["name"]: each["value"] for each in container["env"]}
            (tmp_path / "worker.toml").write_text(config(rendered[case], spec))
            file = str(tmp_path / "worker.toml")
            settings = places.load(file, environ=environ, of_host=component == "host")

            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            listeners = {
                "http": settings.web.listen if component in ("worker", "serve") else "",
                "hooks": settings.provisioning.listen,
                "attempts": settings.attempts.listen,
                "health": settings.web.health_listen,
            }
            if component == "host":
                assert all(address.endswith(":8480") for address in settings.host.control)
            assert {key: f"0.0.0.0:{port}" for key, port in ports.items()} == {
                key: listen for key, listen in listeners.items() if listen
            }
            if component == "provision":
                assert spec["terminationGracePeriodSeconds"] > LAST_TURN + CHECK_EVERY
            if component in ("worker", "host"):
                drain = settings.execution.drain.total_seconds()
                assert drain == {"all": {"worker": 600}}.get(case, {}).get(component, 60)
                assert spec["terminationGracePeriodSeconds"] > drain + LAST_FLUSH


def test_a_change_of_settings_restarts_the_pods():
    other = MINIMAL | {"config": MINIMAL["config"] + '[log]\nlevel = "debug"\n'}
    made = render(CHART, {"before": MINIMAL, "after": other, "again": MINIMAL})
    before, after, again = (
        made[case].one("Deployment", "orgworker-worker")["spec"] for case in ("before", "after", "again")
    )

    assert before == again
    assert before["template"]["metadata"]["annotations"] != after["template"]["metadata"]["annotations"]
    assert before["selector"] == after["selector"]


def test_the_image_is_pulled_by_digest_if_there_is_one(rendered):
    images = {case: rendered[case].one("Deployment", "orgworker-worker") for case in ("minimal", "all")}
    [minimal], [pinned] = (
        [one["image"] for one in made["spec"]["template"]["spec"]["containers"]] for made in images.values()
    )

    assert minimal == f"registry.acme.com/orgworker:{VERSION}"
    assert pinned == "registry.acme.com/orgworker@" + values_of("all")["image"]["digest"]


def test_services_policies_and_budgets_select_the_pods_of_one_kind(rendered):
    """Those of the chart, and of the manifests."""
    for case, objects in {
        **{case: rendered[case].objects for case in GOOD},
        "plain": list(manifests()),
    }.items():
        labels, jobs = (
            [each["spec"]["template"]["metadata"]["labels"] for each in objects if each["kind"] == kind]
            for kind in ("Deployment", "Job")
        )
        for each in objects:
            selector = each.get("spec", {}).get("selector") or each.get("spec", {}).get("podSelector")
            if selector is None or each["kind"] == "ServiceMonitor":
                continue
            wanted = selector.get("matchLabels", selector)
            chosen = [given for given in labels if wanted.items() <= given.items()]
            its_jobs = [given for given in jobs if wanted.items() <= given.items()]
            # Only the Job's own policy selects its pods.
            is_of_job = each["kind"] == "NetworkPolicy" and each["metadata"]["name"].endswith("upgrade")
            expected = (0, 1) if is_of_job else (1, 0)
            assert (len(chosen), len(its_jobs)) == expected, (case, each["kind"], each["metadata"]["name"])


@good
def test_a_policy_selects_each_pod(rendered, case: str):
    enabled = case != "without policies"

    # The control: a release without policies is found, each of its pods.
    assert open_pods(rendered[case].objects) == (
        set() if enabled else {name for name, _ in pods(rendered[case])}
    )


def test_the_job_is_found_if_only_its_policy_is_missing(rendered):
    """The control: the policies of the other pods leave the Job open."""
    others = [
        each
        for each in rendered["all"].objects
        if (each["kind"], each["metadata"]["name"]) != ("NetworkPolicy", "orgworker-upgrade")
    ]

    assert open_pods(others) == {"orgworker-upgrade"}


def test_the_policy_of_the_job_is_there_before_the_job(rendered):
    """At a first install the release's own objects come after the hooks."""
    policy = rendered["minimal"].one("NetworkPolicy", "orgworker-upgrade")["metadata"]["annotations"]
    job = rendered["minimal"].one("Job", "orgworker-upgrade")["metadata"]["annotations"]

    assert policy["helm.sh/hook"] == job["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert int(policy["helm.sh/hook-weight"]) < int(job.get("helm.sh/hook-weight", 0))
    # Nothing is created that `helm upgrade` finds in its way.
    assert policy["helm.sh/hook-delete-policy"] == "before-hook-creation"


def test_only_the_proxy_the_monitor_and_hosts_reach_a_pod(rendered):
    allowed = {name: peers(rendered["all"], name) for name in rendered["all"].names("NetworkPolicy")}
    workers = peers(rendered["minimal"], "orgworker-worker")

    assert workers == {"http": ["ingress-nginx"], "health": ["monitoring"]}
    assert allowed == {
        # serve has API and console, so the workers have none.
        "orgworker-worker": {"health": ["monitoring"], "attempts": ["hosts", "10.20.0.0/16"]},
        "orgworker-serve": {"http": ["ingress-nginx"], "health": ["monitoring"]},
        "orgworker-provision": {"hooks": ["ingress-nginx"], "health": ["monitoring"]},
        "orgworker-host": {"health": ["monitoring"]},
        # It listens to nothing.
        "orgworker-upgrade": {},
    }


def test_the_monitor_finds_the_health_port_of_every_pod(rendered):
    made = rendered["all"]
    [monitor] = [each for each in made.objects if each["kind"] == "ServiceMonitor"]
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    chosen = [
        each
        for each in made.objects
        if each["kind"] == "Service" and wanted <= each["metadata"]["labels"].items()
    ]

    assert {each["metadata"]["name"] for each in chosen} == {f"orgworker-{one}-health" for one in COMPONENTS}
    for service in chosen:
        assert service["spec"]["clusterIP"] == "None"
        assert [port["name"] for port in service["spec"]["ports"]] == ["health"]
        # A pod that does not admit runs is what the alerts are about.
        assert service["spec"]["publishNotReadyAddresses"] is True
    [endpoint] = monitor["spec"]["endpoints"]
    assert endpoint["authorization"] == {"credentials": {"name": "metrics-token", "key": "token"}}
    assert monitor["metadata"]["labels"]["release"] == "prometheus"


# ---- The chart and config/kubernetes


@pytest.mark.parametrize("component", ["worker", "provision", "host", "upgrade"])
def test_a_pod_equals_that_of_the_manifests(rendered, component: str):
    chart = dict(pods(rendered["manifests"]))[f"orgworker-{component}"]
    [plain] = [
        each["spec"]["template"]["spec"]
        for each in manifests()
        if each["kind"] in ("Deployment", "Job") and name_of(each) == component
    ]

    assert essence(chart) == essence(plain)


@pytest.mark.parametrize("component", ["worker", "provision", "host"])
def test_it_is_rolled_out_as_the_manifests(rendered, component: str):
    chart = rendered["manifests"].one("Deployment", f"orgworker-{component}")["spec"]
    [plain] = [
        each["spec"] for each in manifests() if each["kind"] == "Deployment" and name_of(each) == component
    ]

    for key in ("replicas", "minReadySeconds", "strategy"):
        assert chart.get(key) == plain.get(key), key


@pytest.mark.parametrize("kind", ["Service", "PodDisruptionBudget"])
def test_services_and_budgets_equal_those_of_the_manifests(rendered, kind: str):
    plain = {each["metadata"]["name"]: each["spec"] for each in manifests() if each["kind"] == kind}

    assert plain
    for name, spec in plain.items():
        made = rendered["manifests"].one(kind, f"orgworker-{name}")["spec"]
        assert made.get("maxUnavailable") == spec.get("maxUnavailable")
        ports = [[(port["name"], port["port"]) for port in each.get("ports", [])] for each in (made, spec)]
        assert ports[0] == ports[1]
        assert all(port["targetPort"] in (port["name"], port["port"]) for port in spec.get("ports", []))


def test_policies_equal_those_of_the_manifests(rendered):
    plain: dict[str, dict[str, list[str]]] = {}
    for each in manifests():
        if each["kind"] == "NetworkPolicy":
            name = each["metadata"]["name"]
            # A policy of its own there, since the file is added to the others.
            owner = "worker" if name == "attempts" else name
            plain.setdefault(f"orgworker-{owner}", {}).update(rules(each))

    assert plain == {name: peers(rendered["manifests"], name) for name in plain}
    assert set(plain) == rendered["manifests"].names("NetworkPolicy")


def essence(spec: dict[str, Any]) -> dict[str, Any]:
    """A pod's spec without names, images and what only the chart sets."""
    [container] = spec["containers"]
    env = {each["name"]: each["value"] for each in container.get("env", [])}
    only_here = {"WORKER_EXECUTION__DRAIN", *(name for name in env if name.startswith("WORKER_ATTEMPTS__"))}
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
    return {
        **{key: spec.get(key) for key in ("automountServiceAccountToken", "enableServiceLinks")},
        **{key: spec.get(key) for key in ("securityContext", "restartPolicy")},
        "grace": spec.get("terminationGracePeriodSeconds"),
        "spread": [
            {key: value for key, value in each.items() if key != "labelSelector"}
            for each in spec.get("topologySpreadConstraints", [])
        ]
        if container["args"] == ["run"]
        else None,
        **{key: container.get(key) for key in ("args", "resources")},
        "rights": container["securityContext"],
        **{key: container.get(key) for key in ("startupProbe", "livenessProbe", "readinessProbe")},
        "env": {name: value for name, value in env.items() if name not in only_here},
        "ports": {name: port for name, port in ports.items() if name != "attempts"},
        "mounts": {
            mount["mountPath"]: bool(mount.get("readOnly"))
            for mount in container["volumeMounts"]
            if mount["name"] != "attempts"
        },
        "secrets": secrets(spec) - {"attempts-tls"},
        "modes": [
            (volume.get("secret") or volume.get("projected"))["defaultMode"]
            for volume in spec["volumes"]
            if volume["name"] == "secrets"
        ],
        "work": [volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == "work"],
    }


def manifests() -> Iterator[dict[str, Any]]:
    for path in sorted(KUBERNETES.glob("*.yaml")):
        yield from yaml.safe_load_all(path.read_text())


def name_of(made: dict[str, Any]) -> str:
    """The part of the installation that a Deployment or Job of the manifests is."""
    metadata = made["metadata"]
    name: str = metadata.get("name") or metadata["generateName"].rstrip("-")
    return name.removeprefix("orgworker-").replace("orgworker", "worker")


def pods(made: Rendered) -> list[tuple[str, dict[str, Any]]]:
    """The name and the pod's spec of each Deployment and Job."""
    owners = [each for each in made.objects if each["kind"] in ("Deployment", "Job")]
    return [(each["metadata"]["name"], each["spec"]["template"]["spec"]) for each in owners]


def secrets(spec: dict[str, Any]) -> set[str]:
    """The names of the Secrets that a pod mounts."""
    named = set()
    for volume in spec["volumes"]:
        if "secret" in volume:
            named.add(volume["secret"]["secretName"])
        for source in volume.get("projected", {}).get("sources", []):
            named.add(source["secret"]["name"])
    return named


def config(made: Rendered, spec: dict[str, Any]) -> str:
    """The text of the settings that a pod mounts as worker.toml."""
    [volume] = [volume["configMap"] for volume in spec["volumes"] if volume["name"] == "config"]
    [key] = [item["key"] for item in volume.get("items", [{"key": "worker.toml"}])]
    text: str = made.one("ConfigMap", volume["name"])["data"][key]
    return text


def open_pods(objects: list[dict[str, Any]]) -> set[str]:
    """The Deployments and Jobs with pods that no policy selects: anything may connect to them."""
    policies = [
        each["spec"]["podSelector"]["matchLabels"].items()
        for each in objects
        if each["kind"] == "NetworkPolicy"
    ]
    return {
        each["metadata"]["name"]
        for each in objects
        if each["kind"] in ("Deployment", "Job")
        and not any(wanted <= each["spec"]["template"]["metadata"]["labels"].items() for wanted in policies)
    }


def rules(policy: dict[str, Any]) -> dict[str, list[str]]:
    """Who reaches which port by a policy; a peer is its namespace, network, or `hosts`."""
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    found = {}
    for rule in policy["spec"]["ingress"]:
        [port] = rule["ports"]
        found["attempts" if port["port"] == 8480 else port["port"]] = [_peer(each) for each in rule["from"]]
    return found


def _peer(peer: dict[str, Any]) -> str:
    if "ipBlock" in peer:
        return str(peer["ipBlock"]["cidr"])
    labels = peer["podSelector"]["matchLabels"]
    assert labels
    if "namespaceSelector" not in peer:
        return "hosts" if "host" in "".join(labels.values()) else str(labels)
    return str(peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"])


def peers(made: Rendered, name: str) -> dict[str, list[str]]:
    return rules(made.one("NetworkPolicy", name))


# ---- The page


def test_the_values_on_the_page_are_taken():
    texts = [block.text for block in blocks(PAGE.read_text()) if block.language == "yaml"]
    cases = {text: MINIMAL | yaml.safe_load(text) for text in texts}

    assert texts
    assert {text: made.error for text, made in render(CHART, cases).items() if made.error} == {}
