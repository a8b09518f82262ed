"""What tools/lessons.py says to coverage: the lines of pdm/ that a lesson ran, and no others."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_a_cell_that_ran_counts_for_its_lines_of_the_module_and_one_that_did_not_run_does_not(tmp_path):
    bare = ["--rcfile", os.devnull, "--data-file", str(tmp_path / "data")]
    for args in (["run", *bare, "--include", "pdm/errors.py", "tools/lessons.py", "--path", "nbs/errors.ipynb", "--n_workers", "0"],
                 ["json", *bare, "-q", "-o", str(tmp_path / "found.json")]):
        done = subprocess.run([sys.executable, "-m", "coverage", *args], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["files"]["pdm/errors.py"]
    lines = (ROOT / "pdm/errors.py").read_text().splitlines()

    def line_of(text):
        (number,) = (n for n, line in enumerate(lines, 1) if line.strip().startswith(text))
        return number

    assert line_of("near = get_close_matches(") in found["executed_lines"]  # a lesson asks what was meant
    assert line_of("shell = get_ipython()") in found["missing_lines"]       # none raises an error in a cell
