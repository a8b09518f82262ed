"""What is particular to the warehouses, on real servers: types, migrations, rejected rows, and a server that dies in mid-write."""

import json
import threading
import uuid
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from pdm.errors import InvalidConfig, InvalidInput, PartMissing
from pdm.process import free_port
from pdm.stream.columns import VERDICT
from pdm.stream.journal import Event, Row

psycopg = pytest.importorskip("psycopg", reason="the extra postgres is not installed")
from warehouse_servers import NO_BIGQUERY, bigquery_environment, postgres_kinds, shared_bigquery, shared_postgres  # noqa: E402

from pdm.stream import postgres  # noqa: E402
from pdm.stream.bigquery import BigQuerySink  # noqa: E402
from pdm.stream.postgres import PostgresSink  # noqa: E402

ASSET, STREAM, EPOCH, T_NS = "e/s/a/l/fan", "vibration", 2**63 - 1, 1_767_225_600_000_000_123
HOUR_NS = 3600 * 10**9


def row(seq, **changes):
    r = Row(ASSET, STREAM, EPOCH, seq, T_NS + seq * 10**9, T_NS + (seq - 1) * 10**9, 1.5, 0.5, 0.25, 0.1, 1.6, seq % 2 == 1, 2, "running", "outer_race",
            "fan@1" if seq % 2 else None, True, False, {"h": 1.5}, {"rms_h": 0.2, "kurtosis_h": float("nan")}, {"speed_rpm": 1500.0},
            np.array([0.5, -1, 3], np.float32), "ab" * 32, "triton", ("late", "clock_suspect"), 3, "temperature", committed_ns=T_NS + 1)
    return r._replace(**changes)


def event(seq, kind="raised", **changes):
    return Event(ASSET, STREAM, "fan@1", kind, T_NS + seq * 10**9, EPOCH, seq, {"score": 1.5}, committed_ns=T_NS)._replace(**changes)


@pytest.fixture(params=postgres_kinds() or [pytest.param("none", marks=pytest.mark.skip("no PostgreSQL: pip install 'predmaint[embedded]'"))])
def server(request):
    return shared_postgres(request.param)


@pytest.fixture
def url(server):
    return server.new_database(f"t{uuid.uuid4().hex}")


@pytest.fixture
def sink(url):
    sink = PostgresSink(url)
    yield sink
    sink.close()


def ask(url, sql):
    with psycopg.connect(url) as db:
        return db.execute(sql).fetchall()


def test_postgres_keeps_every_field_of_a_verdict_and_of_an_event(sink, url):
    sink.write([row(1), event(1)])
    with psycopg.connect(url, row_factory=psycopg.rows.dict_row) as db:
        verdict, = db.execute("SELECT * FROM pdm.verdict").fetchall()
        told, = db.execute("SELECT * FROM pdm.event").fetchall()
    assert verdict.pop("t") == datetime(2026, 1, 1, 0, 0, 1, tzinfo=UTC) and told.pop("t") == datetime(2026, 1, 1, 0, 0, 1, tzinfo=UTC)
    expected = dict(zip(VERDICT.columns, VERDICT.values(row(1)), strict=True)) | {
        "embedding": [0.5, -1, 3], "flags": ["late", "clock_suspect"], "indicators": {"rms_h": 0.2, "kurtosis_h": None}}
    assert verdict == expected
    assert told == {k: v for k, v in event(1)._asdict().items() if k != "id"}


def test_postgres_keeps_what_is_not_a_number_what_is_empty_and_what_is_beyond_ascii(sink, url):
    sink.write([row(1, score=float("nan"), p_value=float("inf"), embedding=np.zeros(0, np.float32), flags=(), channel_scores={}, worst='Öl "1"\\\t\n')])
    (score, p, embedding, flags, scores, worst), = ask(url, "SELECT score, p_value, embedding, flags, channel_scores, worst FROM pdm.verdict")
    assert np.isnan(score) and p == float("inf") and (embedding, flags, scores, worst) == ([], [], {}, 'Öl "1"\\\t\n')


