"Training data: where windows come from, what of them is taken, and that it is the same wherever it was gathered."

import json
import os
import re
import socket
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdm.data import femto, fetch, mfpt
from pdm.data.archive import Archive
from pdm.data.parts import SHARES, _Comb, take
from pdm.data.sources import read_asset, survey
from pdm.data.spans import Span
from pdm.data.training import gather, load_training, shards
from pdm.data.window import AssetPath, Window
from pdm.errors import InvalidConfig, InvalidInput, NotEnoughData, PartMissing

START_NS = 1_767_225_600 * 10**9  # 1 January 2026
HOUR_NS = 3600 * 10**9
SITES = [f"acme/{site}/hall-{hall}/line-1/{name}" for site in ("lyon", "oslo") for hall in (1, 2) for name in ("pump", "fan")]
NICE = "mfpt/rig/bench/line/nice"


def window(seq: int, seed: int = 0, length: int = 32, **more) -> Window:
    samples = np.random.default_rng([seed, seq]).normal(size=(2, length)).astype(np.float32)
    given = {"stream": "vibration", "epoch": 77, "seq": seq, "oldest": 0, "t0_ns": START_NS + seq * HOUR_NS, "rate_hz": 25600.0,
             "channels": ("h", "v"), "units": ("g", "g"), "samples": samples, "conditions": {"speed_rpm": 1500.0 + seq}}
    return Window(**given | more)


def filled(url: str, assets=("acme/lyon/hall-1/line-1/pump",), windows: int = 200, why: str = "healthy", first: int = 0, **more) -> str:
    "An archive with that many windows of each asset."
    with Archive(url) as archive:
        for i, asset in enumerate(assets):
            for seq in range(first, first + windows):
                archive.add(AssetPath.parse(asset), window(seq, i, **more), why)
    return url


@pytest.fixture
def url():
    return f"memory:{uuid.uuid4()}"


# --- digests ---

def test_equal_data_has_an_equal_digest_whatever_the_path_and_the_name(url, tmp_path):
    there = filled(f"file:{tmp_path}/raw", SITES[:2])
    here, moved = gather(filled(url, SITES[:2]), name="pump"), gather(there)
    assert here.digest == moved.digest
    assert (here.source, here.name) != (moved.source, moved.name)
    assert here.fit_arguments().keys() == moved.fit_arguments().keys()


@pytest.mark.parametrize("change", [{"length": 16}, {"until": "2026-01-08"}, {"windows_per_asset": 150}, {"assets": SITES[:1]}, {"seed": 0}])
def test_the_digest_changes_with_what_was_taken_and_with_nothing_else(url, change):
    filled(url, SITES[:2])
    assert (gather(url).digest == gather(url, **change).digest) == (change == {"seed": 0})


def test_a_saved_folder_comes_back_under_its_digest_and_is_mapped_not_read(url, tmp_path):
    data = gather(filled(url, SITES[:3]))
    back = load_training(data.save(tmp_path / "a"))
    assert back.digest == data.digest and back.hop_s == data.hop_s and back.left_out == data.left_out and back.citation == data.citation
    for part, windows in data.parts.items():
        for key, w in windows.items():
            assert isinstance(back.parts[part][key].samples, np.memmap)
            assert np.array_equal(back.parts[part][key].samples, w.samples) and np.array_equal(back.parts[part][key].t_ns, w.t_ns)
            assert np.array_equal(back.parts[part][key].conditions, w.conditions) and back.parts[part][key].fault == w.fault
    again = load_training(back.save(tmp_path / "a"))  # over the files that it is mapped from
    assert again.digest == back.digest == data.digest
    assert np.array_equal(back.parts["train"][SITES[0]].samples, data.parts["train"][SITES[0]].samples)


def _flip_a_sample(folder: Path) -> None:
    x = np.load(folder / "train.samples.npy", mmap_mode="r+")
    x[5, 1, 3] += 1
    x.flush()


