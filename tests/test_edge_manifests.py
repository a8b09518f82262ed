"""An edge site as it would be applied: what kustomize renders. No cluster is needed; tests/edge_site starts the same pods."""

import json
import re
import shutil
import sqlite3
import subprocess
import threading
from collections import Counter
from datetime import UTC, datetime
from urllib.parse import urlsplit

import kustomized
import pytest
import yaml
from kustomized import ROOT, TOOLS, allowed, golden, listing, misfits, needs_tools, selects

from pdm.config import Settings, load_assets

K3S = ROOT / "edge/k3s"
OVERLAYS = ["cpu", "jetson", "kind"]
overlays = pytest.mark.parametrize("overlay", OVERLAYS)
NEEDED = {"agent-tls", "mosquitto-tls", "influxdb", "grafana", "alertmanager"}  # secrets
NODE = "predmaint-node"  # the namespace of what must look into the node


def rendered(overlay):
    return kustomized.rendered(K3S / "overlays" / overlay)


def of(overlay, kind, name=None):
    return [o for o in rendered(overlay) if o["kind"] == kind and name in (None, o["metadata"]["name"])]


def workloads(overlay, namespace="predmaint"):
    "Name and template of the pod, of all that runs in a namespace."
    return list(kustomized.pods([o for o in rendered(overlay) if o["metadata"].get("namespace") == namespace]))


def containers(overlay, namespace="predmaint"):
    return list(kustomized.containers([o for o in rendered(overlay) if o["metadata"].get("namespace") == namespace]))


@overlays
def test_an_overlay_holds_these_objects_and_no_others(overlay):
    assert listing(rendered(overlay)) == golden(f"edge-{overlay}.txt")


@needs_tools
def test_three_versions_of_kubernetes_know_every_field_of_every_object():
    assert misfits({overlay: rendered(overlay) for overlay in OVERLAYS}, ("1.34", "1.35", "1.36")) == []


