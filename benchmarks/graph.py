"""What the one graph costs, and what the way to Triton costs, side by side on this machine.

`graph_overhead_ratio`: ONNX Runtime, one window, the whole graph (standardisation, spectra, network, score) over the same network alone, fed with
features that are ready. `triton_client_ratio_b32`: windows a second through the agent's own client to Triton at batch 32, over ONNX Runtime in process at
batch 32 with as many threads. The model is the demo's: conv_ae, windows of 2 x 2048.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from _bench import arguments, check, in_turn, ratio, report, spread

from pdm.data.synth import synthetic_recordings
from pdm.errors import PartMissing
from pdm.model.bundle import Contract, write_bundle
from pdm.model.graph import export_onnx
from pdm.model.train import Training, fit_graph
from pdm.serve.engine import InProcess

CHANNELS, LENGTH = ("h", "v"), 2048


def healthy_windows(n: int) -> tuple[np.ndarray, float]:
    "Two channels of a healthy machine: two of the generator's records side by side."
    a, b = [r for r in synthetic_recordings(seed=1) if r.fault == "none"][:2]
    x = np.stack([a.samples[0], b.samples[0]])[:, : n * LENGTH]
    return x.reshape(2, -1, LENGTH).swapaxes(0, 1).astype(np.float32), a.rate_hz


def session(onnx: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])


def main() -> None:
    started, quick = time.perf_counter(), arguments(__doc__ or "").quick
    rounds, seconds, kind = (1, 0.02, "mahalanobis") if quick else (9, 1.0, "conv_ae")
    windows, rate_hz = healthy_windows(120)
    how = Training(epochs=1, seed=0)  # weights cost the same whatever they are
    graph, _ = fit_graph(kind, windows, held_back=20, how=how)
    contract = Contract(name="machine", kind=kind, channels=CHANNELS, units=("g", "g"), rate_hz=rate_hz, samples=LENGTH,
                        embedding=graph.scorer.embedding, training_data="0" * 64)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        onnx = export_onnx(graph)
        bundle = write_bundle(Path(folder), onnx, contract)
        checks, tables = [], {}

        one = torch.from_numpy(windows[:2])
        features, _ = graph.features(one)
        whole, network = session(onnx), session(export_onnx(graph.scorer, {"features": features}))
        feeds = {"window": windows[:1]}, {"features": features[:1].numpy()}
        times = in_turn(rounds, seconds, whole=lambda: whole.run(None, feeds[0]), network=lambda: network.run(None, feeds[1]))
        checks.append(check("graph_overhead_ratio", ratio(times["whole"], times["network"]), "<= 1.5",
                            "ONNX Runtime, batch 1, one thread: whole graph over the same network and score fed with ready features"))
        tables["batch 1, ms a window"] = {name: spread(t) for name, t in times.items()}

        batch = np.resize(windows, (32, *windows.shape[1:])).astype(np.float32)
        local = InProcess(threads=1).load(bundle)
        try:
            from pdm.serve.triton import TritonEngine

            with TritonEngine("embedded:", threads=1) as engine:
                remote = engine.load(bundle)
                times = in_turn(rounds, seconds, inprocess=lambda: local.infer(batch), triton=lambda: remote.infer(batch))
            checks.append(check("triton_client_ratio_b32", ratio(times["inprocess"], times["triton"]), ">= 0.6",
                                "throughput of the agent's client to the real tritonserver over ONNX Runtime in process, one thread each"))
            tables["batch 32, ms a batch"] = {name: spread(t) for name, t in times.items()}
            tables["batch 32, windows a second"] = {name: round(32 / np.median(t)) for name, t in times.items()}
        except PartMissing as e:
            checks.append(check("triton_client_ratio_b32", None, ">= 0.6", str(e)))

    if not quick:  # CI runs `make demo` itself
        from pdm.demo import run

        with tempfile.TemporaryDirectory() as folder:
            summary = run(folder)
        tables["demo, seconds by part"] = summary["seconds"]
        tables["demo, publish to committed verdict, ms"] = summary["latency_ms"]
    report("graph", started, checks, tables, quick)


if __name__ == "__main__":
    main()
