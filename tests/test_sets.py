"Real data sets: files that are fetched, continued and checked, archives that are not trusted, and three sets in the shape of the real ones."

import errno
import hashlib
import io
import os
import stat
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.io import savemat
from web import Web

from pdm.data import cwru, femto, ims
from pdm.data.fetch import Source, data_dir, goes_on, part_file, retrieve, write_aside
from pdm.data.run import Run
from pdm.data.unpack import members, stays_inside
from pdm.errors import InvalidInput, InvalidWindow, PartMissing

BLOB = np.random.default_rng(1).bytes(3 * 2**20 + 17)


class Host(Web):
    "`ranges`: it knows ranges; `cut`: it hangs up after so many bytes of an answer, so many times."

    def __init__(self):
        self.asked: list[tuple[str, str | None, int]] = []  # path, Range header, status
        self.ranges, self.cut, self.cuts, self.length = True, 0, 0, True
        super().__init__()

    def answer(self, request):
        data, asked = self.files.get(request.path), request.headers.get("Range")
        status, start = (404, 0) if data is None else (200, 0)
        if data is not None and asked and self.ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            status = 206 if start < len(data) else 416
        self.asked.append((request.path, asked, status))
        if data is None or status == 416:
            return request.send_error(status)
        body = data[start:]
        request.send_response(status)
        if status == 206:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if self.length:
            request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if self.cuts > 0:
            self.cuts -= 1
            body = body[:self.cut]
        request.wfile.write(body)

    def source(self, name: str, data: bytes, sha256: str | None = None, size: int | None = None) -> Source:
        return Source("host", self.put(name, data), name, len(data) if size is None else size, sha256 or hashlib.sha256(data).hexdigest())


@pytest.fixture
def host():
    h = Host()
    yield h
    h.close()


def get(source: Source, cache: Path, **more) -> bytes:
    return retrieve("things", [source], Path.read_bytes, cache, **more)


# --- fetch ---

def test_a_cut_connection_is_continued_at_once(host, tmp_path):
    host.cut, host.cuts = 2**20, 2
    seen: list[int] = []
    assert get(host.source("a.bin", BLOB), tmp_path, progress=lambda name, done, total: seen.append(done)) == BLOB
    assert [(a[1], a[2]) for a in host.asked] == [(None, 200), ("bytes=1048576-", 206), ("bytes=2097152-", 206)]
    assert seen == sorted(seen) and seen[-1] == len(BLOB)
    assert os.listdir(tmp_path) == ["a.bin"]


def test_what_arrived_before_a_failure_is_kept_for_the_next_try(host, tmp_path):
    source = host.source("a.bin", BLOB)
    down = threading.Event()

    def stop(_name, done, _total):
        if done >= 2**20 and not down.is_set():
            down.set()
            raise OSError(errno.EIO, "the disk was pulled")
    with pytest.raises(PartMissing, match=r"1 MB are kept, the next try goes on from there"):
        get(source, tmp_path, progress=stop)
    assert part_file(source, tmp_path).stat().st_size >= 2**20
    host.asked.clear()
    assert get(source, tmp_path) == BLOB
    assert host.asked[0][1] == f"bytes={2**20}-" and host.asked[0][2] == 206
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_host_without_ranges_starts_anew(host, tmp_path):
    source = host.source("a.bin", BLOB)
    part_file(source, tmp_path).write_bytes(BLOB[:1000])
    host.ranges = False
    assert get(source, tmp_path) == BLOB
    assert host.asked == [("/a.bin", "bytes=1000-", 200)]


@pytest.mark.parametrize("kept", [b"of another file" * 10, BLOB + b"longer than it may be", BLOB[:-1] + b"?"], ids=["other", "too long", "whole but wrong"])
def test_a_part_of_something_else_does_not_spoil_the_file(host, tmp_path, kept):
    source = host.source("a.bin", BLOB)
    part_file(source, tmp_path).write_bytes(kept)
    assert get(source, tmp_path) == BLOB
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("now", [b"a shorter file", BLOB + b"grown"], ids=["shorter", "longer"])
def test_a_file_that_changed_at_the_host_is_not_continued(host, tmp_path, now):
    source = host.source("a.bin", BLOB)
    part_file(source, tmp_path).write_bytes(BLOB[:1000])
    host.files["/a.bin"] = now
    with pytest.raises(PartMissing, match="it ends before byte 1,001, 3,145,745 bytes were expected|it sends more than the 3,145,745 bytes"):
        get(source, tmp_path)
    assert host.asked[0][1:] in (("bytes=1000-", 416), ("bytes=1000-", 206)) and len(host.asked) <= 2
    assert os.listdir(tmp_path) == []


