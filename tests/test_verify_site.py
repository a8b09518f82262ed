"""verify_device.py on a whole site, of real servers as far as they can be had: mosquitto with TLS, an agent, Triton, Prometheus, Alertmanager, InfluxDB.

A cluster and Grafana can't be had here: `kubectl` and Grafana's health page are stand-ins that say what the real ones say."""

import http.server
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import trustme
from servers import Influx, answers, listens, need
from small_site import RATE_HZ, SAMPLES, STREAM, Site, path_of

from pdm.errors import PartMissing
from pdm.model.bundle import Bundle, write_bundle
from pdm.process import Child, free_port
from pdm.serve.server import TritonServer
from pdm.serve.triton import TritonEngine
from pdm.stream.broker import mosquitto_conf

VERIFY = Path(__file__).resolve().parent.parent / "edge/bootstrap/verify_device.py"
pytestmark = pytest.mark.integration


def verify(folder: Path, *words: object, kubectl: str = "exit 1", what: str = "site") -> tuple[int, dict[str, dict], str]:
    "Exit code, the checks of the report by name, and what was printed; kubectl is a stand-in."
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "kubectl").write_text(f"#!/bin/sh\n# stand-in for kubectl\n{kubectl}\n")
    (programs / "kubectl").chmod(0o755)
    env = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "200"}
    done = subprocess.run([sys.executable, str(VERIFY), what, "--out", str(folder / "report.json"), *map(str, words)], capture_output=True, text=True, env=env)
    assert done.returncode in (0, 3), done.stdout + done.stderr
    return done.returncode, {c["check"]: c for c in json.loads((folder / "report.json").read_text())["checks"]}, done.stdout


def cluster(folder: Path, ready: str = "True", pressure: str = "False", pods: list | None = None, services: dict | None = None, gpus: int = 0, policies: int = 1,
            said: str = "") -> str:
    "A stand-in kubectl of a cluster in this state."
    conditions = [{"type": "Ready", "status": ready, "message": "PLEG"}, {"type": "DiskPressure", "status": pressure}, {"type": "EtcdIsVoter", "status": "True"}]
    nodes = [{"metadata": {"name": "edge"}, "status": {"conditions": conditions, "nodeInfo": {"kubeletVersion": "v1.36.4+k3s1"},
                                                              "allocatable": {"nvidia.com/gpu": str(gpus)}}}]
    items = {"nodes": nodes, "pods": pods or [], "services": [{"metadata": {"name": n}, "spec": {"clusterIP": ip}} for n, ip in (services or {}).items()],
             "networkpolicies": [{}] * policies}
    for kind, found in items.items():
        (folder / f"{kind}.json").write_text(json.dumps({"items": found}))
    (folder / "exec.txt").write_text(said)
    return f'for w in "$@"; do case $w in nodes|pods|services|networkpolicies) exec cat {folder}/$w.json ;; exec) exec cat {folder}/exec.txt ;; esac; done; exit 1'


def pod(name: str, ready: bool = True, reason: str = "", gpus: int = 0, phase: str = "Running", owner: str = "", kind: str = "Job") -> dict:
    state = {"waiting": {"reason": reason}} if reason else {"running": {}}
    limits = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    owners = {"ownerReferences": [{"kind": kind, "uid": owner}]} if owner else {}
    return {"metadata": {"name": name, **owners}, "spec": {"containers": [{"resources": {"limits": limits}}]},
            "status": {"phase": phase, "conditions": [{"type": "Ready", "status": str(ready)}],
                                                   "containerStatuses": [{"restartCount": 1, "state": state}]}}


@contextmanager
def page(path: str | None, text: str):
    "A server with one page, without a path everywhere; gives its host:port."
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            there = path in (None, self.path)
            self.send_response(200 if there else 404)
            self.end_headers()
            self.wfile.write(text.encode() if there else b"")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


# a window's way


def with_examples(bundle: Bundle, folder: Path, samples: int = SAMPLES) -> Bundle:
    "The same graph, with windows to try it with."
    examples = np.random.default_rng(0).normal(size=(4, 2, samples)).astype(np.float32)
    return write_bundle(folder, bundle.onnx.read_bytes(), bundle.contract.model_copy(update={"samples": samples}), examples)


