"""Every engine keeps one contract, and Triton keeps it while it is being killed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import psutil
import pytest
from faults.rig import POISON, rms_bundle
from servers import alive, wait_for
from tritonclient.grpc import service_pb2 as pb

from pdm.errors import CheckFailed, InvalidWindow, PartMissing
from pdm.model.bundle import graph_inputs
from pdm.serve.engine import OUTPUTS, Artifact, Canary, Engine, Guarded, InProcess, InProcessModel, open_engine
from pdm.serve.server import TritonServer, find_environment
from pdm.serve.triton import TritonEngine

pytestmark = pytest.mark.integration


def stubs(server):
    "The processes that execute models, by process id."
    return {p.pid: p for p in psutil.Process(server.pid).children() if alive(p, "triton_python")}


def gone(processes):
    return not any(map(alive, processes))


def left_behind(command, *pids):
    "What a server started by `command` might have left, in /dev/shm and /tmp."
    prefix = next(part for part in command if "shm-region-prefix-name" in part).rpartition("=")[2]
    owners = [prefix, *(f"-{pid}-" for pid in pids)]
    regions = [p.name for p in Path("/dev/shm").glob("pdm*") if any(owner in p.name for owner in owners)]
    folders = [part.partition("=")[2] for part in command if part.startswith(("--model-repository", "--backend-directory"))]
    return regions + [folder for folder in folders if Path(folder).exists()]


def environments():
    "The folders that Triton's python backend makes in /tmp and removes only in an orderly end."
    return set(Path("/tmp").glob("python_env_*"))


def others(server):
    "Whether servers of other tests run, which have such folders, too."
    return any(p.info["name"] == "tritonserver" and p.pid != server.pid for p in psutil.process_iter(["name"]))


@pytest.fixture(scope="module")
def server():
    try:
        find_environment()
    except PartMissing as e:
        pytest.skip(str(e))
    with TritonServer() as server:
        yield server


@pytest.fixture(scope="module")
def engines(server):
    "One of each kind, those of Triton on one server."
    kinds: dict[str, Engine] = {
        "inprocess": InProcess(),
        "triton": TritonEngine(f"grpc://{server.address}", repository=server.repository),
        "triton-by-message": TritonEngine(f"grpc://{server.address}", repository=server.repository, shared_memory=False),
    }
    yield kinds
    for engine in kinds.values():
        engine.close()


@pytest.fixture(params=["inprocess", "triton", "triton-by-message"])
def engine(request):
    return InProcess() if request.param == "inprocess" else request.getfixturevalue("engines")[request.param]


@pytest.fixture
def embedded(server):
    "A server of the test's own, to be killed."
    with TritonEngine("embedded:") as engine:
        yield engine


@pytest.mark.parametrize("kind", ["triton", "triton-by-message"])
def test_windows_that_were_scored_are_not_held_in_memory(engines, make_bundle, rng, kind):
    model = engines[kind].load(make_bundle(samples=2560))
    windows, process = rng.standard_normal((64, 2, 2560)).astype(np.float32), psutil.Process()
    sizes = list(range(44, 65))
    for n in sizes:
        model.infer(windows[:n])
    before = process.memory_info().rss
    for n in 10 * sizes:
        model.infer(windows[:n])
    sent = 10 * sum(sizes) * windows[0].nbytes
    assert process.memory_info().rss - before < sent / 8


@pytest.mark.parametrize("conditions", [0, 3])
def test_scores_are_those_of_onnx_runtime_whatever_the_batch(engine, make_bundle, rng, conditions):
    bundle = make_bundle(conditions=conditions)
    model, session = engine.load(bundle), ort.InferenceSession(str(bundle.onnx))
    windows = rng.standard_normal((100, 2, 64)).astype(np.float32)
    given = rng.uniform(size=(100, conditions)).astype(np.float32) if conditions else None
    if given is not None:
        given[::3, 1] = np.nan
    whole = session.run(OUTPUTS, graph_inputs(bundle.contract, windows, given))
    for n in range(1, 101):
        scored = model.infer(windows[-n:], None if given is None else given[-n:])
        assert scored.score.shape == (n,)
        for name, expected in zip(OUTPUTS, whole, strict=True):
            np.testing.assert_allclose(getattr(scored, name), expected[-n:].reshape(getattr(scored, name).shape), rtol=1e-5)


def test_says_who_scored(engine, tiny_bundle):
    assert engine.load(tiny_bundle).infer(np.ones((1, 2, 64), np.float32)).engine == engine.name


def test_no_windows_give_no_scores(engine, tiny_bundle):
    scored = engine.load(tiny_bundle).infer(np.zeros((0, 2, 64), np.float32))
    assert (scored.score.shape, scored.channel_score.shape, scored.embedding.shape) == ((0,), (0, 2), (0, 3))


@pytest.mark.parametrize("windows,expected", [
    (np.zeros((2, 64)), "shape"), (np.zeros((1, 3, 64)), "3 channels"), (np.zeros((1, 2, 63)), "64"),
    (np.full((1, 2, 64), np.nan), "NaN"), (np.array([["a"]]), "type"),
])
def test_what_is_no_window_is_refused_in_the_contracts_words(engine, tiny_bundle, windows, expected):
    with pytest.raises(InvalidWindow, match=expected):
        engine.load(tiny_bundle).infer(windows)


def test_threads_share_a_model(engine, tiny_bundle, rng):
    model, wrong = engine.load(tiny_bundle), []

    def work(seed):
        windows = np.random.default_rng(seed).standard_normal((1 + seed * 7, 2, 64)).astype(np.float32)
        expected = np.sqrt((windows**2).mean(-1))
        for _ in range(50):
            if not np.allclose(model.infer(windows).channel_score, expected, rtol=1e-5):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_bundles_stand_side_by_side(engine, make_bundle):
    windows = np.ones((2, 2, 64), np.float32)
    one, two, other_shape = (engine.load(make_bundle(**kind)) for kind in ({"gain": 1}, {"gain": 2}, {"gain": 3, "samples": 32}))
    assert (one.infer(windows).score == 1).all() and (two.infer(windows).score == 2).all()
    assert (other_shape.infer(windows[..., :32]).score == 3).all()


def test_a_second_version_leaves_the_first_alone(embedded, make_bundle):
    embedded.load(make_bundle(gain=4))
    before = set(stubs(embedded.server))
    embedded.load(make_bundle(gain=5))
    assert len(before) == 1 and before < set(stubs(embedded.server))


def test_a_version_that_is_unloaded_is_gone_and_the_others_stay(embedded, make_bundle):
    bundles = [make_bundle(gain=4), make_bundle(gain=5)]
    first, second = map(embedded.load, bundles)
    embedded.unload(bundles[1])
    with pytest.raises(PartMissing, match=second.triton_version):
        second.infer(np.ones((1, 2, 64), np.float32))
    assert first.infer(np.ones((1, 2, 64), np.float32)).score == 4


@pytest.mark.parametrize("graph,said", [("of the other", "withdrawn.*off by"), ("none", "withdrawn")])
def test_a_version_that_lies_or_does_not_load_is_withdrawn_and_the_others_stay(embedded, make_bundle, tmp_path, graph, said):
    good, bad, built = make_bundle(gain=4), make_bundle(gain=5), Artifact(tmp_path / "built.onnx")
    built.path.write_bytes(good.onnx.read_bytes() if graph == "of the other" else b"not a graph")
    model = embedded.load(good)
    with pytest.raises(CheckFailed, match=said):
        embedded.load(bad, built)
    assert [p.name for p in embedded.server.repository.glob("*/[0-9]*")] == [model.triton_version]
    assert model.infer(np.ones((1, 2, 64), np.float32)).score == 4
    assert embedded.load(bad).infer(np.ones((1, 2, 64), np.float32)).score == 5


def test_a_server_whose_repository_is_out_of_reach_is_only_proven(server, engines, make_bundle):
    served, unknown = make_bundle(gain=6), make_bundle(gain=7)
    engines["triton"].load(served)
    with TritonEngine(f"grpc://{server.address}") as engine:
        assert engine.load(served).infer(np.ones((1, 2, 64), np.float32)).score == 6
        with pytest.raises(PartMissing, match="triton_repository"):
            engine.load(unknown)


@pytest.fixture
def traffic(embedded, tiny_bundle):
    "A guarded model that two threads use all the time; who scored is kept, and every score is right."
    said: list[tuple[str, str]] = []
    who: list[str] = []
    wrong: list[object] = []
    stop, windows = threading.Event(), np.ones((8, 2, 64), np.float32)
    with Guarded(embedded, tiny_bundle, check_s=0.3, retry_s=0.3, on_switch=lambda *news: said.append(news)) as guard:

        def work():
            while not stop.is_set():
                try:
                    scored = guard.infer(windows)
                    who.append(scored.engine)
                    if len(scored.score) != 8 or (scored.score != 1).any():
                        wrong.append(scored)
                except Exception as e:  # noqa: BLE001 (any error is what this is about)
                    wrong.append(e)
                time.sleep(0.002)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_for(lambda: guard.active == "triton" and "triton" in who)
        yield guard
        wait_for(lambda: guard.active == "triton")
        seen = len(who)
        wait_for(lambda: "triton" in who[seen:])
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert [active for active, _ in said[:3]] == ["triton", "inprocess", "triton"]
    assert "Triton at 127.0.0.1" in said[1][1] and said[2][1] == ""


def test_a_killed_stub_costs_no_score_and_is_replaced(embedded, traffic):
    for process in stubs(embedded.server).values():
        process.kill()
    wait_for(lambda: traffic.active == "inprocess")


def test_a_killed_server_costs_no_score_and_is_replaced(embedded, traffic):
    old = embedded.server.pid
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: traffic.active == "inprocess")
    wait_for(lambda: traffic.active == "triton")
    assert embedded.server.pid != old


def test_a_server_that_hangs_costs_no_score(embedded, traffic):
    embedded.connection.timeout_s = 0.5
    os.kill(embedded.server.pid, signal.SIGSTOP)
    wait_for(lambda: traffic.active == "inprocess")
    os.kill(embedded.server.pid, signal.SIGCONT)


def test_a_dead_stub_is_found_without_traffic(embedded, tiny_bundle):
    said = []
    with Guarded(embedded, tiny_bundle, check_s=0.2, on_switch=lambda active, why: said.append(active)):
        (old,) = stubs(embedded.server).values()
        old.kill()
        wait_for(lambda: len(said) > 1 or set(stubs(embedded.server)) - {old.pid})


def test_a_guard_starts_without_its_engine_and_goes_there_when_it_comes(server, tiny_bundle):
    with TritonEngine("grpc://127.0.0.1:1", repository=server.repository, timeout_s=0.3) as engine:
        looks = []  # what its canary says
        with Guarded(engine, tiny_bundle, retry_s=0.1, on_look=looks.append) as guard:
            assert guard.infer(np.ones((1, 2, 64), np.float32)).engine == "inprocess"
            assert "127.0.0.1:1" in guard.reason and set(looks) == {False}
            engine.connection.open(server.address)  # the server came
            wait_for(lambda: guard.infer(np.ones((1, 2, 64), np.float32)).engine == "triton" and looks[-1])


def test_windows_that_no_engine_can_score_say_nothing_against_the_engine(tmp_path, rng):
    bundle = rms_bundle(tmp_path)
    windows = rng.normal(size=(3, len(bundle.contract.channels), bundle.contract.samples)).astype(np.float32)
    windows[1, 0, 0] = 2 * POISON
    with InProcess() as engine, Guarded(engine, bundle, check_s=None) as guard:
        with pytest.raises(Exception, match="indices element out of data bounds"):
            guard.infer(windows)
        assert guard.reason == "" and guard.switches == 0
        assert len(guard.infer(windows[:1]).score) == 1


def test_a_guardian_that_nobody_listens_to_ends_without_a_complaint(tmp_path):
    order = {"command": [shutil.which("sleep"), "0.1"], "env": {}, "log": str(tmp_path / "log"), "log_bytes": 10**6,
             "folder": str(tmp_path / "home"), "shared": []}
    ours, its = os.pipe()
    os.close(ours)
    guardian = Path(__file__).parents[1] / "edge/triton/guardian.py"
    ended = subprocess.run([sys.executable, "-I", "-S", guardian, json.dumps(order)], stdin=subprocess.PIPE, stdout=its, stderr=subprocess.PIPE, check=False)
    os.close(its)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_an_engine_that_scores_wrongly_is_not_used(make_bundle):
    class Liar:
        name, url = "triton", "liar:"
        contract = make_bundle().contract

        def load(self, bundle, artifact=None):
            model = InProcessModel(bundle)
            self.infer = lambda *inputs: replace(model.infer(*inputs), score=model.infer(*inputs).score * 1.1, engine="triton")
            Canary.of(model).prove(self)

        def unload(self, bundle, artifact=None): ...
        def close(self): ...
        def __enter__(self): return self
        def __exit__(self, *error): ...

    with Guarded(Liar(), make_bundle(), check_s=None) as guard:
        assert guard.infer(np.ones((1, 2, 64), np.float32)).engine == "inprocess"
        assert "off by" in guard.reason


def listening(address):
    host, port = address.split(":")
    with socket.socket() as s:
        return s.connect_ex((host, int(port))) == 0


def test_nothing_is_left_after_close(tiny_bundle, server):
    before = environments()
    engine = TritonEngine("embedded:")
    engine.load(tiny_bundle).infer(np.ones((1, 2, 64), np.float32))
    assert engine.server
    process, address = psutil.Process(engine.server.pid), engine.server.address
    command, family = process.cmdline(), [process.parent(), process, *stubs(engine.server).values()]
    assert left_behind(command) and listening(address) and len(family) == 3
    engine.close()
    assert gone(family) and not listening(address) and not left_behind(command, os.getpid())
    wait_for(lambda: environments() <= before or others(server))
    with pytest.raises(PartMissing, match="closed"):
        engine.load(tiny_bundle)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_the_parent_is_killed(tiny_bundle, server, number):
    before = environments()
    code = f"""
