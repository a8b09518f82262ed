"""What Prometheus and Alertmanager make of a site: rules that ask for what there is, alerts that say what to do, and one call for one alarm.

Each alert, firing and not firing, stands in edge/prometheus/tests; here promtool runs them. Nothing is stood in for but the page that is called, and the
temperatures of a Jetson, whose files node exporter reads from a folder.
"""

import http.server
import json
import re
import threading
from contextlib import ExitStack, closing
from pathlib import Path
from subprocess import PIPE, STDOUT, run
from urllib.request import Request, urlopen

import pytest
import typer
import yaml
from prometheus_client import generate_latest
from servers import answers, need, wait_for
from small_site import RATE_HZ, SAMPLES, STEP_NS, STREAM, T0_NS, Site, path_of, window

from pdm.cli import app
from pdm.loop.controller import LoopMetrics
from pdm.process import Child, free_port
from pdm.stream import updater
from pdm.stream.broker import EmbeddedBroker
from pdm.stream.metrics import AgentMetrics, SinkMetrics
from pdm.stream.sensor_client import SensorClient

pytestmark = pytest.mark.timeout(180)
ROOT = Path(__file__).parents[1]
EDGE = ROOT / "edge"
PROMETHEUS = EDGE / "prometheus"
RULES = [r for f in sorted((PROMETHEUS / "rules").glob("*.yml")) for g in yaml.safe_load(f.read_text())["groups"] for r in g["rules"]]
ALERTS = [r for r in RULES if "alert" in r]
NAMES = sorted({r["alert"] for r in ALERTS})
TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
ALWAYS = {"Watchdog"}  # a dead man's switch that could be silent would be none: there is nothing to show that it does not fire
BASE = "https://predmaint.github.io/predmaint/runbooks.html"


def said(program, *args):
    "What a program says; the test fails where it says no."
    done = run([program, *map(str, args)], stdout=PIPE, stderr=STDOUT, text=True, cwd=PROMETHEUS)
    assert done.returncode == 0, done.stdout
    return done.stdout


def runbooks():
    return "\n".join("".join(c["source"]) for c in json.loads((ROOT / "nbs/runbooks.ipynb").read_text())["cells"])


def test_prometheus_takes_its_configuration_and_rules():
    (promtool,) = need("prometheus", "promtool")
    text = said(promtool, "check", "config", "prometheus.yml")
    assert "FAILED" not in text and f"{len(list((PROMETHEUS / 'rules').glob('*.yml')))} rule files found" in text, text  # a duplicate is no error to it


@pytest.mark.parametrize("file", TESTS, ids=lambda f: f.stem)
def test_alerts_fire_when_they_should_and_not_otherwise(file):
    (promtool,) = need("prometheus", "promtool")
    said(promtool, "test", "rules", f"tests/{file.name}")


def looks():
    "Each look at an alert in the tests of rules: the alert, and the labels of those that fire then."
    for file in TESTS:
        for test in yaml.safe_load(file.read_text())["tests"]:
            for look in test["promql_expr_test"]:
                alert = re.fullmatch(r'ALERTS\{alertname="(\w+)",alertstate="firing"\}', look["expr"])[1]
                yield alert, [dict(re.findall(r'(\w+)="([^"]*)"', s["labels"])) for s in look["exp_samples"]]


def test_each_alert_and_each_of_its_severities_is_tested_firing_and_not_firing():
    firing = {(alert, labels["severity"]) for alert, found in looks() for labels in found}
    assert firing == {(r["alert"], r["labels"]["severity"]) for r in ALERTS}
    assert {alert for alert, found in looks() if not found} == set(NAMES) - ALWAYS
    assert {r["alert"] for r in ALERTS if not asked(r["expr"])} == ALWAYS, "every other one depends on what is measured"


def test_each_alert_says_in_words_what_is_the_matter_and_where_to_read_on():
    labels = {}
    for alert, found in looks():
        for one in found:
            labels.setdefault((alert, one["severity"]), set(one)).intersection_update(one)
    for r in ALERTS:
        a = r["annotations"]
        assert {"for", "labels", "annotations"} <= set(r) and r["labels"]["severity"] in ("info", "warning", "critical"), r["alert"]
        assert set(a) == {"summary", "description", "runbook_url"} and len(a["summary"]) < 130 and a["description"].endswith((".", "?")), r["alert"]
        assert a["runbook_url"] == f"{{{{ $externalLabels.runbooks }}}}#{r['alert'].lower()}"
        named = set(re.findall(r"\$labels\.(\w+)", a["summary"] + a["description"]))
        assert named <= labels[r["alert"], r["labels"]["severity"]], f"{r['alert']} speaks of labels that it has lost: {named}"


