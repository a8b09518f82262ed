"""The test files of one part of several, so that several machines share them: `python tools/parts.py 2/4`.

A file is never cut, for its tests share what its fixtures start. The longest go first, each to the part that has least to do so far."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
USUAL_S = 15
# Roughly, in seconds: files that take much longer than that. What is wrong here makes a part slower, and loses nothing
LONG_S = {
    "tests/test_pipeline.py": 400, "tests/edge_site/test_edge_site.py": 250, "tests/test_edge_images.py": 150, "tests/test_demo_loop.py": 150,
    "tests/faults/test_faults.py": 150, "tests/test_outage.py": 120, "tests/test_bootstrap.py": 100, "tests/test_rollout.py": 100,
    "tests/test_dashboards.py": 90, "tests/workflows/test_ci.py": 60, "tests/workflows/test_deploy_model.py": 120, "tests/test_sinks.py": 60, "tests/test_fuzz.py": 60, "tests/test_controller.py": 60,
}


def part(which: int, of: int) -> list[str]:
    "The files of part `which` (1 to `of`), by name."
    if not 1 <= which <= of:
        raise ValueError(f"no part {which} of {of}: expected 1 to {of}")
    parts: list[list[str]] = [[] for _ in range(of)]
    taken_s = [0] * of
    files = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("tests/**/test_*.py"))
    for file in sorted(files, key=lambda f: -LONG_S.get(f, USUAL_S)):
        least = taken_s.index(min(taken_s))
        parts[least].append(file)
        taken_s[least] += LONG_S.get(file, USUAL_S)
    return sorted(parts[which - 1])


if __name__ == "__main__":
    which, of = sys.argv[1].split("/")
    print(*part(int(which), int(of)))
