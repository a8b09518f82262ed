"""A challenger is held against the champion: who is no worse passes, and whoever learnt a fault, the wrong channel or nothing does not, whatever it looks like."""

import json
import zlib
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from scipy.stats import norm

from pdm import Detector
from pdm.config import Settings
from pdm.data.inject import inject_fault
from pdm.data.spans import Span
from pdm.data.synth import NICE
from pdm.data.training import gather, load_training
from pdm.errors import InvalidInput, NotEnoughData
from pdm.loop.exam import STRENGTHS, paired_difference, put_in, sit
from pdm.loop.gate import _made_of, gate
from pdm.loop.learned import APART_DB, at_its_best, learned
from pdm.loop.target import parity_of, speed_and_size
from pdm.model.detector import _onnx_run

NAMES = ["contract", "scores", "data", "learned", "frozen", "promise", "calibration", "faults", "target", "parity"]


@pytest.fixture(scope="module")
def fleet():
    return gather("scenario:healthy?windows=300", name="motor", stream="vibration", length=1536)


def fitted(data, **how):
    return Detector.fit(**data.fit_arguments() | how, kind="mahalanobis", name="motor")


@pytest.fixture(scope="module")
def champion(fleet):
    return fitted(fleet)


def heard(data, change, assets=None):
    "The same windows, as another sensor, or a machine in another state, gives them."
    return replace(data, parts={part: {a: replace(w, samples=np.ascontiguousarray(change(np.asarray(w.samples)), np.float32)) if a in (assets or data.assets) else w
                                       for a, w in ws.items()} for part, ws in data.parts.items()})


def worn(x, severity=0.7):
    return inject_fault(x, 25_600.0, "outer_race", severity, NICE, 1480, "benchmark", seed=9).samples


def mixed_up(x):
    return x[:, ::-1]


def noise(x):
    "Of a sensor that hangs loose: no two data sets get the same."
    return 0.01 * np.random.default_rng(zlib.crc32(np.ascontiguousarray(x[0]))).standard_normal(x.shape)


def stopped_by(report):
    assert not report.passed and not report.probation and report.reasons
    assert all(c.what_to_do for c in report.criteria if not c.passed)
    return {c.name for c in report.criteria if not c.passed}


# --- who passes ---


def test_a_challenger_as_good_as_the_champion_passes_every_criterion(fleet, champion):
    report = gate(fitted(fleet, seed=1), champion, fleet, fleet, engine=True, settings=Settings(engine_profile="jetson"))
    assert report.passed, report.reasons
    assert [c.name for c in report.criteria] == NAMES and not any(c.skipped for c in report.criteria)
    assert set(report.judged) == {"challenger", "champion"} and len(report.promises) == 3
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told["passed"] and [c["name"] for c in told["criteria"]] == NAMES and any("faults put into" in r for r in told["reasons"])
    page = report.page("motor <1>")
    assert all(f">{name}</td>" in page for name in NAMES) and "motor &lt;1&gt;" in page and page.count("data:image/png") == 2 and "http" not in page


def test_without_a_champion_or_with_one_of_other_windows_the_challenger_stands_alone(fleet, champion):
    first = gate(champion, None, fleet)
    assert first.passed and {c.name for c in first.criteria if c.skipped} == {"data", "learned", "frozen", "target", "parity"}
    short = fitted(replace(fleet, parts={p: {a: replace(w, samples=np.asarray(w.samples)[:, :, :1024]) for a, w in ws.items()} for p, ws in fleet.parts.items()}))
    other = gate(champion, short, fleet)
    assert other.passed and "1536" in next(c.says for c in other.criteria if c.name == "learned")


def test_few_windows_pass_on_probation_and_many_do_not_need_it(fleet):
    careful = fitted(fleet, false_alarms_per_day=0.3)
    report = gate(careful, None, fleet)
    numbers = next(c.numbers for c in report.criteria if c.name == "promise")
    assert report.passed and report.probation and numbers["low"] <= 0.3 < numbers["high"] and numbers["days"] > 0
    assert not gate(fitted(fleet, false_alarms_per_day=2.0), None, fleet).probation


