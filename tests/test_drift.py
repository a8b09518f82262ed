"Windows then and now are told apart by what they show, not by how many of them were kept."

from dataclasses import replace

import numpy as np
import pytest

from pdm.loop.drift import Reference, evaluate_drift, shift
from pdm.loop.observed import Observed

ASSET, HOP_S, DAYS = "acme/munich/hall-2/line-1/pump-1", 600.0, 40


def slowly(n: int, seed: int, apart: float = 4.0) -> np.ndarray:
    "Deviate 1, and it resembles itself over so many windows."
    rng, keep = np.random.default_rng(seed), np.exp(-1 / apart)
    x = rng.normal(size=n)
    for k in range(1, n):
        x[k] = keep * x[k - 1] + np.sqrt(1 - keep**2) * x[k]
    return x


def observed(values: np.ndarray, t_ns: np.ndarray, hop_s: float = HOP_S) -> Observed:
    n, no = len(values), np.zeros(len(values), bool)
    return Observed(ASSET, "vibration", "d" * 64, hop_s, t_ns, 10 ** (values / 20), np.full(n, 9.0), np.full(n, 0.5), no, np.full(n, "running"), no, no, no,
                    values[:, None].astype(np.float32), {}, {})  # fmt: skip


def asked(kept: np.ndarray, seed: int, up: float = 0.0, apart: float = 4.0):
    "What an evaluation says of the day after the reference, of which some windows were kept."
    n = 144 * DAYS
    values = slowly(n + 144, seed, apart)
    values[n:] += up
    t_ns = np.arange(1, len(values) + 1) * round(HOP_S * 1e9)
    live = observed(values[n:], t_ns[n:])
    return evaluate_drift([live], {ASSET: Reference.of(observed(values[kept], t_ns[kept]))}, int(t_ns[-1]) + 1).drifts[ASSET]


@pytest.mark.parametrize("how", ["every tenth", "a tenth by lot"])
def test_a_reference_that_kept_one_window_in_ten_calls_nothing_a_drift_that_is_none(how):
    every = np.arange(0, 144 * DAYS, 10)
    told = [asked(every if how == "every tenth" else np.sort(np.random.default_rng(s).choice(144 * DAYS, len(every), replace=False)), s) for s in range(60)]
    p = [s.p_value for d in told for s in d.shifts if s.quantity == "embedding"]
    assert len(p) > 30 and sum(x < 0.01 for x in p) <= 4 and min(p) > 4.6e-4, "not 15 of 60, as where the day is thinned by as many windows"


def test_a_drift_is_seen_by_a_reference_that_kept_one_window_in_ten():
    told = asked(np.arange(0, 144 * DAYS, 10), 1, up=4.0)
    assert told.fired and {s.quantity for s in told.shifts if s.fired} == {"embedding", "score"} and told.noticed


def test_windows_as_often_as_those_of_the_reference_are_thinned_as_it_is_whatever_its_clock():
    told = asked(np.arange(144 * DAYS), 3, apart=3.0)
    assert [s.n for s in told.shifts if s.quantity == "embedding"] == [-(-144 // Reference.of(observed(v := slowly(144 * DAYS + 144, 3, 3.0)[: 144 * DAYS], np.arange(len(v)))).lags[1])]
    late = shift("embedding/0", slowly(432, 1), slowly(144, 2), 144, 5, 1.0003)
    assert late == shift("embedding/0", slowly(432, 1), slowly(144, 2), 144, 5)


def test_a_reference_of_a_window_a_day_ends_no_evaluation():
    rng = np.random.default_rng(1)
    assert abs(shift("condition/ambient_c", rng.normal(size=40), 3 + rng.normal(size=144), day=1, lag=2).effect) > 0.9
    told = asked(np.arange(0, 144 * DAYS, 144), 1, up=4.0)
    assert not told.fired and "a window every 24 h" in told.reason


@pytest.mark.parametrize("windows", [0, 1])
def test_an_asset_that_has_said_one_thing_ends_no_evaluation(windows):
    t_ns = np.arange(1, 300) * round(HOP_S * 1e9)
    reference, one = Reference.of(observed(slowly(299, 1), t_ns)), replace(observed(np.zeros(1), t_ns[-1:]), hop_s=0.0)
    now_ns = int(t_ns[-1]) + (20 if windows else 30) * 3600 * 10**9
    assert not {s.name for s in evaluate_drift([one], {ASSET: reference}, now_ns).drifts[ASSET].shifts if s.fired} - {"missing"}