@needs_tools
def test_checkov_finds_nothing_that_has_no_reason_and_every_reason_is_still_needed(tmp_path):
    files, written = [], set()
    for overlay in ("cpu", "jetson"):  # kind's images have no digests
        file = tmp_path / f"{overlay}.yaml"
        file.write_text(yaml.safe_dump_all(rendered(overlay)))
        files += ["-f", file]
        written |= {(o["metadata"]["name"], *text.split("=", 1)) for o in rendered(overlay) for key, text in o["metadata"].get("annotations", {}).items() if key.startswith("checkov.io/skip")}
    done = subprocess.run([TOOLS / "bin/checkov", "--skip-download", "--compact", "--framework", "kubernetes", "-o", "json", *files], capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0 and report["summary"]["passed"] > 1800
    assert [f"{c['check_id']} {c['resource']}: {c['check_name']}" for c in report["results"]["failed_checks"]] == []
    assert {(name, id) for name, id, _ in written} == {(c["resource"].rpartition(".")[2], c["check_id"]) for c in report["results"]["skipped_checks"]}
    assert all(len(reason) > 30 for _, _, reason in written)


@overlays
def test_every_pod_is_restricted_and_its_root_file_system_read_only(overlay):
    labels = {n["metadata"]["name"]: n["metadata"]["labels"] for n in of(overlay, "Namespace")}
    assert {name: ls["pod-security.kubernetes.io/enforce"] for name, ls in labels.items()} == {"predmaint": "restricted", NODE: "privileged"}
    for name, template in workloads(overlay):
        spec, security = template["spec"], template["spec"]["securityContext"]
        assert (security["runAsNonRoot"], security["seccompProfile"]) == (True, {"type": "RuntimeDefault"}), name
        assert security["runAsUser"] >= 10_000 and security["fsGroup"] == security["runAsUser"], name
        assert spec["automountServiceAccountToken"] is False and not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        assert {k for v in spec["volumes"] for k in v} - {"name"} <= {"persistentVolumeClaim", "configMap", "secret", "emptyDir", "projected"}, name
        assert all("sizeLimit" in v["emptyDir"] for v in spec["volumes"] if "emptyDir" in v), name
    for name, c in containers(overlay) + containers(overlay, NODE):
        assert c["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}, name


@overlays
def test_what_looks_into_the_node_changes_nothing_there(overlay):
    for name, template in workloads(overlay, NODE):
        host = {v["name"]: v["hostPath"]["path"] for v in template["spec"]["volumes"] if "hostPath" in v}
        written = {host[m["name"]] for c in template["spec"]["containers"] for m in c["volumeMounts"] if m["name"] in host and not m.get("readOnly")}
        assert written <= ({"/var/lib/kubelet/device-plugins"} if name == "device-plugin" else set()), name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(template["spec"]), name


@overlays
def test_everything_is_labelled(overlay):
    for o in rendered(overlay):
        labels, name = o["metadata"].get("labels", {}), f"{o['kind']} {o['metadata']['name']}"
        assert (labels.get("app.kubernetes.io/part-of"), labels.get("app.kubernetes.io/managed-by")) == ("predmaint", "kustomize"), name
        if o["kind"] in ("Deployment", "StatefulSet", "DaemonSet", "CronJob", "Service", "PersistentVolumeClaim"):
            assert {"app.kubernetes.io/name", "app.kubernetes.io/component"} <= set(labels), name
    for name, template in workloads(overlay) + workloads(overlay, NODE):
        assert template["metadata"]["labels"]["app.kubernetes.io/name"] == name


@overlays
def test_every_image_is_pinned_by_its_digest(overlay):
    for name, c in containers(overlay) + containers(overlay, NODE):
        ours = overlay == "kind" and re.fullmatch(r"localhost/predmaint-(agent|sinks|updater|triton):0\.1\.0", c["image"])  # kind keeps no digest of what is loaded into it
        assert ours or re.fullmatch(r"[a-z0-9./-]+:v?[0-9][0-9.]*(-jetson)?@sha256:[0-9a-f]{64}", c["image"]), f"{name}: {c['image']}"


@overlays
def test_whatever_is_named_is_there(overlay):
    claims, maps = ({o["metadata"]["name"] for o in of(overlay, kind)} for kind in ("PersistentVolumeClaim", "ConfigMap"))
    for name, template in workloads(overlay) + workloads(overlay, NODE):
        spec = template["spec"]
        volumes = {v["name"] for v in spec.get("volumes", [])}
        assert {v["persistentVolumeClaim"]["claimName"] for v in spec.get("volumes", []) if "persistentVolumeClaim" in v} <= claims, name
        for m in (v["configMap"] for v in spec.get("volumes", []) if "configMap" in v):
            assert m["name"] in maps, name
            assert "items" not in m or {i["key"] for i in m["items"]} == set(of(overlay, "ConfigMap", m["name"])[0]["data"]), name
        assert spec["priorityClassName"] in {p["metadata"]["name"] for p in of(overlay, "PriorityClass")}, name
        for c in [*spec.get("initContainers", []), *spec["containers"]]:
            assert {m["name"] for m in c.get("volumeMounts", [])} <= volumes, name
            assert {e["configMapRef"]["name"] for e in c.get("envFrom", [])} <= maps, name
            held = [m["mountPath"] for m in c.get("volumeMounts", []) if m.get("readOnly")]
            assert not [m["mountPath"] for m in c.get("volumeMounts", []) for h in held if m["mountPath"].startswith(f"{h}/")], name  # nobody can make its folder there
            ports = {p["name"] for p in c.get("ports", [])}
            assert {p[how]["port"] for kind in ("startupProbe", "readinessProbe", "livenessProbe") for p in [c.get(kind, {})] for how in ("httpGet", "tcpSocket") if how in p} <= ports, name
    for s in of(overlay, "Service"):
        if s["spec"].get("type") == "ExternalName":
            assert s["spec"]["externalName"] == f"{of(overlay, 'DaemonSet', 'node-exporter')[0]['metadata']['name']}.{NODE}.svc.cluster.local"
            continue
        (template,) = (t for _, t in workloads(overlay, s["metadata"]["namespace"]) if selects({"matchLabels": s["spec"]["selector"]}, t["metadata"]["labels"]))
        open_ports = {p["containerPort"] for c in template["spec"]["containers"] for p in c.get("ports", [])}
        assert {p["port"] for p in s["spec"]["ports"]} <= open_ports, s["metadata"]["name"]


@overlays
def test_every_server_has_probes_and_the_model_servers_is_an_inference(overlay):
    for name, c in containers(overlay) + containers(overlay, NODE):
        if "ports" in c:
            assert {"readinessProbe", "livenessProbe"} <= set(c) and ("startupProbe" in c or name.startswith("node-exporter")), name
    triton = dict(containers(overlay))["triton/triton"]
    assert triton["livenessProbe"]["exec"]["command"][-1].endswith("canary.py")  # the server's own page says ready while a model's process is dead


@overlays
def test_who_is_in_trouble_is_asked_for_its_numbers_all_the_more_and_not_ended_for_what_others_lack(overlay):
    for name in ("agent", "sinks", "updater", "triton"):
        assert of(overlay, "Service", name)[0]["spec"]["publishNotReadyAddresses"] is True, name  # a pod that is not ready has no address otherwise: its alerts could not fire
    for name in ("agent", "sinks", "updater"):
        c = dict(containers(overlay))[f"{name}/{name}"]
        assert {c[kind]["httpGet"]["path"] for kind in ("startupProbe", "livenessProbe")} == {"/healthz"}, name  # /readyz asks for the broker, which a restart does not bring back


@overlays
def test_no_secret_is_committed_and_the_readme_makes_each_that_is_needed(overlay):
    assert of(overlay, "Secret") == []
    needed, optional = set(), set()
    for _, template in workloads(overlay):
        for v in template["spec"]["volumes"]:
            for s in [v.get("secret"), *(source.get("secret") for source in v.get("projected", {}).get("sources", []))]:
                if s:
                    (optional if s.get("optional") else needed).add(s.get("secretName") or s["name"])
        assert "secretKeyRef" not in json.dumps(template) and "secretRef" not in json.dumps(template)  # an environment is read by every child
    assert (needed, optional) == (NEEDED, {"api", "warehouse", "bundles"})
    table = (K3S / "README.md").read_text()
    assert all(f"| `{name}` |" in table for name in needed | optional)


def test_external_secrets_bring_what_every_site_needs_into_its_namespace(tmp_path):
    shutil.copytree(ROOT / "edge", tmp_path / "edge")
    overlay = tmp_path / "edge/k3s/overlays/vault"
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump({"resources": ["../cpu"], "components": ["../../external-secrets"]}))
    brought = {o["metadata"]["name"]: o for o in kustomized.rendered(overlay) if o["kind"] == "ExternalSecret"}
    assert set(brought) == NEEDED
    for name, o in brought.items():
        assert o["apiVersion"] == "external-secrets.io/v1" and o["metadata"]["namespace"] == "predmaint"
        assert o["spec"]["dataFrom"] == [{"extract": {"key": f"predmaint/{name}"}}] and "target" not in o["spec"]  # the secret gets the name of this


@overlays
def test_every_setting_in_the_manifests_is_one_that_pdm_knows_and_takes(overlay, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no predmaint.toml
    data = {k: v for o in of(overlay, "ConfigMap") for k, v in o["data"].items() if k.startswith("PREDMAINT_")}
    data |= {e["name"]: e["value"] for _, c in containers(overlay) for e in c.get("env", []) if e["name"].startswith("PREDMAINT_") and "?" not in e["value"]}
    assert data.pop("PREDMAINT_SECRETS") == "/run/secrets/predmaint"
    mounted = {item["path"] for _, t in workloads(overlay) for v in t["spec"]["volumes"] for s in v.get("projected", {}).get("sources", [])
               for item in s["secret"]["items"] if item["path"].startswith("PREDMAINT_")}
    lists = {k for k, v in data.items() if v.startswith("[")}
    given = {k.removeprefix("PREDMAINT_").lower(): json.loads(v) if k in lists else v for k, v in data.items()}
    settings = Settings(**given, **{name.removeprefix("PREDMAINT_").lower(): "" for name in mounted})
    hosts = {s["metadata"]["name"] for s in of(overlay, "Service")}
    urls = [settings.engine_url, settings.tsdb_url, *settings.alert_urls]
    urls += [e["value"] for _, c in containers(overlay) for e in c.get("env", []) if e["name"] == "PREDMAINT_BROKER_URL"]
    assert len(urls) == 4 and {urlsplit(url).hostname for url in urls} <= hosts
    assert settings.engine_profile == ("jetson" if overlay == "jetson" else "cpu")


@overlays
def test_the_files_that_settings_name_are_mounted_where_they_are_said_to_be(overlay):
    settings = of(overlay, "ConfigMap", next(o["metadata"]["name"] for o in of(overlay, "ConfigMap") if o["metadata"]["name"].startswith("settings")))[0]["data"]
    for name, c in containers(overlay):
        if any(e["configMapRef"]["name"].startswith("settings") for e in c.get("envFrom", [])):
            mounts = [m["mountPath"] for m in c["volumeMounts"]]
            text = " ".join([*settings.values(), *(e["value"] for e in c.get("env", []))])
            paths = {p for p in re.findall(r"/(?:etc|run|state|models|engines)[\w./-]*", text)}
            lacking = {p for p in paths if not any(p == m or p.startswith(f"{m}/") for m in mounts)}
            may_lack = {"/engines"} if name.endswith("/bundles") else {"/models/repository", "/engines", "/etc/predmaint/desired/desired", "/etc/predmaint/trust/release.pub"} if name.startswith("sinks") else set()
            assert lacking <= may_lack, name


def test_the_examples_asset_records_are_asset_records():
    record, = load_assets(K3S / "site/assets.yaml")
    assert all(str(s.bundle).startswith("/state/bundles/") for s in record.streams.values())


PARTS = ["mosquitto", "triton", "agent", "sinks", "updater", "influxdb", "prometheus", "alertmanager", "grafana", "backup", "stranger"]
PORTS = {("mosquitto", 8884), ("triton", 8001), ("triton", 8002), ("agent", 9464), ("sinks", 9465), ("updater", 9466), ("influxdb", 8086), ("prometheus", 9090),
         ("alertmanager", 9093), ("grafana", 3000), ("triton", 8000)}
MUST = {("agent", "mosquitto", 8884), ("agent", "triton", 8001), ("updater", "triton", 8001), ("sinks", "influxdb", 8086), ("sinks", "alertmanager", 9093),
        ("grafana", "influxdb", 8086), ("grafana", "prometheus", 9090), ("prometheus", "alertmanager", 9093), ("backup", "influxdb", 8086),
        *(("prometheus", part, port) for part, port in [("agent", 9464), ("sinks", 9465), ("updater", 9466), ("triton", 8002), ("influxdb", 8086)])}


@overlays
def test_nobody_talks_to_anybody_but_for_those_who_must(overlay):
    policies = [p["spec"] for p in of(overlay, "NetworkPolicy") if p["metadata"]["namespace"] == "predmaint"]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies
    labels = {part: {"app.kubernetes.io/name": part} for part in PARTS}
    assert set(PARTS) - {"stranger"} == {name for name, _ in workloads(overlay)}
    talks = {(a, b, port) for a in PARTS for b, port in PORTS
             if allowed(policies, "Egress", labels[a], labels[b], port) and allowed(policies, "Ingress", labels[b], labels[a], port)}
    assert talks == MUST


@overlays
def test_only_those_who_carry_something_out_may_leave_the_cluster_and_only_sensors_come_in(overlay):
    leaves, comes = {}, {}
    for p in of(overlay, "NetworkPolicy"):
        for side, peers, found in (("egress", "to", leaves), ("ingress", "from", comes)):
            for rule in p["spec"].get(side, []):
                for block in (peer["ipBlock"] for peer in rule[peers] if "ipBlock" in peer):
                    found[p["metadata"]["name"]] = [port["port"] for port in rule["ports"]]
                    assert side == "ingress" or {"169.254.0.0/16", "10.42.0.0/16", "10.43.0.0/16"} <= set(block["except"])  # a cloud's metadata, pods, services
    assert leaves == {"updater": [443], "sinks": [443, 5432], "alertmanager": [443]}
    assert comes == {"mosquitto": [8883]}


@overlays
def test_the_agent_outlives_the_dashboards(overlay):
    value = {p["metadata"]["name"]: p["value"] for p in of(overlay, "PriorityClass")}
    rank = {name: value[template["spec"]["priorityClassName"]] for name, template in workloads(overlay) + workloads(overlay, NODE)}
    assert min(rank["agent"], rank["mosquitto"]) > max(rank["triton"], rank["sinks"], rank["influxdb"], rank["prometheus"]) > max(rank["grafana"], rank["backup"], rank["node-exporter"])
    assert {b["spec"]["selector"]["matchLabels"]["app.kubernetes.io/name"] for b in of(overlay, "PodDisruptionBudget")} == {"agent", "mosquitto", "influxdb"}


@overlays
def test_one_agent_and_one_writer_of_each_volume_at_a_time(overlay):
    for o in [*of(overlay, "Deployment"), *of(overlay, "StatefulSet")]:
        assert o["spec"]["replicas"] == 1 and (o["kind"] == "StatefulSet" or o["spec"]["strategy"] == {"type": "Recreate"}), o["metadata"]["name"]
    assert [o["metadata"]["name"] for o in of(overlay, "StatefulSet", "agent")] == ["agent"]
    writers = {}
    for name, template in workloads(overlay):
        volumes = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in template["spec"]["volumes"] if "persistentVolumeClaim" in v}
        for c in template["spec"]["containers"]:
            for m in c["volumeMounts"]:
                if m["name"] in volumes and not m.get("readOnly"):
                    writers.setdefault(volumes[m["name"]], set()).add(name)
    assert writers["bundles"] == {"updater"}  # the agent's fallback reads what the updater has proven
    assert writers["state"] - {"backup"} == {"agent", "sinks", "updater"}


def megabytes(quantity):
    return int(quantity.removesuffix("Mi")) if quantity.endswith("Mi") else int(quantity.removesuffix("Gi")) * 1024


def test_an_orin_nano_has_the_memory_that_is_asked_for_and_the_table_shows_it():
    "The table in edge/k3s/README.md is what the manifests say; only one init container runs at a time, and none beside the containers."
    rows, sums = [], Counter()
    for name, template in sorted(workloads("jetson") + workloads("jetson", NODE)):
        if name == "backup":
            continue  # at night, and gone if there is no room
        asked, most = (sum(megabytes(c["resources"][kind]["memory"]) for c in template["spec"]["containers"]) for kind in ("requests", "limits"))
        rows.append(f"| {name} | {asked} | {most} | {template['spec']['priorityClassName'].removeprefix('predmaint-')} |")
        sums.update(asked=asked, most=most)
    text = (K3S / "README.md").read_text()
    assert [line for line in rows if line not in text] == []
    reserved = int(re.search(r"^\| the system \| (\d+) \|", text, re.M)[1])
    assert f"| **together** | **{sums['asked'] + reserved}** |" in text
    assert sums["asked"] + reserved <= 7620  # MiB that Linux has of 8 GB there, after the carve-outs
    for name, c in containers("jetson") + containers("jetson", NODE):
        assert {"cpu", "memory"} <= set(c["resources"]["requests"]) and {"cpu", "memory"} <= set(c["resources"]["limits"]), name


def test_the_two_who_share_the_gpu_ask_for_as_much_as_its_plugin_makes_of_it():
    asked = sum(int(c["resources"]["requests"].get("nvidia.com/gpu", 0)) for _, c in containers("jetson"))
    plugin = yaml.safe_load(of("jetson", "ConfigMap", "device-plugin")[0]["data"]["config.yaml"])
    assert plugin["sharing"]["timeSlicing"]["resources"] == [{"name": "nvidia.com/gpu", "replicas": asked}]
    triton = dict(workloads("jetson"))["triton"]["spec"]
    assert triton["runtimeClassName"] == "nvidia" and triton["securityContext"]["supplementalGroups"] == [44]
    images = {c["name"]: c["image"] for c in triton["containers"]}
    assert images["builder"] == images["triton"]  # an engine fits the TensorRT that made it


# backups

@pytest.fixture
def backup(monkeypatch):
    import runpy

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=100 << 30, free=50 << 30))  # how full this machine is says nothing here
    return runpy.run_path(str(K3S / "base/backup.py"))["backup"]


