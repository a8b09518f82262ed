"""The dashboards are what the code makes, are what Grafana's schema allows, and every query in them finds something in a site that is at work.

The site is real: a generated plant in which a bearing wears, sent over mosquitto to an agent that scores with Triton, with a version beside; sinks that
write to InfluxDB; an updater; the loop; a node exporter; and a Prometheus that asks all of them. Where Grafana is not there, its part, which is to fill in
what is chosen and to ask, is played by `filled`; where PREDMAINT_TEST_GRAFANA_URL names one, it takes the dashboards, asks and draws."""

import base64
import enum
import importlib
import inspect
import json
import math
import os
import re
import time
import types
import typing
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode, urlsplit
from urllib.request import Request, urlopen

import numpy as np
import pytest
import yaml
from grafana_foundation_sdk.cog import runtime
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models import dashboard as grafana
from grafana_foundation_sdk.models import prometheus
from graphs import rms_graph
from servers import answers, influx, need, wait_for
from small_site import Site
from typer.testing import CliRunner

from pdm.dashboards import dashboards
from pdm.dashboards_cli import dashboards as command
from pdm.data.scenario import parse
from pdm.data.window import AssetPath, topic
from pdm.drift_cli import controller_of
from pdm.errors import PartMissing
from pdm.loop.controller import LoopMetrics
from pdm.loop.logbook import Logbook
from pdm.model.bundle import CalibrationRecord, Contract, write_bundle
from pdm.panels import LEVELS, TITLES
from pdm.process import Child, free_port
from pdm.serve.server import find_environment
from pdm.signal.indicators import ISO_LIMITS_MM_S
from pdm.stream.broker import EmbeddedBroker
from pdm.stream.page import Page
from pdm.stream.sensor_client import SensorClient
from pdm.stream.sinks import SqliteStore

ROOT = Path(__file__).resolve().parent.parent
GRAFANA = ROOT / "edge/grafana"
BUILT = {json.loads(content)["uid"]: json.loads(content) for content in dashboards().values()}

SEEN_FROM_GRAFANA = os.environ.get("PREDMAINT_TEST_SEEN_FROM_GRAFANA", "")  # what a Grafana in a container calls this machine

# as files


def test_the_files_at_the_edge_are_what_the_code_makes():
    done = CliRunner().invoke(command, ["build", "--check", "--out", str(GRAFANA / "dashboards")])
    assert done.exit_code == 0, f"{done.exception}: run `predmaint dashboards build --out edge/grafana/dashboards`"
    assert {p.name for p in (GRAFANA / "dashboards").iterdir()} == set(dashboards())


def test_a_file_that_was_edited_by_hand_is_found(tmp_path):
    assert CliRunner().invoke(command, ["build", "--out", str(tmp_path)]).exit_code == 0
    (tmp_path / "site.json").write_text((tmp_path / "site.json").read_text().replace("30s", "5s"))
    done = CliRunner().invoke(command, ["build", "--check", "--out", str(tmp_path)])
    assert done.exit_code != 0 and "site.json" in str(done.exception)


def test_what_is_provisioned_is_what_the_dashboards_name():
    sources = yaml.safe_load((GRAFANA / "provisioning/datasources/predmaint.yml").read_text())["datasources"]
    assert {(s["type"], s["uid"]) for s in sources} == {("prometheus", "predmaint-prometheus"), ("influxdb", "predmaint-influxdb")}
    named = set(re.findall(r'"uid": "(predmaint-(?:prometheus|influxdb))"', "".join(dashboards().values())))
    assert named == {s["uid"] for s in sources}
    assert "Token $__file{/run/secrets/predmaint/PREDMAINT_INFLUX_TOKEN}" in json.dumps(sources), "the token stands in a file"
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/predmaint.yml").read_text())["providers"]
    assert provider["options"]["path"] == "/etc/grafana/dashboards"


# as Grafana's schema allows


def wire_names(model: type) -> dict[str, str]:
    "Field in JSON: attribute, of a class that was generated from the schema."
    return dict(re.findall(r'"(\w+)"(?:\]? = |: )self\.(\w+)', inspect.getsource(model.to_json)))


