"""Copy the SQLite databases of a state folder while they are in use, and keep the newest copies: python backup.py STATE BACKUPS KEEP

A copy is a folder named by its time (UTC), there whole or not at all. To restore one, stop agent, sinks and updater and put its files into the
state folder in place of those there, without their `-wal` and `-shm`. Cursors are not copied: the sinks write everything again, which changes nothing.
"""

import shutil
import sqlite3
import sys
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path


def backup(
    state: Path,    # the folder with journal.db, rollout.db and others
    backups: Path,
    keep: int,      # so many copies stay, the new one among them
    now: datetime | None = None,
) -> Path:          # the new copy
    """Copy every database, as it stands at one moment each. Raises `sqlite3.Error` for one that is damaged, and `OSError` where less than a tenth of the disk
    would stay free: then the copies of before stay."""
    name = f"{now or datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    aside, final = backups / f".{name}", backups / name
    for left in backups.glob(".*"):  # of one that was broken off
        shutil.rmtree(left)
    aside.mkdir(parents=True)
    disk, size = shutil.disk_usage(backups), sum(file.stat().st_size for file in state.glob("*.db*"))
    if disk.free - size < disk.total / 10:
        raise OSError(f"{disk.free >> 20} MiB are free and the copy takes {size >> 20}: a full disk would stop the agent, so none is made; make room, or carry copies away")
    for file in sorted(state.glob("*.db")):
        with closing(sqlite3.connect(file, timeout=60)) as source, closing(sqlite3.connect(aside / file.name)) as copy:
            source.backup(copy)  # in one step: it begins anew whenever somebody writes between two. With a write-ahead log nobody is held up by it
            if (said := copy.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(f"{file.name} is damaged: {said}")
    aside.rename(final)
    for old in sorted(p for p in backups.iterdir() if not p.name.startswith("."))[:-keep]:
        shutil.rmtree(old)
    return final


if __name__ == "__main__":
    made = backup(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    print(made.name, ", ".join(f"{p.name} {p.stat().st_size} B" for p in sorted(made.iterdir())))
