"The journal: what is committed stays, what is not was never there, and nothing is counted twice."

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdm.errors import InvalidConfig, PartMissing
from pdm.stream.journal import DeadLetter, Event, Group, Journal, JournalDamaged, JournalFull, JournalReader, Mark, Raw, Row
from pdm.stream.salvage import salvage

DAY_NS = 86_400 * 10**9
NOW_NS = 1_800_000_000 * 10**9
KEY = ("acme/lyon/hall-2/line-1/fan-1", "vibration")


def row(seq: int, t_ns: int | None = None, epoch: int = 7, **changes) -> Row:
    t = 1000 * seq if t_ns is None else t_ns
    r = Row(*KEY, epoch, seq, t, t, 0.5, 0.5, 0.5, 0.0, 2.0, False, 0, "running", "none", None, True, False, {"h": 0.5}, {"rms_h": 0.5}, {}, np.arange(3, dtype=np.float32),
            "ab" * 32, "inprocess")
    return r._replace(**changes)


def event(seq: int) -> Event:
    return Event(*KEY, "fan-1@7", "raised", 1000 * seq, 7, seq)


def raw(seq: int) -> Raw:
    return Raw(*KEY, 7, seq, "alarm", bytes(100))


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path / "journal.db") as j:
        yield j


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=120))
def test_the_watermark_is_the_end_of_what_is_done_without_a_gap(arrivals):
    mark = Mark(1)
    for seq in arrivals:
        mark.add(seq)
    done = set(arrivals)
    expected = next(n for n in range(-1, 32) if n + 1 not in done)
    assert mark.watermark == expected
    assert mark.sparse == {s for s in done if s > expected}
    assert all(mark.seen(s) == (s in done) for s in range(32))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60))
def test_a_window_is_either_done_or_lost_and_never_both(messages):
    mark, done, oldest_so_far = Mark(1), set(), 0
    for seq, back in messages:
        oldest = max(oldest_so_far, seq - back)
        if seq < oldest or mark.seen(seq):
            continue
        oldest_so_far = oldest
        mark.forgo(oldest)
        mark.add(seq)
        done.add(seq)
    assert mark.lost == len(set(range(oldest_so_far)) - done)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=80))
def test_time_stamps_are_unique_in_a_stream(tmp_path_factory, times):
    with Journal(tmp_path_factory.mktemp("j") / "journal.db") as journal:
        for start in range(0, len(times), 7):
            journal.commit([Group([row(start + i, t) for i, t in enumerate(times[start:start + 7])])])
        stored = [r.t_ns for r in journal.verdicts(*KEY)]
    assert len(set(stored)) == len(times) == len(stored)
    assert all(s >= t for s, t in zip(stored, times, strict=True))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["raised", "escalated", "cleared"]), st.sampled_from(["fan-1@7", "fan-1@8"])), min_size=1, max_size=60),
       st.integers(1, 9))
def test_every_event_that_happened_is_journaled_under_a_key_of_its_own(tmp_path_factory, happened, together):
    events = [event(seq)._replace(t_ns=t, kind=kind, episode=episode) for seq, (t, kind, episode) in enumerate(happened)]
    path = tmp_path_factory.mktemp("j") / "journal.db"
    for start in range(0, len(events), together):  # a restart between the commits: what is taken stands in the table
        with Journal(path) as journal:
            journal.commit([Group(events=[e]) for e in events[start:start + together]])
    with JournalReader(path) as reader:
        stored = reader.events()
    assert [e._replace(t_ns=0, id=0, committed_ns=0) for e in stored] == [e._replace(t_ns=0) for e in events]
    assert len({(e.episode, e.kind, e.t_ns) for e in stored}) == len(events)
    assert all(e.t_ns <= s.t_ns < e.t_ns + len(events) for s, e in zip(stored, events, strict=True))


def test_what_is_written_is_read_back_as_it_was(journal):
    r = row(3, flags=("late", "clock_suspect"), threshold=float("inf"), p_unadapted=float("nan"), episode="fan-1@7", fault="undetermined", conditions={"speed_rpm": 1500.5})
    e = Event(*KEY, "fan-1@7", "raised", 3000, 7, 3, {"severity": 2, "why": "ß"})
    d = DeadLetter("pdm/v1/x", "unreadable", "d" * 900, bytes(range(256)) * 40, 10240, *KEY, 7, 4)
    mark = Mark(7, 3, {5, 9}, 3, 2, 1)
    now = journal.commit([Group([r], [e], [d], {(*KEY, 7): mark}, {KEY: ("digest", {"a": [1, 2.5, None]})})])
    got, event = journal.read()
    assert np.array_equal(got.embedding, r.embedding) and np.isnan(got.p_unadapted)
    plain = {"embedding": None, "p_unadapted": None}
    assert got._replace(**plain) == r._replace(id=1, committed_ns=now, **plain)
    assert event == e._replace(id=2, committed_ns=now)
    (letter,) = journal.dead_letters()
    assert (letter.reason, letter.size, letter.seq, len(letter.payload), len(letter.detail)) == ("unreadable", 10240, 4, 4096, 500)
    assert vars(journal.marks()[(*KEY, 7)]) == vars(mark)
    assert journal.states() == {KEY: ("digest", {"a": [1, 2.5, None]})}


