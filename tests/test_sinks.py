"""The sinks' contract: a record stands in a store once, whatever happens on the way. A new sink joins by a line in `KINDS`.

A kind knows how to open its sink, how to look into the store past the sink, how to take the store away and bring it back, and what a
record looks like that the store will never take."""

import http.server
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import numpy as np
import pytest
import servers
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from influxdb_client import Point
from servers import wait_for
from typer.testing import CliRunner
from warehouse_servers import NO_BIGQUERY, bigquery_environment, postgres_kinds, shared_bigquery, shared_postgres

from pdm.cli import app
from pdm.config import Settings
from pdm.data.archive import Archive
from pdm.data.window import Window, decode, encode
from pdm.errors import InvalidConfig, InvalidInput, PartMissing
from pdm.process import Child, free_port
from pdm.stream import runner as runner_module
from pdm.stream.alerts import TopicSink, WebhookSink, alerts_of, message_of
from pdm.stream.bigquery import BigQuerySink
from pdm.stream.broker import EmbeddedBroker
from pdm.stream.influx import InfluxSink, Lines
from pdm.stream.journal import Event, Group, Journal, JournalReader, Mark, Raw, Row
from pdm.stream.keep import ArchiveSink
from pdm.stream.metrics import SinkMetrics
from pdm.stream.postgres import PostgresSink
from pdm.stream.runner import Cursor, DeadLetters, Refused, Runner, slowest
from pdm.stream.sinks import SqliteStore, dead_letters, init_all, main, open_sinks, sink_names, standings, start_runners

ASSET, STREAM, EPOCH = "e/s/a/l/fan", "vibration", 7
T0_NS = time.time_ns() // 10**9 * 10**9 - 7200 * 10**9  # what a store with a retention of a day still takes


def row(seq, asset=ASSET):
    return Row(asset, STREAM, EPOCH, seq, T0_NS + seq * 10**9, T0_NS + seq * 10**9, 1.5, 0.5, 0.25, 0.1, 1.6, seq % 2 == 1, 2, "running", "outer_race", "fan@1",
               True, False, {"h": 1.5}, {"rms_h": 0.2}, {"speed_rpm": 1500.0}, np.arange(3, dtype=np.float32), "ab" * 32, "triton", ("late",))


def event(seq):
    return Event(ASSET, STREAM, "fan@1", "raised", T0_NS + seq * 10**9, EPOCH, seq, {"score": 1.5, "severity": 2})


def episode(seq):
    "An event of an alarm of its own."
    return event(seq)._replace(episode=f"fan@{seq}")


class Kind:
    "What the suite asks of a store. `record` and `write_journal` are for verdicts unless a kind says otherwise."

    record = staticmethod(row)

    def __init__(self, folder: Path):
        self.folder = folder

    def open(self):
        "The sink, not connected; its store is there and empty."
        raise NotImplementedError

    def seqs(self) -> list[int]:
        "The seqs of the records in the store, in order, each as often as it stands there."
        raise NotImplementedError

    def events(self) -> int | None:
        "How many events stand beside the records; None where there are none."
        return None

    def down(self):
        "Take the store away, as a kill would."
        raise NotImplementedError

    def up(self):
        "And bring it back as it was."
        raise NotImplementedError

    def spoil(self, record):
        "The same record in a shape that the store never takes."
        raise NotImplementedError

    def close(self): ...


class Sqlite(Kind):
    def __init__(self, folder):
        super().__init__(folder)
        self.path, self.thief = folder / "store.db", None

    def open(self):
        return SqliteStore(self.path, wait_s=0.05)

    def seqs(self):
        with sqlite3.connect(self.path) as db:
            return [n for (n,) in db.execute("SELECT seq FROM verdict ORDER BY seq")]

    def events(self):
        with sqlite3.connect(self.path) as db:
            return db.execute("SELECT count(*) FROM event").fetchone()[0]

    def down(self):
        self.thief = sqlite3.connect(self.path, isolation_level=None)
        self.thief.execute("BEGIN EXCLUSIVE")

    def up(self):
        self.thief.close()

    def spoil(self, record):
        return record._replace(severity=2**64)


class Influx(Kind):
    def __init__(self, folder):
        super().__init__(folder)
        self.server = servers.influx(folder / "influx", hours=24)

    def open(self):
        return InfluxSink(self.server.url, self.server.token)

    def seqs(self):
        return self._seqs("health")

    def events(self):
        return len(self._seqs("event"))

    def _seqs(self, measurement):
        return sorted(seq for series in self.server.query(f"SELECT seq FROM {measurement}") for _, seq in series["values"])

    def down(self):
        self.server.kill()

    def up(self):
        self.server.start()

    def spoil(self, record):
        return record._replace(t_ns=record.t_ns - 10 * 86_400 * 10**9)  # older than the server keeps

    def close(self):
        self.server.close()


class Webhook(Kind):
    record = staticmethod(episode)

    def __init__(self, folder):
        super().__init__(folder)
        self.server = servers.Alerts()

    def open(self):
        return WebhookSink(self.server.url)

    def seqs(self):
        return sorted(int(a["labels"]["episode"].partition("@")[2]) for a in self.server.alerts.values())

    def down(self):
        self.server.kill()

    def up(self):
        self.server.start()

    def spoil(self, record):
        return record._replace(asset=self.server.refuses)

    def close(self):
        self.server.kill()


