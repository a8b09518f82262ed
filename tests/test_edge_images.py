"""The images of the edge: what is in them, and that they work together as a cluster would hold them. It takes minutes, and runs on `make edge-images-test` alone."""

import json
import os
import re
import shutil
import signal
import sqlite3
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import psutil
import pytest
from edge_images import HELD, ROOT, Container, base, build, done, image, podman, run, settings
from servers import alive, answers, wait_for

from pdm.process import free_port
from pdm.stream.broker import EmbeddedBroker
from pdm.stream.sensor_client import SensorClient

pytestmark = [pytest.mark.skipif(not os.environ.get("PREDMAINT_EDGE_IMAGES_TEST"), reason="make edge-images-test"), pytest.mark.timeout(1200)]
PROGRAMS = ["agent", "sinks", "updater"]
IMAGES = [*PROGRAMS, "triton"]
TOOLS = Path(os.environ.get("PREDMAINT_PLATFORM_ENV") or ROOT / ".venv-platform")
PORTS = {"agent": "metrics_port", "sinks": "sinks_metrics_port", "updater": "updater_metrics_port"}
RATE_HZ, SAMPLES, ASSET = 2560.0, 512, "acme/lyon/hall-2/line-1/fan-1"
pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)


def config(name):
    return json.loads(podman("image", "inspect", image(name)))[0]


def inside(name, *command, flags=()):
    "What a command prints in a container that is held as a cluster holds it."
    return podman("run", "--rm", "--network=none", "--no-healthcheck", *HELD, *flags, "--entrypoint=", image(name), *command)


# what is in them


@pytest.mark.parametrize("name", ["agent", "triton"])
def test_a_base_that_is_named_by_a_tag_is_refused(name):
    refused = build(name, BASE="localhost/predmaint-base-python:latest", TAG="none")
    assert refused.returncode and "expected name@sha256:<digest>" in refused.stderr + refused.stdout


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_says_what_it_is_and_holds_nothing_of_its_making(name):
    found = config(name)
    labels = {k.removeprefix("org.opencontainers.image."): v for k, v in found["Labels"].items()}
    assert labels["title"] == f"predmaint-{name}" and labels["revision"] == done("git", "rev-parse", "HEAD")
    assert re.search("@sha256:[0-9a-f]{64}$", labels["base.name"]) and found["Config"]["User"] == "65532:65532"
    told = podman("history", "--no-trunc", "--format", "{{.CreatedBy}}", image(name)) + json.dumps(found["Config"]["Env"])
    assert "PIP_" not in told and "UV_" not in told and "/mnt" not in told
    search = "command -v gcc cc pip uv podman; ls -d /cache /build /opt/build /mnt/* /run/secrets/* ~root/.cache /etc/uv 2>/dev/null; true"
    assert inside(name, "sh", "-c", search, flags=["--user=0"]) == ""  # nobody else may look into the home of who built it


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_without_the_libraries_that_train(name):
    code = ("import importlib.util, os; heavy = 'torch pandas mlflow kfp sklearn matplotlib IPython lightning jupyterlab nbdev pip setuptools'.split(); "
            "print(os.getuid(), os.access('/opt', os.W_OK), [m for m in heavy if importlib.util.find_spec(m)])")
    assert inside(name, "python", "-c", code) == "65532 False []"


def test_each_is_small_and_they_share_what_they_have_in_common(tmp_path):
    "Compressed, as a registry keeps their layers."
    layers = {}
    for name in IMAGES:
        podman("save", "--quiet", "--format=oci-dir", f"--output={tmp_path / name}", image(name))
        index = json.loads((tmp_path / name / "index.json").read_text())["manifests"][0]
        manifest = json.loads((tmp_path / name / "blobs/sha256" / index["digest"].removeprefix("sha256:")).read_text())
        layers[name] = {layer["digest"]: layer["size"] for layer in manifest["layers"]}
        shutil.rmtree(tmp_path / name)
    sizes = {name: round(sum(sizes.values()) / 1e6) for name, sizes in layers.items()}
    common = layers["agent"].keys() & layers["sinks"].keys() & layers["updater"].keys()
    shared, whole = sum(layers["agent"][d] for d in common) / 1e6, sum({d: s for sizes in layers.values() for d, s in sizes.items()}.values()) / 1e6
    print(f"\nMB, compressed: {sizes}; {shared:.0f} of them are the same layers of agent, sinks and updater; all on one board: {whole:.0f}")
    assert max(sizes.values()) <= 350 and shared > 0.9 * sizes["agent"]