def _call_an_asset_otherwise(folder: Path) -> None:
    told = json.loads((folder / "dataset.json").read_text())
    told["parts"]["train"][0][0] += "_2"
    (folder / "dataset.json").write_text(json.dumps(told))


@pytest.mark.parametrize("damage, told", [
    (_flip_a_sample, "train.samples.npy is not what its digest says"),
    (_call_an_asset_otherwise, "dataset.json is not what its digest says"),
    (lambda f: (f / "test.t_ns.npy").unlink(), "test.t_ns.npy can't be read"),
    (lambda f: (f / "test.t_ns.npy").write_bytes((f / "test.t_ns.npy").read_bytes()[:-8]), "test.t_ns.npy can't be read"),
    (lambda f: np.save(f / "test.t_ns.npy", np.zeros(3)), "holds 3 rows of float64"),
    (lambda f: np.save(f / "test.t_ns.npy", np.array([{}], object)), "can't be read"),
    (lambda f: (f / "dataset.json").write_text("{}"), "Field required"),
    (lambda f: (f / "dataset.json").write_text("no"), "dataset.json"),
    (lambda f: (f / "dataset.json").unlink(), "dataset.json can't be read"),
], ids=["sample", "assets", "gone", "cut", "other", "pickle", "empty", "text", "killed"])  # fmt: skip
def test_a_folder_that_is_not_what_was_saved_is_refused_with_what_to_do(url, tmp_path, damage, told):
    folder = gather(filled(url, SITES[:2])).save(tmp_path / "data")
    damage(folder)
    with pytest.raises(InvalidInput, match=re.escape(told)) as e:
        load_training(folder)
    assert e.value.reason == "damaged" and "run it again" in str(e.value)


def test_a_folder_that_can_not_be_written_is_said(url, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PartMissing, match="name a folder that can"):
        gather(filled(url)).save(tmp_path / "file" / "data")


# --- thinning and parts ---

@given(st.integers(1, 60), st.integers(0, 1000), st.integers(0, 3))
def test_thinning_keeps_the_number_asked_for_in_order_at_even_distances_and_holds_no_more_than_it_says(most, n, seed):
    comb, again = _Comb(most, seed), _Comb(most, seed)
    for i in range(n):
        comb.add(-i)
        again.add(-i)
        assert len(comb._held) <= 4 * most
    numbers = [number for number, _ in comb.kept]
    assert len(numbers) == min(n, most) and numbers == sorted(set(numbers)) and [-i for i in numbers] == [item for _, item in comb.kept]
    assert comb.kept == again.kept
    if most > 4 and n > most:
        apart = np.diff(numbers)
        assert apart.max() <= 1.5 * apart.mean() + 1 and numbers[0] < apart.max() and n - 1 - numbers[-1] < 2 * apart.max()


def test_no_asset_gives_more_than_was_asked_for_and_thinned_windows_say_how_far_apart_they_are(url):
    filled(url, SITES[:2], windows=700)
    data = gather(url, windows_per_asset=175)
    assert all(sum(len(data.parts[p][a]) for p in SHARES if a in data.parts[p]) <= 175 for a in data.assets)
    assert np.allclose(list(data.hop_s.values()), 4 * 3600, rtol=0.03)  # an hour from window to window, and every fourth is left


def test_parts_of_an_asset_share_no_moment_and_have_a_gap_between_them(url):
    filled(url, SITES[:1], windows=300)
    filled(url, SITES[:1], windows=60, why="outer_race", first=310)
    data = gather(url)
    w = {part: windows[SITES[0]].t_ns for part, windows in data.parts.items() if part != "faulty"}
    span_ns = w["test"][-1] - w["train"][0]
    assert w["validate"][0] - w["train"][-1] >= 0.01 * span_ns and w["test"][0] - w["validate"][-1] >= 0.01 * span_ns
    assert data.parts["faulty"][f"{SITES[0]}#outer_race"].t_ns[0] > w["test"][-1]
    assert 0.66 < len(w["train"]) / 300 <= 0.7