class Topic(Kind):
    record = staticmethod(episode)

    def __init__(self, folder):
        super().__init__(folder)
        servers.need("mosquitto", "mosquitto")
        self.broker = EmbeddedBroker(folder / "broker", "mosquitto")
        self.arrived: set[str] = set()
        self._listen()

    def _listen(self):
        self.ear = self.broker.client("ear", session_s=0, announce=False)
        self.ear.connect()
        self.ear.subscribe(["pdm/v1/+/+/+/+/+/asset/alert", "all"])

    def open(self):
        return TopicSink(self.broker.url, self.folder, "alerts")

    def seqs(self):
        assert self.ear.publish_wait("all", b"")  # it comes to us after all that the broker had by then
        topics = set()
        while "all" not in topics:
            messages = self.ear.receive(1000, 0.1)
            self.ear.ack(messages)
            topics |= {m.topic for m in messages}
            self.arrived |= {json.loads(m.payload)["id"] for m in messages if m.payload}
        return sorted(int(i.split("/")[-3].partition("@")[2]) for i in self.arrived)

    def down(self):
        self.seqs()
        self.ear.close()
        self.broker.kill()

    def up(self):
        self.broker.restart()
        self._listen()

    def spoil(self, record):
        return record._replace(asset="nowhere")

    def close(self):
        self.ear.close()
        self.broker.close()


class Archived(Kind):
    def __init__(self, folder):
        super().__init__(folder)
        self.place, self.aside = folder / "archive", folder / "aside"

    @staticmethod
    def record(seq):
        samples = np.full((2, 16), seq, np.float32)
        return Raw(ASSET, STREAM, EPOCH, seq, "alarm", encode(Window(STREAM, EPOCH, seq, 0, T0_NS + seq * 10**9, 1000.0, ("h", "v"), ("g", "g"), samples)))

    def open(self):
        return ArchiveSink(Settings(archive_url=f"file:{self.place}"))

    def seqs(self):
        return sorted(w.seq for _, w in Archive(f"file:{self.place}").read())

    def down(self):
        if self.place.exists():
            self.place.rename(self.aside)
        self.place.write_text("a disk that is not mounted")

    def up(self):
        self.place.unlink()
        if self.aside.exists():
            self.aside.rename(self.place)

    def spoil(self, record):
        return record._replace(payload=b"\xff")


class Postgres(Kind):
    def __init__(self, folder):
        super().__init__(folder)
        if not (found := postgres_kinds()):
            pytest.skip("no PostgreSQL: pip install 'predmaint[embedded]'")
        self.server = shared_postgres(found[0])
        self.url = self.server.new_database(f"s{uuid.uuid4().hex}")

    def open(self):
        return PostgresSink(self.url)

    def ask(self, sql):
        import psycopg

        with psycopg.connect(self.url) as db:
            return [n for (n,) in db.execute(sql)]

    def seqs(self):
        return self.ask("SELECT seq FROM pdm.verdict ORDER BY seq")

    def events(self):
        return self.ask("SELECT count(*) FROM pdm.event")[0]

    def down(self):
        self.server.kill()

    def up(self):
        self.server.start()

    def spoil(self, record):
        return record._replace(fault="nul \0")


class BigQuery(Kind):
    def __init__(self, folder):
        super().__init__(folder)
        if not bigquery_environment():
            pytest.skip(NO_BIGQUERY)
        self.server, self.dataset = shared_bigquery(), f"s{uuid.uuid4().hex}"

    def open(self):
        return BigQuerySink(self.server.url(self.dataset))

    def seqs(self):
        return [n for (n,) in self.server.ask(f"SELECT seq FROM {self.dataset}.verdict ORDER BY seq")]

    def events(self):
        return self.server.ask(f"SELECT count(*) FROM {self.dataset}.event")[0][0]

    def down(self):
        self.server.kill()

    def up(self):
        self.server.start()

    def spoil(self, record):
        return record._replace(severity=2**63)


KINDS = [Sqlite, Influx, Postgres, BigQuery, Webhook, Topic, Archived]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request, tmp_path):
    kind = request.param(tmp_path)
    yield kind
    kind.close()


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "data/journal.db")
    yield journal
    journal.close()


def fill(journal, records):
    "Commit records of any kind."
    kinds = {name: [r for r in records if isinstance(r, kind)] for name, kind in (("rows", Row), ("events", Event), ("raw", Raw))}
    journal.commit([Group(**kinds, marks={(r.asset, r.stream, r.epoch): Mark(r.epoch, r.seq) for r in kinds["rows"]})])


class Spoiling:
    "A reader that spoils some of the records."

    def __init__(self, reader, spoil, seqs):
        self.reader, self.spoil, self.seqs = reader, spoil, seqs

    def read(self, *args):
        return [self.spoil(r) if r.seq in self.seqs else r for r in self.reader.read(*args)]

    def __getattr__(self, name):
        return getattr(self.reader, name)


@pytest.fixture
def carry(kind, journal, tmp_path):
    "A function that makes a runner from the journal to a sink of the kind; the same cursor each time."
    made = []

    def make(batch=10, spoiled=()):
        sink = kind.open()
        sink.batch = batch
        reader = JournalReader(journal.path)
        made.append(Runner(Spoiling(reader, kind.spoil, spoiled) if spoiled else reader, sink, Cursor(tmp_path / "cursors/cursor"), DeadLetters(tmp_path / "refused.db")))
        return made[-1]

    yield make
    for runner in made:
        runner.sink.close()
        runner.reader.close()


def finish(runner):
    while runner.turn():
        pass


def test_records_written_twice_stand_once(kind):
    sink = kind.open()
    records = [kind.record(0), kind.record(1)] + ([event(0)] if {Row, Event} <= set(sink.takes) else [])
    for _ in range(3):
        sink.write(records)
    sink.close()
    assert kind.seqs() == [0, 1] and kind.events() in (1, None)