@pytest.fixture(scope="module")
def plant(tmp_path_factory, make_bundle):
    "A broker with two doors as a site has them, and an agent behind the inner one. Gives folder, outer port, bundle and the agent's site."
    (mosquitto,) = need("mosquitto", "mosquitto")
    folder, authority = tmp_path_factory.mktemp("plant"), trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.crt"))
    for name in ("127.0.0.1", path_of(0), "agent"):
        cert = authority.issue_cert(name.replace("/", "."), common_name=name, not_after=datetime.now(UTC) + timedelta(days=200))
        cert.private_key_pem.write_to_path(str(folder / f"{name.replace('/', '.')}.key"))
        cert.cert_chain_pems[0].write_to_path(str(folder / f"{name.replace('/', '.')}.pem"))
    outer, inner = free_port(), free_port()
    tls = [f"cafile {folder}/ca.crt", f"certfile {folder}/127.0.0.1.pem", f"keyfile {folder}/127.0.0.1.key", "require_certificate true", "use_identity_as_username true"]
    general = [line for line in mosquitto_conf(folder, outer).splitlines() if not line.startswith(("listener", "allow_anonymous"))]
    (folder / "site.conf").write_text("\n".join(["per_listener_settings true", *general, f"listener {outer} 127.0.0.1", *tls, "use_username_as_clientid true",
                                                 f"listener {inner} 127.0.0.1", *tls]) + "\n")
    bundle = with_examples(make_bundle(samples=SAMPLES, rate_hz=RATE_HZ), folder / "bundles")
    site = Site(folder / "site", bundle, assets=1)
    with Child([mosquitto, "-c", folder / "site.conf"], folder / "mosquitto.log") as broker:
        broker.wait_ready(lambda: listens(outer) and listens(inner))
        with site.agent(f"mqtts://127.0.0.1:{inner}?ca={folder}/ca.crt&cert={folder}/agent.pem&key={folder}/agent.key"):
            yield folder, outer, bundle, site


def as_asset(plant, asset: str = path_of(0), bundle: Bundle | None = None) -> list[str]:
    folder, outer, known, _ = plant
    name = path_of(0).replace("/", ".")
    return ["--bundle", str((bundle or known).path), "--asset", asset, "--stream", STREAM, "--wait", "5", "--address", f"mosquitto=127.0.0.1:{outer}",
            "--broker", f"mqtts://{{mosquitto}}?ca={folder}/ca.crt&cert={folder}/{name}.pem&key={folder}/{name}.key"]


def test_a_window_of_the_test_asset_is_acknowledged_and_judged(plant, tmp_path):
    for _ in range(2):  # the second one begins another life of the sender
        _, checks, said = verify(tmp_path, *as_asset(plant))
        way = checks["a window's way"]
        assert way["result"] == "ok", way
        assert way["found"]["engine"] and way["found"]["model"] == plant[2].digest and way["found"]["state"] == "running"
    assert checks["certificates"]["result"] == "ok" and 190 <= checks["certificates"]["found"]["first_to_run_out_in_days"] <= 200
    assert "a window's way" in said and "15 checks" in said


