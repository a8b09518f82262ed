"""What a committed notebook may hold beside its text: plots and tables that a reader needs. Run over all of them, or over those that are named; `--staged`: as git is about to commit them."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_KB = 150
WHERE = ("nbs/**/*.ipynb", "pipelines/**/*.ipynb")
ALLOWED = {"text/plain", "text/html", "text/markdown", "text/latex", "image/png", "image/svg+xml"}
_TEXT = {  # in an output's text: what a reader would see there, and what to do
    r"(?<![\w.])/(home|root|Users|tmp|private/tmp|var/folders|work)/[\w.]": "a path of somebody's machine",
    r"^Traceback \(most recent call last\)|\b\w*Warning: ": "a warning or a traceback",
    r"\d+%\|[█▏▎▍▌▋▊▉ ]|━━━|\d+(\.\d+)?(it|s)/(s|it)\b": "a progress bar",
    r"\b(CPU times|Wall time): ": "a clock",
    r"<[\w.]+ object at 0x[0-9a-f]+>|\bat 0x[0-9a-f]{6,}\b": "an address in memory",
}


def _texts(output: dict) -> str:
    found = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))]
    return "\n".join("".join(part) for part in found)


def wrong(
    name: str,      # for messages
    content: bytes,
) -> list[str]:     # what is wrong with it, and what to do; empty: nothing
    "Hold one notebook against the policy."
    nb, found = json.loads(content), []
    if len(content) > MOST_KB * 1024:
        found.append(f"{len(content) / 1024:.0f} KB, more than {MOST_KB}: draw fewer points (`pdm.plot.thin`) or plots, or make two chapters of it")
    for cell in nb["cells"]:
        if cell["cell_type"] != "code":
            continue
        at = f"cell {cell.get('id', '?')}: "
        if cell.get("execution_count") is not None:
            found.append(f"{at}an execution count: nbdev_clean")
        for o in cell.get("outputs", []):
            if o["output_type"] == "error":
                found.append(f"{at}an error: catch it, and show what it says")
            if o["output_type"] == "stream" and o.get("name") == "stderr":
                found.append(f"{at}something on stderr: silence its cause, or hide the cell")
            if unknown := sorted(set(o.get("data", {})) - ALLOWED):
                found.append(f"{at}an output that only a running kernel can show, or nobody needs ({', '.join(unknown)}): clear it")
            found += [f"{at}{what} ({m.group(0).strip()[:40]!r}): clear the output, or end the cell in what a reader needs"
                      for pattern, what in _TEXT.items() if (m := re.search(pattern, _texts(o), re.M))]
    return [f"{name}: {what}" for what in found]


def check(root: Path = ROOT) -> list[str]:  # what is wrong with any of its notebooks
    "Hold all notebooks of a tree against the policy."
    files = sorted({f for pattern in WHERE for f in root.glob(pattern) if ".ipynb_checkpoints" not in f.parts})
    return [w for f in files for w in wrong(str(f.relative_to(root)), f.read_bytes())]


def _staged(name: str) -> bytes:
    return subprocess.run(["git", "show", f":{name}"], cwd=ROOT, capture_output=True, check=True).stdout


def _unclean(name: str, content: bytes) -> list[str]:
    "What is staged must be as nbdev_clean leaves it."
    if not name.startswith("nbs/"):
        return []
    from nbdev.clean import clean_nb
    clean_nb(nb := json.loads(content), allowed_cell_metadata_keys=["tags"])  # as settings.ini says
    return [] if nb == json.loads(content) else [f"{name}: not clean: nbdev_clean --fname {name}, then git add it"]


def main(arguments: list[str]) -> int:
    names = [a for a in arguments if a != "--staged"]
    if "--staged" in arguments:
        found = [w for n in names for content in [_staged(n)] for w in (*wrong(n, content), *_unclean(n, content))]
    else:
        found = [w for n in names for w in wrong(n, Path(n).read_bytes())] if names else check()
    print("\n".join(found), end="\n" if found else "")
    return 3 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
