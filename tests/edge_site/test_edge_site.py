"""An edge site from its manifests: real pods, real broker with certificates, model server, agent, stores and alerts, and bearings of MFPT that fail in it.

The tests are one story, in their order. It needs root and podman, and builds the images that are not there: `make edge-images-test` says how long that takes.
"""

import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest
import yaml
from servers import wait_for

from pdm import demo, pki
from pdm.errors import PartMissing
from pdm.model.detector import Detector
from pdm.model.signature import sign
from pdm.model.transport import gather, push
from pdm.stream.journal import JournalReader
from pdm.stream.replay import play
from pdm.stream.sensor_client import SensorClient

from .cluster import Cluster, images, podman

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(900)  # the images may have to be built first
TOKEN = "a-token-of-this-test"
LINE = "predmaint/test/rig/line-1"


@pytest.fixture(scope="module")
def data():
    try:
        return demo.gather(tenth=True)
    except PartMissing as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def told():
    "What Alertmanager tells the webhook: its server listens once `listen` is called, on an address that the pods reach."
    class Told:
        def __init__(self):
            self.alerts, self.server = [], None

        def listen(self, address):
            hook = self

            class Handler(http.server.BaseHTTPRequestHandler):
                def do_POST(self):
                    hook.alerts += json.loads(self.rfile.read(int(self.headers["Content-Length"])))["alerts"]
                    self.send_response(200)
                    self.end_headers()

                def log_message(self, *_):
                    pass

            self.server = http.server.ThreadingHTTPServer((address, 9000), Handler)
            threading.Thread(target=self.server.serve_forever, daemon=True).start()

    t = Told()
    yield t
    if t.server:
        t.server.shutdown()
        t.server.server_close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pki")
    pki.init(folder)
    return folder


def secret_of(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, data, authority, told):
    folder = tmp_path_factory.mktemp("cluster")
    # the model, fitted on a healthy bearing, signed, and published where the updater fetches it
    train, calibration, r = demo._windows(data.train), demo._windows(data.calibrate), data.train[0]
    detector = Detector.fit(train, rate_hz=demo.RATE_HZ, channels=list(r.channels), units=list(r.units), hop_s=demo.LENGTH / demo.RATE_HZ, kind="mahalanobis",
                            false_alarms_per_day=1.0, seed=0, calibration=calibration, name="mfpt")
    bundle, _ = detector.export(folder / "bundles")
    key, store = release_key(folder), folder / "store"
    for part in gather(bundle.path):
        sign(part, key)
    push(bundle.path, f"file:{store}")
    # the site's own part of the overlay, as an engineer would write it
    site, own = folder / "site", folder / "overlay"
    shutil.copytree(ROOT / "edge/k3s/site", site)
    calibration_file = f"/state/bundles/{bundle.digest}.calibration/calibration.json"
    records = [{"path": f"{LINE}/{r.name}", "streams": {"vibration": {"bundle": f"/state/bundles/{bundle.digest}", "calibration": calibration_file}}} for r in data.replay]
    (site / "assets.yaml").write_text(yaml.safe_dump({"assets": records}))
    (site / "bundles.env").write_text("PREDMAINT_BUNDLE_URL=file:/store\n")
    shutil.copy(folder / "release.pub", site / "release.pub")
    own.mkdir()
    there = os.path.relpath(ROOT / "edge/k3s", own)
    (own / "kustomization.yaml").write_text(yaml.safe_dump({
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": [f"{there}/base", f"{there}/node", "../site"],
        "components": [f"{there}/overlays/cpu/images"]}))
    c = Cluster(folder, own, images(), secrets := {}, {"/store": store})
    pki.issue(authority, "agent")
    pki.issue(authority, "mosquitto", ["mosquitto", c.address["mosquitto"]])
    secrets |= {"agent-tls": secret_of(authority / "services/agent"), "mosquitto-tls": secret_of(authority / "servers/mosquitto"),
                "influxdb": {"token": TOKEN.encode(), "password": b"unused-here"}, "alertmanager": dict.fromkeys(("webhook-url", "note-url"), f"http://{c.gateway}:9000/".encode())}
    try:
        c.start()
        told.listen(c.gateway)
        yield c
    finally:
        c.close()


def release_key(folder: Path) -> Path:
    key = folder / "release.key"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key], check=True)
    subprocess.run(["openssl", "ec", "-in", key, "-pubout", "-out", folder / "release.pub"], check=True, capture_output=True)
    return key


def sensor(cluster, authority, name: str) -> SensorClient:
    "A sensor with its asset's certificate, outside the cluster."
    asset = f"{LINE}/{name}"
    pki.issue(authority, asset, renew_before=1)
    certs = authority / "assets" / asset
    return SensorClient(f"mqtts://{cluster.address['mosquitto']}:8883?ca={certs}/ca.crt&cert={certs}/tls.crt&key={certs}/tls.key", asset)


def send(cluster, authority, recording) -> int:
    "A recording as if it were live; how many windows were acknowledged."
    with sensor(cluster, authority, recording.name) as client:
        out = client.open(f"{LINE}/{recording.name}", "vibration", recording.rate_hz, recording.channels, recording.units)
        play(out, recording.windows(demo.LENGTH), demo.LENGTH / recording.rate_hz, speed=4)
        client.flush(60)
        return client.counts["acknowledged"]


def asked(url: str, token: str = "") -> dict:
    return json.load(urlopen(Request(url, headers={"Authorization": f"Token {token}"} if token else {}), timeout=10))