def misfit(value, kind, where: str) -> list[str]:
    "Where a value is not of a type of the schema: a class that was generated from it, or what its attributes are."
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind in (typing.Any, object, Dataquery):  # a query is checked by the schema of its data source
        return []
    if origin in (typing.Union, types.UnionType):
        return min((misfit(value, a, where) for a in args if (a is type(None)) == (value is None)), key=len, default=[f"{where}: may not be null"])
    if kind is type(None):
        return [] if value is None else [f"{where}: expected null, got {value!r}"]
    if origin is list:
        return [f"{where}: expected a list"] if not isinstance(value, list) else [m for k, v in enumerate(value) for m in misfit(v, args[0], f"{where}[{k}]")]
    if origin is dict:
        return [f"{where}: expected a map"] if not isinstance(value, dict) else [m for k, v in value.items() for m in misfit(v, args[1], f"{where}.{k}")]
    if origin is typing.Literal:
        return [] if value in args else [f"{where}: {value!r} is none of {args}"]
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return [] if value in [e.value for e in kind] else [f"{where}: {value!r} is none of {[e.value for e in kind]}"]
    if kind in (str, int, bool, float):
        fits = isinstance(value, int | float if kind is float else kind) and (kind is bool or not isinstance(value, bool))
        return [] if fits else [f"{where}: expected {kind.__name__}, got {value!r}"]
    if not isinstance(value, dict):
        return [f"{where}: expected {kind.__name__}, got {value!r}"]
    names, hints = wire_names(kind), typing.get_type_hints(kind)
    unknown = [f"{where}.{k}: {kind.__name__} has no such field" for k in value if k not in names]
    missing = [f"{where}.{k}: missing" for k, attribute in names.items() if k not in value and type(None) not in typing.get_args(hints[attribute])]
    return unknown + missing + [m for k, v in value.items() if k in names for m in misfit(v, hints[names[k]], f"{where}.{k}")]


def plugin(kind: str):
    "The module of a kind of panel, generated from the schema of that panel."
    return importlib.import_module(f"grafana_foundation_sdk.models.{kind.replace('-', '')}")


@pytest.mark.parametrize("uid", BUILT)
def test_a_dashboard_is_what_grafanas_schema_allows(uid):
    made = json.loads(json.dumps(BUILT[uid]))
    for note in made["annotations"]["list"]:
        assert note.pop("target")["fromAnnotations"]  # the schema calls it unfinished and knows only Grafana's own; InfluxDB's is another
    wrong = misfit(made, grafana.Dashboard, "dashboard")
    for panel in made["panels"]:
        module, where = plugin(panel["type"]), f"{panel['title']}"
        wrong += misfit(panel["options"], module.Options, f"{where}.options")
        if hasattr(module, "FieldConfig"):
            wrong += misfit(panel["fieldConfig"]["defaults"].get("custom", {}), module.FieldConfig, f"{where}.custom")
        for target in panel["targets"]:
            if target["datasource"]["type"] == "prometheus":
                wrong += misfit(target, prometheus.Dataquery, f"{where}.{target['refId']}")
    assert not wrong


def test_the_check_of_the_schema_finds_what_is_wrong():
    made = json.loads(json.dumps(BUILT["predmaint-plant"]))
    made["panels"][0]["titel"], made["panels"][1]["gridPos"]["w"], made["refresh"], made["templating"]["list"][0]["refresh"] = "x", "wide", 5, 7
    del made["panels"][2]["type"]
    found = {m.partition(":")[0] for m in misfit(made, grafana.Dashboard, "d")}
    assert found == {"d.refresh", "d.templating.list[0].refresh", "d.panels[0].titel", "d.panels[1].gridPos.w", "d.panels[2].type"}


def lost(made, again, where: str) -> list[str]:
    "What is not there again; that more is there, by default, is fine."
    if isinstance(made, dict) and isinstance(again, dict):
        return [m for k, v in made.items() for m in (lost(v, again[k], f"{where}.{k}") if k in again else [f"{where}.{k}"])]
    if isinstance(made, list) and isinstance(again, list) and len(made) == len(again):
        return [m for k, (v, w) in enumerate(zip(made, again, strict=True)) for m in lost(v, w, f"{where}[{k}]")]
    return [] if made == again else [f"{where}: {made!r} came back as {again!r}"]


@pytest.mark.parametrize("uid", BUILT)
def test_grafanas_own_reader_loses_nothing_of_a_dashboard(uid):
    register_default_plugins()
    assert runtime.panelcfg_config("state-timeline") is not None
    made = json.loads(json.dumps(BUILT[uid]))
    for note in made["annotations"]["list"]:
        del note["target"]
    for panel in made["panels"]:
        if panel["datasource"]["uid"] == "-- Mixed --":
            del panel["datasource"]  # the reader would take that for the kind of the queries, each of which names its own
    again = json.loads(json.dumps(grafana.Dashboard.from_json(made), cls=JSONEncoder))
    assert not lost(made, again, "dashboard")


