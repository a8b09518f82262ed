"""The agent's order of things, with a bus in the test's hand: what is committed, who is told, and when."""

import logging
import sqlite3
import threading

import pytest
from servers import wait_for
from small_site import RATE_HZ, SAMPLES, STREAM, Hand, Site, key_of, message, path_of, window

from pdm.config import load_assets
from pdm.data.window import decode_ack
from pdm.errors import PartMissing
from pdm.serve.engine import InProcess
from pdm.signal.diagnose import diagnose
from pdm.stream.agent import Agent
from pdm.stream.alarms import Command
from pdm.stream.journal import Journal
from pdm.stream.versions import own

pytestmark = pytest.mark.timeout(60)


class Moody(Journal):
    "A journal whose disk has room for what `takes` says, and for nothing else."
    takes = staticmethod(lambda groups: True)

    def commit(self, groups):
        groups = list(groups)
        if not self.takes(groups):
            raise sqlite3.OperationalError("database or disk is full")
        return super().commit(groups)


@pytest.fixture
def site(make_bundle, tmp_path):
    return Site(tmp_path / "site", make_bundle(samples=SAMPLES, rate_hz=RATE_HZ), assets=1)


@pytest.fixture
def at_work(site):
    "An agent, its journal and its bus; the one before ends."
    agents = []

    def end():
        while agents:
            agent, journal = agents.pop()
            agent.stop(1.0)
            journal.close()

    def start(load=None):
        end()
        journal, bus = Moody(site.journal_file), Hand()
        agent = Agent(bus, journal, own(load_assets(site.folder / "assets.yaml"), load or InProcess().load, journal), diagnose, batch=8)
        agents.append((agent, journal))
        agent.start()
        return agent, journal, bus

    yield start
    end()


def test_what_can_not_be_written_at_the_end_keeps_what_follows_from_being_acknowledged(at_work, site):
    agent, journal, bus = at_work()
    journal.takes = lambda groups: sum(len(g.rows) for g in groups) == 1  # there is room for little
    bus.unread += [[message(window(n)) for n in range(4)], [message(window(4))]]
    wait_for(lambda: agent.metrics.registry.get_sample_value("pdm_commit_failures_total"))
    agent.stop(1.5)
    with site.reader() as reader:
        assert reader.verdicts(*key_of(0)) == [] and reader.marks() == {}
    assert bus.topics("/ack") == []


def test_a_command_that_nobody_waits_for_any_more_is_not_carried_out(at_work, site):
    agent, journal, bus = at_work()
    full = threading.Event()
    full.set()
    journal.takes = lambda groups: not full.is_set()
    command, answers = Command(asset=path_of(0), action="maintenance", by="mia", what="bearing greased"), []
    while not {True, False} <= set(answers):  # some are on their way to the disk, the others wait for their turn
        with pytest.raises(PartMissing, match="not written down within") as refused:
            agent.command(command, timeout_s=0.3)
        answers.append("nothing was done" in str(refused.value))
    assert "disk is full" in wait_for(agent.unready)[0]
    full.clear()
    wait_for(lambda: agent.unready() == [])
    agent.stop()
    assert [e.kind for e in journal.events()] == ["maintenance"] * answers.count(False)


class Broken:
    "A model whose engine has run out of memory."

    def __init__(self, model):
        self.contract = model.contract

    def infer(self, windows, conditions=None):
        raise MemoryError("no memory for the arena")


def test_an_engine_that_scores_nothing_ends_the_agent_and_loses_no_window(at_work, site):
    logging.getLogger("pdm").setLevel(logging.CRITICAL)
    agent, journal, bus = at_work(lambda bundle, artifact: Broken(InProcess().load(bundle)))
    bus.unread.append([message(window(n)) for n in range(3)])
    wait_for(agent.failed.is_set)
    logging.getLogger("pdm").setLevel(logging.NOTSET)
    agent.stop(1.0)
    assert agent.unhealthy() == ["a thread failed, see the log"]
    assert bus.topics("/ack") == [] and journal.dead_letters() == [] and journal.marks() == {}


def test_a_broker_that_has_forgotten_everything_is_told_acknowledgements_and_alarms_again(at_work):
    agent, _, bus = at_work()
    wait_for(lambda: bus.topics("/asset/verdict"))  # the last that it says of itself at the start
    bus.unread.append([message(window(n, level=100.0)) for n in range(4)])
    wait_for(lambda: bus.topics(f"/{STREAM}/verdict"))  # the last that it says of a batch
    assert agent.alarms()[0].active and [decode_ack(p) for p in bus.topics("/ack")] == [(7, 3)]
    bus.told.clear()
    for callback in bus.callbacks:
        callback()
    wait_for(lambda: bus.topics("/asset/verdict"))
    assert b'"state":"unacknowledged"' in bus.topics("/asset/verdict")[-1]
    assert [decode_ack(p) for p in bus.topics("/ack")] == [(7, 3)]


def counted(agent, name):
    return agent.metrics.registry.get_sample_value(f"pdm_{name}_total", {"asset": path_of(0)})


def test_an_alarm_that_was_counted_before_a_restart_is_excused_after_it_and_once(at_work):
    agent, _, bus = at_work()
    bus.unread.append([message(window(n, level=100.0)) for n in range(4)])
    wait_for(lambda: counted(agent, "alarm_episodes") == 1)
    for labelled in (1, 0):
        agent, _, _ = at_work()
        for reason in ("process", "damage"):
            agent.command(Command(asset=path_of(0), action="label", by="mia", reason=reason))
        wait_for(lambda agent=agent: agent.metrics.registry.get_sample_value("pdm_alarms_total", {"kind": "labelled"}) == 2)
        assert (counted(agent, "alarm_episodes"), counted(agent, "alarm_episodes_excused")) == (0, labelled)


def test_a_late_window_shows_that_its_sensor_is_heard_and_nothing_of_the_machine(at_work):
    agent, _, bus = at_work()

    def shown(name):
        return agent.metrics.registry.get_sample_value(name, {"asset": path_of(0), "stream": STREAM})

    def done(result, n):
        wait_for(lambda: agent.metrics.registry.get_sample_value("pdm_windows_total", {"result": result}) == n and (shown("pdm_window_last_timestamp_seconds") or 0) > last)

    last = 0
    bus.unread.append([message(window(n)) for n in (0, 1, 3)])
    done("scored", 3)
    score, last = shown("pdm_score"), shown("pdm_window_last_timestamp_seconds")
    bus.unread.append([message(window(2, level=100.0))])
    done("late", 1)
    assert shown("pdm_score") == score < 10
    bus.unread += [[message(window(5))], [message(window(6)), message(window(4, level=100.0))]]  # and one beside what is new
    done("late", 2)
    assert shown("pdm_score") < 10