def test_a_host_that_is_out_of_order_costs_nothing_of_what_is_kept(host, tmp_path):
    source = host.source("a.bin", BLOB)
    part_file(source, tmp_path).write_bytes(BLOB[:1000])
    del host.files["/a.bin"]
    with pytest.raises(PartMissing, match="404"):
        get(source, tmp_path)
    assert part_file(source, tmp_path).read_bytes() == BLOB[:1000]


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("size, said", [(len(BLOB) - 5, "more than the 3,145,740 bytes"), (len(BLOB) + 5, "3,145,745 bytes, 3,145,750 were expected|it ends before byte 3,145,746,")])
def test_a_host_that_sends_too_much_or_too_little_is_told_of(host, tmp_path, size, said, announced):
    host.length = announced
    with pytest.raises(PartMissing, match=said):
        get(host.source("a.bin", BLOB, size=size), tmp_path)
    assert not (tmp_path / "a.bin").exists()


def test_a_wrong_hash_is_one_clear_line_and_leaves_nothing(host, tmp_path):
    with pytest.raises(PartMissing, match="host: its SHA-256 is not the expected one") as e:
        get(host.source("a.bin", BLOB, sha256="0" * 64), tmp_path)
    assert "\n" not in str(e.value) and "put a.bin (SHA-256 000000000000…) there by hand" in str(e.value)
    assert os.listdir(tmp_path) == [] and len(host.asked) == 1


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_fetched(host, tmp_path):
    with pytest.raises(PartMissing, match="no space left on the disk: it takes 1,000,000,000,000 MB"):
        get(host.source("a.bin", BLOB, size=10**18), tmp_path)
    assert host.asked == [] and os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_on_the_way_is_one_clear_line(host, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(PartMissing, match="host: no space left on the disk"):
        get(host.source("a.bin", BLOB), tmp_path, progress=full)


def test_a_cache_that_cannot_be_written_says_which_setting_to_change(host, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(PartMissing, match="can't be written .*set PREDMAINT_CACHE_DIR"):
        get(host.source("a.bin", BLOB), tmp_path / "file")
    with pytest.raises(PartMissing, match="set PREDMAINT_CACHE_DIR"):
        write_aside(tmp_path / "file" / "x", lambda f: f.write(b""))
    assert host.asked == []


def test_two_at_once_do_not_write_into_one_part(host, tmp_path):
    source = host.source("a.bin", BLOB)
    both = threading.Barrier(2)
    results: list[bytes] = []

    def one():
        both.wait()
        results.append(get(source, tmp_path))
    threads = [threading.Thread(target=one) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [BLOB, BLOB] and os.listdir(tmp_path) == ["a.bin"]


def test_a_true_progress_is_a_line_on_stderr(host, tmp_path, capfd):
    get(host.source("a.bin", BLOB), tmp_path, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("\rthings, host: 0 of 3 MB") and err.endswith("3 of 3 MB \n")


@given(st.integers(0, 2000), st.integers(1, 2000), st.sampled_from([200, 206, 416]), st.integers(0, 2000), st.integers(0, 2000), st.integers(1, 2000))
def test_only_the_rest_of_the_same_file_is_appended(have, size, status, first, last, total):
    wanted = have > 0 and status == 206 and (first, last, total) == (have, size - 1, size)
    assert goes_on(have, size, status, f"bytes {first}-{last}/{total}") is wanted
    assert goes_on(have, size, 206, f"bytes {have}-{size - 1}/{size}") is (have > 0)


# --- unpack ---

def zipped(files: dict[str | zipfile.ZipInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in files.items():
            z.writestr(name, data)
    return out.getvalue()


EVIL = ["../../evil.csv", "/etc/evil.csv", "a/../../evil.csv", "..\\evil.csv", "C:/evil.csv"]


@pytest.mark.parametrize("ending", ["zip", "tar", "tar.gz", "zip in zip"])
def test_paths_that_lead_out_and_links_are_passed_over(tmp_path, ending):
    path = tmp_path / "a" / "x"
    path.parent.mkdir()
    if ending.startswith("zip"):
        link = zipfile.ZipInfo("link.csv")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        data = zipped({**{p: b"evil" for p in EVIL}, link: b"/etc/passwd", "good.csv": b"good"})
        path.write_bytes(zipped({"more.zip": data, "../../out.zip": data}) if ending == "zip in zip" else data)
    else:
        with tarfile.open(path, "w:gz" if ending == "tar.gz" else "w") as t:
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info = tarfile.TarInfo("link.csv")
                info.type, info.linkname = kind, "/etc/passwd"
                t.addfile(info)
            for name in [*EVIL, "good.csv"]:
                info = tarfile.TarInfo(name)
                info.size = 4
                t.addfile(info, io.BytesIO(b"good" if name == "good.csv" else b"evil"))
    found = list(members(path, lambda p: p.endswith(".csv")))
    assert [data for _, data in found] == [b"good"]
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


@given(st.text(st.sampled_from("ab./\\:\0"), max_size=12))
def test_a_path_that_is_let_in_stays_in_its_folder(path):
    if stays_inside(path):
        assert os.path.normpath(os.path.join("/folder", path)).startswith("/folder")


@pytest.mark.parametrize("form", ["one large member", "many members", "in a zip", "tar, passed over"])
def test_a_bomb_is_not_unpacked(tmp_path, form):
    path = tmp_path / "bomb"
    zeros = bytes(2**20)
    if form.startswith("tar"):
        with tarfile.open(path, "w:gz") as t:
            info = tarfile.TarInfo("ignored.txt")
            info.size = 64 * 2**20
            t.addfile(info, io.BytesIO(bytes(info.size)))
    else:
        files = {f"{k}.csv": zeros for k in range(64)} if form == "many members" else {"0.csv": zeros * 64}
        path.write_bytes(zipped({"inner.zip": zipped({"pad.zip": zeros * 64})} if form == "in a zip" else files))
    with pytest.raises(InvalidInput, match="unpacks to more than|has at most") as e:
        list(members(path, lambda p: p.endswith(".csv"), largest=2**24, total=2**24))
    assert e.value.reason == "oversize"


def test_a_zip_that_lies_about_a_members_size_is_refused(tmp_path):
    path = tmp_path / "x.zip"
    data = bytearray(zipped({"0.csv": bytes(2**20)}))
    for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):  # uncompressed size, in the directory and before the member
        at = data.index(signature) + offset
        data[at:at + 4] = (100).to_bytes(4, "little")
    path.write_bytes(bytes(data))
    with pytest.raises(InvalidInput, match="damaged|has at most"):
        list(members(path, lambda p: True, largest=1000))


def test_zips_in_zips_have_an_end(tmp_path):
    data = b"core"
    for _ in range(8):
        data = zipped({"inner.zip": data})
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(InvalidInput, match="deep: at most 4"):
        list(members(tmp_path / "x.zip", lambda p: True))


@pytest.mark.parametrize("damage", [b"", b"<html>moved</html>", zipped({"a": b"x" * 999})[:-30], b"Rar!\x1a\x07\x01\x00"], ids=["empty", "a page", "a zip cut short", "another kind"])
def test_what_is_no_archive_is_said_to_be_damaged(tmp_path, damage):
    (tmp_path / "x.zip").write_bytes(damage)
    with pytest.raises(InvalidInput, match="x.zip is damaged"):
        list(members(tmp_path / "x.zip", lambda p: True))
    with pytest.raises(PartMissing, match="can't be read"):
        list(members(tmp_path / "none.zip", lambda p: True))


# --- femto: made-up files in the shape of the real ones ---

def acc_csv(x: np.ndarray, sep: str = ",", point: str = ".") -> bytes:
    return "\n".join(sep.join(["9", "39", "39", "65664", *(f"{v:.3f}".replace(".", point) for v in row)]) for row in x.T).encode()


def temp_csv(values, sep: str = ",") -> bytes:
    return "\n".join(sep.join(["9", "39", "39", "1", str(v)]) for v in values).encode()


def waves(n: int, seed: int = 0) -> np.ndarray:
    x = np.round(np.random.default_rng(seed).normal(0, 0.5, (n, 2, 2560)), 3)
    x[0, 0, 5], x[-1, 1, 7] = 48.148, -41.297
    return x


@pytest.fixture(scope="module")
def femto_zip() -> tuple[bytes, dict[str, np.ndarray]]:
    made = {name: waves(8, k) for k, name in enumerate([*femto.LEARNING, "Bearing1_3"])}
    styles = [(",", "."), (";", "."), (";", ",")]
    sets: dict[str, dict[str, bytes]] = {"Training_set.zip": {}, "Validation_Set.zip": {}, "Test_set.zip": {}}
    for name, x in made.items():
        inner, folder = ("Training_set.zip", "Learning_set") if name in femto.LEARNING else ("Validation_Set.zip", "Full_Test_Set")
        for k, one in enumerate(x):
            sets[inner][f"{folder}/{name}/acc_{k + 1:05d}.csv"] = acc_csv(one, *styles[k % 3])
    sets["Training_set.zip"]["Learning_set/Bearing1_1/temp_00001.csv"] = temp_csv([70.0, 70.5, 71.0])
    sets["Training_set.zip"]["Learning_set/Bearing1_1/temp_00002.csv"] = temp_csv([3276.7] * 3, ";")
    sets["Training_set.zip"]["Learning_set/Bearing1_2/temp_00001.csv"] = temp_csv(["OVERFLOW"] * 3)
    sets["Test_set.zip"]["Test_set/Bearing1_3/acc_00001.csv"] = acc_csv(made["Bearing1_3"][5])  # the same run, cut short
    outer = zipped({"10. FEMTO Bearing/FEMTOBearingDataSet.zip": zipped({k: zipped(v) for k, v in sets.items()}),
                    "10. FEMTO Bearing/readme.pdf": b"%PDF"})
    return outer, made


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch, request):
    if "real" not in request.node.name:
        monkeypatch.delenv("PREDMAINT_DATA_DIR", raising=False)


SHORT = {name: femto.Label(6, 4, label.note) for name, label in femto.LEARNING.items()}  # the made-up runs have 8 snapshots


def test_femto_comes_from_the_archive_once_and_then_from_the_cache(host, femto_zip, tmp_path, monkeypatch):
    monkeypatch.setattr(femto, "LEARNING", SHORT)
    data, made = femto_zip
    names = [*femto.LEARNING, "Bearing1_3"]
    first = femto.load(names, cache=tmp_path, sources=[host.source("femto.zip", data)])
    (tmp_path / "femto.zip").unlink()
    again = femto.load(names, cache=tmp_path, sources=[])
    assert [r.name for r in first] == names == [r.name for r in again] and len(host.asked) == 1
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a.snapshots, made[a.name].astype(np.float32)) and np.array_equal(a.snapshots, b.snapshots)
        assert a.snapshots.dtype == np.float32 and a.snapshots.shape == (8, 2, 2560)
        assert (a.onset, a.healthy_end, a.rpm, a.load_n, a.notes, a.licence) == (b.onset, b.healthy_end, b.rpm, b.load_n, b.notes, b.licence)
        assert np.array_equal(a.t_s, 10 * np.arange(8)) and a.every_s == 10
    by_name = {r.name: r for r in again}
    assert by_name["Bearing1_1"].temperature_c is not None
    assert np.array_equal(by_name["Bearing1_1"].temperature_c, [70.5] * 6 + [np.nan] * 2, equal_nan=True)  # the wire broke after a minute
    assert "the temperature of 2 of 8 snapshots" in " ".join(by_name["Bearing1_1"].notes)
    assert by_name["Bearing1_2"].temperature_c is None and "temperature of 8 of 8" in " ".join(by_name["Bearing1_2"].notes)
    assert by_name["Bearing2_1"].temperature_c is None and "no temperature was recorded" in by_name["Bearing2_1"].notes
    assert by_name["Bearing1_3"].onset is None and by_name["Bearing1_1"].snapshot(0).fault == "none"
    assert by_name["Bearing3_1"].snapshot(7).conditions == {"speed_rpm": 1500.0, "load_n": 5000.0}
    assert by_name["Bearing3_1"].snapshot(7).samples.min() == np.float32(-41.297)


def test_a_corrupt_femto_cache_is_made_again_from_the_archive(host, femto_zip, tmp_path):
    source = host.source("femto.zip", femto_zip[0])
    femto.load(["Bearing1_3"], cache=tmp_path, sources=[source])
    kept = tmp_path / "femto-1" / "Bearing1_3.npz"
    kept.write_bytes(kept.read_bytes()[:2000])
    [r] = femto.load(["Bearing1_3"], cache=tmp_path, sources=[source])
    assert np.array_equal(r.snapshots, femto_zip[1]["Bearing1_3"].astype(np.float32)) and len(host.asked) == 1


def test_femto_without_a_network_says_what_to_do(tmp_path):
    with pytest.raises(PartMissing, match="the FEMTO runs are not in .* connection refused.*put 10. FEMTO Bearing.zip"):
        femto.load(cache=tmp_path, sources=[Source("NASA", "http://127.0.0.1:9/", "10. FEMTO Bearing.zip", 1, "0" * 64)])


def test_a_femto_archive_without_a_run_is_refused(host, tmp_path):
    with pytest.raises(PartMissing, match="does not hold Bearing1_1"):
        femto.load(["Bearing1_1"], cache=tmp_path, sources=[host.source("femto.zip", zipped({"readme.txt": b""}))])


def femto_files(x: np.ndarray, name: str = "Bearing1_3", **changes: bytes) -> list[tuple[str, bytes]]:
    files = {f"acc_{k + 1:05d}": acc_csv(one) for k, one in enumerate(x)} | changes
    return [(f"Full_Test_Set/{name}/{file}.csv", data) for file, data in files.items()]


def test_one_bad_snapshot_is_left_out_and_told_of_and_its_time_is_a_gap():
    x = waves(8)
    run = femto.read_files(femto_files(x, acc_00004=acc_csv(x[3][:, :2000])), ["Bearing1_3"])["Bearing1_3"]
    assert list(run.t_s) == [0, 10, 20, 40, 50, 60, 70] and np.array_equal(run.snapshots, np.delete(x, 3, 0).astype(np.float32))
    assert run.notes[0] == "acc_00004.csv was left out: 2000 rows, 2560 were expected"


def test_labels_follow_the_time_and_not_the_index(monkeypatch):
    monkeypatch.setattr(femto, "LEARNING", SHORT)
    x = waves(8)
    run = femto.read_files(femto_files(x, "Bearing1_1", acc_00002=b"?"), ["Bearing1_1"])["Bearing1_1"]
    assert run.onset is not None and run.t_s[run.onset] == 60 and run.healthy_end == 3


def test_many_bad_snapshots_are_not_the_data_set():
    with pytest.raises(InvalidInput, match="3 snapshots can't be read, 5 can"):
        femto.read_files(femto_files(waves(8), acc_00001=b"?", acc_00002=b"", acc_00003=b"1,2,3"), ["Bearing1_3"])


@given(st.lists(st.tuples(st.floats(-60, 60), st.floats(-60, 60)), min_size=1, max_size=5), st.booleans(), st.sampled_from([(",", "."), (";", "."), (";", ",")]),
       st.sampled_from(["\n", "\r\n"]))
def test_separators_do_not_change_what_is_read(rows, scientific, style, newline):
    sep, point = style
    text = newline.join(sep.join(["9", "39", "39", "65664", *(f"{v:{'.6e' if scientific else '.3f'}}".replace(".", point) for v in row)]) for row in rows)
    assert np.allclose(femto.parse(text.encode(), 6)[:, 4:], rows, atol=1e-3, rtol=1e-5)


@given(st.lists(st.integers(-60_000, 60_000), min_size=1, max_size=50))
def test_the_compact_form_keeps_every_thousandth_of_g(tmp_path_factory, mg):
    x = np.zeros((1, 2, 2560), np.float32)
    x[0, 1, :len(mg)] = np.array(mg, np.float32) / 1000
    path = tmp_path_factory.mktemp("npz") / "Bearing1_3.npz"
    femto.write_npz(path, femto._run("Bearing1_3", x, np.zeros(1), None, [], femto.Label(None, None)))
    assert np.array_equal(femto.read_npz(path).snapshots, x)


@pytest.mark.parametrize("change", [{"acc_hi": np.zeros((1, 100, 2), np.int8)}, {"over_idx": np.array([10**9])}, {"t_s": np.zeros(5)},
                                    {"acc_lo": np.array([{}], dtype=object)}])
def test_a_wrong_npz_is_refused_and_never_unpickled(tmp_path, change):
    good = {"acc_hi": np.zeros((1, 2560, 2), np.int8), "acc_lo": np.zeros((1, 2560, 2), np.uint8), "over_idx": np.zeros(1, int), "over_mg": np.zeros(1, int),
            "t_s": np.zeros(1)}
    np.savez(tmp_path / "Bearing1_3.npz", **(good | change))
    with pytest.raises(InvalidInput, match="is not a FEMTO run in compact form"):
        femto.read_npz(tmp_path / "Bearing1_3.npz")


def test_the_data_folder_is_a_setting(monkeypatch, tmp_path):
    assert data_dir() is None
    monkeypatch.setenv("PREDMAINT_DATA_DIR", str(tmp_path))
    assert data_dir() == tmp_path
    for path, data in femto_files(waves(3)):
        (tmp_path / "femto" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "femto" / path).write_bytes(data)
    [r] = femto.load(["Bearing1_3"], sources=[])
    assert len(r.snapshots) == 3


# --- femto: the real learning set ---

@pytest.fixture(scope="module")
def learning() -> dict[str, Run]:
    folder = data_dir()
    if folder is None or not (folder / "femto_learning").is_dir():
        pytest.skip("no FEMTO runs: pdm.data.femto.load(progress=True) fetches them; PREDMAINT_DATA_DIR names a folder that has femto_learning/")
    return {r.name: r for r in femto.load()}


def test_the_real_femto_runs_are_the_six_of_the_learning_set(learning):
    assert {n: len(r.snapshots) for n, r in learning.items()} == {"Bearing1_1": 2803, "Bearing1_2": 871, "Bearing2_1": 911, "Bearing2_2": 797,
                                                                  "Bearing3_1": 515, "Bearing3_2": 1637}
    assert all(r.snapshots.shape[1:] == (2, 2560) and r.every_s == 10 and r.rate_hz == 25600 for r in learning.values())
    assert {n: (r.onset, r.healthy_end) for n, r in learning.items()} == {n: x[:2] for n, x in femto.LEARNING.items()}
    assert sum(int((np.abs(r.snapshots) > 32.767).sum()) for r in learning.values()) == 122


def test_the_real_femto_runs_get_louder_after_their_onset(learning):
    for r in learning.values():
        level = r.rms()
        assert np.median(level[-5:], 0).max() > 2 * np.median(level[:r.healthy_end], 0).max()


def test_a_real_femto_run_survives_the_compact_form(learning, tmp_path):
    r = learning["Bearing3_1"]
    femto.write_npz(tmp_path / "Bearing3_1.npz", r)
    assert np.array_equal(femto.read_npz(tmp_path / "Bearing3_1.npz").snapshots, r.snapshots)


# --- cwru ---

def cwru_mat(number: int, seconds: float = 1.0, rate_hz: float = 12000, sensors=("DE", "FE", "BA"), **more) -> bytes:
    out, rng = io.BytesIO(), np.random.default_rng(number)
    savemat(out, {f"X{number:03d}_{s}_time": rng.normal(0, 0.3, (int(seconds * rate_hz), 1)) for s in sensors} | more)
    return out.getvalue()


def test_cwru_records_are_fetched_one_by_one_and_cached(host, tmp_path):
    files = {"97": cwru_mat(97, rate_hz=48000, sensors=("DE", "FE"), X097RPM=np.array([[1796]])), "130": cwru_mat(130), "278": cwru_mat(278)}
    sources = {name: host.source(f"{name}.mat", data) for name, data in files.items()}
    records = cwru.load(["278", "97", "130"], cache=tmp_path, source=sources.__getitem__)
    assert [r.name for r in records] == ["278", "97", "130"]
    assert [r.fault for r in records] == ["inner_race", "none", "outer_race"]
    assert [r.rate_hz for r in records] == [12000, 48000, 12000] and [r.rpm for r in records] == [1797, 1796, 1797]
    assert [r.bearing for r in records] == [cwru.BEARINGS["fan"], cwru.BEARINGS["drive"], cwru.BEARINGS["drive"]]
    assert [r.channels for r in records] == [("drive_end", "fan_end", "base"), ("drive_end", "fan_end"), ("drive_end", "fan_end", "base")]
    assert all(r.samples.dtype == np.float32 and r.licence and "Smith" in r.citation for r in records)
    again = cwru.load(["97", "130"], cache=tmp_path, rate_hz=cwru.COMMON_RATE_HZ, source=sources.__getitem__)
    assert {r.rate_hz for r in again} == {12000.0} and {r.windows(2048).shape for r in again} == {(5, 2, 2048), (5, 3, 2048)}
    assert len(host.asked) == 3 and sorted(os.listdir(tmp_path / "cwru")) == ["130.mat", "278.mat", "97.mat"]


def test_a_cwru_record_with_a_wrong_hash_is_not_opened(host, tmp_path, monkeypatch):
    monkeypatch.setattr(cwru, "parse", lambda *_: pytest.fail("opened a file that was not checked"))
    with pytest.raises(PartMissing, match="host: its SHA-256 is not the expected one"):
        cwru.load(["105"], cache=tmp_path, source=lambda name: host.source("105.mat", cwru_mat(105), sha256=cwru.RECORDS["105"].sha256))


def test_the_cwru_table_is_whole_and_says_48_khz_for_the_healthy_ones():
    labels = cwru.RECORDS.values()
    assert len(cwru.RECORDS) == 161 and len({x.sha256 for x in labels}) == 161 and all(len(x.sha256) == 64 for x in labels)
    assert {name for name, x in cwru.RECORDS.items() if x.fault == "none"} == {"97", "98", "99", "100"}
    assert {x.rate_hz for x in labels if x.fault == "none"} == {48000.0}
    assert {(x.end, x.rate_hz) for x in labels} == {("", 48000.0), ("drive", 12000.0), ("drive", 48000.0), ("fan", 12000.0)}
    for x in labels:
        assert (x.position != "") == (x.fault == "outer_race") and (x.size_mil == 0) == (x.fault == "none") == (x.end == "")
        assert x.rate_hz * 16 < x.bytes < 25 * x.rate_hz * 24  # one to three signals of 1 to 20 seconds, as float64
    assert cwru.source("97").url == "https://engineering.case.edu/sites/default/files/97.mat"


@pytest.mark.parametrize("data, said", [
    (cwru_mat(98, X099_DE_time=np.zeros(12000)), "holds X098, X099"), (cwru_mat(105, X105_BA_time=np.full((12000, 1), np.nan)), "BA is not a signal"),
    (cwru_mat(105, sensors=()), "holds no record"), (cwru_mat(105)[:5000], "not a MATLAB 5 file"), (b"", "not a MATLAB 5 file")])
def test_a_cwru_file_that_is_something_else_is_refused(data, said):
    with pytest.raises(InvalidInput, match=said):
        cwru.parse("105", data)


def test_a_cwru_file_with_two_records_gives_its_own():
    both = cwru_mat(99, rate_hz=48000, sensors=("DE",), X098_DE_time=np.zeros((60000, 1)), X098RPM=np.array([[1772]]))
    r = cwru.parse("99", both)
    assert r.samples.shape == (1, 48000) and r.samples.std() > 0.2 and r.rpm == 1750


# --- ims ---

def ims_file(path: Path, columns: int, level: float = 0.1, rows: int = 20480) -> None:
    x = np.random.default_rng(len(path.name)).normal(0, level, (16, columns))
    line = ["\t".join(f"{v:.3f}" for v in row) for row in x]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(line[k % 16] for k in range(rows)) + "\n")


def test_ims_runs_are_read_from_the_unpacked_folders(tmp_path, monkeypatch):
    for name in ("2003.10.22.12.06.24", "2003.10.22.12.11.24", "2003.10.23.12.06.24"):
        ims_file(tmp_path / "ims" / "1st_test" / name, 8)
    for name in ("2004.03.04.09.27.46", "2004.03.04.09.32.46"):
        ims_file(tmp_path / "ims" / "3rd_test" / "4th_test" / "txt" / name, 4)
    (tmp_path / "ims" / "1st_test" / "readme.txt").write_text("not a snapshot")
    monkeypatch.setenv("PREDMAINT_DATA_DIR", str(tmp_path))
    inner, outer, roller = ims.load(["test1_bearing3", "test3_bearing3", "test1_bearing4"])
    assert (inner.failure, outer.failure, roller.failure) == ("inner_race", "outer_race", "ball")
    assert inner.snapshots.shape == (3, 2, 20480) and outer.snapshots.shape == (2, 1, 20480)
    assert list(inner.t_s) == [0, 300, 86400] and inner.channels == ("x", "y") and inner.onset is None
    assert not np.array_equal(inner.snapshots, roller.snapshots)
    [same] = ims.load(["test1_bearing3"], folder=tmp_path / "ims", every=2)
    assert np.array_equal(same.snapshots, inner.snapshots[::2]) and list(same.t_s) == [0, 86400]
    assert np.isclose(inner.load_n or 0, 26689, atol=1) and inner.snapshot(1).windows(2048).shape == (10, 2, 2048)


def test_ims_says_how_to_unpack_the_archive(tmp_path, monkeypatch):
    with pytest.raises(PartMissing, match="PREDMAINT_DATA_DIR, which is not set: unpack the archive once .*7z x.*unrar x"):
        ims.load()
    (tmp_path / "ims").mkdir()
    monkeypatch.setenv("PREDMAINT_DATA_DIR", str(tmp_path))
    with pytest.raises(PartMissing, match="has no 1st_test with files like"):
        ims.load()


def test_an_ims_file_that_is_cut_short_is_left_out_and_told_of(tmp_path):
    for k in range(6):
        ims_file(tmp_path / "2nd_test" / f"2004.02.12.10.{10 * k:02d}.39", 4, rows=20480 if k != 2 else 300)
    run = ims.read_test(tmp_path, ["test2_bearing1"])["test2_bearing1"]
    assert list(run.t_s / 60) == [0, 10, 30, 40, 50] and "got 300 of 4" in run.notes[0]
    for k in (0, 1):
        ims_file(tmp_path / "2nd_test" / f"2004.02.12.10.{10 * k:02d}.39", 8)
    with pytest.raises(InvalidInput, match="files of test 2 can't be read"):
        ims.read_test(tmp_path, ["test2_bearing1"])


def test_the_ims_archive_is_fetched_and_checked(host, tmp_path):
    host.cut, host.cuts = 2**20, 1
    path = ims.download(cache=tmp_path, sources=[host.source("4. Bearings.zip".replace(" ", "_"), BLOB)])
    assert path.read_bytes() == BLOB and len(host.asked) == 2


# --- run ---

@given(st.integers(1, 6), st.integers(1, 3), st.integers(4, 40), st.integers(1, 50), st.integers(1, 50))
def test_windows_never_reach_over_a_pause(n, channels, samples, length, hop):
    x = np.arange(n * samples, dtype=np.float32).reshape(n, 1, samples).repeat(channels, 1)
    run = Run("r", x, 60.0 * np.arange(n), 100.0, ("a",) * channels, ("g",) * channels)
    if length > samples:
        with pytest.raises(InvalidWindow):
            run.windows(length, hop)
        return
    cut, which = run.windows(length, hop)
    assert cut.shape == (n * ((samples - length) // hop + 1), channels, length) and len(which) == len(cut)
    assert np.array_equal(cut[:, 0, 0] // samples, which) and np.array_equal(cut[:, 0, -1] // samples, which)


def test_a_run_may_lie_in_a_memory_map(tmp_path):
    held = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (5, 2, 64))
    held[:] = np.random.default_rng(0).normal(size=held.shape)
    run = Run("r", np.load(tmp_path / "x.npy", mmap_mode="r"), np.arange(5.0), 64.0, ("a", "b"), ("g", "g"))
    assert run.rms().shape == (5, 2) and run.snapshot(-1).duration_s == 1 and run.windows(32)[0].shape == (10, 2, 32)
