"""`predmaint agent` and `predmaint sinks` as whoever runs them sees them: health, readiness, reload, logs."""

import gzip
import json
import signal
import sys
from contextlib import ExitStack, closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pytest
import yaml
from servers import wait_for
from small_site import RATE_HZ, SAMPLES, STEP_NS, STREAM, T0_NS, Site, key_of, message, path_of, window

from pdm.stream.broker import EmbeddedBroker
from pdm.stream.sensor_client import SensorClient

pytestmark = pytest.mark.timeout(120)


def look(port, path):
    "Status and reasons of `/healthz` or `/readyz`."
    try:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return answer.status, json.load(answer)["reasons"]
    except HTTPError as e:
        return e.code, json.load(e)["reasons"]


@pytest.fixture
def collector():
    "OpenTelemetry's collector, as far as an exporter sees it: where it listens, and the lines that came, each as its text and its attributes."
    from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

    lines = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = ExportLogsServiceRequest.FromString(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
            for resource in request.resource_logs:
                service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
                for record in (r for scope in resource.scope_logs for r in scope.log_records):
                    lines.append((service, record.body.string_value, {a.key: a.value.string_value or a.value.int_value for a in record.attributes}))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    thread = Thread(target=http.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}", lines
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture
def site(make_bundle, tmp_path):
    return Site(tmp_path / "site", make_bundle(samples=SAMPLES, rate_hz=RATE_HZ))


@pytest.fixture
def running(site):
    "A broker, an agent as a process, and a sender; all of it ends with the test."
    with EmbeddedBroker() as broker, ExitStack() as stack:
        agent = site.agent(broker.url)
        stack.callback(agent.stop)
        yield broker, agent, stack.enter_context(SensorClient(broker.url, resend_s=0.5))


def opened(client, i):
    return client.open(path_of(i), STREAM, RATE_HZ, ["h", "v"], ["g", "g"])


def send_broken(broker, i=0):
    "A window that nobody can judge, from a sensor of another make."
    broken = message(window(0, samples=np.full((2, SAMPLES), np.nan, np.float32)), i)
    with closing(broker.client("sensor-of-another-make", session_s=0)) as bus:
        bus.connect()
        assert bus.publish(broken.topic, broken.payload, properties=broken.properties)


def reloads(site):
    return sum("reloading" in line or "told to reload" in line for line in site.log().splitlines())


def reload(site, agent):
    before = reloads(site)
    agent.process.send_signal(signal.SIGHUP)
    wait_for(lambda: reloads(site) > before)


def test_an_agent_without_its_broker_is_unready_and_healthy(site, running):
    broker, _, client = running
    assert look(site.metrics_port, "/healthz") == look(site.metrics_port, "/readyz") == (200, [])
    broker.kill()
    wait_for(lambda: look(site.metrics_port, "/readyz") == (503, ["no connection to the broker"]))
    assert look(site.metrics_port, "/healthz") == (200, [])
    broker.restart()
    wait_for(lambda: look(site.metrics_port, "/readyz") == (200, []), 40)


def test_new_records_are_taken_up_on_sighup_and_nothing_is_lost(site, running):
    _, agent, client = running
    records = yaml.safe_load((site.folder / "assets.yaml").read_text())["assets"]
    streams = [opened(client, i) for i in range(3)]
    for n in range(20):
        for s in streams:
            s.send(window(n).samples)
    wait_for(lambda: [s.acknowledged for s in streams] == [20, 20, 0])  # nobody has the third
    site.write([*records, records[0] | {"path": path_of(2)}])
    reload(site, agent)
    for n in range(20, 40):
        for s in streams:
            s.send(window(n).samples)
    client.flush(30)
    assert agent.alive and agent.stop() == 0
    with site.reader() as journal:
        for i, s in enumerate(streams):
            assert sorted(r.seq for r in journal.verdicts(*key_of(i)) if r.epoch == s.epoch) == list(range(40))


def test_records_that_make_no_sense_are_refused_and_the_agent_goes_on(site, running):
    _, agent, client = running
    good = (site.folder / "assets.yaml").read_text()
    for wrong, says in (("assets: 5\n", "expected `assets:` and a list"), (good.replace("rms.json", "nothing.json"), "nothing.json"),
                        (good.replace("path:", "machine_class: III\n  path:", 1), "machine class 'III' is none of")):
        (site.folder / "assets.yaml").write_text(wrong)
        reload(site, agent)
        assert says in site.log() and "it goes on as it was" in site.log()
    s = opened(client, 0)
    s.send(window(0).samples)
    client.flush(20)
    assert agent.alive


def test_logs_are_lines_of_json_where_no_person_watches(site, running):
    wait_for(lambda: "takes 2 streams of 2 assets" in site.log())  # said after it is ready
    lines = [json.loads(line) for line in site.log().splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)


def test_one_search_finds_what_became_of_a_window(site, running):
    broker, _, client = running
    s = opened(client, 0)
    for n in range(6):
        s.send(window(n, level=100.0).samples, t0_ns=T0_NS + n * STEP_NS)
    client.flush(20)
    send_broken(broker, 1)
    lines = wait_for(lambda: len(found := [line for line in map(json.loads, site.log().splitlines()) if "trace" in line]) > 1 and found)
    raised, refused = (next(line for line in lines if word in line["message"]) for word in ("raised", "not_finite"))
    assert raised["asset"] == path_of(0) and raised["trace"] == f"{path_of(0)}/{STREAM}/{s.epoch}/{raised['seq']}" and 0 <= raised["seq"] < 6
    assert refused["trace"] == f"{path_of(1)}/{STREAM}/7/0" and refused["level"] == "warning"
    with site.reader() as journal:
        assert [(e.epoch, e.seq) for e in journal.events(path_of(0)) if e.kind == "raised"] == [(s.epoch, raised["seq"])]


def test_after_a_kill_the_page_knows_how_each_machine_was_and_when_it_was_heard(site, running):
    broker, agent, client = running
    s = opened(client, 0)
    s.send(window(0, level=3.0).samples)
    client.flush(20)

    def seen():
        of = f'{{asset="{path_of(0)}",stream="{STREAM}"}}'
        return {name: float(line.rpartition(" ")[2]) for line in site.metrics().splitlines() for name in ("pdm_score", "pdm_score_threshold", "pdm_window_last_timestamp_seconds") if line.startswith(name + of)}

    before = wait_for(seen)
    agent.kill()
    again = site.agent(broker.url)
    try:
        after = seen()
        assert after.keys() == before.keys() and len(after) == 3 and after == pytest.approx(before, abs=5)
        page = site.metrics()
        for i, heard in enumerate((True, False)):
            assert (f'pdm_window_last_timestamp_seconds{{asset="{path_of(i)}"' in page) is heard and f'pdm_window_hop_seconds{{asset="{path_of(i)}"' in page
    finally:
        again.stop()


def test_a_stranger_on_the_page_is_told_what_there_is(site, running):
    with pytest.raises(HTTPError) as refused:
        urlopen(f"http://127.0.0.1:{site.metrics_port}/admin", timeout=30)
    assert refused.value.code == 404 and "/alarms" in json.load(refused.value)["error"]


def test_opentelemetry_gets_the_same_lines_with_the_window_as_attributes(site, collector, monkeypatch):
    url, lines = collector
    for name, value in {"SERVICE_NAME": "predmaint-agent", "EXPORTER_OTLP_ENDPOINT": url, "EXPORTER_OTLP_PROTOCOL": "http/protobuf"}.items():
        monkeypatch.setenv(f"OTEL_{name}", value)
    program = Path(sys.executable).with_name("opentelemetry-instrument")
    with EmbeddedBroker() as broker:
        with site.wait_ready(site.service("agent", broker.url, (program, "--logs_exporter", "otlp", "--traces_exporter", "none", "--metrics_exporter", "none"))) as agent:
            send_broken(broker)
            service, _, about = wait_for(lambda: next((line for line in lines if "not_finite" in line[1]), None))
            assert service == "predmaint-agent" and about["trace"] == f"{path_of(0)}/{STREAM}/7/0"
            assert agent.stop() == 0
    ours = [json.loads(line)["message"] for line in site.log().splitlines()]
    assert [text for _, text, _ in lines if text in ours] == ours  # a library's warning may be among them, too
