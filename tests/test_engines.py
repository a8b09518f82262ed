"""TensorRT engines: built for real by TensorRT-RTX, which needs no GPU, through the builder that runs beside Triton; what needs a GPU through a stand-in."""

import ast
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from servers import wait_for
from tensorrt_stand_in import RECORDED, Cuda, tensorrt
from test_detectors import KINDS, fit, load_of, vibration

from pdm.errors import CheckFailed, PartMissing
from pdm.model.bundle import write_bundle
from pdm.serve import tensorrt as engines
from pdm.serve.tensorrt import Recipe, answer, build_engine, engine_record, request, watch, withdraw, would_build

RTX = "tensorrt_rtx"
pytest.importorskip(RTX, reason="pip install tensorrt-rtx-cu12 (Linux, x86_64)")
BUILDER = Path(__file__).parent.parent / "edge/triton/build_engine.py"
builder = engines._builder()
FLAGS = {"workspace_mb": 64, "optimization": 3, "refit": False}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "engines"


@contextlib.contextmanager
def running(folder, *more, module=RTX, limit=None, path=None):
    "A builder as in its container: a process, killed with all its children at the end."
    process = subprocess.Popen([sys.executable, BUILDER, "watch", folder, "--module", module, *more], stderr=subprocess.PIPE, text=True,
                               start_new_session=True, env={**os.environ, "PYTHONPATH": str(path or "")},
                               preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))) if limit else None)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def answered(folder, bundle, precision="fp32", recipe=Recipe()):  # noqa: B008
    "The engine, once it is there."
    def look():
        with contextlib.suppress(PartMissing):
            return answer(folder, bundle, precision, recipe)
    return wait_for(look)


def module(folder, name, text):
    "A folder with a module that stands before TensorRT-RTX."
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(text)
    return folder


# the builder, for real


def test_an_engine_is_built_once_and_found_again(folder, tiny_bundle):
    first = build_engine(folder, tiny_bundle, module=RTX)
    written = first.path.stat().st_mtime_ns
    again = build_engine(folder, tiny_bundle, module=RTX)
    record = engine_record(first)
    assert again == first and again.path.stat().st_mtime_ns == written
    assert record["parts"]["batch"] == [1, 8, 64] and record["plan_bytes"] == first.path.stat().st_size
    assert not any((folder / "requests").iterdir())


def test_everything_that_decides_an_engine_decides_its_key(folder, make_bundle):
    a, b = make_bundle(gain=1.0), make_bundle(gain=2.0)
    asked = [(a, Recipe()), (b, Recipe()), (a, Recipe(batch=(1, 16, 64))), (a, Recipe(workspace_mb=256)), (a, Recipe(optimization=2))]
    for bundle, recipe in asked:
        request(folder, bundle, "fp32", recipe)
    watch(folder, module=RTX, once=True)
    paths = [answer(folder, bundle, "fp32", recipe).path for bundle, recipe in asked]
    assert len({p.parent.name for p in paths}) == len(asked)


def test_requests_are_answered_oldest_first(folder, make_bundle):
    bundles = [make_bundle(gain=g) for g in (3.0, 4.0, 5.0)]
    for age, bundle in zip((10, 30, 20), bundles, strict=True):
        path = folder / "requests" / request(folder, bundle) / "request.json"
        os.utime(path, (time.time() - age,) * 2)
    watch(folder, module=RTX, once=True)
    order = sorted(range(3), key=lambda i: answer(folder, bundles[i]).path.stat().st_mtime_ns)
    assert order == [1, 2, 0]


@pytest.mark.parametrize("harm", ["plan", "record", "half"])
def test_an_engine_that_is_not_what_was_written_is_removed_and_built_again(folder, tiny_bundle, harm):
    path = build_engine(folder, tiny_bundle, module=RTX).path
    if harm == "plan":
        path.write_bytes(path.read_bytes()[:-1] + b"\0\1")
    elif harm == "record":
        record = json.loads(path.with_name("engine.json").read_bytes())
        record["parts"]["gpu"] = "another"
        path.with_name("engine.json").write_text(json.dumps(record))
    else:
        path.unlink()
    assert answer(folder, tiny_bundle) is None and not path.exists()
    assert build_engine(folder, tiny_bundle, module=RTX).path.stat().st_size > 100_000


