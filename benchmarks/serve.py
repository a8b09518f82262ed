"""What serving costs, beside what one would write without pdm, all with the real tritonserver, all on this machine, in one run.

Windows are 2 x 2048 float32, the model is the demo's conv_ae, ONNX Runtime has one thread.

`client_ratio`: windows a second through our client over those through tritonclient written by hand, in whichever of its ways is the fastest at that size of
batch (gRPC or HTTP, with or without system shared memory); the worst of batches of 1, 8 and 32. Ours has to look at every window as well, and refuse what is none.

`swap_failed_requests`, `swap_wrong_version_verdicts`, `swap_worst_latency_ratio`: twenty deployments and a rollback under steady load, with the real broker, agent and
updater as processes: windows that got no verdict, or one of the fallback; verdicts that are not what the bundle says that they name; and the worst time from when
a window was due until it was acknowledged, over the 99th percentile while nothing was changed, before, between and after.

`int8_parity_alarm_agreement`: see _serve_int8.py.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from _bench import arguments, check, in_turn, part, report, spread
from _edge_parts import fitted, healthy_windows
from _edge_triton import Ask, Clients
from _serve_int8 import int8_rows
from _serve_swap import CHECKS, swaps

from pdm.model.bundle import load_bundle, write_bundle
from pdm.model.signature import Trust, sign, verify
from pdm.process import free_port
from pdm.serve.server import TritonServer
from pdm.serve.triton import TritonEngine

NAMES = {"swaps": CHECKS, "clients": ["client_ratio >= 0.95"], "ten": [], "signing": [], "int8": ["int8_parity_alarm_agreement >= 0.99"]}  # parts, and what each checks
OURS = ["ours", "ours, in the message"]
BARE = ["gRPC", "gRPC, shared memory", "HTTP", "HTTP, shared memory"]


class Bench:
    "The bundle that everything is measured with, and what was found."
    def __init__(self, folder: Path, quick: bool, stack: ExitStack, checks: list[dict], tables: dict[str, Any]):
        self.folder, self.quick, self.stack, self.checks, self.tables = folder, quick, stack, checks, tables
        windows = healthy_windows(120)
        self.batch = np.ascontiguousarray(np.resize(windows, (32, *windows.shape[1:])), np.float32)
        self.bundle, self.record = fitted(windows, folder / "bundles", "mahalanobis" if quick else "conv_ae")


def requests_in_turn(rounds: int, seconds: float, asks: dict[str, Ask], batch: np.ndarray) -> dict[str, list[np.ndarray]]:
    "How long single requests take, in seconds: for each way to ask, an array a round, A B A B …"
    for ask in asks.values():
        for _ in range(5):
            ask(batch)
    times: dict[str, list[np.ndarray]] = {name: [] for name in asks}
    for _ in range(rounds):
        for name, ask in asks.items():
            taken, end = [], time.perf_counter() + seconds
            while not taken or time.perf_counter() < end:
                start = time.perf_counter()
                ask(batch)
                taken.append(time.perf_counter() - start)
            times[name].append(np.array(taken))
    return times


def row(times: list[np.ndarray], windows: int) -> dict[str, float]:
    "Of one way to ask: quantiles over all rounds, and the median round's windows a second."
    p50, p99 = 1e3 * np.quantile(np.concatenate(times), (0.5, 0.99))
    return {"p50, ms": round(float(p50), 3), "p99, ms": round(float(p99), 3), "windows a second": round(statistics.median(windows / t.mean() for t in times))}


def clients(b: Bench) -> None:
    rounds, seconds = (2, 0.02) if b.quick else (60, 0.15)
    http = free_port()
    server = b.stack.enter_context(TritonServer(options={"allow-http": "true", "http-address": "127.0.0.1", "http-port": http}))
    ways, rows, ratios = Clients(server.address, server.repository, b.bundle, f"127.0.0.1:{http}"), dict[str, Any](), dict[str, Any]()
    b.stack.callback(ways.close)
    asks, worst = {kind: ways.make(kind, len(b.batch)) for kind in [*OURS, *BARE]}, float("inf")
    for size in (1, 8, 32):
        times = requests_in_turn(rounds, seconds, asks, b.batch[:size])
        rows |= {f"batch {size}: {kind}": row(t, size) for kind, t in times.items()}
        over = {kind: statistics.median(bare.mean() / ours.mean() for bare, ours in zip(times[kind], times["ours"], strict=True)) for kind in BARE}
        ratios[f"batch {size}"] = {kind: round(value, 3) for kind, value in over.items()}
        worst = min(worst, *over.values())
    b.checks.append(check("client_ratio", worst, ">= 0.95", "windows a second over tritonclient, the best of its four ways and the worst of three batches"))
    b.tables["clients of one server"] = rows
    b.tables["our client over tritonclient, windows a second"] = ratios


def change(b: Bench) -> None:
    "Swaps under load."
    checks, tables = swaps(b.folder, b.quick, b.stack, b.bundle, b.record, b.batch)
    b.checks += checks
    b.tables |= tables


def memory_mb(server: TritonServer) -> float:
    "Of the server and its stubs; what they share is counted once (PSS)."
    family = [p := psutil.Process(server.pid), *p.children()]
    return sum(p.memory_full_info().pss for p in family) / 1e6


def ten(b: Bench) -> None:
    "What ten models cost that are loaded and wait, and what they cost when all of them are asked."
    rounds, seconds = (2, 0.02) if b.quick else (60, 0.15)
    kinds = [write_bundle(b.folder / "bundles", b.bundle.onnx.read_bytes(), b.bundle.contract.model_copy(update={"name": f"machine_{i}"})) for i in range(10)]
    alone, many = (b.stack.enter_context(TritonEngine("embedded:")) for _ in range(2))
    one, models = alone.load(kinds[0]), [many.load(kind) for kind in kinds]
    turn = iter(range(10**9))
    asks: dict[str, Ask] = {"one model alone": one.infer, "one of ten, nine wait": models[0].infer, "ten in turn": lambda x: models[next(turn) % 10].infer(x)}
    rows = {}
    for size in (1, 32):
        for model in models:
            model.infer(b.batch[:size])
        rows |= {f"batch {size}: {name}": row(t, size) for name, t in requests_in_turn(rounds, seconds, asks, b.batch[:size]).items()}
    b.tables["ten models in one server"] = rows
    b.tables["memory of server and stubs, MB"] = {f"{n} model{'s' * (n > 1)}": round(memory_mb(e.server), 1) for n, e in ((1, alone), (10, many)) if e.server}


def signing(b: Bench) -> None:
    "What it costs to sign a bundle and to prove its signature, with examples in it as they come."
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = b.folder / "key", b.folder / "key.pub"
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    size, trust = sum(f.stat().st_size for f in b.bundle.path.iterdir()), Trust(keys=(public,))
    times = in_turn(2 if b.quick else 15, 0.2, sign=lambda: sign(b.bundle.path, private), verify=lambda: verify(b.bundle.path, trust),
                    load=lambda: load_bundle(b.bundle.path), read=lambda: [f.read_bytes() for f in b.bundle.path.iterdir()])
    b.tables[f"signing a bundle of {size / 1e6:.1f} MB, milliseconds"] = {name: spread(t) for name, t in times.items()}


def precision(b: Bench) -> None:
    "INT8 and FP16 beside FP32, on the CPU."
    checks, tables = int8_rows(b.quick)
    b.checks += checks
    b.tables |= tables


def main() -> None:
    work: dict[str, Callable[[Bench], None]] = {"swaps": change, "clients": clients, "ten": ten, "signing": signing, "int8": precision}
    started, args = time.perf_counter(), arguments(__doc__ or "", list(work))
    checks, tables, seconds = list[dict](), dict[str, Any](), dict[str, float]()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        bench = Bench(Path(folder), args.quick, stack, checks, tables)
        for name in args.parts or work:
            with part(name, NAMES[name], checks, seconds), ExitStack() as bench.stack:
                work[name](bench)
    report("serve", started, checks, {**tables, "seconds by part": seconds}, args.quick)


if __name__ == "__main__":
    main()