@pytest.mark.parametrize("uid", BUILT)
def test_panels_fill_their_rows_and_do_not_lie_on_each_other(uid):
    taken = {}
    for p in BUILT[uid]["panels"]:
        g = p["gridPos"]
        assert g["x"] + g["w"] <= 24 and g["w"] >= 6, f"{p['title']} can't be read on a tablet"
        for cell in [(x, y) for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])]:
            assert cell not in taken, f"{p['title']} lies on {taken.get(cell)}"
            taken[cell] = p["title"]
    rows = {y for _, y in taken}
    assert rows == set(range(max(rows) + 1)) and len(taken) == 24 * len(rows), "no holes"
    assert len({p["id"] for p in BUILT[uid]["panels"]}) == len(BUILT[uid]["panels"])


@pytest.mark.parametrize("uid", BUILT)
def test_a_panel_has_a_title_a_sentence_a_unit_and_a_word_for_nothing(uid):
    for p in BUILT[uid]["panels"]:
        defaults = p["fieldConfig"]["defaults"]
        assert p["title"] and p["description"].endswith(".") and defaults["noValue"], p["title"]
        assert p["type"] in ("table", "state-timeline") or defaults["unit"], p["title"]


def test_links_lead_to_dashboards_that_are_there_and_carry_variables_and_time_along():
    assert {uid: d["title"] for uid, d in BUILT.items()} == TITLES
    for uid, d in BUILT.items():
        assert {link["url"] for link in d["links"]} == {f"/d/{other}" for other in BUILT if other != uid}
        assert all(link["includeVars"] and link["keepTime"] for link in d["links"])
    (opens,) = set(re.findall(r'"url": "(/d/[^"]*\?[^"]*)"', json.dumps(BUILT)))
    assert opens.startswith("/d/predmaint-asset?") and opens.endswith("&${__url_time_range}")
    assert re.findall(r"var-(\w+)", opens) == [v["name"] for v in BUILT["predmaint-asset"]["templating"]["list"]][:5]
    table = next(p for p in BUILT["predmaint-plant"]["panels"] if p["type"] == "table")
    (names,) = [t["options"]["renameByName"] for t in table["transformations"] if t["id"] == "organize"]
    assert set(re.findall(r"fields\.(\w+)", opens)) <= set(names.values()), "the link names columns that are in the table"
    assert {s["displayName"] for s in table["options"]["sortBy"]} <= set(names.values()), "and so does the order"


@pytest.mark.parametrize("uid", ["predmaint-plant", "predmaint-model"])
def test_assets_of_the_same_name_in_two_halls_are_two(uid):
    for p in BUILT[uid]["panels"]:
        for t in p["targets"]:
            for tags in re.findall(r"GROUP BY ([^)]*?)(?: fill\(none\))?$", re.sub(r"time\([^)]*\)", "time", t.get("query", ""))):
                assert set(LEVELS) <= set(re.findall(r'"(\w+)"', tags)), p["title"]
                assert p["type"] == "table" or t["alias"].startswith("$tag_area/$tag_line/$tag_asset"), p["title"]


def test_what_is_chosen_is_no_regular_expression():
    for t in [t for d in BUILT.values() for p in d["panels"] for t in p["targets"]]:
        query = t.get("expr") or t["query"]
        assert not re.search(r"\$(?!__|timeFilter)[a-z]", query) and set(re.findall(r"\$\{[^}]*?(:\w+)?\}", query)) <= {":regex"}, query
        assert not re.search(r'"[^"`]*\$\{[^"`]*"', t.get("expr", "")), f"in quotes its backslashes would have to be two: {query}"
    assert filled("/^${asset:regex}$/", {"asset": "fan.1 (old)"}) == r"/^fan\.1 \(old\)$/"


def test_limits_are_the_same_in_alerts_on_the_dashboard_and_where_a_site_is_verified():
    alerts = {(r["alert"], r["labels"]["severity"]): r["expr"] for g in yaml.safe_load((ROOT / "edge/prometheus/rules/site.yml").read_text())["groups"] for r in g["rules"]}
    free = [float(re.search(r"< (0\.\d+)", alerts["DiskFull", s])[1]) for s in ("warning", "critical")]
    hot = [{float(v) for v in re.findall(r"> (\d+)", alerts["BoardHot", s])} for s in ("warning", "critical")]
    steps = {p["title"]: [s["value"] for s in p["fieldConfig"]["defaults"]["thresholds"]["steps"][1:]] for p in BUILT["predmaint-site"]["panels"] if p["type"] == "stat"}
    np.testing.assert_allclose(steps["Disk"], [1 - f for f in free])
    assert [{v} for v in steps["Board"]] == hot
    said = (ROOT / "edge/bootstrap/verify_site.py").read_text()
    limits = dict(zip(*(x.split(", ") for x in re.search(r"(?m)^(FREE_SHARE, .*?) = (.*?)  #", said).groups()), strict=True))
    assert (float(limits["FREE_SHARE"]), {float(limits["HOT_C"])}) == (free[0], hot[0])


# as questions to a site at work