def test_a_kill_between_write_and_cursor_loses_and_doubles_nothing(kind, journal, carry):
    fill(journal, [kind.record(s) for s in range(25)])
    runner = carry()
    state = runner.cursor.path
    runner.turn()
    runner.sink.close()  # a kill cuts its connections
    state.unlink(missing_ok=True)  # as if the power went before the cursor was moved
    runner = carry()
    finish(runner)
    assert kind.seqs() == list(range(25))
    assert Cursor(state).done == journal.last_id()


def test_a_store_that_is_down_at_start_gets_everything_when_it_is_there(kind, journal, carry):
    fill(journal, [kind.record(s) for s in range(15)])
    kind.down()
    runner = carry()
    for _ in range(2):
        with pytest.raises(PartMissing):
            runner.turn()
    assert runner.cursor.done == 0
    kind.up()
    finish(runner)
    assert kind.seqs() == list(range(15))


def test_a_store_that_goes_away_in_between_gets_everything_when_it_is_back(kind, journal, carry):
    fill(journal, [kind.record(s) for s in range(30)])
    runner = carry()
    runner.turn()
    kind.down()
    with pytest.raises(PartMissing):
        runner.turn()
    fill(journal, [kind.record(s) for s in range(30, 40)])
    kind.up()
    finish(runner)
    assert kind.seqs() == list(range(40))


def test_one_record_that_the_store_refuses_is_a_dead_letter_and_the_others_are_stored(kind, journal, carry, tmp_path):
    fill(journal, [kind.record(s) for s in range(25)])
    runner = carry(spoiled={3, 17})
    finish(runner)
    letters = DeadLetters(tmp_path / "refused.db").read(runner.sink.name)
    assert kind.seqs() == [s for s in range(25) if s not in (3, 17)]
    assert sorted(r.seq for r in letters) == [3, 17] and all(r.reason not in ("", "invalid") and r.detail for r in letters)
    assert runner.cursor.done == journal.last_id()
    assert runner.metrics.registry.get_sample_value("pdm_sink_dead_letters_total", {"sink": runner.sink.name, "reason": letters[0].reason}) == 2


def test_another_journal_is_written_from_its_beginning(kind, journal, carry, tmp_path):
    fill(journal, [kind.record(s) for s in range(3)])
    Cursor(tmp_path / "cursors/cursor").move(10**6)
    finish(carry())
    assert kind.seqs() == [0, 1, 2]


def test_after_a_long_outage_live_records_and_the_backlog_take_turns(kind, journal, carry):
    fill(journal, [kind.record(s) for s in range(200)])
    runner = carry()
    runner.turn()
    runner.turn()
    if runner.sink.ordered:
        assert kind.seqs() == list(range(20))
    else:
        assert kind.seqs() == [*range(10), *range(190, 200)]  # the newest first
        fill(journal, [kind.record(s) for s in range(200, 205)])
        runner.turn()
        assert kind.seqs() == [*range(10), *range(190, 205)]
    finish(runner)
    n = 200 if runner.sink.ordered else 205
    assert kind.seqs() == list(range(n)) and runner.cursor.ahead == []


def test_nothing_is_connected_before_it_is_needed_and_init_can_be_repeated(kind):
    kind.down()
    sink = kind.open()
    kind.up()
    sink.init()
    assert sink.init() == []
    sink.close()


# The runner alone: a store in memory, and failures wherever they can be


class Memory:
    name, takes, batch, ordered, pause_s = "memory", (Row, Event), 3, False, 0.0

    def __init__(self):
        self.seqs: list[int] = []

    def init(self):
        return []

    def write(self, rows):
        self.seqs += [r.seq for r in rows]

    def close(self): ...


@effort(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.tuples(st.just("commit"), st.integers(1, 60)), st.tuples(st.just("turn"), st.integers(1, 4)),
                          st.tuples(st.sampled_from(["down", "killed before the write", "killed after the write"]), st.just(1))), max_size=30))
