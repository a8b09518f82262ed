"Archive: raw windows in files that are whole or not there, each window once, within sizes and times."

import importlib.util
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdm.config import load_settings
from pdm.data import archive as archive_module
from pdm.data.archive import Archive, Keep, open_archive, refuse_mixed
from pdm.data.parquet import Place, Row, parse_name, read_group, to_parquet
from pdm.data.store import Store
from pdm.data.window import MAX_EPOCH, AssetPath, Window
from pdm.errors import InvalidConfig, InvalidInput, InvalidWindow, PartMissing

PUMP, FAN = AssetPath.parse("acme/lyon/hall-2/line-1/pump-07"), AssetPath.parse("acme/lyon/hall-2/line-1/fan-01")
DAY_NS = 86_400 * 10**9
START_NS = 1_767_225_600 * 10**9  # 1 January 2026


def window(seq: int, length: int = 16, **more) -> Window:
    samples = np.random.default_rng(seq).normal(size=(2, length)).astype(np.float32)
    given = {"stream": "vibration-de", "epoch": 77, "seq": seq, "oldest": 0, "t0_ns": START_NS + seq * 10**10, "rate_hz": 25600.0,
             "channels": ("h", "v"), "units": ("g", "g"), "samples": samples, "conditions": {"speed_rpm": 1500.0}}
    return Window(**given | more)


def seqs(archive: Archive, *args, **kwargs) -> list[int]:
    return [w.seq for _, w in archive.read(*args, **kwargs)]


# s3:// where there is one: PREDMAINT_TEST_S3_URL=s3://bucket/folder, s3fs installed, the endpoint in AWS_ENDPOINT_URL
S3_URL = os.environ.get("PREDMAINT_TEST_S3_URL", "")


@pytest.fixture(params=["file", "memory", *(["s3"] if S3_URL else [])])
def url(request, tmp_path):
    return {"file": f"file:{tmp_path}/raw", "memory": f"memory:{uuid.uuid4()}", "s3": f"{S3_URL}/{uuid.uuid4()}"}[request.param]


# --- what comes back ---

finite_or_not = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
name = st.text(st.characters(exclude_characters="/+#\x00$", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda s: not s[0].isspace())
number = st.integers(0, MAX_EPOCH - 1)


@given(st.lists(finite_or_not, min_size=1, max_size=40), st.integers(1, 3), number, number, number, st.dictionaries(st.text(max_size=5), st.floats()),
       name, name, st.floats(1e-3, 1e7))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_window_comes_back_bit_for_bit(tmp_path, values, rows, epoch, seq, t0_ns, conditions, asset, stream, rate_hz):
    x = np.tile(np.array(values, np.float32), (rows, 1))
    w = Window(stream, epoch, seq, min(seq, 5), t0_ns, rate_hz, tuple(f"c{i}" for i in range(rows)), ("g",) * rows, x, conditions)
    path = AssetPath("acme", "lyon", "hall 2", "line=1", asset)
    with Archive(f"file:{tmp_path}/{uuid.uuid4()}") as archive:
        archive.add(path, w, why="low_p")
    (where, back), = archive.read(path, stream, why="low_p")
    assert where == path
    assert back.samples.tobytes() == x.tobytes() and back.samples.shape == x.shape
    assert {**vars(back), "samples": 0, "conditions": 0} == {**vars(w), "samples": 0, "conditions": 0}
    assert np.array_equal(list(back.conditions.values()), list(conditions.values()), equal_nan=True) and list(back.conditions) == list(conditions)


def test_windows_are_read_in_time_order_over_assets_streams_kinds_and_days(url):
    rng, sent = random.Random(1), []
    with Archive(url, Keep(rows_per_file=7)) as archive:
        for seq in rng.sample(range(300), 300):
            path, stream = rng.choice([PUMP, FAN]), rng.choice(["a", "b"])
            archive.add(path, window(seq, stream=stream, t0_ns=START_NS + seq * DAY_NS // 100), why=rng.choice(["healthy", "alarm", "low_p"]))
            sent.append((seq, path, stream))
    assert len(archive.store.files()) > 40
    assert [(w.seq, p, w.stream) for p, w in archive.read()] == sorted(sent)
    assert seqs(archive, FAN, "b") == sorted(seq for seq, p, s in sent if (p, s) == (FAN, "b"))
    assert seqs(archive, since_ns=START_NS + DAY_NS, until_ns=START_NS + 2 * DAY_NS) == list(range(100, 200))
    by_reason = [seqs(archive, why=why) for why in ("healthy", "alarm", "low_p")]
    assert sorted(sum(by_reason, [])) == list(range(300))
    assert seqs(archive, why="suspicious") == sorted(by_reason[1] + by_reason[2])


def test_what_is_no_window_is_refused_with_the_reason():
    archive = Archive(f"memory:{uuid.uuid4()}")
    for change, text in [({"samples": np.zeros((2, 4))}, "float32 .channel, sample.; got float64"), ({"samples": np.zeros(4, np.float32)}, r"\[4\]"),
                         ({"channels": ("h",)}, "1 channel names"), ({"t0_ns": -5}, "t0_ns = -5"), ({"epoch": 2**63}, "epoch = 9223372036854775808")]:
        with pytest.raises(InvalidWindow, match=text):
            archive.add(PUMP, window(0, **change))


# --- once ---

@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 25), st.sampled_from(["healthy", "alarm"]), st.sampled_from(["", "", "flush", "restart", "compact"])),
                max_size=60))