def test_each_alert_has_its_section_in_the_runbooks_and_no_section_is_without_one():
    assert sorted(re.findall(r"(?m)^## (.+)$", runbooks())) == NAMES


def test_commands_in_the_runbooks_exist():
    said = re.findall(r"predmaint ((?:[a-z]+ ?)+)((?:[^\n`|#]*?--[a-z-]+)*)", re.sub(r"(?<!`)`(?!`)", "\n", runbooks()))
    assert len(said) > 20
    for words, rest in said:
        command = typer.main.get_command(app)
        for word in words.split():
            if not hasattr(command, "commands"):
                break  # its arguments
            assert word in command.commands, f"predmaint {words}"
            command = command.commands[word]
        options = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= options, f"predmaint {words}{rest}"


def test_what_the_runbooks_ask_prometheus_is_well_formed(tmp_path):
    (promtool,) = need("prometheus", "promtool")
    rules = [{"record": f"question{n}", "expr": expr} for n, expr in enumerate(re.findall(r"(?m)^ask '([^']+)'", runbooks()))]
    (tmp_path / "asked.yml").write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": rules}]}))
    assert f"{len(rules)} rules found" in said(promtool, "check", "rules", tmp_path / "asked.yml") and len(rules) > 20


def test_the_address_of_the_runbooks_stands_in_one_place():
    files = [f for folder in ("edge", "pdm", "nbs") for f in (ROOT / folder).rglob("*") if f.suffix in (".yml", ".yaml", ".py", ".ipynb", ".json", ".conf", ".sh")]
    assert [f.relative_to(EDGE).as_posix() for f in files if "runbooks.html" in f.read_text()] == ["prometheus/prometheus.yml"]
    assert yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["global"]["external_labels"]["runbooks"] == BASE


# ---- every number that a rule asks for is one that somebody offers


def series(page):
    "The names of the series on a page of metrics, also of those without a sample yet."
    found = set()
    for name, kind in re.findall(r"(?m)^# TYPE (\S+) (\w+)$", page):
        found |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return found


def asked(expr):
    "The names of the series in a PromQL expression."
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]|\b(by|on|ignoring)\s*\([^)]*\)', " ", re.sub(r'"[^"]*"', "", expr))
    words = re.findall(r"(?<![\w.])([a-zA-Z_:][\w:]*)(?![\w:])(?!\s*\()", bare)
    return set(words) - {"and", "or", "unless", "bool", "offset", "h"}


def page_of(port):
    return urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()


