"""Builds TensorRT engines beside Triton: requests in a shared folder in, engines out.

    python3 build_engine.py watch /engines        # the sidecar: until it is told to stop
    python3 build_engine.py watch /engines --once # until nothing is left to do
    python3 build_engine.py device                # what would build here

An engine fits one GPU and one TensorRT, Triton's. So this runs in Triton's own image, whose Python (3.10 in some) has TensorRT
and little else: nothing is imported here but the standard library and, in the process of one build, `tensorrt`. What goes in
and what comes out is told in `pdm.serve.tensorrt`, which asks for engines; this file believes a request only by its digests.
"""

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

BEAT_S = 2.0       # between two heartbeats, seconds
RESERVE_MB = 512   # that a build needs beside its workspace: CUDA's context, the graph, the plan
DEATHS = 2         # so many, and a request is poison


class Refused(Exception):
    "No engine, and why: a sentence for people."


# Files


def digest(data: bytes) -> str:
    "SHA-256, in hex."
    return hashlib.sha256(data).hexdigest()


def canonical(record: dict) -> bytes:
    "The same bytes for the same content."
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()


def put(path: Path, data: bytes) -> None:
    "Write a file aside, and rename it: it is there whole, or not at all."
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def put_folder(path: Path, files: dict) -> bool:
    "The same for a folder of files, name to bytes. Returns whether it is ours; another one with this name stays."
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:12]}-"))
    try:
        for name, data in files.items():
            put(aside / name, data)
        aside.chmod(0o755)
        os.rename(aside, path)
        return True
    except OSError:
        if not path.exists():
            raise
        return False
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove(path: Path) -> None:
    "Remove a folder: it is there whole, or not at all."
    if path.exists():
        aside = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:12]}-")
        with contextlib.suppress(FileNotFoundError):  # somebody else was first
            os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)


def read(path: Path) -> Any:
    "A JSON file, or `None` where it is missing or is none."
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


# The device


def load(module: str = "tensorrt") -> Any:
    "The TensorRT of this Python. Raises `Refused`, saying what to do."
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise Refused(f"{sys.executable} has no {module} ({e}): run the builder with the Python of Triton's image, or add the bindings of exactly "
                      "its TensorRT to it (python3-libnvinfer on a Jetson, tensorrt-cu12-bindings on x86)") from e


def device(trt: Any, cuda: Any = None) -> dict:
    "Whom an engine would fit: TensorRT's version, GPU, and whether that shares the machine's memory. Raises `Refused` where there is no GPU."
    found = {"module": trt.__name__, "tensorrt": trt.__version__, "gpu": "", "sm": "", "integrated": False}
    if "rtx" in trt.__name__:
        return found  # builds without a GPU, for GPUs that it names itself: a check, and never what Triton executes
    try:
        cuda = cuda or ctypes.CDLL("libcuda.so.1")
    except OSError as e:
        raise Refused(f"no GPU is seen here ({e}): is the container started with NVIDIA's runtime?") from e

    def ask(function: str, *arguments: Any) -> None:
        if code := getattr(cuda, function)(*arguments):
            raise Refused(f"no GPU is seen here ({function} answers {code}): is the container started with NVIDIA's runtime?")

    handle, name, numbers = ctypes.c_int(), ctypes.create_string_buffer(256), []
    ask("cuInit", 0)
    ask("cuDeviceGet", ctypes.byref(handle), 0)
    ask("cuDeviceGetName", name, len(name), handle)
    for attribute in (75, 76, 18):  # COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR, INTEGRATED
        value = ctypes.c_int()
        ask("cuDeviceGetAttribute", ctypes.byref(value), attribute, handle)
        numbers.append(value.value)
    return {**found, "gpu": name.value.decode(), "sm": f"{numbers[0]}.{numbers[1]}", "integrated": bool(numbers[2])}


def free_mb(root: Path = Path("/")) -> int:
    "Memory that can be had: the machine's, and no more than the container's limit leaves."
    lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
    free = next(int(words[1]) >> 10 for words in lines if words[0] == "MemAvailable:")
    limit, used = (root / "sys/fs/cgroup/memory.max", root / "sys/fs/cgroup/memory.current")
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, (int(most) - int(used.read_text())) >> 20)
    return free


# Building


def _logger(trt: Any) -> Any:
    "Keeps TensorRT's errors and warnings."

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list = []
            self.warnings: list = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message.strip())
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message.strip())

    return Logger()