def test_whatever_fails_and_whenever_it_is_killed_every_record_arrives_and_the_cursor_is_one_number(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("steps")

    class Killed(BaseException):
        pass

    class Failing(Memory):
        failure: BaseException | None = None
        after = False

        def write(self, rows):
            failure, self.failure = self.failure, None
            if failure is None or self.after:
                self.seqs += [r.id for r in rows]
            if failure is not None:
                raise failure

    sink, n = Failing(), 0
    with Journal(folder / "journal.db") as journal:
        def new():
            return Runner(journal, sink, Cursor(folder / "cursor"), DeadLetters(folder / "refused.db"))

        runner = new()
        for what, count in steps:
            if what == "commit":
                fill(journal, [row(s) if s % 5 else event(s) for s in range(n, n + count)])
                n += count
            elif what == "turn":
                for _ in range(count):
                    runner.turn()
            else:
                sink.failure, sink.after = (PartMissing("no") if what == "down" else Killed()), what.endswith("after the write")
                try:
                    runner.turn()
                except PartMissing:
                    pass
                except Killed:
                    runner = new()
                sink.failure = None
            claimed = [(0, runner.cursor.done), *runner.cursor.ahead]
            assert {i for after, upto in claimed for i in range(after + 1, upto + 1)} <= set(sink.seqs)
        finish(runner)
    assert set(sink.seqs) == set(range(1, n + 1))
    assert (folder / "cursor").read_text() == f"{n} of {runner.cursor.ident}"


def test_live_records_are_not_starved_by_a_backlog_nor_the_backlog_by_them(journal, tmp_path):
    fill(journal, [row(s) for s in range(300)])
    sink = Memory()
    runner = Runner(JournalReader(journal.path), sink, Cursor(tmp_path / "cursors/cursor"), DeadLetters(tmp_path / "refused.db"))
    for n in range(300, 400):  # one arrives while three are written
        runner.turn()
        fill(journal, [row(n)])
    assert max(sink.seqs) >= 396
    assert runner.cursor.done >= 140
    runner.reader.close()


def test_a_sink_that_needs_order_gets_it_after_an_outage(journal, tmp_path):
    fill(journal, [row(s) for s in range(300)])
    sink = Memory()
    sink.ordered = True
    runner = Runner(JournalReader(journal.path), sink, Cursor(tmp_path / "cursors/cursor"), DeadLetters(tmp_path / "refused.db"))
    finish(runner)
    assert sink.seqs == list(range(300))
    runner.reader.close()


def test_a_cursor_passes_over_what_its_sink_does_not_take(journal, tmp_path):
    fill(journal, [*(row(s) for s in range(50)), event(50), *(row(s) for s in range(51, 60))])
    sink = Memory()
    sink.takes = (Event,)
    runner = Runner(JournalReader(journal.path), sink, Cursor(tmp_path / "cursors/cursor"), DeadLetters(tmp_path / "refused.db"))
    finish(runner)
    runner.cursor.save()
    assert sink.seqs == [50] and slowest(tmp_path / "cursors", ["cursor"], journal.ident) == journal.last_id()
    runner.reader.close()


@pytest.mark.parametrize("pause_s", [0.01, 3600])
def test_a_cursor_that_passed_over_the_last_records_says_so_although_nothing_comes_after_them(journal, tmp_path, monkeypatch, pause_s):
    monkeypatch.setattr(runner_module, "_LAZY_S", 0.5)
    fill(journal, [row(s) for s in range(5)])
    sink = Memory()
    sink.takes, sink.pause_s = (Event,), pause_s
    runner = Runner(JournalReader(journal.path), sink, Cursor(tmp_path / "cursors/cursor"), DeadLetters(tmp_path / "refused.db")).start()
    wait_for(lambda: slowest(tmp_path / "cursors", ["cursor"], journal.ident) == 5)
    runner.stop()


def test_what_the_journal_gave_up_is_counted_and_holds_nothing_up(journal, tmp_path):
    fill(journal, [row(s) for s in range(20)])
    with sqlite3.connect(journal.path) as db:
        db.execute("DELETE FROM verdict WHERE id <= 5")
    sink = Memory()
    runner = Runner(JournalReader(journal.path), sink, Cursor(tmp_path / "cursors/cursor"), DeadLetters(tmp_path / "refused.db"))
    finish(runner)
    assert sorted(sink.seqs) == list(range(5, 20)) and runner.cursor.done == 20
    assert runner.metrics.registry.get_sample_value("pdm_sink_missed_rows_total", {"sink": "memory"}) == 5
    runner.reader.close()


def test_a_setting_that_is_wrong_makes_no_dead_letters(journal, tmp_path):
    fill(journal, [row(0)])

    class Misled(Memory):
        def write(self, rows):
            raise InvalidConfig("no such place")

    runner = Runner(JournalReader(journal.path), Misled(), Cursor(tmp_path / "cursors/cursor"), DeadLetters(tmp_path / "refused.db"))
    with pytest.raises(InvalidConfig):
        runner.turn()
    assert DeadLetters(tmp_path / "refused.db").read() == [] and runner.cursor.done == 0
    runner.reader.close()


def test_a_cursor_of_the_first_version_is_read(tmp_path):
    (tmp_path / "cursors").mkdir()
    (tmp_path / "cursors/cursor").write_text("41")
    assert Cursor(tmp_path / "cursors/cursor").done == 41


def test_a_cursor_that_was_before_idents_goes_on_and_holds_the_journal_until_then(journal, tmp_path):
    fill(journal, [row(s) for s in range(6)])
    (tmp_path / "cursors").mkdir()
    (tmp_path / "cursors/cursor").write_text("4")
    assert slowest(tmp_path / "cursors", ["cursor"], journal.ident) == 0
    sink = Memory()
    runner = Runner(JournalReader(journal.path), sink, Cursor(tmp_path / "cursors/cursor"), DeadLetters(tmp_path / "refused.db"))
    finish(runner)
    assert sink.seqs == [4, 5] and slowest(tmp_path / "cursors", ["cursor"], journal.ident) == 6
    runner.reader.close()


@pytest.mark.parametrize("n", [2, 5, 9])
def test_a_cursor_of_a_journal_that_is_gone_passes_over_nothing_of_the_next_one(tmp_path, n):
    sink, cursor = Memory(), tmp_path / "cursors/cursor"
    for path, count in ((tmp_path / "lost.db", 5), (tmp_path / "next.db", n)):
        with Journal(path) as journal:
            fill(journal, [row(s) for s in range(count)])
            assert slowest(tmp_path / "cursors", ["cursor"], journal.ident) == 0  # nothing of it may be removed yet
        sink.seqs.clear()
        runner = Runner(JournalReader(path), sink, Cursor(cursor), DeadLetters(tmp_path / "refused.db"))
        finish(runner)
        assert sorted(sink.seqs) == list(range(count)) and slowest(tmp_path / "cursors", ["cursor"], runner.reader.ident) == count
        runner.reader.close()


def test_a_sink_that_the_agent_was_not_told_of_holds_the_journal_until_it_has_stood_still_for_long(journal, tmp_path):
    fill(journal, [row(s) for s in range(6)])
    settings, folder = Settings(state_dir=tmp_path / "data"), tmp_path / "data/cursors"
    for name in ("sqlite", "warehouse.of-yesterday"):
        Cursor(folder / name).belong(journal.ident, 6)
    Cursor(folder / "sqlite").add(0, 6)
    assert slowest(folder, ["sqlite"], journal.ident) == 0
    def start_and_stop():
        for runner in start_runners(settings, journal.path, SinkMetrics(), threading.Event()):
            runner.stop()

    start_and_stop()  # it may be another service's
    assert slowest(folder, ["sqlite"], journal.ident) == 0
    long_ago = time.time() - 31 * 86_400
    os.utime(folder / "warehouse.of-yesterday", (long_ago, long_ago))
    start_and_stop()
    assert [p.name for p in folder.glob("[!.]*")] == ["sqlite"] and slowest(folder, ["sqlite"], journal.ident) == 6


def test_a_sink_holds_the_journal_from_when_its_runner_is_made(journal, tmp_path):
    fill(journal, [row(0)])
    runner = Runner(JournalReader(journal.path), Memory(), Cursor(tmp_path / "cursors/new"), DeadLetters(tmp_path / "refused.db"))
    assert slowest(tmp_path / "cursors", [], journal.ident) == 0 and (tmp_path / "cursors/new").exists()
    finish(runner)
    assert slowest(tmp_path / "cursors", [], journal.ident) == 1
    runner.reader.close()


def test_a_runner_waits_for_the_write_that_another_one_has_under_way_and_goes_on_behind_it(journal, tmp_path):
    fill(journal, [row(s) for s in range(3)])
    writing, answer = threading.Event(), threading.Event()

    class Slow(Memory):
        def write(self, rows):
            writing.set()
            answer.wait(60)
            super().write(rows)

    def runner(sink):
        return Runner(JournalReader(journal.path), sink, Cursor(tmp_path / "cursors/memory"), DeadLetters(tmp_path / "refused.db"), stop=threading.Event())

    old, new = runner(Slow()).start(), runner(Memory())
    assert writing.wait(10)
    old.stop(0)
    new.start()
    assert "another predmaint sinks runs on this state_dir" in wait_for(lambda: new.failing) and new.sink.seqs == []
    answer.set()
    fill(journal, [row(3)])
    wait_for(lambda: new.cursor.done == 4 and not new.failing)
    new.stop()
    assert old.sink.seqs + new.sink.seqs == [0, 1, 2, 3] and new.sink.seqs == [3]


@pytest.mark.parametrize("text", ["x", "", "-1", "5 6", "5 4 9", "5 9 9", "5 7 9 8 12", "5 of", "5 of x"])
def test_a_cursor_that_is_none_says_what_to_do(tmp_path, text):
    (tmp_path / "cursors").mkdir()
    (tmp_path / "cursors/cursor").write_text(text)
    with pytest.raises(InvalidConfig, match="delete it"):
        Cursor(tmp_path / "cursors/cursor")


# SQLite


def test_what_is_stored_is_what_was_journaled(journal, tmp_path):
    fill(journal, [row(0)])
    store = SqliteStore(tmp_path / "store.db")
    store.write(journal.read())
    with sqlite3.connect(tmp_path / "store.db") as db:
        found = db.execute("SELECT score, alarm, fault, indicators, embedding, flags, engine FROM verdict").fetchone()
    assert found[:3] == (1.5, 0, "outer_race") and json.loads(found[3]) == {"rms_h": 0.2}
    assert np.array_equal(np.frombuffer(found[4], np.float32), [0, 1, 2]) and found[5:] == ("late", "triton")
    store.close()


def test_a_store_of_the_time_before_versions_is_brought_up_to_date(tmp_path):
    store = SqliteStore(tmp_path / "store.db")
    store.write([row(0)])
    with sqlite3.connect(tmp_path / "store.db") as db:  # as the first version left it
        for column in ("asset_severity", "worst"):
            db.execute(f"ALTER TABLE verdict DROP COLUMN {column}")
        db.execute("PRAGMA user_version = 0")
    store.close()
    store.write([row(1)._replace(asset_severity=2, worst="current")])
    with sqlite3.connect(tmp_path / "store.db") as db:
        assert db.execute("SELECT seq, asset_severity, worst FROM verdict ORDER BY seq").fetchall() == [(0, 0, ""), (1, 2, "current")]
    store.close()


def test_the_store_forgets_what_is_older_than_it_shall_keep(tmp_path):
    day = 86_400 * 10**9
    store = SqliteStore(tmp_path / "store.db", keep_days=10)
    for d in range(40):
        store.write([record(100 * d + n)._replace(committed_ns=(20_000 + d) * day + n) for n in range(3) for record in (row, event)])
    store.batch = 1  # a store that was kept longer until now: two of each kind go with each write
    store._keep_ns = 5 * day
    for n in range(3):
        store.write([row(5000 + n)._replace(committed_ns=20_039 * day + 2)])
    store.close()
    with sqlite3.connect(tmp_path / "store.db") as db:
        kept = {t: [n for (n,) in db.execute(f"SELECT seq FROM {t} WHERE seq < 5000 ORDER BY seq")] for t in ("verdict", "event")}
    assert kept["verdict"] == kept["event"] == [100 * d + n for d in range(29, 40) for n in range(3)][8:]


def test_dead_letters_stay_up_to_a_number_the_newest_of_them(tmp_path):
    letters = DeadLetters(tmp_path / "refused.db", most=5)
    for n in range(0, 12, 3):
        letters.add([Refused("influx", "verdict", ASSET, STREAM, EPOCH, seq, "", 0, "why", "", seq) for seq in range(n, n + 3)])
    assert [r.seq for r in letters.read()] == [7, 8, 9, 10, 11]


def test_a_store_of_a_newer_version_is_left_alone(tmp_path):
    with sqlite3.connect(tmp_path / "store.db") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(PartMissing, match="version 99"):
        SqliteStore(tmp_path / "store.db").write([row(0)])


def test_a_store_refuses_what_it_can_not_hold(tmp_path):
    with pytest.raises(InvalidInput, match="can't hold") as e:
        SqliteStore(tmp_path / "store.db").write([row(0), row(1)._replace(severity=2**64)])
    assert e.value.reason == "unstorable"


# InfluxDB


def legible(name):
    "Whether a server can read the client's line: it takes a backslash and what follows for one, and the client doubles none before what it escapes."
    return not re.search(r"(?<!\\)(?:\\\\)*\\[ ,=]|(?<!\\)(?:\\\\)+$", name)


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8).filter(legible)
LEVELS = NAMES.filter(lambda name: "/" not in name)
FIELDS = NAMES.filter(lambda name: not name.endswith("\\"))
REALS = st.floats()


