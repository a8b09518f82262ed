"""Time to a limit: an answer where there is growth, a reason where there is none, and no look into the future."""

import math

import numpy as np
import pytest

from pdm.errors import InvalidInput
from pdm.model.trend import CONFIRM, FEWEST, Growth, first_passage, growth, slope, time_to_limit

HOP_S = 600.0


def line(n=200, per_window=0.05, noise=0.5, seed=0):
    rng = np.random.default_rng(seed)
    return HOP_S * np.arange(n), per_window * np.arange(n) + rng.normal(0, noise, n)


def test_steady_growth_is_estimated_and_the_truth_lies_inside():
    for seed in range(10):
        t, y = line(seed=seed)
        a = time_to_limit(t, y, 16.0)
        true_s = HOP_S * (16.0 - 0.05 * 199) / 0.05
        assert a.estimable and a.low_s < a.mid_s < a.high_s
        assert a.low_s <= true_s <= a.high_s
        assert a.established_since == t[-a.windows] and a.blocks >= 8
        assert "dB to go" in str(a)


def test_rate_agrees_with_the_truth():
    t, y = line(seed=1)
    a = time_to_limit(t, y, 16.0)
    assert a.rate_db_per_day == pytest.approx(0.05 * 86400 / HOP_S, rel=0.35)


def test_coverage_of_wiener_paths_with_drift_is_at_least_nominal():
    held = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        y = np.cumsum(0.06 + rng.normal(0, 0.1, 900))
        now, t = 150, HOP_S * np.arange(900)
        past = y[: now + 1] + rng.normal(0, 0.3, now + 1)
        limit = y[now] + 5
        a = time_to_limit(t[: now + 1], past, limit)
        if a.estimable:
            true_s = t[np.argmax(y >= limit)] - t[now]
            held.append(a.low_s <= true_s <= a.high_s)
    assert len(held) >= 30 and np.mean(held) >= 0.9


def test_wider_confidence_gives_a_wider_interval():
    t, y = line()
    narrow, wide = time_to_limit(t, y, 16.0, 0.5), time_to_limit(t, y, 16.0, 0.95)
    assert wide.low_s < narrow.low_s < narrow.high_s < wide.high_s
    assert wide.mid_s == narrow.mid_s


def test_independent_noise_is_never_growth():
    rng = np.random.default_rng(2)
    for _ in range(200):
        assert isinstance(growth(HOP_S * np.arange(150), rng.normal(0, 2, 150)), str)


def test_autocorrelation_is_not_taken_for_evidence():
    rng, called = np.random.default_rng(3), 0
    for _ in range(100):
        x = np.zeros(300)
        for k in range(1, 300):
            x[k] = 0.9 * x[k - 1] + np.sqrt(1 - 0.81) * rng.normal()
        called += isinstance(growth(HOP_S * np.arange(300), 2 * x), Growth)
    assert called <= 10


@pytest.mark.parametrize("since", [20, 60, 110, 170])
def test_a_step_is_no_growth(since):
    rng = np.random.default_rng(since)
    t = HOP_S * np.arange(240)
    y = rng.normal(0, 0.6, 240) + 6.0 * (np.arange(240) >= since)
    for k in range(since + 8, 240, 4):
        assert not time_to_limit(t[:k], y[:k], 10.0).estimable


def test_a_rise_too_small_to_matter_is_named():
    t, y = line(per_window=0.008, noise=0.1)
    a = time_to_limit(t, y, 4.0)
    assert not a.estimable and "within what machines do" in a.reason
    assert math.isnan(a.mid_s) and str(a).startswith("not estimable: ")


def test_a_limit_too_far_ahead_is_refused_with_both_distances():
    t, y = line()
    a = time_to_limit(t, y, 200.0)
    assert not a.estimable and "too far" in a.reason


def test_at_the_limit_the_time_is_zero_and_said_so():
    t, y = line()
    a = time_to_limit(t, y, 5.0)
    assert a.estimable and (a.low_s, a.mid_s, a.high_s) == (0, 0, 0)
    assert "at the limit already" in str(a)


