"""How fast the edge is, beside what its model server alone can do and beside the plain script, all real, all on this machine, in one run.

The whole way is: a publisher process (SensorClient, QoS 1) -> mosquitto -> `predmaint agent` -> tritonserver -> the verdict committed in the journal, and
acknowledged. Windows are 2 x 2048 float32, the model is the demo's conv_ae, ONNX Runtime has one thread.

`edge_throughput_ratio`: verdicts committed a second over what Triton alone gives to its best client at batch 32.
`edge_p99_ratio`: at half that load, sent by an open loop, the 99th percentile from a window's due time to its acknowledgement, over five times that of
single requests to Triton under the same load plus twice that of the journal's commit.
`edge_vs_script_ratio`: verdicts a second over those of benchmarks/_script.py.
`rss_growth_ratio`: the agent's memory in the last tenth of a sustained run over that in the second tenth.
`postgres_ratio`, `influx_ratio`: replication beside the bare way to write, where their parts are there.
`sizing` has no ratios but tables: what edge/SIZING.md is made of. It takes eight minutes, and runs only where it is named.
"""

import importlib.util
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from _bench import arguments, check, part, report
from _edge_parts import (
    CHANNELS,
    RATE_HZ,
    STREAM,
    UNITS,
    Edge,
    Influx,
    Publisher,
    cpu_s,
    fitted,
    healthy_windows,
    histogram,
    latencies_ms,
    quantile,
    steady_rate,
)
from _edge_triton import Clients, paced_ms, windows_a_second

from pdm.data.window import AssetPath, Window, encode, topic, user_properties
from pdm.errors import PartMissing
from pdm.process import Child
from pdm.serve.server import TritonServer
from pdm.stream.broker import EmbeddedBroker
from pdm.stream.mqtt import Mqtt

PARTS = ("throughput", "latency", "script", "sustained", "growth", "stores", "sizing")
CLIENTS = [(kind, threads) for kind in ("ours", "gRPC", "gRPC, shared memory") for threads in (1, 2)]
ASSETS = 8


