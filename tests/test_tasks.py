"""Tasks of the pipeline on their own: what the cache goes by, what a second try does, who becomes the champion, and how a run on a cluster is told."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml

from pdm.config import load_settings
from pdm.loop import pipeline
from pdm.loop.cluster import ClusterRun, Outcome
from pdm.loop.ledger import Ledger, summary
from pdm.loop.pipeline import compile_pipeline, task
from pdm.loop.record import RUN_ID
from pdm.loop.registry import Registry
from pdm.loop_cli import _ended


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("PREDMAINT_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("PREDMAINT_TRACKING_URL", "sqlite:")
    monkeypatch.setenv(RUN_ID, "monday-1")
    return load_settings()


def told(settings):
    return Ledger(settings.runs_url, "monday-1").read()


def test_what_is_cached_has_every_setting_of_what_it_was_made_from_in_its_key(tmp_path):
    "Kubeflow's server puts the names of input artifacts into the key, and neither their address nor their contents."
    spec = yaml.safe_load(compile_pipeline(load_settings(), tmp_path / "retraining.yaml").read_text().partition("\n---")[0])
    tasks = {name: t["inputs"]["parameters"] for dag in spec["components"].values() for name, t in dag.get("dag", {}).get("tasks", {}).items() if "inputs" in t}
    made_with = set(tasks["train"]) - {"kind"} | {"kinds"}
    assert made_with == {"shard", "digest", "false_alarms_per_day", "epochs", "seed", "kinds"}
    assert made_with <= set(tasks["evaluate"]) and made_with <= set(tasks["export"])


def test_a_parameter_that_a_step_cannot_take_is_told_in_the_ledger(settings, tmp_path):
    made = SimpleNamespace(path=str(tmp_path / "not" / "made"), metadata={})
    with pytest.raises(SystemExit) as ended:
        task("train", "motor", {"epochs": "many"}, made)
    entry = told(settings)["motor/train"]
    assert ended.value.code == entry["exit_code"] == 1 and "epochs is int" in entry["reason"] and entry["notebook"] == ""


def test_what_a_failed_step_made_is_kept_beside_the_ledger_under_an_address_that_leads_there(tmp_path):
    (tmp_path / "made/report").mkdir(parents=True)
    (tmp_path / "made/report/train.ipynb").write_text("{}")
    ledger = Ledger(f"memory://{tmp_path.name}", "monday-1")
    for _ in range(2):  # it is tried again
        place = ledger.keep(tmp_path / "made", "motor/train")
    import fsspec
    assert fsspec.open(f"{place}/report/train.ipynb", "r").open().read() == "{}"


@pytest.fixture
def gated(settings, tmp_path, make_bundle):
    "A champion, and a challenger that the gate has let pass, held against that champion."
    registry = Registry.of(settings)
    champion = registry.register(make_bundle(1.0, name="motor").path)
    registry.promote("motor", who="ann@plant", why="the first")
    challenger = registry.register(make_bundle(2.0, name="motor").path)
    result = {"passed": True, "reasons": ["it hears more"], "champion": champion.digest, "judged": {"challenger": {"windows": 40}}}
    (tmp_path / "task.json").write_text(json.dumps({"result": result}))
    return registry, challenger


def test_who_has_passed_the_gate_becomes_the_champion_once(gated, settings, tmp_path):
    registry, challenger = gated
    for _ in range(2):
        pipeline.promote("motor", challenger.digest, str(tmp_path))
    assert registry.champion("motor").version == challenger.version and len(registry.history("motor")) == 2
    assert registry.history("motor")[-1].who == "pipeline monday-1"


def test_a_champion_that_the_gate_has_not_asked_is_not_replaced_and_not_by_a_second_try_either(gated, settings, tmp_path, make_bundle):
    registry, challenger = gated
    other = registry.register(make_bundle(3.0, name="motor").path)
    registry.promote("motor", other.version, who="pipeline of somebody else", why="it hears more, too")
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            pipeline.promote("motor", challenger.digest, str(tmp_path))
        assert ended.value.code == 3
    assert registry.champion("motor").version == other.version
    assert "run the pipeline again" in told(settings)["motor/promote"]["reason"]
    assert summary(told(settings), "monday-1", state="FAILED")["exit_code"] == 3  # a check said no, and did not let the run go on


def test_what_a_step_registers_stands_below_the_run_of_its_pipeline(settings, make_bundle):
    registry = Registry.of(settings)
    run = registry._client.get_run(registry.register(make_bundle(4.0, name="motor").path).run_id)
    assert registry._client.get_run(run.data.tags["mlflow.parentRunId"]).data.tags["predmaint.pipeline"] == "monday-1"


@pytest.mark.parametrize("state,error,exit_code", [("SUCCEEDED", "", 0), ("RUNNING", "it was not waited for any longer; the run goes on", 2), ("FAILED", "no node has a GPU", 2)])
def test_a_run_on_a_cluster_has_done_its_work_only_when_it_has_ended_well(tmp_path, state, error, exit_code):
    ran = Outcome(state, {}, error, ClusterRun("id-2", "https://kubeflow/id-2", "drift-7", False))
    ledger = Ledger(f"memory://{tmp_path.name}-{state.lower()}", "id-2")
    ledger.write("look", {"shard": "", "step": "look", "status": "done", "exit_code": 0, "reason": "", "result": {"shards": []}})
    found = _ended(ran, ledger)
    assert (found["exit_code"], found["link"], found["run"], found.get("error", "")) == (exit_code, "https://kubeflow/id-2", "id-2", error)
    assert state != "RUNNING" or found["reason"] == error
    ledger.write("outcome", {"run": "id-2", "exit_code": 3, "reason": "gate: it hears less", "shards": {}})
    assert _ended(replace(ran, state="SUCCEEDED"), ledger)["exit_code"] == 3