def test_a_window_that_nobody_judges_fails_the_site(plant, tmp_path):
    code, checks, _ = verify(tmp_path, *as_asset(plant, "acme/lyon/hall-2/line-1/stranger"))
    assert code == 3 and checks["a window's way"]["reason"] == "not acknowledged within 5 s: is an agent running for this asset?"
    other = with_examples(plant[2], tmp_path / "other", samples=SAMPLES // 2)  # a window that the agent lays aside
    code, checks, _ = verify(tmp_path, *as_asset(plant, bundle=other))
    assert code == 3 and "but no verdict within 5 s: does the agent know" in checks["a window's way"]["reason"]


def test_certificates_that_run_out_soon_are_named(tmp_path):
    pki, authority = tmp_path / "pki", trustme.CA()
    pki.mkdir()
    for name, days in (("fan-1", 200), ("fan-2", 5.2), ("fan-3", -1)):
        authority.issue_cert(name, not_before=datetime.now(UTC) - timedelta(days=30), not_after=datetime.now(UTC) + timedelta(days=days)) \
            .cert_chain_pems[0].write_to_path(str(pki / f"{name}.crt"))
    code, checks, _ = verify(tmp_path, "--certificates", pki)
    assert code == 3
    assert checks["certificates"]["reason"] == f"{pki}/fan-2.crt runs out in 5 days; {pki}/fan-3.crt has run out: predmaint pki issue … --renew-before 30"


# services


def test_prometheus_tells_which_target_is_down(tmp_path):
    (program,) = need("prometheus", "prometheus")
    port, nobody = free_port(), free_port()
    jobs = [{"job_name": name, "scrape_interval": "1s", "static_configs": [{"targets": [f"127.0.0.1:{p}"]}]} for name, p in (("prometheus", port), ("sinks", nobody))]
    (tmp_path / "prometheus.yml").write_text(json.dumps({"scrape_configs": jobs}))
    command = [str(program), f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}"]

    def look():
        return verify(tmp_path, "--address", f"prometheus=127.0.0.1:{port}")[1]["prometheus"]

    def asked(health: list[str]) -> bool:
        from urllib.request import urlopen

        targets = json.load(urlopen(f"http://127.0.0.1:{port}/api/v1/targets", timeout=5))["data"]["activeTargets"]
        return sorted(t["health"] for t in targets) == health

    def told(group: str) -> bool:
        from urllib.request import urlopen

        groups = json.load(urlopen(f"http://127.0.0.1:{port}/api/v1/rules", timeout=5))["data"]["groups"]
        return [g["name"] for g in groups] == [group] and all(r["state"] == "firing" for r in groups[0]["rules"])

    with Child(command, tmp_path / "prometheus.log") as child:
        child.wait_ready(lambda: answers(f"http://127.0.0.1:{port}/-/ready"), 60)
        child.wait_ready(lambda: asked(["down", "up"]), 60)
        found = look()
        assert found["result"] == "failed" and f"sinks at http://127.0.0.1:{nobody}/metrics" in found["reason"] and "prometheus at" not in found["reason"]
        (tmp_path / "prometheus.yml").write_text(json.dumps({"scrape_configs": jobs[:1]}))
        child.process.send_signal(1)
        child.wait_ready(lambda: asked(["up"]), 60)
        assert look()["found"] == {"targets": 1, "firing": []}
        for name, rules, result in (("machine", [("MachineAlarm", "critical", {"asset": "acme/lyon/hall-2/line-1/fan-1"}), ("DiskFull", "warning", {})], "ok"),
                                    ("site", [("DiskFull", "critical", {}), ("DiskFull", "warning", {})], "failed")):
            (tmp_path / f"{name}.json").write_text(json.dumps({"groups": [{"name": name, "interval": "1s", "rules": [
                {"alert": alert, "expr": "vector(1)", "labels": {"severity": severity, **labels}} for alert, severity, labels in rules]}]}))
            (tmp_path / "prometheus.yml").write_text(json.dumps({"rule_files": [f"{name}.json"], "scrape_configs": jobs[:1]}))
            child.process.send_signal(1)
            child.wait_ready(lambda name=name: told(name), 60)
            assert (found := look())["result"] == result, found
        assert found["reason"] == "DiskFull is firing: see the runbooks"
    assert "Connection refused" in look()["reason"]


def test_alertmanager_influxdb_and_grafana_are_asked_how_they_are(tmp_path):
    (program,) = need("prometheus-alertmanager", "prometheus-alertmanager")
    port = free_port()
    (tmp_path / "am.yml").write_text("route: {receiver: nobody}\nreceivers: [{name: nobody}]\n")
    influx = Influx(tmp_path / "influx")
    try:
        with Child([program, f"--config.file={tmp_path}/am.yml", f"--storage.path={tmp_path}/am", f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address="],
                   tmp_path / "am.log") as child, page("/api/health", '{"database": "ok", "version": "11.6.5"}') as grafana:
            child.wait_ready(lambda: answers(f"http://127.0.0.1:{port}/-/ready"))
            addresses = [f"--address={n}={a}" for n, a in (("alertmanager", f"127.0.0.1:{port}"), ("influxdb", f"127.0.0.1:{influx.port}"), ("grafana", grafana))]
            _, checks, _ = verify(tmp_path, *addresses)
            assert [checks[n]["result"] for n in ("alertmanager", "influxdb", "grafana")] == ["ok"] * 3 and checks["alertmanager"]["found"]["version"]
    finally:
        influx.close()
    with page("/api/health", '{"database": "failing"}') as grafana:
        _, checks, _ = verify(tmp_path, *addresses[:2], f"--address=grafana={grafana}")
        assert [checks[n]["result"] for n in ("alertmanager", "influxdb", "grafana")] == ["failed"] * 3
        assert checks["grafana"]["reason"] == "its database is failing"


def test_triton_is_asked_by_its_canary(tmp_path, make_bundle):
    port = free_port()
    try:
        server = TritonServer(options={"allow-http": "true", "http-address": "127.0.0.1", "http-port": port})
    except PartMissing as e:
        pytest.skip(str(e))
    try:
        with TritonEngine(f"grpc://{server.address}", repository=server.repository) as engine:
            engine.load(make_bundle())
            assert verify(tmp_path, "--address", f"triton=127.0.0.1:{port}")[1]["triton's canary"]["result"] == "ok"
    finally:
        server.stop()
    found = verify(tmp_path, "--address", f"triton=127.0.0.1:{port}")[1]["triton's canary"]
    assert found["result"] == "failed" and "GET /v2/health/ready" in found["reason"]


# the cluster, and none


def test_without_a_cluster_it_says_so_and_goes_on(tmp_path):
    _, checks, said = verify(tmp_path, kubectl="echo 'The connection to the server localhost:8080 was refused' >&2; exit 1")
    assert len(checks) == 15 and checks["memory"]["result"] == "ok"
    refused = "kubectl reaches no cluster (on the node, run this as root)"
    assert checks["node"] == {"check": "node", "result": "not run", "reason": refused, "seconds": checks["node"]["seconds"]}
    assert checks["grafana"]["reason"] == f"{refused}, and no --address grafana=host:port" and checks["a window's way"]["reason"] == "no --broker, --asset, --bundle"
    assert "not run" in said


def test_a_node_and_its_pods_are_named_where_they_are_not_ready(tmp_path):
    _, checks, _ = verify(tmp_path, kubectl=cluster(tmp_path, pods=[pod("agent-0"), pod("grafana-x")], services={"grafana": "127.0.0.1"}))
    assert checks["node"]["found"] == {"edge": "v1.36.4+k3s1"} and checks["pods"]["found"] == {"pods": 4, "restarts": 4}  # the same two in both namespaces
    assert "http://127.0.0.1:3000/api/health" in checks["grafana"]["reason"] and checks["influxdb"]["reason"] == "namespace predmaint has no service influxdb"

    code, checks, _ = verify(tmp_path, kubectl=cluster(tmp_path, ready="Unknown", pods=[pod("agent-0", False, "CrashLoopBackOff")]))
    assert code == 3 and checks["node"]["reason"] == "edge: Ready is Unknown (PLEG)" and "agent-0 is Running (CrashLoopBackOff)" in checks["pods"]["reason"]
    assert "there are none: kubectl apply -k" in verify(tmp_path, kubectl=cluster(tmp_path, pressure="True"))[1]["pods"]["reason"]
    assert verify(tmp_path, kubectl=cluster(tmp_path, pressure="True"))[1]["node"]["reason"] == "edge: DiskPressure is True ()"


def test_a_job_that_was_done_at_the_second_try_is_done(tmp_path):
    first, second = pod("setup-a", False, phase="Failed", owner="1"), pod("setup-b", False, phase="Succeeded", owner="1")
    _, checks, _ = verify(tmp_path, kubectl=cluster(tmp_path, pods=[pod("agent-0"), first, second]))
    assert checks["pods"]["result"] == "ok"
    for other in (pod("setup-c", False, phase="Failed", owner="2"), pod("grafana-x", False, phase="Failed", owner="1", kind="ReplicaSet"), pod("one", False, phase="Failed")):
        _, checks, _ = verify(tmp_path, kubectl=cluster(tmp_path, pods=[first, second, other]))
        assert checks["pods"]["reason"].startswith(f"{other['metadata']['name']} is Failed") and "setup-a" not in checks["pods"]["reason"]


def test_a_page_that_is_no_answer_fails_its_check_and_no_other(tmp_path):
    services = ("prometheus", "alertmanager", "grafana", "influxdb")
    paths = ("/api/v1/targets?state=active", "/api/v2/status", "/api/health", "/health")
    for said in ("<!DOCTYPE html><title>Log in</title>", '["not", "what", "was", "expected"]', '{"error": "no"}', "null"):
        with page(None, said) as address:
            code, checks, _ = verify(tmp_path, *(f"--address={s}={address}" for s in services))
        assert code == 3 and checks["memory"]["result"] == "ok"
        for service, path in zip(services, paths, strict=True):
            reason = checks[service]["reason"]
            assert checks[service]["result"] == "failed" and reason.startswith(f"http://{address}{path}: expected JSON with ") and said[:20] in reason, reason


def test_the_gpu_is_asked_of_the_node_as_often_as_pods_want_it(tmp_path):
    def gpu(gpus: int, asked: int, said: str = "") -> dict:
        return verify(tmp_path, kubectl=cluster(tmp_path, pods=[pod("triton-x", gpus=asked), pod("agent-0")], gpus=gpus, said=said))[1]["gpu"]

    assert gpu(0, 0)["reason"] == "no pod asks for a GPU"
    found = gpu(2, 1, "/dev/dri/renderD128 (group 104)\n")["found"]  # the same pods in both namespaces
    assert found == {"asked": 2, "offered": 2, "closed_to_triton": ["/dev/dri/renderD128 (group 104)"]}
    short = gpu(1, 1)
    assert short["result"] == "failed" and "pods ask for 2 nvidia.com/gpu, and the node offers 1" in short["reason"]


def test_policies_that_are_not_in_force_fail_the_site(tmp_path):
    def policies(influxdb: bool, mosquitto: bool, written: int = 3, data: Path = tmp_path / "nowhere") -> dict:
        said = json.dumps({"influxdb": influxdb, "mosquitto": mosquitto})
        return verify(tmp_path, "--data", data, kubectl=cluster(tmp_path, policies=written, said=said))[1]["network policies"]

    assert policies(True, False)["found"] == {"written": 6, "refused": "sinks to mosquitto:8884"}
    assert "sinks reach mosquitto:8884, which no policy allows" in policies(True, True)["reason"]
    assert "sinks do not reach influxdb:8086" in policies(False, False)["reason"] and "there are none" in policies(True, False, written=0)["reason"]
    (tmp_path / "data/k3s").mkdir(parents=True)
    (tmp_path / "bin/iptables-save").write_text("#!/bin/sh\n# stand-in\ncat $0.txt\n")
    (tmp_path / "bin/iptables-save").chmod(0o755)
    if os.geteuid() == 0:  # the node's rules are root's to read
        for rules, result in ((":INPUT ACCEPT [0:0]\n", "failed"), (":INPUT ACCEPT [0:0]\n:KUBE-ROUTER-FORWARD - [0:0]\n:KUBE-NWPLCY-AAAA - [0:0]\n", "ok")):
            (tmp_path / "bin/iptables-save.txt").write_text(rules)
            found = policies(True, False, data=tmp_path / "data")
            assert found["result"] == result, found
        assert found["found"]["chains"] == 2


def test_a_wrong_address_is_refused(tmp_path):
    done = subprocess.run([sys.executable, VERIFY, "site", "--address", "grafana"], capture_output=True, text=True)
    assert done.returncode == 2 and "NAME=HOST:PORT is expected, with a name of triton" in done.stderr
