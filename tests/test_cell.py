"""What a cell of a notebook shows: cards, errors and bars."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from jupyter_client.manager import start_new_kernel

from pdm.card import card
from pdm.loop.attribute import Attribution
from pdm.loop.attribute import Evidence as Reason
from pdm.loop.drift import Drift, Evaluation, Shift
from pdm.loop.gate import GateReport
from pdm.loop.judged import Criterion
from pdm.model.bundle import Bundle, Contract
from pdm.model.calibrate import calibrate
from pdm.model.detector import Detector
from pdm.model.monitor import Verdict
from pdm.signal.diagnose import Diagnosis, Evidence

BAD = "<script>alert('x')</script>&\"pump\""
CONTRACT = Contract(name="pump", kind="conv_ae", channels=(BAD,), units=("g",), rate_hz=12800, samples=1280, embedding=4, training_data="0" * 64, versions={"torch": BAD})
RECORD = calibrate(np.exp(np.random.default_rng(0).normal(size=50)), 1.0, asset=BAD)
DRIFT = Drift(BAD, 10**18, 20, True, 10**18, {}, (Shift("indicator", BAD, 0.9, 1e-9, 20, 0.1, True),))
ANSWERS = {
    "verdict": (Verdict(10**18, 2.0, 0.01, 0.01, 0.0, True, 2, "running", (2.0,), False, False, 1.5, episode=BAD, fault=BAD), ("alarm: act", "above the threshold of 1.5", "0.01", "not supported")),
    "detector": (Detector(CONTRACT, RECORD, lambda feed: [], b""), ("promise not supported", "conv_ae", "12,800 Hz", "would support it")),
    "diagnosis": (Diagnosis("outer_race", BAD, 9.0, {}, (Evidence("BPFO", 81.1, 81.2, 3.2, (1, 2), 0, 0.1, "1", 20.0, 9.0, (0, 1)),), 3.0, 0.3, 1500.0, 0.0), ("outer race", "81.10", "1500 rpm")),
    "bundle": (Bundle(Path("x"), "ab" * 32, CONTRACT), ("Bundle abababababab", "pump, revision 0")),
    "drift of an asset": (DRIFT, ("drift", "+0.90", "moved")),
    "drift report": (Evaluation(10**18, 1e-4, {BAD: DRIFT}), ("1 of 1 assets", "2001-09-09 01:46:40 UTC")),
    "gate report": (GateReport((Criterion("promise", False, BAD, f"wait {BAD}"), Criterion("data", True, "there is none", skipped=True))), ("does not pass", "✗", "–", "What to do: wait")),
    "attribution": (Attribution(BAD, 1, "fault", 0.9, (Reason(BAD, BAD, {"fault": 2.0}),), None, "ask", BAD), ("fault", "+2.0")),
}


class Page(HTMLParser):
    "Tags, attributes and text; each tag that is opened is closed."
    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open, self.attributes = set(), [], [], set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.parametrize("name", ANSWERS)
def test_a_card_says_what_somebody_wants_first_and_lets_no_name_into_the_page(name):
    answer, expected = ANSWERS[name]
    page = Page(answer._repr_html_())
    assert page.tags <= {"div", "b", "span", "table", "tr", "th", "td", "br"} and page.attributes <= {"style"}
    text = " ".join(page.words)
    for word in expected:
        assert word in text
    assert BAD in text


def test_a_card_leaves_out_what_is_not_known():
    assert [w for w in Page(card("x", "good", "good", {"a": None, "b": "", "c": [], "d": 0})).words if w.strip()] == ["x", "good", "d", "0"]


@pytest.fixture(scope="module")
def cell():
    "Runs a cell in a real kernel; gives its name of the error, its traceback without colours and its streams."
    kernel, client = start_new_kernel(kernel_name="python3")

    def run(code, somebody=True):
        told = []
        client.execute_interactive(code, allow_stdin=somebody, timeout=120, output_hook=told.append)
        shown = [m["content"] for m in told]
        error = next((c for c in shown if "ename" in c), {"ename": "", "traceback": []})
        return error["ename"], re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error["traceback"])), "".join(c.get("text", "") for c in shown if c.get("name"))

    yield run
    client.stop_channels()
    kernel.shutdown_kernel(now=True)


WRONG = "import pdm\ndef mine(x):\n    return pdm.Detector.fit(x, rate_hz=100, channels=['h', 'v'], hop_s=1)\nmine([[1.0, 2.0]])"


def test_a_mistake_of_the_users_shows_the_users_own_lines_and_the_sentence(cell):
    name, text, _ = cell(WRONG)
    assert name.startswith("Invalid")
    assert "----> 4 mine([[1.0, 2.0]])" in text and "pdm.Detector.fit(x" in text
    assert not re.search(r"/pdm/\w+/\w+\.py", text) and len(text.splitlines()) < 20
    assert name in text.splitlines()[-2] and "%tb" in text.splitlines()[-1]


def test_every_line_of_it_can_be_had_and_is_kept_where_a_program_runs_the_notebook(cell):
    cell(WRONG)
    cell("%xmode Verbose")
    shown = cell("%tb")[1]
    cell("%xmode Context")
    assert re.search(r"/pdm/model/\w+\.py", shown)
    assert re.search(r"/pdm/model/\w+\.py", cell(WRONG, somebody=False)[1])
    cell(WRONG)
    assert "inputs.py" in cell("import sys, traceback; print(''.join(traceback.format_tb(sys.last_traceback)))")[2]  # what %debug walks


def test_a_bug_keeps_every_line(cell):
    name, text, _ = cell("import numpy as np, pdm.data.synth as s; s.random_machine('no seed')")
    assert name in ("TypeError", "ValueError") and "synth.py" in text


def test_the_cause_of_an_error_is_in_its_sentence_and_not_in_a_second_traceback(cell):
    _, text, _ = cell("from pdm.model.bundle import read_record; read_record('nowhere.json')")
    assert "no CalibrationRecord at nowhere.json" in text and "FileNotFoundError" not in text


def test_a_bar_is_shown_to_a_person_and_leaves_nothing_to_a_program(cell):
    code = "from pdm.progress import counted\nfor _ in counted(range(3), 'windows'): pass"
    assert cell(code, somebody=False)[2] == ""
    shown = "from pdm.progress import counted\nimport io, sys\nfor _ in counted(range(3), 'windows', progress=True): pass"
    assert "windows" in cell("import tqdm.auto, tqdm; tqdm.auto.tqdm = tqdm.tqdm\n" + shown)[2]  # a line of text, for widgets send theirs apart
