"""Papermill runs every tutorial, and every step of the pipeline on a small generated plant. What they came to lies in build/tutorials.

A tutorial whose cells are marked `#| slow` needs data that is not here or most of an hour; it is named and left out, as nbdev_test leaves it out."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from pdm.loop.steps import STEPS

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build/tutorials"
PLANT = ("--source", "scenario:outer_race_slow?windows=150", "--stream", "vibration", "--kind", "mahalanobis", "--windows-per-asset", "150", "--local")


def slow(notebook: Path) -> bool:
    code = ["".join(c["source"]).splitlines() for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    return any(line.strip() == "#| slow" for lines in code for line in lines)


def papermill(notebook: Path) -> bool:
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--log-level", "ERROR", "-k", "python3", "--cwd", notebook.parent, notebook, OUT / notebook.name]
    return subprocess.run(command, check=False).returncode == 0


def steps() -> bool:
    "The whole pipeline, as `predmaint retrain` runs it; a step that left no notebook has not run."
    state = OUT / "plant"
    env = {**os.environ, "PREDMAINT_STATE_DIR": str(state)}
    done = subprocess.run([sys.executable, "-m", "pdm.cli", "retrain", *PLANT], env=env, cwd=OUT, check=False)
    ran = {p.stem for p in state.rglob("*.ipynb")}
    if missing := set(STEPS) - ran:
        print(f"no notebook of {', '.join(sorted(missing))} was run")
    return done.returncode == 0 and not missing


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
    print("- steps", flush=True)
    failed += [] if steps() else ["steps"]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