def test_a_world_that_changed_for_all_is_learnt_when_it_was_found_sound_and_not_before(fleet, champion):
    louder = heard(fleet, lambda x: 1.4 * x)
    challenger = fitted(louder)
    assert stopped_by(gate(challenger, champion, louder)) == {"learned"}
    sound = [Span(a, 0, None, "sound") for a in fleet.assets]
    report = gate(challenger, champion, louder, spans=sound)
    assert report.passed, report.reasons
    loud = sit({"as it was": champion, "at its best": at_its_best(champion, louder)}, louder)
    assert loud.mean("as it was") < 0.1 < loud.mean("at its best")  # who always alarms hears nothing


def test_of_the_frozen_set_only_conditions_that_were_learnt_count(fleet, champion):
    def elsewhere(w):
        return replace(w, conditions=np.where(np.array(fleet.condition_names) == "ambient_c", w.conditions + 60, w.conditions),
                       samples=np.asarray(w.samples) * np.float32(3))

    hot = replace(fleet, parts={**fleet.parts, "test": {a: elsewhere(w) for a, w in fleet.parts["test"].items()}})
    report = gate(fitted(fleet, seed=1), champion, fleet, hot)
    assert report.passed and "has not learnt" in next(c.says for c in report.criteria if c.name == "frozen")


# --- poison ---


def test_a_challenger_trained_on_faulty_windows_is_stopped_by_what_it_no_longer_hears(fleet, champion):
    assert stopped_by(gate(fitted(heard(fleet, worn)), champion, fleet)) >= {"faults", "promise", "calibration"}


def test_a_slight_fault_that_was_learnt_is_found_in_the_calibration_without_a_champion(fleet):
    slight = fitted(heard(fleet, lambda x: worn(x, 0.4)))
    report = gate(slight, None, fleet)
    assert stopped_by(report) == {"promise", "calibration"} and any("sound otherwise" in r and fleet.assets[0] in r for r in report.reasons)
    few = replace(fleet, parts={**fleet.parts, "test": {a: replace(w, samples=w.samples[:5], conditions=w.conditions[:5], t_ns=w.t_ns[:5]) for a, w in fleet.parts["test"].items()}})
    assert next(c for c in gate(slight, None, few).criteria if c.name == "calibration").skipped


def test_faulty_windows_of_the_whole_fleet_are_not_taken_for_healthy(fleet, champion):
    sick = heard(fleet, worn)
    assert stopped_by(gate(fitted(sick), champion, sick, fleet)) == {"learned", "frozen"}


def test_one_asset_of_a_fleet_with_a_fault_stops_the_challenger_of_all(fleet, champion):
    one = fleet.assets[1]
    sick = heard(fleet, worn, {one})
    challenger = fitted(sick)
    report = gate(challenger, champion, sick)
    assert stopped_by(report) == {"learned"} and one in report.reasons[0]
    assert stopped_by(gate(challenger, champion, fleet)) >= {"data", "faults"}  # its windows were held back, and it had learnt them before


def cut(w, which):
    return replace(w, samples=np.asarray(w.samples)[which], conditions=w.conditions[which], t_ns=w.t_ns[which])


def test_a_model_of_other_windows_than_those_that_are_shown_is_stopped_however_well_it_hears(fleet, champion, tmp_path):
    train, one = fleet.parts["train"], fleet.assets[1]
    other = replace(fleet, parts={**fleet.parts, "train": {**train, one: replace(train[one], samples=np.asarray(train[one].samples) * np.float32(1.001))}})  # nobody hears that
    challenger = fitted(other)
    report = gate(challenger, champion, fleet)
    assert stopped_by(report) == {"data"} and "not among those that are shown" in report.reasons[0]

    challenger.save(tmp_path / "detector")
    other.save(tmp_path / "data")
    assert _made_of(Detector.load(tmp_path / "detector"), champion, load_training(tmp_path / "data")).passed, "what was saved is the same windows"
    few = replace(fleet, parts={"train": {a: w for a, w in train.items() if a != one}})
    assert _made_of(fitted(few), champion, fleet).passed, "who has learnt less than is shown hides nothing"
    apart = replace(fleet, parts={part: {a: cut(w, which) for a, w in train.items()} for part, which in (("train", slice(-100)), ("calibrate", slice(-100, None)))})
    assert _made_of(fitted(apart), champion, apart).passed, "what it was calibrated on may be a part of its own"

    again = champion.recalibrate(np.asarray(other.parts["train"][one].samples), dict(zip(fleet.condition_names, train[one].conditions.T, strict=True)), one)
    told = _made_of(again, champion, other)
    assert told.skipped and "calibrated anew" in told.says
    bare = Detector(challenger.contract, challenger.calibration, challenger._run, b"", None, challenger.calibrations.values())
    told = _made_of(bare, champion, other)
    assert not told.passed and "no windows" in told.says, "who shows nothing is not believed"