def test_a_request_that_was_changed_is_refused(folder, tiny_bundle, make_bundle):
    inbox = folder / "requests" / request(folder, tiny_bundle)
    (inbox / "model.onnx").write_bytes(make_bundle(gain=7.0).onnx.read_bytes())
    watch(folder, module=RTX, once=True)
    with pytest.raises(CheckFailed, match="not what its digests say"):
        answer(folder, tiny_bundle)
    request(folder, tiny_bundle)  # asked again, it is tried again
    watch(folder, module=RTX, once=True)
    assert answer(folder, tiny_bundle)


def test_a_graph_that_does_not_parse_is_answered_with_node_operator_and_place(folder, make_bundle, tmp_path):
    bundle = make_bundle(gain=1.5)
    changed = bundle.onnx.read_bytes().replace(b"Sqrt", b"Sqrx")
    with pytest.raises(builder.Refused, match=r"node .*\(Sqrx\): .*\[\w+\.\w+:\d+\]"):
        builder.build(builder.load(RTX), changed, [1, 8, 64], FLAGS)


def test_a_build_that_needs_more_memory_than_is_free_is_refused_before_it_starts(folder, tiny_bundle):
    request(folder, tiny_bundle, "fp32", Recipe(workspace_mb=10**9))
    watch(folder, module=RTX, once=True)
    with pytest.raises(CheckFailed, match="MB of memory are free and building may take 1000000512"):
        answer(folder, tiny_bundle, "fp32", Recipe(workspace_mb=10**9))


