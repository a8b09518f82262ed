"""The pipeline: its steps, what it compiles to, and whole runs of it on this machine, with a real MLflow server and with sqlite."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import psutil
import pytest
import yaml

from pdm.cli import main
from pdm.config import load_settings
from pdm.data.training import load_training
from pdm.errors import InvalidInput
from pdm.loop.ledger import Ledger
from pdm.loop.pipeline import compile_pipeline, look, run_local, task
from pdm.loop.record import RUN_ID
from pdm.loop.registry import Registry
from pdm.loop.steps import STEPS, parameters_of, step_file
from pdm.process import free_port, lock_file

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.timeout(900)  # a whole run takes two minutes here, and more than five where others work too
HERE_AND_NOW = {"windows_per_asset": 400, "epochs": 5, "kinds": ["mahalanobis"]}


# --- the step notebooks ---


@pytest.mark.parametrize("step", STEPS)
def test_a_step_has_one_cell_of_documented_parameters_and_no_outputs(step):
    cells = nbformat.read(step_file(step), 4).cells
    assert sum("parameters" in c.metadata.get("tags", ()) for c in cells) == 1
    assert all(not c.get("outputs") and c.get("execution_count") is None for c in cells)
    told = parameters_of(step)
    assert "out" in told and all(len(p.help) > 8 for p in told.values())
    code = "\n".join(c.source for c in cells if c.cell_type == "code" and "parameters" not in c.metadata.get("tags", ()))
    assert [name for name in told if name not in code] == []  # each is used


@pytest.mark.parametrize("words,said", [
    (("ingets",), "did you mean 'ingest'?"),
    (("train", "-p", "kinds", "conv_ae"), "did you mean 'kind'?"),
    (("train", "-p", "epochs", "many"), "epochs is int, and 'many' is not"),
    (("train", "--epochs", "5"), "expected -p KEY VALUE"),
])
def test_what_a_step_cannot_take_is_the_users_error_and_says_what_was_meant(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["predmaint", "step", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and said in capsys.readouterr().err


# --- what it compiles to ---


def test_the_compiled_pipeline_is_the_golden_one(tmp_path):
    made = compile_pipeline(load_settings(), tmp_path / "retraining.yaml").read_text()
    assert made == (ROOT / "pipelines/compiled/retraining.yaml").read_text(), "predmaint retrain --compile pipelines/compiled/retraining.yaml, and look at the difference"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    settings = load_settings(pipeline_image="registry.example/predmaint-python@sha256:" + "ab" * 32, pipeline_cpu="3", pipeline_memory="6Gi",
                             pipeline_gpu="nvidia.com/gpu=1", pipeline_node_pool="pool=gpu")
    spec, platform = yaml.safe_load_all(compile_pipeline(settings, tmp_path_factory.mktemp("compiled") / "retraining.yaml").read_text())
    return SimpleNamespace(spec=spec, executors={name.removeprefix("exec-"): e["container"] for name, e in spec["deploymentSpec"]["executors"].items()},
                           platform=platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"],
                           tasks={name: t for dag in [spec["root"], *spec["components"].values()] for name, t in dag.get("dag", {}).get("tasks", {}).items()})


def test_every_step_runs_in_the_image_of_the_settings_with_its_requests(compiled):
    assert set(compiled.executors) == {*STEPS, "look", "promote", "record"}
    assert {c["image"] for c in compiled.executors.values()} == {"registry.example/predmaint-python@sha256:" + "ab" * 32}
    for name in set(compiled.executors) - {"record"}:
        asked = compiled.executors[name]["resources"]
        assert (asked["resourceCpuRequest"], asked["resourceMemoryRequest"], asked["resourceMemoryLimit"]) == ("3", "6Gi", "6Gi")
    assert all("pip install" not in " ".join(c["command"]) for c in compiled.executors.values())


def test_only_training_asks_for_a_gpu_and_its_nodes(compiled):
    assert [name for name, c in compiled.executors.items() if "accelerator" in c.get("resources", {})] == ["train"]
    assert [name for name, p in compiled.platform.items() if "nodeSelector" in p or "tolerations" in p] == ["exec-train"]
    (toleration,) = compiled.platform["exec-train"]["tolerations"]
    assert (toleration["key"], toleration["value"]) == ("pool", "gpu") and compiled.platform["exec-train"]["nodeSelector"]["labels"] == {"pool": "gpu"}


def test_what_looks_at_the_world_is_never_cached_and_what_is_cached_knows_its_data_by_digest(compiled):
    cached = {name for name, t in compiled.tasks.items() if t.get("cachingOptions", {}).get("enableCache") and name in compiled.executors}
    assert cached == {"ingest", "train", "evaluate", "export"}
    for name in cached - {"ingest"}:
        assert "digest" in compiled.tasks[name]["inputs"]["parameters"]
    paths = ("trigger", "state_dir", "tracking", "root", "run")
    assert [p for name in cached for p in compiled.tasks[name]["inputs"]["parameters"] if any(word in p for word in paths)] == []


def test_pods_get_their_settings_and_the_run_they_belong_to(compiled):
    for name, platform in compiled.platform.items():
        assert {e["name"]: e["fieldPath"] for e in platform["fieldPathAsEnv"]} == {RUN_ID: "metadata.labels['pipeline/runid']"}, name
        keys = {k["configMapKey"].removeprefix("PREDMAINT_").lower() for c in platform["configMapAsEnv"] for k in c["keyToEnv"]}
        assert keys <= set(type(load_settings()).model_fields) and {"pipeline_root", "tracking_url"} <= keys
        assert all("secretKey" in k for s in platform["secretAsEnv"] for k in s["keyToEnv"])


# --- a task, without Kubeflow ---


def test_an_error_of_the_users_is_told_again_at_once_and_one_of_the_infrastructure_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PREDMAINT_STATE_DIR", str(tmp_path))
    monkeypatch.setenv(RUN_ID, "monday-1")
    ledger, made = Ledger(load_settings().runs_url, "monday-1"), SimpleNamespace(path=str(tmp_path / "made"), metadata={})
    given = {"source": "scenario:nothing_of_that_name"}
    with pytest.raises(SystemExit) as first:
        task("ingest", "motor", given, made)
    entry = ledger.read()["motor/ingest"]
    assert first.value.code == entry["exit_code"] == 1 and "nothing_of_that_name" in entry["reason"]
    notebook = Path(entry["notebook"])
    assert "InvalidConfig" in notebook.read_text()  # kept as far as it came
    ran = notebook.stat().st_mtime_ns
    with pytest.raises(SystemExit) as again:
        task("ingest", "motor", given, made)
    assert again.value.code == 1 and notebook.stat().st_mtime_ns == ran
    ledger.write("motor/ingest", {**entry, "exit_code": 2, "status": "infrastructure"})
    with pytest.raises(SystemExit):
        task("ingest", "motor", given, made)
    assert notebook.stat().st_mtime_ns > ran


def test_a_shard_tells_its_champion_where_that_is_calibrated_anew_so_that_another_ones_work_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PREDMAINT_STATE_DIR", str(tmp_path))
    monkeypatch.setattr(Registry, "champion", lambda self, name: SimpleNamespace(digest="d" * 64))
    for run, (kinds, champion) in enumerate(((["mahalanobis"], None), (["champion", "mahalanobis"], "d" * 64))):
        monkeypatch.setenv(RUN_ID, f"monday-{run}")
        assert [s.get("champion") for s in look("scenario:healthy?windows=20", kinds, name="motor", stream="vibration")] == [champion]


# --- whole runs: one place for their cache, so that each does only what is new in it ---


def run(state: Path, tracking: str, trigger: str, **arguments) -> Mapping:
    settings = load_settings(state_dir=state, tracking_url=tracking)
    return run_local(settings, {**HERE_AND_NOW, "source": "mfpt:", "name": "mfpt", **arguments}, trigger)


def steps_of(outcome, shard="mfpt"):
    return outcome["shards"][shard]["steps"]


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return tmp_path_factory.mktemp("laptop")


@pytest.fixture(scope="module")
def first(state, mlflow_server):
    "MFPT's records, two kinds of detector, and a real MLflow server."
    return run(state, mlflow_server.url.removeprefix("mlflow+").rpartition("/")[0], "first", kinds=["mahalanobis", "iforest"])


def registry_of(state, tracking):
    return Registry.of(load_settings(state_dir=state, tracking_url=tracking))


def test_a_run_ends_with_a_champion_and_all_that_led_to_it(first, state, mlflow_server):
    assert (first["exit_code"], first["state"], first["shards"]["mfpt"]["status"]) == (0, "succeeded", "champion"), first
    steps = steps_of(first)
    assert set(steps) == {"ingest", "train/mahalanobis", "train/iforest", "evaluate", "export", "package", "gate", "promote"}
    for name, step in steps.items():
        assert step["status"] == "done" and not step["cached"]
        if name != "promote":
            cells = nbformat.read(step["notebook"], 4).cells
            assert any(c.get("outputs") for c in cells) and step["mlflow"].startswith("http")
    url = mlflow_server.url.removeprefix("mlflow+").rpartition("/")[0]
    registry = registry_of(state, url)
    champion = registry.champion("mfpt")
    assert (champion.version, champion.digest) == (first["shards"]["mfpt"]["version"], first["shards"]["mfpt"]["digest"])
    (row,) = registry.history("mfpt")
    assert row.who == "pipeline first-1" and "faults put into healthy windows" in row.why and row.metrics["injected/mean"] > 0.3


def test_mlflow_has_a_run_for_the_pipeline_and_one_below_it_for_each_step(first, mlflow_server):
    from mlflow import MlflowClient

    client = MlflowClient(mlflow_server.url.removeprefix("mlflow+").rpartition("/")[0])
    (experiment,) = client.search_experiments(filter_string="name = 'predmaint'")
    (parent,) = client.search_runs([experiment.experiment_id], "tags.`predmaint.pipeline` = 'first-1'")
    assert parent.info.status == "FINISHED" and parent.data.tags["trigger"] == "first"
    below = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")}
    assert {f"mfpt/{s}" for s in ("ingest", "train/mahalanobis", "train/iforest", "evaluate", "export", "package", "gate")} <= set(below)
    train = below["mfpt/train/mahalanobis"]
    assert train.data.params["kind"] == "mahalanobis" and "system/cpu_utilization_percentage" in train.data.metrics
    (data,) = train.inputs.dataset_inputs
    assert json.loads(data.dataset.profile)["sha256"] == json.loads(Path(steps_of(first)["ingest"]["notebook"]).with_name("result.json").read_text())["digest"]
    assert {f.path for f in client.list_artifacts(train.info.run_id)} == {"plots", "train.ipynb", "result.json"}


def test_a_run_that_is_cut_or_fails_keeps_what_it_made_and_the_next_one_goes_on_from_there(first, state, mlflow_server):
    url, kinds = mlflow_server.url.removeprefix("mlflow+").rpartition("/")[0], ["mahalanobis", "iforest"]
    code = f"from pathlib import Path; import test_pipeline as t; t.run(Path({str(state)!r}), {url!r}, 'second', kinds={kinds!r})"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
    told, end = Ledger(load_settings(state_dir=state).runs_url, "second-1"), time.monotonic() + 120
    while "mfpt/ingest" not in told.read():  # told from the cache: package is at work
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()  # as a power cut does
    process.wait()
    _, left = psutil.wait_procs(started, timeout=30)
    assert left == []  # what it started ends with it

    failed = run(state, url, "second", kinds=kinds, frozen=str(state / "nowhere"))
    assert (failed["run"], failed["exit_code"], failed["shards"]["mfpt"]["status"]) == ("second-2", 1, "failed") and failed["reason"].startswith("gate: ")
    gate = Path(steps_of(failed)["gate"]["notebook"])
    assert "nowhere" in gate.read_text() and not gate.with_name("result.json").exists()

    again = run(state, url, "second", kinds=kinds)
    assert (again["run"], again["exit_code"], again["shards"]["mfpt"]["status"]) == ("second-3", 0, "champion")
    assert {name for name, s in steps_of(again).items() if s["cached"]} == {"ingest", "train/mahalanobis", "train/iforest", "evaluate", "export"}
    assert steps_of(again)["train/mahalanobis"]["notebook"] == steps_of(first)["train/mahalanobis"]["notebook"]
    assert again["shards"]["mfpt"]["version"] == first["shards"]["mfpt"]["version"]
    assert again["shards"]["mfpt"]["spans"] == first["shards"]["mfpt"]["spans"] == []  # what was known of the past is told of cached windows, too
    assert len(registry_of(state, url).history("mfpt")) == 1  # the same model is not promoted a second time


def test_a_trigger_has_one_run(first, state, mlflow_server):
    url = mlflow_server.url.removeprefix("mlflow+").rpartition("/")[0]
    assert run(state, url, "first")["run"] == "first-1" and not (state / "runs/ledger/first-2").exists()
    held = lock_file(state / "runs/locks/third")
    with pytest.raises(InvalidInput, match="is going on"):
        run(state, url, "third")
    held.close()


def test_a_gate_that_says_no_releases_nothing(first, state, tmp_path):
    data = load_training(Path(steps_of(first)["ingest"]["notebook"]).parent.parent / "data")
    loud = {a: replace(w, samples=np.ascontiguousarray(4 * w.samples)) for a, w in data.parts["test"].items()}
    replace(data, parts={**data.parts, "test": loud}).save(tmp_path / "frozen")
    refused = run(state, f"sqlite:{tmp_path}/mlflow.db", "no", kinds=["mahalanobis", "iforest"], frozen=str(tmp_path / "frozen"))
    assert (refused["exit_code"], refused["shards"]["mfpt"]["status"]) == (3, "refused") and "promise is refuted" in refused["reason"]
    assert "promote" not in steps_of(refused)
    registry = registry_of(state, f"sqlite:{tmp_path}/mlflow.db")
    assert registry.champion("mfpt") is None and registry.history("mfpt") == []
    assert registry.challenger("mfpt").digest == refused["shards"]["mfpt"]["digest"]


def test_with_mlflow_down_the_model_waits_and_is_registered_when_it_is_back(first, state, tmp_path):
    down = run(state, f"http://127.0.0.1:{free_port()}", "down", kinds=["mahalanobis", "iforest"])
    assert (down["exit_code"], down["shards"]["mfpt"]["queued"]) == (2, True) and "MLflow" in down["reason"]
    digest = down["shards"]["mfpt"]["digest"]
    registry = registry_of(state, f"sqlite:{tmp_path}/mlflow.db")
    assert registry.version("mfpt", digest) is None
    assert registry.flush() >= 2
    assert registry.challenger("mfpt").digest == digest and registry.fetch(registry.challenger("mfpt"), tmp_path / "back").name == digest


def test_shards_of_a_generated_plant_are_trained_beside_each_other_with_sqlite(tmp_path):
    outcome = run(tmp_path, "sqlite:", "plant", source="scenario:outer_race_slow?windows=500", name="fan", per="asset", stream="vibration")
    assert (outcome["exit_code"], len(outcome["shards"])) == (0, 2), outcome
    registry = registry_of(tmp_path, "sqlite:")
    champions = {name: registry.champion(name).digest for name in outcome["shards"]}
    assert {name: s["digest"] for name, s in outcome["shards"].items()} == champions and len(set(champions.values())) == 2
