"""What an edge site survives, in short: real parts, one fault after another, and a tally after each.

The seed of the random schedule is printed; `PREDMAINT_FAULTS_SEED` sets it, `PREDMAINT_FAULTS_WINDOWS` how many windows at least.
"""

import os
import random

import pytest
from conftest import rms_graph
from edge_site import RATE_HZ, SAMPLES

from faults import chaos, storms
from faults.rig import Rig, wait_for
from pdm.errors import PartMissing
from pdm.model.bundle import Contract, write_bundle
from pdm.process import find_program
from pdm.serve.server import find_environment

SEED = int(os.environ.get("PREDMAINT_FAULTS_SEED", "0")) or random.randrange(1, 10**6)
WINDOWS = int(os.environ.get("PREDMAINT_FAULTS_WINDOWS", "5000"))

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600),
              pytest.mark.skipif(not find_program("mosquitto"), reason="mosquitto is not installed: apt-get install mosquitto")]


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    "One site for all tests: each begins, harms and settles; what is counted is everything since the first."
    folder = tmp_path_factory.mktemp("faults")
    contract = Contract(name="motor", kind="mahalanobis", channels=("h", "v"), units=("g", "g"), rate_hz=RATE_HZ, samples=SAMPLES, embedding=3, training_data="0" * 64)
    bundle = write_bundle(folder, storms.poisonable(rms_graph(2, SAMPLES, 1.0, 0)), contract)
    try:
        find_environment()
        triton = True
    except PartMissing as e:
        print(f"the model runs inside the agent: {e}")
        triton = False
    with Rig(folder / "site", bundle, triton, seed=SEED) as rig:
        yield rig


@pytest.fixture
def draw():
    print(f"PREDMAINT_FAULTS_SEED={SEED}")
    return random.Random(SEED)


def test_a_storm_of_malformed_messages_ends_in_dead_letters_each_with_its_reason(rig, draw):
    rig.begin()
    key = rig.keys[0]
    with rig.site.reader() as journal:
        anonymous = sum(d.epoch is None for d in journal.dead_letters())
        epoch = storms.malformed(rig, draw, key)
        storms.invented(rig, draw)
        wait_for(lambda: rig.witness.acknowledged.get((*key, epoch), -1) == 199, "the storm to be dealt with")
        rig.check()
        assert sum(d.epoch is None for d in journal.dead_letters()) == anonymous + 250


def test_a_poison_window_is_a_dead_letter_and_those_beside_it_are_scored(rig, draw):
    rig.begin()
    key = rig.keys[-1]
    epoch = storms.poison(rig, draw, key)
    wait_for(lambda: rig.witness.acknowledged.get((*key, epoch), -1) == 19, "the poison to be dealt with")
    rig.check()


def test_windows_that_are_sent_again_and_again_stand_once(rig):
    rig.begin()
    assert storms.duplicates(rig) >= 1000
    rig.check()


def test_random_faults_one_after_another_lose_nothing_and_double_nothing(rig, draw):
    rig.begin()
    todo = list(chaos.faults(rig).items())
    draw.shuffle(todo)
    for name, fault in todo:
        rig.progress(draw.randrange(1, 30))
        print(name)
        fault(rig, draw)
    wait_for(lambda: len(rig.sent()) >= WINDOWS, f"{WINDOWS} windows")
    t = rig.check()
    assert t["acknowledged"] >= WINDOWS - t["forgotten"] and rig.kills >= 10
    print(t)
