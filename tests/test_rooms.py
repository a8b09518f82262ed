"""The house keeps its rooms: who may import whom, and what the edge does without."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["signal", "data", "model", "serve", "stream", "loop"]  # a room imports only rooms before it
OUTSIDE = {"alarms_cli", "bundle_cli", "cli", "cli_output", "config", "dashboards", "dashboards_cli", "demo", "demo_loop", "demo_timeline", "drift_cli", "engine_cli", "errors", "labels_cli", "loop_cli", "panels", "pki", "pki_cli", "plot", "process", "promote_cli", "release_cli", "rollout_cli", "site"}
LIGHT = {"config", "errors", "process", "_pipelines"}  # what rooms may import from outside the rooms; the last is data of the loop

ALLOWED = {  # beyond the standard library and what stands above in this table
    "signal": {"numpy", "scipy"},
    "data": {"cbor2", "pandas", "pyarrow", "pooch", "fsspec", "requests", "pyuff", "pydantic", "yaml", "dask", "distributed"},
    "model": {"torch", "pytorch_lightning", "sklearn", "onnx", "onnxruntime", "mlflow", "matplotlib",
              "model_signing", "sigstore", "cryptography", "oras"},
    "serve": {"tritonclient", "grpc", "google"},
    "stream": {"pydantic_core", "paho", "iotcore", "confluent_kafka", "influxdb_client", "urllib3", "psycopg", "google", "prometheus_client", "psutil"},
    "loop": {"mlflow", "kfp", "kfp_server_api", "cronsim", "river", "papermill", "nbformat", "nbclient", "psutil", "fsspec", "httpx"},
}
EDGE = [
    "pdm", "pdm.errors", "pdm.config", "pdm.process", "pdm.cli",
    *(f"pdm.signal.{p.stem}" for p in sorted((ROOT / "pdm/signal").glob("[a-z]*.py"))),
    "pdm.data.window", "pdm.data.parquet", "pdm.data.store", "pdm.data.archive", "pdm.model.monitor", "pdm.model.bundle",
    "pdm.model.folder", "pdm.model.claim", "pdm.model.signature", "pdm.model.registries", "pdm.model.transport",
    *(f"pdm.serve.{p.stem}" for p in sorted((ROOT / "pdm/serve").glob("[a-z]*.py"))),
    *(f"pdm.stream.{p.stem}" for p in sorted((ROOT / "pdm/stream").glob("[a-z]*.py"))),
]
TOO_HEAVY = ("torch", "pandas", "mlflow", "kfp", "IPython", "jupyterlab", "ipykernel", "pytorch_lightning", "sklearn", "matplotlib", "nbdev", "fastcore")


def modules():
    for path in sorted((ROOT / "pdm").rglob("*.py")):
        if path.stem not in ("__init__", "_modidx"):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


def imports(path):
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):  # nbdev writes pdm's own imports relative
            module = ".".join([*package[: len(package) - node.level + 1], node.module or ""]).strip(".") if node.level else node.module
            yield module
            if module == "pdm":
                yield from (f"pdm.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name,path", list(modules()), ids=lambda v: v if isinstance(v, str) else "")
def test_a_room_imports_only_rooms_above_it(name, path):
    room = name.split(".")[1]
    if room in OUTSIDE - LIGHT:
        return
    rank = ROOMS.index(room) if room in ROOMS else -1
    for other in imports(path):
        if not other.startswith("pdm.") and other != "pdm":
            continue
        target = other.split(".")[1] if "." in other else ""
        if target in ROOMS:
            # errors, config and process stand outside the rooms and use only the vocabulary of the first two
            assert ROOMS.index(target) <= max(rank, 1), f"{name} imports {other}, a room below its own"
        else:
            assert target in LIGHT, f"{name} imports {other}, which stands outside the rooms"


@pytest.mark.parametrize("name,path", [m for m in modules() if m[0].split(".")[1] in ROOMS], ids=lambda v: v if isinstance(v, str) else "")
def test_a_room_keeps_to_its_libraries(name, path):
    rooms = ROOMS[: ROOMS.index(name.split(".")[1]) + 1]
    allowed = set().union(*(ALLOWED.get(r, set()) for r in rooms)) | set(sys.stdlib_module_names) | {"pdm"}
    foreign = {i.split(".")[0] for i in imports(path)} - allowed
    assert not foreign, f"{name} imports {', '.join(sorted(foreign))}, which its room does without"


@pytest.mark.parametrize("name", EDGE)
def test_edge_module_imports_without_training_libraries(name):
    code = f"""
import sys
class Refuse:
    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in {TOO_HEAVY!r}:
            raise ImportError(fullname + " is not on the edge")
sys.meta_path.insert(0, Refuse())
import {name}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]


def test_import_pdm_loads_nothing_else():
    code = "import sys, pdm; print([m for m in sys.modules if m.startswith('pdm.') or m in ('numpy', 'torch')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_loop_loads_torch_only_where_something_is_fitted():
    code = "import sys, pdm.loop.act, pdm.loop.controller, pdm.loop.gate, pdm.loop_cli; print([m for m in ('torch', 'mlflow', 'kfp') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_step_is_read_without_the_grammar_of_addresses():
    code = "import sys; from pdm.loop.steps import parameters_of; parameters_of('train'); print([m in sys.modules for m in ('jsonschema', 'rfc3987_syntax')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[True, False]"


def test_the_contract_is_exposed():
    import pdm

    assert {"Bearing", "Detector", "Verdict", "check_sensor", "diagnose"} <= set(dir(pdm))
    for name in pdm.__all__:
        assert getattr(pdm, name) is not None
    with pytest.raises(AttributeError, match="it offers"):
        pdm.no_such_name  # noqa: B018


def test_the_package_manager_of_the_same_name_is_refused(tmp_path):
    info = tmp_path / "pdm-2.20.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pdm\nVersion: 2.20.0\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import pdm"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "give predmaint an environment of its own" in done.stderr


def test_why_nothing_is_lost_names_tests_that_exist():
    page = (ROOT / "nbs/explanations/nothing_lost.ipynb").read_text()
    named = re.findall(r"`(tests/[a-z_/]+\.py)` `(test_\w+)`", page)
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text()]
    assert len(named) > 20 and not missing, missing