@given(st.tuples(*[LEVELS] * 5), NAMES,
       st.lists(REALS, min_size=5, max_size=5), st.dictionaries(FIELDS, REALS, max_size=3), st.dictionaries(FIELDS, REALS, max_size=3), st.integers(0, 2**63 - 1))
def test_a_verdicts_line_is_the_one_that_the_client_would_make(levels, stream, numbers, indicators, conditions, n):
    r = Row("/".join(levels), stream, n, n, n, n, *numbers, True, 2, "running", "none", None, False, True, {"h": 0.5}, indicators, conditions,
            np.zeros(2, np.float32), "ab", "triton", asset_severity=1)
    p = Point("health")
    for name, value in zip(("enterprise", "site", "area", "line", "asset"), levels, strict=True):
        p.tag(name, value)
    p.tag("stream", stream).time(n)
    for name, value in zip(("score", "p_value", "p_unadapted", "offset_db", "threshold"), numbers, strict=True):
        p.field(name, value)
    for name, value in dict(alarm=1.0, severity=2.0, asset_severity=1.0, running=1.0, supported=0.0, extrapolating=1.0, channel_h=0.5).items():
        p.field(name, value)
    known = set(p._fields) | {"epoch", "seq"}
    conditions = {f"condition_{k}": v for k, v in conditions.items()}
    for name, value in (indicators | conditions).items():
        p.field(name, value)
    p.field("epoch", n).field("seq", n)
    if known.isdisjoint(indicators):
        lines = Lines()
        assert parts(lines.of(r)) == parts(lines.of(r)) == parts(p.to_line_protocol())


