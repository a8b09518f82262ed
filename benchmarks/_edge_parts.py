"The parts of benchmarks/edge.py: a bundle, agents as processes, their sensors, and what a process, a journal or a metrics page tells."

import json
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
import psutil
import yaml

from pdm.data.synth import Machine, Resonance, bearing_signal
from pdm.data.window import AssetPath
from pdm.errors import PartMissing
from pdm.model.bundle import Bundle, CalibrationRecord, read_record
from pdm.model.detector import Detector
from pdm.process import Child, find_program, free_port
from pdm.signal.kinematics import Bearing

CHANNELS, UNITS, LENGTH, RATE_HZ, STREAM = ("h", "v"), ("g", "g"), 2048, 48_828.0, "vibration"
HERE = Path(__file__).resolve().parent


def healthy_windows(n: int) -> np.ndarray:
    "Two channels of a healthy machine of the generator."
    machine, seconds = Machine(Bearing(8, 5.97, 31.62), (Resonance(2900, 0.05), Resonance(7300, 0.03, 0.6)), noise_g=0.7), n * LENGTH / RATE_HZ
    x = np.stack([bearing_signal(machine, 1500.0, RATE_HZ, seconds, seed=seed)[0] for seed in (1, 2)])
    return x.reshape(2, n, LENGTH).swapaxes(0, 1).astype(np.float32)


def fitted(windows: np.ndarray, folder: Path, kind: str) -> tuple[Bundle, CalibrationRecord]:
    "Weights cost the same whatever they are, so that one epoch will do."
    detector = Detector.fit(windows, rate_hz=RATE_HZ, channels=list(CHANNELS), units=list(UNITS), hop_s=LENGTH / RATE_HZ, kind=kind, epochs=1, name="edge_bench")
    bundle, record = detector.export(folder)
    return bundle, read_record(record)


class Edge:
    "An agent as `predmaint agent` starts it, with assets and a journal of its own."
    def __init__(self, folder: Path, name: str, broker_url: str, triton: tuple[str, Path], bundle: Bundle, record: CalibrationRecord, assets: int, **settings: object):
        self.folder, self.port = folder / name, free_port()
        self.folder.mkdir(parents=True)
        self.assets = [str(AssetPath("bench", "edge", "rig", name, f"machine-{i:04d}")) for i in range(assets)]
        records = []
        for i, path in enumerate(self.assets):
            (self.folder / f"{i}.json").write_text(record.for_asset(path).to_json())
            records.append({"path": path, "streams": {STREAM: {"bundle": str(bundle.path.resolve()), "calibration": f"{i}.json"}}})
        (self.folder / "assets.yaml").write_text(yaml.dump({"assets": records}, Dumper=yaml.CSafeDumper))
        chosen = {"broker_url": broker_url, "engine_url": f"grpc://{triton[0]}", "triton_repository": str(triton[1]), "state_dir": str(self.folder / "data"),
                  "assets": str(self.folder / "assets.yaml"), "agent_id": name, "metrics_port": self.port, **settings}
        (self.folder / "predmaint.toml").write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in chosen.items()))
        self.child = Child([sys.executable, "-m", "pdm.cli", "agent"], self.folder / "agent.log", name="agent", cwd=self.folder,
                           env={"PREDMAINT_SETTINGS": str(self.folder / "predmaint.toml")})

    def ready(self) -> "Edge":
        "Itself, once it takes windows."
        self.child.wait_ready(lambda: "pdm_agent_ready 1.0" in self.page(), timeout_s=120)
        return self

    def page(self) -> str:
        try:
            return urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5).read().decode()
        except (URLError, OSError):
            return ""

    def committed(self, since_ns: int = 0) -> list[tuple[str, int, int]]:
        "Asset, seq and time of commit (ns since 1970) of the verdicts since then."
        with sqlite3.connect(f"file:{self.folder}/data/journal.db?mode=ro", uri=True) as db:
            return db.execute("SELECT asset, seq, committed_ns FROM verdict JOIN stream ON stream.id = stream_id WHERE committed_ns >= ?", (since_ns,)).fetchall()

    def journal_bytes(self) -> int:
        return sum(p.stat().st_size for p in (self.folder / "data").glob("journal.db"))

    def close(self) -> None:
        self.child.stop()


class Publisher:
    "The sensors of some assets, as a process that has started to send."
    def __init__(self, folder: Path, broker_url: str, assets: Sequence[str], seconds: float, rate: float = 0.0, window: int = 64,
                 **more: object):
        self._out = folder / f"sent-{time.time_ns()}.npz"
        order = {"broker_url": broker_url, "assets": list(assets), "seconds": seconds, "rate": rate, "window": window, "stream": STREAM, "rate_hz": RATE_HZ,
                 "channels": CHANNELS, "units": UNITS, "windows": str(folder / "windows.npy"), "out": str(self._out)} | more
        self.process = subprocess.Popen([sys.executable, HERE / "_edge_publisher.py", json.dumps(order)], stdout=subprocess.PIPE, text=True)

    def result(self) -> dict:
        "Wait for its end: what it counted, and of each window stream, seq, when it was due and when its acknowledgement came, ns since 1970."
        try:
            out, _ = self.process.communicate(timeout=600)
        finally:
            self.process.kill()  # it may be waiting for an acknowledgement that nobody gives
        if self.process.returncode:
            raise RuntimeError("the publisher failed: see above")
        with np.load(self._out) as f:
            return json.loads(out) | {k: f[k] for k in f.files}