@settings(max_examples=40, deadline=None)
def test_whatever_writers_do_each_window_is_read_once(steps):
    url = f"memory:{uuid.uuid4()}"
    writers = [Archive(url, Keep(rows_per_file=5)) for _ in range(3)]
    for who, seq, why, then in steps:
        writers[who].add(PUMP, window(seq, 4), why)
        if then:
            writers[who].flush()
        if then == "restart":
            writers[who] = Archive(url, Keep(rows_per_file=5))
        if then == "compact":
            writers[who].compact(START_NS + 2 * DAY_NS)
    for w in writers:
        w.flush()
    assert seqs(writers[0]) == sorted({seq for _, seq, *_ in steps})
    assert set(seqs(writers[0], why="alarm")) == {seq for _, seq, why, _ in steps if why == "alarm"}
    writers[0].compact(START_NS + 2 * DAY_NS)
    assert seqs(writers[1]) == sorted({seq for _, seq, *_ in steps})
    assert writers[0].compact(START_NS + 2 * DAY_NS) == 0  # once is enough
    files = writers[0].store.files()
    for kind in ("healthy", "suspicious"):
        assert sum(f.rows for f in files if f.place.kind == kind) <= 26


def test_a_restart_that_adds_everything_again_writes_nothing(url):
    for portion in (1, 7, 100):
        archive = Archive(url)
        for seq in range(50):
            archive.add(PUMP, window(seq), why="alarm" if seq % 5 == 0 else "healthy")
            if seq % portion == portion - 1:
                archive.flush()
        archive.flush()
        assert sum(f.rows for f in archive.store.files()) == 50
    assert seqs(archive) == list(range(50))


def test_a_writer_that_forgot_looks_again(monkeypatch):
    monkeypatch.setattr(archive_module, "_REMEMBERED", 10)
    url = f"memory:{uuid.uuid4()}"
    archive = Archive(url)
    for _ in range(3):
        for day in range(8):
            for seq in range(6):
                archive.add(PUMP, window(100 * day + seq, t0_ns=START_NS + day * DAY_NS + seq))
            if day == 4:
                archive.flush()
        assert len(archive._days) <= 3
    archive.flush()
    assert sum(f.rows for f in archive.store.files()) == 48


WRITER = """
import sys
import numpy as np
from pdm.data.archive import Archive, Keep
from pdm.data.window import AssetPath, Window
url, flush_every = sys.argv[1], int(sys.argv[2])
path = AssetPath.parse("acme/lyon/hall-2/line-1/pump-07")
archive = Archive(url, Keep(rows_per_file=20))
print("up", flush=True)
for seq in range(400):
    x = np.random.default_rng(seq).normal(size=(2, 2560)).astype(np.float32)
    t0_ns = 1_767_225_600 * 10**9 + seq * 10**12  # some days
    archive.add(path, Window("vibration-de", 77, seq, 0, t0_ns, 25600.0, ("h", "v"), ("g", "g"), x), "alarm" if seq % 3 else "healthy")
    if seq % flush_every == 0:
        archive.flush()
    if seq % 150 == 149:
        archive.compact(t0_ns)
archive.flush()
print("done", flush=True)
"""