def parts(line):
    "Series, fields by name, time: what is between unescaped spaces, commas and equals signs."
    series, fields, t = split(line, " ")
    return series, {k: float(v.removesuffix("i")) for k, v in (split(f, "=") for f in split(fields, ","))}, t


def split(text, at):
    found, escaped = [""], False
    for c in text:
        if c == at and not escaped:
            found.append("")
        else:
            found[-1] += c
        escaped = c == "\\" and not escaped
    return found


@pytest.fixture
def influx(tmp_path):
    server = servers.Influx(tmp_path / "influx")
    yield server
    server.close()


def test_init_creates_the_database_and_says_so(influx):
    sink = InfluxSink(influx.url, influx.token)
    with pytest.raises(PartMissing, match="predmaint sinks init"):
        sink.write([row(0)])
    assert "created" in sink.init()[0] and sink.init() == []
    sink.write([row(0), event(0)])
    assert influx.query("SHOW MEASUREMENTS")[0]["values"] == [["event"], ["health"]]
    sink.close()


def test_a_wrong_token_names_the_setting_and_is_not_shown(influx):
    for call in (lambda s: s.write([row(0)]), lambda s: s.init()):
        with pytest.raises(PartMissing, match="influx_token") as e:
            call(InfluxSink(influx.url, "wr0ng"))
        assert "wr0ng" not in str(e.value)


def test_numbers_arrive_as_they_were_and_what_is_not_finite_is_left_out(influx):
    sink = InfluxSink(influx.url, influx.token)
    sink.init()
    sink.write([row(0)._replace(stream="a b,c=d\\", p_value=float("nan"), score=0.1 + 0.2, conditions={"speed, rpm": float("inf"), "load=n": 1e-300, "odd\\": 1.0})])
    (series,) = influx.query("SELECT * FROM health")
    found = dict(zip(series["columns"], series["values"][0], strict=True))
    assert found["score"] == 0.1 + 0.2 and found["condition_load=n"] == 1e-300 and found["asset"] == "fan" and found["epoch"] == EPOCH
    assert not {"p_value", "condition_speed, rpm"} & set(found)
    sink.close()


def test_two_events_at_the_same_instant_are_two_points(influx):
    sink = InfluxSink(influx.url, influx.token)
    sink.init()
    sink.write([event(0), event(0)._replace(episode="fan@2"), event(0)._replace(kind="diagnosed", stream="", seq=-1, details={"fault": 'a "b" \\'})])
    assert sum(len(s["values"]) for s in influx.query("SELECT seq FROM event GROUP BY *")) == 3
    (series,) = influx.query("SELECT fault FROM event WHERE kind = 'diagnosed'")
    assert series["values"][0][1] == 'a "b" \\'
    sink.close()


# Alerts


@pytest.fixture
def webhook():
    server = servers.Alerts()
    yield server
    server.kill()


LIFE = [event(0), event(1)._replace(kind="escalated", details={"severity": 3, "reasons": ["louder"]}), event(2)._replace(kind="diagnosed", details={"fault": "cage"}),
        event(3)._replace(kind="cleared")]
LIFE = [e._replace(committed_ns=e.t_ns + 100) for e in LIFE]


def standing(server, t_ns):
    "Names and severities of the alerts that stand at that time."
    now = datetime.fromtimestamp(t_ns / 1e9, UTC)
    return sorted((a["labels"]["alertname"], a["labels"]["severity"]) for a in server.alerts.values() if datetime.fromisoformat(a["endsAt"]) > now)


