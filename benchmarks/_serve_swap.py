"""Swaps of benchmarks/serve.py: a site under steady load, with the real broker, agent, tritonserver and updater as processes, while its model is changed.

Releases are the demo's graph with its score times a gain of their own, so that every verdict in the journal tells which of them scored it.
"""

import os
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
from _bench import check
from _edge_parts import Edge, Publisher
from onnx import helper, numpy_helper

from pdm.model.bundle import Bundle, CalibrationRecord, write_bundle
from pdm.process import Child, find_program, free_port
from pdm.serve.engine import InProcess
from pdm.serve.server import TritonServer
from pdm.stream.broker import EmbeddedBroker
from pdm.stream.rollout import Rollout

ASSETS, RATE = 10, 50.0  # sensors, and windows a second of all of them
CHECKS = ["swap_failed_requests <= 0", "swap_wrong_version_verdicts <= 0", "swap_worst_latency_ratio <= 10"]


def with_gain(bundle: Bundle, gain: float, revision: int, folder: Path) -> Bundle:
    "The bundle, its score times a gain."
    model = onnx.load(bundle.onnx)
    for node in model.graph.node:
        node.output[:] = ["score_before" if name == "score" else name for name in node.output]
        node.input[:] = ["score_before" if name == "score" else name for name in node.input]
    model.graph.initializer.append(numpy_helper.from_array(np.array(gain, np.float32), "gain_of_release"))
    model.graph.node.append(helper.make_node("Mul", ["score_before", "gain_of_release"], ["score"], "level/gain_of_release"))
    return write_bundle(folder, model.SerializeToString(), bundle.contract.model_copy(update={"revision": revision}), *(bundle.examples() or ()))


class Site:
    "Agent and updater of one node, and the rollouts that they go through."
    def __init__(self, folder: Path, stack: ExitStack, bundle: Bundle, record: CalibrationRecord, windows: np.ndarray, shadow: int):
        self.folder, self._record = folder, record
        folder.mkdir()
        np.save(folder / "windows.npy", windows)
        self.windows = windows
        self.broker = stack.enter_context(EmbeddedBroker(kind="mosquitto" if find_program("mosquitto") else None))
        server = stack.enter_context(TritonServer())
        self.edge = Edge(folder, "swapped", self.broker.url, (server.address, server.repository), bundle, record, ASSETS, unsigned_bundles=True, shadow_windows=shadow,
                         probation_minutes=0.02, updater_metrics_port=free_port())
        stack.callback(self.edge.close)
        self.edge.ready()
        home = self.edge.folder
        self.updater = stack.enter_context(Child([sys.executable, "-m", "pdm.cli", "triton", "run"], home / "updater.log", name="updater", cwd=home,
                                                 env={**os.environ, "PREDMAINT_SETTINGS": str(home / "predmaint.toml")}))
        self.bundles = home / "data" / "bundles"
        self.rollout = Rollout(home / "data" / "rollout.db")
        stack.callback(self.rollout.close)

    def release(self, bundle: Bundle, gain: float, revision: int) -> str:
        "A bundle among those of the node, with the calibration that all of its assets are lent."
        made = with_gain(bundle, gain, revision, self.bundles)
        beside = self.bundles / f"{made.digest}.calibration"
        beside.mkdir(exist_ok=True)
        for asset in self.edge.assets:
            lent, shift = self._record.for_asset(asset), 20 * float(np.log10(gain))  # calibrated as it scores: a sound release
            record = lent.model_copy(update={"model": made.digest, "scores_db": tuple(s + shift for s in lent.scores_db), "centre_db": lent.centre_db + shift,
                                             "threshold_db": lent.threshold_db + shift})
            (beside / f"{asset.replace('/', '.')}.calibration.json").write_text(record.to_json())
        return made.digest

    def go_to(self, digest: str, rollback: bool = False) -> dict[str, float]:
        "Deploy, and wait until the agent has it and its probation is over. Seconds from step to step."
        steps, began = len(self.rollout.audit(digest)), time.time()
        file = self.edge.folder / "data" / "desired"
        (aside := file.with_suffix(".new")).write_text(f"{digest}{' rollback' if rollback else ''}\n")
        os.replace(aside, file)
        while not ((c := self.rollout.candidate(digest)) and c.settled and c.state == "promoted" and self.rollout.observed().get(c.name, ("",))[0] == digest):
            if c is not None and c.state == "rolled_back" or not self.updater.alive or time.time() - began > 60:
                raise RuntimeError(f"{c}: {(self.edge.folder / 'updater.log').read_text()[-2000:]}")
            time.sleep(0.02)
        taken, before = {}, began
        for step in self.rollout.audit(digest)[steps:]:
            name = "settled" if step.details.get("settled") else step.after
            taken[name], before = step.t_ns / 1e9 - before, step.t_ns / 1e9
        return taken

    def verdicts(self) -> Iterator[tuple[str, int, float, str, str]]:
        "Asset, seq, score, digest and engine of each."
        with sqlite3.connect(f"file:{self.edge.folder}/data/journal.db?mode=ro", uri=True) as db:
            yield from db.execute("SELECT asset, seq, score, digest, engine FROM verdict JOIN stream ON stream.id = stream_id JOIN model ON model.id = model_id")


