"The journal: what is committed stays, what is not was never there, and nothing is counted twice."

import os
import signal
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdm.errors import InvalidConfig
from pdm.stream.journal import DeadLetter, Event, Group, Journal, JournalReader, Mark, Row

KEY = ("acme/lyon/hall-2/line-1/fan-1", "vibration")


def row(seq: int, t_ns: int | None = None, epoch: int = 7, **changes) -> Row:
    t = 1000 * seq if t_ns is None else t_ns
    r = Row(*KEY, epoch, seq, t, t, 0.5, 0.5, 0.5, 0.0, 2.0, False, 0, "running", "none", None, True, False, {"h": 0.5}, {"rms_h": 0.5}, {}, np.arange(3, dtype=np.float32),
            "ab" * 32, "inprocess")
    return r._replace(**changes)


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


def test_a_full_disk_is_an_error_and_not_a_loss(journal):
    journal.commit([Group([row(0)])])
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        journal.commit([Group([row(s, embedding=np.zeros(2000, np.float32)) for s in range(1, 50)])])
    journal._db.execute("PRAGMA max_page_count = 100000")
    journal.commit([Group([row(s) for s in range(1, 50)])])
    assert [r.seq for r in journal.verdicts(*KEY)] == list(range(50))


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