def test_a_container_s_limit_counts_as_memory(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable: 4096000 kB\n")
    assert builder.free_mb(tmp_path) == 4000
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{3 << 30}\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text(f"{1 << 30}\n")
    assert builder.free_mb(tmp_path) == 2048
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert builder.free_mb(tmp_path) == 4000


def test_old_engines_make_room_and_the_new_one_stays(folder, make_bundle):
    bundles = [make_bundle(gain=g) for g in (1.0, 2.0, 3.0)]
    for bundle in bundles:
        request(folder, bundle)
    builder.watch(folder, lambda: False, RTX, once=True, most_mb=0.7, poll_s=0.05)  # room for two
    assert [bool(answer(folder, b)) for b in bundles].count(True) == 2
    assert answer(folder, bundles[-1])


def test_an_image_with_another_tensorrt_builds_again(folder, tiny_bundle):
    build_engine(folder, tiny_bundle, module=RTX)
    here = json.loads((folder / "builder.json").read_bytes())
    (folder / "builder.json").write_text(json.dumps({**here, "tensorrt": "1.8"}))
    assert answer(folder, tiny_bundle) is None
    assert len(builder.pending(folder)) == 1


def test_no_builder_is_told_apart_from_not_yet(folder, tiny_bundle):
    with pytest.raises(PartMissing, match="it was never seen"):
        answer(folder, tiny_bundle)
    with running(folder):
        answered(folder, tiny_bundle)
    other = replace(Recipe(), optimization=1)
    assert answer(folder, tiny_bundle, "fp32", other) is None
    os.utime(folder / "builder.json", (time.time() - 100,) * 2)
    with pytest.raises(PartMissing, match="was last seen 1.. s ago"):
        answer(folder, tiny_bundle, "fp32", other)


# the builder is killed


STEPS = {
    "begun": lambda folder: list(folder.glob("requests/*/deaths.json")),
    "building": lambda folder: list(folder.glob("requests/*/progress.json")),
    "kept": lambda folder: list(folder.glob("engines/" + "?" * 64)),
    "answered": lambda folder: list(folder.glob("answers/*.json")),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_builder_killed_at_any_step_is_no_loss(folder, tiny_bundle, step):
    request(folder, tiny_bundle)
    with running(folder) as process:
        wait_for(lambda: STEPS[step](folder))
        os.killpg(process.pid, signal.SIGKILL)
    with running(folder):
        artifact = answered(folder, tiny_bundle)
        assert builder.entry(folder, artifact.path.parent.name)
        wait_for(lambda: not list(folder.glob("requests/*")))


@pytest.mark.parametrize("state", ["engine without answer", "answer with request"])
def test_what_a_killed_builder_left_half_done_is_finished_without_building_again(folder, tiny_bundle, state):
    artifact = build_engine(folder, tiny_bundle, module=RTX)
    written, name = artifact.path.stat().st_mtime_ns, next((folder / "answers").iterdir()).stem
    said = (folder / "answers" / f"{name}.json").read_bytes()
    (folder / "answers" / f"{name}.json").unlink()
    request(folder, tiny_bundle)
    if state == "answer with request":
        (folder / "answers" / f"{name}.json").write_bytes(said)
    watch(folder, module=RTX, once=True)
    assert answer(folder, tiny_bundle).path.stat().st_mtime_ns == written and not builder.pending(folder)


def test_a_request_that_kills_its_builder_twice_is_poison_and_the_next_is_built(folder, make_bundle, tmp_path):
    poison, good = make_bundle(gain=8.0), make_bundle(gain=9.0)
    path = module(tmp_path / "modules", "poison_rtx", f"""
import os, signal, sys
from tensorrt_rtx import *
from tensorrt_rtx import __version__
if "work" in sys.argv and {builder.request_id(engines._wish(poison, "fp32", Recipe()))!r} in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
""")
    request(folder, poison)
    request(folder, good)
    with running(folder, module="poison_rtx", path=path):
        assert answered(folder, good)
    with pytest.raises(CheckFailed, match="the builder died twice"):
        answer(folder, poison)


def test_a_builder_that_is_told_to_stop_is_no_death(folder, tiny_bundle, tmp_path):
    path = module(tmp_path / "modules", "slow_rtx", """
import sys, time
from tensorrt_rtx import *
from tensorrt_rtx import __version__
if "work" in sys.argv:
    open(sys.argv[2] + "/at-work", "w").close()
    time.sleep(600)
""")
    name = request(folder, tiny_bundle)
    for _ in range(3):
        with running(folder, module="slow_rtx", path=path) as process:
            wait_for((folder / "at-work").exists)
            process.terminate()
            assert process.wait(20) == 0
        (folder / "at-work").unlink()
    assert json.loads((folder / "requests" / name / "deaths.json").read_bytes()) == 0
    watch(folder, module=RTX, once=True)
    assert answer(folder, tiny_bundle)


def test_two_builders_exclude_each_other(folder, tiny_bundle):
    with running(folder) as first:
        wait_for((folder / "builder.json").exists)
        with running(folder, "--once") as second:
            answered(folder, tiny_bundle)
            assert json.loads((folder / "builder.json").read_bytes())["pid"] == first.pid
            assert second.poll() is None
            os.killpg(first.pid, signal.SIGKILL)
            assert second.wait(30) == 0


def test_a_builder_s_process_that_outlives_it_keeps_others_out_until_it_is_done(folder, tiny_bundle, tmp_path):
    path = module(tmp_path / "modules", "slow_rtx", """
import sys, time, os
from tensorrt_rtx import *
from tensorrt_rtx import __version__
if "work" in sys.argv:
    open(sys.argv[2] + "/at-work", "w").close()
    while not os.path.exists(sys.argv[2] + "/go-on"): time.sleep(0.02)
""")
    request(folder, tiny_bundle)
    with running(folder, module="slow_rtx", path=path) as first:
        wait_for((folder / "at-work").exists)
        os.kill(first.pid, signal.SIGKILL)  # it alone
        first.wait()
        with running(folder, "--once", module="slow_rtx", path=path) as second, (folder / "builder.lock").open() as lock:
            assert not builder._locked(lock)
            assert second.poll() is None
            (folder / "go-on").touch()
            assert second.wait(30) == 0
        assert answer(folder, tiny_bundle)


def test_a_withdrawn_request_ends_the_build_and_is_not_answered(folder, tiny_bundle, tmp_path):
    path = module(tmp_path / "modules", "late_rtx", """
import os, sys, time, tensorrt_rtx
from tensorrt_rtx import *
from tensorrt_rtx import __version__
class OnnxParser(tensorrt_rtx.OnnxParser):
    def parse(self, model, path=None):
        open(sys.argv[2] + "/at-work", "w").close()
        while os.path.exists(sys.argv[2] + "/requests/" + sys.argv[3]): time.sleep(0.02)
        return super().parse(model)
""")
    request(folder, tiny_bundle)
    with running(folder, module="late_rtx", path=path) as process:
        wait_for((folder / "at-work").exists)
        withdraw(folder, tiny_bundle)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert not list((folder / "answers").iterdir()) and not list(folder.glob("engines/" + "?" * 64))


def test_leaving_early_takes_the_request_back(folder, tiny_bundle):
    def leave(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        while True:
            build_engine(folder, tiny_bundle, module=RTX, on_step=leave)
            shutil.rmtree(folder)
    assert not builder.pending(folder)


def test_a_full_disk_is_an_answer_and_no_engine(folder, tiny_bundle):
    request(folder, tiny_bundle)
    with running(folder, limit=100_000), pytest.raises(CheckFailed, match="File too large"):
        answered(folder, tiny_bundle)
    assert not list((folder / "engines").iterdir())
    request(folder, tiny_bundle)
    with running(folder):
        assert answered(folder, tiny_bundle)


def test_a_failure_told_while_we_look_is_told_and_not_tried_again(folder, tiny_bundle, monkeypatch):
    name, read, early = request(folder, tiny_bundle), builder.read, []
    place, inbox = folder / "answers" / f"{name}.json", folder / "requests" / name
    (inbox / "deaths.json").write_text("1")

    def late(path):
        if path != place or early:
            return read(path)
        early.append(path)
        builder.put(place, b'{"failed": "no"}')
        return None

    monkeypatch.setattr(builder, "read", late)
    with pytest.raises(PartMissing, match="was never seen"):
        answer(folder, tiny_bundle)
    with pytest.raises(CheckFailed, match="no$"):
        answer(folder, tiny_bundle)
    request(folder, tiny_bundle)  # to ask again is another matter: from the beginning
    assert not place.exists() and not (inbox / "deaths.json").exists() and (inbox / "request.json").exists()


# would it build? and on a device?


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_builds_in_every_precision_that_its_network_has(kind, tmp_path):
    windows = vibration(120)
    det = fit(kind, windows, conditions={"load": load_of(120)})
    bundle = write_bundle(tmp_path, det.onnx, det.contract, windows[:40], load_of(120)[:40, None])
    sizes = would_build(bundle)
    assert list(sizes) == {"conv_ae": ["fp32", "fp16", "int8"], "lstm_ae": ["fp32", "fp16"]}.get(kind, ["fp32"])
    done = subprocess.run([Path(sys.executable).with_name("polygraphy"), "inspect", "capability", bundle.onnx], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"})
    assert "Graph is fully supported by TensorRT" in done.stdout, done.stdout + done.stderr


def test_verifying_a_device_runs_to_the_end_without_one(tmp_path):
    report = tmp_path / "report.json"
    done = subprocess.run([sys.executable, BUILDER.parent.parent / "bootstrap/verify_device.py", "engines", "--module", RTX, "--out", report], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {c["check"]: c for c in json.loads(report.read_text())["checks"]}
    assert {n for n, c in results.items() if c["result"] == "ok"} == {
        "machine", "onnx runtime", "device", "too little memory", *(f"{p}: {n}" for p in ("fp32", "fp16", "int8") for n in ("build", "found again"))}
    assert {c["reason"] for c in results.values() if c["result"] != "ok"} == {"no GPU", "no --engine-url"}


# where the builder runs


def test_the_builder_needs_nothing_but_the_standard_library_of_python_3_10():
    tree = ast.parse(BUILDER.read_text(), feature_version=(3, 10))
    names = {alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= sys.stdlib_module_names


def test_without_tensorrt_the_builder_says_where_to_run_it(folder):
    with pytest.raises(PartMissing, match="run the builder with the Python of Triton's image"):
        watch(folder)
    done = subprocess.run([sys.executable, BUILDER, "watch", folder], capture_output=True, text=True)
    assert done.returncode == 2 and "has no tensorrt" in done.stderr


# what only a GPU can do, with the stand-in


@pytest.mark.parametrize("version", RECORDED)
def test_the_builder_uses_no_more_than_the_bindings_offer(version):
    trt = tensorrt(version, {"window": (-1, 2, 64), "conditions": (-1, 1), "conditions_known": (-1, 1)})
    steps = []
    plan, timings, warnings = builder.build(trt, b"onnx", [1, 8, 64], {**FLAGS, "refit": True}, b"", lambda *step: steps.append(step) or True)
    said = json.loads(plan.partition(b"\n")[0])
    assert said["flags"] == ["REFIT"] and said["pools"] == {"WORKSPACE": 64 << 20} and said["strongly_typed"] and said["optimization"] == 3
    assert said["profiles"][0]["window"] == [[1, 2, 64], [8, 2, 64], [64, 2, 64]] and said["profiles"][0]["conditions"] == [[1, 1], [8, 1], [64, 1]]
    assert steps == [("Building engine", 1, 2), ("Building engine", 2, 2)] and timings and not warnings
    assert builder.refit(trt, plan, b"ONNX").endswith(b"\nONNX")


def test_timings_of_another_tensorrt_are_put_aside():
    old, new = tensorrt("10.3.0"), tensorrt("10.16.1.11")
    _, first, _ = builder.build(old, b"onnx", [1, 8, 64], FLAGS, b"")
    _, grown, _ = builder.build(old, b"onnx", [1, 8, 64], FLAGS, first)
    _, other, _ = builder.build(new, b"onnx", [1, 8, 64], FLAGS, first)
    assert grown == first + b"+" and other == b"timings of 10.16.1.11;+"


def test_what_tensorrt_minds_is_told_in_words():
    with pytest.raises(builder.Refused, match=r"node /net/Det \(Det\): no importer registered for op: Det \[ModelImporter.cpp:98\]"):
        builder.build(tensorrt("10.3.0", unknown=b"Det"), b"a graph with Det", [1, 8, 64], FLAGS)
    with pytest.raises(builder.Refused, match=r"could not be allocated.*set engine_workspace_mb \(now 64\) lower"):
        builder.build(tensorrt("10.3.0", memory=False), b"onnx", [1, 8, 64], FLAGS)
    with pytest.raises(builder.Refused, match="only the batch, its first dimension, may be open"):
        builder.build(tensorrt("10.3.0", {"window": (-1, 2, -1)}), b"onnx", [1, 8, 64], FLAGS)
    with pytest.raises(builder.Refused, match="BuildCanceled"):
        builder.build(tensorrt("10.3.0"), b"onnx", [1, 8, 64], FLAGS, None, lambda *_: False)


def test_the_device_is_asked_through_the_driver():
    trt = tensorrt("10.3.0")
    assert builder.device(trt, Cuda()) == {"module": "tensorrt", "tensorrt": "10.3.0", "gpu": "Orin", "sm": "8.7", "integrated": True}
    with pytest.raises(builder.Refused, match="cuInit answers 100.*NVIDIA's runtime"):
        builder.device(trt, Cuda(code=100))


@pytest.fixture
def on_device(monkeypatch, folder):
    "Answers a request in this process, on a stand-in."
    monkeypatch.setattr(builder.ctypes, "CDLL", lambda name: Cuda())
    for part in ("requests", "answers", "engines", "timings"):
        (folder / part).mkdir(parents=True)

    def work(name, version="10.3.0"):
        monkeypatch.setitem(sys.modules, "tensorrt", tensorrt(version))
        (folder / "builder.json").write_text(json.dumps(builder.device(sys.modules["tensorrt"])))
        builder.work(folder, name, "tensorrt", 2048)

    return work


def test_a_challenger_of_the_same_architecture_is_refitted(folder, on_device, make_bundle):
    champion, challenger, other = make_bundle(gain=1.0), make_bundle(gain=2.0), make_bundle(samples=128)
    recipe = Recipe(refit=True)
    records = []
    for bundle in (champion, challenger, other):
        on_device(request(folder, bundle, "fp32", recipe))
        artifact = answer(folder, bundle, "fp32", recipe)
        records.append(engine_record(artifact))
        assert artifact.path.read_bytes().partition(b"\n")[2] == bundle.onnx.read_bytes()
    keys = [builder.digest(builder.canonical(r["parts"])) for r in records]
    assert [r["refitted"] for r in records] == ["", keys[0], ""]


def test_an_engine_whose_weights_do_not_fit_is_built(folder, on_device, make_bundle, monkeypatch):
    recipe = Recipe(refit=True)
    on_device(request(folder, make_bundle(gain=1.0), "fp32", recipe))
    monkeypatch.setattr(builder, "refit", lambda *_: (_ for _ in ()).throw(builder.Refused("its weights do not fit")))
    on_device(request(folder, make_bundle(gain=2.0), "fp32", recipe))
    record = engine_record(answer(folder, make_bundle(gain=2.0), "fp32", recipe))
    assert record["refitted"] == "" and "its weights do not fit" in record["warnings"][0]


def test_timings_are_kept_by_device_and_version(folder, on_device, make_bundle):
    on_device(request(folder, make_bundle(gain=1.0)))
    on_device(request(folder, make_bundle(gain=2.0)))
    on_device(request(folder, make_bundle(gain=3.0)), "10.16.1.11")
    assert sorted(p.read_bytes() for p in (folder / "timings").iterdir()) == [b"timings of 10.16.1.11;+", b"timings of 10.3.0;++"]
