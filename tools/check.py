"""What CI refuses, in one run: notebooks that aren't clean, a library that isn't what they export, a stale README, links that lead nowhere, a room that imports what it may not, code said twice, ruff, mypy."""

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import outputs
import rooms
from docs import ROOT, readme, unlisted

BIN = Path(sys.executable).parent
# per cent of the lines may be said twice: what is there now is 0.05, none of it in pdm/ alone
DUPLICATES = ("jscpd", "pdm", "pipelines", "tests", "benchmarks", "tools", "--format", "python", "--min-tokens", "70", "--threshold", "0.1", "--silent")


def run(*command: str, cwd: Path = ROOT) -> bool:
    done = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print("-", " ".join(command), f"\n{done.stdout.rstrip()}", flush=True)
    return done.returncode == 0


def generated() -> bool:
    "Clean and export a copy of the tree as it lies here: nothing may change."
    print("- notebooks clean, pdm/ exported", flush=True)
    with tempfile.TemporaryDirectory() as copy:
        listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "nbs", "pdm", "settings.ini", "pyproject.toml"],
                                cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
        files = [f for f in listed if (ROOT / f).is_file()]
        for f in files:
            target = Path(copy, f)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / f).read_bytes())
        for command in ("nbdev_clean", "nbdev_export"):
            subprocess.run([str(BIN / command)], cwd=copy, check=True)
        changed = [f for f in files if Path(copy, f).read_bytes() != (ROOT / f).read_bytes()]
    for f in changed:
        print(f"  {f} is not what nbdev_clean and nbdev_export make of it: make export", flush=True)
    return not changed


def parameters() -> bool:
    "A step notebook has one cell tagged `parameters`, or papermill runs the defaults in silence."
    import nbformat

    wrong = [p for p in ROOT.glob("pipelines/steps/*.ipynb")
             if sum("parameters" in c.metadata.get("tags", ()) for c in nbformat.read(p, 4).cells) != 1]
    for p in wrong:
        print(f"  {p} has not exactly one cell tagged parameters")
    return not wrong


def headed() -> bool:
    "The first cell of a chapter is its title and its promise: what else stands in it is on no page."
    import nbformat

    wrong = []
    for p in sorted(ROOT.glob("nbs/**/*.ipynb")):
        text = nbformat.read(p, 4).cells[0].source
        if "\n> " in text and "\n" in text.split("\n> ", 1)[1].strip():
            wrong.append(p)
            print(f"  {p.relative_to(ROOT)}: put what follows the promise into a cell of its own")
    return not wrong


def leaves_nothing() -> bool:
    "nbdev_test runs many lessons in one process, and skips a cell that exports: what tidies up must run, and who silenced the log lets it speak again."
    import nbformat

    wrong = []
    for p in sorted(ROOT.glob("nbs/**/*.ipynb")):
        cells = [[line for line in c.source.splitlines() if line.strip() and not line.startswith("#|")]
                 for c in nbformat.read(p, 4).cells if c.cell_type == "code"]
        silences = [line for cell in cells for line in cell if line.strip().startswith("logging.disable(")]
        if silences and "NOTSET" not in silences[-1]:
            wrong.append((p, "end with logging.disable(logging.NOTSET)"))
        if any("nbdev_export()" in line and len(cell) > 1 for cell in cells for line in cell):
            wrong.append((p, "put what stands beside nbdev_export() into a cell of its own"))
    for p, why in wrong:
        print(f"  {p.relative_to(ROOT)}: {why}")
    return not wrong


def ruled() -> bool:
    "A room imports only rooms above it, and only the libraries that it may."
    wrong = [sentence for name, path in rooms.modules() for sentence in (*rooms.below(name, path), *rooms.foreign(name, path))]
    for sentence in wrong:
        print(f"  {sentence}")
    return not wrong


def linked() -> bool:
    "A link to a file of ours leads to one, from each notebook and page; what the built site makes of it is the site's own check."
    wrong = []
    for p in [*ROOT.glob("*.md"), *ROOT.glob("edge/**/*.md"), *ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("pipelines/**/*.md")]:
        if ".ipynb_checkpoints" in p.parts:  # JupyterLab's, not ours
            continue
        text = p.read_text()
        if p.suffix == ".ipynb":
            text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
            path = link.partition("#")[0]
            if path and not re.match(r"[a-z]+:", link) and not any((p.parent / name).exists() for name in (path, re.sub(r"\.html$", ".ipynb", path))):
                wrong.append(f"{p.relative_to(ROOT)} links to {path}, which is not there")
    for sentence in wrong:
        print(f"  {sentence}")
    return not wrong


def shown() -> bool:
    "Committed outputs are plots and tables that a reader needs."
    for sentence in (wrong := outputs.check()):
        print(f"  {sentence}")
    return not wrong


def fresh() -> bool:
    print("- README and sidebar", flush=True)
    if (ROOT / "README.md").read_text() != readme():
        print("  README.md is not what nbs/index.ipynb says: make readme")
        return False
    for name in (wrong := unlisted()):
        print(f"  nbs/sidebar.yml and nbs/ differ in {name}")
    return not wrong


if __name__ == "__main__":
    with ThreadPoolExecutor() as pool:
        checks = [pool.submit(*call) for call in ((generated,), (run, "mypy"), (run, "ruff", "check", "."), (run, *DUPLICATES), (parameters,), (headed,), (leaves_nothing,), (ruled,), (linked,), (shown,), (fresh,))]
    sys.exit(0 if all(check.result() for check in checks) else 3)