def test_ids_never_come_twice_not_even_after_deletion(tmp_path):
    with Journal(tmp_path / "j.db") as journal:
        journal.commit([Group([row(0), row(1)])])
        journal._db.execute("DELETE FROM verdict")
    with Journal(tmp_path / "j.db") as journal:
        journal.commit([Group([row(2)])])
        assert [r.id for r in journal.read()] == [3]


def test_a_commit_that_fails_leaves_nothing_and_the_next_one_works(journal):
    journal.commit([Group([row(0)])])
    with pytest.raises(sqlite3.IntegrityError):
        journal.commit([Group([row(1)], marks={(*KEY, 7): Mark(7, 1)}), Group([row(2, model="cd" * 32), row(3, severity=None)])])
    assert journal.counts()["verdict"] == 1 and not journal.marks() and journal.last_id() == 1
    journal.commit([Group([row(2, model="cd" * 32)])])
    assert [(r.id, r.seq, r.model) for r in journal.read(1)] == [(2, 2, "cd" * 32)]


def test_what_is_under_way_is_not_seen_even_by_who_reads_over_the_same_connection(journal):
    def commit():
        for n in range(200):
            journal.commit([Group([row(10 * n + i) for i in range(10)], states={KEY: ("d", {"n": 10 * n + 10})})])

    with ThreadPoolExecutor(1) as pool:
        committed = pool.submit(commit)
        while not committed.done():
            seen = journal.counts()["verdict"]
            state = journal.states().get(KEY, ("d", {"n": 0}))[1]["n"]
            assert seen % 10 == 0 and state >= seen
        committed.result()


def test_one_agent_writes_and_anyone_reads(journal):
    with pytest.raises(InvalidConfig, match="another agent"):
        Journal(journal.path)
    with JournalReader(journal.path) as reader:
        assert reader.read() == []
        journal.commit([Group([row(0)])])
        assert [r.seq for r in reader.read()] == [0]
        with pytest.raises(sqlite3.OperationalError):
            reader._db.execute("DELETE FROM verdict")


def test_a_journal_of_a_newer_schema_is_left_alone(tmp_path):
    with Journal(tmp_path / "j.db") as journal:
        journal._db.execute("PRAGMA user_version = 99")
    with pytest.raises(InvalidConfig, match="schema 99"):
        Journal(tmp_path / "j.db")


WRITER = """
import sys
sys.path.insert(0, {tests!r})
from test_journal import KEY, row
from pdm.stream.journal import Group, Journal, Mark
journal, mark = Journal({file!r}), Mark(7)
for n in range(0, 10**9, 8):
    for seq in range(n, n + 8):
        mark.add(seq)
    journal.commit([Group([row(s) for s in range(n, n + 8)], marks={{(*KEY, 7): mark}}, states={{KEY: ("d", {{"seen": n + 8}})}})])
    print(n + 7, flush=True)
"""


def test_a_kill_at_any_moment_keeps_what_was_committed_and_keeps_it_together(tmp_path):
    file, told = tmp_path / "journal.db", -1
    code = WRITER.format(tests=os.path.dirname(__file__), file=str(file))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as writer:
        for _ in range(60):
            told = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        told = max([told, *(int(line) for line in writer.stdout if line.endswith("\n"))])
    with Journal(file) as journal:
        seqs = [r.seq for r in journal.verdicts(*KEY)]
        assert seqs == list(range(len(seqs))) and len(seqs) % 8 == 0
        assert len(seqs) > told  # what was told is there
        assert journal.marks()[(*KEY, 7)].watermark == seqs[-1]
        assert journal.states()[KEY][1] == {"seen": len(seqs)}


# ---- the versions of the file