def test_a_backup_made_while_the_journal_is_written_can_be_restored(backup, tmp_path):
    state, stop = tmp_path / "state", threading.Event()
    state.mkdir()

    def write():
        db = sqlite3.connect(state / "journal.db", isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("CREATE TABLE rows (n INTEGER PRIMARY KEY, twice INTEGER, filler BLOB)")
        n = 0
        while not stop.is_set():
            db.execute("BEGIN")
            db.executemany("INSERT INTO rows VALUES (?, ?, zeroblob(2000))", [(i, 2 * i) for i in range(n, n + 50)])
            db.execute("COMMIT")
            n += 50
        db.close()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while not (state / "journal.db").exists() or (state / "journal.db").stat().st_size < 500_000:
            stop.wait(0.01)
        made = [backup(state, tmp_path / "backups", 2, datetime(2026, 11, day, tzinfo=UTC)) for day in (1, 2, 3)]
    finally:
        stop.set()
        writer.join()
    assert [p.exists() for p in made] == [False, True, True]
    with sqlite3.connect(f"file:{made[-1]}/journal.db?immutable=1", uri=True) as db:
        count, wrong = db.execute("SELECT count(*), sum(twice != 2 * n) FROM rows").fetchone()
    assert count > 0 and count % 50 == 0 and wrong == 0  # whole transactions
    assert sorted(p.name for p in made[-1].iterdir()) == ["journal.db"]


def test_what_a_broken_off_backup_left_goes_and_none_is_made_where_the_disk_would_fill(backup, tmp_path, monkeypatch):
    state = tmp_path / "state"
    state.mkdir()
    with sqlite3.connect(state / "rollout.db") as db:
        db.execute("CREATE TABLE t (x)")
    (tmp_path / "backups/.20261101T000000Z").mkdir(parents=True)
    good = backup(state, tmp_path / "backups", 3, datetime(2026, 11, 2, tzinfo=UTC))
    assert list((tmp_path / "backups").iterdir()) == [good]
    nearly_full = shutil.disk_usage(tmp_path)._replace(free=10 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: nearly_full)
    with pytest.raises(OSError, match="a full disk would stop the agent"):
        backup(state, tmp_path / "backups", 3, datetime(2026, 11, 3, tzinfo=UTC))
    assert [p for p in (tmp_path / "backups").iterdir() if not p.name.startswith(".")] == [good]


def test_a_damaged_database_replaces_no_good_backup(backup, tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    with sqlite3.connect(state / "rollout.db") as db:
        db.execute("CREATE TABLE t (x)")
        db.executemany("INSERT INTO t VALUES (?)", [("x" * 500,)] * 500)
    good = backup(state, tmp_path / "backups", 1, datetime(2026, 11, 1, tzinfo=UTC))
    content = bytearray((state / "rollout.db").read_bytes())
    content[8192:40960] = b"\xff" * 32768
    (state / "rollout.db").write_bytes(content)
    with pytest.raises(sqlite3.DatabaseError):
        backup(state, tmp_path / "backups", 1, datetime(2026, 11, 2, tzinfo=UTC))
    assert [p for p in (tmp_path / "backups").iterdir() if not p.name.startswith(".")] == [good]