class Bench:
    "The parts that everything is measured on, and what was found."
    def __init__(self, folder: Path, quick: bool, stack: ExitStack, checks: list[dict], tables: dict[str, Any]):
        self.folder, self.quick, self.stack, self.checks, self.tables = folder, quick, stack, checks, tables
        windows = healthy_windows(120)
        np.save(folder / "windows.npy", windows)
        self.batch = np.ascontiguousarray(np.resize(windows, (32, *windows.shape[1:])), np.float32)
        self.bundle, self.record = fitted(windows, folder / "bundles", "mahalanobis" if quick else "conv_ae")
        self.broker = stack.enter_context(EmbeddedBroker(folder / "broker", "mosquitto"))
        self.triton = stack.enter_context(TritonServer(log=folder / "triton.log"))
        self.edge = self.agent("all", ASSETS).ready()
        self.clients = Clients(self.triton.address, self.triton.repository, self.bundle)
        stack.callback(self.clients.close)
        self.warm_s = 0.2 if quick else 1.0
        self.rate = 0.0  # of the whole way, windows a second, once it is measured

    def agent(self, name: str, assets: int, **settings: object) -> Edge:
        edge = Edge(self.folder, name, self.broker.url, (self.triton.address, self.triton.repository), self.bundle, self.record, assets, **settings)
        self.stack.callback(edge.close)
        return edge

    def publish(self, assets: list[str], seconds: float, **how: Any) -> Publisher:
        return Publisher(self.folder, self.broker.url, assets, seconds, **how)

    def whole_way(self, edges: list[Edge], seconds: float) -> float:
        "Verdicts a second with everything at its limit; the windows under way are shared out over the assets."
        assets = [a for e in edges for a in e.assets]
        sent = self.publish(assets, seconds + self.warm_s, window=max(1, 512 // len(assets))).result()
        return steady_rate(edges, sent, self.warm_s)


def throughput(b: Bench) -> None:
    rounds, seconds, alone_s = (1, 0.5, 0.05) if b.quick else (5, 8.0, 2.0)
    asks = {(kind, n): [b.clients.make(kind, len(b.batch)) for _ in range(n)] for kind, n in CLIENTS}
    rates: dict[str, list[float]] = {"whole way": [], **{f"Triton alone: {kind}, {n} thread{'s' * (n > 1)}": [] for kind, n in CLIENTS}}
    for _ in range(rounds):
        rates["whole way"].append(b.whole_way([b.edge], seconds))
        for kind, n in CLIENTS:
            rates[f"Triton alone: {kind}, {n} thread{'s' * (n > 1)}"].append(windows_a_second(asks[kind, n], b.batch, alone_s))
    best = max((name for name in rates if name != "whole way"), key=lambda name: statistics.median(rates[name]))
    b.rate = statistics.median(rates["whole way"])
    b.checks.append(check("edge_throughput_ratio", statistics.median(w / t for w, t in zip(rates["whole way"], rates[best], strict=True)), ">= 0.6",
                          f"verdicts committed a second over {best}; one thread of ONNX Runtime on both sides"))
    b.tables["windows a second"] = {name: {"median": round(statistics.median(r)), "min": round(min(r)), "max": round(max(r))} for name, r in rates.items()}
    page = b.edge.page()
    b.tables["agent at its limit"] = {"median batch, windows": round(quantile({}, histogram(page, "pdm_batch_windows"), 0.5), 1),
                                      "median inference, ms": round(1e3 * quantile({}, histogram(page, "pdm_inference_seconds"), 0.5), 2),
                                      "median commit, ms": round(1e3 * quantile({}, histogram(page, "pdm_commit_seconds"), 0.5), 2)}


def latency(b: Bench) -> None:
    rounds, seconds = (1, 0.8) if b.quick else (3, 20.0)
    b.rate = b.rate or b.whole_way([b.edge], 2.0)
    one, ask = np.ascontiguousarray(b.batch[:1]), b.clients.make("ours", 1)
    rows, ratios = [], []
    for _ in range(rounds):
        stop, single = threading.Event(), list[float]()
        beside = threading.Thread(target=lambda stop=stop, single=single: single.extend(paced_ms(ask, one, 50, stop)))
        publisher = b.publish(b.edge.assets, seconds + b.warm_s, rate=b.rate / 2)
        time.sleep(b.warm_s + 0.5)
        before = histogram(b.edge.page(), "pdm_commit_seconds")
        beside.start()
        time.sleep(seconds - 0.5)
        stop.set()
        after = histogram(b.edge.page(), "pdm_commit_seconds")
        sent = publisher.result()
        committed, told = latencies_ms(b.edge, sent, b.warm_s)
        commit = 1e3 * quantile(before, after, 0.99)
        p99 = {"publish to commit's time stamp": np.percentile(committed, 99), "publish to acknowledgement at the sensor": np.percentile(told, 99),
               "Triton, single window, same load": np.percentile(single, 99), "commit": commit}
        ratios.append(p99["publish to acknowledgement at the sensor"] / (5 * p99["Triton, single window, same load"] + 2 * commit))
        p50 = {"publish to commit's time stamp, p50": np.percentile(committed, 50), "Triton, single window, same load, p50": np.percentile(single, 50)}
        rows.append({k: round(float(v), 2) for k, v in (p99 | p50).items()} | {"windows": len(told), "sent late by at most": round(sent["late_ms"], 1)})
    b.checks.append(check("edge_p99_ratio", statistics.median(ratios), "<= 1",
                          f"at {b.rate / 2:.0f} windows a second; until the acknowledgement is at the sensor, which is later than the commit"))
    b.tables["p99 at half load, ms, by round"] = rows


def script(b: Bench) -> None:
    rounds, seconds = (1, 0.5) if b.quick else (3, 8.0)
    folder = b.folder / "script"
    influx = Influx(folder)
    b.stack.callback(influx.close)
    rates: dict[str, list[float]] = {"whole way": [], "script": []}
    port = str(b.broker.port)
    for _ in range(rounds):
        rates["whole way"].append(b.whole_way([b.edge], seconds))
        with Child([sys.executable, Path(__file__).with_name("_script.py"), "127.0.0.1", port, "pdm/v1/bench/edge/rig/script/+/+/window", influx.url, "none",
                    "bench", b.folder / "windows.npy"], folder / "script.log") as child:
            rates["script"].append(script_rate(b, influx, child, seconds))
    b.checks.append(check("edge_vs_script_ratio", statistics.median(w / s for w, s in zip(rates["whole way"], rates["script"], strict=True)), ">= 10",
                          "verdicts a second over those of benchmarks/_script.py on the same windows through the same broker"))
    b.tables["against the script, windows a second"] = {name: {"median": round(statistics.median(r), 1), "min": round(min(r), 1), "max": round(max(r), 1)}
                                                        for name, r in rates.items()}


def script_rate(b: Bench, influx: Influx, child: Child, seconds: float) -> float:
    "Points a second that the script writes while there is always a window waiting for it."
    windows, seq, before = np.load(b.folder / "windows.npy"), 0, influx.count()
    bus = Mqtt(b.broker.url, "bench-script", session_s=0, announce=False)
    bus.connect()

    def send() -> None:
        w = Window(STREAM, 1, seq, 0, time.time_ns(), RATE_HZ, CHANNELS, UNITS, windows[seq % len(windows)])
        bus.publish(topic(AssetPath("bench", "edge", "rig", "script", f"machine-{seq % ASSETS:04d}"), STREAM, "window"), encode(w), properties=user_properties(w))

    try:
        end = time.monotonic() + 60
        while (first := influx.count()) == before and child.alive and time.monotonic() < end:  # until it has subscribed
            send()
            seq += 1
            time.sleep(0.1)
        start, ahead = time.perf_counter(), seq
        while child.alive and first > before and time.monotonic() < end:
            count, passed = influx.count(), time.perf_counter() - start
            if passed > seconds:
                return (count - first) / passed
            while seq < ahead + count - first + 200:  # more than it writes until we look again
                send()
                seq += 1
            time.sleep(0.05)
    finally:
        bus.close()
    raise PartMissing(f"the script wrote nothing: {child.log.read_text()[-400:]}")


def sustained(b: Bench) -> None:
    seconds = 2.0 if b.quick else 120.0
    pids = {"agent": b.edge.child.pid, "broker": b.broker.pid, "tritonserver": b.triton.pid}
    publisher = b.publish(b.edge.assets, seconds, window=512 // len(b.edge.assets))
    agent, rss, start = psutil.Process(b.edge.child.pid), [], time.monotonic()
    cpu, size, written = cpu_s(pids), b.edge.journal_bytes(), agent.io_counters().write_bytes
    while (passed := time.monotonic() - start) < seconds:
        rss.append((passed / seconds, agent.memory_info().rss))
        time.sleep(min(0.5, seconds / 40))
    sent = publisher.result()
    n, after = sent["sent"], cpu_s(pids)
    tenth = [statistics.mean([m for at, m in rss if lo <= at < lo + 0.1]) for lo in (0.1, 0.9)]
    b.checks.append(check("rss_growth_ratio", tenth[1] / tenth[0], "<= 1.1", f"of the agent, last over second tenth of {n} windows in {seconds:.0f} s"))
    b.tables["agent's memory, MB"] = {"second tenth": round(tenth[0] / 1e6, 1), "last tenth": round(tenth[1] / 1e6, 1)}
    b.tables["processor, ms a window"] = {name: round(1e3 * (after[name] - cpu[name]) / n, 3) for name in pids} | {"publisher": round(1e3 * sent["cpu_s"] / n, 3)}
    b.tables["bytes a window"] = {"journal": round((b.edge.journal_bytes() - size) / n), "written to disk by the agent": round((agent.io_counters().write_bytes - written) / n)}


def growth(b: Bench) -> None:
    b.rate = b.rate or b.whole_way([b.edge], 2.0)
    seconds, counts = (0.5, (1,)) if b.quick else (10.0, (1, 10, 100, 1000))
    rows = {}
    for n in counts:
        started = time.monotonic()
        edge = b.agent(f"assets-{n}", n).ready()
        ready_s = time.monotonic() - started
        pids = {"agent": edge.child.pid}
        before = cpu_s(pids)
        sent = b.publish(edge.assets, seconds + b.warm_s, rate=b.rate / 2, window=max(64, 2048 // n)).result()
        cpu = cpu_s(pids)["agent"] - before["agent"]
        _, told = latencies_ms(edge, sent, b.warm_s)
        rows[f"{n} assets"] = {"p50, ms": round(float(np.percentile(told, 50)), 1), "p99, ms": round(float(np.percentile(told, 99)), 1),
                               "agent's processor, ms a window": round(1e3 * cpu / sent["sent"], 3), "ready after, s": round(ready_s, 1),
                               "memory, MB": round(psutil.Process(edge.child.pid).memory_info().rss / 1e6)}
        edge.close()
    b.tables[f"growth at {b.rate / 2:.0f} windows a second"] = rows
    rounds, seconds = (1, 0.5) if b.quick else (3, 6.0)
    halves = [edge.ready() for edge in [b.agent(f"half-{i}", ASSETS // 2) for i in range(2)]]
    rates: dict[str, list[float]] = {"one agent": [], "two agents": []}
    for _ in range(rounds):
        rates["one agent"].append(b.whole_way([b.edge], seconds))
        rates["two agents"].append(b.whole_way(halves, seconds))
    b.tables["assets divided, windows a second"] = {name: {"median": round(statistics.median(r)), "min": round(min(r)), "max": round(max(r))} for name, r in rates.items()}
    for edge in halves:
        edge.close()


def stores(quick: bool, checks: list[dict], tables: dict[str, Any]) -> None:
    rounds, rows = (1, 500) if quick else (5, 20000)
    for store in ("postgres", "influx"):
        if importlib.util.find_spec(f"_{store}") is None:
            checks.append(check(f"{store}_ratio", None, ">= 0.7", f"benchmarks/_{store}.py is not here"))
            continue
        try:
            found = importlib.import_module(f"_{store}").measure(rounds, rows)
        except PartMissing as e:
            checks.append(check(f"{store}_ratio", None, ">= 0.7", str(e)))
            continue
        checks += found[0]
        tables |= found[1]


def sizing(folder: Path, quick: bool) -> dict[str, Any]:
    try:
        return importlib.import_module("_edge_sizing").measure(folder, quick)
    except PartMissing as e:
        return {"not measured": str(e)}


NAMES = {"throughput": ["edge_throughput_ratio >= 0.6"], "latency": ["edge_p99_ratio <= 1"], "script": ["edge_vs_script_ratio >= 10"],
         "sustained": ["rss_growth_ratio <= 1.1"], "growth": []}


def main() -> None:
    started, args = time.perf_counter(), arguments(__doc__ or "", PARTS)
    work: dict[str, Callable[[Bench], None]] = {"throughput": throughput, "latency": latency, "script": script, "sustained": sustained, "growth": growth}
    parts, checks, tables, seconds = args.parts or PARTS[:-1], list[dict](), dict[str, Any](), dict[str, float]()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        bench, why = None, ""
        try:
            bench = Bench(Path(folder), args.quick, stack, checks, tables) if set(parts) - {"stores", "sizing"} else None
        except PartMissing as e:
            why = str(e)
        for name in parts:
            with part(name, NAMES.get(name, []), checks, seconds):
                if name == "stores":
                    stores(args.quick, checks, tables)
                elif name == "sizing":
                    tables["sizing"] = sizing(Path(folder) / "sizing", args.quick)
                elif bench is None:
                    raise PartMissing(why)
                else:
                    work[name](bench)
    report("edge", started, checks, {**tables, "seconds by part": seconds}, args.quick)


if __name__ == "__main__":
    main()
