"""A project that `predmaint new project` makes is whole: it runs, its files are what the package reads, and git sees nothing change."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pdm.config import load_assets, load_settings
from pdm.data.scenario import load
from pdm.loop.policy import load_policy
from pdm.loop.steps import STEPS, parameters_of

BIN = Path(sys.executable).parent


def run(*command, cwd, **env):
    return subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, env={**os.environ, **env})


@pytest.fixture(scope="module")
def plant(tmp_path_factory):
    "A project as the command makes it, committed."
    home = tmp_path_factory.mktemp("projects")
    done = run(sys.executable, "-m", "pdm.cli", "new", "project", "north_mill", cwd=home)
    assert done.returncode == 0, done.stderr
    folder = home / "north_mill"
    for command in (("init", "-q"), ("add", "-A"), ("-c", "user.name=test", "-c", "user.email=test@example.com", "commit", "-qm", "as made")):
        done = run("git", *command, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def test_its_first_notebook_raises_an_alarm_and_names_the_fault(plant, tmp_path):
    from papermill import execute_notebook

    kept = tmp_path / "first_alarm.ipynb"
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(plant), path]))
    try:
        execute_notebook(str(plant / "nbs/first_alarm.ipynb"), str(kept), cwd=str(plant / "nbs"), kernel_name="python3", progress_bar=False)
    finally:
        os.environ.pop("PYTHONPATH")
        os.environ.update({"PYTHONPATH": path} if path else {})
    outputs = [o for c in json.loads(kept.read_text())["cells"] for o in c.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 3
    assert any("'outer_race'" in "".join(o.get("data", {}).get("text/plain", "")) for o in outputs)


def test_clean_and_export_change_nothing(plant):
    for command in ("nbdev_clean", "nbdev_export"):
        done = run(BIN / command, cwd=plant)
        assert done.returncode == 0, done.stderr
    assert run("git", "status", "--short", cwd=plant).stdout == ""


def test_its_files_are_what_the_package_reads(plant, monkeypatch):
    monkeypatch.chdir(plant)
    settings = load_settings()
    assert settings.policy and load_policy(settings).groups[0].retraining.name == "north_mill"
    assert [r.path for r in load_assets(settings.assets)] == [f"{load('scenario.yaml').path}/{name}" for name in load("scenario.yaml").asset_names]
    assert load("scenario.yaml").types["pump"].bearing == load_assets(settings.assets)[0].bearings["drive_end"].geometry()


def test_its_steps_begin_at_its_own_plant_and_run(plant):
    assert {name for step in STEPS for name, p in parameters_of(plant / "steps" / f"{step}.ipynb").items() if p.default == "north_mill"} == {"name"}
    assert parameters_of(plant / "steps/ingest.ipynb")["source"].default == "scenario:scenario.yaml"
    done = run(sys.executable, "-m", "pdm.cli", "step", "steps/ingest.ipynb", "-p", "windows_per_asset", "120", "--json", cwd=plant)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"]["name"] == "north_mill"


@pytest.mark.parametrize("checker", [
    ("actionlint",), ("zizmor", "--offline"), ("check-jsonschema", "--builtin-schema", "vendor.github-workflows")], ids=lambda c: c[0])
def test_its_workflows_are_clean(plant, checker):
    if not (BIN / checker[0]).exists():
        pytest.skip(f"{checker[0]} is not here: make setup")
    files = sorted(plant.glob(".github/workflows/*.yml"))
    done = run(BIN / checker[0], *checker[1:], *files, cwd=plant)
    assert len(files) == 2 and done.returncode == 0, done.stdout + done.stderr


def test_a_name_that_cannot_be_ends_with_one_and_makes_nothing(plant):
    for name, says in (("North-Mill", "a-z, 0-9 and _"), ("pdm", "already"), ("north_mill", "is there already")):
        done = run(sys.executable, "-m", "pdm.cli", "new", "project", name, cwd=plant.parent)
        assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert [f.name for f in plant.parent.iterdir()] == ["north_mill"]