def test_windows_that_overlap_in_time_are_never_in_two_parts(url):
    with Archive(url) as archive:  # a window every ms, 32 samples of 1.25 ms each
        for seq in range(400):
            archive.add(AssetPath.parse(SITES[0]), window(seq, t0_ns=START_NS + seq * 10**6))
    data = gather(url)
    ends = {part: windows[SITES[0]].t_ns for part, windows in data.parts.items()}
    assert ends["validate"][0] - 1_250_000 >= ends["train"][-1] and ends["test"][0] - 1_250_000 >= ends["validate"][-1]


def test_alarms_and_unlikely_windows_train_nothing_and_test_nothing(url):
    filled(url)
    for k, why in enumerate(("alarm", "low_p", "sensor_fault", "stopped")):
        filled(url, windows=10, first=300 + 20 * k, why=why)
    data = gather(url)
    assert "faulty" not in data.parts
    assert max(w.t_ns.max() for part in data.parts.values() for w in part.values()) <= START_NS + 201 * HOUR_NS


def test_a_window_that_came_under_suspicion_later_is_no_longer_trained_on(url):
    before = gather(filled(url))
    filled(url, windows=3, first=10, why="alarm")
    after = gather(url)
    gone = set(before.parts["train"][SITES[0]].t_ns) - set(after.parts["train"][SITES[0]].t_ns)
    assert {START_NS + seq * HOUR_NS + 1_250_000 for seq in (10, 11, 12)} <= gone


def test_a_window_with_samples_that_are_no_numbers_is_passed_over(url):
    with Archive(filled(url)) as archive:
        archive.add(AssetPath.parse(SITES[0]), window(500, samples=np.full((2, 32), np.nan, np.float32)))
    assert all(np.isfinite(w.samples).all() for part in gather(url).parts.values() for w in part.values())


def test_an_asset_that_is_new_is_left_out_with_the_reason_and_keeps_nobody_from_a_model(url, tmp_path):
    filled(url)
    filled(url, SITES[1:2], windows=2)
    data = gather(url)
    assert data.assets == (SITES[0],) and "2 windows" in data.left_out[SITES[1]]
    assert load_training(data.save(tmp_path)).left_out == data.left_out


def test_conditions_that_some_assets_do_not_have_are_unknown_for_them_and_those_that_none_has_are_left_out(url):
    filled(url, SITES[:1])
    with Archive(url) as archive:
        for seq in range(200):
            archive.add(AssetPath.parse(SITES[1]), window(seq, conditions={"load_n": 7.0, "ambient_c": np.nan}))
    data = gather(url)
    assert data.condition_names == ("load_n", "speed_rpm")
    given = data.fit_arguments()["conditions"]
    assert np.isnan(given[SITES[0]]["load_n"]).all() and (given[SITES[1]]["load_n"] == 7).all() and (given[SITES[0]]["speed_rpm"] >= 1500).all()


# --- what is refused ---

def test_windows_of_different_shapes_are_refused_with_their_names(url):
    filled(url, SITES[:1])
    filled(url, SITES[1:2], length=64)
    with pytest.raises(InvalidInput, match=f"different lengths.*of 32 samples.*{SITES[0]}.*of 64 samples.*{SITES[1]}|different lengths.*{SITES[1]}.*{SITES[0]}") as e:
        gather(url)
    assert e.value.reason == "mixed"
    assert gather(url, length=32).assets == tuple(sorted(SITES[:2]))


def test_an_asset_whose_sensor_was_changed_is_refused_where_it_changed(url):
    filled(url)
    filled(url, windows=5, first=300, units=("m/s2", "m/s2"))
    with pytest.raises(InvalidInput, match=r"different units.*seq 300"):
        gather(url)
    assert gather(url, until="2026-01-12").units == ("g", "g")


