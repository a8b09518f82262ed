"""The monitor's rules, and the promise that they add up to, on streams whose truth is known."""

import json
from functools import partial

import numpy as np
import pytest

from pdm.errors import InvalidBundle, InvalidInput
from pdm.model.bundle import Condition, Contract, Scored
from pdm.model.calibrate import calibrate
from pdm.model.monitor import Monitor, p_value, window_rms

HOP_S = 60.0
HOP = int(HOP_S * 1e9)
LOUD, QUIET = np.array([1.0, 1.0]), np.array([0.01, 0.01])


@pytest.fixture(scope="module")
def contract():
    return Contract(name="fan_motor", kind="mahalanobis", channels=("h", "v"), units=("g", "g"), rate_hz=25600, samples=64, embedding=2,
                    conditions=(Condition(name="speed_rpm", low=900, high=1500),), training_data="0" * 64)


@pytest.fixture(scope="module")
def record():
    healthy = np.random.default_rng(0).normal(size=3000)
    return calibrate(10 ** (healthy / 20), HOP_S, 1.0, "e/s/a/l/fan-1", channel_scores=np.full((3000, 2), 2.0), running_rms=np.array([0.1, 0.1]))


@pytest.fixture
def monitor(record, contract):
    return Monitor(record, contract)


def listen(monitor, db, start=0, **more):
    n = len(db)
    scored = Scored(10 ** (np.asarray(db, np.float64) / 20).astype(np.float32), np.ones((n, 2), np.float32), np.zeros((n, 2), np.float32))
    return [monitor.update(scored, i, (start + i + 1) * HOP, **more) for i in range(n)]


# the promise


@pytest.mark.parametrize("rate", [1.0, 10.0])
def test_false_alarms_of_independent_healthy_streams_do_not_refute_the_promise(contract, rate):
    rng, episodes, days = np.random.default_rng(1), 0, 0.0
    for _ in range(12):
        calibrated = calibrate(10 ** (rng.normal(size=1000) / 20), HOP_S, rate)
        assert calibrated.supported
        monitor = Monitor(calibrated, contract)
        listen(monitor, rng.normal(size=3000))
        episodes, days = episodes + monitor.episodes, days + monitor.running_s / 86400
    assert days == pytest.approx(12 * 3000 / 1440)
    assert episodes <= rate * days


def test_p_values_of_healthy_windows_are_honest_whatever_their_distribution(contract):
    rng = np.random.default_rng(2)
    low = []
    for _ in range(20):
        db = 3 * rng.standard_t(3, size=1500)
        monitor = Monitor(calibrate(10 ** (db[:300] / 20), HOP_S), contract)
        low += [v.p_unadapted <= 0.05 for v in listen(monitor, db[300:])]
    assert 0.035 < np.mean(low) < 0.065
    assert p_value([1.0, 2.0, 3.0], 2.0) == (1 + 2) / 4


def test_slow_scores_are_not_promised_from_too_short_a_calibration():
    rng = np.random.default_rng(3)
    walk = np.cumsum(rng.normal(size=1000)) / 10
    slow = calibrate(10 ** (walk / 20), HOP_S)
    assert not slow.supported and slow.report["effective_windows"] < 20
    assert "supportable_per_day" not in slow.report and slow.report["hours_needed"] > 1000 / 60
    assert any("independent ones" in reason for reason in slow.reasons)


# persistence


def test_one_wild_window_is_no_alarm_and_enough_of_them_are(monitor, record):
    assert record.confirmations >= 2
    wild = listen(monitor, [0, 0, 60, 0, 0])
    assert not any(v.alarm for v in wild) and wild[2].p_value < 0.001
    verdicts = listen(monitor, [20] * 10, start=5)
    assert [v.alarm for v in verdicts].index(True) == record.confirmations - 1
    raised = verdicts[record.confirmations - 1]
    assert raised.fault == "unknown" and raised.severity >= 2 and raised.episode == f"e/s/a/l/fan-1@{raised.t_ns}"
    assert not any(v.alarm and v.fault == "none" for v in verdicts)


