"What people did to a machine explains what it does since, and nothing that it did before."

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from pdm.loop.attribute import Looked, attribute, before_work, look, shaft_levels
from pdm.loop.drift import Reference, evaluate_drift
from pdm.loop.observed import Observed
from pdm.stream.records import Event

HOUR = 3600 * 10**9
DAY = 24 * HOUR
FLEET = [f"acme/munich/hall-2/line-1/pump-{k}" for k in range(1, 5)]
WORK_NS = 14 * DAY


def scored(asset: str, db_of, events: tuple = (), raised_ns: int | None = None) -> Observed:
    "Windows every ten minutes, 16 days of them, so many dB above the usual."
    t_ns = np.arange(HOUR // 6, 16 * DAY, HOUR // 6, dtype=np.int64)
    n, no = len(t_ns), np.zeros(len(t_ns), bool)
    db = np.random.default_rng(FLEET.index(asset)).normal(0, 1, n) + np.vectorize(db_of)(t_ns)
    alarm = no if raised_ns is None else t_ns >= raised_ns
    told = () if raised_ns is None else (Event(asset, "vibration", f"{asset}@{raised_ns}", "raised", raised_ns, 0, 1, {}),)
    return Observed(asset, "vibration", "d" * 64, 600.0, t_ns, 10 ** (db / 20), np.full(n, 2.0), np.where(alarm, 1e-4, 0.5), alarm, np.full(n, "running"), no, no, no,
                    (db[:, None] + np.random.default_rng(9).normal(0, 1, (n, 2))).astype(np.float32), {}, {}, tuple(sorted((*events, *told), key=lambda e: e.t_ns)))  # fmt: skip


def judged(one: Observed, now_ns: int):
    every = [one, *(scored(a, lambda t: 0.0) for a in FLEET[1:])]
    references = {o.asset: Reference.of(o.between(None, 8 * DAY)) for o in every}
    seen = [replace(o.between(8 * DAY, now_ns)) for o in every]
    promises = {o.asset: SimpleNamespace(refuted=bool(o.alarm[o.t_ns >= now_ns - DAY].any())) for o in seen}
    return attribute(evaluate_drift(seen, references, now_ns), seen, references, promises)[one.asset]


def work(what: str) -> tuple[Event, ...]:
    return (Event(FLEET[0], "", "", "maintenance", WORK_NS, 0, -1, {"what": what, "by": "igor"}),)


@pytest.mark.parametrize("hours", [4, 12, 30])
def test_a_machine_that_sounds_otherwise_since_it_was_remounted_is_calibrated_anew_from_then_on(hours):
    one = scored(FLEET[0], lambda t: 12.0 if t > WORK_NS else 0.0, work("remounted"), WORK_NS + 2 * HOUR)
    told = judged(one, WORK_NS + hours * HOUR)
    assert (told.cause, told.action, told.since_ns) == ("drift", "recalibrate", WORK_NS), told.sentence


def test_what_it_was_before_a_repair_is_no_part_of_what_it_is_calibrated_on():
    one = scored(FLEET[0], lambda t: 20.0 if WORK_NS - 6 * HOUR <= t <= WORK_NS else 8.0 if t > WORK_NS else 0.0, work("bearing replaced"), WORK_NS - 5 * HOUR)
    told = judged(one, WORK_NS + 24 * HOUR)
    assert (told.action, told.since_ns) == ("recalibrate", WORK_NS), told.sentence


def test_work_that_left_a_machine_as_it_was_explains_nothing():
    one = scored(FLEET[0], lambda t: 12.0 if t > WORK_NS - 8 * HOUR else 0.0, work("greased"), WORK_NS - 7 * HOUR)
    told = judged(one, WORK_NS + 24 * HOUR)
    assert told.action != "recalibrate" and told.cause != "drift", told.sentence
    assert "was as far from its normal before" in " ".join(e.says for e in told.evidence)


def loaded(asset: str, up: float, embedding_up: float = 0.0) -> Observed:
    "A machine whose RMS follows its load, which is higher from the ninth day on; what is left once the load is accounted for may have changed, too."
    o, rng = scored(asset, lambda t: 0.0), np.random.default_rng(100 + FLEET.index(asset))
    late = o.t_ns > 9 * DAY
    load = rng.normal(0, 1, len(o)) + up * late
    return replace(o, indicators={"rms_h": load + 0.2 * rng.normal(0, 1, len(o))}, conditions={"load": load}, embedding=(rng.normal(0, 1, (len(o), 2)) + embedding_up * late[:, None]).astype(np.float32))


def judged_loads(now_ns: int, *machines: tuple[float, float]):
    every = [loaded(a, *m) for a, m in zip(FLEET, machines, strict=False)]
    references, seen = {o.asset: Reference.of(o.between(None, 8 * DAY)) for o in every}, [o.between(8 * DAY, now_ns) for o in every]
    found = evaluate_drift(seen, references, now_ns)
    return found.drifts[FLEET[0]], attribute(found, seen, references, {})[FLEET[0]]


@pytest.mark.parametrize("beside", [0, 3])
def test_loudness_that_follows_the_load_is_no_change_that_nothing_explains(beside):
    drift, told = judged_loads(11 * DAY, (1.0, 0.0), *[(0.0, 0.0)] * beside)
    assert {s.quantity for s in drift.shifts if s.fired} == {"indicator", "condition"} and 0.35 < drift.conditions_moved < 0.6
    assert (told.cause, told.action) == ("drift", "none"), told.sentence
    assert "load moved" in told.sentence and "as they were" not in str(told.evidence)


def test_a_change_that_the_load_does_not_account_for_is_asked_about_and_the_load_is_told():
    drift, told = judged_loads(11 * DAY, (1.0, 2.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    assert "embedding" in {s.quantity for s in drift.shifts if s.fired} and 0.35 < drift.conditions_moved < 0.6
    assert told.cause == "unknown" and "load moved" in str(told.evidence) and "as they were" not in str(told.evidence)
    quiet, same = judged_loads(11 * DAY, (0.0, 2.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    assert quiet.conditions_moved == 0 and "as they were" in str(same.evidence)


def test_whoever_is_asked_is_promised_no_raw_windows_that_nobody_keeps():
    told = judged_loads(11 * DAY, (0.0, 2.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))[1]
    assert told.cause == "unknown" and "stays what the archive's settings keep" in told.sentence and "are kept" not in told.sentence


# --- the shaft ---


def turning(rpm: np.ndarray, heights: dict[float, float], seconds: float = 0.1, noise: float = 0.05) -> np.ndarray:
    "Windows of one accelerometer on a shaft that shakes at these orders, g peak."
    rng, t = np.random.default_rng(3), np.arange(round(25_600 * seconds)) / 25_600
    x = noise * rng.standard_normal((len(rpm), 1, len(t)))
    return x + sum(g * np.cos(2 * np.pi * (k * rpm[:, None, None] / 60 * t + rng.uniform(size=(len(rpm), 1, 1)))) for k, g in heights.items())


@pytest.mark.parametrize("seconds, off", [(0.1, 1.0), (1.0, 1.0), (1.0, 1.005)], ids=["two turns", "many", "the speed is off by half a percent"])
def test_the_orders_of_a_shaft_are_told_apart_in_windows_that_have_no_bins_for_them(seconds, off):
    rpm = np.linspace(1450, 1500, 24)
    levels = shaft_levels(turning(rpm, {1: 0.2, 2: 0.02, 3: 0.1}, seconds), 25_600, off * rpm)
    assert levels[0] == pytest.approx(20 * np.log10([0.2 / 2**0.5, 0.02 / 2**0.5, 0.1 / 2**0.5, 0.05]), abs=1.0)


def test_without_a_speed_or_two_turns_nothing_is_said_of_the_shaft():
    rpm = np.full(24, 1480.0)
    x = turning(rpm, {1: 0.2})
    assert shaft_levels(x, 25_600, None) is None and shaft_levels(x, 25_600, np.full(24, np.nan)) is None and shaft_levels(x, 25_600, np.full(24, 900.0)) is None
    whole, x[:8, :, 5] = shaft_levels(x[8:], 25_600, rpm[8:]), np.nan
    assert np.array_equal(shaft_levels(x, 25_600, rpm), whole) and np.array_equal(shaft_levels(x, 25_600, np.where(np.arange(24) < 8, np.nan, rpm)), whole)


def test_a_shaft_that_shook_before_people_came_is_no_news_and_one_that_shakes_since_they_left_is():
    rpm = np.full(24, 1480.0)
    sound, bent, louder = turning(rpm, {1: 0.2, 2: 0.02}), turning(rpm, {1: 0.2, 2: 0.2}), 2 * turning(rpm, {1: 0.2, 2: 0.2})

    def grown(left, rpm_left=rpm):
        return look(louder, ["h"], ["g"], 25_600, sound, None, rpm, rpm, left, rpm_left)

    then = grown(bent)
    assert then.work_db[0] == pytest.approx([6, 6, 6, 6], abs=0.5) and then.shaft_db[0] == pytest.approx([6, 26, 6, 6], abs=1.5)
    assert grown(sound).work_db == grown(sound).shaft_db == then.shaft_db
    assert grown(bent, None).work_db == grown(bent[:5], rpm[:5]).work_db == grown(None, None).work_db == (), "nothing is known of then"


@pytest.mark.parametrize("days, span", [((9.0,), (8.0, 9.0)), ((9.0, 9.4, 9.8), (8.0, 9.0)), ((6.0, 9.0), (8.0, 9.0)), (("began", 9.0, "ended", 11.0, 11.3), (8.0, 9.0)), ((6.0,), None), ((12.5,), None), ((), None)],
                         ids=["once", "it took them a day", "the last counts", "from the beginning to the end", "before the reference", "it is still to come", "never"])
def test_before_work_is_the_day_before_people_last_worked_on_it(days, span):
    kinds = [f"maintenance_{days[i - 1]}" if i and isinstance(days[i - 1], str) else "maintenance" for i in range(len(days))]
    o = scored(FLEET[0], lambda t: 0.0, tuple(Event(FLEET[0], "", "", kind, round(d * DAY), 0, -1, {}) for kind, d in zip(kinds, days, strict=True) if not isinstance(d, str)))
    assert before_work(o, 7 * DAY, 12 * DAY, DAY) == (span and tuple(round(d * DAY) for d in span))


LOUDER, BENT = (5.0, 5.0, 5.0, 5.0), (7.0, 14.0, 6.0, 5.0)  # once, twice, three times a turn, and all else


@pytest.mark.parametrize("own, others, cause", [(BENT, LOUDER, "fault"), (LOUDER, LOUDER, "drift"), (BENT, BENT, "drift")], ids=["one is out of line", "all are louder", "all shake"])
def test_in_a_world_that_changed_for_all_a_shaft_that_shakes_alone_is_a_fault(own, others, cause):
    every = [scored(a, lambda t: 12.0 if t > WORK_NS else 0.0, (), WORK_NS + 2 * HOUR) for a in FLEET]
    references = {o.asset: Reference.of(o.between(None, 8 * DAY)) for o in every}
    seen = [replace(o.between(8 * DAY, WORK_NS + DAY)) for o in every]
    looked = {o.asset: Looked(windows=48, reason="no lines", shaft_db=(own if o.asset == FLEET[0] else others,)) for o in seen}
    told = attribute(evaluate_drift(seen, references, WORK_NS + DAY), seen, references, {o.asset: SimpleNamespace(refuted=True) for o in seen}, looked)
    assert (told[FLEET[0]].cause, {told[a].cause for a in FLEET[1:]}) == (cause, {"drift"}), told[FLEET[0]].sentence


SHAKY, AS_BEFORE, ASKEW = (1.0, 9.0, 1.0, 1.0), (1.0, 2.0, 1.0, 1.0), (1.0, 8.0, 1.0, 1.0)


@pytest.mark.parametrize("was, since, cause", [(0.0, AS_BEFORE, "drift"), (0.0, ASKEW, "fault"), (12.0, AS_BEFORE, "fault"), (0.0, (1.0, 2.0, 1.0, -9.0), "drift"), (0.0, None, "fault")],
                         ids=["it shook before they came", "it shakes since they left", "their work changed nothing", "they made all else quieter", "nobody knows how it was then"])
def test_what_work_explains_is_held_against_the_day_before_it_and_what_it_does_not_is_a_fault(was, since, cause):
    one = scored(FLEET[0], lambda t: 12.0 if t > WORK_NS else was if t > WORK_NS - 8 * HOUR else 0.0, work("remounted"), WORK_NS - 7 * HOUR if was else WORK_NS + 2 * HOUR)
    reference, seen = Reference.of(one.between(None, 8 * DAY)), one.between(8 * DAY, WORK_NS + DAY)
    looked = Looked(windows=48, reason="no lines", shaft_db=(SHAKY,), work_db=() if since is None else (since,))
    told = attribute(evaluate_drift([seen], {one.asset: reference}, WORK_NS + DAY), [seen], {one.asset: reference}, {one.asset: SimpleNamespace(refuted=True)}, {one.asset: looked})[one.asset]
    assert told.cause == cause, told.sentence


def test_a_neighbour_that_was_worked_on_is_no_measure_of_what_the_world_does():
    every = [scored(a, lambda t: 12.0 if t > WORK_NS else 0.0, (), WORK_NS + 2 * HOUR) for a in FLEET]
    references = {o.asset: Reference.of(o.between(None, 8 * DAY)) for o in every}
    seen = [replace(o.between(8 * DAY, WORK_NS + DAY)) for o in every]
    looked = {o.asset: Looked(windows=48, reason="no lines", shaft_db=(SHAKY,), work_db=() if o is seen[0] else ((0.0,) * 4,)) for o in seen}
    told = attribute(evaluate_drift(seen, references, WORK_NS + DAY), seen, references, {o.asset: SimpleNamespace(refuted=True) for o in seen}, looked)
    assert {a.cause for a in told.values()} == {"drift"}


def lines(family: str, db: float) -> Looked:
    return Looked(fault=family, strength=12.6, reason=f"{family} lines", windows=48, family=family, lines_db=db)


@pytest.mark.parametrize("own, others, cause", [
    (lines("outer_race", 12.0), lines("outer_race", 4.0), "fault"), (lines("outer_race", 6.0), lines("outer_race", 4.0), "drift"),
    (lines("inner_race", 6.0), lines("outer_race", 4.0), "fault"), (lines("outer_race", 6.0), Looked(windows=48, reason="no lines"), "fault"),
    (lines("outer_race", 6.0), replace(lines("outer_race", 4.0), fault=""), "drift")],
    ids=["higher than the others'", "as high", "of another part", "the others have none", "the others have always had them"])  # fmt: skip
def test_in_a_world_that_changed_for_all_lines_that_all_bearings_have_are_no_fault_of_one(own, others, cause):
    named = (Event(FLEET[0], "vibration", "", "diagnosed", WORK_NS + HOUR, 0, 1, {"fault": "outer_race"}),) if cause == "drift" else ()  # the edge sees only one machine
    every = [scored(a, lambda t: 12.0 if t > WORK_NS else 0.0, named if a == FLEET[0] else (), WORK_NS + 2 * HOUR) for a in FLEET]
    references = {o.asset: Reference.of(o.between(None, 8 * DAY)) for o in every}
    seen = [replace(o.between(8 * DAY, WORK_NS + DAY)) for o in every]
    looked = {o.asset: own if o.asset == FLEET[0] else others for o in seen}
    told = attribute(evaluate_drift(seen, references, WORK_NS + DAY), seen, references, {o.asset: SimpleNamespace(refuted=True) for o in seen}, looked)
    assert (told[FLEET[0]].cause, {told[a].cause for a in FLEET[1:]}) == (cause, {"drift"}), told[FLEET[0]].sentence


@pytest.mark.parametrize("own, cause", [(BENT, "fault"), (LOUDER, "unknown")], ids=["out of line", "louder"])
def test_a_machine_that_changed_alone_has_a_fault_where_its_shaft_shakes_and_is_asked_about_where_all_is_louder(own, cause):
    one, others = scored(FLEET[0], lambda t: 12.0 if t > WORK_NS else 0.0, (), WORK_NS + 2 * HOUR), [scored(a, lambda t: 0.0) for a in FLEET[1:]]
    references = {o.asset: Reference.of(o.between(None, 8 * DAY)) for o in (one, *others)}
    seen = [replace(o.between(8 * DAY, WORK_NS + DAY)) for o in (one, *others)]
    told = attribute(evaluate_drift(seen, references, WORK_NS + DAY), seen, references, {o.asset: SimpleNamespace(refuted=o.asset == FLEET[0]) for o in seen},
                     {FLEET[0]: Looked(windows=48, reason="no lines", shaft_db=(own,))})[FLEET[0]]  # fmt: skip
    assert told.cause == cause, told.sentence