V1 = """
CREATE TABLE stream (id INTEGER PRIMARY KEY, asset TEXT NOT NULL, stream TEXT NOT NULL, UNIQUE (asset, stream));
CREATE TABLE model (id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE);
CREATE TABLE verdict (
    id INTEGER PRIMARY KEY, stream_id INTEGER NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL,
    t_ns INTEGER NOT NULL, t0_ns INTEGER NOT NULL, committed_ns INTEGER NOT NULL,
    score REAL, p_value REAL, p_unadapted REAL, offset_db REAL, threshold REAL,
    alarm INTEGER NOT NULL, severity INTEGER NOT NULL, state TEXT NOT NULL, fault TEXT NOT NULL, episode TEXT,
    supported INTEGER NOT NULL, extrapolating INTEGER NOT NULL,
    channel_scores TEXT NOT NULL, indicators TEXT NOT NULL, conditions TEXT NOT NULL, embedding BLOB NOT NULL,
    model_id INTEGER NOT NULL, engine TEXT NOT NULL, flags TEXT NOT NULL,
    UNIQUE (stream_id, epoch, seq), UNIQUE (stream_id, t_ns));
CREATE TABLE event (
    id INTEGER PRIMARY KEY, stream_id INTEGER NOT NULL, episode TEXT NOT NULL, kind TEXT NOT NULL, t_ns INTEGER NOT NULL,
    epoch INTEGER NOT NULL, seq INTEGER NOT NULL, details TEXT NOT NULL, committed_ns INTEGER NOT NULL,
    UNIQUE (stream_id, episode, kind, t_ns));
CREATE TABLE dead_letter (
    id INTEGER PRIMARY KEY, topic TEXT NOT NULL, asset TEXT NOT NULL, stream TEXT NOT NULL, epoch INTEGER, seq INTEGER,
    reason TEXT NOT NULL, detail TEXT NOT NULL, payload BLOB NOT NULL, size INTEGER NOT NULL, committed_ns INTEGER NOT NULL);
CREATE TABLE mark (
    stream_id INTEGER NOT NULL, epoch INTEGER NOT NULL, started INTEGER NOT NULL, watermark INTEGER NOT NULL, sparse BLOB NOT NULL,
    stepped INTEGER NOT NULL, lost INTEGER NOT NULL, PRIMARY KEY (stream_id, epoch)) WITHOUT ROWID;
CREATE TABLE monitor (stream_id INTEGER PRIMARY KEY, calibration TEXT NOT NULL, state TEXT NOT NULL);
CREATE TABLE counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO counter VALUES ('id', 0);
"""


