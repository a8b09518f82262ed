"""Look whether a site is as it should be, run on a device all that only a device can run, and write a report to send back.

    python3 verify_device.py site --out report.json
    python3 verify_device.py site --bundle DIR --asset acme/lyon/hall-2/line-1/test --broker 'mqtts://{mosquitto}?ca=ca.crt&cert=tls.crt&key=tls.key'
    python3 verify_device.py engines --bundle DIR --engine-url grpc://127.0.0.1:8001 --repository /models

`site` looks at what runs (verify_site.py); `engines` builds and executes TensorRT engines, for which Triton had better be stopped on a board of 8 GB.
Without a word it is both. It wants a Python with `predmaint[engine]`, and `pki` to read certificates. The Python that has TensorRT may be another one (`--python /usr/bin/python3`
on JetPack 6, where it is 3.10); to execute engines it needs polygraphy and numpy, and without them that is not run. Nothing on the machine is changed;
engines are built in a folder that is gone afterwards. What can't be looked at here (no GPU, no kubectl) is said, and the rest goes on. Each check is
ok, failed, or not run with the reason. Exit code: 0, or 3 where a check failed.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from verify_site import PORTS, NotRun, Site

from pdm.errors import CheckFailed, PdmError
from pdm.model.bundle import Bundle, Contract, Scored, graph_inputs, load_bundle, write_bundle
from pdm.serve.engine import Artifact, Canary, InProcess
from pdm.serve.tensorrt import Precision, Recipe, answer, engine_record, request

HERE = Path(__file__).parent
BATCHES = (1, 8, 32)
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")


def small_bundle(folder: Path, seed: int = 0) -> Bundle:
    "A convolutional autoencoder with random weights, two channels of 1024 samples: small, and of the shape of the real ones."
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    constants = {
        "mean": np.zeros((1, 2, 1)), "scale": np.full((1, 2, 1), 0.5), "one": np.array([1]), "last": np.array([2]),
        "w0": rng.normal(0, 0.2, (16, 2, 9)), "w1": rng.normal(0, 0.1, (32, 16, 9)), "w2": rng.normal(0, 0.1, (32, 16, 8)), "w3": rng.normal(0, 0.1, (16, 2, 8)),
    }
    network = "scorer/network/"
    half: dict[str, Any] = {"strides": [2], "pads": [4, 4]}
    double: dict[str, Any] = {"strides": [2], "pads": [3, 3]}
    nodes = [
        helper.make_node("Sub", ["window", "mean"], ["centred"], "standardise/Sub"), helper.make_node("Mul", ["centred", "scale"], ["x"], "standardise/Mul"),
        helper.make_node("Conv", ["x", "w0"], ["a"], network + "Conv_0", **half), helper.make_node("Relu", ["a"], ["b"], network + "Relu_0"),
        helper.make_node("Conv", ["b", "w1"], ["c"], network + "Conv_1", **half), helper.make_node("Relu", ["c"], ["d"], network + "Relu_1"),
        helper.make_node("ConvTranspose", ["d", "w2"], ["e"], network + "ConvTranspose_0", **double), helper.make_node("Relu", ["e"], ["f"], network + "Relu_2"),
        helper.make_node("ConvTranspose", ["f", "w3"], ["y"], network + "ConvTranspose_1", **double),
        helper.make_node("Sub", ["x", "y"], ["error"], "score/Sub"), helper.make_node("Mul", ["error", "error"], ["square"], "score/Mul"),
        helper.make_node("ReduceMean", ["square", "last"], ["channel_score"], "score/ReduceMean", keepdims=0),
        helper.make_node("ReduceMean", ["channel_score", "one"], ["score"], "score/ReduceMean_1", keepdims=1),
        helper.make_node("ReduceMean", ["d", "last"], ["embedding"], "score/ReduceMean_2", keepdims=0),
    ]
    tensor = lambda name, *shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])  # noqa: E731
    weights = [numpy_helper.from_array(v if v.dtype.kind == "i" else v.astype(np.float32), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "small", [tensor("window", 2, 1024)], [tensor("score", 1), tensor("channel_score", 2), tensor("embedding", 32)], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    windows = rng.normal(size=(64, 2, 1024)).cumsum(-1)
    windows = (windows - windows.mean(-1, keepdims=True)) / windows.std(-1, keepdims=True)
    contract = Contract(name="small", kind="conv_ae", channels=("h", "v"), units=("g", "g"), rate_hz=25600, samples=1024, embedding=32, training_data="0" * 64)
    return write_bundle(folder, model.SerializeToString(), contract, windows)


class Device:
    "The checks, in order. Each returns what it found, raises `NotRun` for what it lacks, and anything else where it fails."

    def __init__(self, given: argparse.Namespace, folder: Path):
        self.given, self.folder = given, folder
        self.bundle = load_bundle(given.bundle) if given.bundle else small_bundle(folder / "bundles")
        examples = self.bundle.examples()
        if examples is None:
            raise SystemExit("this bundle carries no example windows to compare engines with: export it again")
        windows, self.conditions = examples
        self.windows = np.resize(windows, (max(BATCHES), *windows.shape[1:]))
        if self.conditions is not None:
            self.conditions = np.resize(self.conditions, (max(BATCHES), self.conditions.shape[1]))
        self.reference = InProcess().load(self.bundle)
        self.device: dict[str, Any] | None = None
        self.built: dict[Precision, Artifact] = {}

    def checks(self) -> dict[str, Callable[[], dict]]:
        per = {f"{precision}: {name}": lambda check=check, precision=precision: check(precision) for precision in PRECISIONS
               for name, check in (("build", self.build), ("found again", self.again), ("executed by TensorRT", self.execute), ("executed by Triton", self.triton))}
        return {"machine": self.machine, "onnx runtime": self.onnx_runtime, "device": self.ask, **per, "timings kept": self.timings, "refit": self.refit,
                "too little memory": self.memory}

    def machine(self) -> dict:
        def text(path: str) -> str:
            return Path(path).read_bytes().decode(errors="replace").strip("\0\n") if Path(path).exists() else ""

        def said(*command: str) -> str:
            try:
                return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
            except (OSError, subprocess.TimeoutExpired):
                return ""

        return {"board": text("/proc/device-tree/model"), "l4t": text("/etc/nv_tegra_release").partition(", GCID")[0],
                "jetpack": said("dpkg-query", "-W", "-f", "${Version}", "nvidia-jetpack"), "power": said("nvpmodel", "-q"), "driver": text("/proc/driver/nvidia/version"),
                "os": platform.freedesktop_os_release().get("PRETTY_NAME", ""), "kernel": platform.release(), "python": platform.python_version(),
                "architecture": platform.machine(), "cores": psutil.cpu_count(), "memory_mb": psutil.virtual_memory().total >> 20}

    def onnx_runtime(self) -> dict:
        return self._latency(lambda n: self.reference.infer(self.windows[:n], None if self.conditions is None else self.conditions[:n]))

    def ask(self) -> dict:
        done = self._builder("device")
        if done.returncode:
            raise NotRun(done.stderr.strip().rpartition("\n")[2])
        self.device = json.loads(done.stdout.splitlines()[-1])
        return self.device

    def build(self, precision: Precision) -> dict:
        self.built[precision], record = self._build(self.bundle, precision)
        return {k: record[k] for k in ("seconds", "plan_bytes", "warnings")}

    def again(self, precision: Precision) -> dict:
        before, begin = self._engine(precision).path.stat().st_mtime_ns, time.monotonic()
        artifact, _ = self._build(self.bundle, precision)
        if artifact.path.stat().st_mtime_ns != before:
            raise CheckFailed("it was built again")
        return {"seconds": round(time.monotonic() - begin, 3)}

    def execute(self, precision: Precision) -> dict:
        return self._execute(self.bundle, self._engine(precision))

    def triton(self, precision: Precision) -> dict:
        artifact = self._engine(precision)
        if not self.given.engine_url:
            raise NotRun("no --engine-url")
        from pdm.serve.repository import JETSON
        from pdm.serve.triton import TritonEngine

        with TritonEngine(self.given.engine_url, repository=self.given.repository, profile=JETSON) as engine:
            model = engine.load(self.bundle, artifact)
            try:
                found = self._compare(model.infer(self.windows, self.conditions), artifact)
                return {"triton": engine.version, **found,
                        **self._latency(lambda n: model.infer(self.windows[:n], None if self.conditions is None else self.conditions[:n]))}
            finally:
                engine.unload(self.bundle)

    def timings(self) -> dict:
        self._engine("fp32")
        kept = {p.name: p.stat().st_size for p in (self.folder / "engines/timings").iterdir()}
        if not self.device or not self.device["gpu"]:
            raise NotRun("no GPU")
        if not kept:
            raise CheckFailed("none were written")
        _, record = self._build(small_bundle(self.folder / "bundles", seed=1), "fp32")
        return {"bytes": sum(kept.values()), "next_build_seconds": record["seconds"]}

    def refit(self) -> dict:
        if not self.device or not self.device["gpu"]:
            raise NotRun("no GPU")
        recipe, first, second = Recipe(refit=True), *(small_bundle(self.folder / "bundles", seed) for seed in (2, 3))
        _, built = self._build(first, "fp32", recipe)
        artifact, refitted = self._build(second, "fp32", recipe)
        if not refitted["refitted"]:
            raise CheckFailed(f"it was built: {'; '.join(refitted['warnings'])}")
        return {"build_seconds": built["seconds"], "refit_seconds": refitted["seconds"], **self._execute(second, artifact)}

    def memory(self) -> dict:
        self._engine("fp32")
        try:
            self._build(self.bundle, "fp32", Recipe(workspace_mb=2 * psutil.virtual_memory().total >> 20))
        except CheckFailed as e:
            if "MB of memory are free" in str(e):
                return {"answer": str(e)}
            raise
        raise CheckFailed("an engine was built with more memory than there is")

    def _builder(self, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run([self.given.python, HERE.parent / "triton/build_engine.py", *words, "--module", self.given.module],
                              capture_output=True, text=True, timeout=3600)

    def _build(self, bundle: Bundle, precision: Precision, recipe: Recipe = Recipe(workspace_mb=512)) -> tuple[Artifact, dict]:  # noqa: B008
        if self.device is None:
            raise NotRun("no TensorRT, or no GPU: see device")
        engines = self.folder / "engines"
        try:
            request(engines, bundle, precision, recipe)
        except CheckFailed as e:  # such as a precision from which this network gains nothing
            raise NotRun(str(e)) from e
        done = self._builder("watch", str(engines), "--once")
        artifact = answer(engines, bundle, precision, recipe)
        if artifact is None:
            raise CheckFailed(f"no answer: {done.stderr.strip()[-500:]}")
        return artifact, engine_record(artifact)

    def _engine(self, precision: Precision) -> Artifact:
        if precision not in self.built:
            raise NotRun("no engine: see build")
        return self.built[precision]

    def _execute(self, bundle: Bundle, artifact: Artifact) -> dict:
        "Outputs of TensorRT itself against ONNX Runtime's, and how long it takes."
        if not self.device or not self.device["gpu"]:
            raise NotRun("no GPU")
        found: dict[str, Any] = {}
        for n in BATCHES:
            inputs = graph_inputs(bundle.contract, self.windows[:n], None if self.conditions is None else self.conditions[:n])
            np.savez(self.folder / "in.npz", **inputs)  # type: ignore[arg-type]
            done = subprocess.run([self.given.python, HERE / "run_plan.py", artifact.path, self.folder / "in.npz", self.folder / "out.npz", "200"],
                                  capture_output=True, text=True, timeout=600)
            if "No module named" in done.stderr:
                raise NotRun(f"{self.given.python}: {done.stderr.strip().rpartition(chr(10))[2]}")
            if done.returncode:
                raise CheckFailed(done.stderr.strip()[-500:])
            out = np.load(self.folder / "out.npz")
            scored = Scored(out["score"].reshape(-1), out["channel_score"], out["embedding"], "tensorrt")
            expected = InProcess().load(bundle).infer(self.windows[:n], None if self.conditions is None else self.conditions[:n])
            found |= self._compare(scored, artifact, expected) | _milliseconds(n, out["seconds"])
        return found

    def _compare(self, scored: Scored, artifact: Artifact, expected: Scored | None = None) -> dict:
        "How far scores are from ONNX Runtime's, in dB. Raises `CheckFailed` where they are another graph's."
        expected = expected or self.reference.infer(self.windows, self.conditions)
        Canary(self.windows[:len(scored.score)], None, expected).prove(_Said(self.bundle.contract, scored), artifact.tolerance)
        off = 20 * np.abs(np.log10(scored.score / expected.score))
        return {"off_db_median": float(np.median(off)), "off_db_most": float(off.max())}

    def _latency(self, infer: Callable[[int], object]) -> dict:
        found: dict[str, float] = {}
        for n in BATCHES:
            seconds = []
            for _ in range(100):
                begin = time.perf_counter()
                infer(n)
                seconds.append(time.perf_counter() - begin)
            found |= _milliseconds(n, np.array(seconds))
        return found


class _Said:
    "A model that has answered already."

    def __init__(self, contract: Contract, scored: Scored):
        self.contract, self.scored = contract, scored

    def infer(self, windows: np.ndarray, conditions: np.ndarray | None = None) -> Scored:
        return self.scored


def _milliseconds(n: int, seconds: np.ndarray) -> dict:
    return {f"batch_{n}_p50_ms": float(np.median(seconds) * 1e3), f"batch_{n}_p99_ms": float(np.quantile(seconds, 0.99) * 1e3)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=("site", "engines", "all"), default="all", help="what to look at")
    parser.add_argument("--bundle", type=Path, help="its folder; engines without it are those of a small one that is made here")
    parser.add_argument("--python", default=sys.executable, help="the Python that has TensorRT")
    parser.add_argument("--module", default="tensorrt", help="tensorrt_rtx builds without a GPU, and what can't be executed here")
    parser.add_argument("--engine-url", default="", help="of a running Triton with the Jetson profile, grpc://host:port")
    parser.add_argument("--repository", type=Path, help="the folder that this Triton serves")
    parser.add_argument("--asset", default="", help="the test asset, which the agent knows for this: enterprise/site/area/line/asset")
    parser.add_argument("--stream", default="vibration", help="of it, with the channels of --bundle")
    parser.add_argument("--broker", default="", help="as the test asset reaches it; {mosquitto} stands for the cluster's own address of the broker")
    parser.add_argument("--wait", type=float, default=30.0, help="for acknowledgement and verdict of its window, seconds")
    parser.add_argument("--certificates", type=Path, action="append", default=[], help="a certificate, or a folder of them, whose days are counted")
    parser.add_argument("--address", action="append", default=[], metavar="NAME=HOST:PORT", help="of triton, prometheus, …, in place of the cluster's")
    parser.add_argument("--data", type=Path, default=Path("/var/lib/predmaint"), help="where the site's data lie")
    parser.add_argument("--out", type=Path, default=Path("verify_device.json"), help="the report")
    given = parser.parse_args()
    if wrong := [a for a in given.address if a.partition("=")[0] not in PORTS or ":" not in a.partition("=")[2]]:
        parser.error(f"--address {wrong[0]}: NAME=HOST:PORT is expected, with a name of {', '.join(PORTS)}")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        checks: dict[str, Callable[[], dict]] = {}
        digest = ""
        if given.what != "engines":
            bundle = load_bundle(given.bundle) if given.bundle else None
            checks |= Site(bundle, dict(a.split("=", 1) for a in given.address), given.data, given.broker, given.asset, given.stream, given.certificates, given.wait).checks()
            digest = bundle.digest if bundle else ""
        if given.what != "site":
            device = Device(given, Path(folder))
            checks |= device.checks()
            digest = device.bundle.digest
        for name, check in checks.items():
            begin = time.monotonic()
            result: dict[str, Any] = {"check": name}
            try:
                result |= {"result": "ok", "found": check()}
            except NotRun as e:
                result |= {"result": "not run", "reason": str(e)}
            except PdmError as e:
                result |= {"result": "failed", "reason": str(e)}
            except (OSError, subprocess.SubprocessError, AttributeError, LookupError, TypeError, ValueError) as e:  # such as an answer of another shape than was expected
                result |= {"result": "failed", "reason": f"{type(e).__name__}: {e}"}
            results.append({**result, "seconds": round(time.monotonic() - begin, 2)})
    given.out.write_text(json.dumps({"bundle": digest, "checks": results}, indent=2) + "\n")
    table = Table("check", "result", "s", "", box=None)
    for r in results:
        values = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in r.get("found", {}).items() if v not in ("", [], None))
        table.add_row(r["check"], r["result"], f"{r['seconds']:.1f}", r.get("reason") or values)
    Console().print(table)
    failed = sum(r["result"] == "failed" for r in results)
    print(f"{len(results)} checks, {failed} failed, {sum(r['result'] == 'not run' for r in results)} not run; the report is {given.out}")
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