def test_rules_and_runbooks_ask_for_nothing_that_nobody_offers(make_bundle, tmp_path):
    exporter, prometheus, alertmanager = (need(p, p)[0] for p in ("prometheus-node-exporter", "prometheus", "prometheus-alertmanager"))
    for file, text in {"class/thermal/thermal_zone0/type": "tj-thermal", "class/thermal/thermal_zone0/temp": "51000", "class/thermal/thermal_zone0/mode": "enabled",
                       "class/thermal/thermal_zone0/policy": "step_wise", "class/hwmon/hwmon0/name": "nvme", "class/hwmon/hwmon0/temp1_input": "45000"}.items():
        (tmp_path / "sys" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys" / file).write_text(text + "\n")
    (tmp_path / "empty.yml").write_text("route: {receiver: none}\nreceivers: [{name: none}]\n")
    (tmp_path / "prometheus.yml").write_text("rule_files: [rules.yml]")  # of rules it tells where there are any
    (tmp_path / "rules.yml").write_text("groups: [{name: one, rules: [{record: one, expr: '1'}]}]")
    ports = [free_port() for _ in range(3)]
    programs = ([exporter, "--path.sysfs", tmp_path / "sys", "--web.listen-address", f"127.0.0.1:{ports[0]}"],
                [prometheus, "--config.file", tmp_path / "prometheus.yml", "--storage.tsdb.path", tmp_path / "tsdb", "--web.listen-address", f"127.0.0.1:{ports[1]}"],
                [alertmanager, "--config.file", tmp_path / "empty.yml", "--storage.path", tmp_path / "am", "--web.listen-address", f"127.0.0.1:{ports[2]}", "--cluster.listen-address="])
    whole = ("node_", "prometheus_rule_group_last_evaluation", "alertmanager_")  # once it shows this, it shows all that it has
    offered = {"up", "ALERTS"} | {r["record"] for r in RULES if "record" in r}
    with ExitStack() as stack:
        for program, port, sign in zip(programs, ports, whole, strict=True):
            child = Child(program, tmp_path / "log")
            stack.callback(child.stop)
            child.wait_ready(lambda port=port, sign=sign: answers(f"http://127.0.0.1:{port}/metrics") and sign in page_of(port))
            offered |= series(page_of(port))
        port = free_port()
        site = Site(tmp_path / "site", make_bundle(samples=SAMPLES, rate_hz=RATE_HZ))
        with updater.running(site.settings("embedded:", updater_metrics_port=port)):
            offered |= series(page_of(port))
    for metrics in (AgentMetrics(), SinkMetrics(), LoopMetrics()):
        offered |= series(generate_latest(metrics.registry).decode())
    wanted = {name for expr in [r["expr"] for r in RULES] + re.findall(r"(?m)^ask '([^']+)'", runbooks()) for name in asked(expr)}
    assert len(wanted) > 50 and not wanted - offered, sorted(wanted - offered)


# ---- one call for one alarm, with the real Prometheus and the real Alertmanager


class Pager:
    "Somebody who is called: keeps what Alertmanager sends."

    def __init__(self):
        self.calls = calls = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                calls.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,))
        self.thread.start()

    def told(self, asset):
        "The alerts of each call about an asset, by their names and whether they stand."
        return [{(a["labels"]["alertname"], a["status"]): a for a in c["alerts"]} for c in self.calls if c["groupLabels"].get("asset") == asset]

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def alertmanager_file(page, note):
    "The configuration as it is shipped, with the addresses in place of the files that hold them: the Alertmanager of Debian 12 knows no url_file yet."
    text = (EDGE / "alertmanager/alertmanager.yml").read_text()
    assert "http" not in text, "an address stands in the configuration that everybody may read"
    return text.replace("url_file: /run/secrets/alertmanager/webhook-url", f"url: {page}").replace("url_file: /run/secrets/alertmanager/note-url", f"url: {note}")


def test_alertmanager_takes_its_configuration_and_sends_each_alert_where_it_belongs(tmp_path):
    (amtool,) = need("prometheus-alertmanager", "amtool")
    file = tmp_path / "alertmanager.yml"
    file.write_text(alertmanager_file("http://127.0.0.1:1/", "http://127.0.0.1:2/"))
    assert "SUCCESS" in said(amtool, "check-config", file)
    for labels, receiver in {"alertname=MachineAlarm asset=a episode=a@1 severity=watch": "page", "alertname=MachineAlarm asset=a severity=info": "page",
                             "alertname=FaultNamed asset=a severity=watch": "note", "alertname=SensorFault asset=a episode=a@1": "note",
                             "alertname=SensorFault asset=a severity=warning": "page", "alertname=Drift asset=a severity=info": "note", "alertname=Watchdog site=s severity=info": "note",
                             "alertname=DiskFull site=s severity=warning": "page"}.items():
        assert said(amtool, "config", "routes", "test", f"--config.file={file}", *labels.split()).splitlines()[-1] == receiver, labels


