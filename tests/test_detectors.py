"""One contract for all kinds of detector. A new kind joins by being in `KINDS`."""

import subprocess
import sys

import numpy as np
import pytest

import pdm
from pdm.errors import InvalidConfig, InvalidInput, InvalidWindow, NotEnoughData
from pdm.model.bundle import load_bundle, read_record
from pdm.model.train import KINDS
from pdm.serve.engine import InProcess

pytestmark = pytest.mark.timeout(240)


def signals(n, seed, level=1.0, knock=0.0, shape=(2, 2048)):
    "Coloured noise and a tone; with `knock`, ringing strikes in the first channel."
    rng = np.random.default_rng(seed)
    channels, samples = shape
    t = np.arange(samples)
    x = rng.standard_normal((n, channels, samples)) * 0.3 + np.sin(0.05 * t + rng.uniform(0, 6, (n, channels, 1)))
    ring = np.exp(-np.arange(120) / 25) * np.sin(np.arange(120) * 1.1)
    for w in x:
        for start in range(int(rng.integers(200)), samples - 120, 260):
            w[0, start:start + 120] += knock * ring
    return (x * np.reshape(level, (-1, 1, 1))).astype(np.float32)


def process(n, seed, shift=0.0):
    "Ten rows of eight slow values that wander together."
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((n, 1, 1))
    x = 50 + common * np.linspace(0.5, 2, 8)[:, None] + 0.2 * rng.standard_normal((n, 8, 10))
    x[:, 3] += shift
    return x.astype(np.float32)


def fitted(kind, windows, **options):
    settings = {"rate_hz": 20_000, "channels": [f"c{i}" for i in range(windows.shape[1])], "hop_s": 1.0, "kind": kind, "epochs": 4, "name": "rig"}
    return pdm.Detector.fit(windows, **{**settings, **options})