def journal_of_version_1(file):
    "As pdm wrote it before raw windows and asset alarms: two verdicts, an event, a dead letter, a mark, a monitor's state."
    db = sqlite3.connect(file, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript(f"BEGIN;{V1}PRAGMA user_version = 1;COMMIT;")
    db.execute("INSERT INTO stream VALUES (1, ?, ?)", KEY)
    db.execute("INSERT INTO model VALUES (1, ?)", ("ab" * 32,))
    for ident, seq in ((1, 0), (2, 1)):
        db.execute(f"INSERT INTO verdict VALUES ({','.join('?' * 26)})",
                   (ident, 1, 7, seq, 1000 * seq, 1000 * seq, 9, 0.5, 0.5, 0.5, 0.0, 2.0, False, 0, "running", "none", None, True, False,
                    '{"h":0.5}', '{"rms_h":0.5}', "{}", np.arange(3, dtype=np.float32).tobytes(), 1, "inprocess", ""))
    db.execute("INSERT INTO event VALUES (3, 1, 'fan-1@7', 'raised', 1000, 7, 1, '{}', 9)")
    db.execute("INSERT INTO dead_letter VALUES (1, 't', ?, ?, 7, 2, 'unreadable', 'd', x'00', 1, 9)", KEY)
    db.execute("INSERT INTO mark VALUES (1, 7, 1, 2, x'', 1, 0)")
    db.execute("INSERT INTO monitor VALUES (1, 'digest', '{\"seen\":2}')")
    db.execute("UPDATE counter SET value = 3")
    db.close()


def test_a_journal_of_version_1_is_brought_up_to_date_with_all_that_is_in_it(tmp_path):
    journal_of_version_1(tmp_path / "j.db")
    with pytest.raises(InvalidConfig, match="its agent brings it up to date"):
        JournalReader(tmp_path / "j.db")
    with Journal(tmp_path / "j.db") as journal:
        assert journal.counts() == {"verdict": 2, "event": 1, "raw": 0, "dead_letter": 1}
        first, _, event = journal.read()
        assert (first.asset_severity, first.worst, first.channel_scores, event.kind) == (0, "", {"h": 0.5}, "raised")
        assert (journal.marks()[(*KEY, 7)].watermark, journal.states()[KEY], journal.alarms(), journal.last_t_ns()) == (2, ("digest", {"seen": 2}), {}, {KEY: 1000})
        journal.commit([Group([row(3, worst="vibration")], raw=[raw(3)], alarms={KEY[0]: {"episode": "fan-1@7"}})])
        assert [r.id for r in journal.read(kinds=(Row, Event, Raw))] == [1, 2, 3, 4, 5]
    with Journal(tmp_path / "j.db") as journal:
        assert journal.alarms() == {KEY[0]: {"episode": "fan-1@7"}}


def test_a_migrated_file_has_the_tables_of_a_new_one(tmp_path):
    journal_of_version_1(tmp_path / "old.db")
    columns = []
    for name in ("old.db", "new.db"):
        with Journal(tmp_path / name) as journal:
            tables = [t for (t,) in journal._db.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")]
            columns.append({t: [c[1:] for c in journal._db.execute(f"PRAGMA table_info({t})")] for t in tables})
    old, new = columns
    assert old.keys() == new.keys() and all(sorted(old[t]) == sorted(new[t]) for t in new)
    assert [c[0] for c in old["verdict"]] == [c[0] for c in new["verdict"]]  # they are written by place


def test_a_journal_keeps_its_ident_through_moves_and_salvage_and_no_other_has_it(tmp_path):
    for name in ("a.db", "b.db"):
        full_journal(tmp_path / name, 20)
    with JournalReader(tmp_path / "a.db") as a, JournalReader(tmp_path / "b.db") as b:
        ident = a.ident
        assert ident != b.ident
    (tmp_path / "a.db").rename(tmp_path / "moved.db")
    salvage(tmp_path / "moved.db")
    with Journal(tmp_path / "moved.db") as journal:
        assert journal.ident == ident


def test_a_journal_of_version_2_gets_an_ident_and_keeps_it(tmp_path):
    full_journal(tmp_path / "j.db", 50)
    with sqlite3.connect(tmp_path / "j.db") as db:
        db.executescript("DROP TABLE ident; PRAGMA user_version = 2")
    db.close()
    with Journal(tmp_path / "j.db") as journal:
        ident = journal.ident
        assert journal.counts()["verdict"] == 50
    with Journal(tmp_path / "j.db") as journal:
        assert journal.ident == ident


# ---- reading

def test_kinds_are_read_in_the_order_of_one_sequence(journal):
    for s in range(20):
        journal.commit([Group([row(s)], [event(s)] * (s % 3 == 0), raw=[raw(s)] * (s % 4 == 0))])
    everything = journal.read(kinds=(Row, Event, Raw))
    assert [r.id for r in everything] == list(range(1, journal.last_id() + 1))
    for kinds in ((Row,), (Event,), (Raw,), (Event, Raw), (Row, Event, Raw)):
        for limit in (1, 2, 5, 100):
            found, after = [], 0
            while some := journal.read(after, limit, kinds):
                assert len(some) <= limit
                found, after = found + some, some[-1].id
            assert [r.id for r in found] == [r.id for r in everything if isinstance(r, kinds)]


def test_a_read_from_a_cursor_walks_over_nothing(journal):
    journal.commit([Group([row(0)], [event(0)], raw=[raw(0)])])
    for table in ("verdict", "event", "raw"):
        plan = " ".join(r[3] for r in journal._db.execute(
            f"EXPLAIN QUERY PLAN SELECT * FROM {table} JOIN stream ON stream.id = stream_id WHERE {table}.id > ? AND {table}.id <= ? ORDER BY {table}.id LIMIT 9", (1, 5)))
        assert f"SEARCH {table} USING INTEGER PRIMARY KEY" in plan and "TEMP B-TREE" not in plan


def test_a_reader_that_polls_does_not_keep_the_wal_from_being_emptied(journal):
    with JournalReader(journal.path) as reader:
        for n in range(50):
            journal.commit([Group([row(s) for s in range(8 * n, 8 * n + 8)])])
            assert len(reader.read(8 * n)) == 8
            reader.marks(), reader.last_id(), reader.counts()
        assert journal._checkpoint(0)
        assert journal.path.with_name("journal.db-wal").stat().st_size == 0


def test_events_of_one_asset_are_found(journal):
    other = "acme/lyon/hall-2/line-1/fan-2"
    journal.commit([Group(events=[event(1), event(2)._replace(asset=other), Event(other, "", "fan-2@7", "acknowledged", 5, 0, -1)])])
    assert [e.kind for e in journal.events(other)] == ["raised", "acknowledged"]
    assert len(journal.events()) == 3 and not journal.events("acme/lyon/hall-2/line-1/fan-3")


# ---- groups

def test_groups_of_one_commit_stand_together(journal):
    early, late = Mark(7, 1), Mark(7, 3)
    journal.commit([Group([row(0), row(1)], [event(1)], marks={(*KEY, 7): early}, states={KEY: ("d", {"n": 1})}, alarms={KEY[0]: {"n": 1}}),
                    Group([row(2), row(3)], marks={(*KEY, 7): late}, states={KEY: ("d", {"n": 2})}, alarms={KEY[0]: {"n": 2}})])
    assert [(type(r), r.seq) for r in journal.read()] == [(Row, 0), (Row, 1), (Event, 1), (Row, 2), (Row, 3)]
    assert (journal.marks()[(*KEY, 7)].watermark, journal.states()[KEY], journal.alarms()) == (3, ("d", {"n": 2}), {KEY[0]: {"n": 2}})
    assert len({r.committed_ns for r in journal.read()}) == 1


# ---- retention

def test_only_what_is_written_and_old_goes(journal):
    now = journal.commit([Group([row(s) for s in range(10)], [event(3)], [DeadLetter("t", "unreadable", "d", b"", 0)], raw=[raw(s) for s in range(4)])])
    assert journal.tidy(written=15, keep_ns=DAY_NS, now_ns=now + DAY_NS // 2) == 4
    assert journal.counts() == {"verdict": 10, "event": 1, "raw": 0, "dead_letter": 1}
    assert journal.tidy(written=6, keep_ns=DAY_NS, now_ns=now + 2 * DAY_NS) == 7
    assert [r.id for r in journal.read()] == [7, 8, 9, 10, 11]
    assert journal.tidy(written=11, keep_ns=DAY_NS, now_ns=now + 2 * DAY_NS) == 5
    assert journal.counts() == {"verdict": 0, "event": 0, "raw": 0, "dead_letter": 0}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("rew"), st.integers(-3, 40)), min_size=1, max_size=60), st.integers(0, 70), st.integers(0, 10), st.integers(0, 40))
