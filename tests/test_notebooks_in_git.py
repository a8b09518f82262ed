"""Git and notebooks: committed outputs hold what a reader needs and nothing else; a clone shows and merges notebooks by cells, and does without where it can't."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import outputs  # noqa: E402

PNG = {"output_type": "display_data", "metadata": {}, "data": {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure size 640x192 with 1 Axes>"}}


def notebook(*given, count=None, source="x = 1"):
    cell = {"cell_type": "code", "execution_count": count, "id": "one", "metadata": {}, "outputs": list(given), "source": source}
    return json.dumps({"cells": [cell], "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}},
                       "nbformat": 4, "nbformat_minor": 5}, indent=1).encode() + b"\n"


def text(said, name="stdout"):
    return {"output_type": "stream", "name": name, "text": said}


def result(**data):
    return {"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": data}


HOME, ASIDE = Path("/", "home", "ann"), Path("/", "tmp", "x7f")  # of a machine that is nobody's


@pytest.mark.parametrize("given,says", [
    (text(f"kept in {HOME}/build"), "path"), (result(**{"text/plain": f"{ASIDE!r}"}), "path"),
    (text("no GPU here", "stderr"), "stderr"), (text("UserWarning: deprecated\n"), "warning"),
    (text("fit  63%|██████▎   | 63/100"), "progress bar"), (text("Wall time: 3.1 s"), "clock"), (result(**{"text/plain": "<pdm.X object at 0x7f01a2>"}), "memory"),
    ({"output_type": "error", "ename": "E", "evalue": "", "traceback": []}, "an error"),
    (result(**{"application/vnd.jupyter.widget-view+json": {}, "text/plain": "VBox()"}), "running kernel"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_what_a_reader_does_not_need_is_refused(given, says):
    found = outputs.wrong("x.ipynb", notebook(given))
    assert found and says in found[0], found


def test_plots_and_tables_may_stay():
    assert outputs.wrong("x.ipynb", notebook(PNG, result(**{"text/html": "<table><td>12 %</td></table>", "text/plain": "  a\n0 1"}), text("- seen: 6 s\n"))) == []


def test_a_count_and_a_large_notebook_are_refused():
    assert "execution count" in outputs.wrong("x.ipynb", notebook(count=3))[0]
    assert "more than 150" in outputs.wrong("x.ipynb", notebook({**PNG, "data": {"image/png": "A" * 160_000}}))[0]


@pytest.fixture
def clone(tmp_path):
    "A clone with our attributes and hooks, and a committed notebook."
    folder = tmp_path / "clone"
    for name in (".gitattributes", "settings.ini", "tools/outputs.py", "tools/hooks/install", "tools/hooks/pre-commit", "tools/hooks/post-merge"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "nbs").mkdir()
    (folder / "nbs/x.ipynb").write_bytes(notebook(PNG))
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / ".gitignore").write_text(".venv\n__pycache__/\n")
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first")
    return folder


def git(folder, *words, code=0):
    who = {"GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@example.com", "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@example.com", "GIT_CONFIG_GLOBAL": "/dev/null"}
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, env={**os.environ, **who})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def install(folder, programs):
    subprocess.run(["tools/hooks/install", str(programs)], cwd=folder, check=True)


def test_a_diff_is_by_cells_and_without_the_environment_as_of_any_file(clone):
    (clone / "nbs/x.ipynb").write_bytes(notebook(PNG, source="x = 2"))
    as_text = git(clone, "--no-pager", "diff")
    assert '+   "source": "x = 2"' in as_text
    install(clone, clone / ".venv/bin")
    by_cells = git(clone, "--no-pager", "diff")
    assert "modified /cells/0/source" in by_cells and '"source":' not in by_cells
    install(clone, clone / "gone")
    assert '+   "source": "x = 2"' in git(clone, "--no-pager", "diff")


@pytest.mark.parametrize("programs", [".venv/bin", "gone"])
def test_a_merge_of_two_changes_to_different_lines_keeps_both(clone, programs):
    two = json.loads(notebook(source="x = 1"))
    two["cells"] += [{**two["cells"][0], "id": f"more{i}", "source": f"y = {i}"} for i in range(3)]
    (clone / "nbs/x.ipynb").write_text(json.dumps(two, indent=1) + "\n")
    git(clone, "commit", "-qam", "three more cells")
    install(clone, clone / programs)
    git(clone, "checkout", "-qb", "theirs")
    theirs = json.loads(json.dumps(two))
    theirs["cells"][0]["source"] = "x = 'theirs'"
    (clone / "nbs/x.ipynb").write_text(json.dumps(theirs, indent=1) + "\n")
    git(clone, "commit", "-qam", "theirs")
    git(clone, "checkout", "-q", "main")
    ours = json.loads(json.dumps(two))
    ours["cells"][3]["source"] = "y = 'ours'"
    (clone / "nbs/x.ipynb").write_text(json.dumps(ours, indent=1) + "\n")
    git(clone, "commit", "-qam", "ours")
    git(clone, "merge", "-q", "--no-edit", "theirs")
    merged = ["".join(c["source"]) for c in json.loads((clone / "nbs/x.ipynb").read_text())["cells"]]
    assert (merged[0], merged[3]) == ("x = 'theirs'", "y = 'ours'")


def test_a_notebook_that_is_not_clean_is_not_committed(clone):
    install(clone, clone / ".venv/bin")
    (clone / "nbs/x.ipynb").write_bytes(notebook(text(f"kept in {ASIDE}/x"), count=4))
    git(clone, "add", "-A")
    said = git(clone, "commit", "-qm", "not clean", code=1)
    assert "path of somebody" in said and "execution count" in said and "nbdev_clean --fname nbs/x.ipynb" in said
    (clone / "nbs/x.ipynb").write_bytes(notebook(PNG, source="x = 3"))
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "clean")