@pytest.fixture(scope="module", params=sorted(KINDS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def detector(kind):
    return fitted(kind, signals(160, 0))


@pytest.fixture(scope="module")
def exported(detector, tmp_path_factory):
    return detector.export(tmp_path_factory.mktemp("bundles"))


def close(a, b, relative=1e-5):
    return np.allclose(a, b, rtol=relative, atol=relative * np.abs(b).max())


def test_a_fault_scores_above_all_that_is_healthy(detector):
    assert detector.score(signals(40, 1)).max() < detector.score(signals(20, 2, knock=2.0)).min()


def test_a_score_depends_on_its_window_alone(detector):
    x = np.concatenate([signals(20, 3), signals(20, 4, knock=2.0)])
    together, order = detector.score(x), np.random.default_rng(0).permutation(len(x))
    assert close(detector.score(x[order]), together[order])
    assert close(np.concatenate([detector.score(w[None]) for w in x]), together)
    assert together.dtype == np.float64 and together.shape == (40,)


@pytest.mark.parametrize("batch", [1, 2, 3, 32, 64])
def test_onnx_scores_as_the_detector_does_whatever_the_batch(detector, exported, batch):
    x = signals(64, 5, knock=0.5)
    model = InProcess().load(exported[0])
    parts = [model.infer(x[i:i + batch]) for i in range(0, 64, batch)]
    assert close(np.concatenate([p.score for p in parts]), detector.score(x))
    assert parts[0].channel_score.shape[1] == 2 and parts[0].embedding.shape[1] == detector.contract.embedding


def test_saved_and_loaded_it_scores_alike(detector, tmp_path):
    detector.save(tmp_path)
    again, x = pdm.Detector.load(tmp_path), signals(10, 6)
    assert close(again.score(x), detector.score(x)) and again.calibration == detector.calibration
    assert again.monitor().step(x[0]).p_value == detector.monitor().step(x[0]).p_value


def test_the_same_seed_gives_the_same_bundle_in_another_process(kind, tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.path.insert(0, {str(__import__("pathlib").Path(__file__).parent)!r})
from test_detectors import fitted, signals
print(fitted({kind!r}, signals(110, 7), epochs=2).export({str(tmp_path / "b")!r})[0].digest)
"""
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1]
    bundle, record = fitted(kind, signals(110, 7), epochs=2).export(tmp_path / "a")
    assert bundle.digest == other and load_bundle(bundle.path) == bundle and read_record(record).model == bundle.digest
    assert b"/home" not in bundle.onnx.read_bytes() and str(tmp_path).encode() not in bundle.onnx.read_bytes()


def test_what_is_no_window_is_refused_by_name(detector):
    good = signals(1, 8)
    for bad, says in ((good[:, :1], "1 channels"), (good[:, :, :100], "expected"), (good[0], "expected"), (np.full_like(good, np.nan), "NaN"),
                      (good.astype(str), "numbers")):
        with pytest.raises(InvalidWindow, match=says):
            detector.score(bad)


def test_what_can_not_be_fitted_is_refused_by_name(kind):
    x = signals(120, 9)
    with pytest.raises(NotEnoughData, match="100"):
        fitted(kind, x[:50])
    with pytest.raises(InvalidWindow, match="NaN"):
        fitted(kind, np.where(np.arange(120)[:, None, None] == 3, np.nan, x))
    with pytest.raises(InvalidConfig, match="hop_s"):
        fitted(kind, x, hop_s=0)
    with pytest.raises(InvalidInput, match="speed"):
        fitted(kind, x, conditions={"speed": np.ones(3)})
    with pytest.raises(InvalidConfig, match="auto"):
        fitted("oracle", x)


def test_a_constant_channel_and_unequal_scales_are_handled(kind):
    def scaled(x):
        return np.concatenate([x * np.array([1e-6, 1e6], np.float32)[:, None], np.full((len(x), 1, x.shape[2]), 7.0, np.float32)], 1)

    d = fitted(kind, scaled(signals(110, 10)))
    healthy, faulty = d.score(scaled(signals(30, 11))), d.score(scaled(signals(10, 12, knock=3.0)))
    assert np.isfinite(healthy).all() and np.median(faulty) > healthy.max()


def test_slow_process_windows_work_without_a_flag(kind):
    d = fitted(kind, process(200, 13), rate_hz=1.0, hop_s=10.0, epochs=20)
    assert np.median(d.score(process(20, 14, shift=4.0))) > d.score(process(60, 15)).max()


def test_conditions_explain_what_they_cause(kind, tmp_path):
    rng = np.random.default_rng(16)
    load = rng.uniform(0.2, 1.0, 240)
    d = fitted(kind, signals(240, 17, level=0.5 + load), conditions={"load": load})
    test = np.linspace(0.25, 0.95, 40)
    explained = d.score(signals(40, 18, level=0.5 + test), {"load": test})
    contradicted = d.score(signals(40, 18, level=0.5 + test), {"load": test[::-1]})
    assert np.median(contradicted) > 1.2 * np.median(explained)
    assert np.isfinite(d.score(signals(5, 19))).all()
    bundle, _ = d.export(tmp_path)
    row = np.where(np.arange(40) % 2, test, np.nan)[:, None].astype(np.float32)
    x = signals(40, 18, level=0.5 + test)
    assert close(InProcess().load(bundle).infer(x, row).score, d.score(x, {"load": row[:, 0]}))
    v = d.monitor().step(x[0], conditions={"load": 3.0})
    assert v.extrapolating and not v.supported


def test_a_monitor_raises_on_a_fault_and_not_before(detector):
    m = detector.monitor("e/s/a/l/fan")
    assert not any(m.step(w).alarm for w in signals(60, 20))
    verdicts = [m.step(w) for w in signals(30, 21, knock=2.0)]
    assert verdicts[-1].alarm and verdicts[-1].severity >= 2 and verdicts[-1].episode and verdicts[-1].fault != "none"


def test_auto_says_why(tmp_path):
    d = fitted("auto", signals(120, 22), epochs=2)
    told = d.report["auto"]
    assert d.contract.kind == told["kind"] and set(told["table"]) == set(KINDS) and told["kind"] in told["reason"]
