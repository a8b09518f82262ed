"""What is built from the tree: the wheel, with the data that code needs at run time."""

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


def test_every_library_that_an_extra_names_is_pinned():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().split()}
    named = {re.match(r"[\w.-]+", entry)[0].lower() for extra in [project["dependencies"], *project["optional-dependencies"].values()] for entry in extra}
    assert not named - pinned - {"predmaint"}