def test_several_streams_are_refused_with_their_names_until_one_is_named(url):
    filled(url)
    filled(url, stream="current")
    with pytest.raises(InvalidInput, match="name it, current, vibration"):
        gather(url)
    with pytest.raises(InvalidInput, match="holds no stream 'vibrations'; it holds current, vibration"):
        gather(url, stream="vibrations")
    assert gather(url, stream="current").assets == (SITES[0],)


def test_an_empty_archive_says_that_there_is_not_enough(tmp_path):
    for source in (f"memory:{uuid.uuid4()}", f"file:{tmp_path}/nothing"):
        with pytest.raises(NotEnoughData, match="holds no healthy window"):
            gather(source)
        with pytest.raises(NotEnoughData, match="holds no healthy window"):
            shards(source)


def test_fewer_than_a_hundred_windows_to_train_on_say_so(url):
    with pytest.raises(NotEnoughData, match="gives 70 windows to train on, of 1 asset; a fit needs at least 100"):
        gather(filled(url, windows=100))


@pytest.mark.parametrize("source", ["", "mfpt", "mfpt:all", "ftp://x/y", "raw/2026", "azure://x"])
def test_a_source_that_is_not_known_lists_those_that_are(source):
    for ask in (gather, shards):
        with pytest.raises(InvalidConfig, match="mfpt:, femto:, scenario:NAME, file:folder, s3://bucket/folder, gs://bucket/folder, memory:name"):
            ask(source)


def test_an_asset_that_is_not_there_is_named_with_the_nearest_that_is(url):
    with pytest.raises(InvalidInput, match=f"did you mean '{SITES[0]}'"):
        gather(filled(url, SITES[:2]), [SITES[0][:-1] + "b", SITES[1]])
    with pytest.raises(InvalidConfig, match="five levels"):
        gather(url, ["pump"])


@pytest.mark.parametrize("query, told", [("windows=many", "a whole number"), ("copies=0", "at least 1"), ("severity=x", "a number"), ("speed=1", "not for 'speed'"),
                                         ("copies=20000", "10000"), ("severity=nan", "at least 0")])  # fmt: skip
def test_a_scenario_is_asked_only_for_what_it_can_give(query, told):
    with pytest.raises(InvalidInput, match=told):
        survey(f"scenario:fleet?{query}", stream="vibration")


# --- shards ---

@pytest.mark.parametrize("per, names", [
    ("all", {"motor": 8}),
    ("site", {"motor_acme_lyon": 4, "motor_acme_oslo": 4}),
    ("area", {f"motor_acme_{site}_hall_{hall}": 2 for site in ("lyon", "oslo") for hall in (1, 2)}),
    ("line", {f"motor_acme_{site}_hall_{hall}_line_1": 2 for site in ("lyon", "oslo") for hall in (1, 2)}),
    ("asset", {f"motor_acme_{site}_hall_{hall}_line_1_{name}": 1 for site in ("lyon", "oslo") for hall in (1, 2) for name in ("pump", "fan")}),
])  # fmt: skip
def test_every_asset_is_in_one_shard_of_its_level(url, per, names):
    found = shards(filled(url, SITES, windows=1), per)
    assert {s.name: len(s.assets) for s in found} == names
    assert sorted(a for s in found for a in s.assets) == sorted(SITES)


def test_of_some_assets_alone_shards_are_made(url):
    (only,) = shards(filled(url, SITES, windows=1), assets=[SITES[1], "acme/lyon/hall-9/line/fan"])
    assert only.assets == (SITES[1],)
    with pytest.raises(NotEnoughData, match="holds nothing of acme/lyon/hall-9"):
        shards(url, assets=["acme/lyon/hall-9/line/fan"])