def wrong_versions(site: Site, bundles: dict[str, Bundle]) -> tuple[int, dict[str, int], int]:
    "Verdicts that are not what the bundle that they name says; how many each bundle gave; and how many were given by the fallback."
    engine, scores = InProcess(), dict[str, np.ndarray]()
    wrong, by_bundle, fallback = 0, dict[str, int](), 0
    numbers = {asset: n for n, asset in enumerate(site.edge.assets)}
    for asset, seq, score, digest, who in site.verdicts():
        if digest not in scores:
            scores[digest] = engine.load(bundles[digest]).infer(site.windows).score
        expected = scores[digest][(seq * ASSETS + numbers[asset]) % len(site.windows)]
        wrong += abs(score - expected) > 2e-3 * expected
        by_bundle[digest] = by_bundle.get(digest, 0) + 1
        fallback += who != "triton"
    return wrong, by_bundle, fallback


def swaps(folder: Path, quick: bool, stack: ExitStack, bundle: Bundle, record: CalibrationRecord, windows: np.ndarray) -> tuple[list[dict], dict]:
    "Checks and tables."
    count, quiet_s, shadow = (2, 1.5, 20) if quick else (20, 20.0, 60)
    site = Site(folder / "swap", stack, bundle, record, windows, shadow)
    digests = [site.release(bundle, 1 + 0.03 * n, n) for n in range(1, count + 1)]
    publisher = Publisher(site.folder, site.broker.url, site.edge.assets, seconds=25.0 if quick else 220.0, rate=RATE)
    stack.callback(publisher.process.kill)
    time.sleep(quiet_s / 2)  # warm
    quiet, busy, taken = [], [], []

    def during(kind: list, work) -> None:
        since = time.time_ns()
        work()
        kind.append((since, time.time_ns()))

    def some(part: list[str]) -> None:
        for digest in part:
            taken.append(site.go_to(digest))

    for half in (digests[: count // 2], digests[count // 2 :]):  # A B A B A
        during(quiet, lambda: time.sleep(quiet_s))
        during(busy, lambda half=half: some(half))
    during(busy, lambda: taken.append({"rollback, " + k: v for k, v in site.go_to(digests[-2], rollback=True).items()}))
    during(quiet, lambda: time.sleep(quiet_s))
    if publisher.process.poll() is not None:
        raise RuntimeError("the sensors stopped before the last swap was done: give them more seconds")
    sent = publisher.result()
    known = {d: Bundle(site.bundles / d, d, bundle.contract) for d in digests} | {bundle.digest: bundle}
    wrong, by_bundle, fallback = wrong_versions(site, known)
    missing = sent["sent"] - sum(by_bundle.values())
    due = {(n, s): t for n, s, t in zip(sent["stream"].tolist(), sent["seq"].tolist(), sent["due"].tolist(), strict=True)}
    times = np.array([(due[n, s], (told - due[n, s]) / 1e6) for n, s, told in sent["told"].tolist()])

    def within(phases: list[tuple[int, int]]) -> np.ndarray:
        return np.concatenate([times[(times[:, 0] >= a) & (times[:, 0] < b), 1] for a, b in phases])

    calm, swapped = within(quiet), within(busy)
    p99 = float(np.quantile(calm, 0.99))
    steps = sorted({k for t in taken for k in t}, key=lambda k: next(i for t in taken for i, name in enumerate(t) if name == k))
    checks = [
        check("swap_failed_requests", float(missing + fallback), "<= 0", f"windows without a verdict ({missing}), or with one of the fallback ({fallback}), of {sent['sent']}, in "
              f"{len(digests)} swaps and a rollback"),
        check("swap_wrong_version_verdicts", float(wrong), "<= 0", "verdicts whose score is not what the bundle says that they name"),
        check("swap_worst_latency_ratio", float(swapped.max()) / p99, "<= 10", f"worst while swapping over the undisturbed p99 of {p99:.1f} ms; undisturbed the worst is "
              f"{float(calm.max()) / p99:.1f} times that"),
    ]
    tables = {
        "latency from due to acknowledged, ms": {name: {"windows": len(v), **{f"p{100 * q:g}": round(float(np.quantile(v, q)), 1) for q in (0.5, 0.99, 0.999)},
                                                        "worst": round(float(v.max()), 1)} for name, v in (("undisturbed", calm), ("while swapping", swapped))},
        "seconds from step to step, median": {k: round(float(np.median([t[k] for t in taken if k in t])), 2) for k in steps},
        "verdicts by bundle": {d[:12]: n for d, n in by_bundle.items()},
    }
    return checks, tables