def test_a_replay_leaves_the_row_as_it_was(sink, url):
    sink.write([row(1), row(1, score=9.0), event(1)])
    before = ask(url, "SELECT xmin, ctid, v.* FROM pdm.verdict v") + ask(url, "SELECT xmin, ctid FROM pdm.event")
    sink.write([row(1, score=7.0, t_ns=T_NS + 9 * 10**9), row(2), event(1, details={})])
    after = ask(url, "SELECT xmin, ctid, v.* FROM pdm.verdict v WHERE seq = 1") + ask(url, "SELECT xmin, ctid FROM pdm.event")
    assert before == after and ask(url, "SELECT count(*), max(score) FROM pdm.verdict") == [(2, 1.5)]


@pytest.mark.parametrize("bad", [
    row(2, worst="nul \0"), row(2, indicators={"nul \0": 1.0}), row(2)._replace(seq=2**63), row(2, severity=None), row(2, fault="\ud800"), row(2, score="high"),
    event(2, details={"text": "nul \0"}), event(2, details={"what": object()}),
], ids=["nul", "nul in json", "too large", "missing", "no unicode", "no number", "nul in event", "no json"])
def test_postgres_rejects_a_row_for_good_and_takes_the_others_afterwards(sink, url, bad):
    with pytest.raises(InvalidInput, match="refuses a row") as e:
        sink.write([row(1), bad, row(3)])
    assert e.value.reason == "rejected"
    sink.write([row(1), row(3)])
    assert ask(url, "SELECT seq FROM pdm.verdict ORDER BY seq") == [(1,), (3,)]


def test_init_makes_the_schema_once(sink, url):
    assert sink.init() == [f"{sink.where}: schema pdm brought from version 0 to {len(postgres.MIGRATIONS)}"]
    sink.write([row(1)])
    assert sink.init() == []
    assert ask(url, "SELECT count(*) FROM pdm.verdict") == [(1,)]
    assert ask(url, "SELECT count(*) FROM pg_inherits WHERE inhparent = 'pdm.verdict'::regclass") == [(8,)]


def test_a_schema_of_yesterday_is_brought_up_to_date_by_init_and_only_by_init(sink, url, monkeypatch):
    known = postgres.MIGRATIONS
    sink.write([row(1)])
    with monkeypatch.context() as m:
        m.setattr(postgres, "MIGRATIONS", (*known, "ALTER TABLE pdm.verdict ADD COLUMN note text NOT NULL DEFAULT ''"))
        newer = PostgresSink(url)
        with pytest.raises(PartMissing, match="predmaint sinks init"):
            newer.write([row(2)])
        assert newer.init() == [f"{sink.where}: schema pdm brought from version {len(known)} to {len(known) + 1}"]
        newer.write([row(2)])
        newer.close()
    sink.close()
    sink.write([row(3)])  # by one who knows only the older schema
    assert sink.init() == [] and ask(url, "SELECT seq, note FROM pdm.verdict ORDER BY seq") == [(1, ""), (2, ""), (3, "")]


def test_a_step_that_fails_leaves_the_schema_as_it_was(sink, url, monkeypatch):
    known = postgres.MIGRATIONS
    monkeypatch.setattr(postgres, "MIGRATIONS", (*known, "CREATE TABLE pdm.more (); SELECT 1 FROM nowhere"))
    with pytest.raises(PartMissing, match="nowhere"):
        sink.init()
    assert ask(url, "SELECT count(*) FROM pg_namespace WHERE nspname = 'pdm'") == [(0,)]


