"Python runs this before all else where its folder is on PYTHONPATH: the wall clock is off by the seconds that stand in the file FAULTS_CLOCK."

import os
import time

_time, _time_ns = time.time, time.time_ns


def _offset_s() -> int:
    with open(os.environ["FAULTS_CLOCK"]) as f:
        return int(f.read() or 0)


time.time = lambda: _time() + _offset_s()
time.time_ns = lambda: _time_ns() + _offset_s() * 10**9