def test_nothing_above_the_slowest_cursor_goes_and_nothing_young(tmp_path_factory, records, written, keep, now):
    with Journal(tmp_path_factory.mktemp("j") / "journal.db") as journal:
        for s, (kind, _) in enumerate(records):
            journal.commit([Group([row(s)] * (kind == "r"), [event(s)] * (kind == "e"), raw=[raw(s)] * (kind == "w"))])
        for table in ("verdict", "event", "raw"):
            for i, (_, day) in enumerate(records, 1):
                journal._db.execute(f"UPDATE {table} SET committed_ns = ? WHERE id = ?", (NOW_NS + day * DAY_NS, i))
        journal.tidy(written, keep * DAY_NS, NOW_NS + now * DAY_NS)
        left = {r.id for r in journal.read(kinds=(Row, Event, Raw))}
    goes = {i for i, (kind, day) in enumerate(records, 1) if i <= written and (kind == "w" or abs(now - day) > keep)}
    assert left == set(range(1, len(records) + 1)) - goes


def test_more_than_one_step_is_made_and_no_more_than_asked_for(journal):
    now = journal.commit([Group([row(s) for s in range(3000)])])
    assert 1000 <= journal.tidy(3000, 0, now + DAY_NS, limit=1000) < 2000
    journal.tidy(3000, 0, now + DAY_NS)
    assert journal.counts()["verdict"] == 0


def test_a_clock_that_was_not_set_yet_removes_nothing(journal):
    journal.commit([Group([row(0)])])
    assert journal.tidy(1, DAY_NS, now_ns=1000 * DAY_NS) == 0  # 1972


def test_numbers_times_and_marks_outlive_what_was_removed(tmp_path):
    with Journal(tmp_path / "j.db") as journal:
        now = journal.commit([Group([row(0, 5000), row(1, 9000), row(2, 7000)], marks={(*KEY, 7): Mark(7, 2)}, alarms={KEY[0]: {"episode": None}})])
        assert journal.tidy(3, 0, now + 1000 * DAY_NS) == 3
    with Journal(tmp_path / "j.db") as journal:
        assert (journal.last_id(), journal.last_t_ns(), journal.marks()[(*KEY, 7)].seen(1), journal.alarms()) == (3, {KEY: 9000}, True, {KEY[0]: {"episode": None}})
        journal.commit([Group([row(s, 5000 + s, epoch=8) for s in range(3)] + [row(3, 9000, epoch=8), row(4, 9500, epoch=8)])])
        times = [r.t_ns for r in journal.verdicts(*KEY)]
        assert len({*times, 5000, 9000, 7000}) == 8  # no time stamp that a removed window had
        assert all(0 <= t - asked <= 10**6 for t, asked in zip(times, [5000, 5001, 5002, 9000, 9500], strict=True))


