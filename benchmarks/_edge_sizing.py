"""How large a site may be: a part of edge.py. All of a site's programs run as processes of this machine, configured as they are shipped where that is possible:
mosquitto with TLS and its access lists (edge/mosquitto), agent, sinks and updater as `predmaint` starts them, Triton on the processor, Prometheus with the rules of
edge/prometheus, Alertmanager, node exporter. Windows go to Triton in the message, as between pods, not through shared memory.

Two things are not as on a site, and the tables name them: InfluxDB is Debian's 1.6.7 behind nginx, and the memory of Prometheus is that of a second one, which in half a
minute is given the pages of the site's programs as often as in two hours. Grafana is in no package here.

`sustained`: the highest of some shares of the limit at which acknowledgements come within a second and InfluxDB is not left behind.
"""

import os
import re
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import psutil
import yaml
from _edge_parts import STREAM, Edge, Publisher, cpu_s, latencies_ms, steady_rate

from pdm.data.archive import Archive
from pdm.data.synth import Machine, Resonance, bearing_signal
from pdm.errors import PartMissing
from pdm.model.bundle import Bundle, CalibrationRecord, read_record
from pdm.model.detector import Detector
from pdm.process import Child, find_program, free_port
from pdm.serve.server import TritonServer
from pdm.signal.kinematics import Bearing
from pdm.stream.journal import JournalReader

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {"mosquitto": "mosquitto", "influxd": "influxdb", "nginx": "nginx-light", "prometheus": "prometheus",
            "prometheus-alertmanager": "prometheus-alertmanager", "prometheus-node-exporter": "prometheus-node-exporter"}
SHARES = (0.9, 0.75, 0.6, 0.45, 0.3)  # of the limit, tried in turn
PROMPT_MS = 1000.0                    # within which a window is acknowledged, 99 of 100, at a rate that is sustained
SCRAPES = 480                         # in two hours, one every 15 s
MIB = 1 << 20


@dataclass(frozen=True)
class Shape:
    "A kind of window."
    channels: int
    samples: int
    rate_hz: float

    @property
    def names(self) -> list[str]:
        return ["h", "v"] if self.channels == 2 else [f"t{i}" for i in range(self.channels)]

    @property
    def units(self) -> list[str]:
        return ["g" if self.channels == 2 else "degC"] * self.channels

    @property
    def hop_s(self) -> float:
        return self.samples / self.rate_hz

    def windows(self, n: int) -> np.ndarray:
        "Of a healthy machine: two axes of vibration, or slow values that wander."
        if self.channels == 2:
            machine = Machine(Bearing(8, 5.97, 31.62), (Resonance(2900, 0.05), Resonance(7300, 0.03, 0.6)), noise_g=0.7)
            x = np.stack([bearing_signal(machine, 1500.0, self.rate_hz, n * self.hop_s, seed=seed)[0] for seed in (1, 2)])
        else:
            x = 60 + 0.02 * np.random.default_rng(1).normal(0, 1, (self.channels, n * self.samples)).cumsum(axis=1)
        return x.reshape(self.channels, n, self.samples).swapaxes(0, 1).astype(np.float32)


SHAPES = {"2 x 2560 at 25.6 kHz": Shape(2, 2560, 25_600.0), "2 x 25600 at 25.6 kHz": Shape(2, 25_600, 25_600.0), "10 x 10 at 1 Hz": Shape(10, 10, 1.0)}


