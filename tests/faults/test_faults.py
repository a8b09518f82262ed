"""What an edge site survives, in short: real parts, one fault after another, and a tally after each.

The seed of the random schedule is printed; `PREDMAINT_FAULTS_SEED` sets it, `PREDMAINT_FAULTS_WINDOWS` how many windows at least.
"""

import os
import random
import subprocess
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path

import pytest

from faults import chaos, storms
from faults.people import NUL, Answer
from faults.rig import Rig, rms_bundle, wait_for
from faults.stores import BigQuery
from faults.tally import complete
from pdm.process import find_program

SEED = int(os.environ.get("PREDMAINT_FAULTS_SEED", "0")) or random.randrange(1, 10**6)
WINDOWS = int(os.environ.get("PREDMAINT_FAULTS_WINDOWS", "5000"))

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600),
              pytest.mark.skipif(not find_program("mosquitto"), reason="mosquitto is not installed: apt-get install mosquitto")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return rms_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def rig(bundle, tmp_path_factory):
    "One site for most tests: each begins, harms and settles; what is counted is everything since the first."
    with Rig(tmp_path_factory.mktemp("faults") / "site", bundle, seed=SEED) as rig:
        yield rig


@pytest.fixture
def draw(request):
    print(f"PREDMAINT_FAULTS_SEED={SEED}")
    return random.Random(f"{SEED} {request.node.name}")


def test_a_storm_of_malformed_messages_ends_in_dead_letters_each_with_its_reason(rig, draw):
    rig.begin()
    key = rig.keys[0]
    with rig.site.reader() as journal:
        anonymous = sum(d.epoch is None for d in journal.dead_letters())
        epoch = storms.malformed(rig, draw, key)
        storms.invented(rig, draw)
        wait_for(lambda: rig.witness.acknowledged.get((*key, epoch), -1) == 199, "the storm to be dealt with")
        wait_for(lambda: sum(d.epoch is None for d in journal.dead_letters()) >= anonymous + 250, "what has no sender to be dealt with")
        rig.check()
        assert sum(d.epoch is None for d in journal.dead_letters()) == anonymous + 250


def test_a_poison_window_is_a_dead_letter_and_those_beside_it_are_scored(rig, draw):
    rig.begin()
    key = rig.keys[-1]
    epoch = storms.poison(rig, draw, key)
    wait_for(lambda: rig.witness.acknowledged.get((*key, epoch), -1) == 19, "the poison to be dealt with")
    rig.check()


def test_a_verdict_that_a_store_refuses_is_a_dead_letter_of_its_sink_and_stands_in_all_others(rig, draw):
    rig.begin()
    key = rig.keys[-1]
    epoch = storms.unstorable(rig, draw, key)
    wait_for(lambda: rig.witness.acknowledged.get((*key, epoch), -1) == 19, "the windows to be scored")
    found = rig.check()["stores"]
    for store in rig.stores:
        if store.name in ("influx", "postgres"):
            assert found[store.name]["refused"] >= 6 and {k for k in store.refused() if k[2] == epoch}


def test_a_command_that_is_acknowledged_stands_in_the_journal_once_and_in_every_store(rig):
    rig.begin()
    rig.people.end()
    assert rig.people.say(rig.keys[0][0], "maintenance") is Answer.DONE
    assert rig.people.say(rig.keys[0][0], "maintenance", NUL) is Answer.DONE
    rig.check()


def test_windows_that_are_sent_again_and_again_stand_once(rig):
    rig.begin()
    assert storms.duplicates(rig) >= 1000
    rig.check()


@pytest.mark.parametrize("part", ["agent", "sinks"])
def test_while_there_is_no_room_for_the_journal_nothing_is_acknowledged_that_is_not_in_it(rig, part):
    rig.begin()
    failures = "pdm_commit_failures_total"
    before = rig.metric(failures)
    with rig.no_room(part):
        if part == "agent":
            wait_for(lambda: rig.metric(failures) >= before + 3, "commits to fail")
            complete(rig.so_far())
        else:
            rig.progress(50)
    rig.progress()
    rig.check()


def test_a_full_file_system_stops_agent_and_sinks_only_while_it_is_full(bundle, tmp_path):
    data = tmp_path / "site" / "data"
    data.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(data)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system can't be mounted here: {mounted.stderr.strip()}")
    try:
        with Rig(tmp_path / "site", bundle, triton=False, feeders=1) as rig:
            rig.begin()
            with (data / "filler").open("wb", buffering=0) as filler, suppress(OSError):
                while filler.write(bytes(4096)):
                    continue
            failures = "pdm_commit_failures_total"
            wait_for(lambda: rig.metric(failures) >= 3, "commits to fail")
            complete(rig.so_far())
            (data / "filler").unlink()
            rig.progress()
            rig.check()
    finally:
        subprocess.run(["umount", str(data)], check=True)


def test_bigquery_gets_everything_once_whatever_happens_on_the_way(bundle, tmp_path, draw):
    if missing := BigQuery.missing():
        pytest.skip(missing)
    with Rig(tmp_path / "site", bundle, triton=False, feeders=1, stores=[BigQuery], seed=SEED) as rig:
        rig.begin()
        for fault in (chaos.kill("bigquery"), chaos.cut("sinks-bigquery"), chaos.kill("sinks"), chaos.slow("sinks-bigquery"), chaos.kill("sinks", "bigquery")):
            rig.progress(50)
            fault(rig, draw)
        rig.check()


def test_the_agents_clock_may_jump_by_an_hour(rig, monkeypatch, tmp_path):
    rig.begin()
    clock = tmp_path / "clock"
    clock.write_text("0")
    with monkeypatch.context() as m:
        m.setenv("FAULTS_CLOCK", str(clock))
        m.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent / "clock"), os.environ.get("PYTHONPATH", "")]))
        rig.kill("agent")
    for offset in (3600, -3600, 0):
        (tmp_path / "new").write_text(str(offset))
        (tmp_path / "new").replace(clock)

        def committed_then(offset=offset):
            with rig.site.reader() as journal:
                last = max((r.committed_ns for r in journal.read(journal.last_id() - 50)), default=0)
            return abs(last / 1e9 - time.time() - offset) < 600

        wait_for(committed_then, f"a clock that is off by {offset} s")
        rig.progress()
    rig.kill("agent")
    rig.check()


def test_random_faults_one_after_another_lose_nothing_and_double_nothing(rig, draw):
    rig.begin()
    for name, fault in islice(chaos.deck(rig, draw), len(chaos.faults(rig))):
        rig.progress(draw.randrange(1, 30))
        print(name)
        fault(rig, draw)
    wait_for(lambda: len(rig.sent()) >= WINDOWS, f"{WINDOWS} windows")
    t = rig.check()
    assert t["acknowledged"] >= WINDOWS and rig.kills >= 10
    print(t)