SCENARIO = """
about: Two pumps. The bearing of one wears out in minutes, and a sensor of the other dies.
duration: 5 min
every: 1 s
start: {start}
path: acme/lyon/hall-2/line-1
vibration: {{rate_hz: 5120, samples: 5120, channels: [h, v]}}
process: {{rate_hz: 1, samples: 10, channels: [bearing_de_c, bearing_nde_c]}}
types:
  pump: {{rpm: 1480, seed: 41, resonances: [{{hz: 900, damping: 0.03}}, {{hz: 1700, damping: 0.03}}], machine: {{gear_teeth: 0, noise_g: 0.1, strike_g: 1.5, knocks_per_s: 0}}}}
assets:
  - {{name: pump-1, type: pump, sensor_faults: [{{channel: v, kind: spike, size: 200, at: 260 s, lasts: 15 s}}]}}
  - {{name: pump-2, type: pump, wear: [{{fault: outer_race, onset: 150 s, lasts: 100 s, peak: 0.9}}]}}
"""
OLD = "fan.3 (old)"  # a name as people give them, which a regular expression takes for something else
PATHS = {name: f"acme/lyon/hall-2/line-1/{name}" for name in ("pump-1", "pump-2", OLD)}
ELSEWHERE = {"Acceleration, RMS": OLD, "sensor": "pump-1"}  # panels and annotations that have nothing to say of pump-2


def calibrated(folder: Path, bundle, name: str, scores: np.ndarray, hop_s: float) -> CalibrationRecord:
    "A calibration on the scores of healthy windows."
    db = np.sort(20 * np.log10(scores))
    record = CalibrationRecord(model=bundle.digest, hop_s=hop_s, scores_db=tuple(db.tolist()), centre_db=float(np.median(db)), threshold_db=float(db[-1] + 3), confirmations=3,
                               spacing_s=hop_s, exceedance=0.05, false_alarms_per_day=1.0, supported=True, quiet_s=60, gap_s=60)
    (folder / f"{name}.json").write_text(record.to_json())
    return record


