"""What every kind of detector must do. A new kind joins by an entry in `pdm.model.train.KINDS` and a line in KINDS below."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import pdm
from pdm.errors import CheckFailed, InvalidBundle, InvalidConfig, InvalidInput, InvalidWindow, NotEnoughData
from pdm.model import train
from pdm.model.bundle import load_bundle, read_record

KINDS = [
    "mahalanobis",
    "iforest",
    "conv_ae",
    "lstm_ae",
]
EPOCHS, RATE = 6, 25600.0


def vibration(n, seed=0, samples=1024, pit=0.0, level=1.0, scale=(1.0, 1.0)):
    "Two accelerometers: coloured noise and a tone; `pit` adds an impact with ring-down each 200 samples, in the first."
    rng = np.random.default_rng(seed)
    t = np.arange(samples)
    x = rng.normal(size=(n, 2, samples + 1))
    x = x[:, :, 1:] + 0.7 * x[:, :, :-1] + np.sin(0.5 * t + rng.uniform(0, 6, (n, 1, 1)))
    ring = np.where(t % 200 < 60, np.exp(-(t % 200) / 12) * np.sin(2.1 * (t % 200)), 0)
    x[:, 0] += pit * ring
    return (x * np.reshape(level, (-1, 1, 1)) * np.reshape(scale, (1, 2, 1))).astype(np.float32)


def slow(n, seed=0, shift=0.0):
    "Eight process values, ten samples at 1 Hz, that hang together and wander; one of them stands still."
    rng = np.random.default_rng(seed)
    common = np.cumsum(0.1 * rng.normal(size=(n * 10)))
    common -= np.linspace(common[0], common[-1], n * 10)
    x = 60 + common.reshape(n, 1, 10) * np.linspace(0.5, 2, 8)[None, :, None] + 0.2 * rng.normal(size=(n, 8, 10))
    x[:, 5] = 21.5
    x[:, 2] += shift
    return x.astype(np.float32)


def fit(kind, windows, **more):
    settings = dict(rate_hz=RATE, channels=[f"c{i}" for i in range(windows.shape[1])], hop_s=10.0, kind=kind, epochs=EPOCHS, seed=3)
    return pdm.Detector.fit(windows, **{**settings, **more})


def load_of(n, seed=9):
    return np.random.default_rng(seed).uniform(0.3, 1.0, n)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def det(kind):
    return fit(kind, vibration(120))


@pytest.fixture(scope="module")
def saved(det, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    det.save(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(kind):
    "With a condition that was known in three windows of four."
    n = 200
    load = load_of(n)
    given = np.where(np.arange(n) % 4 == 0, np.nan, load)
    return fit(kind, vibration(n, seed=4, level=load), conditions={"load": given})


@pytest.fixture(scope="module")
def process(kind):
    return fit(kind, slow(150), rate_hz=1.0)


def relative(a, b):
    return np.max(np.abs(a / b - 1))


# the score


def test_every_kind_is_under_test():
    assert set(KINDS) == set(train.KINDS)


def test_a_score_depends_on_its_window_alone(det):
    x = np.concatenate([vibration(70, seed=5), vibration(7, seed=6, pit=4)])
    scores = det.score(x)
    assert scores.dtype == np.float64 and scores.shape == (77,)
    order = np.random.default_rng(0).permutation(77)
    assert relative(det.score(x[order]), scores[order]) < 1e-5
    assert relative(np.concatenate([det.score(w[None]) for w in x[:9]]), scores[:9]) < 1e-5
    assert relative(np.concatenate([det.infer(x[i : i + 11]).score for i in range(0, 77, 11)]), scores) < 1e-5
    assert det.score(x[:0]).shape == (0,)


def test_an_injected_fault_is_detected_and_its_channel_named(kind, det):
    healthy, small, plain = vibration(60, seed=7), vibration(60, seed=8, pit=4), vibration(60, seed=8, pit=8)
    assert np.median(det.score(small)) > det.score(healthy).max()
    known = fit(kind, vibration(300), hop_s=600.0)  # two days: the promise is supported, and a smaller fault raises the alarm
    assert not det.calibration.supported and known.calibration.supported
    for detector, faulty in ((det, plain), (known, vibration(60, seed=8, pit=6))):
        monitor = detector.monitor("e/s/a/l/motor")
        assert not any(monitor.step(w).alarm for w in healthy[:20])
        verdicts = [monitor.step(w) for w in faulty[:20]]
        k = detector.calibration.confirmations
        assert [v.alarm for v in verdicts].index(True) <= k and verdicts[-1].episode.startswith("e/s/a/l/motor@")
        channels = np.median([v.channel_scores for v in verdicts], 0)
        assert channels[0] > 1.5 * channels[1]


def test_the_same_seed_gives_the_same_detector(det, kind):
    again, other = fit(kind, vibration(120)), fit(kind, vibration(120), seed=4)
    x = vibration(40, seed=9)
    np.testing.assert_array_equal(again.score(x), det.score(x))
    assert again.calibration == det.calibration.model_copy(update={"model": ""})
    if train.KINDS[kind].stops:
        assert not np.array_equal(other.score(x), det.score(x))


# saved and exported


def test_a_loaded_detector_scores_alike_whatever_the_batch(det, saved):
    again = pdm.Detector.load(saved)
    x = np.concatenate([vibration(50, seed=10), vibration(14, seed=11, pit=3)])
    expected = det.score(x)
    assert relative(again.score(x), expected) < 1e-5
    assert again.contract == det.contract and again.calibration == det.calibration and again.report == det.report
    for batch in (1, 2, 3, 32, 64):
        scored = again.infer(x[:batch])
        assert relative(scored.score, expected[:batch]) < 1e-5
        assert scored.channel_score.shape == (batch, 2) and scored.embedding.shape == (batch, det.contract.embedding)
        assert all(a.dtype == np.float32 for a in (scored.score, scored.channel_score, scored.embedding))


def test_the_bundle_is_what_the_contract_says(det, tmp_path):
    bundle, record = det.export(tmp_path)
    assert load_bundle(bundle.path).digest == bundle.digest == read_record(record).model
    session = ort.InferenceSession(str(bundle.onnx), providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("window", ["batch", 2, 1024])]
    shapes = {"score": ["batch", 1], "channel_score": ["batch", 2], "embedding": ["batch", det.contract.embedding]}
    assert {o.name: o.shape for o in session.get_outputs()} == shapes
    data = bundle.onnx.read_bytes()
    for word in (b"/site-packages", b".py", str(Path.cwd()).encode(), str(tmp_path).encode(), b"pytorch"):
        assert word not in data


def test_two_processes_export_the_same_bytes(kind, det, other_process):
    assert other_process[kind] == hashlib.sha256(det.onnx).hexdigest() + det.contract.digest


@pytest.fixture(scope="module")
def other_process():
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import hashlib, test_detectors as t
for kind in t.KINDS:
    det = t.fit(kind, t.vibration(120))
    print(kind, hashlib.sha256(det.onnx).hexdigest() + det.contract.digest)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return dict(line.split() for line in out.splitlines())


def test_an_export_that_scores_otherwise_is_refused():
    import torch

    from pdm.model.graph import export_onnx, parity

    x = vibration(60)
    graph, _ = train.fit_graph("mahalanobis", x)
    exported = export_onnx(graph)
    assert parity(graph, exported, {"window": x}) <= 1e-5
    with torch.no_grad():
        graph.front.gain.mul_(1.01)
    with pytest.raises(CheckFailed, match="differ by"):
        parity(graph, exported, {"window": x})


def test_what_is_no_detector_is_refused(saved, tmp_path):
    with pytest.raises(InvalidBundle, match="no calibration record"):
        pdm.Detector.load(tmp_path)
    with pytest.raises(InvalidBundle):
        pdm.Detector.load(saved, asset="e/s/a/l/unheard-of")


# wrong input


@pytest.mark.parametrize("windows,words", [
    (np.zeros((5, 3, 1024), np.float32), "3 channels; expected windows [n, 2, 1024]"),
    (np.zeros((5, 2, 512), np.float32), "shape [5, 2, 512]; expected windows [n, 2, 1024]"),
    (np.zeros((2, 1024), np.float32), "shape [2, 1024]; expected"),
    (np.full((5, 2, 1024), np.nan, np.float32), "5 of 5 windows hold NaN"),
    (np.full((1, 2, 1024), np.inf), "NaN or infinite"),
    (np.full((5, 2, 1024), "a"), "expected numbers"),
])
def test_what_is_no_window_is_refused_with_what_was_expected(det, windows, words):
    for refuse in (det.score, det.recalibrate):
        with pytest.raises(InvalidWindow) as e:
            refuse(windows)
        assert words in str(e.value).replace("calibration windows", "windows")
    if windows.ndim == 3:
        with pytest.raises(InvalidWindow):
            det.monitor().step(windows[0])


@pytest.mark.parametrize("change,error,words", [
    (dict(windows=vibration(99)), NotEnoughData, "at least 100 healthy windows, got 99"),
    (dict(channels=["h", "v", "axial"]), InvalidWindow, "windows have 2 channels; expected windows [n, 3, sample]"),
    (dict(calibration_conditions={"load": np.ones(3)}), InvalidConfig, "belong to calibration windows"),
    (dict(kind="svm"), InvalidConfig, "choose one of mahalanobis, iforest, conv_ae, lstm_ae"),
    (dict(hop_s=0), InvalidConfig, "hop_s is a positive number"),
    (dict(rate_hz=float("nan")), InvalidConfig, "rate_hz is a positive number"),
    (dict(units=["g"]), InvalidConfig, "1 units for 2 channels"),
    (dict(name="My Pump"), InvalidConfig, "a-z, 0-9 and _"),
    (dict(calibration=1.5), InvalidConfig, "between 0 and 1"),
    (dict(calibration=0.95), NotEnoughData, "left to train on"),
    (dict(calibration=np.zeros((50, 2, 9), np.float32)), InvalidWindow, "calibration windows of shape [50, 2, 9]"),
    (dict(conditions={"load": np.zeros(7)}), InvalidInput, "one number for each of 100 windows"),
    (dict(conditions={"load": np.full(100, np.nan)}), InvalidInput, "load is known in none"),
    (dict(conditions=np.zeros((100, 1))), InvalidInput, "a dict from name to"),
])
def test_a_fit_says_what_was_wrong_and_what_was_expected(change, error, words):
    settings = dict(windows=vibration(100), rate_hz=RATE, channels=["h", "v"], hop_s=10.0, kind="mahalanobis")
    with pytest.raises(error) as e:
        pdm.Detector.fit(**{**settings, **change})
    assert words in str(e.value)


# odd machines


def odd(n, seed=0, **more):
    "Channels twelve orders of magnitude apart, and a third that stands still."
    x = vibration(n, seed, scale=(1e-6, 1e6), **more)
    return np.concatenate([x, np.full((n, 1, x.shape[2]), 4, np.float32)], 1)


def test_channels_twelve_orders_of_magnitude_apart_and_a_constant_one_are_handled(kind):
    det = fit(kind, odd(100))
    healthy, faulty, moving = odd(40, seed=12), odd(40, seed=13, pit=4), odd(40, seed=12)
    moving[:, 2] += vibration(40, seed=15)[:, 1]
    scores = det.score(healthy)
    assert np.isfinite(scores).all() and 0.3 < np.median(scores) < 3
    assert np.median(det.score(faulty)) > scores.max()
    assert np.median(det.score(moving)) > 2 * scores.max()
    if kind == KINDS[0]:  # the front end, where scales matter, is the same for all
        for x in (healthy, faulty, moving):
            assert relative(_through_onnx(det, x), det.score(x)) < 1e-5


def test_a_machine_that_never_moves_scores_finitely():
    x = np.full((100, 1, 1024), 3, np.float32)
    assert np.isfinite(fit("mahalanobis", x).score(x)).all()


def test_enormous_samples_give_a_finite_score(det):
    huge = np.full((2, 2, 1024), 3e38, np.float32) * np.where(np.arange(1024) % 2, 1, -1)
    assert np.isfinite(det.score(huge)).all() and det.score(huge).min() > 2 * det.score(vibration(20)).max()


def test_short_windows_of_process_values_work_without_a_flag(process):
    assert process.contract.samples == 10
    healthy, shifted = slow(60, seed=1), slow(60, seed=2, shift=15)
    assert np.median(process.score(shifted)) > np.quantile(process.score(healthy), 0.95)
    assert relative(_through_onnx(process, shifted), process.score(shifted)) < 1e-5
    assert process.monitor().step(healthy[0]).state == "running"


def test_a_hundred_windows_are_enough_to_fit_and_not_to_promise(kind):
    det = fit(kind, vibration(100))
    report = det.report
    assert report["supported"] is False and report["reasons"]
    assert {"effective_windows", "confirmations", "least_delay_s", "hours_seen", "hours_needed", "supportable_per_day"} <= report.keys()
    assert det.score(vibration(5, seed=16)).shape == (5,)


def test_windows_of_the_stopped_machine_neither_train_nor_calibrate():
    x = vibration(160)
    x[40:60] *= 0.001
    x[130:140] *= 0.001
    det = fit("mahalanobis", x)
    report = det.report
    assert (report["windows_standing_still"], report["windows_starting"]) == (30, 2)
    assert (report["windows_trained_on"], report["windows"]) == (75, 53)
    assert [det.monitor().step(w).state for w in (x[0], x[45])] == ["running", "stopped"]


# conditions


def test_a_level_that_follows_the_load_is_not_anomalous_with_the_load_known_or_not(loaded):
    load = np.linspace(0.3, 1.0, 40)
    x = vibration(40, seed=17, level=load)
    usual = np.quantile(loaded.score(vibration(200, seed=4, level=load_of(200)), {"load": load_of(200)}), 0.99)
    for known in ({"load": load}, None, {"load": np.full(40, np.nan)}, {"colour": load}):
        scores = loaded.score(x, known)
        assert np.median(scores) < usual and abs(np.corrcoef(load, scores)[0, 1]) < 0.7


def test_a_level_that_does_not_go_with_the_load_is_anomalous_where_the_load_is_known(loaded):
    loud = vibration(40, seed=18, level=1.0)
    told, untold = loaded.score(loud, {"load": 0.3}), loaded.score(loud)
    assert np.median(told) > 1.5 * np.median(untold)


def test_scores_with_conditions_depend_on_the_window_and_its_conditions_alone(loaded, tmp_path):
    x, load = vibration(50, seed=19, level=load_of(50)), np.where(np.arange(50) % 3, load_of(50), np.nan)
    scores = loaded.score(x, {"load": load})
    loaded.save(tmp_path)
    again = pdm.Detector.load(tmp_path)
    assert relative(again.score(x, {"load": load}), scores) < 1e-5
    assert relative(np.concatenate([again.score(x[i : i + 1], {"load": load[i]}) for i in range(6)]), scores[:6]) < 1e-5
    for batch in (1, 2, 3, 32, 50):
        assert relative(again.infer(x[:batch], load[:batch, None]).score, scores[:batch]) < 1e-5
    assert [(c.name, round(c.low, 1), round(c.high, 1)) for c in again.contract.conditions] == [("load", 0.3, 1.0)]


def test_a_verdict_says_when_its_conditions_were_never_seen(loaded):
    monitor, x = loaded.monitor(), vibration(3, seed=20)
    assert [monitor.step(w, conditions=c).extrapolating for w, c in zip(x, ({"load": 0.7}, {"load": 2.0}, None), strict=True)] == [False, True, False]


# calibration, choice, record of the run


def test_calibration_on_another_record_and_for_another_asset():
    det = fit("mahalanobis", vibration(100), calibration=vibration(80, seed=21), asset="e/s/a/l/one")
    assert det.report["windows_trained_on"] == 100 and det.report["windows"] == 80 and det.calibration.asset == "e/s/a/l/one"
    other = det.recalibrate(vibration(60, seed=22, level=1.3), asset="e/s/a/l/two")
    assert other.contract == det.contract and other.calibration.asset == "e/s/a/l/two"
    p = [d.monitor().step(vibration(1, seed=23, level=1.3)[0]).p_value for d in (det, other)]
    assert p[0] < p[1]


def test_several_assets_share_one_bundle_in_one_folder(det, tmp_path):
    first, _ = det.recalibrate(vibration(60, seed=23), asset="e/s/a/l/one").export(tmp_path)
    second, _ = det.recalibrate(vibration(60, seed=24), asset="e/s/a/l/two").export(tmp_path)
    assert first.digest == second.digest
    with pytest.raises(InvalidBundle, match="name the asset"):
        pdm.Detector.load(tmp_path)
    assert pdm.Detector.load(tmp_path, asset="e/s/a/l/two").calibration.asset == "e/s/a/l/two"


def test_auto_chooses_one_of_the_kinds_and_says_why():
    det = fit("auto", vibration(120), epochs=4)
    auto = det.report["auto"]
    assert auto["kind"] == det.contract.kind and set(auto["table"]) == set(KINDS) and auto["reason"].startswith(auto["kind"])


def test_a_run_stands_in_mlflow_with_its_model_curves_and_plots(tmp_path):
    det = fit("conv_ae", vibration(100), epochs=3)
    run = train.log_run(det, f"sqlite:///{tmp_path}/mlflow.db", params={"note": "test"})
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    data = client.get_run(run).data
    assert data.params["training_data"] == det.contract.training_data and data.params["note"] == "test"
    assert (data.params["training_epochs"], data.params["training_seed"]) == ("3", "3")
    assert data.metrics["effective_windows"] == det.report["effective_windows"]
    for name, values in det.report["training"]["curves"].items():
        logged = sorted(client.get_metric_history(run, f"training/{name}"), key=lambda m: m.step)
        assert [m.step for m in logged] == [0, 1, 2] and [m.value for m in logged] == values
    assert {f.path for f in client.list_artifacts(run)} >= {"training.png", "calibration.png", "report.json", "bundle.json", "calibration.json"}
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in (tmp_path / "mlartifacts").rglob("*.png"))
    stored = list((tmp_path / "mlartifacts").rglob("*.onnx"))
    assert stored and ort.InferenceSession(str(stored[0]), providers=["CPUExecutionProvider"]).get_inputs()[0].name == "window"
    assert str(mlflow.get_tracking_uri()) != f"sqlite:///{tmp_path}/mlflow.db"


# training


@pytest.mark.parametrize("network", [train.ConvAutoencoder, train.LstmAutoencoder])
def test_an_interrupted_fit_goes_on_to_the_very_same_network(network, tmp_path, monkeypatch):
    kind = {train.ConvAutoencoder: "conv_ae", train.LstmAutoencoder: "lstm_ae"}[network]
    x, before, forward, seen = vibration(80), signal.getsignal(signal.SIGINT), network.forward, []

    def trained(**how):
        graph, notes = train.fit_graph(kind, x, held_back=20, how=train.Training(epochs=6, **how))
        return graph.scorer.curves, {name: value.numpy().tobytes() for name, value in graph.state_dict().items()}

    def dying(self, features):
        seen.append(len(features))
        if len(seen) > 8:  # in the third epoch: each has two steps and a check
            raise KeyboardInterrupt
        return forward(self, features)

    expected = trained()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(network, "forward", dying)
        trained(resume=tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    (checkpoint,) = tmp_path.iterdir()
    again = trained(resume=tmp_path)
    assert len(again[0]["loss"]) == 6 and again == expected
    written = checkpoint.stat().st_mtime_ns
    assert trained(resume=tmp_path) == expected and checkpoint.stat().st_mtime_ns == written
    trained(resume=tmp_path, seed=1)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_bar_is_for_people_at_a_terminal_or_in_a_notebook_and_not_for_programs(tmp_path, monkeypatch):
    from jupyter_client.manager import start_new_kernel

    from pdm.progress import watched

    slave = os.openpty()[1]
    for stream, expected in ((os.fdopen(slave, "w"), True), (open(tmp_path / "log", "w"), False)):
        with stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            assert watched() is expected
    kernel, client = start_new_kernel(kernel_name="python3")
    try:
        for answers in (True, False):  # JupyterLab, papermill
            said = []
            client.execute_interactive("from pdm.progress import watched; print(watched())", allow_stdin=answers, timeout=120,
                                       output_hook=lambda m, said=said: said.append(m["content"].get("text", "")))
            assert "".join(said).split() == [str(answers)]
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)


def test_the_forest_is_that_of_scikit_learn():
    import torch
    from sklearn.ensemble import IsolationForest

    from pdm.model.forest import Forest

    rng = np.random.default_rng(0)
    healthy, new = (rng.normal(size=(n, 12)).astype(np.float32) @ rng.normal(size=(12, 12)).astype(np.float32) for n in (200, 500))
    reference = IsolationForest(n_estimators=100, max_samples=200, random_state=5).fit(healthy)
    expected = 1 / -np.log2(-reference.score_samples(new))

    def scores(**settings):
        forest = Forest([healthy], 3, seed=5, **settings)
        with torch.no_grad():
            return (forest.usual[0] / forest.cuts(torch.from_numpy(new))[0]).numpy()

    assert relative(scores(play=1e-9), expected) < 1e-6
    assert np.median(np.abs(scores() / expected - 1)) < 5e-3


def test_scoring_a_loaded_detector_needs_no_torch(saved):
    code = f"""
import sys, numpy as np, pdm
det = pdm.Detector.load({str(saved)!r})
det.score(np.zeros((3, 2, 1024), np.float32)); det.monitor().step(np.ones((2, 1024), np.float32))
print(sorted(m for m in ("torch", "pytorch_lightning", "mlflow", "pandas", "sklearn") if m in sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def _through_onnx(det, windows):
    from pdm.model.detector import _onnx_run

    return np.concatenate([_onnx_run(det.onnx)({"window": windows[i : i + 13]})[0][:, 0] for i in range(0, len(windows), 13)])


def test_assets_whose_calibrations_would_share_a_file_are_not_saved(tmp_path):
    x = vibration(120)
    det = pdm.Detector.fit({"a/b": x[:60], "a.b": x[60:]}, RATE, ["c0", "c1"], 10.0, kind="mahalanobis")
    with pytest.raises(InvalidConfig, match="share a file"):
        det.save(tmp_path)
