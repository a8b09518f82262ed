"""What people do to a machine ends a suspicion only where it shows; and all times of the attribution go with its day."""

from dataclasses import replace

import numpy as np
import pytest

from pdm.loop.attribute import attribute
from pdm.loop.drift import Reference, evaluate_drift
from pdm.loop.observed import Observed
from pdm.stream.records import Event

DAY_NS, HOP_NS, ASSET = 86_400 * 10**9, 1200 * 10**9, "a/b/c/d/pump"


def observed(level_db, *work_d):
    "A machine that is as it was for four days, and then as the levels say."
    rng = np.random.default_rng(5)
    db = np.concatenate([np.zeros(4 * 72), level_db]) + rng.normal(0, 0.5, 4 * 72 + len(level_db))
    n, no = len(db), np.zeros(len(db), bool)
    t_ns = (1 + np.arange(n)) * HOP_NS
    score = 10 ** (db / 20)
    rms = {"rms_h": score * np.exp(rng.normal(0, 0.05, n))}
    events = tuple(Event(ASSET, "", "", "maintenance", round(d * DAY_NS) + 1, 0, -1, {"what": "remounted"}) for d in work_d)
    return Observed(ASSET, "vibration", "m" * 64, HOP_NS / 1e9, t_ns, score, np.full(n, 100.0), np.full(n, 0.5), no, np.full(n, "running", "U9"), no, no, no,
                    score[:, None].astype(np.float32), rms, {}, events)


def told(o, held=None, faster=1):
    o = replace(o, t_ns=o.t_ns // faster, hop_s=o.hop_s / faster, events=tuple(e._replace(t_ns=e.t_ns // faster) for e in o.events))
    reference, now = Reference.of(o.between(None, 4 * DAY_NS // faster + 1)), int(o.t_ns[-1]) + 1
    span_s = 86_400 / faster
    later = [o.between(4 * DAY_NS // faster + 1)]
    found = evaluate_drift(later, {ASSET: reference}, now, 4 * 3600 / faster, float(faster), span_s)
    return attribute(found, later, {ASSET: reference}, {}, {}, {} if held is None else {ASSET: held // faster}, span_s=span_s)[ASSET]


STEP = np.repeat([2.0, 8.0], [72, 72])       # it wandered off, and a day later it was mounted anew
RAMP = np.linspace(0.0, 12.0, 4 * 72)        # it grows day by day


def test_a_suspicion_ends_with_work_from_which_on_the_machine_sounds_otherwise():
    answer = told(observed(STEP, 5), held=4 * DAY_NS)
    assert (answer.cause, answer.action) == ("drift", "recalibrate") and answer.since_ns == 5 * DAY_NS + 1
    assert told(observed(STEP), held=4 * DAY_NS).since_ns == 4 * DAY_NS


@pytest.mark.parametrize("day", [5.0, 6.0, 7.0])
def test_work_on_a_machine_that_goes_on_growing_ends_no_suspicion(day):
    answer = told(observed(RAMP, day), held=4 * DAY_NS)
    assert answer.cause == "fault" and answer.action == "none" and answer.since_ns == 4 * DAY_NS


def test_work_that_is_not_heard_ends_no_suspicion():
    answer = told(observed(np.full(3 * 72, 6.0), 5.7), held=4 * DAY_NS)
    assert answer.action == "ask" and answer.since_ns == 4 * DAY_NS


@pytest.mark.parametrize("levels", [STEP, RAMP], ids=["step", "ramp"])
def test_a_machine_that_lives_sixty_times_as_fast_is_told_the_same(levels):
    slow, fast = (told(observed(levels, 5), held=4 * DAY_NS, faster=f) for f in (1, 60))
    assert (slow.cause, slow.action, slow.probability) == (fast.cause, fast.action, fast.probability)
    assert [e.name for e in slow.evidence] == [e.name for e in fast.evidence] and abs(slow.since_ns - 60 * fast.since_ns) < 60


@pytest.mark.parametrize(("alarms", "stands", "since"), [([(4.2, 4.4), (6.8, 7.0)], (0, 0), 6.8), ([(4.2, 5.2), (6.8, 7.0)], (0, 0), 4.2), ([(4.2, 4.4), (6.8, 7.0)], (4.4, 6.8), 4.2)],
                         ids=["gone for two days", "gone for one", "standing still"])
def test_an_alarm_that_came_back_after_days_began_when_it_came_back(alarms, stands, since):
    o = observed(np.zeros(3 * 72))
    day = o.t_ns / DAY_NS
    o = replace(o, alarm=np.any([(day >= a) & (day <= b) for a, b in alarms], 0), events=tuple(Event(ASSET, "", "", "raised", round(a * DAY_NS), 0, -1, {}) for a, _ in alarms))
    assert told(o.part(~((day > stands[0]) & (day < stands[1])))).since_ns == round(since * DAY_NS)
