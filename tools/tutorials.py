"""Papermill runs every tutorial; what they came to lies in build/tutorials. It runs the pipeline's steps in tests/test_pipeline.py, and each of both once.

A tutorial whose cells are marked `#| slow` needs data that is not here or most of an hour; it is named and left out, as nbdev_test leaves it out."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build/tutorials"


def slow(notebook: Path) -> bool:
    code = ["".join(c["source"]).splitlines() for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    return any(line.strip() == "#| slow" for lines in code for line in lines)


def papermill(notebook: Path) -> bool:
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--log-level", "ERROR", "-k", "python3", "--cwd", notebook.parent, notebook, OUT / notebook.name]
    return subprocess.run(command, check=False).returncode == 0


if __name__ == "__main__":
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    failed = []
    for notebook in sorted(ROOT.glob("nbs/tutorials/*.ipynb")):
        if slow(notebook):
            print(f"- {notebook.stem}: slow, left out", flush=True)
            continue
        print(f"- {notebook.stem}", flush=True)
        failed += [] if papermill(notebook) else [notebook.stem]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