def test_a_writer_that_is_killed_leaves_whole_files_and_a_restart_completes_them(tmp_path):
    rng, url, reader = random.Random(7), f"file:{tmp_path}/raw", Archive(f"file:{tmp_path}/raw")
    killed, most = 0, 0
    for attempt in range(12):
        p = subprocess.Popen([sys.executable, "-c", WRITER, url, str(rng.choice([1, 3, 11]))], stdout=subprocess.PIPE, text=True)
        assert p.stdout.readline() == "up\n"
        if attempt < 11:
            time.sleep(rng.uniform(0, 0.6))
            p.send_signal(signal.SIGKILL)
        killed += p.wait() == -signal.SIGKILL
        got = [(w.seq, w.samples[0, 0]) for _, w in reader.read()]  # a damaged file would raise
        assert len({seq for seq, _ in got}) == len(got) >= most, "a window was lost or stands twice"
        assert all(first == np.random.default_rng(seq).normal(size=(2, 2560)).astype(np.float32)[0, 0] for seq, first in got)
        most = len(got)
    assert killed >= 3
    assert seqs(reader) == list(range(400))
    reader.sweep(time.time_ns() + 2 * 3600 * 10**9)
    assert list((tmp_path / "raw" / "_aside").iterdir()) == []


def test_reading_goes_on_while_others_write_compact_and_sweep(tmp_path):
    url, stop, errors = f"file:{tmp_path}/raw", threading.Event(), []
    with Archive(url, Keep(rows_per_file=10)) as archive:
        for seq in range(300):
            archive.add(PUMP, window(seq), why="alarm")
            if seq % 2:
                archive.flush()

    def disturb():
        try:
            writer, n = Archive(url, Keep(rows_per_file=500, retention_days=1e-6)), 0
            while not stop.is_set():
                n += 1
                other = window(n, epoch=1, stream="other")
                writer.add(FAN, other)
                writer.flush()
                writer.compact(START_NS + 9 * DAY_NS)
                writer.sweep(START_NS + 9 * DAY_NS)
        except Exception as e:
            errors.append(e)
            raise

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(10):
            assert seqs(Archive(url), PUMP) == list(range(300))
    finally:
        stop.set()
        thread.join()
    assert not errors


def test_a_file_that_is_merged_between_a_look_at_its_folder_and_a_look_at_itself_is_not_missed(tmp_path, monkeypatch):
    archive, walk = Archive(f"file:{tmp_path}/raw"), os.walk
    for seq in range(5):
        archive.add(PUMP, window(seq))
        archive.flush()

    def slowly(folder):
        for at, folders, names in walk(folder):
            if names:
                monkeypatch.setattr(os, "walk", walk)
                assert Archive(archive.store.url).compact(START_NS + 9 * DAY_NS) == 4
            yield at, folders, names

    monkeypatch.setattr(os, "walk", slowly)
    assert seqs(archive) == list(range(5))


# --- damage and stores that are away ---