@dataclass(frozen=True)
class Size:
    "How long everything takes."
    limit_s: float
    trial_s: float
    overload_s: float
    load_s: float   # of memory's load
    samples: int    # of a series of Prometheus
    assets: tuple[int, ...]

    @property
    def middle(self) -> int:
        return self.assets[len(self.assets) // 2]


FULL, QUICK = Size(4.0, 8.0, 60.0, 15.0, SCRAPES, (1, 50, 200)), Size(0.5, 1.0, 3.0, 1.0, 20, (1, 2, 4))


class Fitted:
    "A bundle for a shape, and the windows that are sent."
    def __init__(self, folder: Path, shape: Shape, seed: int = 0):
        self.shape, self.windows = shape, folder / "windows.npy"
        folder.mkdir(parents=True, exist_ok=True)
        if not self.windows.exists():
            np.save(self.windows, shape.windows(120))
        self.bundle, self.record = self.fit(folder / "bundles", seed)

    def fit(self, folder: Path, seed: int) -> tuple[Bundle, CalibrationRecord]:
        "Weights cost the same whatever they are, so that one epoch will do."
        s = self.shape
        detector = Detector.fit(np.load(self.windows), rate_hz=s.rate_hz, channels=s.names, units=s.units, hop_s=s.hop_s, kind="conv_ae", epochs=1, seed=seed, name="sizing")
        bundle, written = detector.export(folder)
        record = read_record(written)
        beside = folder / f"{bundle.digest}.calibration"
        beside.mkdir(exist_ok=True)
        (beside / "calibration.json").write_text(record.to_json())  # for all assets of the type
        return bundle, record


class Site:
    "All programs of a site, for so many assets. Close it."
    def __init__(self, folder: Path, fitted: Fitted, assets: int):
        sys.path.insert(0, str(ROOT / "tests"))
        from edge_broker import Door
        from servers import Influx, wait_for

        self.folder, self.fitted, self.name = folder, fitted, f"s{secrets.token_hex(3)}"
        self.line = f"bench/edge/rig/{self.name}"
        folder.mkdir(parents=True)
        with ExitStack() as stack:
            sends = [f"topic write pdm/v1/{self.line}/machine-{i:04d}/{STREAM}/window" for i in range(assets)]  # a gateway's list, as sensors.acl shows it
            self.door = Door(folder / "mosquitto", "\n".join(["", f"user {self.line}", *sends, ""]))
            stack.callback(self.door.close)
            os.environ["INFLUXDB_DATA_CACHE_SNAPSHOT_WRITE_COLD_DURATION"] = "3s"  # what it has taken is in its files soon, so that they can be measured
            self.influx = Influx(folder / "influx", retention="90d")
            stack.callback(self.influx.close)
            self.triton = stack.enter_context(TritonServer(log=folder / "triton.log"))
            self.alertmanager = self._alertmanager(stack)
            ports = {name: free_port() for name in ("sinks", "updater")}
            by_name = f"triton.localhost:{self.triton.address.rpartition(':')[2]}"  # not 127.0.0.1: then windows go in the message
            self.edge = Edge(folder, self.name, self.door.url("agent"), (by_name, self.triton.repository), fitted.bundle, fitted.record, assets,
                             tsdb_url=self.influx.url, influx_token=self.influx.token, alert_urls=[f"http://127.0.0.1:{self.alertmanager[1]}"],
                             archive_url=f"file:{folder}/archive", archive_pause_s=5, unsigned_bundles=True, agent_id="agent", probation_minutes=0.02,
                             sinks_metrics_port=ports["sinks"], updater_metrics_port=ports["updater"])
            stack.callback(self.edge.close)
            self.state = self.edge.folder / "data"
            self.state.mkdir(exist_ok=True)
            self.want(fitted.bundle)
            self.sinks = stack.enter_context(self._program("sinks"))
            self.updater = stack.enter_context(self._program("triton", "run", name="updater"))
            exporter, self.port = free_port(), free_port()
            node = stack.enter_context(Child([find_program("prometheus-node-exporter"), f"--web.listen-address=127.0.0.1:{exporter}"], folder / "node.log"))
            self.targets = {"agent": self.edge.port, **ports, "triton": int(self.triton.metrics_url.rpartition(":")[2].partition("/")[0]),
                            "influxdb": self.influx.inner, "prometheus": self.port, "alertmanager": self.alertmanager[1], "node": exporter}
            prometheus = stack.enter_context(self.prometheus("prometheus", self.port, 15.0, {job: (port, "metrics") for job, port in self.targets.items()}))
            self.edge.ready()
            wait_for(lambda: "pdm_sink_lag_rows" in page(ports["sinks"]) and page(self.port), 60)
            self._sinks_port = ports["sinks"]
            self.pids = {"mosquitto": self.door.child.pid, "agent": self.edge.child.pid, "triton": self.triton.pid, "sinks": self.sinks.pid, "updater": self.updater.pid,
                         "influxdb": self.influx.children[0].pid, "nginx": self.influx.children[1].pid, "prometheus": prometheus.pid,
                         "alertmanager": self.alertmanager[0].pid, "node-exporter": node.pid}
            self._stack = stack.pop_all()

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> "Site":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def want(self, bundle: Bundle) -> None:
        (self.state / "desired").write_text(f"{bundle.digest}\n")

    def _program(self, *command: str, name: str = "") -> Child:
        return Child([sys.executable, "-m", "pdm.cli", *command], self.folder / f"{name or command[0]}.log", name=name or command[0], cwd=self.edge.folder,
                     env={"PREDMAINT_SETTINGS": str(self.edge.folder / "predmaint.toml")})

    def _alertmanager(self, stack: ExitStack) -> tuple[Child, int]:
        text, port = (ROOT / "edge/alertmanager/alertmanager.yml").read_text(), free_port()
        file = self.folder / "alertmanager.yml"
        file.write_text(re.sub(r"url_file: /run/secrets/alertmanager/\S+", "url: http://127.0.0.1:9/", text))  # 0.25 knows no url_file; nobody is called
        child = Child([find_program("prometheus-alertmanager"), f"--config.file={file}", f"--storage.path={self.folder}/alertmanager", "--cluster.listen-address=",
                       f"--web.listen-address=127.0.0.1:{port}"], self.folder / "alertmanager.log")
        return stack.enter_context(child), port

    def prometheus(self, name: str, port: int, every_s: float, targets: Mapping[str, tuple[int, str]]) -> Child:
        "With the rules and jobs that are shipped, each job's page at a port and path."
        where = self.folder / name
        shutil.copytree(ROOT / "edge/prometheus", where)
        config = yaml.safe_load((where / "prometheus.yml").read_text())
        every = f"{round(1000 * every_s)}ms"
        config["global"] |= {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every}
        config["alerting"]["alertmanagers"] = [{"static_configs": [{"targets": [f"127.0.0.1:{self.alertmanager[1]}"]}]}]
        config["scrape_configs"] = [job for job in config["scrape_configs"] if job["job_name"] in targets]
        for job in config["scrape_configs"]:
            at, path = targets[job["job_name"]]
            job["static_configs"][0]["targets"], job["metrics_path"] = [f"127.0.0.1:{at}"], f"/{path}"
        (where / "prometheus.yml").write_text(yaml.safe_dump(config))
        return Child([find_program("prometheus"), f"--config.file={where}/prometheus.yml", f"--storage.tsdb.path={where}/data", "--web.enable-admin-api",
                      f"--web.listen-address=127.0.0.1:{port}"], self.folder / f"{name}.log")

    def publish(self, seconds: float, **how: Any) -> Publisher:
        "The sensors of the line: one connection with the line's certificate, as a gateway has."
        s = self.fitted.shape
        return Publisher(self.folder, self.door.url(self.line), self.edge.assets, seconds, windows=str(self.fitted.windows), client_id=self.line,
                         rate_hz=s.rate_hz, channels=s.names, units=s.units, **how)

    def lag(self) -> float:
        "Verdicts that are in the journal and not in InfluxDB."
        written, told = value(page(self._sinks_port), 'pdm_sink_rows_total{sink="influx"}'), self.edge.page()
        return np.nan_to_num(sum(np.nan_to_num(value(told, f'pdm_windows_total{{result="{r}"}}')) for r in ("scored", "late")) - np.nan_to_num(written)).clip(0).item()

    def stored(self) -> int:
        "Windows in InfluxDB."
        series = self.influx.query("SELECT count(score) FROM health")
        return series[0]["values"][0][1] if series else 0


def page(port: int) -> str:
    try:
        return urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    except (URLError, OSError):
        return ""


@contextmanager
def replayed(pages: Mapping[str, Sequence[str]]):
    "A server that has one after the other of the pages that were kept, at /<job>; its port."
    asked = dict.fromkeys(pages, 0)
    kept = {job: [p.encode() for p in told] for job, told in pages.items()}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            job = self.path.strip("/")
            body, asked[job] = kept[job][asked[job] % len(kept[job])], asked[job] + 1
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(BrokenPipeError):  # it did not wait
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def value(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)
    return float(found[1]) if found else float("nan")


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def memory(pids: Mapping[str, int]) -> dict[str, dict[str, float]]:
    "Of each process with its children, MiB: what is resident now (RSS), and the most that ever was (VmHWM). What two of them map counts twice, as it may in two pods."
    found = {}
    for name, pid in pids.items():
        p = psutil.Process(pid)
        family = (p, *p.children(recursive=True))
        most = sum(int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{q.pid}/status").read_text())[1]) for q in family)
        found[name] = {"now": round(sum(q.memory_info().rss for q in family) / MIB, 1), "most": round(most / 1024, 1)}
    return found


def measure(folder: Path, quick: bool) -> dict[str, Any]:
    "All of it, as tables."
    if missing := [package for program, package in PROGRAMS.items() if find_program(program) is None]:
        raise PartMissing(f"programs of a site are missing here: apt-get install {' '.join(missing)}")
    size, load = QUICK if quick else FULL, os.getloadavg()[0]
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    tables: dict[str, Any] = {"machine": {"processor": model[1] if model else "unknown", "cores": os.cpu_count(), "memory, MiB": psutil.virtual_memory().total // MIB,
                                          "load before": round(load, 2)},
                              "windows": {}, "memory": {}}
    first = None
    for name, shape in SHAPES.items():
        with timed(name):
            fitted = Fitted(folder / f"{shape.channels}x{shape.samples}", shape)
            first = first or fitted
            with Site(folder / f"rate-{shape.channels}x{shape.samples}", fitted, size.middle) as site:
                tables["windows"][name] = row = throughput(site, size)
                if fitted is first:
                    with timed("twice the load"):
                        tables["twice the load"] = twice(site, size, row["sustained, windows a second"])
    sustained = tables["windows"][next(iter(SHAPES))]["sustained, windows a second"]
    for n in size.assets:
        with timed(f"{n} assets"):
            with Site(folder / f"memory-{n}", first, n) as site:
                tables["memory"][str(n)] = memory_of(site, size, n, min(10.0 * n, sustained / 2))
                if n == size.middle:
                    tables["disk"] = disk_of(site)
                    tables["a second version"] = second_version(site, sustained / 4)
                if n == max(size.assets):
                    tables["without Triton"] = fallback(site, sustained / 4)
    return tables


@contextmanager
def timed(what: str):
    since = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - since:.1f} s", file=sys.stderr, flush=True)


def throughput(site: Site, size: Size) -> dict[str, Any]:
    "The limit, and what is sustained."
    n, warm_s = len(site.edge.assets), size.limit_s / 4
    limit = steady_rate([site.edge], site.publish(size.limit_s + warm_s, window=min(max(1, 512 // n), fitting(site))).result(), warm_s)
    found: dict[str, Any] = {"bytes on the wire": wire_bytes(site), "limit, windows a second": round(limit)}
    for share in SHARES:
        catch_up(site)
        rate, before = limit * share, cpu_s(site.pids)
        publisher = site.publish(size.trial_s, rate=rate)
        sent = publisher.result()
        lag, after = site.lag(), cpu_s(site.pids)
        _, told = latencies_ms(site.edge, sent, warm_s)
        p50, p99 = np.percentile(told, (50, 99))
        if (p99 <= PROMPT_MS and lag <= 2 * rate) or share == SHARES[-1]:
            catch_up(site)
            after["sinks"], after["influxdb"] = (v for k, v in cpu_s(site.pids).items() if k in ("sinks", "influxdb"))
            break
    return found | {"share of the limit": share, "sustained, windows a second": round(rate), "p50, ms": round(float(p50), 1), "p99, ms": round(float(p99), 1),
                    "InfluxDB behind, rows": round(lag), "processor, ms a window": {k: round(1e3 * (after[k] - before[k]) / sent["sent"], 4) for k in before}
                    | {"sensors": round(1e3 * sent["cpu_s"] / sent["sent"], 4)}}


def catch_up(site: Site, timeout_s: float = 60.0) -> float:
    "Seconds until InfluxDB has everything."
    since = time.monotonic()
    while site.lag() > 0:
        if time.monotonic() - since > timeout_s:
            raise PartMissing(f"InfluxDB was {site.lag():.0f} rows behind after {timeout_s:g} s: see {site.folder}/sinks.log")
        time.sleep(0.1)
    return time.monotonic() - since


def wire_bytes(site: Site) -> int:
    "Of one window's payload."
    from pdm.data.window import Window, encode

    s = site.fitted.shape
    return len(encode(Window(STREAM, 1 << 62, 1000, 1000, time.time_ns(), s.rate_hz, tuple(s.names), tuple(s.units), np.load(site.fitted.windows)[0])))


def fitting(site: Site) -> int:
    "The largest W with which all that is under way fits into what the broker queues for the agent: what does not, it may drop."
    queued = int(re.search(r"(?m)^max_queued_bytes (\d+)", (ROOT / "edge/mosquitto/mosquitto.conf").read_text())[1])
    return min(64, max(1, queued // (len(site.edge.assets) * wire_bytes(site))))


def twice(site: Site, size: Size, sustained: float) -> dict[str, Any]:
    "Twice of what is sustained for a while, with the W that is shipped, then a tenth of it; before that a quarter of the while with a W that fits the broker."
    catch_up(site)
    fits, seconds = fitting(site), size.overload_s / 4
    small = site.publish(0.0, window=fits, phases=[[2 * sustained, seconds]]).result()
    meanwhile = float(np.searchsorted(np.sort(small["told"][:, 2]), int(small["start_ns"]) + round(1e9 * seconds)) / seconds)
    catch_up(site)
    before, stored, since = len(site.edge.committed()), site.stored(), time.time_ns()
    publisher = site.publish(0.0, window=64, phases=[[sustained / 2, size.overload_s / 12], [2 * sustained, size.overload_s], [sustained / 10, size.overload_s * 5 / 6]])
    lags = []
    while publisher.process.poll() is None:
        lags.append((time.time_ns(), site.lag()))
        time.sleep(0.25)
    sent, after = publisher.result(), catch_up(site)
    start = int(sent["start_ns"])
    begin, end = (start + round(1e9 * size.overload_s * k) for k in (1 / 12, 13 / 12))
    due = np.sort(sent["due"])
    begun, told = np.sort(sent["begun"]), np.sort(sent["told"][:, 2])
    when = {(n, s): d for n, s, d in zip(sent["stream"].tolist(), sent["seq"].tolist(), sent["due"].tolist(), strict=True)}
    ages = np.array([(at - when[n, s], when[n, s]) for n, s, at in sent["told"].tolist()])
    during = ages[(ages[:, 1] >= begin) & (ages[:, 1] < end)]
    late = ages[(ages[:, 1] >= end) & (ages[:, 0] > 1e9)]

    def waiting(entered: np.ndarray, left: np.ndarray, at: int) -> int:
        return int(np.searchsorted(entered, at, "right") - np.searchsorted(left, at, "right"))

    times = np.linspace(begin, end, 61).astype(np.int64)
    prompt = next((t for t in np.arange(end, due[-1] + 10**11, 10**8) if waiting(due, told, t) <= max(1.0, sustained / 10)), due[-1])
    in_time = [n for t, n in lags if t >= end]
    keys = {(a, s) for a, s, t in site.edge.committed(since)}
    return {"offered, windows a second": round(2 * sustained), "for, s": size.overload_s, "W": 64, "streams": len(site.edge.assets),
            "acknowledged meanwhile, windows a second": round(float(np.diff(np.searchsorted(told, (begin, end)))[0] / size.overload_s)),
            "most unacknowledged": max(waiting(begun, told, t) for t in times), "W x streams": 64 * len(site.edge.assets),
            "most waiting in the sensor's program": max(waiting(due, begun, t) for t in times),
            "age at acknowledgement, median, s": round(float(np.median(during[:, 0]) / 1e9), 2), "oldest, s": round(float(during[:, 0].max() / 1e9), 2),
            "sent again": sent["resent"], "with a W that fits": {"W": fits, "for, s": seconds, "acknowledged meanwhile, windows a second": round(meanwhile), "sent again": small["resent"]},
            "back to normal after, s": round(float((prompt - end) / 1e9), 1), "windows after the end that took over 1 s": len(late),
            "InfluxDB behind at most, rows": round(max((n for _, n in lags), default=0)),
            "InfluxDB behind at the end of it, rows": round(in_time[0]) if in_time else 0, "InfluxDB has all after the last window, s": round(after, 1),
            "sent": sent["sent"], "acknowledged": len(told), "committed": len(site.edge.committed()) - before, "distinct": len(keys), "in InfluxDB": site.stored() - stored,
            "memory, MiB": {k: v["most"] for k, v in memory(site.pids).items()}}


def memory_of(site: Site, size: Size, n: int, rate: float) -> dict[str, Any]:
    "Under load; of Prometheus after as many samples as two hours have."
    seconds = max(size.load_s, 40 * n / rate)  # the agent keeps three seconds of each asset's signal: 30 windows
    publisher, pages = site.publish(seconds, rate=rate), {job: list[str]() for job in site.targets}
    while publisher.process.poll() is None:
        for job, port in site.targets.items():
            pages[job] += [told] if (told := page(port)) else []
        time.sleep(seconds / 40)
    sent, found = publisher.result(), memory({k: v for k, v in site.pids.items() if k != "prometheus"})
    port, every_s = free_port(), 0.04 if n == 1 else 0.06
    with replayed(pages) as at, site.prometheus("two-hours", port, every_s, {job: (at, job) for job in pages}) as prometheus:
        end = time.monotonic() + 3 * size.samples * every_s + 10  # it begins five seconds after its start
        while time.monotonic() < end:
            told = page(port)
            series, samples = value(told, "prometheus_tsdb_head_series"), value(told, 'prometheus_tsdb_head_samples_appended_total{type="float"}')
            if samples >= size.samples * series:
                break
            time.sleep(0.2)
        found |= memory({"prometheus": prometheus.pid})
        urlopen(Request(f"http://127.0.0.1:{port}/api/v1/admin/tsdb/snapshot", method="POST"), timeout=60).read()
    data = site.folder / "two-hours/data"
    return {"windows a second": round(rate), "sent": sent["sent"], "MiB": found, "agent's page, bytes": len(pages["agent"][-1]),
            "Prometheus": {"pages": len(pages["agent"]), "series": round(series), "samples": round(samples), "samples a series": round(samples / series),
                           "block, bytes": size_of(data / "snapshots"), "head and WAL, bytes": size_of(data / "wal") + size_of(data / "chunks_head")}}


def disk_of(site: Site) -> dict[str, Any]:
    "Bytes that a window leaves behind, once everything is written and tidied up."
    catch_up(site)
    end = time.monotonic() + 40
    while value(page_of(site, "sinks_metrics_port"), 'pdm_sink_lag_rows{sink="archive"}') > 0 and time.monotonic() < end:
        time.sleep(0.2)
    time.sleep(11)  # the agent tidies up every ten seconds; InfluxDB writes its files after three
    windows, written = site.stored(), sum(p.stat().st_size for p in (site.folder / "influx/data").rglob("*.tsm"))  # without an index whose size is fixed, 32 MiB
    archive = Archive(f"file:{site.folder}/archive")
    archive.compact(time.time_ns() + 2 * 86_400 * 10**9)
    files = list((site.folder / "archive").rglob("*.parquet"))
    with JournalReader(site.state / "journal.db") as reader:
        rows = sum(len(reader.verdicts(a, STREAM)) for a in site.edge.assets)
    kept = archive_rows(files)
    journal = value(site.edge.page(), "pdm_journal_bytes")
    return {"windows": windows, "verdicts in the journal": rows, "journal, bytes": round(journal), "journal, bytes a window": round(journal / max(rows, 1)),
            "InfluxDB, bytes": written, "InfluxDB, bytes a window": round(written / max(windows, 1), 1),
            "archive, windows": kept, "archive, bytes a window kept": round(size_of(site.folder / "archive") / max(kept, 1)),
            "archive, share kept": round(kept / max(windows, 1), 4)}


def archive_rows(files: list[Path]) -> int:
    import pyarrow.parquet

    return sum(pyarrow.parquet.read_metadata(f).num_rows for f in files)


def page_of(site: Site, setting: str) -> str:
    return page(int(re.search(rf"^{setting} = (\d+)$", (site.edge.folder / "predmaint.toml").read_text(), re.M)[1]))


def second_version(site: Site, rate: float) -> dict[str, Any]:
    "A challenger is deployed as on a site; memory while it scores beside."
    bundle, _ = site.fitted.fit(site.state / "bundles", seed=1)
    site.want(bundle)
    publisher, end, state = site.publish(60.0, rate=rate), time.monotonic() + 40, ""
    while time.monotonic() < end and state not in ("shadow", "promoted", "rolled_back"):
        found = re.findall(rf'^pdm_rollout_candidate{{digest="{bundle.digest[:12]}[^}}]*state="(\w+)"}} 1', page_of(site, "updater_metrics_port"), re.M)
        state = found[0] if found else state
        time.sleep(0.1)
    time.sleep(2.0 if state == "shadow" else 0.0)
    beside = memory(site.pids)
    publisher.process.kill()
    publisher.process.wait()
    return {"state": state, "MiB": beside}


def fallback(site: Site, rate: float) -> dict[str, float]:
    "The agent's memory when it scores by itself."
    site.triton.stop()
    site.publish(5.0, rate=rate).result()
    return memory({"agent": site.pids["agent"]})["agent"]
