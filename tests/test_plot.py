"""Pictures: one look on white and on black, whatever they are given to draw on; and what they can't draw is refused."""

import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from pdm import plot
from pdm.data import mfpt
from pdm.errors import InvalidInput
from pdm.loop.drift import Drift, Shift
from pdm.loop.exam import STRENGTHS
from pdm.model.calibrate import calibrate
from pdm.signal.kinematics import fault_frequencies
from pdm.stream.rollout import Step

ROWS, T = np.random.default_rng(0).normal(size=(20, 64)), np.arange(20.0)
RECORD = calibrate(np.exp(0.1 * ROWS[:, 0]), 1.0)
STEPS = [Step(10**18, "a" * 64, "", "wanted", "fetched", "", {}), Step(2 * 10**18, "a" * 64, "pump", "shadow", "rolled_back", "it is worse", {})]
MOVED = Drift("acme/hall/pump", 1, 20, True, None, {}, (Shift("score", "db", 0.9, 1e-9, 20, 0.1, True), Shift("condition", "load", -0.1, 0.5, 20)))
PLOTS = {
    "waveform": lambda ax: plot.waveform(ROWS[:2], 1000, ["h", "v"], ax=ax),
    "envelope_spectrum": lambda ax: plot.envelope_spectrum(np.arange(500.0), np.ones(500), fault_frequencies(mfpt.BEARING, mfpt.RPM), "inner_race", ax=ax),
    "waterfall": lambda ax: plot.waterfall(ROWS, 1000, ax=ax),
    "orbit": lambda ax: plot.orbit(ROWS[0], ROWS[1], [0, 32], ax=ax),
    "trend": lambda ax: plot.trend(T, np.exp(0.1 * T), "group2_rigid", ax=ax),
    "score_timeline": lambda ax: plot.score_timeline(T, np.exp(T), 3.0, T > 10, {"pit": 5.0}, ax=ax),
    "channel_bars": lambda ax: plot.channel_bars(["h", "v"], [1.0, 3.0], 2.0, ax=ax),
    "parts_timeline": lambda ax: plot.parts_timeline({"train": (T, T), "faulty": (T, T)}, ax=ax),
    "calibration": lambda ax: plot.calibration(RECORD, np.ones(5), ax=ax),
    "injected_faults": lambda ax: plot.injected_faults({"conv_ae": {"1": 0.2, "2": 0.9, "mean": 0.5}}, ax=ax),
    "drift": lambda ax: plot.drift(MOVED, ax=ax),
    "rollout": lambda ax: plot.rollout(STEPS, ax=ax),
}


@pytest.fixture
def style():
    with plt.rc_context():
        yield
    plt.close("all")


def colours_of(ax):
    "Of lines, text and ticks."
    return {*(line.get_color() for line in ax.lines), ax.xaxis.label.get_color(), *(t.get_color() for t in ax.get_xticklabels())}


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_draws_on_the_axes_it_is_given(name):
    ax = Figure().subplots()
    assert PLOTS[name](ax) is ax
    assert plot.data_uri(ax).startswith("data:image/svg+xml;base64,")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_can_be_read_on_the_paper_of_its_style(name, dark, style):
    plot.use_style(dark=dark)
    ax = PLOTS[name](None)
    ax.figure.canvas.draw()
    paper = ax.figure.get_facecolor()
    assert plot.contrast(paper, "white" if dark else "black") > 15
    assert min(plot.contrast(c, paper) for c in colours_of(ax)) >= 3


def test_a_plot_goes_by_the_paper_it_is_given_and_not_by_the_style(style):
    plot.use_style()
    with plt.style.context("dark_background"):
        _, night = plt.subplots()
    assert plot.waveform(ROWS[:1], 1000, ax=night).lines[0].get_color() == plot.NIGHT.signal
    plot.use_style(dark=True)
    day = Figure(facecolor="white").subplots()
    day.set_facecolor("white")
    assert plot.waveform(ROWS[:1], 1000, ax=day).lines[0].get_color() == plot.SIGNAL


def test_every_plot_is_told_about_and_tried_here():
    made = {n for n in plot.__all__ if callable(getattr(plot, n))} - {"contrast", "thin", "use_style", "data_uri"}
    assert made == set(PLOTS)
    assert {n for n in made if "def " + n in "".join(p.read_text() for p in Path(plot.__file__).parent.glob("plot*.py"))} == made


@pytest.mark.parametrize("draw,text", [
    (lambda: plot.waterfall(ROWS[0], 1000), "two rows or more"),
    (lambda: plot.waterfall(ROWS, 1000, at=T[:3]), "a value for each of 20"),
    (lambda: plot.waterfall(ROWS, freq_hz=np.zeros(64)), "increasing"),
    (lambda: plot.waterfall(ROWS, 1000, max_hz=1), "below max_hz=1"),
    (lambda: plot.orbit(ROWS[0], ROWS[1], [64]), "samples from 0 to 63"),
    (lambda: plot.trend(T, np.full(20, np.nan)), "at least one value finite"),
    (lambda: plot.calibration("record"), "got str"),
    (lambda: plot.calibration(RECORD, [-1.0]), "one score > 0"),
    (lambda: plot.injected_faults({}), "shares from 0 to 1"),
    (lambda: plot.rollout(["promoted"]), "at least one step"),
])
def test_what_a_plot_cannot_draw_is_refused_with_what_was_expected(draw, text):
    with pytest.raises(InvalidInput, match=re.escape(text)):
        draw()


def test_an_exam_is_drawn_by_the_share_of_all_faults_heard():
    heard = np.zeros((4, 2, len(STRENGTHS)))
    heard[:2, :, -1], heard[:, 1, 0] = 1, np.nan
    ax = plot.injected_faults(SimpleNamespace(heard={"challenger": heard}))
    assert ax.lines[0].get_ydata().tolist() == [0, 0, 0, 0, 0.5]
    plt.close("all")


def test_a_rollout_gives_the_place_back_to_the_version_before():
    t = iter(range(10**18, 10**19, 10**17))
    steps = [Step(next(t), d * 64, "pump", "", after, "", {}) for d, after in (("a", "promoted"), ("b", "shadow"), ("b", "promoted"), ("b", "rolled_back"))]
    ax = plot.rollout(steps, until_ns=next(t))
    assert [round(b.get_y() + b.get_height() / 2) for b in ax.patches] == [0, 1, 1, 0]  # a, b beside it, b, a again
    starts = [b.get_x() for b in ax.patches]
    assert starts == sorted(starts)
    plt.close("all")