@given(st.integers(1, 60), st.integers(1, 70))
def test_a_large_group_is_dealt_out_evenly(assets, most):
    found = shards(f"scenario:seasons?copies={assets}", most_assets=most, stream="vibration")  # two assets, so many of each
    sizes = [len(s.assets) for s in found]
    assert sum(sizes) == 2 * assets and max(sizes) <= most and max(sizes) - min(sizes) <= 1 and len(sizes) == -(-2 * assets // most)
    assert all(re.fullmatch("[a-z][a-z0-9_]{0,63}", s.name) for s in found) and len({s.name for s in found}) == len(found)


def test_names_of_models_differ_even_where_paths_are_spelt_alike_or_are_long(url):
    alike = ["acme/lyon/hall-2/line/pump", "acme/lyon/hall 2/line/pump", "acme/lyon/hall.2/line/Pump", "/".join(["x" * 64] * 5)]
    names = [s.name for s in shards(filled(url, alike, windows=1), "asset")]
    assert len(set(names)) == 4 and all(re.fullmatch("[a-z][a-z0-9_]{0,63}", n) for n in names)
    assert names == [s.name for s in shards(url, "asset")]


@pytest.mark.parametrize("wrong", [{"per": "machine"}, {"name": "Motor"}, {"name": "m" * 65}, {"most_assets": 0}])
def test_a_level_or_a_name_that_is_none_is_refused(url, wrong):
    with pytest.raises(InvalidConfig):
        shards(filled(url, windows=1), **wrong)


def test_a_new_window_gives_its_shard_a_new_digest_and_no_other_one(url):
    before = shards(filled(url, SITES[:3], windows=5), "asset")
    assert shards(url, "asset") == before
    filled(url, SITES[:1], windows=1, first=5)
    changed = [a.assets[0] for a, b in zip(before, shards(url, "asset"), strict=True) if a.digest != b.digest]
    assert changed == SITES[:1]
    assert [s.digest for s in shards(url, "asset", until="2026-01-01T05:00")] == [s.digest for s in before]  # by then it was not there


def test_what_was_gathered_is_what_its_shard_promised_or_nothing(url):
    shard, = shards(filled(url, SITES[:2]))
    data = gather(url, shard, source_digest=shard.digest)
    assert (data.name, data.assets, data.source_digest) == (shard.name, shard.assets, shard.digest)
    filled(url, SITES[:1], windows=1, first=300)
    assert gather(url, shard, source_digest=shard.digest).digest == data.digest  # it came after the shards were looked at
    with pytest.raises(InvalidInput, match="no longer holds what was expected") as e:
        gather(url, replace(shard, until=""), source_digest=shard.digest)
    assert e.value.reason == "changed"


def test_an_archive_put_in_order_gives_the_same_data(url):
    for first in range(0, 200, 20):
        filled(url, windows=20, first=first)
    before = gather(url)
    assert Archive(url).compact(START_NS + 100 * 24 * HOUR_NS) > 0
    after = gather(url)
    assert after.digest == before.digest and after.source_digest != before.source_digest


# --- Dask ---

def test_one_worker_three_and_a_cluster_of_processes_gather_the_same(tmp_path):
    from distributed import LocalCluster

    source = filled(f"file:{tmp_path}", SITES[:3])
    alone = gather(source, workers=1)
    assert gather(source, workers=3).digest == alone.digest
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=True, dashboard_address=None, host="127.0.0.1") as cluster:
        there = gather(source, dask_address=cluster.scheduler_address)
        assert there.digest == alone.digest and there.hop_s == alone.hop_s
        with pytest.raises(InvalidInput, match="have 32 samples, and 64 were asked for") as e:  # an error comes home as what it is
            gather(source, dask_address=cluster.scheduler_address, length=64)
        assert e.value.reason == "wrong_shape"


def test_a_cluster_that_can_not_be_reached_is_a_part_that_is_missing(tmp_path):
    import dask

    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}), pytest.raises(PartMissing, match=f"{address}.*check dask_address"):
        gather(filled(f"file:{tmp_path}"), dask_address=address)
    with pytest.raises(InvalidConfig, match="lies in the memory of this process"):
        gather("memory:x", dask_address=address)