def _monitor(trt: Any, go_on: Callable) -> Any:
    "Tells `go_on(phase, step, steps)`, and ends the build where that says no. Called by several threads."

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict = {}

        def phase_start(self, phase_name: str, parent_phase: Any, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            return go_on(phase_name, step + 1, self.steps.get(phase_name, 0))

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _parser_errors(parser: Any) -> str:
    "What the parser minds, in words: node, operator, and where in the parser that is."
    errors = (parser.get_error(i) for i in range(parser.num_errors))
    return "; ".join(f"node {e.node_name() or e.node()} ({e.node_operator() or 'no operator'}): {e.desc().strip()} [{Path(e.file()).name}:{e.line()}]"
                     for e in errors) or "no reason given"


def build(
    trt: Any,                   # the module `tensorrt`
    onnx: bytes,
    batch: Iterable[int],       # least, usual and most windows in a request
    flags: dict,                # workspace_mb, optimization (0 to 5), refit
    timings: Any = None,        # bytes of an earlier timing cache; None: use none
    go_on: Any = None,          # told (phase, step, steps), from several threads; False ends the build
) -> tuple:                     # the plan, the timing cache (None: none was used), TensorRT's warnings
    "Build an engine. Types are those of the graph: precision was decided where it was made. Raises `Refused`."
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx):
        raise Refused(f"TensorRT {trt.__version__} cannot read the graph: {_parser_errors(parser)}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, flags["workspace_mb"] << 20)
    config.builder_optimization_level = flags["optimization"]
    config.clear_flag(trt.BuilderFlag.TF32)  # ten bits of mantissa are not what a graph means by FP32
    if flags["refit"]:
        config.set_flag(trt.BuilderFlag.REFIT)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        first, *rest = tensor.shape
        if first != -1 or -1 in rest:
            raise Refused(f"input {tensor.name} has shape {list(tensor.shape)}: only the batch, its first dimension, may be open, and must be")
        profile.set_shape(tensor.name, *((n, *rest) for n in batch))
    if config.add_optimization_profile(profile) < 0:
        raise Refused(f"TensorRT refuses batches of {list(batch)}: {'; '.join(logger.errors)}")
    if go_on:
        monitor = _monitor(trt, go_on)  # must outlive the build
        config.progress_monitor = monitor
    if timings is not None:
        if not config.set_timing_cache(config.create_timing_cache(timings), False):  # of another device, driver or TensorRT
            config.set_timing_cache(config.create_timing_cache(b""), False)
    try:
        plan = builder.build_serialized_network(network, config)
    except MemoryError as e:
        raise Refused(f"TensorRT ran out of memory: set engine_workspace_mb (now {flags['workspace_mb']}) lower, or stop something") from e
    if plan is None:
        said = "; ".join(logger.errors[-3:]) or "no reason given"
        hint = f"; set engine_workspace_mb (now {flags['workspace_mb']}) lower, or stop something" if "memory" in said.lower() else ""
        raise Refused(f"TensorRT {trt.__version__} built no engine: {said}{hint}")
    kept = None if timings is None else bytes(config.get_timing_cache().serialize())
    return bytes(plan), kept, logger.warnings


def refit(
    trt: Any,
    plan: bytes,   # built with the flag `refit`, on this device
    onnx: bytes,   # of the same architecture
) -> bytes:
    "The same engine with another graph's weights: seconds where building takes minutes. Needs a GPU. Raises `Refused`."
    logger = _logger(trt)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise Refused(f"the plan cannot be loaded: {'; '.join(logger.errors)}")
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_bytes(onnx):
        raise Refused(f"its weights do not fit: {_parser_errors(parser)}")
    if missing := refitter.get_missing_weights():
        raise Refused(f"weights are missing: {', '.join(missing[:5])}")
    if not refitter.refit_cuda_engine():
        raise Refused(f"TensorRT did not take the weights: {'; '.join(logger.errors)}")
    return bytes(engine.serialize())


# The cache: engines/<key>/{engine.plan,engine.json}


def entry(folder: Path, key: str) -> Any:
    "The record of an engine whose plan is what was written, or `None`. A bad one is removed."
    path = folder / "engines" / key
    record = read(path / "engine.json")
    try:
        whole = record is not None and digest(canonical(record["parts"])) == key and digest((path / "engine.plan").read_bytes()) == record["plan_sha256"]
    except (OSError, KeyError, TypeError):
        whole = False
    if whole:
        return record
    remove(path)
    return None


def prune(folder: Path, most_mb: float, spare: str) -> None:
    "Remove the engines that were used least recently until the rest fits; `spare` stays."
    found = []
    for path in (folder / "engines").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has just been found bad
            if len(path.name) == 64:
                found.append((path.stat().st_mtime, sum(f.stat().st_size for f in path.iterdir()), path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total > most_mb * 1e6 and path.name != spare:
            remove(path)
            total -= size


# One request, in a process of its own: what it takes is given back when it ends, and what kills it kills nobody else


def request_id(wish: dict) -> str:
    "The name of a request: SHA-256 of all of `request.json` but the digest of its graph, which may differ in what means nothing."
    return digest(canonical({k: v for k, v in wish.items() if k not in ("onnx", "structure")}))


def work(folder: Path, name: str, module: str, most_mb: float) -> None:
    "Answer a request. Raises `Refused`, or `OSError` where the disk is full."
    inbox = folder / "requests" / name
    wish, onnx = read(inbox / "request.json"), (inbox / "model.onnx").read_bytes()
    if wish is None or request_id(wish) != name or digest(onnx) != wish["onnx"]:
        raise Refused("the request is not what its digests say: it was changed after it was written; ask again")
    trt = load(module)
    here = device(trt)
    parts = {**{k: here[k] for k in ("module", "tensorrt", "gpu", "sm")}, **{k: wish[k] for k in ("onnx", "precision", "batch", "flags")}}
    key = digest(canonical(parts))
    if entry(folder, key) is None:
        free = free_mb()
        if free < (need := wish["flags"]["workspace_mb"] + RESERVE_MB):
            raise Refused(f"{free} MB of memory are free and building may take {need}: stop something, or set engine_workspace_mb lower")
        record, plan = make(folder, trt, here, wish, parts, onnx, inbox)
        put_folder(folder / "engines" / key, {"engine.plan": plan, "engine.json": json.dumps(record, indent=2).encode()})
    os.utime(folder / "engines" / key)
    put(folder / "answers" / f"{name}.json", json.dumps({"engine": key}).encode())
    prune(folder, most_mb, key)


def make(folder: Path, trt: Any, here: dict, wish: dict, parts: dict, onnx: bytes, inbox: Path) -> tuple:
    "The engine's record and its plan: another one refitted where that was asked for and works, else built."
    begin, told, lock = time.monotonic(), [0.0], threading.Lock()

    def go_on(phase: str, step: int, steps: int) -> bool:
        with lock:
            if time.monotonic() - told[0] > 0.5:
                told[0] = time.monotonic()
                try:
                    put(inbox / "progress.json", json.dumps({"phase": phase, "step": step, "steps": steps}).encode())
                except OSError:  # withdrawn; or a full disk, which the engine will meet, too
                    return inbox.exists()
        return True

    record = {"parts": parts, "structure": wish["structure"], "refitted": "", "warnings": []}
    plan = None
    for key in relatives(folder, record) if wish["flags"]["refit"] else ():
        try:
            plan, record["refitted"] = refit(trt, (folder / "engines" / key / "engine.plan").read_bytes(), onnx), key
            break
        except Refused as e:
            record["warnings"].append(f"not refitted from {key[:12]}: {e}")
    if plan is None:
        cache = folder / "timings" / digest(canonical({k: here[k] for k in ("module", "tensorrt", "gpu", "sm")}))[:16]
        timings = None if not here["gpu"] else cache.read_bytes() if cache.exists() else b""
        plan, timings, warnings = build(trt, onnx, wish["batch"], wish["flags"], timings, go_on)
        record["warnings"] += warnings
        if timings is not None:
            put(cache, timings)
    return {**record, "plan_sha256": digest(plan), "plan_bytes": len(plan), "seconds": round(time.monotonic() - begin, 2)}, plan


def relatives(folder: Path, record: dict) -> Iterable[str]:
    "The keys of engines that differ from the one wanted in nothing but weights."
    for path in sorted((folder / "engines").iterdir()):
        other = read(path / "engine.json")
        if other and other["structure"] == record["structure"] and {**other["parts"], "onnx": ""} == {**record["parts"], "onnx": ""}:
            if entry(folder, path.name):
                yield path.name


# The builder


def pending(folder: Path) -> list:
    "The names of the requests, oldest first."
    found = []
    for path in (folder / "requests").iterdir():
        if not path.name.startswith("."):
            try:
                found.append(((path / "request.json").stat().st_mtime_ns, path.name))
            except FileNotFoundError:  # withdrawn, or no request at all
                continue
    return [name for _, name in sorted(found)]


def watch(
    folder: Path,                 # shared with whoever asks
    stop: Callable,               # tells whether to end
    module: str = "tensorrt",
    once: bool = False,           # return when nothing is left to do
    most_mb: float = 2048,        # of engines; those used least recently go first
    poll_s: float = 0.5,
) -> None:
    "Answer requests, oldest first, one at a time, until `stop`. Waits where another builder is at work. Raises `Refused` where nothing can be built here."
    folder = Path(folder).resolve()
    for name in ("requests", "answers", "engines", "timings"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with (folder / "builder.lock").open("w") as lock:
        while not _locked(lock):
            if stop():
                return
            time.sleep(poll_s)
        _sweep(folder)
        (folder / "builder.json").unlink(missing_ok=True)  # what the last one said of itself, in another image perhaps
        here = _ask_device(module)
        last = 0.0

        def beat() -> None:
            nonlocal last
            if time.monotonic() - last < BEAT_S:
                return
            last = time.monotonic()
            try:
                put(folder / "builder.json", json.dumps({**here, "pid": os.getpid()}).encode())
            except OSError as e:
                print(f"builder: {e}", file=sys.stderr, flush=True)

        while not stop():
            try:
                beat()
                names = pending(folder)
                for name in names[:1]:
                    _attempt(folder, name, module, most_mb, lock, stop, beat)
            except OSError as e:  # a full disk, mostly; it may have room again
                print(f"builder: {e}", file=sys.stderr, flush=True)
                names = []
            if not names:
                if once:
                    return
                time.sleep(poll_s)


def _sweep(folder: Path) -> None:
    "Remove what was being written when its writer was killed: it is as old as that."
    for left in [*folder.glob("*/.*"), *folder.glob(".*")]:
        with contextlib.suppress(FileNotFoundError):  # it has just got its name
            if time.time() - left.stat().st_mtime > 60:
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()


def _locked(lock: Any) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _ask_device(module: str) -> dict:
    "What `device` says, from a process that is gone afterwards, and CUDA's memory with it. Raises `Refused`."
    done = subprocess.run([sys.executable, __file__, "device", "--module", module], capture_output=True, text=True)
    if done.returncode:
        raise Refused(done.stderr.strip().rpartition("\n")[2] or f"asking for the device ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def _attempt(folder: Path, name: str, module: str, most_mb: float, lock: Any, stop: Callable, beat: Callable) -> None:
    "Let a process answer a request; count its deaths, and answer for it after the last one."
    inbox, answer = folder / "requests" / name, folder / "answers" / f"{name}.json"
    deaths = read(inbox / "deaths.json") or 0
    if answer.exists():
        remove(inbox)
        return
    if deaths >= DEATHS:
        put(answer, json.dumps({"failed": "the builder died twice while it built this engine: out of memory, most likely; set engine_workspace_mb lower"}).encode())
        remove(inbox)
        return
    try:
        put(inbox / "deaths.json", json.dumps(deaths + 1).encode())  # true until it is proven otherwise
    except FileNotFoundError:
        return  # withdrawn
    # the child holds our lock, too: should we be killed, nobody else builds before it is done
    child = subprocess.Popen([sys.executable, __file__, "work", str(folder), name, "--module", module, "--most-mb", str(most_mb)],
                             stdin=subprocess.DEVNULL, pass_fds=[lock.fileno()])
    while child.poll() is None:
        beat()
        time.sleep(0.05)
        if stop():
            child.terminate()
            child.wait()
    if answer.exists():
        remove(inbox)
    elif inbox.exists() and stop():
        put(inbox / "deaths.json", json.dumps(deaths).encode())  # that one was ours
    elif inbox.exists():
        print(f"builder: request {name[:12]} ended its process ({child.returncode}), {deaths + 1} of {DEATHS}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=("watch", "device", "work"))
    parser.add_argument("folder", type=Path, nargs="?", help="shared with whoever asks for engines")
    parser.add_argument("name", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--once", action="store_true", help="end when nothing is left to do")
    parser.add_argument("--module", default="tensorrt", help="tensorrt_rtx builds without a GPU, and what Triton can't execute: a check")
    parser.add_argument("--most-mb", type=float, default=2048, help="of engines; those used least recently go first")
    given = parser.parse_args()
    try:
        if given.command == "device":
            print(json.dumps(device(load(given.module))))
        elif given.folder is None:
            parser.error("which folder?")
        elif given.command == "watch":
            stopped: list = []
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda number, _: stopped.append(number))
            watch(given.folder, lambda: bool(stopped), given.module, given.once, given.most_mb)
        else:
            with contextlib.suppress(OSError):  # some containers have a /proc that can't be written
                Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out it is this process that goes, and not Triton
            try:
                work(given.folder, given.name, given.module, given.most_mb)
            except (Refused, OSError) as e:
                if (given.folder / "requests" / given.name).exists():  # nobody waits for the answer to one that was withdrawn
                    put(given.folder / "answers" / f"{given.name}.json", json.dumps({"failed": str(e)}).encode())
    except Refused as e:
        print(e, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