def test_an_alarm_that_gets_worse_is_one_alert_at_a_time_and_ends_when_it_is_cleared(webhook):
    sink = WebhookSink(webhook.url)
    stands = []
    for e in LIFE:
        sink.write([e])
        stands.append(standing(webhook, e.committed_ns))
    assert stands[0] == [("MachineAlarm", "act")] and stands[1] == [("MachineAlarm", "stop_advised")]
    assert stands[2] == [("FaultNamed", "watch"), ("MachineAlarm", "stop_advised")] and stands[3] == [("FaultNamed", "watch")]
    before = dict(webhook.alerts)
    sink.write(LIFE)  # delivered again: the same alerts
    assert webhook.alerts == before


def test_nobody_is_called_for_what_is_shelved_or_worked_on_but_the_end_is_always_told(webhook):
    sink = WebhookSink(webhook.url)
    sink.write([e._replace(details={**e.details, why: True}) for e in LIFE[:3] for why in ("shelved", "maintenance")])
    sink.write([LIFE[0]._replace(kind=kind) for kind in ("acknowledged", "labelled", "maintenance_began")])
    assert webhook.alerts == {}
    sink.write([LIFE[0], LIFE[3]._replace(details={"shelved": True})])
    assert webhook.alerts and standing(webhook, LIFE[3].committed_ns) == []


def test_a_server_that_sends_elsewhere_has_not_taken_the_alert(webhook):
    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(302)
            self.send_header("Location", webhook.url)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.handle_request).start()
        with pytest.raises(PartMissing, match="302"):
            WebhookSink(f"http://127.0.0.1:{server.server_port}").write([event(0)])


def test_alertmanager_takes_the_alerts_and_ends_them(tmp_path):
    (program,) = servers.need("prometheus-alertmanager", "prometheus-alertmanager")
    port = free_port()
    (tmp_path / "am.yml").write_text("route: {receiver: nobody}\nreceivers: [{name: nobody}]\n")
    with Child([program, f"--config.file={tmp_path}/am.yml", f"--storage.path={tmp_path}/am", f"--web.listen-address=127.0.0.1:{port}",
                "--cluster.listen-address="], tmp_path / "am.log") as child:
        child.wait_ready(lambda: servers.answers(f"http://127.0.0.1:{port}/-/ready"))
        sink = WebhookSink(f"http://127.0.0.1:{port}")

        def firing():
            return [a["labels"] for a in json.load(urlopen(f"http://127.0.0.1:{port}/api/v2/alerts", timeout=5))]

        sink.write(LIFE[:2] * 2)
        assert [(a["alertname"], a["severity"]) for a in firing()] == [("MachineAlarm", "stop_advised")]
        sink.write(LIFE[3:])
        assert firing() == []
        for t_ns in (0, 4 * 10**18):  # a sensor's clock that was never set, and one of the year 2096
            raised, cleared = (e._replace(t_ns=t_ns, episode=f"fan@{t_ns}") for e in (LIFE[0], LIFE[3]))
            sink.write([raised])
            assert [a["episode"] for a in firing()] == [raised.episode]
            sink.write([cleared])
            assert firing() == []


def test_a_sensors_clock_moves_no_alert(webhook):
    for e in LIFE:
        times = {tuple((a["startsAt"], a["endsAt"]) for a in alerts_of(e._replace(t_ns=t_ns))) for t_ns in (0, e.t_ns, 2**63 - 1)}
        assert len(times) == 1
    assert alerts_of(LIFE[0]._replace(t_ns=0))[0]["annotations"]["window_end"] == "1970-01-01T00:00:00Z"


def test_a_new_place_for_alerts_hears_of_what_comes_next_and_an_old_one_with_another_password_of_what_it_missed(webhook, journal, tmp_path):
    def run(login, seqs):
        webhook.alerts.clear()
        stop, settings = threading.Event(), Settings(state_dir=tmp_path / "data", alert_urls=(webhook.url.replace("//", f"//{login}@"),))
        runners = start_runners(settings, journal.path, SinkMetrics(), stop)
        fill(journal, [episode(s) for s in seqs])
        wait_for(lambda: not any(s.behind for s in standings(settings)))
        for runner in runners:
            runner.stop()
        return sorted(a["labels"]["episode"] for a in webhook.alerts.values())

    fill(journal, [episode(s) for s in range(5)])
    assert run("ops:one", [5, 6]) == ["fan@5", "fan@6"]
    fill(journal, [episode(7)])
    assert run("ops:two", [8]) == ["fan@7", "fan@8"]


def test_the_id_of_an_alert_on_the_bus_is_no_other_alerts():
    one = event(0)
    others = [one._replace(**{field: value}) for field, value in (("asset", "e/s/a/l/pump"), ("stream", "motor"), ("episode", "fan@2"), ("kind", "cleared"), ("t_ns", 5))]
    assert len({message_of(e)["id"] for e in (one, *others)}) == 6


def test_the_same_place_twice_is_refused_without_the_password():
    for urls, where in ((("mqtt:", "mqtt:"), "the bus"), (("http://a:s3cret@h:9093", "http://b:s3cret@h:9093"), "names h:9093 twice")):
        with pytest.raises(InvalidConfig, match=where):
            sink_names(Settings(broker_url="mqtt://host", alert_urls=urls))


def test_a_broker_url_and_an_alert_url_that_do_not_fit_are_refused():
    with pytest.raises(InvalidConfig, match="webhook"):
        open_sinks(Settings(broker_url="kafka://host:9092", alert_urls=("mqtt:",)))


# The archive