def test_commits_go_on_while_old_records_are_removed(journal):
    now = journal.commit([Group([row(s) for s in range(5000)])])
    with ThreadPoolExecutor(1) as pool:
        removal = pool.submit(journal.tidy, 5000, 0, now - 10**12)  # the new ones are young
        for s in range(5000, 5200):
            journal.commit([Group([row(s)])])
        assert removal.result() >= 5000
    assert [r.seq for r in journal.verdicts(*KEY)][-200:] == list(range(5000, 5200))


def test_room_that_was_freed_goes_back_to_the_disk(tmp_path):
    with Journal(tmp_path / "j.db") as journal:
        now = journal.commit([Group([row(s, embedding=np.zeros(4000, np.float32)) for s in range(2000)])])
        journal._checkpoint(0)
        before = (tmp_path / "j.db").stat().st_size
        journal.tidy(2000, 0, now + DAY_NS)
        journal._checkpoint(0)
        assert (tmp_path / "j.db").stat().st_size < 0.7 * before


# ---- the limit

BIG = np.zeros(500, np.float32)  # 2 kB


def test_at_the_limit_what_is_written_everywhere_goes_first(tmp_path):
    with Journal(tmp_path / "j.db", max_bytes=1_000_000) as journal:
        for n in range(0, 3000, 10):
            journal.tidy(journal.last_id() - 20, 1000 * DAY_NS)
            journal.commit([Group([row(s, embedding=BIG) for s in range(n, n + 10)])])
            assert journal.used_bytes < 1_100_000
        assert journal.dropped == 0 and [r.seq for r in journal.verdicts(*KEY)][-20:] == list(range(2980, 3000))


def test_at_the_limit_nothing_more_is_taken_until_a_sink_gets_on(tmp_path):
    with Journal(tmp_path / "j.db", max_bytes=1_000_000) as journal:
        with pytest.raises(JournalFull, match="journal_max_gb"):
            for s in range(10_000):
                journal.commit([Group([row(s, embedding=BIG)])])
        there = [r.seq for r in journal.verdicts(*KEY)]
        assert there == list(range(len(there))) and len(there) > 100 and journal.dropped == 0
        for _ in range(3):
            with pytest.raises(JournalFull):
                journal.commit([Group([row(s)])])
        assert len(journal.read()) == len(there)
        journal.tidy(journal.last_id() - 5, 1000 * DAY_NS)
        journal.commit([Group([row(s)])])
        assert [r.seq for r in journal.verdicts(*KEY)][-6:] == [*there[-5:], s]


def test_at_the_limit_the_oldest_may_be_forgotten_and_is_counted(tmp_path):
    with Journal(tmp_path / "j.db", max_bytes=1_000_000, full="drop_oldest") as journal:
        for s in range(2000):
            journal.commit([Group([row(s, embedding=BIG)], marks={(*KEY, 7): Mark(7, s)})])
        there = [r.seq for r in journal.verdicts(*KEY)]
        assert there == list(range(2000 - len(there), 2000)) and len(there) > 100
        assert journal.dropped == 2000 - len(there) and journal.used_bytes < 1_100_000
        assert journal.marks()[(*KEY, 7)].watermark == 1999


def test_a_storm_of_nonsense_does_not_fill_the_journal(tmp_path):
    with Journal(tmp_path / "j.db", max_bytes=1_000_000) as journal:
        for _ in range(600):
            journal.commit([Group(dead=[DeadLetter("t", "unreadable", "d", bytes(4096), 4096)] * 2)])
        journal.commit([Group([row(0)])])
        assert journal.used_bytes < 1_100_000 and 100 < journal.counts()["dead_letter"] < 300


