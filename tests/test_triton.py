"""Triton through its whole life: what it is told, what it is sent, and what it makes of full disks, taken ports, kills and restarts."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import venv
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from google.protobuf import text_format
from servers import alive, wait_for
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc import service_pb2 as pb

from pdm.errors import CheckFailed, InvalidBundle, PartMissing
from pdm.model.bundle import Condition, Contract
from pdm.process import free_port
from pdm.serve.engine import Artifact, Guarded
from pdm.serve.repository import Repository, model_config, profile_of
from pdm.serve.server import TritonServer, find_environment
from pdm.serve.triton import TritonEngine

ONES = np.ones((2, 2, 64), np.float32)


@pytest.fixture(scope="module", autouse=True)
def environment():
    try:
        return find_environment()
    except PartMissing as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def engine():
    with TritonEngine("embedded:") as engine:
        yield engine


@pytest.fixture
def own():
    "A server of the test's own, to be killed."
    with TritonEngine("embedded:") as engine:
        yield engine


def copy_of(bundle, folder, name="built", precision="fp32"):
    "The bundle's own graph as an artifact; another name in its header makes it other bytes."
    import onnx

    graph = onnx.load(bundle.onnx)
    graph.doc_string = name
    path = folder / f"{name}.onnx"
    onnx.save(graph, path)
    return Artifact(path, precision)


def versions(engine):
    return {f"{p.parent.name}/{p.name}" for p in engine.server.repository.glob("*/[0-9]*")}


def stubs(engine):
    return [p for p in psutil.Process(engine.server.pid).children() if alive(p, "triton_python")]


# the configuration


@pytest.mark.parametrize("profile", ["cpu", "jetson", "onnxruntime"])
def test_the_configuration_of_a_profile_is_the_golden_one_and_fits_tritons_schema(profile):
    contract = Contract(name="motor", kind="conv_ae", channels=("h", "v"), units=("g", "g"), rate_hz=25600, samples=2048, embedding=16,
                        conditions=(Condition(name="speed_rpm", unit="rpm", low=900, high=1800),), training_data="0" * 64)
    golden = (Path(__file__).parent / f"golden/{profile}.pbtxt").read_text()
    assert model_config(contract, profile_of(profile)) == golden
    config = text_format.Parse(golden, model_config_pb2.ModelConfig())
    assert {i.name for i in config.input} == {"window", "conditions", "conditions_known"} and config.version_policy.HasField("all")
    with pytest.raises(text_format.ParseError):
        text_format.Parse(golden.replace("max_batch_size", "max_batch"), model_config_pb2.ModelConfig())


# what it is sent


def request(model, dtype="FP32", **inputs):
    "A request as any client could send it."
    message = pb.ModelInferRequest(model_name=model.triton_name, model_version=model.triton_version)
    for name, values in inputs.items():
        message.inputs.add(name=name, datatype=dtype, shape=values.shape)
        message.raw_input_contents.append(values.tobytes())
    return message


@pytest.mark.parametrize("inputs,said", [
    ({"window": np.full((1, 2, 64), np.nan, np.float32)}, "window has values that are NaN or infinite: window must be float32"),
    ({"window": np.ones((1, 2, 63), np.float32)}, "unexpected shape"),
    ({"window": np.ones((1, 3, 64), np.float32)}, "unexpected shape"),
    ({"window": np.ones((65, 2, 64), np.float32)}, "batch-size must be <= 64"),
    ({"window": np.ones((1, 2, 64)), "dtype": "FP64"}, "data-type"),
    ({"windows": np.ones((1, 2, 64), np.float32)}, "unexpected inference input 'windows'"),
    ({}, "expected 1 inputs but got 0"),
])
def test_a_bad_request_is_refused_with_its_reason_and_the_others_are_answered(engine, tiny_bundle, inputs, said):
    model, scores, stop = engine.load(tiny_bundle), [], threading.Event()

    def ask():
        while not stop.is_set():
            scores.append(float(model.infer(ONES).score[0]))

    thread = threading.Thread(target=ask)
    thread.start()
    wait_for(lambda: scores)
    try:
        with pytest.raises(PartMissing, match=f"INVALID_ARGUMENT.*{said}"):
            engine.connection.call("ModelInfer", request(model, **inputs))
        seen = len(scores)
        wait_for(lambda: len(scores) > seen + 1)
    finally:
        stop.set()
        thread.join()
    assert set(scores) == {1.0}


def test_a_graph_that_is_not_what_its_configuration_says_does_not_load(engine, make_bundle, tmp_path):
    bundle, built = make_bundle(gain=31), Artifact(tmp_path / "built.onnx")
    shutil.copyfile(make_bundle(samples=32).onnx, built.path)
    with pytest.raises(CheckFailed, match=r"the graph takes .*\(2, 32\).*config.pbtxt says .*\(2, 64\)"):
        engine.load(bundle, built)


# versions


def test_artifacts_of_a_bundle_stand_side_by_side_and_are_retired_one_by_one(own, make_bundle, tmp_path):
    bundle = make_bundle(gain=3)
    built = [None, copy_of(bundle, tmp_path, "first"), copy_of(bundle, tmp_path, "second"), copy_of(bundle, tmp_path, "third", "int8")]
    models = [own.load(bundle, a) for a in built]
    assert len(stubs(own)) == len(versions(own)) == 4
    assert [m.infer(ONES).score[0] for m in models] == [3] * 4
    for n, artifact in enumerate(built):
        own.unload(bundle, artifact)
        own.unload(bundle, artifact)
        assert [m.infer(ONES).score[0] for m in models[n + 1:]] == [3] * (3 - n)
        with pytest.raises(PartMissing, match="was unloaded"):
            models[n].infer(ONES)
    wait_for(lambda: not stubs(own))
    assert not versions(own)


def test_several_models_of_several_asset_types_serve_at_once(own, make_bundle):
    kinds = [{"name": "motor", "gain": 1.0}, {"name": "motor", "gain": 2.0}, {"name": "pump", "gain": 3.0, "samples": 32},
             {"name": "fan", "gain": 4.0, "channels": ("x", "y", "z")}, {"name": "gear", "gain": 5.0, "conditions": 2}]
    models, wrong = [own.load(make_bundle(**kind)) for kind in kinds], []

    def work(model, gain):
        windows = np.ones((5, len(model.contract.channels), model.contract.samples), np.float32)
        for _ in range(50):
            if not np.allclose(model.infer(windows).score, gain):
                wrong.append(model.triton_name)

    threads = [threading.Thread(target=work, args=(m, k["gain"])) for m, k in zip(models, kinds, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len({m.triton_name for m in models}) == 4


def test_versions_that_come_and_go_under_load_fail_no_request(own, make_bundle):
    bundles = [make_bundle(gain=g) for g in (1.0, 2.0, 3.0)]
    current, wrong, done, stop = [own.load(bundles[0]), 1.0], [], [], threading.Event()

    def work():
        while not stop.is_set():
            model, gain = current
            try:
                done.append(gain)
                if (model.infer(ONES).score != gain).any():
                    wrong.append(gain)
            except PartMissing as e:
                wrong.append(e)

    def swap(bundle, gain):
        nonlocal current
        before, current = current, [own.load(bundle), gain]
        seen = len(done)
        wait_for(lambda: len(done) > seen + 20)  # by now both threads ask the new one
        own.unload(bundles[int(before[1]) - 1])

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for gain in (2, 3, 1, 3):
        swap(bundles[gain - 1], float(gain))
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and set(done) == {1.0, 2.0, 3.0}


def test_unload_waits_for_the_answers_that_are_under_way(own, make_bundle):
    bundle = make_bundle(gain=8, samples=2048)
    model, windows, answers = own.load(bundle), np.ones((6400, 2, 2048), np.float32), []
    thread = threading.Thread(target=lambda: answers.append(model.infer(windows)))  # a hundred requests
    thread.start()
    wait_for(lambda: model._under_way)
    own.unload(bundle)
    thread.join()
    assert (answers[0].score == 8).all()


# kills


class Beside:
    "A server of ours; who finds it dead starts another."

    def __init__(self, _folder):
        self.engine = TritonEngine("embedded:")

    @property
    def server(self):
        return self.engine.server

    def revive(self):
        "The engine does it."

    def close(self):
        self.engine.close()


class Elsewhere:
    "A server that somebody else runs, and starts again: its volume and its address outlive it."

    def __init__(self, folder):
        self.options = {"model-repository": folder / "models/repository", "grpc-port": free_port()}
        self.server = TritonServer(options=self.options)
        self.engine = TritonEngine(f"grpc://{self.server.address}", repository=self.server.repository)

    def revive(self):
        self.server.stop()
        self.server = TritonServer(options=self.options)

    def close(self):
        self.engine.close()
        self.server.stop()


@contextmanager
def killed(place, step, before):
    "Kill the server, once, when the engine comes to a step: before it does it, or after."
    call, done = step[0].isupper(), []
    owner, name = (place.engine.connection, "call") if call else (place.engine._repository, step)
    real = getattr(owner, name)

    def deadly(what, *args, **kwargs):
        mine = not done and (what == step or not call)
        if mine:
            done.append(step)
        if mine and before:
            os.kill(place.server.pid, signal.SIGKILL)
        result = real(what, *args, **kwargs)
        if mine and not before:
            os.kill(place.server.pid, signal.SIGKILL)
        return result

    setattr(owner, name, deadly)
    yield
    delattr(owner, name)
    assert done


@pytest.mark.parametrize("kind", [Beside, Elsewhere])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("step", ["publish", "RepositoryModelLoad", "ModelInfer", "withdraw", "RepositoryModelUnload"])
def test_a_server_killed_at_any_step_ends_with_a_served_and_proven_model(make_bundle, tmp_path, kind, step, before):
    last = step == "RepositoryModelUnload"  # it is called where no other version of the model remains
    old, new, place = make_bundle(gain=4), make_bundle(gain=5, name="pump" if last else "motor"), kind(tmp_path)
    try:
        with Guarded(place.engine, old, check_s=None) as guard, killed(place, step, before):
            for _ in range(2):
                try:
                    place.engine.load(new)
                    place.engine.unload(new)
                except (PartMissing, CheckFailed):
                    assert guard.infer(ONES).score[0] == 4  # by Triton or not
                    place.revive()
            place.revive()
            assert guard.look() and guard.infer(ONES).engine == "triton"
        assert place.engine.load(new).infer(ONES).score[0] == 5 and place.engine.load(old).infer(ONES).score[0] == 4
    finally:
        place.close()


def test_a_server_that_comes_back_with_nothing_loaded_is_given_its_models_again(make_bundle, tmp_path):
    "As in a cluster: its volume and its address outlive it, and in explicit mode it loads nothing by itself."
    options = {"model-repository": tmp_path / "models/repository", "grpc-port": free_port()}
    first, second = make_bundle(gain=4), make_bundle(gain=5)
    with TritonServer(options=options) as server, TritonEngine(f"grpc://{server.address}", repository=server.repository) as engine:
        with Guarded(engine, first, check_s=0.2, retry_s=0.2) as one, Guarded(engine, second, check_s=0.2, retry_s=0.2) as two:
            assert one.active == two.active == "triton"
            server.stop()
            wait_for(lambda: one.active == two.active == "inprocess")
            assert one.infer(ONES).score[0] == 4 and two.infer(ONES).score[0] == 5
            with TritonServer(options=options):
                wait_for(lambda: one.active == two.active == "triton")
                assert one.infer(ONES).score[0] == 4 and two.infer(ONES).score[0] == 5


def test_a_version_that_was_damaged_on_disk_is_replaced_when_it_is_loaded_again(own, make_bundle):
    bundle = make_bundle(gain=4)
    own.load(bundle)
    model = own._repository.path(bundle) / "model.onnx"
    model.write_bytes(bytes(model.stat().st_size))
    (process,) = stubs(own)
    process.kill()
    assert own.load(bundle).infer(ONES).score[0] == 4 and model.read_bytes() == bundle.onnx.read_bytes()


def test_memory_that_a_killed_client_had_not_yet_shared_is_swept_up(engine, tiny_bundle):
    dead = subprocess.run([sys.executable, "-c", "import os; from pdm.serve.server import _regions; print(_regions() + 'abcdef-0')"],
                          capture_output=True, text=True, check=True).stdout.strip()
    region = Path("/dev/shm", dead)
    region.write_bytes(b"x")
    with TritonEngine(f"grpc://{engine.server.address}", repository=engine.server.repository) as other:
        other.load(tiny_bundle)
    assert not region.exists()


# the disk


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 64 kB."
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield disk
    subprocess.run(["umount", disk], check=True)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


@pytest.mark.parametrize("joins", [True, False], ids=["second version", "first version"])
def test_a_full_disk_leaves_the_repository_as_it_was(small_disk, make_bundle, tmp_path, joins):
    repository, good = Repository(small_disk / "repository"), make_bundle(gain=4)
    repository.publish(good)
    before, large = contents(small_disk), tmp_path / "large.onnx"
    large.write_bytes(bytes(200_000))
    with pytest.raises(PartMissing, match="No space left on device.*is there room"):
        repository.publish(good if joins else make_bundle(name="pump"), Artifact(large))
    assert contents(small_disk) == before


def test_a_file_that_can_not_be_written_leaves_the_repository_as_it_was(make_bundle, tmp_path):
    "The same for whoever is not root: a limit on the size of files, in a process of its own."
    bundle, folder = make_bundle(gain=4), tmp_path / "models"
    code = f"""