def test_confirmations_are_counted_one_spacing_apart_and_not_in_between(record, contract):
    wide = record.model_copy(update={"spacing_s": 5 * HOP_S, "confirmations": 3})
    verdicts = listen(Monitor(wide, contract), [20] * 30)
    assert [v.alarm for v in verdicts].index(True) == 10  # instants 0, 5 and 10
    between = [0 if i % 5 == 0 else 20 for i in range(60)]
    assert not any(v.alarm for v in listen(Monitor(wide, contract), between))


def test_a_long_gap_starts_the_confirmations_anew(record, contract):
    patient = record.model_copy(update={"confirmations": 4})
    gap = int(record.gap_s * 1e9 / HOP) + 2
    monitor = Monitor(patient, contract)
    listen(monitor, [20] * 3)
    assert not any(v.alarm for v in listen(monitor, [20] * 3, start=3 + gap))
    assert listen(monitor, [20], start=6 + gap)[0].alarm


def test_severity_grows_with_the_trouble(monitor):
    assert listen(monitor, [0.0])[0].severity == 0
    assert listen(monitor, [6.0] * 20, start=1)[-1].severity == 2
    assert listen(monitor, [16.0] * 60, start=21)[-1].severity == 3


# clearing, and counting


def test_an_alarm_clears_after_its_quiet_time_and_comes_back_as_the_same_episode(monitor, record):
    quiet = round(record.quiet_s / HOP_S)
    listen(monitor, [20] * record.confirmations)
    verdicts = listen(monitor, [0] * (quiet + 1), start=record.confirmations)
    assert [v.alarm for v in verdicts].index(False) == quiet - 1
    start = record.confirmations + quiet + 1
    again = listen(monitor, [20] * record.confirmations, start=start)[-1]
    assert again.alarm and again.episode.endswith(f"@{record.confirmations * HOP}") and monitor.episodes == 1
    listen(monitor, [0] * 200, start=start + record.confirmations)
    later = listen(monitor, [20] * record.confirmations, start=start + record.confirmations + 200)[-1]
    assert later.episode != again.episode and monitor.episodes == 2
    assert 0 < monitor.fraction_in_alarm < 0.5


def test_each_further_day_in_alarm_counts_again(monitor):
    listen(monitor, [20.0] * 1440)
    assert monitor.episodes == 1
    listen(monitor, [20.0] * 1440, start=1440)
    assert monitor.episodes == 2 and monitor.fraction_in_alarm > 0.99


# adaptation


@pytest.mark.parametrize("step", [0.5, 3.0, 30.0])
def test_the_reference_never_rises_beyond_its_budget(monitor, record, step):
    rng = np.random.default_rng(4)
    db = rng.normal(size=6000) + step * np.clip(np.arange(6000) / 3000, 0, 1)
    offsets = [v.offset_db for v in listen(monitor, db)]
    assert max(offsets) <= record.budget_db
    assert monitor.episodes > 0 or step < record.budget_db


def test_the_reference_follows_a_quieter_machine_and_stays_where_nothing_changes(record, contract):
    rng = np.random.default_rng(5)
    quieter, same = Monitor(record, contract), Monitor(record, contract)
    assert listen(quieter, rng.normal(size=4000) - 6)[-1].offset_db == pytest.approx(-6, abs=0.4)
    assert listen(same, rng.normal(size=8000))[-1].offset_db == pytest.approx(0, abs=0.3)
    v = listen(quieter, [0.0], start=4000)[0]
    assert v.p_unadapted > 0.2 > 0.01 > v.p_value  # usual for the machine of the calibration, not for this one


def test_the_score_and_the_unadapted_p_know_nothing_of_the_past(record, contract):
    fresh, old = Monitor(record, contract), Monitor(record, contract)
    listen(old, np.random.default_rng(6).normal(size=3000) - 6)
    a, b = listen(fresh, [1.0], start=3000)[0], listen(old, [1.0], start=3000)[0]
    assert (a.score, a.p_unadapted) == (b.score, b.p_unadapted) and a.p_value != b.p_value


# the state of the machine


def test_a_stopped_machine_raises_nothing_clears_nothing_and_does_not_count(monitor, record):
    stopped = listen(monitor, [30] * 10, rms=QUIET)
    assert {v.state for v in stopped} == {"stopped"} and monitor.episodes == 0 and monitor.running_s == 0
    started = listen(monitor, [30] * 4, start=10, rms=LOUD)
    assert [v.state for v in started[:2]] == ["transient", "running"]
    listen(monitor, [30] * 10, start=14, rms=LOUD)
    resting = listen(monitor, [0] * 100, start=24, rms=QUIET)
    assert all(v.alarm for v in resting)