class Watch:
    "Prometheus and Alertmanager as they are shipped, but for addresses and times: what takes minutes takes seconds here."

    def __init__(self, folder, agent_port, sinks_port, stack):
        prometheus, alertmanager = (need(p, p)[0] for p in ("prometheus", "prometheus-alertmanager"))
        (folder / "rules").mkdir(parents=True)
        self.pager, self.notes = stack.enter_context(closing(Pager())), stack.enter_context(closing(Pager()))
        self.port = free_port()
        port = free_port()
        config = re.sub(r"\b(10s|30s|5m)\b", "1s", alertmanager_file(self.pager.url, self.notes.url))
        (folder / "alertmanager.yml").write_text(config)
        for file in (PROMETHEUS / "rules").glob("*.yml"):
            (folder / "rules" / file.name).write_text(file.read_text().replace("for: 2m", "for: 1s"))
        text = (PROMETHEUS / "prometheus.yml").read_text().replace("15s", "1s").replace("timeout: 10s", "timeout: 1s")
        for host, at in {"agent:9464": agent_port, "sinks:9465": sinks_port, "alertmanager:9093": self.port, "localhost:9090": port}.items():
            text = text.replace(host, f"127.0.0.1:{at}")
        (folder / "prometheus.yml").write_text(re.sub(r'"[a-z-]+:\d+"', '"127.0.0.1:1"', text))
        for program, log, at in (([alertmanager, "--config.file", folder / "alertmanager.yml", "--storage.path", folder / "am", "--web.listen-address", f"127.0.0.1:{self.port}",
                                   "--cluster.listen-address="], "alertmanager", self.port),
                                 ([prometheus, "--config.file", folder / "prometheus.yml", "--storage.tsdb.path", folder / "tsdb", "--web.listen-address", f"127.0.0.1:{port}",
                                   "--rules.alert.resend-delay=1s"], "prometheus", port)):
            child = Child(program, folder / f"{log}.log")
            stack.callback(child.stop)
            child.wait_ready(lambda at=at: answers(f"http://127.0.0.1:{at}/-/ready"))

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def standing(self):
        return json.load(urlopen(f"{self.url}/api/v2/alerts", timeout=5))

    def add(self, **labels):
        urlopen(Request(f"{self.url}/api/v2/alerts", json.dumps([{"labels": labels}]).encode(), {"Content-Type": "application/json"}), timeout=5).close()


def ask(site, **command):
    body = json.dumps({"by": "mia", **command}).encode()
    urlopen(Request(f"http://127.0.0.1:{site.metrics_port}/alarms", body), timeout=10).close()


@pytest.fixture
def plant(make_bundle, tmp_path):
    "A broker, an agent and who watches it; a function that breaks one of two machines."
    with EmbeddedBroker() as broker, ExitStack() as stack:
        site = Site(tmp_path / "site", make_bundle(samples=SAMPLES, rate_hz=RATE_HZ))
        stack.callback(site.agent(broker.url).stop)
        site.sinks_port = free_port()
        watch = Watch(tmp_path / "watch", site.metrics_port, site.sinks_port, stack)
        client = stack.enter_context(SensorClient(broker.url))
        streams = [client.open(path_of(i), STREAM, RATE_HZ, ["h", "v"], ["g", "g"]) for i in range(2)]

        def damage(i):
            for n in range(6):
                streams[i].send(window(n, level=100.0).samples, t0_ns=T0_NS + n * STEP_NS)

        yield site, broker, watch, damage


def test_one_alarm_is_one_call_though_the_sinks_tell_it_and_prometheus_sees_it(plant):
    site, broker, watch, damage = plant
    sinks = site.service("sinks", broker.url, sinks_metrics_port=site.sinks_port, alert_urls=(f"{watch.url}/api/v2/alerts",))
    try:
        sinks.wait_ready(lambda: answers(f"http://127.0.0.1:{site.sinks_port}/readyz"))
        damage(0)
        (call,) = wait_for(lambda: watch.pager.told(path_of(0)))
        assert {name for name, _ in call} == {"MachineAlarm"} and call["MachineAlarm", "firing"]["labels"]["episode"].startswith(path_of(0))
    finally:
        sinks.kill()  # from here on nobody tells: Prometheus would, and Alertmanager holds it back
    held = wait_for(lambda: [a for a in watch.standing() if a["labels"]["alertname"] == "MachineAlarm" and "episode" not in a["labels"] and a["status"]["inhibitedBy"]])
    assert held[0]["labels"]["asset"] == path_of(0)
    watch.add(alertname="AnotherThing", asset=path_of(0))
    calls = wait_for(lambda: len(found := watch.pager.told(path_of(0))) > 1 and found)
    assert len(calls) == 2 and ("AnotherThing", "firing") in calls[1], "the group was told again for what is new"
    assert calls[1]["MachineAlarm", "firing"]["labels"]["episode"], "and still of one alarm"


