"""nbdev_test for coverage: a cell that is exported runs in its notebook, and counts for the lines of pdm/ that nbdev_export made of it.

nbdev marks each of those places with the id of its cell, so that the map is exact; where the two texts differ, it says so instead of counting.
"""

import ast
import re
import sys
from pathlib import Path

import nbdev.test
from execnb.shell import CaptureShell
from IPython.core.compilerop import CachingCompiler

ROOT = Path(__file__).resolve().parent.parent
_MARK = re.compile(r"# %% \S+\.ipynb #(\S+)")
_OWN_IMPORT = re.compile(r"^(\s*from )(pdm[\w.]*|\.+[\w.]*)( import)")  # nbdev writes pdm's own imports relative


def places() -> dict[str, tuple[str, int, list[str]]]:
    "Of the id of each exported cell: the file that holds it now, the line before its first, and its lines."
    found = {}
    for path in sorted((ROOT / "pdm").rglob("*.py")):
        lines = path.read_text().splitlines()
        marks = [(n, mark[1]) for n, line in enumerate(lines, 1) if (mark := _MARK.fullmatch(line))]
        for (n, cell), (end, _) in zip(marks, [*marks, (len(lines) + 1, "")][1:], strict=True):
            found[cell] = (str(path), n, "\n".join(lines[n:end - 1]).strip("\n").splitlines())
    return found


def alike(lines: list[str]) -> list[str]:
    return [_OWN_IMPORT.sub(r"\1pdm\3", line).rstrip() for line in lines]


class Exported(CachingCompiler):
    "Compiles the cell that runs as what it is: lines of a file of pdm/, if it was exported."

    place: tuple[str, int] | None = None

    def cache(self, transformed_code, number=0, raw_code=None):
        return self.place[0] if self.place else super().cache(transformed_code, number, raw_code)

    def ast_parse(self, source, filename="<unknown>", symbol="exec"):
        tree = super().ast_parse(source, filename, symbol)
        return ast.increment_lineno(tree, self.place[1]) if self.place and filename == self.place[0] else tree


class Lessons(CaptureShell):
    compiler_class = Exported

    def cell(self, cell, **how):
        if cell.cell_type == "code" and (place := PLACES.get(cell.id)):
            path, before, lines = place
            if alike(cell.source.strip("\n").splitlines()) != alike(lines):
                raise ValueError(f"cell {cell.id} is not what {path} holds from line {before + 1} on: make export, then measure again")
            self.compile.place = path, before
        try:
            return super().cell(cell, **how)
        finally:
            self.compile.place = None


PLACES = places()

if __name__ == "__main__":
    nbdev.test.CaptureShell = Lessons  # it makes one for each notebook
    sys.argv[0] = "nbdev_test"
    nbdev.test.nbdev_test()
