"""Put a dump into the object store under the day's name, see that all of it is there, and forget what is too old. Run by the jobs of backup.yaml."""

import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec


def upload(
    dump: Path,                     # as the dump's tool left it
    url: str,                       # folder of backups
    keep_days: float | None = None,  # older ones of the same database are deleted; None: the bucket's lifecycle does that
    now: datetime | None = None,
) -> str:
    "Where it lies now. Raises `ValueError` for an empty dump, and `OSError` where the copy isn't whole."
    now = now or datetime.now(UTC)
    if not dump.stat().st_size:
        raise ValueError(f"{dump.name} is empty: the database was not dumped")
    fs, root = fsspec.core.url_to_fs(f"{url.rstrip('/')}/{dump.stem}")
    target = f"{root}/{now:%Y%m%dT%H%M%SZ}{dump.suffix}"
    fs.makedirs(root, exist_ok=True)
    fs.put_file(str(dump), target)
    if (there := fs.size(target)) != dump.stat().st_size:
        raise OSError(f"{target} has {there} of {dump.stat().st_size} bytes")
    if keep_days is not None:
        oldest = f"{now - timedelta(days=keep_days):%Y%m%dT%H%M%SZ}"
        for old in fs.ls(root, detail=False):
            if Path(old).stem < oldest:
                fs.rm(old)
    return target


if __name__ == "__main__":
    keep = os.environ.get("BACKUP_KEEP_DAYS")
    print(upload(Path(sys.argv[1]), os.environ["BACKUP_URL"], float(keep) if keep else None))
