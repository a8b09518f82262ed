"""The sinks' contract: a row stands in a store once, whatever happens on the way. A new sink joins by a line in `SINKS`."""

import json
import sqlite3
import threading
import time

import numpy as np
import pytest

from pdm.config import Settings
from pdm.errors import InvalidConfig, PartMissing
from pdm.stream.journal import Event, Group, Journal, JournalReader, Mark, Row
from pdm.stream.sinks import Cursor, Runner, SqliteStore, main, open_sinks

ASSET, STREAM, EPOCH = "e/s/a/l/fan", "vibration", 7


def row(seq, asset=ASSET):
    return Row(asset, STREAM, EPOCH, seq, seq * 10**9, seq * 10**9, 1.5, 0.5, 0.25, 0.1, 1.6, seq % 2 == 1, 2, "running", "outer_race", "fan@1", True, False,
               {"h": 1.5}, {"rms_h": 0.2}, {"speed_rpm": 1500.0}, np.arange(3, dtype=np.float32), "ab" * 32, "triton", ("late",))


def event(seq):
    return Event(ASSET, STREAM, "fan@1", "raised", seq * 10**9, EPOCH, seq, {"score": 1.5})


class SqliteKeys:
    "A SQLite store, and how to look into it."
    def __init__(self, folder):
        self.path = folder / "store.db"

    def open(self):
        return SqliteStore(self.path)

    def keys(self):
        with sqlite3.connect(self.path) as db:
            return sorted(db.execute("SELECT asset, stream, epoch, seq FROM verdict").fetchall())

    def events(self):
        with sqlite3.connect(self.path) as db:
            return db.execute("SELECT count(*) FROM event").fetchone()[0]


SINKS = [SqliteKeys]


@pytest.fixture(params=SINKS, ids=lambda kind: kind.__name__)
def kind(request, tmp_path):
    return request.param(tmp_path)


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "data/journal.db")
    yield journal
    journal.close()


def fill(journal, seqs, events=()):
    journal.commit([Group(rows=[row(s) for s in seqs], events=[event(s) for s in events], marks={(ASSET, STREAM, EPOCH): Mark(EPOCH, max(seqs))})])


def expected(n):
    return [(ASSET, STREAM, EPOCH, seq) for seq in range(n)]


def test_rows_written_twice_stand_once(kind):
    sink = kind.open()
    for _ in range(3):
        sink.write([row(0), event(0), row(1)])
    sink.close()
    assert kind.keys() == expected(2) and kind.events() == 1


def test_a_write_that_failed_is_made_again_and_doubles_nothing(kind, journal, tmp_path):
    fill(journal, range(25), events=[3])
    sink, cursor = kind.open(), Cursor(tmp_path / "cursor")
    runner = Runner(JournalReader(journal.path), sink, cursor, batch=10)
    runner.turn()
    cursor.id = 0  # as after a kill between the write and the cursor
    while runner.turn():
        pass
    assert kind.keys() == expected(25) and kind.events() == 1
    assert Cursor(tmp_path / "cursor").id == journal.last_id()
    runner.reader.close()
    sink.close()


def test_a_sink_that_refuses_keeps_its_place(journal, tmp_path):
    fill(journal, range(5))

    class Refusing:
        name = "refusing"

        def write(self, rows):
            raise PartMissing("no")

        def close(self): ...

    runner = Runner(JournalReader(journal.path), Refusing(), Cursor(tmp_path / "cursor"))
    with pytest.raises(PartMissing):
        runner.turn()
    assert runner.cursor.id == 0
    runner.reader.close()


def test_another_journal_is_written_from_its_beginning(kind, journal, tmp_path):
    fill(journal, range(3))
    cursor = Cursor(tmp_path / "cursor")
    cursor.move(10**6)
    sink = kind.open()
    runner = Runner(JournalReader(journal.path), sink, cursor)
    while runner.turn():
        pass
    assert kind.keys() == expected(3)
    runner.reader.close()
    sink.close()


def test_what_is_stored_is_what_was_journaled(journal, tmp_path):
    fill(journal, [0])
    store = SqliteStore(tmp_path / "store.db")
    store.write(journal.read())
    with sqlite3.connect(tmp_path / "store.db") as db:
        found = db.execute("SELECT score, alarm, fault, indicators, embedding, flags, engine FROM verdict").fetchone()
    assert found[:3] == (1.5, 0, "outer_race") and json.loads(found[3]) == {"rms_h": 0.2}
    assert np.array_equal(np.frombuffer(found[4], np.float32), [0, 1, 2]) and found[5:] == ("late", "triton")
    store.close()


def test_the_service_waits_for_the_journal_and_stops_when_told(tmp_path):
    stop, settings = threading.Event(), Settings(state_dir=tmp_path / "data", sinks_metrics_port=0)
    service = threading.Thread(target=main, args=(settings, stop))
    service.start()
    time.sleep(0.3)
    journal = Journal(tmp_path / "data/journal.db")
    fill(journal, range(4))
    end, found = time.monotonic() + 10, 0
    while found < 4 and time.monotonic() < end:
        time.sleep(0.05)
        try:
            with sqlite3.connect(tmp_path / "data/store.db") as db:
                found = db.execute("SELECT count(*) FROM verdict").fetchone()[0]
        except sqlite3.OperationalError:  # not made yet
            found = 0
    stop.set()
    service.join(10)
    journal.close()
    assert found == 4 and not service.is_alive()


def test_a_store_that_this_version_does_not_have_is_refused():
    with pytest.raises(InvalidConfig, match="SQLite only"):
        open_sinks(Settings(tsdb_url="influxdb://host:8086/org/bucket"))


def test_a_cursor_that_is_none_says_what_to_do(tmp_path):
    (tmp_path / "cursor").write_text("x")
    with pytest.raises(InvalidConfig, match="delete it"):
        Cursor(tmp_path / "cursor")