def test_where_no_sink_tells_prometheus_does_once_in_words_and_until_it_is_over(plant):
    site, _, watch, damage = plant
    damage(0)
    (call,) = wait_for(lambda: watch.pager.told(path_of(0)))
    (alert,) = call.values()
    assert alert["labels"]["site"] == "edge" and "runbooks" not in alert["labels"] and alert["labels"]["severity"] in ("info", "warning", "critical")
    assert wait_for(lambda: [a for c in watch.notes.calls for a in c["alerts"] if a["labels"]["alertname"] == "Watchdog"])[0]["annotations"]["summary"] == "edge: alerts get out"
    assert alert["annotations"]["summary"].startswith(f"{path_of(0)}: alarm, severity ") and alert["annotations"]["runbook_url"] == f"{BASE}#machinealarm"
    ask(site, asset=path_of(0), action="clear")
    calls = wait_for(lambda: len(found := watch.pager.told(path_of(0))) > 1 and found)
    assert [sorted(status for _, status in c) for c in calls] == [["firing"], ["resolved"]]


def test_nobody_is_called_for_an_alarm_on_the_shelf(plant):
    site, _, watch, damage = plant
    ask(site, asset=path_of(0), action="shelve", reason="nuisance", for_s=3600)
    damage(0)
    wait_for(lambda: f'pdm_alarm{{asset="{path_of(0)}",stream="asset"}} 1.0' in site.metrics())
    damage(1)
    wait_for(lambda: watch.pager.told(path_of(1)))
    assert not watch.pager.told(path_of(0)) and f'pdm_alarm_silenced{{asset="{path_of(0)}"}} 1.0' in site.metrics()


def test_what_the_sinks_have_told_holds_nothing_back_that_is_worse(tmp_path):
    holds = {("watch", "info"), ("act", "info"), ("act", "warning"), ("stop_advised", "info"), ("stop_advised", "warning"), ("stop_advised", "critical")}
    pairs = [(told, seen) for told in ("watch", "act", "stop_advised") for seen in ("info", "warning", "critical")]
    with ExitStack() as stack:
        watch = Watch(tmp_path / "watch", free_port(), free_port(), stack)
        for told, seen in pairs:
            watch.add(alertname="MachineAlarm", asset=f"{told} {seen}", episode="1", severity=told)
        wait_for(lambda: all(watch.pager.told(" ".join(p)) for p in pairs))
        for told, seen in pairs:  # the sinks are gone, and Prometheus tells how it is now
            watch.add(alertname="MachineAlarm", asset=f"{told} {seen}", severity=seen, site="edge")
        wait_for(lambda: {tuple(a["labels"]["asset"].split()) for a in watch.standing() if a["labels"].get("site") == "edge" and a["status"]["inhibitedBy"]} == holds)
        called = wait_for(lambda: len(found := {a["labels"]["asset"] for c in watch.pager.calls for a in c["alerts"] if "asset" in a["labels"] and "episode" not in a["labels"]}) >= 3 and found)
        assert called == {" ".join(p) for p in set(pairs) - holds}


def test_a_full_disk_does_not_hide_that_alarms_can_not_be_told(tmp_path):
    with ExitStack() as stack:
        watch = Watch(tmp_path / "watch", free_port(), free_port(), stack)
        watch.add(alertname="DiskFull", site="s", severity="critical", mountpoint="/")
        for sink in ("influx", "alert-alertmanager-b1946a"):
            watch.add(alertname="SinkFailing", site="s", severity="critical", sink=sink)
        watch.add(alertname="JournalNotWritten", site="s", severity="critical")
        found = {("alert-alertmanager-b1946a", False), ("influx", True), ("", True)}
        wait_for(lambda: {(a["labels"].get("sink", ""), bool(a["status"]["inhibitedBy"])) for a in watch.standing() if a["labels"]["alertname"] in ("SinkFailing", "JournalNotWritten")} == found)
        called = wait_for(lambda: [a for c in watch.pager.calls for a in c["alerts"] if a["labels"]["alertname"] == "SinkFailing"])
        assert {a["labels"]["sink"] for a in called} == {"alert-alertmanager-b1946a"}