def stored(cluster, epoch: int | None = None) -> int:
    "How many verdicts InfluxDB has; of one life of a sender, or all."
    q = urlencode({"q": f"SELECT count(score) FROM health{'' if epoch is None else f' WHERE epoch = {epoch}'}", "db": "health"})
    series = asked(f"http://{cluster.address['influxdb']}:8086/query?{q}", TOKEN)["results"][0].get("series", [])
    return series[0]["values"][0][1] if series else 0


def judged(cluster) -> bool:
    "Whether the agent has judged a window in its present life."
    try:
        page = urlopen(f"http://{cluster.address['agent']}:9464/metrics", timeout=2).read().decode()
    except OSError:
        return False
    return re.search(r"^pdm_windows_total\{.*\} [1-9]", page, re.MULTILINE) is not None


def test_every_pod_is_ready(cluster):
    cluster.wait_ready()
    assert {"agent", "sinks", "updater", "triton", "mosquitto", "influxdb", "prometheus", "alertmanager", "node-exporter"} == set(cluster.templates)


def test_triton_answers_for_the_site_and_its_canary_finds_the_model_there(cluster):
    triton = next(c for c in cluster.templates["triton"]["containers"] if c["name"] == "triton")
    assert cluster.ready("triton", triton, "livenessProbe")
    assert "pdm_engine_canary" in urlopen(f"http://{cluster.address['agent']}:9464/metrics").read().decode()


@pytest.fixture(scope="module")
def sent(cluster, data, authority):
    cluster.wait_ready()
    return {r.name: (r, send(cluster, authority, r)) for r in data.replay}


def test_every_window_of_every_bearing_is_acknowledged_judged_and_stored(cluster, sent):
    windows = {name: len(r.windows(demo.LENGTH)) for name, (r, _) in sent.items()}
    assert {name: n for name, (_, n) in sent.items()} == windows
    wait_for(lambda: stored(cluster) >= sum(windows.values()), 60)
    assert stored(cluster) == sum(windows.values())


def test_an_alarm_of_each_faulty_bearing_reaches_the_webhook_and_none_of_the_healthy_one(cluster, sent, told):
    faulty = {f"{LINE}/{name}" for name, (r, _) in sent.items() if r.fault != "none"}
    healthy = {f"{LINE}/{name}" for name, (r, _) in sent.items() if r.fault == "none"}
    about = lambda: {a["labels"].get("asset") for a in told.alerts if a["status"] == "firing"}  # noqa: E731
    wait_for(lambda: faulty <= about(), 90)
    assert not healthy & about()


def test_prometheus_sees_every_part_and_its_rules_are_sound(cluster):
    def down():
        targets = asked(f"http://{cluster.address['prometheus']}:9090/api/v1/targets")["data"]["activeTargets"]
        return {t["labels"]["job"] for t in targets if t["health"] != "up"}

    expected = {"loop"}  # it runs in the cloud
    wait_for(lambda: down() <= expected, 60)
    groups = asked(f"http://{cluster.address['prometheus']}:9090/api/v1/rules")["data"]["groups"]
    assert len(groups) > 3 and all(r["health"] in ("ok", "unknown") for g in groups for r in g["rules"])


@contextmanager
def flowing(cluster, authority, recording):
    """While something happens, a sensor outside the cluster goes on sending, a recording again and again, and windows have come through before it begins. Afterwards
    each window must be acknowledged, and stored once."""
    done, told = threading.Event(), {}

    def go_on():
        with sensor(cluster, authority, recording.name) as client:
            out = client.open(f"{LINE}/{recording.name}", "vibration", recording.rate_hz, recording.channels, recording.units)
            told["epoch"] = out.epoch
            for window in cycle(recording.windows(demo.LENGTH)):
                out.send(window)
                if done.wait(0.05):
                    break
            client.flush(60)
            told.update(client.counts, sent=out.sent)

    sender = threading.Thread(target=go_on)
    sender.start()
    try:
        wait_for(lambda: "epoch" in told and stored(cluster, told["epoch"]))
        yield
    finally:
        done.set()
        sender.join(90)
    assert told["acknowledged"] == told["sent"] > 0
    wait_for(lambda: stored(cluster, told["epoch"]) >= told["sent"], 60)
    assert stored(cluster, told["epoch"]) == told["sent"]


@pytest.fixture
def healthy(sent):
    return next(r for r, _ in sent.values() if r.fault == "none")


def test_a_killed_agent_is_back_and_no_window_is_lost_meanwhile(cluster, authority, healthy):
    with flowing(cluster, authority, healthy):
        cluster.kill("agent")
        cluster.play("agent")
        wait_for(lambda: judged(cluster), 90)


def test_a_broker_whose_process_is_killed_is_started_again_and_no_window_is_lost(cluster, authority, healthy):
    name = f"{cluster.name}-mosquitto-mosquitto"
    with flowing(cluster, authority, healthy):
        os.kill(int(podman("inspect", "--format", "{{.State.Pid}}", name)), signal.SIGKILL)
        wait_for(lambda: int(podman("inspect", "--format", "{{.RestartCount}}", name)) >= 1, 30)
        cluster.wait_ready("mosquitto", "agent")


def test_after_a_power_cut_all_pods_start_again_and_no_window_is_lost(cluster, authority, healthy, record_property):
    with flowing(cluster, authority, healthy):
        cluster.power_cut()
        since = time.monotonic()
        cluster.power_up()
        wait_for(lambda: judged(cluster), 90)
        record_property("cold_start_to_first_verdict_s", seconds := round(time.monotonic() - since, 1))
        print(f"from cold start to the first verdict: {seconds} s")
    cluster.wait_ready()


def test_after_it_is_taken_down_nothing_is_left(cluster):
    cluster.close()
    assert cluster.left() == []
    with JournalReader(cluster.volume("state") / "journal.db") as journal:
        assert journal.last_id() > 0  # the volume stays until somebody removes it
