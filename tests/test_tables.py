"""Files of rows that processes share: none of two that open one at once is turned away."""
import sqlite3
from threading import Timer

import pytest

from pdm.errors import PartMissing
from pdm.loop.logbook import Logbook
from pdm.loop.release import Releases
from pdm.stream import tables
from pdm.stream.rollout import Rollout


@pytest.mark.parametrize("kind", [Logbook, Releases, Rollout])
def test_who_opens_a_file_that_another_one_makes_waits_for_it(tmp_path, kind):
    first = sqlite3.connect(tmp_path / "a.db", isolation_level=None, check_same_thread=False)
    first.execute("BEGIN IMMEDIATE")
    timer = Timer(0.5, lambda: first.execute("COMMIT"))
    timer.start()
    try:
        kind(tmp_path / "a.db").close()
    finally:
        timer.join()
        first.close()


@pytest.mark.parametrize("kind", [Logbook, Releases, Rollout])
def test_a_file_that_stays_locked_is_said_to_be(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(tables, "_WAIT_S", 0.2)
    first = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    first.execute("BEGIN IMMEDIATE")
    with pytest.raises(PartMissing, match="database is locked"):
        kind(tmp_path / "a.db")
    first.close()


def test_damage_in_a_table_is_found_when_the_file_is_opened(tmp_path):
    file = tmp_path / "a.db"
    db = tables.open_tables(file, "CREATE TABLE note (text TEXT NOT NULL)", 1)
    db.executemany("INSERT INTO note VALUES (?)", [(f"{k:04d}" * 100,) for k in range(200)])
    db.execute("PRAGMA writable_schema = ON")
    db.execute("UPDATE sqlite_schema SET sql = 'CREATE TABLE note (text TEXT NOT NULL CHECK (text < ''0100''))' WHERE name = 'note'")
    db.close()
    tables.open_tables(file, "", 1).close()
    with pytest.raises(sqlite3.DatabaseError, match="CHECK") as told:
        tables.open_tables(file, "", 1, check=["note"])
    assert told.value.sqlite_errorcode == sqlite3.SQLITE_CORRUPT