def cpu_s(pids: Mapping[str, int]) -> dict[str, float]:
    "Seconds of processor time so far, of each process with its children."
    found = {}
    for name, pid in pids.items():
        p = psutil.Process(pid)
        found[name] = sum(sum(q.cpu_times()[:2]) for q in (p, *p.children(recursive=True)))
    return found


def histogram(page: str, name: str) -> dict[float, float]:
    "Cumulative counts of a Prometheus histogram by upper bound, over all labels."
    found: dict[float, float] = {}
    for labels, value in re.findall(rf"^{name}_bucket{{(.*)}} (\S+)$", page, re.M):
        bound = float(re.search(r'le="([^"]+)"', labels)[1])
        found[bound] = found.get(bound, 0) + float(value)
    return found


def quantile(before: Mapping[float, float], after: Mapping[float, float], q: float) -> float:
    "What Prometheus' histogram_quantile makes of what was observed between the two."
    low, seen = 0.0, 0.0
    total = after[float("inf")] - before.get(float("inf"), 0)
    for bound in sorted(after):
        n = after[bound] - before.get(bound, 0)
        if total and n >= q * total:
            return low if bound == float("inf") else low + (bound - low) * (q * total - seen) / max(n - seen, 1e-9)
        low, seen = bound, n
    return float("nan")


def steady_rate(edges: Sequence[Edge], sent: Mapping[str, object], warm_s: float) -> float:
    "Verdicts committed a second, from `warm_s` after the first window was sent until the last was."
    begin, end = int(sent["start_ns"]) + round(1e9 * warm_s), int(sent["stop_ns"])
    return sum(1 for e in edges for _, _, t in e.committed(begin) if t <= end) / ((end - begin) / 1e9)


def latencies_ms(edge: Edge, sent: Mapping[str, object], warm_s: float) -> tuple[np.ndarray, np.ndarray]:
    "From when a window was due until its commit, and until its acknowledgement was back at the sensor."
    due = {(n, s): t for n, s, t in zip(sent["stream"].tolist(), sent["seq"].tolist(), sent["due"].tolist(), strict=True)}
    begin, number = int(sent["start_ns"]) + round(1e9 * warm_s), {a: n for n, a in enumerate(edge.assets)}
    committed = [(t, due.get((number[a], s))) for a, s, t in edge.committed(begin)]
    told = [(t, due.get((n, s))) for n, s, t in sent["told"].tolist()]
    return tuple(np.array([t - d for t, d in pairs if d is not None and d >= begin]) / 1e6 for pairs in (committed, told))


INFLUXD = """reporting-disabled = true
bind-address = "127.0.0.1:{rpc}"
[meta]
dir = "{folder}/meta"
[data]
dir = "{folder}/data"
wal-dir = "{folder}/wal"
query-log-enabled = false
[monitor]
store-enabled = false
[http]
bind-address = "127.0.0.1:{http}"
log-enabled = false
[logging]
level = "error"
"""
NGINX = """daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx-error.log;
events {{ worker_connections 256; }}
http {{ access_log off; client_max_body_size 50m;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream influx {{ server 127.0.0.1:{http}; keepalive 16; }}
  map $arg_precision $p {{ default n; ns n; us u; ms ms; s s; }}
  server {{ listen 127.0.0.1:{port}; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Authorization "";
    location = /api/v2/write {{ rewrite ^ /write?db=$arg_bucket&precision=$p? break; proxy_pass http://influx; }}
    location = /query {{ proxy_pass http://influx; }}
    location = /ping {{ proxy_pass http://influx; }} }} }}
"""


class Influx:
    "A real influxd 1.x behind nginx, which gives it the write path of version 2."
    def __init__(self, folder: Path):
        programs = {name: find_program(name) for name in ("influxd", "nginx")}
        if missing := [name for name, path in programs.items() if path is None]:
            raise PartMissing(f"no {' and no '.join(missing)} here: apt-get install influxdb nginx-light")
        folder.mkdir(parents=True)
        ports = {name: free_port() for name in ("rpc", "http", "port")}
        (folder / "influxd.conf").write_text(INFLUXD.format(folder=folder, **ports))
        (folder / "nginx.conf").write_text(NGINX.format(folder=folder, **ports))
        self.url, self._stack = f"http://127.0.0.1:{ports['port']}", ExitStack()
        self._stack.enter_context(Child([programs["influxd"], "-config", folder / "influxd.conf"], folder / "influxd.log"))
        self._stack.enter_context(Child([programs["nginx"], "-p", folder, "-c", folder / "nginx.conf"], folder / "nginx.log").wait_ready(self._answers))
        self.ask("CREATE DATABASE bench")

    def _answers(self) -> bool:
        try:
            return urlopen(f"{self.url}/ping", timeout=1).status == 204
        except (URLError, OSError):
            return False

    def ask(self, query: str) -> dict:
        return json.loads(urlopen(f"{self.url}/query", data=urlencode({"q": query, "db": "bench"}).encode(), timeout=10).read())

    def count(self) -> int:
        series = self.ask("SELECT count(score) FROM health")["results"][0].get("series")
        return series[0]["values"][0][1] if series else 0

    def close(self) -> None:
        self._stack.close()