def test_one_channel_above_its_floor_is_enough_to_run(monitor):
    assert listen(monitor, [0], rms=np.array([0.01, 1.0]))[0].state == "running"


def test_speed_decides_where_it_is_known(monitor):
    states = [listen(monitor, [0], start=i, conditions={"speed_rpm": rpm}, rms=LOUD)[0].state for i, rpm in enumerate((1400, 1390, 1100, 1110, 30))]
    assert states == ["running", "running", "transient", "running", "stopped"]


def test_outside_of_the_conditions_seen_the_promise_does_not_hold(monitor, record):
    assert record.supported
    inside, outside, unknown = (listen(monitor, [0], start=i, conditions=c)[0] for i, c in enumerate(
        ({"speed_rpm": 1400}, {"speed_rpm": 1450, "load": 3} | {"speed_rpm": 1600}, {"speed_rpm": float("nan")})))
    assert (inside.extrapolating, inside.supported) == (False, True)
    assert (outside.extrapolating, outside.supported) == (True, False)
    assert not unknown.extrapolating


def test_a_score_that_is_no_number_is_unknown_and_changes_nothing(monitor):
    scored = Scored(np.array([np.nan, np.inf], np.float32), np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32))
    assert [monitor.update(scored, i, (i + 1) * HOP).state for i in range(2)] == ["unknown", "unknown"]
    assert monitor.running_s == 0 and not listen(monitor, [0.0], start=2)[0].alarm


# state and time


@pytest.mark.parametrize("cut", [1, 137, 203, 250])
def test_a_restored_monitor_goes_on_as_if_it_had_never_stopped(record, contract, cut):
    db = np.r_[np.random.default_rng(7).normal(size=200), np.full(20, 15.0), np.zeros(60), np.full(20, 15.0)]
    expected = listen(Monitor(record, contract), db)
    first, second = Monitor(record, contract), Monitor(record, contract)
    before = listen(first, db[:cut])
    state = json.dumps(first.to_state())
    assert len(state) < 1000
    second.restore(json.loads(state))
    assert before + listen(second, db[cut:], start=cut) == expected
    assert second.episodes == 1


def test_a_state_of_another_calibration_is_refused(record, contract, monitor):
    other = Monitor(record.for_asset("e/s/a/l/fan-2"), contract)
    with pytest.raises(InvalidInput, match="belongs to calibration"):
        other.restore(monitor.to_state())


def test_a_late_window_is_judged_and_changes_nothing(monitor):
    listen(monitor, [0] * 10)
    before = monitor.to_state()
    for start in (3, 9):  # earlier, and at the very time of the last
        late = listen(monitor, [40.0], start=start)[0]
        assert late.p_value < 0.01 and not late.alarm
    assert monitor.to_state() == before


def test_channel_scores_are_told_relative_to_their_healthy_median(monitor):
    assert listen(monitor, [0])[0].channel_scores == (0.5, 0.5)


def test_a_calibration_for_other_channels_is_refused(record, contract):
    with pytest.raises(InvalidBundle, match="has 3 channels, the bundle fan_motor has 2"):
        Monitor(record.model_copy(update={"channel_scale": (1.0, 1.0, 1.0)}), contract)


def test_step_scores_with_its_model_and_advances_by_one_hop(record, contract):
    class Rms:
        def __init__(self):
            self.contract = contract

        def infer(self, windows, conditions=None):
            rms = window_rms(windows).astype(np.float32)
            return Scored(rms.mean(1), rms, rms)

    monitor = Monitor(record, contract, Rms())
    x = np.random.default_rng(8).normal(size=(3, 2, 64))
    assert [v.t_ns for v in map(partial(monitor.step, conditions={"speed_rpm": 1200}), x)] == [HOP, 2 * HOP, 3 * HOP]
    assert monitor.step(np.zeros((2, 64))).state == "stopped"
    with pytest.raises(InvalidInput, match="made without a model"):
        Monitor(record, contract).step(x[0])
