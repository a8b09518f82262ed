"""The monitor and its promise: rare alarms on healthy scores, a memory that survives, a reference that moves little."""

import numpy as np
import pytest

from pdm.errors import InvalidBundle, NotEnoughData
from pdm.model.bundle import Contract, Scored
from pdm.model.calibrate import alarm_rule, calibrate, decorrelation, exceedance_limit
from pdm.model.monitor import Monitor

CONTRACT = Contract(name="fan", kind="mahalanobis", channels=("h",), units=("g",), rate_hz=1000, samples=100, embedding=1, training_data="0" * 64)
HOP_S = 10.0


def record(n=400, seed=0, rate=1.0, **options):
    return calibrate(10 ** (np.random.default_rng(seed).standard_normal(n) / 20), HOP_S, rate, **options)


def run(monitor, db, start=1, hop_s=HOP_S, rms=None):
    score = Scored(10 ** (np.asarray(db, np.float32) / 20), np.ones((len(db), 1), np.float32), np.zeros((len(db), 1), np.float32))
    return [monitor.update(score, i, round((start + i) * hop_s * 1e9), rms) for i in range(len(db))]


def test_false_alarms_of_exchangeable_scores_keep_the_promise():
    days = episodes = 0.0
    for seed in range(20):
        m = Monitor(record(1000, seed, rate=10.0), CONTRACT)
        run(m, np.random.default_rng(1000 + seed).standard_normal(8640))
        days, episodes = days + 1, episodes + m.episodes
    assert episodes <= 10 * days + 3 * np.sqrt(10 * days)


def test_an_alarm_takes_its_confirmations_and_clears_after_quiet():
    r = record()
    m = Monitor(r, CONTRACT)
    assert not any(v.alarm for v in run(m, np.zeros(20)))
    loud = run(m, np.full(12, 30.0), start=21)
    first = next(i for i, v in enumerate(loud) if v.alarm)
    assert first + 1 >= r.confirmations and loud[-1].severity >= 2
    quiet = run(m, np.zeros(int(r.quiet_s / HOP_S) + 3), start=33)
    assert quiet[0].alarm and not quiet[-1].alarm
    again = run(m, np.full(12, 30.0), start=40 + len(quiet))
    assert again[-1].episode == loud[-1].episode and m.episodes == 1  # within the hour it is the same episode


def test_one_loud_window_is_no_alarm():
    m = Monitor(record(), CONTRACT)
    assert not any(v.alarm for v in run(m, np.where(np.arange(200) % 20 == 5, 40.0, 0.0)))


def test_the_reference_rises_within_its_budget_and_falls_freely():
    r = record()
    for level in (0.8, 0.95):
        m = Monitor(r, CONTRACT)
        rng = np.random.default_rng(3)
        up = run(m, level * 5 + 0.3 * rng.standard_normal(3000))
        assert max(v.offset_db for v in up) <= r.budget_db + 1e-9
    down = run(Monitor(r, CONTRACT), -6 + np.random.default_rng(4).standard_normal(3000))
    assert down[-1].offset_db < -3 and down[-1].p_unadapted > down[-1].p_value


def test_a_slow_fault_is_not_learnt_as_normal():
    m = Monitor(record(), CONTRACT)
    rng = np.random.default_rng(5)
    assert run(m, np.linspace(0, 12, 6000) + rng.standard_normal(6000))[-1].alarm


def test_its_state_survives_a_kill():
    rng = np.random.default_rng(6)
    db = np.concatenate([rng.standard_normal(50), np.full(8, 25.0), rng.standard_normal(50)])
    r, whole = record(), None
    whole = run(Monitor(r, CONTRACT), db)
    m, pieces = Monitor(r, CONTRACT), []
    for i in range(len(db)):
        pieces += run(m, db[i:i + 1], start=1 + i)
        state = __import__("json").loads(__import__("json").dumps(m.to_state()))
        m = Monitor(r, CONTRACT)
        m.restore(state)
    assert pieces == whole


def test_a_late_window_is_judged_and_changes_nothing():
    m = Monitor(record(), CONTRACT)
    run(m, np.zeros(10))
    before = m.to_state()
    assert run(m, [40.0], start=3)[0].score > 1 and m.to_state() == before


def test_a_gap_starts_the_confirmations_anew():
    r = record()
    m = Monitor(r, CONTRACT)
    run(m, np.full(r.confirmations - 1, 30.0))
    assert not run(m, [30.0], start=1000)[0].alarm


def test_a_machine_that_stands_still_neither_alarms_nor_counts():
    r = record(running_rms=np.array([0.5]))
    m = Monitor(r, CONTRACT)
    stopped = run(m, np.full(50, 40.0), rms=np.array([0.01]))
    assert {v.state for v in stopped} == {"stopped"} and not stopped[-1].alarm and m.running_s == 0


def test_the_rule_is_the_one_that_is_promised():
    for m, spacing, rate in ((50, 10, 1), (200, 60, 0.1), (1000, 1, 10)):
        rule = alarm_rule(m, spacing, rate)
        assert rule.exceedance == pytest.approx(exceedance_limit(rule.rank, m))
        if rule.confirmations < 10:
            assert rule.exceedance**rule.confirmations <= rate * spacing / 86400
    assert exceedance_limit(1, 59) == pytest.approx(1 - 0.05 ** (1 / 59))


def test_dependent_scores_are_worth_fewer():
    rng = np.random.default_rng(8)
    noise, ar = rng.standard_normal(4000), np.zeros(4000)
    for i in range(1, 4000):
        ar[i] = 0.95 * ar[i - 1] + noise[i]
    assert decorrelation(noise) <= 2 and 20 <= decorrelation(ar) <= 120
    r = calibrate(10 ** (ar / 20), HOP_S)
    assert r.report["effective_windows"] < 250 and r.spacing_s >= 200


def test_too_little_data_is_said():
    with pytest.raises(NotEnoughData):
        record(5)
    few = record(15)
    assert not few.supported and any("independent" in reason for reason in few.reasons)
    assert not record(100).supported and "would support it" in " ".join(record(100).reasons)
    assert record(10_000).supported


def test_a_record_of_another_shape_is_refused():
    with pytest.raises(InvalidBundle, match="2 channels"):
        Monitor(record(running_rms=np.array([0.1, 0.2])), CONTRACT)
