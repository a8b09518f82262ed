"""The power goes: every process of a site at once, its sensors' too, again and again; and comes back, whoever is first.

Real broker with certificates, tritonserver, agent, sinks, InfluxDB, PostgreSQL, SQLite, archive, and a gateway with its buffer on disk. What a kill can't show
is what a disk forgets that had said it was written: for that the journal asks for `synchronous=FULL`, and the owner for a disk that keeps its word.
"""

import random
import time

import pytest
from faults.rig import Guarded, Rig, rms_bundle

from pdm.process import find_program

pytestmark = [pytest.mark.integration, pytest.mark.skipif(not find_program("mosquitto"), reason="mosquitto is not installed: apt-get install mosquitto")]
SEED = random.randrange(1, 10**6)


def test_after_each_power_cut_verdicts_come_without_a_hand_and_nothing_is_lost_or_doubled(tmp_path, record_property):
    print(f"seed {SEED}")
    draw, seconds = random.Random(SEED), []
    with Rig(tmp_path / "site", rms_bundle(tmp_path), feeders=1, seed=SEED, broker=Guarded) as rig:
        rig.begin()
        for _ in range(4):
            rig.progress(draw.randrange(1, 60))
            seconds.append(round(rig.power_cut(draw, lambda: time.sleep(draw.uniform(0, 1))), 2))
        rig.progress()
        t = rig.check()
    record_property("cold_start_to_first_verdict_s", seconds)
    print(f"from cold start to the first verdict: {seconds} s; {t}")
