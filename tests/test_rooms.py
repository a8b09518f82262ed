"""The house keeps its rooms: who may import whom, and what the edge does without."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from rooms import EDGE, ROOMS, below, foreign, modules, room  # noqa: E402

TOO_HEAVY = ("torch", "pandas", "mlflow", "kfp", "IPython", "jupyterlab", "ipykernel", "pytorch_lightning", "sklearn", "matplotlib", "nbdev", "fastcore")


@pytest.mark.parametrize("name,path", list(modules()), ids=lambda v: v if isinstance(v, str) else "")
def test_a_room_imports_only_rooms_above_it(name, path):
    assert not below(name, path)


@pytest.mark.parametrize("name,path", [m for m in modules() if room(m[0]) in ROOMS], ids=lambda v: v if isinstance(v, str) else "")
def test_a_room_keeps_to_its_libraries(name, path):
    assert not foreign(name, path)


@pytest.mark.parametrize("name,line,says", [
    ("pdm.signal.lines", "from ..model import monitor", "pdm.model.monitor, a room below its own"),
    ("pdm.signal.lines", "def f():\n    import pdm.loop.gate", "pdm.loop.gate, a room below its own"),
    ("pdm.stream.agent", "from .. import plot", "pdm.plot, which stands outside the rooms"),
    ("pdm.signal.lines", "import pandas.api", "pandas, which its room does without"),
])
def test_what_breaks_the_rule_is_named(tmp_path, monkeypatch, name, line, says):
    import rooms

    monkeypatch.setattr(rooms, "ROOT", tmp_path)
    path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert any(sentence.endswith(says) for sentence in (*below(name, path), *foreign(name, path)))


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


def test_help_loads_what_it_prints_with_and_nothing_that_commands_work_with():
    code = "import sys, pdm.cli; print([m for m in ('numpy', 'pydantic', 'yaml', 'asyncio', 'urllib.request', 'pdm.config') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


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
