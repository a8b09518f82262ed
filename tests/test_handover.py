"""An asset moves from one agent to another while both run: nothing is lost, and each window stands once in the store that they share."""

import sqlite3
from contextlib import ExitStack

import pytest
from small_site import RATE_HZ, SAMPLES, STREAM, Site, key_of, message, path_of, window
from test_stream import BROKERS, CONTRACT, send, seqs, wait_for

from pdm.config import load_assets
from pdm.serve.engine import InProcess
from pdm.signal.diagnose import diagnose
from pdm.stream.agent import Agent
from pdm.stream.broker import EmbeddedBroker
from pdm.stream.intake import EPOCHS, Intake
from pdm.stream.journal import Group, Journal
from pdm.stream.sensor_client import SensorClient
from pdm.stream.sinks import SqliteStore
from pdm.stream.versions import own

pytestmark = pytest.mark.timeout(120)


class Post:
    "One agent with its journal, on a broker; it keeps its client id, and with it its session."

    def __init__(self, site, broker, name):
        self.site, self.broker, self.name, self.agent = site, broker, name, None

    def start(self, *assets):
        "The agent, with these assets and no others."
        records = [r for r in load_assets(self.site.folder / "assets.yaml") if r.path in {path_of(i) for i in assets}]
        self.journal, self.bus = self.site.journal(), self.broker.client(self.name)
        self.agent = Agent(self.bus, self.journal, own(records, InProcess().load, self.journal), diagnose)
        self.agent.start()

    def stop(self):
        if self.agent is not None:
            self.agent.stop()
            self.journal.close()
            self.agent = None


@pytest.mark.parametrize("kind", BROKERS)
def test_an_asset_moves_to_another_agent_and_no_window_is_lost_or_stored_twice(kind, make_bundle, tmp_path):
    bundle = make_bundle(samples=SAMPLES, rate_hz=RATE_HZ)
    with EmbeddedBroker(kind=kind) as broker, ExitStack() as stack:
        a, b = (Post(Site(tmp_path / name, bundle), broker, f"handover-{name}") for name in "ab")
        stack.callback(a.stop)
        stack.callback(b.stop)
        client = stack.enter_context(SensorClient(broker.url, resend_s=0.5))
        stays, moves = (client.open(path_of(i), STREAM, RATE_HZ, ["h", "v"], ["g", "g"], window=32) for i in range(2))
        a.start(0, 1)
        send(moves, range(10))
        client.flush(20)
        a.bus.publish = lambda *_args, **_options: False  # as when the connection ends between a commit and its acknowledgement
        send(moves, range(10, 15))
        wait_for(lambda: len(seqs(a.journal, 1)) == 15)
        a.stop()
        a.start(0)  # its session still brings the other asset's windows
        send(moves, range(15, 20))
        send(stays, range(5))
        wait_for(lambda: stays.acknowledged == 5)
        assert moves.acknowledged == 10 and seqs(a.journal, 1) == list(range(15)) and not a.journal.dead_letters()
        b.start(1)
        send(moves, range(20, 25))
        client.flush(20)
        assert sorted(seqs(b.journal, 1)) == list(range(10, 25)) and b.journal.marks()[(*key_of(1), moves.epoch)].lost == 0
        twice = [{r.seq: r.score for r in p.journal.verdicts(*key_of(1)) if 10 <= r.seq < 15} for p in (a, b)]
        assert twice[0] == twice[1] and len(twice[0]) == 5
        store = SqliteStore(tmp_path / "verdicts.db")
        store.init()
        for p in (a, b):
            store.write([r for r in p.journal.read(0, 1000) if isinstance(r, store.takes)])
        store.close()
        with sqlite3.connect(store.path) as db:
            assert [seq for seq, in db.execute("SELECT seq FROM verdict WHERE asset = ? ORDER BY seq", (path_of(1),))] == list(range(25))


def test_a_window_of_an_asset_that_is_not_ours_is_left_alone():
    intake = Intake({key_of(0): CONTRACT}, marks=Intake({key_of(1): CONTRACT}).take([message(window(0), 1)]).changed)
    batch = intake.take([message(window(n), 1) for n in range(3)] + [message(window(3), 1, payload=b"x")])
    assert (batch.strangers, len(batch.messages)) == (4, 4)
    assert not (batch.accepted or batch.dead or batch.duplicates or batch.changed or batch.acks or intake.current())


def test_a_storm_of_epochs_leaves_a_bounded_number_of_marks_in_memory_and_in_the_journal(tmp_path):
    with Journal(tmp_path / "journal.db") as journal:
        intake = Intake({key_of(0): CONTRACT})
        for part in range(20):
            batch = intake.take([message(window(0, epoch=100 * part + n), payload=b"nonsense") for n in range(100)])
            journal.commit([Group(dead=batch.dead, marks=batch.changed, gone=batch.gone)])
        assert sorted(epoch for *_, epoch in journal.marks()) == list(range(2000 - EPOCHS, 2000))
        (again,) = intake.take([message(window(0, epoch=5))]).accepted  # of a forgotten one: judged once more, under the same key
        assert (again.window.epoch, again.window.seq) == (5, 0)


def test_marks_of_an_asset_that_was_given_away_leave_the_journal(tmp_path):
    with Journal(tmp_path / "journal.db") as journal:
        journal.commit([Group(marks=Intake({key_of(n): CONTRACT}).take([message(window(0), n)]).changed) for n in range(2)])
        batch = Intake({key_of(0): CONTRACT}, journal.marks()).take([message(window(1))])
        journal.commit([Group(marks=batch.changed, gone=batch.gone)])
        assert list(journal.marks()) == [(*key_of(0), 7)]
