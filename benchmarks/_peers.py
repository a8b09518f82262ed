"""What a user would pick instead of pdm, on the same windows. Shared by the parts of detect.py.

All but the two rules on the RMS look at the very indicators that pdm's own density looks at (log RMS, kurtosis, crest factor and band energies of each
channel, scaled to the training windows), with the conditions as further columns where there are any.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pdm.model.front import Indicators

Scorer = Callable[[np.ndarray, np.ndarray | None], np.ndarray]  # windows, conditions [window, condition] -> scores [window]


def log_rms(windows: np.ndarray) -> np.ndarray:
    "Log RMS of each channel [window, channel]."
    return np.log(np.maximum(windows.std(2, dtype=np.float64), 1e-12))


def _columns(front: Indicators, windows: np.ndarray, conditions: np.ndarray | None) -> np.ndarray:
    with torch.no_grad():
        x = torch.cat([front(torch.from_numpy(np.ascontiguousarray(windows[i:i + 256]))) for i in range(0, len(windows), 256)]).double().numpy()
    return x if conditions is None else np.concatenate([x, conditions], 1)


def _rms_sigma(windows: np.ndarray, conditions: np.ndarray | None) -> Scorer:
    rms = windows.std(2, dtype=np.float64)
    mean, deviation = rms.mean(0), np.maximum(rms.std(0), 1e-12)
    return lambda x, c: ((x.std(2, dtype=np.float64) - mean) / deviation).max(1)


def _rms_mad(windows: np.ndarray, conditions: np.ndarray | None) -> Scorer:
    level = log_rms(windows)
    middle = np.median(level, 0)
    spread = np.maximum(1.4826 * np.median(np.abs(level - middle), 0), 1e-9)
    return lambda x, c: ((log_rms(x) - middle) / spread).max(1)


def _on_indicators(make: Callable[[], Any], one_by_one: bool = False) -> Callable[[np.ndarray, np.ndarray | None], Scorer]:
    def fit(windows: np.ndarray, conditions: np.ndarray | None) -> Scorer:
        front = Indicators(*windows.shape[1:])
        front.fit(windows)
        x = _columns(front, windows, conditions)
        mean, deviation = x.mean(0), np.maximum(x.std(0), 1e-6)
        model = make()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            model.fit((x - mean) / deviation)

        def score(new: np.ndarray, c: np.ndarray | None) -> np.ndarray:
            z = (_columns(front, new, c) - mean) / deviation
            say = getattr(model, "decision_function", None) or model.mahalanobis
            return np.concatenate([say(row[None]) for row in z]) if one_by_one else np.asarray(say(z))

        return score

    return fit


def _forest() -> Any:
    from pyod.models.iforest import IForest
    return IForest(random_state=0)


def _ecod() -> Any:
    from pyod.models.ecod import ECOD
    return ECOD()


def _knn() -> Any:
    from pyod.models.knn import KNN
    return KNN()


def _autoencoder() -> Any:
    from pyod.models.auto_encoder import AutoEncoder
    return AutoEncoder(epoch_num=30, random_state=0, verbose=0)


def _covariance() -> Any:
    from sklearn.covariance import LedoitWolf
    return LedoitWolf()


PEERS: dict[str, Callable[[np.ndarray, np.ndarray | None], Scorer]] = {
    "RMS over its mean": _rms_sigma,
    "log RMS over its median": _rms_mad,
    "PyOD IForest": _on_indicators(_forest),
    "PyOD ECOD": _on_indicators(_ecod, one_by_one=True),  # in a batch its scores would depend on the other windows
    "PyOD KNN": _on_indicators(_knn),
    "PyOD AutoEncoder": _on_indicators(_autoencoder),
    "Mahalanobis (Ledoit-Wolf)": _on_indicators(_covariance),
}


def in_a_row(over: np.ndarray, count: int = 3) -> np.ndarray:
    "Alarm while `count` in a row exceed."
    out = over.copy()
    for back in range(1, count):
        out[back:] &= over[:-back]
        out[:back] = False
    return out


def rolling_mad(windows: np.ndarray, length: int, limit: float = 3.0) -> np.ndarray:
    "Log RMS against median and MAD of the last `length` windows, three in a row over 3 sigma: an adaptive threshold [window]."
    level = log_rms(windows)
    over = np.zeros(len(level), bool)
    for i in range(length, len(level)):
        past = level[i - length:i]
        middle = np.median(past, 0)
        spread = 1.4826 * np.median(np.abs(past - middle), 0)
        over[i] = bool((level[i] - middle > limit * spread).any())
    return in_a_row(over)
