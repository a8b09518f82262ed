"The threat model names tests, and says what nothing stops: neither may become untrue unseen."

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def page() -> str:
    cells = json.loads((ROOT / "nbs/explanations/threat_model.ipynb").read_text())["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells)


def test_every_test_that_the_threat_model_names_is_there():
    there = {name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"^def (test_\w+)\(", file.read_text(), re.M)}
    named = set(re.findall(r"`(test_\w+)`", page()))
    assert len(named) > 50 and not named - there


def test_every_row_names_a_test_and_every_foothold_what_does_not_stop_it():
    rows = [line for line in page().splitlines() if line.startswith("| ") and not line.startswith(("| question", "| what happens"))]
    assert len(rows) > 30 and not [row for row in rows if "`test_" not in row]
    footholds = [part for part in page().split("\n## ") if "| question |" in part]
    assert len(footholds) == 7 and not [part.splitlines()[0] for part in footholds if "**What does not stop them.**" not in part]
