"""A sensor's clock may do what it likes: an alarm comes all the same."""

import numpy as np
import pytest
from small_site import STEP_NS, T0_NS, key_of, message, window
from test_stream import CONTRACT

from pdm.model.bundle import CalibrationRecord, Scored
from pdm.model.monitor import Monitor
from pdm.stream.intake import Intake

HOP_NS, HOUR_NS = 10**10, 3600 * 10**9
RECORD = CalibrationRecord(model="", hop_s=10, scores_db=tuple(np.linspace(-2, 2, 99).tolist()), centre_db=0.0, threshold_db=6.0, confirmations=3, spacing_s=10,
                           exceedance=0.05, false_alarms_per_day=1.0, supported=True, quiet_s=60, gap_s=60)
NOW_NS = T0_NS + 100 * HOUR_NS

CLOCKS = {
    "never touched": lambda n, t: t,
    "set back after a pause": lambda n, t: t - 12 * 10**9 * (n > 50),
    "set back to where it was after a pause": lambda n, t: t - HOP_NS * (n > 50),
    "ahead by an hour in one window": lambda n, t: t + HOUR_NS * (n == 55),
    "a year ahead in one window": lambda n, t: t + 9000 * HOUR_NS * (n == 55),
    "a year ahead in the first window": lambda n, t: t + 9000 * HOUR_NS * (n == 0),
    "always a year ahead": lambda n, t: t + 9000 * HOUR_NS,
    "in 1970 after a pause": lambda n, t: t - T0_NS * (n >= 50),
    "standing still": lambda n, t: T0_NS,
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_an_alarm_comes_within_a_few_windows_whatever_the_clock_does(clock):
    monitor, intake = Monitor(RECORD, CONTRACT), Intake({key_of(0): CONTRACT}, now_ns=lambda: NOW_NS, hops={key_of(0): RECORD.hop_s})
    alarm, suspects = None, []
    for n in range(100):
        end = CLOCKS[clock](n, T0_NS + n * HOP_NS + (10 * HOUR_NS if n >= 50 else 0))
        (a,) = intake.take([message(window(n, t0_ns=end - STEP_NS))]).accepted
        level = 1.0 if n < 60 else 10.0
        v = monitor.update(Scored(score=np.array([level]), channel_score=np.full((1, 2), level), embedding=np.zeros((1, 3)), engine="x"), 0, a.t_ns)
        alarm = n if v.alarm and alarm is None else alarm
        suspects += [n] if a.suspect else []
    assert alarm is not None and 60 <= alarm <= 65
    if clock not in ("always a year ahead", "in 1970 after a pause", "standing still"):
        assert len(suspects) <= 10  # five for each time that it had to begin anew


def test_after_a_restart_the_time_goes_on_from_where_the_monitor_was():
    ahead_ns = T0_NS + HOUR_NS
    intake = Intake({key_of(0): CONTRACT}, last_ns={key_of(0): ahead_ns}, now_ns=lambda: NOW_NS, hops={key_of(0): 10.0})
    batch = intake.take([message(window(n, t0_ns=T0_NS + n * HOP_NS - STEP_NS)) for n in range(8)])
    assert [a.t_ns for a in batch.accepted] == [ahead_ns + (n + 1) * HOP_NS for n in range(8)]
    assert [a.suspect for a in batch.accepted] == [True] * 4 + [False] * 4