class Plant:
    "A site at work, and what is asked of it."

    def __init__(self, folder: Path, make_bundle, stack: ExitStack):
        self.stack, self.folder = stack, folder
        self.influx = influx(folder / "influx", hours=168)
        stack.callback(self.influx.close)
        start = datetime.now(UTC) - timedelta(minutes=5.5)
        self.looks = list(parse(SCENARIO.format(start=start.isoformat(timespec="seconds"))).stream())
        site = self.site = self._records(folder / "site", make_bundle)
        broker = stack.enter_context(EmbeddedBroker())
        ports = {name: free_port() for name in ("sinks_metrics_port", "updater_metrics_port", "loop_metrics_port")}
        self.settings = site.settings(broker.url, engine_url="embedded:", tsdb_url=self.influx.url, influx_token=self.influx.token, unsigned_bundles=True, shadow_windows=100_000,
                                      rollout_free_mb=1, **ports)
        same = {k: getattr(self.settings, k) for k in ("engine_url", "tsdb_url", "influx_token", "unsigned_bundles", "shadow_windows", "rollout_free_mb", *ports)}
        agent = site.service("agent", broker.url, **same).wait_ready(lambda: "pdm_agent_ready 1.0" in site.metrics(), 60)
        stack.callback(agent.stop)
        for name in ("sinks", "updater"):
            child = site.service(name, broker.url, **same)
            child.wait_ready(lambda port=ports[f"{name}_metrics_port"]: answers(f"http://127.0.0.1:{port}/healthz"), 60)
            stack.callback(child.stop)
        self._watch(ports)
        self._run(broker)
        self._loop()
        self.wait_until_written()

    def _records(self, folder: Path, make_bundle) -> Site:
        fast = make_bundle(rate_hz=5120.0, samples=5120)
        slow = make_bundle(name="process", channels=("bearing_de_c", "bearing_nde_c"), units=("C", "C"), rate_hz=1.0, samples=10)
        short = make_bundle(name="fan", rate_hz=2560.0, samples=256)
        site = Site(folder, fast)
        healthy = [look.window for look in self.looks if look.truth.why == "healthy"]

        def scores(stream: str) -> np.ndarray:
            return np.array([np.sqrt((w.samples.astype(float) ** 2).mean(1)).mean() for w in healthy if w.stream == stream])

        record = calibrated(folder, fast, "vibration", scores("vibration"), 1.0)
        calibrated(folder, slow, "process", scores("process"), 10.0)
        calibrated(folder, short, "fan", np.linspace(0.9, 1.1, 50), 0.1)
        bearing = self._bearing()
        pumps = [{"path": PATHS[p], "machine_class": "group2_rigid", "bearings": {"one": bearing}, "streams": {
            "vibration": {"bundle": str(fast.path), "calibration": "vibration.json", "bearing": "one"}, "process": {"bundle": str(slow.path), "calibration": "process.json"}}}
            for p in ("pump-1", "pump-2")]
        site.write([*pumps, {"path": PATHS[OLD], "streams": {"vibration": {"bundle": str(short.path), "calibration": "fan.json"}}}])
        # a challenger for the pumps, which hears the same a little louder
        settings = site.settings("embedded:")
        examples = np.stack([w.samples for w in healthy if w.stream == "vibration"][:20])
        louder = write_bundle(settings.bundles_dir, rms_graph(2, 5120, 1.01, 0), Contract(**{**fast.contract.model_dump(), "revision": 1}), examples)
        beside = louder.path.with_name(f"{louder.digest}.calibration")
        beside.mkdir()
        for p in ("pump-1", "pump-2"):
            own = record.model_copy(update={"model": louder.digest, "asset": PATHS[p]})
            (beside / f"{PATHS[p].replace('/', '.')}.calibration.json").write_text(own.to_json())
        settings.desired_file.write_text(louder.digest)
        return site

    def _bearing(self) -> dict:
        scenario = parse(SCENARIO.format(start="2026-01-05T00:00:00Z"))
        b = scenario.types["pump"].built.bearing
        return {"balls": b.balls, "ball_diameter_mm": b.ball_diameter_mm, "pitch_diameter_mm": b.pitch_diameter_mm, "contact_angle_deg": b.contact_angle_deg}

    def _watch(self, ports: dict[str, int]) -> None:
        "A board with a temperature, and Prometheus."
        exporter, program = need("prometheus prometheus-node-exporter", "prometheus-node-exporter", "prometheus")
        sensors = {"thermal/thermal_zone0/type": "CPU-therm", "thermal/thermal_zone0/temp": "51500", "thermal/thermal_zone0/policy": "step_wise",
                   "hwmon/hwmon0/name": "ina3221", "hwmon/hwmon0/temp1_input": "48000"}
        for name, content in sensors.items():
            file = self.folder / "sys/class" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content + "\n")
        node, self.port = free_port(), free_port()
        collectors = [f"--collector.{c}" for c in ("disable-defaults", "filesystem", "meminfo", "thermal_zone", "hwmon")]
        child = Child([exporter, f"--web.listen-address=127.0.0.1:{node}", f"--path.sysfs={self.folder}/sys", *collectors], self.folder / "node.log")
        self.stack.callback(child.wait_ready(lambda: answers(f"http://127.0.0.1:{node}/metrics")).stop)
        targets = {"agent": self.site.metrics_port, "sinks": ports["sinks_metrics_port"], "updater": ports["updater_metrics_port"], "loop": ports["loop_metrics_port"],
                   "node": node, "prometheus": self.port}
        rules = [str(ROOT / "edge/prometheus/rules/recording.yml")]
        config = {"global": {"scrape_interval": "1s", "evaluation_interval": "1s"}, "rule_files": rules, "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}"], "labels": {"site": "lyon"}}]} for job, port in targets.items()]}
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        child = Child([program, f"--config.file={self.folder}/prometheus.yml", f"--storage.tsdb.path={self.folder}/tsdb", f"--web.listen-address={'' if SEEN_FROM_GRAFANA else '127.0.0.1'}:{self.port}"],
                      self.folder / "prometheus.log")
        self.stack.callback(child.wait_ready(lambda: answers(f"http://127.0.0.1:{self.port}/-/ready")).stop)
        wait_for(lambda: self.prometheus("up"))

    def _run(self, broker) -> None:
        "The plant's five minutes, as fast as they are acknowledged; people look at the first alarm; and some messages that are no good."
        rng = np.random.default_rng(0)
        with SensorClient(broker.url, resend_s=1.0) as client:
            opened = {}
            for path in PATHS.values():
                for stream, rate_hz, channels, unit in ((("vibration", 5120.0, ["h", "v"], "g"), ("process", 1.0, ["bearing_de_c", "bearing_nde_c"], "C")) if "pump" in path
                                                        else (("vibration", 2560.0, ["h", "v"], "g"),)):
                    opened[path, stream] = client.open(path, stream, rate_hz, channels, [unit] * len(channels))
            long_ago = self.looks[0].window.t0_ns - 30 * 86_400 * 10**9
            opened[PATHS["pump-1"], "process"].send(np.full((2, 10), 50, np.float32), t0_ns=long_ago)  # older than InfluxDB keeps anything
            for k in range(100):
                opened[PATHS[OLD], "vibration"].send(rng.normal(0, 1, (2, 256)).astype(np.float32), t0_ns=time.time_ns() - (200 - k) * 10**8)
            wait_for(lambda: any(r["metric"]["state"] == "shadow" for r in self.prometheus("pdm_rollout_candidate")), 90)
            for k, look in enumerate(self.looks):
                opened[str(look.path), look.window.stream].send(look.window.samples, t0_ns=look.window.t0_ns, conditions=look.window.conditions)
                if k == len(self.looks) * 9 // 10:
                    client.flush(60)
                    self._people()
            client.flush(60)
        with closing(broker.client("stranger", session_s=0)) as bus:
            bus.connect()
            assert bus.publish_wait(topic(AssetPath.parse(PATHS["pump-1"]), "vibration", "window"), b"no window at all")

    def _people(self) -> None:
        def tell(**command) -> None:
            body = json.dumps({"asset": PATHS["pump-2"], "by": "mia", **command}).encode()
            urlopen(Request(f"http://127.0.0.1:{self.site.metrics_port}/alarms", body, {"Content-Type": "application/json"}), timeout=30).read()

        wait_for(lambda: self.influx.query("SELECT * FROM \"event\" WHERE kind = 'diagnosed'"), 60)
        tell(action="acknowledge")
        tell(action="label", reason="damage", fault="outer_race")
        tell(action="clear")

    def _loop(self) -> None:
        "One evaluation of the loop, over what the sinks would have put into the SQLite store."
        with self.site.reader() as journal:
            rows = [r for path in PATHS.values() for stream in ("vibration", "process") for r in journal.verdicts(path, stream)]
        store = SqliteStore(self.settings.state_dir / "store.db")
        store.write(rows)
        store.close()
        metrics = LoopMetrics()
        with Logbook(self.settings.logbook_file) as book:
            controller_of(self.settings.model_copy(update={"tsdb_url": "sqlite:"}), book, metrics=metrics).decide(time.time_ns())
        self.stack.callback(Page(metrics.registry, self.settings.loop_metrics_port, "127.0.0.1", list, list).close)

    def wait_until_written(self) -> None:
        with self.site.reader() as journal:
            count = sum(len(list(journal.verdicts(path, "vibration"))) for path in PATHS.values())
        wait_for(lambda: sum(s["values"][0][1] for s in self.influx.query("SELECT count(score) FROM health WHERE stream = 'vibration'")) == count, 60)
        wait_for(lambda: self.prometheus("pdm_loop_drift") and self.prometheus("pdm_dead_letters_total") and self.prometheus("pdm_sink_dead_letters_total"), 30)
        time.sleep(3)  # scrapes, so that rates are of more than one value

    def prometheus(self, expr: str, instant: bool = True) -> list:
        now = time.time()
        how = {"time": now} if instant else {"start": now - 300, "end": now, "step": 2}
        try:
            answer = json.load(urlopen(f"http://127.0.0.1:{self.port}/api/v1/query{'' if instant else '_range'}?{urlencode({'query': expr, **how})}", timeout=30))
        except HTTPError as e:
            raise AssertionError(e.read().decode()) from None
        return answer["data"]["result"]

    def influxql(self, query: str) -> list:
        "Series, as Grafana gets them: through the door that asks for the token."
        asked = Request(f"http://127.0.0.1:{self.influx.port}/query?{urlencode({'db': self.influx.bucket, 'epoch': 'ms', 'q': query})}", headers={"Authorization": f"Token {self.influx.token}"})
        result = json.load(urlopen(asked, timeout=30))["results"][0]
        assert "error" not in result, result["error"]
        return result.get("series", [])

    def finds(self, target: dict, chosen: dict[str, str]) -> list[float | str]:
        "The values that a query comes back with."
        if target.get("datasource", {}).get("type") == "prometheus":
            result = self.prometheus(filled(target["expr"], chosen), bool(target.get("instant")))
            return [v for r in result for _, text in ([r["value"]] if "value" in r else r["values"]) if math.isfinite(v := float(text))]
        series = self.influxql(filled(target["query"], chosen))
        return [v for s in series for row in s["values"] for name, v in zip(s["columns"], row, strict=True) if name != "time" and v is not None]


