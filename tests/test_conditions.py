"""Causes normalise the score, a temperature is judged by them, machines at rest don't count, and a type is more than one machine."""

from functools import cache

import numpy as np
import pytest

import pdm
from pdm.data import scenario
from pdm.errors import InvalidConfig, InvalidInput, NotEnoughData
from pdm.model.bundle import Scored, read_record
from pdm.model.inputs import only_grows

CAUSES = ("speed_rpm", "load", "ambient_c", "running_s")
AXES = ["h", "v"]
PLANT = """
about: One machine for the tests of conditions.
duration: 10 d
every: 10 min
process: null
types:
  machine: {rpm: 1480, seed: 23, wander: 0.02, machine: {gear_teeth: 0, noise_g: 0.15, strike_g: 2.0, knocks_per_s: 0}, drive: DRIVE}
assets:
  - {name: m, type: machine, duty: DUTY, wear: WEAR}
"""


@cache
def windows_of(duty, wear="[]", drive="{}", rise_c=40.0, days=10.0, warm_up=False):
    "Vibration with the bearing's temperature as a third channel [n, 3, 2560], causes [n, 4], and the truth of each window."
    plant = scenario.load("warm_up") if warm_up else scenario.parse(PLANT.replace("DUTY", duty).replace("WEAR", wear).replace("DRIVE", drive))
    kinds = {name: kind.model_copy(update={"wander": 0.02, "thermal": kind.thermal.model_copy(update={"rise_c": rise_c})})
             for name, kind in plant.types.items()}
    plant = plant.model_copy(update={"process": None, "duration": days * 86_400, "types": kinds})
    looks, noise = list(plant.stream([duty] if warm_up else None)), np.random.default_rng(0)
    x = np.stack([np.concatenate([k.window.samples, np.full((1, 2560), k.truth.temperature_c)]) for k in looks])
    x[:, 2] += 0.2 * noise.normal(size=(len(x), 1)) + 0.1 * noise.normal(size=x[:, 2].shape)
    return x.astype(np.float32), np.array([[k.window.conditions[c] for c in CAUSES] for k in looks]), [k.truth for k in looks]


def named(causes):
    return dict(zip(CAUSES, causes.T, strict=True))


def fit(x, causes, **more):
    settings = dict(rate_hz=25_600, channels=["h", "v", "bearing_c"][: x.shape[1]], hop_s=600.0, kind="mahalanobis")
    return pdm.Detector.fit(x, conditions=None if causes is None else named(causes), **{**settings, **more})


def watched(det, x, causes, asset=None):
    "The verdicts on windows that follow each other."
    monitor = det.monitor(asset)
    return [monitor.step(w, conditions=None if c is None else dict(zip(CAUSES, c.tolist(), strict=True)))
            for w, c in zip(x, causes if causes is not None else [None] * len(x), strict=True)], monitor


def running(truth):
    return np.array([t.state == "running" for t in truth])


# causes


@pytest.fixture(scope="module")
def press():
    "A press in two shifts, three weeks: each morning is cold and loud for an hour."
    x, causes, truth = windows_of("press_1", days=19.0, rise_c=45.0, warm_up=True)
    return x, causes, running(truth), np.array([(t.t0_ns - truth[0].t0_ns) / 86_400e9 for t in truth])


@pytest.mark.parametrize("channels", [2, 3])
def test_a_warm_up_is_an_alarm_only_where_the_time_since_start_is_not_told(press, channels):
    x, causes, runs, day = press
    x = x[:, :channels]
    train, steady, later = runs & (day < 10), runs & (day >= 10) & (day < 12) & (causes[:, 3] > 3 * 3600), day >= 14
    mornings = (runs & (causes[:, 3] < 3600))[later]
    outcome = {}
    for told in (True, False):
        det = fit(x[train], causes[train] if told else None, calibration=x[steady],
                  calibration_conditions=named(causes[steady]) if told else None)
        verdicts, monitor = watched(det, x[later], causes[later] if told else None)
        assert det.calibration.supported
        outcome[told] = monitor.episodes, np.mean([v.score > v.threshold for v, m in zip(verdicts, mornings, strict=True) if m])
    assert outcome[True][0] == 0 and outcome[True][1] < 0.2
    assert outcome[False][0] >= 2 and outcome[False][1] > 0.5


VARIABLE = {"duty": "{kind: variable, low: 0.4, hold: 40 min, ramp: 40 s, fan: FAN}", "drive": "{variable: true, bars: 44, slot_g: 0.02}"}