def test_a_single_burst_does_not_reach_the_limit():
    t, y = line(per_window=0.0)
    y[-1] = 40.0
    assert not time_to_limit(t, y, 16.0).estimable


def test_missing_levels_count_for_nothing_and_gaps_are_allowed():
    t, y = line()
    t[120:] += 50 * HOP_S
    y[120:] += 2.5  # it went on growing
    holes = y.copy()
    holes[::9] = np.nan
    there = np.isfinite(holes)
    assert time_to_limit(t, holes, 18.0) == time_to_limit(t[there], y[there], 18.0)
    assert time_to_limit(t, holes, 18.0).estimable


@pytest.mark.parametrize("n", [0, 1, FEWEST - 1])
def test_few_windows_are_said_to_be_few(n):
    a = time_to_limit(HOP_S * np.arange(n), np.zeros(n), 3.0)
    assert not a.estimable and str(n) in a.reason and str(FEWEST) in a.reason


def test_nothing_but_missing_levels_is_not_estimable():
    assert not time_to_limit(HOP_S * np.arange(50), np.full(50, np.nan), 3.0).estimable


def test_a_constant_level_and_a_perfect_line_do_not_break_it():
    t = HOP_S * np.arange(64)
    assert not time_to_limit(t, np.zeros(64), 3.0).estimable
    a = time_to_limit(t, 0.2 * np.arange(64), 20.0)
    assert a.estimable and 0 < a.low_s < a.mid_s < a.high_s


def test_units_of_time_and_a_shift_of_the_level_change_nothing_else():
    t, y = line()
    a, b, c = time_to_limit(t, y, 16.0), time_to_limit(t / 60, y, 16.0), time_to_limit(t, y + 100, 116.0)
    assert b.high_s == pytest.approx(a.high_s / 60, rel=1e-6)
    assert c.high_s == pytest.approx(a.high_s, rel=1e-6)


def test_the_interval_does_not_claim_less_than_the_windows_resolve():
    t, y = line(noise=0.05)
    a = time_to_limit(t, y, 0.05 * 200)
    assert a.estimable and a.high_s >= (CONFIRM // 2 + 1) * HOP_S


@pytest.mark.parametrize("t,y,limit,confidence,says", [
    ([0, 1, 2], [0, 1], 3, 0.9, "one level a window"),
    ([0, 2, 1], [0, 1, 2], 3, 0.9, "sort the windows"),
    ([0, np.nan, 2], [0, 1, 2], 3, 0.9, "finite"),
    ([0, 1, 2], [0, 1, 2], np.inf, 0.9, "finite limit"),
    ([0, 1, 2], [0, 1, 2], 3, 1.0, "between 0 and 1"),
])
def test_what_makes_no_sense_is_refused(t, y, limit, confidence, says):
    with pytest.raises(InvalidInput, match=says):
        time_to_limit(np.array(t), np.array(y), limit, confidence)


def test_the_slope_is_not_bent_by_outliers():
    t = np.arange(30.0)
    y = 0.5 * t + np.random.default_rng(0).normal(0, 0.2, 30)
    y[[3, 20]] = 50
    rate, error, z = slope(t, y)
    assert abs(rate - 0.5) < 4 * error and z > 3


def test_first_passage_is_a_distribution_and_never_certain_against_the_drift():
    time = np.geomspace(1e-3, 1e6, 400)
    toward, against = first_passage(time, 5.0, 0.1, 0.2), first_passage(time, 5.0, -0.1, 0.2)
    assert (np.diff(toward) >= -1e-9).all() and toward[-1] == pytest.approx(1)
    assert against[-1] == pytest.approx(math.exp(-2 * 0.1 * 5 / 0.2), rel=1e-3)
    mean = np.trapezoid(1 - toward, time)
    assert mean == pytest.approx(5 / 0.1, rel=0.02)
