"""How long one waits before anything happens, and how many lines of pdm/ lessons and tests run.

`import_s_over_python`, `help_s_over_python`: fresh processes of `python -c "import pdm"` and of `predmaint --help`, in turn with `python -c pass`; the
median over the rounds of what they take longer, in seconds. The files are in the machine's memory, as they are from the second start on. The tables
have the same of each public name, of the help of each command, and the slowest imports.

`coverage_pct`: lines of pdm/ that lessons and tests run together, of a whole `make test COVERAGE=1`, which takes most of an hour. `--coverage-data
build/coverage/coverage.json` takes the figure from a run that is over instead. With `--quick` only the lessons of pdm.signal run: a figure of a slice is
in the tables, and none in the checks.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import typer
from _bench import arguments, check, in_turn, report

import pdm
from pdm.cli import app

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
MEASURED = ROOT / "build/coverage/coverage.json"


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stderr


def starts(quick: bool) -> tuple[dict[str, float], dict[str, dict]]:
    "Seconds over `python -c pass`, medians: of the two that have a target, of public names, of commands; and the slowest imports of `predmaint --help`, ms."
    python, predmaint = str(BIN / "python"), str(BIN / "predmaint")
    groups: dict[str, dict[str, tuple[str, ...]]] = {
        "start": {"import pdm": (python, "-c", "import pdm"), "predmaint --help": (predmaint, "--help")},
        "names": {f"pdm.{name}": (python, "-c", f"import pdm; pdm.{name}") for name in pdm.__all__},
        "commands": {f"predmaint {name} --help": (predmaint, name, "--help") for name in typer.main.get_command(app).commands},
    }
    tables: dict[str, dict] = {}
    for group, commands in groups.items():
        calls = {name: (lambda command=command: run(*command)) for name, command in list(commands.items())[: 2 if quick else None]}
        times = in_turn(1 if quick else 15 if group == "start" else 3, 0, **{"": lambda: run(python, "-c", "pass"), **calls})
        bare = times.pop("")
        tables[group] = {name: round(statistics.median(a - b for a, b in zip(took, bare, strict=True)), 4) for name, took in times.items()}
        tables[group]["python -c pass"] = round(statistics.median(bare), 4)
    lines = re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", run(python, "-X", "importtime", "-m", "pdm.cli", "--help"))
    slowest = sorted(((int(us) / 1e3, name) for us, name in lines), reverse=True)[:15]
    tables["slowest imports of predmaint --help, ms by themselves"] = {name: ms for ms, name in slowest}
    return tables["start"], tables


def coverage(quick: bool, data: str) -> tuple[float | None, str, dict[str, float]]:
    "Per cent of the lines of pdm/, what ran for it, and the same by file."
    if data:
        what, file = "of a run that was over before", Path(data)
    elif quick:
        run("rm", "-rf", "build/coverage")
        run(str(BIN / "coverage"), "run", "tools/lessons.py", "--path", "nbs/signal")
        for step in ("combine", "json"):
            run(str(BIN / "coverage"), step, "-q")
        what, file = "of a slice: only the lessons of pdm.signal ran", MEASURED
    else:
        run("make", "test", "COVERAGE=1")
        what, file = "of make test", MEASURED
    found = json.loads(file.read_text())
    files = {name: round(f["summary"]["percent_covered"], 1) for name, f in found["files"].items()}
    if quick and not data:
        return None, what, {name: percent for name, percent in files.items() if name.startswith("pdm/signal/")}
    return found["totals"]["percent_covered"], what, {name: percent for name, percent in sorted(files.items(), key=lambda f: f[1]) if percent < 90}


def main() -> None:
    started, args = time.perf_counter(), arguments(__doc__ or "", coverage_data="")
    start, tables = starts(args.quick)
    percent, what, tables["coverage by file, per cent" + ("" if args.quick else ", below 90")] = coverage(args.quick, args.coverage_data)
    report("startup", started, [
        check("import_s_over_python", start["import pdm"], "<= 0.5", "seconds over python -c pass"),
        check("help_s_over_python", start["predmaint --help"], "<= 0.7", "seconds over python -c pass"),
        check("coverage_pct", percent, ">= 90", f"lines of pdm/, {what}"),
    ], tables, args.quick)


if __name__ == "__main__":
    main()
