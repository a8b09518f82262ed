"""The probe of Triton's pod against the real tritonserver: it sees what the server's own health page does not."""

import os
import signal
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from urllib.request import urlopen

import psutil
import pytest
from servers import alive, wait_for

from pdm.errors import PartMissing
from pdm.process import free_port
from pdm.serve.server import TritonServer
from pdm.serve.triton import TritonEngine

CANARY = Path(__file__).resolve().parent.parent / "edge/triton/canary.py"


def canary(port, *more):
    return subprocess.run([sys.executable, "-I", CANARY, "--address", f"127.0.0.1:{port}", *more], capture_output=True, text=True)


@pytest.fixture(scope="module")
def triton(tmp_path_factory):
    "A server with its HTTP API on, an engine that loads into it, and the port."
    port = free_port()
    try:
        server = TritonServer(options={"allow-http": "true", "http-address": "127.0.0.1", "http-port": port})
    except PartMissing as e:
        pytest.skip(str(e))
    with server:
        engine = TritonEngine(f"grpc://{server.address}", repository=server.repository)
        yield server, engine, port
        engine.close()


def test_a_server_without_models_is_healthy(triton):
    done = canary(triton[2])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("conditions", [0, 2])
def test_every_loaded_model_is_asked_and_a_dead_stub_is_seen_until_it_runs_again(triton, make_bundle, conditions):
    server, engine, port = triton
    bundle = make_bundle(name=f"fan_{conditions}", conditions=conditions)
    model = engine.load(bundle)
    assert canary(port).returncode == 0

    stub = next(p for p in psutil.Process(server.pid).children() if alive(p, "triton_python") and model.triton_name in " ".join(p.cmdline()))
    os.kill(stub.pid, signal.SIGKILL)
    wait_for(lambda: not alive(stub))
    for page in ("health/ready", f"models/{model.triton_name}/ready"):
        assert urlopen(f"http://127.0.0.1:{port}/v2/{page}").status == 200  # which is why there is a canary
    done = canary(port)
    assert done.returncode == 1 and f"model {model.triton_name}, version {model.triton_version}: " in done.stderr and "not healthy" in done.stderr

    engine.load(bundle)  # as the agent does it
    assert canary(port).returncode == 0
    engine.unload(bundle)


def test_no_server_is_said_in_one_sentence():
    done = canary(free_port())
    assert done.returncode == 1 and "Connection refused" in done.stderr and done.stderr.count("\n") == 1


class Liar(BaseHTTPRequestHandler):
    "A server of one model, whose answer to an inference is the test's."
    said = b""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(b"" if "health" in self.path else b'{"inputs": [{"name": "window", "datatype": "FP32", "shape": [-1, 1, 4]}],'
                                                      b' "outputs": [{"name": "score", "datatype": "FP32", "shape": [-1, 1]}]}')

    def do_POST(self):
        index = self.path == "/v2/repository/index"
        self.answer(b'[{"name": "fan", "version": "7", "state": "READY"}]' if index else b'{"outputs": %s}' % self.said)

    def answer(self, body):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.parametrize("said,why", [
    (b'[{"name": "score", "datatype": "FP32", "shape": [1, 1], "data": [0.5]}]', ""),
    (b'[{"name": "score", "datatype": "FP32", "shape": [1, 1], "data": [NaN]}]', "score has values that are not finite"),
    (b'[{"name": "score", "datatype": "FP32", "shape": [0], "data": []}]', "score has 0 values, [-1, 1] were expected"),  # what numpy 2 makes of it
    (b"[]", "score has 0 values"),
    (b"[", "is answered with what is no JSON"),
])
def test_an_answer_that_is_not_whole_is_no_answer(said, why):
    server = HTTPServer(("127.0.0.1", 0), type("One", (Liar,), {"said": said}))
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        done = canary(server.server_port)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == bool(why) and why in done.stderr and ("model fan, version 7" in done.stderr) == bool(why)


def test_a_server_that_hangs_is_not_waited_for():
    "It takes connections and says nothing."
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = canary(silent.getsockname()[1], "--timeout", "0.3")
    assert done.returncode == 1 and "no answer to GET /v2/health/ready (timed out)" in done.stderr
