"""The site in _docs, or with --readme README.md, both from nbs/. Quarto where it is on PATH, else smalldocs."""

import html
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"


def readme() -> str:
    "README.md as nbs/index.ipynb says it: its prose, its code and the text of its outputs."
    parts = []
    for cell in nbformat.read(NBS / "index.ipynb", 4).cells:
        if cell.cell_type == "markdown":  # its links and pictures start at the root instead of at nbs/
            parts.append(re.sub(r"\]\((?![\w+.-]+:|[#/])(\.\./)?", lambda up: "](" if up[1] else "](nbs/", cell.source))
        elif cell.cell_type == "code" and not cell.source.startswith("#| hide"):
            parts.append(f"```python\n{cell.source}\n```")
            text = "".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in cell.outputs)
            if text:
                parts.append(f"```\n{text.rstrip()}\n```")
    return "<!-- Generated from nbs/index.ipynb by `make readme`; edit it there. -->\n\n" + "\n\n".join(parts) + "\n"


def unlisted() -> list[str]:
    "Notebooks that the sidebar forgot, and entries whose notebook is gone."
    listed = {line.split("- ")[-1].strip() for line in (NBS / "sidebar.yml").read_text().splitlines() if line.endswith(".ipynb")}
    there = {str(p.relative_to(NBS)) for p in NBS.rglob("*.ipynb") if not any(s[0] in "._" for s in p.parts[-2:])}
    return sorted(listed ^ there)


# What stands on a page before it is rendered

if __name__ == "__mp_main__":  # a worker of nbdev's: a type that a module imports for type checkers alone is shown as it is written
    from inspect import Signature, signature

    import fastcore.docments

    def _as_written(of: Callable[..., object], **how: bool) -> Signature:
        try:
            return signature(of, **how)
        except NameError:
            return signature(of)

    fastcore.docments.signature = _as_written


def _promise(source: Path) -> tuple[str, str]:
    "Title and promise of a page."
    text = source.read_text() if source.suffix == ".md" else nbformat.read(source, 4).cells[0].source
    front = re.match(r"---\n(.*?)\n---\n", text, re.S)
    if front:
        said = yaml.safe_load(front[1])
        return said["title"], said.get("description", "")
    title, _, promise = text.partition("\n")
    return title.lstrip("# "), re.sub(r"\s*\n>?\s*", " ", promise.strip().removeprefix(">")).strip()


def write_parts(source: Path) -> None:
    "A page for each part of the sidebar that asks for one: what is in it, each with its promise."
    def entries(contents: list, depth: int) -> Iterator[str]:
        for entry in contents:
            if isinstance(entry, dict):
                yield f"\n{'#' * depth} {entry['section']}\n\n"
                yield from entries(entry["contents"], depth + 1)
            else:
                title, promise = _promise(source / entry)
                yield f"- [{title}]({entry}): {promise}\n"

    for part in yaml.safe_load((NBS / "sidebar.yml").read_text())["website"]["sidebar"]["contents"]:
        if isinstance(part, dict) and "href" in part:
            (source / part["href"]).write_text(f"---\ntitle: {part['section']}\ntoc: false\n---\n\n" + "".join(entries(part["contents"], 2)))


# What is done to a page after it was rendered

def _without_requests(site: Path) -> None:
    "Formulas as MathML, which browsers draw by themselves, instead of a script from elsewhere; the reader's own fonts."
    from math_core import LatexToMathML
    tex = LatexToMathML()

    def formula(found: re.Match[str]) -> str:
        return tex.convert_with_local_state(html.unescape(found[2]), displaystyle=found[1] == "display")

    for page in site.rglob("*.html"):
        text = page.read_text()
        if "katex" in text:
            text = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', formula, text, flags=re.S)
            page.write_text(re.sub(r'<link rel="stylesheet" href="[^"]*katex[^"]*">|<script src="[^"]*katex[^"]*" defer></script>', "", text))
    for sheet in site.rglob("*.css"):
        sheet.write_text(re.sub(r'@import url\(["\']?https?://[^)]*\);', "", sheet.read_text()))


def _methods_at_their_class(site: Path) -> None:
    "nbdev links `Class.method` to a heading that only some methods have: the others are told of under their class."
    pages: dict[Path, set[str]] = {}

    def mended(page: Path, found: re.Match[str]) -> str:
        target = (page.parent / found[1]).resolve() if found[1] else page
        if target not in pages:
            pages[target] = _Page(target.read_text()).anchors if target.is_file() else set()
        whole, of_class = found[2], found[2].partition(".")[0]
        return f'href="{found[1]}#{of_class if whole not in pages[target] and of_class in pages[target] else whole}"'

    for page in site.rglob("*.html"):
        text = page.read_text()
        new = re.sub(r'href="([^"#:]*)#(\w+\.\w+)"', lambda found, page=page: mended(page, found), text)
        if new != text:
            page.write_text(new)


