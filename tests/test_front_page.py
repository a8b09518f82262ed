"""What stands on the front page beside its prose: the picture that a tutorial drew, and how to cite."""

import base64
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent


def test_the_picture_of_the_front_page_is_what_its_tutorial_drew():
    page = nbformat.read(ROOT / "nbs/index.ipynb", 4)
    assert any("](images/first_alarm.png)" in cell.source for cell in page.cells)
    outputs = [o for cell in nbformat.read(ROOT / "nbs/tutorials/first_alarm.ipynb", 4).cells if cell.cell_type == "code" for o in cell.outputs]
    drawn = [base64.b64decode(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", {})]
    assert (ROOT / "nbs/images/first_alarm.png").read_bytes() in drawn


def test_the_citation_is_in_the_citation_file_format_and_of_this_version():
    done = subprocess.run([str(Path(sys.executable).with_name("check-jsonschema")), "--builtin-schema", "vendor.citation-file-format", str(ROOT / "CITATION.cff")],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    version = next(line.split("=")[1].strip() for line in (ROOT / "settings.ini").read_text().splitlines() if line.startswith("version"))
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
