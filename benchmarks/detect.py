"""Detection, measured: run to failure, the promise, small faults, diagnosis, sensors, trend, cost. Peers run in the same call.

    python benchmarks/detect.py [--quick] [part …]    parts: femto promise small diagnosis sensors trend cost; all without a name

Prints one JSON object, writes it to benchmarks/results/detect.json and the tables as Markdown beside it. The full run takes about 20 minutes.
"""

import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import onnxruntime as ort
from _bench import RESULTS, arguments, check, in_turn, report, spread
from threadpoolctl import threadpool_limits

import pdm
from pdm.data.capture import Sound
from pdm.data.synth import random_machine


def machine_windows(count: int, seed: int = 7) -> np.ndarray:
    "Windows of 2 x 2560 samples, ten seconds apart, of a generated machine."
    sound = Sound(random_machine([seed, 1]), 1800.0, 25_600.0, seed=[seed, 2])
    return np.stack([sound.capture(10.0 * i, 2560).samples for i in range(count)]).astype(np.float32)


def fitted(kind: str, windows: np.ndarray) -> "pdm.Detector":
    return pdm.Detector.fit(windows, 25_600.0, ["h", "v"], 10.0, kind=kind)


def peak_mb() -> float:
    "Most memory that this program ever held; getrusage would count what its parent held."
    status = Path("/proc/self/status").read_text()
    return float(status.split("VmHWM:")[1].split()[0]) / 1024


_PEAK = """
import sys, numpy as np, pdm
sys.path.insert(0, {here!r})
from detect import fitted, machine_windows, peak_mb
x = machine_windows({count})
before = peak_mb()
det = fitted({kind!r}, x)
fit = peak_mb()
det.score(np.concatenate([x] * 10))
print(before, fit, peak_mb())
"""


def cost(quick: bool) -> tuple[list[dict], dict]:
    "Seconds of a fit with both cores, windows a second by ONNX Runtime on one, and peak memory in a process of its own."
    from pdm.model.train import KINDS

    count, kinds = (100, ("mahalanobis",)) if quick else (300, ("auto", *KINDS))
    first = kinds[0]  # whose figures are checked
    x, table = machine_windows(count), {}
    fitted("mahalanobis", x)  # imports are not what is measured
    detectors = {}
    for kind in kinds:
        started = time.perf_counter()
        detectors[kind] = fitted(kind, x)
        table[kind] = {"fit, s": round(time.perf_counter() - started, 2), "kind": detectors[kind].contract.kind}
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    batch = np.ascontiguousarray(x[:32])
    for kind, det in detectors.items():
        session = ort.InferenceSession(det.onnx, options, providers=["CPUExecutionProvider"])
        times = in_turn(*(1, 0.1) if quick else (9, 0.5), run=lambda s=session: s.run(None, {"window": batch}))["run"]
        table[kind] |= {"windows/s": round(32 / float(np.median(times))), "batch of 32": spread(times)}
    peak = _PEAK.format(here=str(RESULTS.parent), count=count, kind=first)
    before, fit, score = map(float, subprocess.run([sys.executable, "-c", peak], check=True, capture_output=True, text=True).stdout.split())
    table[first] |= {"memory before, during fit, during score, MB": [round(v) for v in (before, fit, score)]}
    return [check("fit_auto_s", table[first]["fit, s"], "<= 60", f"{len(x)} windows of 2 x 2560, {'all four kinds' if first == 'auto' else first}; mahalanobis alone {table['mahalanobis']['fit, s']} s "
                  f"(1 s is asked for); peak memory {fit:.0f} MB, of which {before:.0f} MB before the fit"),
            check("score_windows_per_s", table[first]["windows/s"], ">= 2000", f"exported graph of {table[first]['kind']}, batches of 32, one core; peak memory of "
                  f"scoring 3,000 windows {score:.0f} MB")], {"cost": table}


PARTS = {"femto": "_femto", "promise": "_promise", "small": "_small", "diagnosis": "_diagnosis", "sensors": "_sensors", "trend": "_trend"}


def markdown(value: object, depth: int = 0) -> str:
    "Nested tables as nested lists, numbers as they are: to be read by people."
    if not isinstance(value, dict):
        return f" {value}\n"
    return "\n" * (depth > 0) + "".join(f"{'  ' * depth}- {key}:{markdown(v, depth + 1)}" for key, v in value.items())


if __name__ == "__main__":
    args, started = arguments(__doc__ or "", parts=[*PARTS, "cost"]), time.perf_counter()
    checks: list[dict] = []
    tables: dict = {}
    if args.quick:
        os.environ |= {"NUMBA_DISABLE_JIT": "1", "OMP_NUM_THREADS": "1"}  # PyOD compiles, and threads wait, for longer than a quick run computes
    for part in args.parts or [*PARTS, "cost"]:
        since = time.perf_counter()
        if part == "cost":  # the one part that is told in seconds: with all cores there are
            more, table = cost(args.quick)
        else:
            with threadpool_limits(1):
                more, table = import_module(PARTS[part]).measure(args.quick)
        checks += more
        tables[part] = table | {"seconds": round(time.perf_counter() - since, 1)}
    name = "-".join(["detect", *args.parts])  # a run of some parts does not replace that of all
    report(name, started, checks, tables, args.quick)
    lines = [f"| {c['name']} | {c['value']} | {c['target']} | {'yes' if c['met'] else 'not measured' if c['met'] is None else 'no'} | {c['note']} |" for c in checks]
    (RESULTS / f"{name}.md").write_text("| check | value | target | met | note |\n|---|---|---|---|---|\n" + "\n".join(lines) + "\n\n" + markdown(tables))