import atexit, resource
from pdm.model.bundle import load_bundle
from pdm.serve.repository import Repository
repository = Repository({str(folder / "repository")!r})
most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, most[1]))
atexit.register(resource.setrlimit, resource.RLIMIT_FSIZE, most)  # whoever measures coverage writes at the end
repository.publish(load_bundle({str(bundle.path)!r}))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "PartMissing" in ended.stderr and "is there room" in ended.stderr
    assert list(contents(folder)) == ["repository"]


def test_what_a_killed_process_left_aside_is_swept_up_in_time(make_bundle, tmp_path):
    fresh, old = tmp_path / ".repository-fresh", tmp_path / ".repository-old"
    for folder in (fresh, old):
        folder.mkdir()
    os.utime(old, (0, 0))
    Repository(tmp_path / "repository")
    assert fresh.exists() and not old.exists()


def test_bundles_of_one_number_do_not_displace_each_other(make_bundle, tmp_path):
    repository, bundle = Repository(tmp_path / "repository"), make_bundle(gain=4)
    note = repository.publish(bundle) / "digest"
    note.write_text(note.read_text().replace(bundle.digest, "f" * 64))
    with pytest.raises(InvalidBundle, match="unload the first"):
        repository.publish(bundle)


# the start


def unfit(environment, tmp_path, *missing, wheel="", numpy=None):
    "An environment like Triton's, made of links, in which something is missing or too new."
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    there = environment.wheel.parents[1]
    for part in there.iterdir():
        if part.name not in ("pytriton", "__pycache__") and not part.name.startswith("nvidia_pytriton-"):
            (site / part.name).symlink_to(part)
    (info,) = there.glob("nvidia_pytriton-*.dist-info")
    shutil.copytree(info, site / info.name)
    if wheel:
        text = (site / info.name / "WHEEL").read_text()
        (site / info.name / "WHEEL").write_text(text.replace("manylinux_2_35", wheel))
    own = site / "pytriton/tritonserver"
    for part in ("bin/tritonserver", "backends/python", f"python_backend_stubs/{environment.python}/triton_python_backend_stub"):
        if part not in missing:
            (own / part).parent.mkdir(parents=True, exist_ok=True)
            (own / part).symlink_to(environment.wheel / part)
    return folder