def test_an_asset_that_moves_much_further_than_its_fleet_is_asked_about_even_in_new_conditions(fleet, champion):
    def hotter(data):
        return replace(data, parts={p: {a: replace(w, conditions=w.conditions + 60) for a, w in ws.items()} for p, ws in data.parts.items()})

    moved = heard(fleet, lambda x: 1.15 * x)
    assert learned(champion, hotter(moved)).passed
    one = fleet.assets[2]
    near = champion._with(champion.calibration, [r.model_copy(update={"threshold_db": r.threshold_db - 12 * (r.asset == one)}) for r in champion.calibrations.values()])
    assert learned(near, hotter(moved)).passed, "its threshold is near, and it has moved as far as the others"
    answer = learned(champion, hotter(heard(moved, lambda x: worn(x, 2.0), {one})))
    assert not answer.passed and one in answer.says and answer.numbers["most_apart_db"] > APART_DB
    assert learned(champion, hotter(heard(moved, lambda x: worn(x, 2.0), {one})), [Span(one, 0, None, "sound")]).passed


@pytest.mark.parametrize("wrong", [mixed_up, noise], ids=["mixed up", "another sensor"])
def test_a_challenger_trained_on_the_wrong_channel_is_stopped_whether_the_recent_windows_are_right_or_wrong(fleet, champion, wrong):
    other = heard(fleet, wrong)
    challenger = fitted(other)
    assert stopped_by(gate(challenger, champion, fleet)) >= {"promise", "faults"}
    assert stopped_by(gate(challenger, champion, other)) == {"learned"}


def test_a_challenger_of_other_channels_is_not_even_asked(fleet, champion):
    other = fitted(replace(fleet, channels=("v", "h")))
    report = gate(other, champion, fleet)
    assert stopped_by(report) == {"contract"} and "v, h" in report.reasons[0]


def with_run(detector, run):
    return Detector(detector.contract, detector.calibration, run, detector.onnx, None, detector.calibrations.values(), detector.examples)


def test_weights_that_are_not_numbers_are_stopped(fleet, champion):
    graph = onnx.load_from_string(champion.onnx)
    weights = max((t for t in graph.graph.initializer if t.data_type == onnx.TensorProto.FLOAT), key=lambda t: np.prod(t.dims))
    weights.CopyFrom(numpy_helper.from_array(np.full(tuple(weights.dims), np.nan, np.float32), weights.name))
    assert stopped_by(gate(with_run(champion, _onnx_run(graph.SerializeToString())), champion, fleet)) == {"scores"}


def test_a_model_that_says_the_same_of_every_window_is_stopped(fleet, champion):
    def same(feed):
        return [np.full_like(o, 0.01) for o in champion._run(feed)]

    assert stopped_by(gate(with_run(champion, same), champion, fleet)) == {"scores"}
    assert stopped_by(gate(with_run(champion, same), None, fleet)) == {"scores"}


def test_a_model_that_never_alarms_is_stopped_with_and_without_a_champion(fleet, champion):
    def deaf(feed):
        score, *rest = champion._run(feed)
        return [0.02 * score, *rest]

    assert stopped_by(gate(with_run(champion, deaf), champion, fleet, fleet)) == {"frozen", "calibration", "faults"}
    assert stopped_by(gate(with_run(champion, deaf), None, fleet)) == {"calibration", "faults"}


def test_a_model_that_always_alarms_is_stopped_with_and_without_a_champion(fleet, champion):
    records = [r.model_copy(update={"threshold_db": -60.0}) for r in champion.calibrations.values()]
    wolf = Detector(champion.contract, records[-1], champion._run, champion.onnx, None, records, champion.examples)
    assert stopped_by(gate(wolf, champion, fleet)) == {"promise", "faults"}
    assert stopped_by(gate(wolf, None, fleet)) == {"promise", "faults"}


# --- the exam ---


def test_windows_that_do_not_vibrate_get_changes(champion):
    slow = gather("scenario:healthy?windows=300&copies=1", name="oven", stream="process")
    w = next(iter(slow.parts["test"].values()))
    made, passed = put_in(slow, w)
    assert set(made) == {"level", "variance", "correlation"} and passed == {}
    exam = sit({"challenger": fitted(slow)}, slow)
    shares = exam.shares("challenger")["level"]
    assert exam.mean("challenger") > 0.2 and shares[-1] > 0.8 > shares[0]