def variable(fan, **more):
    return windows_of(VARIABLE["duty"].replace("FAN", fan), drive=VARIABLE["drive"], **more)


def test_a_load_step_is_an_alarm_only_where_speed_and_load_are_not_told():
    x, causes, truth = variable("true", days=14.0)  # the load goes with the square of the speed
    x, k, load, runs = x[:, :2], np.arange(len(x)), causes[:, 1], running(truth)
    learnt, low, step = runs & (k < 1000), runs & (k >= 1000) & (k < 1500) & (load < 0.5), runs & (k >= 1500) & (load > 0.6)
    outcome = {}
    for told in (True, False):
        det = fit(x[learnt], causes[learnt] if told else None, calibration=x[low], calibration_conditions=named(causes[low]) if told else None)
        verdicts, monitor = watched(det, x[step], causes[step] if told else None)
        outcome[told] = monitor.episodes, np.mean([v.score > v.threshold for v in verdicts])
    assert outcome[True][0] == 0 and outcome[True][1] < 0.1
    assert outcome[False][0] >= 1 and outcome[False][1] > 0.8


def test_a_bearing_fault_at_low_speed_is_missed_where_the_speed_is_not_told():
    x, causes, truth = variable("false", days=7.0)
    pitted, their_causes, their_truth = variable("false", wear="[{fault: outer_race, onset: 0 s, lasts: 0 s, peak: 0.3, kind: abrupt}]", days=9.0)
    healthy = running(truth)
    low = running(their_truth) & (their_causes[:, 0] < 800) & (np.arange(len(pitted)) > len(x))
    found = {}
    for told in (True, False):
        det = fit(x[healthy, :2], causes[healthy] if told else None)
        threshold = 10 ** (det.calibration.threshold_db / 20)
        found[told] = float((det.score(pitted[low, :2], named(their_causes[low]) if told else None) > threshold).mean())
        assert (det.score(x[healthy, :2], named(causes[healthy]) if told else None) > threshold).mean() < 0.05
    assert low.sum() > 20 and found[True] > 0.9 and found[False] < 0.2


def test_time_since_start_of_a_machine_that_never_stopped_is_left_out():
    x, causes, _ = windows_of("{kind: constant, swing: 0.7}", days=14.0)
    det = fit(x[:300, :2], causes[:300])
    assert det.report["conditions_left_out"] == ["running_s"] and [c.name for c in det.contract.conditions] == list(CAUSES[:3])
    np.testing.assert_array_equal(det.score(x[:5, :2], named(causes[:5])), det.score(x[:5, :2], {**named(causes[:5]), "running_s": 1e9}))
    assert not only_grows([np.array([1.0, 2, 3]), np.array([1.0, 3, 2])]) and not only_grows([np.full(5, 3.0)])


# the machine's temperature


@pytest.fixture(scope="module")
def hot():
    "The press again with a bearing that rubs: warmer than its causes say, and never warmer than it has been in an afternoon."
    x, causes, truth = windows_of("press_1", days=12.0, rise_c=45.0, warm_up=True)
    hot, their_causes, their_truth = windows_of("press_1", days=19.0, rise_c=54.0, warm_up=True)
    learnt = running(truth)
    seen = np.quantile(x[learnt, 2].mean(1), 0.99)
    since = np.array([(t.t0_ns - truth[0].t0_ns) / 86_400e9 for t in their_truth]) >= 14
    rubbing = running(their_truth) & since & (hot[:, 2].mean(1) < seen) & (their_causes[:, 3] > 3600)
    return x[learnt], causes[learnt], hot[rubbing], their_causes[rubbing]


@pytest.mark.parametrize("frames", [False, True])
def test_a_slow_channel_is_held_against_what_the_causes_predict(hot, frames):
    import torch

    from pdm.model.front import Residual, front_for

    x, causes, rubbing, theirs = hot
    front = front_for(frames, 3, 2560)
    front.fit(x)
    with torch.no_grad():
        z, bad = (torch.cat([front(p) for p in torch.from_numpy(w).split(64)]) for w in (x, rubbing))
        residual = Residual(z.shape[1], 4)
        residual.fit(z.numpy(), causes)
        told, untold = (residual(bad, torch.from_numpy(theirs).float(), torch.full((len(bad), 4), known))[0] for known in (1.0, 0.0))
    level = 2 * front.per_channel + (0 if frames else 3)
    told, untold = (r[:, level].flatten(1).mean(1).numpy() if frames else r[:, level].numpy() for r in (told, untold))
    assert front.slow[:, 0].tolist() == [0, 0, 1]
    assert np.median(told) > 5 and np.abs(untold).max() < 3