def test_a_missing_stub_is_named(environment, tmp_path):
    stub = f"python_backend_stubs/{environment.python}/triton_python_backend_stub"
    with pytest.raises(PartMissing, match=f"the wheel has no {stub}.*make triton-env"):
        find_environment(unfit(environment, tmp_path, stub))


def test_a_glibc_that_is_too_old_is_named(environment, tmp_path):
    with pytest.raises(PartMissing, match=r"the wheel needs glibc 2\.99 and this system has 2\.\d+"):
        find_environment(unfit(environment, tmp_path, wheel="manylinux_2_99"))


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PartMissing, match=f"127.0.0.1:{port}.*already in use"):
            TritonServer(options={"grpc-port": port})


def test_a_server_that_dies_at_once_is_given_pauses_and_its_reason_is_told(own, environment, tiny_bundle, tmp_path):
    folder = unfit(environment, tmp_path, "bin/tritonserver")
    (site,) = folder.glob("lib/python*/site-packages")
    program, lives = site / "pytriton/tritonserver/bin/tritonserver", tmp_path / "lives"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho one >> {lives}\necho 'error: no such luck'\nexit 1\n")
    program.chmod(0o755)
    own.load(tiny_bundle)
    own._environment = folder
    os.kill(own.server.pid, signal.SIGKILL)
    wait_for(lambda: not own.server.alive)
    said = set()
    for _ in range(50):
        with pytest.raises(PartMissing) as e:
            own.load(tiny_bundle)
        said.add(str(e.value).split(",")[0])
    assert lives.read_text().splitlines() == ["one"]
    assert "tritonserver died 1 times in a row" in said and "no such luck" in str(e.value)


def test_the_log_is_kept_and_does_not_grow_beyond_its_size(tmp_path, tiny_bundle):
    log, older = tmp_path / "triton.log", tmp_path / "triton.log.1"
    log.write_text("from the last life\n" * 1000)
    with TritonServer(log=log, log_mb=0.01, options={"log-verbose": 1}) as server:
        with TritonEngine(f"grpc://{server.address}", repository=server.repository) as engine:
            wait_for(lambda: older.exists())
            assert older.read_text().startswith("from the last life")
            model = engine.load(tiny_bundle)

            def rotated():
                model.infer(ONES)
                return "from the last life" not in older.read_text()

            wait_for(rotated)
    assert log.exists()