def filled(query: str, chosen: dict[str, str]) -> str:
    "What Grafana makes of a query: the range is half an hour, and each variable what is chosen."
    fixed = {"$timeFilter": "time >= now() - 30m AND time <= now()", "$__interval": "10s", "$__rate_interval": "20s", "$__range": "1800s"}
    for name, value in sorted(fixed.items(), reverse=True):
        query = query.replace(name, value)
    def value(m: re.Match) -> str:  # what is meant as "all" is an expression, and stays one
        return chosen[m[1]] if chosen[m[1]] in (".+", ".*") else re.sub(r"[\\^$*+?.()|[\]{}/]", r"\\\g<0>", chosen[m[1]])

    query = re.sub(r"\$\{(\w+):regex\}", value, query)
    assert not re.search(r"\$[a-z_{]", query), query
    return query


def chosen(asset: str = "pump-2", everything: bool = False) -> dict[str, str]:
    levels = {v: ".+" for v in LEVELS} | {"asset": asset} if everything else dict(zip(LEVELS, PATHS[asset].split("/"), strict=True))
    return levels | {"stream": ".+", "place": ".*" if everything else "lyon"}


@pytest.fixture(scope="module")
def plant(tmp_path_factory, make_bundle):
    try:
        find_environment()
    except PartMissing as e:
        pytest.skip(str(e))
    with ExitStack() as stack:
        yield Plant(tmp_path_factory.mktemp("plant"), make_bundle, stack)