def test_overheating_is_found_though_it_was_as_hot_before(hot):
    x, causes, rubbing, theirs = hot
    outcome = {}
    for told in (True, False):
        det = fit(x, causes if told else None)
        verdicts, monitor = watched(det, rubbing, theirs if told else None)
        outcome[told] = monitor.episodes, np.median([v.channel_scores for v in verdicts], 0)
    assert outcome[True][0] >= 1 and outcome[False][0] == 0
    assert outcome[True][1].argmax() == 2 and outcome[True][1][2] > 1.5


def test_a_constant_third_channel_is_heard_on_the_day_it_moves():
    x, causes, _ = windows_of("{kind: constant, swing: 0.7}", days=14.0)
    still, moved = x[:200].copy(), x[200:240].copy()
    still[:, 2], moved[:, 2] = 21.5, 30.0
    det = fit(still, causes[:200])
    scored = det.infer(moved, np.asarray(causes[200:240, :3], np.float32))
    assert np.median(scored.channel_score[:, 2]) > 3 * np.median(scored.channel_score[:, :2])
    still_scores = det.score(still[-40:], named(causes[160:200]))
    assert np.isfinite(still_scores).all() and np.median(still_scores) < np.median(scored.score)


# stopped and starting


def test_windows_of_a_stopped_or_starting_machine_neither_train_nor_alarm(press):
    x, causes, runs, day = press
    week = day < 5
    for c in (causes, None):
        det = fit(x[week], None if c is None else c[week])
        report = det.report
        assert report["windows_standing_still"] + report["windows_starting"] + report["windows_trained_on"] + report["windows"] == week.sum()
        assert report["windows_trained_on"] + report["windows"] <= runs[week].sum() and report["windows_starting"] == 5
        later = (day >= 7) & (day < 9)
        verdicts, monitor = watched(det, x[later], None if c is None else c[later])
        told = np.array([v.state for v in verdicts])
        assert (told[~runs[later]] != "running").all() and set(told) == {"running", "stopped", "transient"}
        assert abs(monitor.running_s / 600 - (told == "running").sum()) <= 4
    rest = np.flatnonzero(~runs & (day > 15))[:80]
    loud = x[rest] * np.array([3.0, 3.0, 1.0], np.float32)[:, None]  # the neighbour is loud while the machine stands
    verdicts, monitor = watched(fit(x[week], causes[week]), loud, causes[rest])
    assert {v.state for v in verdicts} == {"stopped"} and monitor.episodes == 0 and monitor.running_s == 0


def test_slow_process_windows_of_the_stopped_machine_are_told_by_the_speed():
    plant = scenario.load("warm_up").model_copy(update={"vibration": None, "duration": 6 * 86_400})
    looks = list(plant.stream(["press_1"]))
    x = np.stack([k.window.samples for k in looks])
    causes = np.array([[k.window.conditions[c] for c in CAUSES] for k in looks])
    runs = running([k.truth for k in looks])
    det = fit(x, causes, rate_hz=1.0, channels=list(looks[0].window.channels))
    report = det.report
    assert x.shape[1:] == (8, 10) and runs.sum() - 2 * 5 <= report["windows_trained_on"] + report["windows"] <= runs.sum()
    states = np.array([v.state for v in watched(det, x[:288], causes[:288])[0]])
    assert not (runs[:288] & (states == "stopped")).any() and not (~runs[:288] & (states == "running")).any()


# a few windows, several machines


def test_a_hundred_windows_with_four_conditions_are_enough(press):
    x, causes, runs, day = press
    few, later = np.flatnonzero(runs)[:100], np.flatnonzero(runs & (day > 2))[:200]
    det = fit(x[few], causes[few])
    scores = det.score(x[later], named(causes[later]))
    assert np.isfinite(scores).all()
    assert np.median(scores) < 2 * np.median(det.score(x[few[60:]], named(causes[few[60:]])))


FANS = [f"acme/lyon/hall/line/fan-{k}" for k in range(4)]


@pytest.fixture(scope="module")
def fans():
    x, causes, _ = windows_of("{kind: constant, swing: 0.7}", days=14.0)
    return ({fan: x[k * 400 : (k + 1) * 400, :2] * np.float32(1 + 0.08 * k) for k, fan in enumerate(FANS)},
            {fan: named(causes[k * 400 : (k + 1) * 400]) for k, fan in enumerate(FANS)})