def test_a_fault_that_a_window_is_too_short_for_is_passed_over_with_the_reason(fleet):
    short = replace(fleet, parts={"train": {a: replace(w, samples=np.asarray(w.samples)[:, :, :512]) for a, w in fleet.parts["test"].items()}})
    made, passed = put_in(short, next(iter(short.parts["train"].values())))
    assert set(passed) >= {"cage", "imbalance"} and "1 at least is wanted" in passed["imbalance"] and "outer_race" not in made


def test_both_are_asked_about_the_same_windows(fleet, champion):
    exam = sit({"challenger": champion, "champion": champion}, fleet, seed=3)
    assert np.array_equal(exam.heard["challenger"], exam.heard["champion"], equal_nan=True)
    assert exam.heard["champion"].shape[2] == len(STRENGTHS) and set(exam.assets) == set(fleet.assets)


def cautious(detector, by_db):
    "The same model, whose thresholds lie higher than need be."
    records = [r.model_copy(update={"threshold_db": r.threshold_db + by_db}) for r in detector.calibrations.values()]
    return Detector(detector.contract, records[-1], detector._run, detector.onnx, None, records, detector.examples)


def test_a_higher_threshold_makes_no_worse_model_and_a_deaf_one_is_refused_all_the_same(fleet, champion):
    exam = sit({"challenger": cautious(champion, 2.0), "champion": champion}, fleet)
    assert exam.mean("challenger") < exam.mean("champion") and np.array_equal(exam.alike["challenger"], exam.alike["champion"], equal_nan=True)
    assert gate(cautious(champion, 2.0), champion, fleet).passed
    assert stopped_by(gate(cautious(champion, 12.0), champion, fleet)) == {"faults"}


def test_the_interval_of_a_paired_difference_holds_the_truth_as_often_as_it_says():
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        host = rng.normal(0, 1, (40, 1))  # windows differ, and so the answers of one depend on each other
        strength = np.linspace(-2, 2, 10)
        ours, theirs = ((host + strength + rng.normal(0, 1, (40, 10)) > shift).astype(float) for shift in (0.3, 0.0))
        truth = float((norm.cdf((strength - 0.3) / 2**0.5) - norm.cdf(strength / 2**0.5)).mean())
        _, low, high = paired_difference(ours, theirs)
        held += low <= truth <= high
    assert held >= 185


def test_a_paired_difference_is_turned_round_when_the_sides_change_and_leaves_out_what_was_not_asked():
    rng = np.random.default_rng(1)
    ours, theirs = (rng.random((30, 6)) < 0.7).astype(float), (rng.random((30, 6)) < 0.5).astype(float)
    there, back = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert np.allclose(there, (-back[0], -back[2], -back[1]))
    wider = np.hstack([ours, np.full((30, 2), np.nan)]), np.hstack([theirs, np.ones((30, 2))])
    assert np.allclose(paired_difference(*wider), there)
    same = paired_difference(ours, ours)
    assert same[0] == 0 and same[1] > -0.05 and same[2] < 0.05


# --- the bundle, and what can't be asked ---


def test_a_bundle_too_large_or_of_another_model_is_stopped(fleet, champion, tmp_path):
    bundle, _ = champion.export(tmp_path)
    assert speed_and_size(bundle, bundle, Settings(), 600.0).numbers["mb"] > 0
    large = speed_and_size(bundle, None, Settings(bundle_max_mb=1e-3), 600.0)
    assert not large.passed and "bundle_max_mb" in large.what_to_do
    other, _ = fitted(heard(fleet, mixed_up)).export(tmp_path / "other")
    assert parity_of(champion, bundle, Settings(), tmp_path).passed and not parity_of(champion, other, Settings(), tmp_path).passed
    jetson = speed_and_size(other, bundle, Settings(engine_profile="jetson"), 600.0)
    assert jetson.passed and "on the device" in jetson.says and "ms" not in jetson.numbers


def test_what_cannot_be_asked_is_the_users_error(fleet, champion):
    with pytest.raises(NotEnoughData, match="has no part 'test'"):
        gate(champion, None, replace(fleet, parts={"train": fleet.parts["train"]}))
    with pytest.raises(InvalidInput, match="the frozen set is not of these machines"):
        gate(champion, None, fleet, replace(fleet, channels=("x", "y")))