TARGETS = [pytest.param(p["title"], t, id=f"{uid.removeprefix('predmaint-')}/{p['title']}/{t['refId']}") for uid, d in BUILT.items() for p in d["panels"] for t in p["targets"]]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("everything", [False, True], ids=["one", "all"])
@pytest.mark.parametrize("title,target", TARGETS)
def test_a_panels_query_finds_something_in_a_site_at_work(plant, title, target, everything):
    assert plant.finds(target, chosen(ELSEWHERE.get(title, "pump-2"), everything)), filled(target.get("expr") or target["query"], chosen())


@pytest.mark.parametrize("note", [e for d in BUILT.values() for e in d["annotations"]["list"]], ids=lambda e: e["name"])
def test_an_annotations_query_finds_what_happened_and_the_columns_that_it_shows(plant, note):
    target = note["target"]
    (series,) = plant.influxql(filled(target["query"], chosen(ELSEWHERE.get(note["name"], "pump-2"))))
    assert {target["textColumn"], target["tagsColumn"]} <= set(series["columns"])
    text = series["columns"].index(target["textColumn"])
    assert all(row[text] for row in series["values"])


@pytest.mark.parametrize("uid", BUILT)
def test_a_variable_offers_what_there_is(plant, uid):
    for v in BUILT[uid]["templating"]["list"]:
        if v["datasource"]["type"] == "influxdb":
            found = {value for s in plant.influxql(filled(v["query"], chosen())) for _, value in s["values"]}
            assert chosen()[v["name"]] in found or (v["name"] == "stream" and found == {"vibration", "process"}), v["name"]
        else:
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", v["query"]).groups()
            assert {r["metric"][label] for r in plant.prometheus(metric)} == {"lyon"}


def test_the_plants_table_joins_both_sources_and_has_the_worn_pump_on_top(plant):
    "What Grafana's `merge` does: rows are one where all columns that they share are alike."
    table = next(p for p in BUILT["predmaint-plant"]["panels"] if p["type"] == "table")
    lines: dict[tuple, dict] = {}
    for t in table["targets"]:
        if "expr" in t:
            for r in plant.prometheus(filled(t["expr"], chosen(everything=True) | {"asset": ".+"})):
                assert set(r["metric"]) == set(LEVELS)
                lines.setdefault(tuple(r["metric"][v] for v in LEVELS), {})[f"Value #{t['refId']}"] = float(r["value"][1])
        else:
            for s in plant.influxql(filled(t["query"], chosen(everything=True))):
                lines.setdefault(tuple(s["tags"][v] for v in LEVELS), {}).update(zip(s["columns"][1:], s["values"][0][1:], strict=True))
    assert {"/".join(k) for k in lines} == set(PATHS.values())
    worn, well = (lines[tuple(PATHS[p].split("/"))] for p in ("pump-2", "pump-1"))
    assert set(worn) == {"Value #A", "Value #B", "Value #C", "Value #D", "Value #E", "velocity", "zone", "temperature"}
    assert worn["Value #A"] == 1 and worn["Value #B"] > well["Value #B"] == 0 and worn["Value #C"] > 1 > well["Value #C"]
    assert worn["velocity"] > well["velocity"] > 0 and 10 < worn["temperature"] < 100 and worn["Value #D"] < 600


def test_zones_are_held_against_the_limits_of_the_machines_class(plant):
    found = {(r["metric"]["asset"], r["metric"]["boundary"]): float(r["value"][1]) for r in plant.prometheus("pdm_iso_limit_mm_s")}
    assert found == {(PATHS[p], b): limit for p in ("pump-1", "pump-2") for b, limit in zip(("A/B", "B/C", "C/D"), ISO_LIMITS_MM_S["group2_rigid"], strict=True)}
    (series,) = plant.influxql("SELECT velocity_mm_s, velocity_mm_s_h, velocity_mm_s_v, iso_zone FROM health WHERE asset = 'pump-2' AND stream = 'vibration'")
    v = np.array([row[1:] for row in series["values"]], float)
    np.testing.assert_array_equal(v[:, 0], v[:, 1:3].max(1))
    np.testing.assert_array_equal(v[:, 3], np.searchsorted(ISO_LIMITS_MM_S["group2_rigid"], v[:, 0]))
    assert len(set(v[:, 3])) > 1, "it wears from one zone into the next"


