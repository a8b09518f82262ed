"""The import rule of the house, and the graph that it holds for: who may import whom."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["signal", "data", "model", "serve", "stream", "loop"]  # a room imports only rooms before it
OUTSIDE = {"alarms_cli", "bundle_cli", "card", "cli", "cli_output", "config", "dashboards", "dashboards_cli", "demo", "demo_loop", "demo_timeline", "deploy_cli", "drift_cli", "engine_cli", "errors", "labels_cli", "live", "loop_cli", "new_cli", "panels", "pki", "pki_cli", "plot", "plot_machine", "plot_model", "plot_style", "process", "progress", "promote_cli", "release_cli", "rollout_cli", "site"}
LIGHT = {"card", "config", "errors", "process", "progress", "_pipelines"}  # what rooms may import from outside the rooms; the last is data of the loop

ALLOWED = {  # beyond the standard library and what stands above in this table
    "signal": {"numpy", "scipy"},
    "data": {"cbor2", "pandas", "pyarrow", "pooch", "fsspec", "requests", "pyuff", "pydantic", "yaml", "dask", "distributed"},
    "model": {"torch", "pytorch_lightning", "sklearn", "onnx", "onnxruntime", "mlflow", "matplotlib",
              "model_signing", "sigstore", "cryptography", "oras"},
    "serve": {"tritonclient", "grpc", "google"},
    "stream": {"pydantic_core", "paho", "iotcore", "confluent_kafka", "influxdb_client", "urllib3", "psycopg", "google", "prometheus_client", "psutil"},
    "loop": {"mlflow", "kfp", "kfp_server_api", "cronsim", "river", "papermill", "nbformat", "nbclient", "psutil", "fsspec", "httpx"},
}
EDGE = [  # what runs on the edge, and so imports without torch, pandas, mlflow, kfp and Jupyter
    "pdm", "pdm.card", "pdm.errors", "pdm.config", "pdm.process", "pdm.cli",
    *(f"pdm.signal.{p.stem}" for p in sorted((ROOT / "pdm/signal").glob("[a-z]*.py"))),
    "pdm.data.window", "pdm.data.parquet", "pdm.data.store", "pdm.data.archive", "pdm.model.monitor", "pdm.model.bundle",
    "pdm.model.folder", "pdm.model.claim", "pdm.model.signature", "pdm.model.registries", "pdm.model.transport",
    *(f"pdm.serve.{p.stem}" for p in sorted((ROOT / "pdm/serve").glob("[a-z]*.py"))),
    *(f"pdm.stream.{p.stem}" for p in sorted((ROOT / "pdm/stream").glob("[a-z]*.py"))),
]


def modules() -> Iterator[tuple[str, Path]]:
    "Each module of pdm/ that a notebook exports: its name, its file."
    for path in sorted((ROOT / "pdm").rglob("*.py")):
        if path.stem not in ("__init__", "_modidx"):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


def room(name: str) -> str:
    "`stream` of `pdm.stream.agent`; of a module outside the rooms its own name."
    return name.split(".")[1] if "." in name else ""


def imports(path: Path) -> Iterator[str]:
    "What a file imports, at its top or within a function, by full names."
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):  # nbdev writes pdm's own imports relative
            module = ".".join([*package[: len(package) - node.level + 1], node.module or ""]).strip(".") if node.level else node.module or ""
            yield module
            if module == "pdm" or module in {f"pdm.{r}" for r in ROOMS}:
                yield from (f"{module}.{alias.name}" for alias in node.names)


def graph() -> dict[str, set[str]]:
    "Of each module the modules of pdm/ that it imports."
    files = dict(modules())
    return {name: {other for other in imports(path) if other in files} for name, path in files.items()}


def allowed(name: str, other: str) -> bool:
    "Whether module `name` may import `other` of pdm, as far as their rooms go."
    if room(name) in OUTSIDE - LIGHT:
        return True
    if room(other) not in ROOMS:
        return room(other) in LIGHT
    # errors, config and process stand outside the rooms and use only the vocabulary of the first two
    return ROOMS.index(room(other)) <= max(ROOMS.index(room(name)) if room(name) in ROOMS else -1, 1)


def below(name: str, path: Path) -> list[str]:
    "What a module imports although its room may not: one sentence each."
    return [f"{name} imports {other}, {'a room below its own' if room(other) in ROOMS else 'which stands outside the rooms'}"
            for other in imports(path) if other.split(".")[0] == "pdm" and not allowed(name, other)]


def foreign(name: str, path: Path) -> list[str]:
    "Which libraries a module imports although its room does without them: one sentence, or none."
    if room(name) not in ROOMS:
        return []
    known = set().union(*(ALLOWED[r] for r in ROOMS[: ROOMS.index(room(name)) + 1])) | set(sys.stdlib_module_names) | {"pdm"}
    libraries = sorted({i.split(".")[0] for i in imports(path)} - known)
    return [f"{name} imports {', '.join(libraries)}, which its room does without"] if libraries else []