def test_no_turned_bit_is_read_as_a_sample():
    rows = [Row(window(seq, 64), "alarm") for seq in range(3)]
    data, rng = to_parquet(rows), random.Random(3)
    for _ in range(400):
        hurt = bytearray(data)
        hurt[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            back, _ = read_group(BytesIO(bytes(hurt)), "x", "vibration-de")
        except InvalidInput as e:
            assert e.reason == "damaged"
        else:  # a bit of the footer that says nothing of the samples
            assert all(a.window.samples.tobytes() == b.window.samples.tobytes() for a, b in zip(rows, back, strict=True))


@given(st.binary(max_size=200), st.booleans())
@settings(deadline=None)
def test_no_bytes_make_the_reader_crash(data, framed):
    with pytest.raises(InvalidInput, match="damaged"):
        read_group(BytesIO(b"PAR1" + data + len(data).to_bytes(4, "little") + b"PAR1" if framed else data), "x", "s")


def test_a_file_that_is_not_the_archives_is_passed_over(url, tmp_path):
    with Archive(url) as archive:
        archive.add(PUMP, window(1))
    folder = archive.store.files()[0].name.rsplit("/", 1)[0]
    for foreign in ("notes.txt", "x.parquet", "_SUCCESS", ".part-0.parquet"):
        archive.store._fs.pipe_file(f"{folder}/{foreign}", b"anything")
    assert seqs(archive) == [1]
    assert parse_name("r", f"r/{'x=1/' * 8}{0:019d}-{0:019d}-1-{'0' * 16}.parquet", 1) is None


def test_a_store_that_fails_loses_nothing_that_was_taken(tmp_path):
    url = f"file:{tmp_path}/raw"
    (tmp_path / "raw").write_text("somebody's file")
    archive = Archive(url)
    for seq in range(5):
        assert archive.add(PUMP, window(seq))
    for _ in range(2):
        with pytest.raises(PartMissing, match="archive file:.* does not answer") as e:
            archive.flush()
    assert e.value.exit_code == 2
    (tmp_path / "raw").unlink()
    archive.flush()
    assert seqs(archive) == list(range(5))


@pytest.mark.parametrize("scheme, module", [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_driver_says_what_to_install(scheme, module):
    if importlib.util.find_spec(module):
        pytest.skip(f"{module} is here")
    with pytest.raises(PartMissing, match=r"for s3: and gs: 'predmaint\[stores\]'"):
        Archive(f"{scheme}://bucket/x")


@pytest.mark.parametrize("url", ["", "file:", "memory:///", "ftp://host/x", "/plain/folder", "s3:"])
def test_a_url_that_is_no_archive_is_refused(url):
    with pytest.raises(InvalidConfig, match="an archive is at"):
        Store(url)


# --- sizes and times ---

@given(st.floats(0, 1), st.integers(0, MAX_EPOCH - 1))
@settings(max_examples=30, deadline=None)
def test_the_sample_of_healthy_windows_is_fair_and_the_same_everywhere(share, epoch):
    windows = [window(seq, 1, epoch=epoch) for seq in range(1500)]
    kept = [Keep(healthy_share=share).why(PUMP, w) for w in windows]
    assert kept == [Keep(healthy_share=share, max_gb=1).why(PUMP, w) for w in windows]
    assert abs(kept.count("healthy") / 1500 - share) < 6 * np.sqrt(share * (1 - share) / 1500) + 1e-9


def test_suspicion_comes_before_the_sample():
    nothing, w = Keep(healthy_share=0), window(1)
    assert [nothing.why(PUMP, w, **k) for k in ({}, {"p_value": 0.5}, {"p_value": 1e-4}, {"alarm": True}, {"sensor_ok": False})] \
        == [None, None, "low_p", "alarm", "sensor_fault"]


@pytest.mark.parametrize("field, value", [("healthy_share", -0.1), ("p_below", 2), ("max_gb", 0), ("rows_per_file", 0), ("retention_days", float("nan"))])
def test_a_policy_that_makes_no_sense_is_refused(field, value):
    with pytest.raises(InvalidConfig, match=field):
        Keep(**{field: value})


def test_files_stay_below_their_sizes(url, monkeypatch):
    monkeypatch.setattr(archive_module, "_FILE_BYTES", 40_000)
    monkeypatch.setattr(archive_module, "_BUFFER_BYTES", 100_000)
    archive = Archive(url, Keep(rows_per_file=9))
    for seq in range(120):
        archive.add(PUMP, window(seq, 8 if seq < 60 else 1000, stream=f"s{seq % 6}"))
        assert archive._held <= 108_000
    archive.flush()
    assert archive._held == 0 and not archive._buffer
    assert all(f.rows <= 9 and f.size < 50_000 for f in archive.store.files())
    assert seqs(archive) == list(range(120))


def test_the_limit_of_a_day_outlives_a_restart_and_holds_for_one_asset_alone(url):
    def fill(path, why, first):
        with Archive(url, Keep(max_mb_per_day=1.0)) as archive:
            for seq in range(first, first + 100):
                archive.add(path, window(seq, 2560), why)
        return archive.refused

    refused = [fill(PUMP, "healthy", 0), fill(PUMP, "healthy", 200), fill(PUMP, "alarm", 400), fill(FAN, "alarm", 600)]
    assert 70 < refused[0] < 80 and 90 < refused[1] <= 100 and 65 < refused[2] < 80 and 45 < refused[3] < 55


def test_sweep_removes_by_age_then_by_size_healthy_first(url):
    archive = Archive(url, Keep(retention_days=10, suspicious_retention_days=20))
    for day in range(30):
        archive.add(PUMP, window(2 * day, t0_ns=START_NS + day * DAY_NS), "healthy")
        archive.add(FAN, window(2 * day + 1, t0_ns=START_NS + day * DAY_NS + 1), "alarm")
    archive.flush()
    now = START_NS + 30 * DAY_NS
    assert archive.sweep(now).files == 20 + 10
    assert {f.day for f in (f.place for f in archive.store.files()) if f.kind == "healthy"} == {f"2026-01-{d}" for d in range(21, 31)}
    one = archive.store.files()[0].size
    Archive(url, Keep(max_gb=12.5 * one / 1e9)).sweep(now)
    assert sum(f.size for f in archive.store.files()) <= 12.5 * one
    assert {f.place.kind for f in archive.store.files()} == {"suspicious"}
    assert sorted(f.place.day for f in archive.store.files())[-1] == "2026-01-30"
    assert archive.sweep(now).files == 0
    assert archive.sweep(START_NS + 400 * DAY_NS).files > 0
    assert archive.store.files() == []
    if url.startswith("file:"):
        assert [p.name for p in Path(url[5:]).iterdir()] == ["_aside"]
    archive.add(PUMP, window(0))  # what was swept is not remembered as stored
    archive.flush()
    assert seqs(archive) == [0]


def test_the_settings_are_the_policy(tmp_path):
    assert open_archive(load_settings()) is None
    archive = open_archive(load_settings(archive_url=f"file:{tmp_path}"))
    assert archive.keep == Keep()
    archive = open_archive(load_settings(archive_url=f"file:{tmp_path}", archive_healthy_share=0.5, archive_max_gb=7, archive_rows_per_file=3))
    assert archive.keep == Keep(healthy_share=0.5, max_gb=7, rows_per_file=3)
    with pytest.raises(InvalidConfig, match="archive_retention_days"):
        load_settings(archive_retention_days=0)


# --- what fits together ---

@pytest.mark.parametrize("change, what", [({"rate_hz": 12800.0}, "rates"), ({"length": 8}, "lengths"), ({"units": ("g", "mm/s")}, "units"),
                                          ({"channels": ("h", "a")}, "channels")])
def test_windows_that_do_not_fit_together_are_refused_and_named(change, what):
    with pytest.raises(InvalidInput, match=f"different {what} .*pump-07.*, seq 0.*fan-01.*, seq 1") as e:
        refuse_mixed((PUMP, window(0)), (FAN, window(1, **change)))
    assert e.value.reason == "mixed"


def test_memory_does_not_grow_with_the_number_of_windows(tmp_path):
    code = """
import resource, sys
import numpy as np
from pdm.data.archive import Archive, Keep
from pdm.data.window import AssetPath, Window
archive, x, n = Archive(sys.argv[1], Keep(max_mb_per_day=1e6)), np.random.default_rng(0).normal(size=(2, 2560)).astype(np.float32), int(sys.argv[2])
path = AssetPath.parse("a/b/c/d/e")
with archive:
    for seq in range(n):
        archive.add(path, Window("s", 1, seq, 0, seq * 10**10, 25600.0, ("h", "v"), ("g", "g"), x + np.float32(seq)))
assert sum(1 for _ in archive.read()) == n
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    def mb(n):
        done = subprocess.run([sys.executable, "-c", code, f"file:{tmp_path}/{n}", str(n)], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert mb(6000) < mb(1500) + 60  # 90 MB of samples more


def test_places_sort_and_name_folders_for_hive():
    place = Place(PUMP, "2026-01-01", "a/b", "healthy")
    assert place.folder == ("enterprise=acme/site=lyon/area=hall-2/line=line-1/asset=pump-07/day=2026-01-01/stream=a%2Fb/kind=healthy")