class _Page(HTMLParser):
    "What a page can be entered by, where it leads, and what it needs to be shown."
    def __init__(self, text: str):
        super().__init__()
        self.anchors, self.links, self.loads = {""}, set[str](), set[str]()
        self.feed(re.sub(r'"data:[^"]*"', '""', text))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {k: v or "" for k, v in attrs}
        self.anchors |= {given[k] for k in ("id", "name") if given.get(k)}
        if tag == "a" and given.get("href"):
            self.links.add(given["href"])
        elif tag == "link" and given.get("rel", "") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loads.add(given.get("href", ""))
        elif given.get("src"):
            self.loads.add(given["src"])


def faults(site: Path) -> tuple[list[str], list[str]]:
    "What is wrong with the links of a site: broken ones, and what a page would fetch from elsewhere. And the links that lead away, which are not followed."
    pages = {p: _Page(p.read_text()) for p in sorted(site.rglob("*.html"))}
    source = yaml.safe_load((NBS / "nbdev.yml").read_text())["website"]["repo-url"] + "/blob/main/"
    wrong, away = [], set[str]()
    for page, found in pages.items():
        name = page.relative_to(site)
        wrong += [f"{name} fetches {url}" for url in found.loads if urlsplit(url).scheme in ("http", "https") or url.startswith("//")]
        for link in sorted(found.links | {x for x in found.loads if not urlsplit(x).scheme}):
            url = urlsplit(link)
            if link.startswith(source):  # our own source: the file is here, and has that line
                file, line = ROOT / unquote(url.path.removeprefix(urlsplit(source).path)), url.fragment.removeprefix("L")
                if not file.exists() or (line.isdecimal() and int(line) > len(file.read_text().splitlines())):
                    wrong.append(f"{name}: {link}: there is no such file, or line of it")
            elif url.scheme or link.startswith("//"):
                away.add(link)
            else:
                target = (site / url.path.lstrip("/") if url.path.startswith("/") else page.parent / unquote(url.path) if url.path else page).resolve()
                target = target / "index.html" if target.is_dir() else target
                if not target.is_file():
                    wrong.append(f"{name}: {link}: there is no such page")
                elif target in pages and unquote(url.fragment) not in pages[target].anchors:
                    wrong.append(f"{name}: {link}: the page has no such heading")
    wrong += [f"{s.relative_to(site)} fetches {url}" for s in site.rglob("*.css") for url in re.findall(r"url\([\"']?((?:https?:)?//[^)]*)\)", s.read_text())]
    return wrong, sorted(away)


def site() -> Path:
    import reference
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs

    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning")  # nbdev's word on hidden cells that import and do more
    refresh_quarto_yml()
    source, began = ROOT / "_proc", time.time()
    try:
        proc_nbs(str(NBS))  # what has changed since the folder's time, which is quicker than all
    except BaseException:
        shutil.rmtree(source, ignore_errors=True)  # its time says nothing now
        raise
    for old in source.rglob("*"):
        if old.is_file() and not (NBS / old.relative_to(source)).exists():
            old.unlink()  # it has left nbs/
    reference.write(source / "reference")
    write_parts(source)
    if shutil.which("quarto"):
        subprocess.run(["quarto", "render"], cwd=source, check=True)
    else:
        subprocess.run([str(Path(sys.executable).with_name("smalldocs")), "render", "--quiet", "."], cwd=source, check=True, stderr=subprocess.PIPE)
    shutil.rmtree(ROOT / "_docs", ignore_errors=True)
    out = Path(shutil.move(source / "_docs", ROOT / "_docs"))
    os.utime(source, (began, began))  # what was edited meanwhile is newer
    _without_requests(out)
    _methods_at_their_class(out)
    return out


if __name__ == "__main__":
    if "--readme" in sys.argv:
        (ROOT / "README.md").write_text(readme())
    else:
        if wrong := unlisted():
            sys.exit(f"nbs/sidebar.yml and nbs/ differ in {', '.join(wrong)}: correct the sidebar")
        out = site()
        wrong, away = faults(out)
        (ROOT / "build/site").mkdir(parents=True, exist_ok=True)
        (ROOT / "build/site/links_away.txt").write_text("\n".join(away) + "\n")
        if wrong:
            sys.exit("\n".join(wrong) + f"\n{len(wrong)} faults of links in {out.relative_to(ROOT)}")
        print(f"{len(list(out.rglob('*.html')))} pages, open {out.relative_to(ROOT)}/index.html; {len(away)} links lead away, and were not followed: build/site/links_away.txt")