import signal, time, numpy as np
from pdm.model.bundle import load_bundle
from pdm.serve.engine import open_engine
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
engine = open_engine("embedded:")
engine.load(load_bundle({str(tiny_bundle.path)!r})).infer(np.ones((1, 2, 64), np.float32))
print(engine.server.pid, flush=True)
time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        assert parent.stdout
        process = psutil.Process(int(parent.stdout.readline()))
        command, family = process.cmdline(), [process.parent(), process, *process.children()]
        parent.send_signal(number)
        parent.wait(10)
    wait_for(lambda: gone(family) and not left_behind(command, parent.pid))
    wait_for(lambda: environments() <= before or others(server))


def test_the_server_outlives_the_thread_that_started_it(tiny_bundle, server):
    started: list[TritonEngine] = []
    thread = threading.Thread(target=lambda: started.append(TritonEngine("embedded:")))
    thread.start()
    thread.join()
    time.sleep(0.3)
    with started[0] as engine:
        assert engine.server and engine.server.alive
        assert engine.load(tiny_bundle).infer(np.ones((1, 2, 64), np.float32)).engine == "triton"


def test_memory_of_a_client_that_was_killed_is_given_back(server, engines, tiny_bundle):
    engines["triton"].load(tiny_bundle)
    code = f"""
import os, numpy as np
from pdm.model.bundle import load_bundle
from pdm.serve.engine import open_engine
open_engine("grpc://{server.address}").load(load_bundle({str(tiny_bundle.path)!r}))
os.kill(os.getpid(), 9)
"""
    dead = subprocess.Popen([sys.executable, "-c", code])
    dead.wait()

    def regions(engine):
        status = engine.connection.call("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest())
        return [name for name in status.regions if f"-{dead.pid}-" in name]

    with TritonEngine(f"grpc://{server.address}") as engine:
        assert regions(engine)
        engine.load(tiny_bundle)
        assert not regions(engine)


def test_a_repository_that_can_not_be_made_is_told_with_its_remedy(tmp_path):
    (tmp_path / "volume").symlink_to(tmp_path / "away")
    with pytest.raises(PartMissing, match="is its volume mounted"):
        TritonEngine("grpc://127.0.0.1:1", repository=tmp_path / "volume")


def test_a_missing_or_unfit_environment_is_told_with_its_remedy(tmp_path):
    with pytest.raises(PartMissing, match="make triton-env") as missing:
        open_engine("embedded:", environment=tmp_path)
    assert missing.value.exit_code == 2
    with pytest.raises(PartMissing, match="numpy is .*must be below 2"):
        find_environment(sys.prefix)