# --- the real records, a run to failure, a generated plant ---

def test_the_mfpt_records_are_split_as_in_the_demo_and_fit_a_detector():
    try:
        data = gather("mfpt:")
    except PartMissing as e:
        pytest.skip(f"no MFPT records: {str(e)[:200]}")
    counts = {part: sum(map(len, windows.values())) for part, windows in data.parts.items()}
    assert counts == {"train": 127, "calibrate": 143, "validate": 15, "test": 143, "faulty": 1423}
    assert {key: w.fault for key, w in data.parts["faulty"].items()} == {f"{NICE}#inner_race": "inner_race", f"{NICE}#outer_race": "outer_race"}
    assert (data.rate_hz, data.channels, data.condition_names, data.licence) == (48828.0, ("radial",), (), mfpt.LICENCE)
    first = mfpt.load(["baseline_1"], rate_hz=mfpt.COMMON_RATE_HZ)[0]
    assert np.array_equal(data.parts["train"][NICE].samples, first.windows(2048)[:127])
    assert np.isclose(data.hop_s[NICE], 2048 / 48828, rtol=1e-6)

    from pdm import Detector
    arguments = data.fit_arguments()
    assert arguments["calibration"][NICE].shape == (143, 1, 2048)
    detector = Detector.fit(**arguments, kind="mahalanobis")
    healthy = detector.score(data.parts["test"][NICE].samples)
    assert all(np.median(detector.score(w.samples)) > np.quantile(healthy, 0.95) for w in data.parts["faulty"].values())


def test_the_faulty_records_of_mfpt_are_thinned_like_the_rest():
    try:
        data = gather("mfpt:", windows_per_asset=400, length=1024)
    except PartMissing as e:
        pytest.skip(f"no MFPT records: {str(e)[:200]}")
    assert sum(len(w[NICE]) for part, w in data.parts.items() if part != "faulty") == 400
    assert {len(w) for w in data.parts["faulty"].values()} == {400}
    with pytest.raises(NotEnoughData, match="of 1 windows none is left to train on"):
        gather("mfpt:", windows_per_asset=1, seed=4)