def test_the_bill_of_materials_lists_what_is_pinned(tmp_path):
    if not shutil.which("syft", path=f"{TOOLS / 'bin'}{os.pathsep}{os.environ['PATH']}"):
        pytest.skip("make platform-env (it brings syft)")
    ended = build("agent", OUT=str(tmp_path), PATH=f"{TOOLS / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert ended.returncode == 0, ended.stderr[-2000:]
    bill = json.loads((tmp_path / "agent.spdx.json").read_text())
    of = {re.sub("[._]", "-", p["name"].lower()): p.get("versionInfo") for p in bill["packages"]}
    installed = inside("agent", "python", "-c", "import importlib.metadata as m; print('\\n'.join(d.name for d in m.distributions()))").split()
    names = {re.sub("[._]", "-", n.lower()) for n in installed} - {"predmaint"}
    assert bill["spdxVersion"] == "SPDX-2.3" and len(names) > 30 and {n: of.get(n) for n in names} == {n: pins[n] for n in names}
    assert of["predmaint"] == "0.1.0" and of["libc6"] and of["python3-11"]


@pytest.mark.parametrize("extras", [["kafka"], ["influx", "postgres", "bigquery", "stores"], ["signing", "oci", "stores", "engine"]], ids=PROGRAMS)
def test_all_of_it_is_to_be_had_for_a_jetson(extras, tmp_path):
    "Wheels for 64-bit ARM, in the pinned versions: what the second half of a multi-arch build installs."
    uv = Path(shutil.which("uv") or pytest.skip("pip install uv"))
    done(uv, "pip", "install", "--dry-run", "--quiet", f"--target={tmp_path}", "--python-platform=aarch64-manylinux_2_28", "--python-version=3.11", "--only-binary=:all:",
         "-c", "constraints.txt", "-r", "pyproject.toml", *(f"--extra={e}" for e in extras))


def test_a_list_of_platforms_makes_a_manifest_for_each_of_them():
    "Of this machine's own platform: another one's would need qemu-user-static."
    here = podman("info", "--format={{.Version.OsArch}}")
    ended = build("agent", PLATFORMS=here, TAG="platforms")
    assert ended.returncode == 0, ended.stderr[-2000:]
    listed = json.loads(podman("manifest", "inspect", "localhost/predmaint-agent:platforms"))["manifests"]
    podman("manifest", "rm", "localhost/predmaint-agent:platforms")
    assert ["{os}/{architecture}".format(**m["platform"]) for m in listed] == [here]


def test_the_image_for_a_jetson_is_triton_and_the_builder_of_engines(tmp_path):
    "On a stand-in for NVIDIA's image, which is for a Jetson only: a script in the server's place, and no TensorRT."
    server = "/opt/tritonserver/bin/tritonserver"
    (tmp_path / "Containerfile").write_text(f"FROM {base()}\nRUN mkdir -p {Path(server).parent} && printf '#!/bin/sh\\necho server \"$@\"\\n' > {server} && chmod +x {server}\n")
    podman("build", "--pull=never", "--network=none", "-t", "localhost/tritonserver-stand-in", tmp_path)
    digest = json.loads(podman("image", "inspect", "localhost/tritonserver-stand-in"))[0]["Digest"]
    refused = build("jetson", TRITON="localhost/tritonserver-stand-in:latest")
    assert refused.returncode and "expected name@sha256:<digest>" in refused.stderr + refused.stdout
    ended = build("jetson", TRITON=f"localhost/tritonserver-stand-in@{digest}")
    assert ended.returncode == 0, ended.stderr[-2000:]
    held = ["run", "--rm", "--network=none", "--no-healthcheck", *HELD, f"--volume={folder(tmp_path / 'models')}:/models", "localhost/predmaint-triton:under-test-jetson"]
    assert podman(*held, "--log-verbose=1").split()[1:] == [
        "--model-repository=/models/repository", "--backend-directory=/opt/tritonserver/backends", "--model-control-mode=explicit", "--disable-auto-complete-config",
        "--strict-readiness=false", "--exit-timeout-secs=5", "--log-verbose=1"]
    builder = run("podman", *held[:-1], "--entrypoint=", held[-1], "python3", "/opt/predmaint/build_engine.py", "device", **settings())
    assert builder.returncode == 2 and "has no tensorrt" in builder.stderr


# together


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    "Fitted on noise, and exported: a real bundle and its calibration."
    import pdm

    windows = np.random.default_rng(0).normal(0, 1, (200, 2, SAMPLES)).astype(np.float32)
    fitted = pdm.Detector.fit(windows, rate_hz=RATE_HZ, channels=["h", "v"], hop_s=SAMPLES / RATE_HZ, units=["g", "g"],
                              kind="mahalanobis", name="fan")
    return *fitted.export(tmp_path_factory.mktemp("exported")), windows


def folder(at: Path) -> Path:
    "One that whoever runs in a container may write to."
    at.mkdir(parents=True)
    at.chmod(0o777)
    return at


@pytest.fixture(scope="module")
def triton(tmp_path_factory):
    "The container, the volume of its models, and its HTTP and gRPC ports."
    models, http, grpc = folder(tmp_path_factory.mktemp("triton") / "models"), free_port(), free_port()
    with Container("triton", f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={free_port()}", "--http-address=127.0.0.1", "--grpc-address=127.0.0.1",
                   "--metrics-address=127.0.0.1", flags=(f"--volume={models}:/models",)) as container:
        container.wait(lambda: answers(f"http://127.0.0.1:{http}/v2/health/ready"))
        yield container, models, http, grpc


def probe(container, port):
    "The image's own health check, at another port."
    command = config(container.name)["Healthcheck"]["Test"][1:]
    if container.name == "triton":
        return container.run(*command, "--address", f"127.0.0.1:{port}")
    return container.run(*command[:-1], str(port))


def test_triton_serves_a_real_bundle_and_its_probe_sees_a_dead_stub(triton, detector):
    from pdm.serve.engine import InProcess
    from pdm.serve.triton import TritonEngine

    container, models, http, grpc = triton
    bundle, _, windows = detector
    engine = TritonEngine(f"grpc://127.0.0.1:{grpc}", repository=models / "repository")
    try:
        assert probe(container, http).returncode == 0
        model, here = engine.load(bundle), InProcess().load(bundle)
        assert np.allclose(model.infer(windows[:64]).score, here.infer(windows[:64]).score, rtol=1e-5)
        assert probe(container, http).returncode == 0

        stub = next(p for p in psutil.Process(container.pid).children(recursive=True) if alive(p, "triton_python"))
        os.kill(stub.pid, signal.SIGKILL)
        wait_for(lambda: not alive(stub))
        assert answers(f"http://127.0.0.1:{http}/v2/health/ready")
        dead = probe(container, http)
        assert dead.returncode == 1 and f"model {model.triton_name}" in dead.stderr
        engine.load(bundle)
        assert probe(container, http).returncode == 0
        engine.unload(bundle)
    finally:
        engine.close()


def test_agent_sinks_and_updater_are_a_site_and_end_when_they_are_told(triton, detector, tmp_path):
    _, models, _, grpc = triton
    bundle, record, windows = detector
    site, state, ports = folder(tmp_path / "site"), folder(tmp_path / "state"), {name: free_port() for name in PROGRAMS}
    shutil.copytree(bundle.path, site / bundle.path.name)
    shutil.copy(record, site / "fan.json")
    (site / "assets.yaml").write_text(json.dumps({"assets": [{"path": ASSET, "streams": {"vibration": {
        "bundle": bundle.path.name, "calibration": "fan.json"}}}]}))
    with EmbeddedBroker(tmp_path / "broker") as broker:
        told = {"PREDMAINT_BROKER_URL": broker.url, "PREDMAINT_ENGINE_URL": f"grpc://127.0.0.1:{grpc}", "PREDMAINT_TRITON_REPOSITORY": "/models/repository",
                "PREDMAINT_ASSETS": "/site/assets.yaml", "PREDMAINT_METRICS_ADDRESS": "127.0.0.1", "PREDMAINT_UNSIGNED_BUNDLES": "true",
                "PREDMAINT_ARCHIVE_URL": "file:/state/archive",
                **{f"PREDMAINT_{PORTS[name].upper()}": port for name, port in ports.items()}}
        flags = (f"--volume={site}:/site:ro", f"--volume={state}:/state", f"--volume={models}:/models")
        running = []
        try:
            for name in PROGRAMS:
                running.append(Container(name, flags=flags, **told))
            for container in running:
                container.wait(lambda c=container: answers(f"http://127.0.0.1:{ports[c.name]}/readyz"))
            with SensorClient(broker.url) as client:
                out = client.open(ASSET, "vibration", RATE_HZ, ("h", "v"), ("g", "g"))
                for window in windows[:50]:
                    out.send(window)
                client.flush(30)
                assert client.counts["acknowledged"] == 50

            def stored():
                with sqlite3.connect(f"file:{state / 'store.db'}?mode=ro", uri=True) as store:
                    return store.execute("SELECT count(*) FROM verdict").fetchone()[0]

            running[1].wait(lambda: (state / "store.db").exists() and stored() >= 50, 20)
            assert stored() == 50
            page = urlopen(f"http://127.0.0.1:{ports['agent']}/metrics").read().decode()
            assert 'pdm_windows_total{result="scored"} 50.0' in page
            assert re.search(r'^pdm_inference_seconds_count\{engine="triton"\} [1-9]', page, re.M) and not re.search(r"^pdm_engine_fallback\{.*\} 1", page, re.M)
            assert {(state / name).stat().st_uid for name in ("journal.db", "store.db")} == {65532}
            assert [probe(c, ports[c.name]).returncode for c in running] == [0, 0, 0]
            assert [c.stop() for c in running] == [0, 0, 0]
            assert "cannot reach" not in running[0].log()
        finally:
            for container in running:
                container.close()