def test_several_who_start_at_once_make_one_schema(url):
    sinks, errors = [PostgresSink(url) for _ in range(6)], []

    def start(i):
        try:
            sinks[i].write([row(i)])
        except PartMissing as e:
            errors.append(e)

    threads = [threading.Thread(target=start, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for s in sinks:
        s.close()
    assert not errors and ask(url, "SELECT count(*) FROM pdm.verdict") == [(6,)]


def test_a_user_without_the_right_to_create_tables_is_told_who_must(server, url):
    with psycopg.connect(url) as db:
        db.execute("DROP ROLE IF EXISTS writer; CREATE ROLE writer LOGIN PASSWORD 'w'")
    writer = PostgresSink(url.replace("pdm:s3cret", "writer:w"))
    with pytest.raises(PartMissing, match="predmaint sinks init"):
        writer.write([row(1)])
    owner = PostgresSink(url)
    owner.init()
    owner.close()
    with pytest.raises(PartMissing, match="GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA pdm TO writer") as e:
        writer.write([row(1)])
    assert "permission denied" in str(e.value) and ":w" not in str(e.value)
    with psycopg.connect(url) as db:
        db.execute("GRANT USAGE ON SCHEMA pdm TO writer; GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA pdm TO writer")
    writer.write([row(1), event(1)])  # the rights that the chapter names
    writer.close()
    assert ask(url, "SELECT count(*) FROM pdm.verdict") == [(1,)]
    with psycopg.connect(url) as db:
        db.execute("DROP OWNED BY writer; DROP ROLE writer")


def test_a_table_that_somebody_dropped_or_locked_is_no_fault_of_the_rows(sink, url):
    sink.write([row(1)])
    with psycopg.connect(url) as db:
        db.execute("ALTER TABLE pdm.verdict RENAME TO gone")
    with pytest.raises(PartMissing, match="pdm.verdict"):
        sink.write([row(2)])
    with psycopg.connect(url) as db:
        db.execute("ALTER TABLE pdm.gone RENAME TO verdict")
    sink.write([row(2)])
    sink._db.execute("SET lock_timeout = '50ms'")
    with psycopg.connect(url) as db:
        db.execute("LOCK TABLE pdm.verdict")
        with pytest.raises(PartMissing, match="lock timeout"):
            sink.write([row(3)])
    sink.write([row(3)])
    assert ask(url, "SELECT count(*) FROM pdm.verdict") == [(3,)]


def test_no_message_has_the_password(server):
    for url in (f"postgresql://pdm:s3cret@127.0.0.1:{free_port()}/x", server.url("no_such_database"), "postgresql://pdm:s3cret@no-such-host.invalid/x"):
        with pytest.raises(PartMissing) as e:
            PostgresSink(url).write([row(1)])
        assert "s3cret" not in str(e.value) and "PostgreSQL at" in str(e.value)
    with pytest.raises(InvalidConfig) as e:
        PostgresSink("postgresql://pdm:s3%cret@127.0.0.1/x")
    assert "s3" not in str(e.value) and e.value.__suppress_context__


def test_an_acknowledged_write_is_durable_even_where_the_server_would_rather_not(url, server):
    with psycopg.connect(url, autocommit=True) as db:
        db.execute(f"ALTER DATABASE {url.rpartition('/')[2]} SET synchronous_commit = off")
    sink = PostgresSink(url)
    sink.write([row(1)])
    assert sink._db.execute("SHOW synchronous_commit").fetchone() == ("on",)
    sink.close()


def test_a_server_killed_again_and_again_in_mid_write_has_every_row_once(server, url):
    sink, done, stop = PostgresSink(url), [], threading.Event()

    def write():
        seq = 0
        while not stop.is_set():
            batch = [row(s) for s in range(seq, seq + 200)] + [event(seq)]
            try:
                sink.write(batch)
            except PartMissing:
                stop.wait(0.02)
                continue
            done.append(seq)
            seq += 200

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(3):
            reached = len(done)
            while len(done) < reached + 3:
                assert writer.is_alive()
                stop.wait(0.005)
            server.kill()
            server.start()
    finally:
        stop.set()
        writer.join()
    batches = len(done) + 1  # the last one was under way: it may have been written although nobody heard of it
    sink.write([row(s) for s in range(batches * 200)] + [event(seq * 200) for seq in range(batches)])  # as a runner would that lost its cursor
    sink.close()
    assert ask(url, "SELECT count(*), count(DISTINCT seq), min(seq), max(seq) FROM pdm.verdict") == [(batches * 200,) * 2 + (0, batches * 200 - 1)]
    assert ask(url, "SELECT count(*) FROM pdm.event") == [(batches,)]


def questions(chapter):
    "The SQL that a chapter shows."
    cells = json.loads((Path(__file__).parent.parent / f"nbs/stream/{chapter}.ipynb").read_text())["cells"]
    text = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return [q.partition("```")[0] for q in text.split("```sql\n")[1:]]


def test_postgres_answers_the_questions_of_its_chapter(sink, url):
    now = int(datetime.now(UTC).timestamp()) * 10**9
    sink.write([row(i, t_ns=now - i * HOUR_NS, asset=f"e/s/a/l/fan-{i % 3}") for i in range(1, 13)]
               + [event(i, kind, t_ns=now + i) for i, kind in enumerate(("raised", "diagnosed", "cleared"))])
    share, growth, life = questions("postgres")
    assert [r[1] for r in ask(url, share)] == [0.5, 0.5, 0.5]
    assert [r[1:] for r in ask(url, growth.replace("acme/lyon/hall-2/line-1/fan-1", "e/s/a/l/fan-1"))] == [(0.2, 1500.0)] * 4
    assert [r[1] for r in ask(url, life)] == [["raised", "diagnosed", "cleared"]]
    plan = "\n".join(r[0] for r in ask(url, "EXPLAIN SELECT * FROM pdm.verdict WHERE asset = 'e/s/a/l/fan-1' AND t > now() - interval '1 day'"))
    assert plan.count("verdict_") < 4, plan  # one partition of eight, by its index


# BigQuery


@pytest.fixture
def emulator():
    if not bigquery_environment():
        pytest.skip(NO_BIGQUERY)
    return shared_bigquery()


@pytest.fixture
def dataset():
    return f"w{uuid.uuid4().hex}"


@pytest.fixture
def big(emulator, dataset):
    sink = BigQuerySink(emulator.url(dataset))
    yield sink
    sink.close()


def tables(emulator, dataset):
    return sorted(t for (t,) in emulator.ask(f"SELECT table_name FROM {dataset}.INFORMATION_SCHEMA.TABLES"))


def test_bigquery_keeps_every_field_of_a_verdict_and_of_an_event(emulator, dataset, big):
    big.write([row(1), event(1)])
    names = ", ".join(c for c in VERDICT.columns if c not in ("channel_scores", "indicators", "conditions"))
    found, = emulator.ask(f"SELECT t, TO_JSON_STRING(channel_scores), TO_JSON_STRING(indicators), TO_JSON_STRING(conditions), {names} FROM {dataset}.verdict")
    assert found[0] == datetime(2026, 1, 1, 0, 0, 1, tzinfo=UTC)
    assert [json.loads(text) for text in found[1:4]] == [{"h": 1.5}, {"rms_h": 0.2, "kurtosis_h": None}, {"speed_rpm": 1500.0}]
    expected = {**dict(zip(VERDICT.columns, VERDICT.values(row(1)), strict=True)), "embedding": [0.5, -1, 3]}
    assert dict(zip(names.split(", "), found[4:], strict=True)) == {name: expected[name] for name in names.split(", ")}
    assert emulator.ask(f"SELECT asset, stream, episode, kind, t_ns, epoch, seq, TO_JSON_STRING(details), committed_ns FROM {dataset}.event") == [
        (*event(1)[:7], '{"score":1.5}', T_NS)]


def test_bigquery_keeps_what_is_not_a_number_what_is_empty_and_what_is_beyond_ascii(emulator, dataset, big):
    big.write([row(1, score=float("nan"), p_value=float("inf"), embedding=np.zeros(0, np.float32), flags=(), worst='Öl "1"\\\t\n')])
    (score, *others), = emulator.ask(f"SELECT score, p_value, embedding, flags, worst FROM {dataset}.verdict")
    assert np.isnan(score) and others == [float("inf"), [], [], 'Öl "1"\\\t\n']


def test_bigquery_partitions_by_day_clusters_by_asset_and_leaves_no_stage_behind(emulator, dataset, big):
    big.write([row(1), event(1)])
    with pytest.raises(InvalidInput):
        big.write([row(2, severity=2**63)])
    assert tables(emulator, dataset) == ["event", "verdict"]
    with big._session() as client:
        table = client.get_table(f"plant.{dataset}.verdict")
    assert (table.time_partitioning.type_, table.time_partitioning.field, table.clustering_fields) == ("DAY", "t", ["asset", "stream"])


def test_bigquery_has_each_key_once_also_over_midnight_and_when_a_lost_journal_moved_its_time(emulator, dataset, big):
    day = [row(s, t_ns=T_NS + s * 6 * HOUR_NS) for s in range(8)]
    big.write(day[:5] + day[:1])  # one twice in a batch
    big.write([r._replace(t_ns=r.t_ns + 16, score=9.0) for r in day[3:]])  # as a journal would that found the time stamps taken
    big.write([day[0]])
    big.write(day)
    found = emulator.ask(f"SELECT seq, score FROM {dataset}.verdict ORDER BY seq")
    assert found == [(s, 1.5 if s < 5 else 9.0) for s in range(8)]


@pytest.mark.parametrize("bad", [row(2, severity=2**63), row(2, score="high"), row(2, fault="\ud800"), event(2, details={"what": object()})],
                         ids=["too large", "no number", "no unicode", "no json"])
def test_bigquery_rejects_a_row_for_good_and_takes_the_others_afterwards(emulator, dataset, big, bad):
    with pytest.raises(InvalidInput, match="a row") as e:
        big.write([row(1), bad, row(3)])
    assert e.value.reason == "rejected"
    big.write([row(1), row(3)])
    assert emulator.ask(f"SELECT seq FROM {dataset}.verdict ORDER BY seq") == [(1,), (3,)]


def test_bigquery_init_makes_what_is_missing_and_adds_columns_that_a_table_of_before_lacks(emulator, dataset, big):
    assert big.init() == [f"{big.where}: {what}" for what in ("dataset created", "table verdict created", "table event created")]
    assert big.init() == []
    big.write([row(1)])
    with big._session() as client:
        client.query(f"ALTER TABLE {dataset}.verdict DROP COLUMN worst").result()
    again = BigQuerySink(emulator.url(dataset))
    assert again.init() == [f"{big.where}: table verdict got worst"]
    again.write([row(1), row(2)])
    again.close()
    assert emulator.ask(f"SELECT seq, worst FROM {dataset}.verdict ORDER BY seq") == [(1, None), (2, "temperature")]


def test_bigquery_makes_a_table_again_that_somebody_dropped(emulator, dataset, big):
    big.write([row(1)])
    with big._session() as client:
        client.delete_table(f"plant.{dataset}.verdict")
    with pytest.raises(PartMissing, match="verdict"):
        big.write([row(2)])
    big.write([row(2)])
    assert emulator.ask(f"SELECT seq FROM {dataset}.verdict") == [(2,)]


def test_bigquery_that_is_away_or_lets_nobody_in_is_not_now(monkeypatch, tmp_path):
    with pytest.raises(PartMissing, match="BigQuery plant.pdm"):
        BigQuerySink(f"bigquery://plant/pdm?endpoint=http://127.0.0.1:{free_port()}").write([row(1)])
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(PartMissing, match="none.json"):
        BigQuerySink("bigquery://plant/pdm").init()
    for url in ("bigquery://plant", "bigquery://plant/pdm/verdict", "bigquery://plant/pdm?region=EU", "bigquery://plant/p`dm", "bigquery:///pdm"):
        with pytest.raises(InvalidConfig, match="bigquery://project/dataset"):
            BigQuerySink(url)


def test_bigquery_killed_in_mid_write_has_every_row_once(emulator, dataset, big):
    done, stop = [], threading.Event()

    def write():
        while not stop.is_set():
            seq = len(done) * 50
            try:
                big.write([row(s) for s in range(seq, seq + 50)])
            except PartMissing:
                stop.wait(0.02)
                continue
            done.append(seq)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for pause in (0.1, 0.3):
            reached = len(done)
            while len(done) < reached + 2:
                assert writer.is_alive()
                stop.wait(0.01)
            stop.wait(pause)
            emulator.kill()
            emulator.start()
    finally:
        stop.set()
        writer.join()
    n = len(done) * 50 + 50  # with the batch that was under way: it may have been written although nobody heard of it
    big.write([row(s) for s in range(n)])
    assert emulator.ask(f"SELECT count(*), count(DISTINCT seq), max(seq) FROM {dataset}.verdict") == [(n, n, n - 1)]


def test_bigquery_answers_the_questions_of_its_chapter(emulator, dataset, big):
    now = int(datetime.now(UTC).timestamp()) * 10**9
    big.write([row(i, t_ns=now - i * HOUR_NS, asset=f"e/s/a/l/fan-{i % 3}") for i in range(1, 13)])
    faults, growth = (q.replace("pdm.verdict", f"{dataset}.verdict") for q in questions("bigquery"))
    assert emulator.ask(faults) == [("outer_race", 3, 1, 2)]
    assert {(asset, round(rms, 6)) for asset, _, rms in emulator.ask(growth)} == {(f"e/s/a/l/fan-{i}", 0.2) for i in range(3)}