# in Grafana itself, where there is one


class Grafana:
    "A server that somebody else runs, told of the plant's two stores and of the dashboards."

    def __init__(self, url: str, plant: Plant):
        self.at = urlsplit(url)
        host = SEEN_FROM_GRAFANA or "127.0.0.1"
        prometheus, influxdb = yaml.safe_load((GRAFANA / "provisioning/datasources/predmaint.yml").read_text())["datasources"]
        prometheus["url"], influxdb["url"] = f"http://{host}:{plant.port}", f"http://{host}:{plant.influx.port}"
        influxdb["jsonData"]["dbName"] = plant.influx.bucket
        influxdb["secureJsonData"] = {"httpHeaderValue1": f"Token {plant.influx.token}"}
        for source in (prometheus, influxdb):
            if self.ask(f"/api/datasources/uid/{source['uid']}", missing=True):
                self.ask(f"/api/datasources/uid/{source['uid']}", method="DELETE")
            self.ask("/api/datasources", source)
        for built in BUILT.values():
            self.ask("/api/dashboards/db", {"dashboard": built, "overwrite": True})

    def ask(self, path: str, body: dict | None = None, method: str | None = None, missing: bool = False) -> Any:
        login = base64.b64encode(f"{self.at.username}:{self.at.password}".encode()).decode()
        asked = Request(f"{self.at.scheme}://{self.at.hostname}:{self.at.port}{path}", body and json.dumps(body).encode(),
                        {"Authorization": f"Basic {login}", "Content-Type": "application/json"}, method=method)
        try:
            with urlopen(asked, timeout=90) as answer:
                return json.load(answer) if "json" in answer.headers["Content-Type"] else answer.read()
        except HTTPError as e:
            if missing and e.code == 404:
                return None
            raise AssertionError(f"{path}: {e.code} {e.read().decode()[:500]}") from None


@pytest.fixture(scope="module")
def grafana_server():
    if not (url := os.environ.get("PREDMAINT_TEST_GRAFANA_URL")):
        pytest.skip("no Grafana: name one in PREDMAINT_TEST_GRAFANA_URL (http://admin:password@host:3000), with an image renderer beside it")
    return url


@pytest.fixture(scope="module")
def in_grafana(grafana_server, plant):
    return Grafana(grafana_server, plant)


def test_grafana_takes_each_dashboard_as_it_is(in_grafana):
    for uid, built in BUILT.items():
        taken = in_grafana.ask(f"/api/dashboards/uid/{uid}")["dashboard"]
        assert [p["title"] for p in taken["panels"]] == [p["title"] for p in built["panels"]]


@pytest.mark.parametrize("title,target", TARGETS)
def test_grafana_finds_something_for_each_query_of_a_panel(in_grafana, title, target):
    choice = chosen(ELSEWHERE.get(title, "pump-2"))
    text = "expr" if "expr" in target else "query"
    # what is chosen is filled in by the page, and what begins with __ by the server
    query = {**target, text: re.sub(r"\$\{(\w+):regex\}", lambda m: choice[m[1]], target[text]), "intervalMs": 10_000, "maxDataPoints": 200}
    answer = in_grafana.ask("/api/ds/query", {"queries": [query], "from": "now-30m", "to": "now"})["results"][target["refId"]]
    assert answer["status"] == 200 and any(values for f in answer["frames"] for values in f["data"]["values"]), answer


PANELS = [pytest.param(uid, p, id=f"{uid.removeprefix('predmaint-')}/{p['title']}") for uid, d in BUILT.items() for p in d["panels"] if p["targets"]]


@pytest.mark.parametrize("uid,panel", PANELS)
def test_grafana_draws_each_panel(in_grafana, uid, panel):
    "The pictures lie in build/grafana, for people."
    known = {v["name"] for v in BUILT[uid]["templating"]["list"]}
    choice = {f"var-{k}": v for k, v in chosen(ELSEWHERE.get(panel["title"], "pump-2")).items() if k in known}
    png = in_grafana.ask(f"/render/d-solo/{uid}?{urlencode({'panelId': panel['id'], 'width': 800, 'height': 400, 'from': 'now-30m', 'to': 'now', **choice})}")
    assert png.startswith(b"\x89PNG") and len(png) > 2000
    out = ROOT / "build/grafana"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{uid}-{panel['id']}.png").write_bytes(png)
