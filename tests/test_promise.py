"""The promise about false alarms where scores have a memory, and where it must not be given."""

import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.stats import chi2

from pdm.model.bundle import Contract, Scored
from pdm.model.calibrate import SLOW, calibrate, decorrelation
from pdm.model.monitor import Monitor

HOP_S, DAY = 60.0, 1440
CONTRACT = Contract(name="fan_motor", kind="scores", channels=("h",), units=("g",), rate_hz=1, samples=1, embedding=1, training_data="0" * 64)


def ar1(n, rho, rng):
    noise = np.sqrt(1 - rho**2) * rng.standard_normal(n)
    noise[0] = rng.standard_normal()
    return lfilter([1.0], [1.0, -rho], noise)


def restless(n, rng):
    "Uncorrelated, in calm and wild spells."
    return rng.standard_normal(n) * np.exp(0.6 * ar1(n, 0.99, rng))


def calibrated(db, rate=1.0, **more):
    return calibrate(10 ** (np.asarray(db) / 20), HOP_S, rate, **more)


def watch(record, db):
    monitor = Monitor(record, CONTRACT)
    scored = Scored(10 ** (db / 20), np.ones((len(db), 1)), np.ones((len(db), 1)))
    return monitor, [monitor.update(scored, i, (i + 1) * 60 * 10**9) for i in range(len(db))]


def counted(make, calibration, rate, days, repeats=12, seed=0):
    "Supported calibrations, episodes after them, and days watched."
    rng, supported, episodes, seen = np.random.default_rng(seed), 0, 0, 0.0
    for _ in range(repeats):
        db = make(calibration + days * DAY, rng)
        record = calibrated(db[:calibration], rate)
        if record.supported:
            monitor, _ = watch(record, db[calibration:])
            supported, episodes, seen = supported + 1, episodes + monitor.episodes, seen + monitor.running_s / 86400
    return supported, episodes, seen


LIVES = {
    "independent": lambda n, rng: rng.standard_normal(n),
    "heavy-tailed": lambda n, rng: rng.standard_t(3, n),
    "AR(1) 0.5": lambda n, rng: ar1(n, 0.5, rng),
    "AR(1) 0.9": lambda n, rng: ar1(n, 0.9, rng),
    "AR(1) 0.97": lambda n, rng: ar1(n, 0.97, rng),
    "small daily cycle": lambda n, rng: 0.4 * np.sin(2 * np.pi * np.arange(n) / DAY) + rng.standard_normal(n),
    "restless": restless,
}


@pytest.mark.parametrize("life", LIVES)
def test_where_the_promise_is_supported_the_count_does_not_refute_it(life):
    supported, episodes, days = counted(LIVES[life], DAY, 0.1, 6)
    assert supported >= 3 and days == pytest.approx(6 * supported)
    assert chi2.ppf(0.025, 2 * episodes) / 2 / days <= 0.1 if episodes else True


@pytest.mark.parametrize("rho", [0.97, 0.99, 0.999])
def test_two_and_a_half_hours_of_a_slow_machine_promise_nothing(rho):
    rng = np.random.default_rng(1)
    assert not any(calibrated(ar1(150, rho, rng)).supported for _ in range(30))


def test_a_daily_cycle_that_was_seen_is_not_taken_for_independence():
    rng = np.random.default_rng(2)
    db = 3 * np.sin(2 * np.pi * np.arange(2 * DAY) / DAY) + rng.standard_normal(2 * DAY)
    record = calibrated(db, 0.1)
    assert not record.supported and record.report["decorrelation_windows"] > 100
    assert record.report["hours_needed"] > 48


def test_a_daily_cycle_that_was_not_seen_is_named_as_assumption():
    record = calibrated(np.random.default_rng(3).standard_normal(300))
    assert record.supported and record.reasons == ("assumed: healthy windows go on as in these 5.0 h; a daily cycle was not seen",)


def test_spells_that_are_uncorrelated_are_not_taken_for_independent():
    rng = np.random.default_rng(4)
    found = [(decorrelation(db), calibrated(db).report["decorrelation_windows"]) for db in (restless(DAY, rng) for _ in range(10))]
    assert np.median([of_height for of_height, _ in found]) == 1 and np.median([of_both for _, of_both in found]) > 20


def test_independent_scores_are_worth_all_of_their_windows():
    rng = np.random.default_rng(5)
    assert np.mean([calibrated(rng.standard_normal(n)).report["decorrelation_windows"] == 1 for n in (40, 150, 480, 1440) for _ in range(25)]) > 0.9


def test_what_wanders_in_the_embedding_withdraws_the_promise_and_changes_no_rule():
    rng = np.random.default_rng(6)
    db, still, wanders = rng.standard_normal(200), rng.standard_normal((500, 4)), ar1(500, 0.99, rng)
    plain, calm, slow = (calibrated(db, embedding=e) for e in (None, still, np.c_[still[:, :3], wanders]))
    assert plain == calm and plain.supported
    assert not slow.supported and "wanders" in slow.reasons[0]
    assert (slow.threshold_db, slow.confirmations, slow.spacing_s) == (plain.threshold_db, plain.confirmations, plain.spacing_s)
    assert slow.report["hours_needed"] == pytest.approx(SLOW * decorrelation(wanders) / 60) and "supportable_per_day" not in slow.report


def test_adaptation_forgives_slow_healthy_drift_and_not_slow_wear():
    rng = np.random.default_rng(7)
    record = calibrated(rng.standard_normal(2 * DAY), 0.1)
    days = np.arange(8 * DAY) / DAY
    drift, verdicts = watch(record, rng.standard_normal(8 * DAY) + 0.08 * days)
    assert drift.episodes == 0 and verdicts[-1].offset_db > 0.3
    wear, verdicts = watch(record, rng.standard_normal(8 * DAY) + 0.8 * days)
    assert wear.episodes > 0 and verdicts[-1].alarm and max(v.offset_db for v in verdicts) <= record.budget_db


def test_adaptation_leaves_p_values_of_healthy_windows_honest():
    rng = np.random.default_rng(8)
    low = []
    for _ in range(12):
        _, verdicts = watch(calibrated(rng.standard_normal(300)), rng.standard_normal(4000))
        low += [(v.p_value <= 0.05, v.p_unadapted <= 0.05) for v in verdicts]
    adapted, unadapted = np.mean(low, axis=0)
    assert 0.03 < unadapted < 0.065 and abs(adapted - unadapted) < 0.01