def test_a_reader_without_an_end_is_named_before_the_wal_fills_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("pdm.stream.journal._WAL_MOST", 500_000)
    with Journal(tmp_path / "j.db", max_bytes=1_000_000) as journal:
        journal.commit([Group([row(0)])])
        reader = sqlite3.connect(journal.path, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM verdict").fetchall()
        with pytest.raises(JournalFull, match="another program reads"):
            for s in range(10_000):
                journal.commit([Group([row(s)])])
        reader.close()
        journal.commit([Group([row(s)])])


# ---- a disk that is full

FULL_DISK = """
import os, resource, signal, sqlite3, sys
sys.path.insert(0, {tests!r})
from test_journal import KEY, row
from pdm.stream.journal import Group, Journal, Mark
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal, mark, n = Journal({file!r}), Mark(7), 0
def commit():
    global n
    for seq in range(n, n + 20):
        mark.add(seq)
    journal.commit([Group([row(s) for s in range(n, n + 20)], marks={{(*KEY, 7): mark}})])
    n += 20
for round in range(3):
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000 * (round + 1), resource.RLIM_INFINITY))
    try:
        while True:
            commit()
    except sqlite3.OperationalError as e:
        error, failed, mark = e, n, Mark(7, n - 1)
    there = [r.seq for r in journal.verdicts(*KEY)]
    assert there == list(range(failed)) and failed, (failed, there[-3:])
    assert journal.marks()[(*KEY, 7)].watermark == failed - 1
    print(failed, error, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
commit()
journal.close()
print(n)
"""


def test_a_file_that_may_not_grow_fails_the_commit_whole_and_goes_on_when_it_may(tmp_path):
    code = FULL_DISK.format(tests=os.path.dirname(__file__), file=str(tmp_path / "journal.db"))
    said = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.split("\n")
    with Journal(tmp_path / "journal.db") as journal:
        assert [r.seq for r in journal.verdicts(*KEY)] == list(range(int(said[3])))


TINY_DISK = """
mount -t tmpfs -o size=2m tmpfs {folder} || exit 77
exec {python} -c '
import sys
sys.path.insert(0, "{tests}")
import sqlite3
from pathlib import Path
from test_journal import KEY, row
from pdm.stream.journal import Group, Journal
Path("{folder}/ballast").write_bytes(bytes(500_000))
journal, n = Journal("{folder}/journal.db"), 0
try:
    while True:
        journal.commit([Group([row(s) for s in range(n, n + 20)])])
        n += 20
except sqlite3.OperationalError as e:
    assert "full" in str(e), e
assert [r.seq for r in journal.verdicts(*KEY)] == list(range(n)) and n
Path("{folder}/ballast").unlink()
for m in range(n, n + 100, 20):
    journal.commit([Group([row(s) for s in range(m, m + 20)])])
assert [r.seq for r in journal.verdicts(*KEY)] == list(range(n + 100))
journal.close()
'
"""


def test_a_disk_without_room_fails_the_commit_whole_and_goes_on_when_there_is_some(tmp_path):
    if shutil.which("unshare") is None:
        pytest.skip("a small disk of our own needs unshare")
    script = TINY_DISK.format(folder=tmp_path, python=sys.executable, tests=os.path.dirname(__file__))
    done = subprocess.run(["unshare", "--map-root-user", "--mount", "sh", "-c", script], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip(f"no file system of our own here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr


# ---- damage

def full_journal(file, n=1500):
    with Journal(file) as journal:
        for at in range(0, n, 50):
            seqs = range(at, at + 50)
            journal.commit([Group([row(s) for s in seqs], [event(at)], raw=[raw(at)], marks={(*KEY, 7): Mark(7, at + 49)}, states={KEY: ("d", {"n": at + 50})},
                                  alarms={KEY[0]: {"n": at}})])
    return n


def damage(file, at, what):
    with file.open("r+b") as f:
        f.seek(at)
        f.write(what)


def middle(file):
    damage(file, file.stat().st_size // 2 // 4096 * 4096, b"\x5a" * 9000)


def tail(file):
    os.truncate(file, file.stat().st_size // 3 * 2 + 100)


def header(file):
    damage(file, 0, bytes(100))


def first_page(file):
    damage(file, 0, os.urandom(4096))


@pytest.mark.parametrize("harm", [middle, tail, header, first_page])
def test_a_damaged_journal_says_so_and_most_of_it_is_salvaged(tmp_path, harm):
    file = tmp_path / "journal.db"
    n = full_journal(file)
    harm(file)
    for kind in (Journal, JournalReader):
        with pytest.raises(JournalDamaged, match="predmaint agent --salvage") as e:
            with kind(file) as journal:
                journal.read(0, 10**6, (Row, Event, Raw))
        assert e.value.exit_code == 2
    report = salvage(file)
    assert report["damaged"] == "journal.db.damaged-1" and (tmp_path / "journal.db.damaged-1").exists()
    with Journal(file) as journal:
        assert journal.counts() == {t: report["kept"][t] for t in journal.counts()}
        rows = journal.verdicts(*KEY)
        assert len(rows) > n / 2 and all(r == row(r.seq)._replace(id=r.id, committed_ns=r.committed_ns, embedding=r.embedding) for r in rows)
        assert len(rows) == n if harm in (header, first_page) else len(rows) < n
        assert journal.marks()[(*KEY, 7)].watermark == n - 1 and journal.states()[KEY] == ("d", {"n": n})
        last = journal.last_id()
        journal.commit([Group([row(n)])])
        (new,) = journal.read(last)
        assert new.id > n + 60 and new.seq == n  # no number comes twice


def test_damage_is_found_while_a_journal_is_in_use(tmp_path):
    file = tmp_path / "journal.db"
    full_journal(file)
    with Journal(file) as journal, JournalReader(file) as reader:
        for page in range(1, file.stat().st_size // 4096):
            damage(file, 4096 * page, b"\x5a" * 4096)
        with pytest.raises(JournalDamaged):
            reader.read(0, 10**6)
        journal._db.execute("PRAGMA shrink_memory")  # forget the pages as they were
        with pytest.raises(JournalDamaged):
            journal.commit([Group([row(5000 + s, model="ef" * 32) for s in range(100)])])


def test_nonsense_inside_a_sound_page_is_left_behind(tmp_path):
    file = tmp_path / "journal.db"
    full_journal(file, 100)
    db = sqlite3.connect(file)
    db.execute("UPDATE verdict SET indicators = '{\"rms' WHERE seq = 5")
    db.execute("UPDATE verdict SET state = CAST(x'ff' AS TEXT) WHERE seq = 6")
    db.execute("UPDATE verdict SET stream_id = 99 WHERE seq = 7")
    db.commit()
    db.close()
    with Journal(file) as journal, pytest.raises(JournalDamaged):
        journal.read()
    report = salvage(file)
    assert (report["kept"]["verdict"], report["unreadable"]["verdict"]) == (97, 3)
    with Journal(file) as journal:
        assert {5, 6, 7} == set(range(100)) - {r.seq for r in journal.read() if isinstance(r, Row)}


def test_a_journal_of_which_nothing_is_left_gives_an_empty_one(tmp_path):
    file = tmp_path / "journal.db"
    full_journal(file, 100)
    file.write_bytes(os.urandom(file.stat().st_size))
    with pytest.raises(JournalDamaged, match="not a database"):
        Journal(file)
    assert set(salvage(file)["kept"].values()) == {0}
    with Journal(file) as journal:
        assert journal.commit([Group([row(0)])]) and journal.last_id() > 2**20


def test_a_damaged_journal_of_version_1_is_salvaged_too(tmp_path):
    journal_of_version_1(tmp_path / "j.db")
    damage(tmp_path / "j.db", (tmp_path / "j.db").stat().st_size - 4096, bytes(4096))
    with pytest.raises(JournalDamaged):
        Journal(tmp_path / "j.db")
    salvage(tmp_path / "j.db")
    with Journal(tmp_path / "j.db") as journal:
        assert journal.counts()["verdict"] == 2


@pytest.mark.parametrize("moved", [(), ("",), ("", "-wal")])
def test_a_salvage_that_was_interrupted_is_taken_up_again(tmp_path, moved):
    file = tmp_path / "journal.db"
    writer = subprocess.run([sys.executable, "-c", KILLED.format(tests=os.path.dirname(__file__), file=str(file))], stdout=subprocess.PIPE, check=False)
    assert writer.returncode == -signal.SIGKILL and (tmp_path / "journal.db-wal").stat().st_size
    (tmp_path / "journal.db.salvage").write_bytes(b"half of it")
    for end in moved:
        (tmp_path / f"journal.db{end}").rename(tmp_path / f"journal.db.damaged-1{end}")
    for kind in (Journal, JournalReader):
        with pytest.raises(InvalidConfig if kind is JournalReader and moved else JournalDamaged, match="salvage was interrupted|no journal"):
            kind(file)
    assert salvage(file)["kept"]["verdict"] == 8
    with Journal(file) as journal:
        assert len(journal.verdicts(*KEY)) == 8


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_journal import row
from pdm.stream.journal import Group, Journal
Journal({file!r}).commit([Group([row(s) for s in range(8)])])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_salvage_is_refused_while_an_agent_runs_and_where_there_is_nothing(journal, tmp_path):
    with pytest.raises(InvalidConfig, match="another agent"):
        salvage(journal.path)
    with pytest.raises(InvalidConfig, match="no journal"):
        salvage(tmp_path / "other.db")


# ---- one file

def test_one_file_moved_elsewhere_opens_there_and_goes_on(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    journal = Journal(tmp_path / "here/journal.db")
    with JournalReader(journal.path) as reader:  # is still there when the agent ends
        journal.commit([Group([row(s) for s in range(100)], marks={(*KEY, 7): Mark(7, 99)})])
        reader.read()
        journal.close()
        shutil.copy(tmp_path / "here/journal.db", tmp_path / "there/journal.db")
    with Journal(tmp_path / "there/journal.db") as journal:
        assert len(journal.verdicts(*KEY)) == 100 and journal.marks()[(*KEY, 7)].watermark == 99
        journal.commit([Group([row(100)])])
        assert journal.last_id() == 101


def test_a_disk_without_room_at_the_start_is_said(tmp_path):
    (tmp_path / "journal.db").mkdir()  # as good as any reason for which a file can't be opened
    with pytest.raises(PartMissing, match="has its disk room"):
        Journal(tmp_path / "journal.db")
