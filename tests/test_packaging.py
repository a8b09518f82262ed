"""What is built from the tree: the wheel, with the data that code needs at run time."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "pdm", "edge", "pipelines", "pyproject.toml", "README.md", "LICENSE"],
                            cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), str(tree)], check=True)
    (path,) = out.glob("predmaint-*.whl")
    return path


def test_the_wheel_carries_modules_steps_scenarios_and_compiled_pipelines(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (("pdm", "pdm"), ("edge", "pdm/_edge"), ("pipelines", "pdm/_pipelines")):
        wanted = {f"{package}/{p.relative_to(ROOT / folder).as_posix()}" for p in (ROOT / folder).rglob("*")
                  if p.is_file() and not {"_edge", "_pipelines", "__pycache__", "platform", ".ipynb_checkpoints"} & set(p.relative_to(ROOT / folder).parts)}
        assert wanted and not wanted - names, f"{sorted(wanted - names)[:5]} are in the tree and not in the wheel: packages and package-data in pyproject.toml"
    assert not [name for name in names if "/platform/" in name]


def test_the_wheel_names_no_folder_of_the_machine_that_built_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        texts = {name: archive.read(name).decode(errors="replace") for name in archive.namelist()}
    assert not [name for name, text in texts.items() if re.search(re.escape(str(ROOT)) + r"\b", text)]


@pytest.fixture(scope="module")
def alone(wheel, tmp_path_factory):
    "A function that runs a program of an environment in which the wheel is, with what it depends on, and nothing else."
    home = tmp_path_factory.mktemp("alone")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home / "env")], check=True)
    done = subprocess.run([sys.executable, "-m", "uv", "pip", "install", "-q", "--python", str(home / "env/bin/python"),
                           "-c", str(ROOT / "constraints.txt"), str(wheel)], capture_output=True, text=True)
    if re.search("Failed to fetch|error sending request|dns error", done.stderr):
        pytest.skip("no package index can be reached from here: it brings what the wheel depends on")
    assert done.returncode == 0, done.stderr

    def run(program, *args):
        return subprocess.run([home / "env/bin" / program, *args], cwd=home, env={"PATH": "/usr/bin:/bin", "HOME": str(home)}, capture_output=True, text=True)

    return run


def test_the_wheel_alone_is_an_edge_whose_doctor_explains_what_each_extra_would_add(alone):
    import tomllib

    helped, told = alone("predmaint", "--help"), alone("predmaint", "doctor", "--json")
    assert helped.returncode == 0 and "doctor" in helped.stdout
    told = json.loads(told.stdout)
    assert {p["part"] for p in told["parts"] if p["needed"] and not p["found"]} <= {"broker: mosquitto", "broker: iotcore"}  # the machine's, not the wheel's
    extras = {e["extra"]: e for e in told["extras"]}
    assert extras.keys() == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
    assert all(e["brings"] and e["missing"] and e["get"] == f"pip install 'predmaint[{name}]'" for name, e in extras.items())
    shown = alone("predmaint", "doctor").stdout
    assert all(e["get"].split()[-1] in shown for e in extras.values())  # square brackets are no markup


def test_the_wheel_alone_names_a_fault_from_python(alone):
    code = "import numpy as np, pdm; t = np.arange(20_000) / 10_000; print(pdm.diagnose(np.sin(2 * np.pi * 25 * t), 10_000, rpm=1500).fault)"
    done = alone("python", "-c", code)
    assert done.stdout.strip() == "imbalance", done.stderr


@pytest.mark.parametrize("command,extra", [
    (["demo", "--generated"], "train"),
    (["synth", "--scenario", "gearbox", "--out", "plant"], "train"),
    (["labels", "list"], "train"),
    (["pki", "init", "ca"], "pki"),
    (["dashboards", "build"], "dashboards"),
])
def test_a_command_that_needs_an_extra_says_which_in_one_line(alone, command, extra):
    done = alone("predmaint", *command)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].endswith(f"pip install 'predmaint[{extra}]'"), done.stderr
    assert "Traceback" not in done.stderr


def test_each_extra_says_what_it_brings():
    import tomllib

    from pdm.cli import _EXTRAS

    assert _EXTRAS.keys() == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()


def test_every_library_that_an_extra_names_is_pinned():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().split()}
    named = {re.match(r"[\w.-]+", entry)[0].lower() for extra in [project["dependencies"], *project["optional-dependencies"].values()] for entry in extra}
    assert not named - pinned - {"predmaint"}