def test_the_archive_is_tidied_up_once_a_day(tmp_path):
    sink = ArchiveSink(Settings(archive_url=f"file:{tmp_path / 'archive'}", archive_suspicious_retention_days=1))
    old = Archived.record(0)
    window = decode(old.payload)
    sink.write([old._replace(payload=encode(replace(window, t0_ns=window.t0_ns - 10 * 86_400 * 10**9)))])
    sink._tidy_s = 0.0  # it is three in the morning
    sink.write([Archived.record(1)])
    assert [w.seq for _, w in Archive(f"file:{tmp_path / 'archive'}").read()] == [1]
    assert sink._tidy_s > time.time()


# The service


def unready(settings):
    "Why the service says that it is not ready; empty when it is."
    try:
        urlopen(f"http://127.0.0.1:{settings.sinks_metrics_port}/readyz", timeout=5).close()
    except HTTPError as e:
        return " ".join(json.load(e)["reasons"])
    except URLError:
        return "nobody answers"
    return ""


def test_the_service_waits_for_the_journal_and_stops_when_told(tmp_path):
    stop, settings = threading.Event(), Settings(state_dir=tmp_path / "data", sinks_metrics_port=free_port())
    service = threading.Thread(target=main, args=(settings, stop))
    service.start()
    wait_for(lambda: "there is no journal" in unready(settings))
    journal = Journal(tmp_path / "data/journal.db")
    fill(journal, [row(s) for s in range(4)])
    wait_for(lambda: not standings(settings)[0].behind)
    assert unready(settings) == ""
    stop.set()
    service.join(10)
    journal.close()
    with sqlite3.connect(tmp_path / "data/store.db") as db:
        assert db.execute("SELECT count(*) FROM verdict").fetchone() == (4,)
    assert not service.is_alive()


@pytest.mark.parametrize("driver,changes", [("psycopg", {"warehouse_url": "postgresql://host/db"}), ("influxdb_client", {"tsdb_url": "influxdb://host/o/b"}),
                                            ("google.cloud.bigquery", {"warehouse_url": "bigquery://project/dataset"}), ("pyarrow", {"archive_url": "file:archive"})])
def test_a_driver_that_is_missing_is_said_at_the_start_and_not_when_a_journal_appears(tmp_path, driver, changes):
    program = ("import sys; from pdm.errors import PdmError; from pdm.config import Settings; from pdm.stream.sinks import main\n"
               f"sys.modules[{driver!r}] = None\n"
               f"try: main(Settings(state_dir='none', sinks_metrics_port=0, **{changes!r}))\n"
               "except PdmError as e: print(e); sys.exit(e.exit_code)")
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2 and "pip install 'predmaint[" in ended.stdout, ended.stderr


def test_lines_of_ever_new_shapes_fill_no_memory():
    lines = Lines()
    for n in range(25_000):
        lines.of(row(0)._replace(conditions={f"c{n}": 1.0}))
    assert len(lines._forms) <= 10_000 and "condition_c24999=1.0" in lines.of(row(0)._replace(conditions={"c24999": 1.0}))


def test_the_service_ends_although_a_store_takes_a_connection_and_never_answers(journal, tmp_path):
    fill(journal, [row(s) for s in range(6000)])  # more than one request, so that one is sent while the next is made
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = {**os.environ, "PREDMAINT_TSDB_URL": f"influxdb://127.0.0.1:{silent.getsockname()[1]}/o/b", "PREDMAINT_STATE_DIR": str(tmp_path / "data"),
                       "PREDMAINT_SINKS_METRICS_PORT": "0"}
        program = "from pdm.config import load_settings; from pdm.stream.sinks import main; main(load_settings())"
        with subprocess.Popen([sys.executable, "-c", program], env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL) as service:
            try:
                silent.settimeout(30)
                connection = silent.accept()[0]
                connection.recv(1)  # the write is under way
                service.terminate()
                assert service.wait(12) == 0  # an answer would be waited for 20 s
                connection.close()
            finally:
                service.kill()


def test_the_status_of_the_sinks_is_told_to_people_and_to_programs(journal, tmp_path, monkeypatch):
    monkeypatch.setenv("PREDMAINT_STATE_DIR", str(tmp_path / "data"))
    fill(journal, [row(s) for s in range(7)])
    settings = Settings(state_dir=tmp_path / "data")
    cursor = Cursor(tmp_path / "data/cursors/sqlite")
    cursor.belong(journal.ident, 7)
    cursor.add(0, 5)
    dead_letters(settings).add([Refused("sqlite", "verdict", ASSET, STREAM, EPOCH, seq, "", 0, "unstorable", "", seq) for seq in range(2)])
    told = CliRunner().invoke(app, ["sinks", "status", "--json"])
    assert json.loads(told.stdout) == [{"name": "sqlite", "done": 5, "behind": 2, "dead_letters": {"unstorable": 2}}]
    assert "2 unstorable" in CliRunner().invoke(app, ["sinks", "status"]).stdout
    cursor.belong(journal.ident + 1, 7)  # of a journal that is gone
    assert json.loads(CliRunner().invoke(app, ["sinks", "status", "--json"]).stdout)[0]["behind"] == 7


def test_the_names_of_the_sinks_are_those_of_their_classes(tmp_path):
    everything = Settings(state_dir=tmp_path, tsdb_url="influxdb://host/plant/pdm", archive_url=f"file:{tmp_path}/archive",
                          alert_urls=("mqtt:", "http://a:9093", "http://b:9093"), broker_url="mqtt://host")
    assert sink_names(everything) == [s.name for s in open_sinks(everything)] and len(set(sink_names(everything))) == 5
    settings = Settings(state_dir=tmp_path)
    assert list(init_all(settings)) and list(init_all(settings)) == ["sqlite: ready, nothing to do"]
