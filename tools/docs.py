"""The site in _docs, or with --readme README.md, both from nbs/. Quarto where it is on PATH, else smalldocs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent


def readme() -> str:
    "README.md as nbs/index.ipynb says it: its prose, its code and the text of its outputs."
    parts = []
    for cell in nbformat.read(ROOT / "nbs/index.ipynb", 4).cells:
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\]\((tutorials|explanations)/", r"](nbs/\1/", cell.source))  # from the root instead of from nbs/
        elif cell.cell_type == "code" and not cell.source.startswith("#| hide"):
            parts.append(f"```python\n{cell.source}\n```")
            text = "".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in cell.outputs)
            if text:
                parts.append(f"```\n{text.rstrip()}\n```")
    return "<!-- Generated from nbs/index.ipynb by `make readme`; edit it there. -->\n\n" + "\n\n".join(parts) + "\n"


def unlisted() -> list[str]:
    "Notebooks that the sidebar forgot, and entries whose notebook is gone."
    listed = {line.split("- ")[-1].strip() for line in (ROOT / "nbs/sidebar.yml").read_text().splitlines() if line.endswith(".ipynb")}
    there = {str(p.relative_to(ROOT / "nbs")) for p in (ROOT / "nbs").rglob("*.ipynb") if not any(s[0] in "._" for s in p.parts[-2:])}
    return sorted(listed ^ there)


def site() -> Path:
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs

    refresh_quarto_yml()
    proc_nbs(str(ROOT / "nbs"), force=True)
    render = ["quarto", "render"] if shutil.which("quarto") else [str(Path(sys.executable).with_name("smalldocs")), "render", "."]
    subprocess.run(render, cwd=ROOT / "_proc", check=True)
    shutil.rmtree(ROOT / "_docs", ignore_errors=True)
    return Path(shutil.move(ROOT / "_proc/_docs", ROOT / "_docs"))


if __name__ == "__main__":
    if "--readme" in sys.argv:
        (ROOT / "README.md").write_text(readme())
    else:
        if wrong := unlisted():
            sys.exit(f"nbs/sidebar.yml and nbs/ differ in {', '.join(wrong)}: correct the sidebar")
        out = site()
        print(f"{len(list(out.rglob('*.html')))} pages, open {out.relative_to(ROOT)}/index.html")