def test_a_femto_run_is_healthy_before_its_end_of_health_and_of_no_known_fault_after_its_onset(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setenv("PREDMAINT_DATA_DIR", str(tmp_path))
    for name in ("Bearing1_1", "Bearing3_1"):
        snapshots = rng.normal(size=(240, 2, femto.SAMPLES)).astype(np.float32)
        run = femto._run(name, snapshots, femto.EVERY_S * np.arange(240), None, (), femto.Label(None, None))
        femto.write_npz(tmp_path / "femto" / f"{name}.npz", run)
    (tmp_path / "femto" / "labels.csv").write_text("bearing,onset_1p3,healthy_end,note\n1_1,200,160,\n3_1,220,150,\n")
    assets = ["femto/pronostia/rig/condition_1/Bearing1_1", "femto/pronostia/rig/condition_3/Bearing3_1"]
    data = gather("femto:", assets, length=256)
    assert {key: len(w) for key, w in data.parts["faulty"].items()} == {f"{assets[0]}#unknown": 40, f"{assets[1]}#unknown": 20}
    assert data.parts["test"][assets[0]].t_ns[-1] <= 160 * 10 * 10**9 and data.parts["test"][assets[1]].t_ns[-1] <= 150 * 10 * 10**9
    assert data.fit_arguments()["conditions"][assets[1]]["load_n"][0] == 5000 and np.allclose(list(data.hop_s.values()), 10)
    assert [s.assets for s in shards("femto:", "line")][2] == ("femto/pronostia/rig/condition_3/Bearing3_1", "femto/pronostia/rig/condition_3/Bearing3_2")
    assert data.citation == femto.CITATION and fetch.data_dir() == tmp_path


def test_a_generated_plant_gives_what_its_truth_says():
    source, fan = "scenario:outer_race_slow?windows=120", "synthetic/plant/hall/line/fan_1"
    data = gather(source, stream="vibration", windows_per_asset=100)
    assert data.assets == (fan, fan[:-1] + "2") and set(data.parts["faulty"]) == {f"{fan}#outer_race"}
    onset_ns = data.parts["train"][fan].t_ns[0] + 18 * 24 * HOUR_NS
    assert data.parts["test"][fan].t_ns[-1] <= onset_ns < data.parts["faulty"][f"{fan}#outer_race"].t_ns[0]
    severe = sum(1 for w in read_asset("scenario:outer_race_slow?windows=120&severity=0.9", fan, "vibration") if w.fault != "none")
    assert 0 < severe < len(data.parts["faulty"][f"{fan}#outer_race"])
    assert data.source_digest == survey(source, stream="vibration").digest(data.assets) != survey(source + "&seed=5", stream="vibration").digest(data.assets)


def test_a_plant_of_a_hundred_machines_is_a_hundred_of_one_kind():
    source = "scenario:healthy?copies=100&windows=24"
    found, = shards(source, stream="vibration")
    assert len(found.assets) == 100
    taken = [take(source, a, "vibration") for a in found.assets[:3]]
    assert len({t.parts["train"][a].samples.tobytes() for a, t in zip(found.assets, taken, strict=False)}) == 3  # each has its own sound


@pytest.mark.skipif(not os.environ.get("PREDMAINT_TEST_S3_URL"), reason="no bucket: PREDMAINT_TEST_S3_URL=s3://bucket/folder, s3fs, and AWS_ENDPOINT_URL")
def test_an_archive_in_a_bucket_gives_what_one_in_a_folder_gives(url):
    bucket = f"{os.environ['PREDMAINT_TEST_S3_URL']}/{uuid.uuid4()}"
    assert gather(filled(bucket, SITES[:2])).digest == gather(filled(url, SITES[:2])).digest


# --- what became of the past ---


def test_no_window_of_a_held_span_is_learnt_and_doubted_ones_of_a_sound_span_are(url):
    first, second = SITES[:2]
    filled(url, [first, second])
    filled(url, [first, second], 100, "alarm", first=200)
    filled(url, [first], 100, "sensor_fault", first=300)

    def at(k: int) -> int:
        return START_NS + k * HOUR_NS

    held, sound, again = Span(second, at(50), at(120), "held"), Span(first, at(200), None, "sound"), Span(first, at(290), None, "held")
    spans = [str(s) for s in (held, sound, again)]
    (shard,), (before,) = shards(url, spans=spans), shards(url)
    assert shard.digest != before.digest and shard.assets == before.assets
    data = gather(url, shard, spans=spans)
    learnt = {a: {round((t - START_NS) / HOUR_NS) for w in data.parts.values() for t in w[a].t_ns.tolist()} for a in (first, second)}
    gaps = 8  # windows that the split leaves out between its parts
    assert learnt[first] <= set(range(290)) and len(learnt[first] & set(range(200, 290))) > 90 - gaps
    assert learnt[second] <= {*range(50), *range(120, 200)} and len(learnt[second]) > 130 - gaps
    with pytest.raises(InvalidInput, match="no longer holds"):
        gather(url, shard, source_digest=shard.digest)


def test_an_asset_that_has_nothing_but_doubted_windows_is_there_once_they_are_sound(url):
    filled(url, SITES[:1])
    filled(url, SITES[1:2], why="low_p")
    assert list(survey(url).held) == SITES[:1]
    sound = Span(SITES[1], START_NS, None, "sound")
    assert list(survey(url, spans=[sound]).held) == sorted(SITES[:2])
    assert gather(url, spans=[str(sound)]).assets == tuple(sorted(SITES[:2]))