@pytest.fixture(scope="module")
def pool(fans):
    windows, causes = fans
    return pdm.Detector.fit({f: windows[f] for f in FANS[:3]}, 25_600, AXES, 600.0, {f: causes[f] for f in FANS[:3]}, kind="mahalanobis", name="fan")


def test_a_pooled_fit_calibrates_each_asset_and_promises_nothing_of_another(pool, fans):
    windows, causes = fans
    assert set(pool.calibrations) == {None, *FANS[:3]} and pool.calibration.asset is None and not pool.calibration.supported
    assert pool.report["windows_given"] == 1200 and set(pool.report["assets"]) == set(FANS[:3])
    for fan in FANS[:3]:
        own = pool.monitor(fan).record
        assert own.asset == fan and own.supported and own is pool.calibrations[fan]
    lent = pool.monitor(FANS[3])
    assert lent.record.asset == FANS[3] and not lent.record.supported and FANS[3] in lent.record.reasons[0]
    assert lent.record.threshold_db == max(0.0, *(pool.calibrations[f].threshold_db for f in FANS[:3]))
    verdicts = [lent.step(w) for w in windows[FANS[3]][:50]]
    assert not any(v.supported for v in verdicts)


def test_a_new_asset_calibrates_itself_on_its_windows_or_on_their_scores(pool, fans):
    windows, causes = fans
    new = FANS[3]
    first = pool.recalibrate(windows[new][:12], {c: v[:12] for c, v in causes[new].items()}, asset=new)
    assert set(first.calibrations) == {None, *FANS} and first.calibration.asset == new and not first.calibration.supported
    grown = first.recalibrate(windows[new], causes[new], asset=new)
    assert grown.calibration.supported and grown.monitor(new).record.supported and grown.calibrations[FANS[0]] is pool.calibrations[FANS[0]]
    matrix = np.stack([causes[new][c.name] for c in grown.contract.conditions], 1)
    scored = [pool.infer(windows[new][i : i + 50], matrix[i : i + 50]) for i in range(0, 400, 50)]
    kept = Scored(np.concatenate([s.score for s in scored]), np.concatenate([s.channel_score for s in scored]), np.concatenate([s.embedding for s in scored]))
    by_scores = pool.recalibrate(kept, causes[new], asset=new).calibration
    assert by_scores.supported and abs(by_scores.threshold_db - grown.calibration.threshold_db) < 0.01
    assert by_scores.conditions == grown.calibration.conditions
    with pytest.raises(NotEnoughData):
        pool.recalibrate(windows[new][:5] * 0, None, asset=new)


def test_all_calibrations_of_a_pool_are_saved_and_loaded(pool, tmp_path):
    pool.save(tmp_path)
    again = pdm.Detector.load(tmp_path)
    assert again.calibrations == pool.calibrations and again.calibration == pool.calibration and again.report == pool.report
    one = pdm.Detector.load(tmp_path, asset=FANS[1])
    assert one.calibration == pool.calibrations[FANS[1]] and one.monitor(FANS[3]).record.supported is False
    assert len({read_record(f).model for f in tmp_path.glob("*calibration.json")}) == 1


def test_a_calibration_lent_to_another_asset_is_not_supported(press):
    x, causes, runs, day = press
    known = runs & (day < 12)
    det = fit(x[known, :2], causes[known], asset=FANS[0], false_alarms_per_day=2.0)
    assert det.monitor().record.supported and det.monitor(FANS[0]).record.supported
    assert not det.monitor(FANS[1]).record.supported and "lent" in det.monitor(FANS[1]).record.reasons[0]


@pytest.mark.parametrize("change,error,words", [
    (dict(asset="a/b/c/d/e"), InvalidConfig, "`asset` is left out"),
    (dict(windows={}), InvalidConfig, "0 assets"),
    (dict(conditions={"load": np.zeros(400)}), InvalidInput, "from asset path to their conditions"),
    (dict(hop_s={FANS[0]: 10.0}), InvalidConfig, "hop_s is a positive number"),
    (dict(calibration={"a/b/c/d/e": np.zeros((20, 2, 2560), np.float32)}), InvalidInput, "a/b/c/d/e"),
])
def test_a_pooled_fit_says_what_was_wrong(fans, change, error, words):
    settings = dict(windows={f: fans[0][f] for f in FANS[:2]}, rate_hz=25_600, channels=AXES, hop_s=600.0, kind="mahalanobis")
    with pytest.raises(error) as e:
        pdm.Detector.fit(**{**settings, **change})
    assert words in str(e.value)
