"""A classifier that has only ever seen generated machines, and real bearings to try it on. Shared by synth.py and nbs/explanations/realism.ipynb.

Features, classifier and the ranges of the generated machines were written down before the real records were scored, and are chosen on generated
machines that were held back, not on MFPT.
"""

from collections import Counter
from functools import cache
from typing import Any

import numpy as np
from sklearn.ensemble import RandomForestClassifier

from pdm.data import mfpt
from pdm.data.capture import Sound
from pdm.data.synth import STRUCK, random_machine
from pdm.signal.indicators import indicators
from pdm.signal.kinematics import Bearing, fault_frequencies
from pdm.signal.spectrum import prewhiten, squared_envelope_spectrum

RATE_HZ = mfpt.COMMON_RATE_HZ
CLASSES = ("none", *STRUCK)


def features(x: np.ndarray, rate_hz: float, bearing: Bearing, rpm: float) -> np.ndarray:
    "How far the envelope's spectrum stands out, in nepers, where each part of the bearing would strike; and how peaked the signal is."
    f = fault_frequencies(bearing, rpm)
    white = prewhiten(x)
    hz, a = squared_envelope_spectrum(white, rate_hz)
    found = []

    def above(at_hz: float) -> float:
        "The highest line within slip and resolution of a place, over the median round it; 0 where the place is no frequency."
        if at_hz < 4 * hz[1]:
            return 0.0
        near, around = (slice(*np.searchsorted(hz, (at_hz - by, at_hz + by))) for by in (max(0.02 * at_hz, 1.5 * hz[1]), max(0.15 * at_hz, 12 * hz[1])))
        return float(np.log(a[near].max() / np.median(a[around])))

    for rate in (f.bpfo_hz, f.bpfi_hz, 2 * f.bsf_hz, f.ftf_hz):
        found += [above(k * rate) for k in (1, 2, 3)]
        found += [above(rate + side * by) for by in (f.shaft_hz, f.ftf_hz) for side in (-1, 1)]
    peaked = indicators(white[None], rate_hz)
    return np.array([*found, above(f.shaft_hz), *(float(np.log(peaked[k][0])) for k in ("kurtosis", "crest"))])


def generated(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    "Features and classes of random machines, speeds, loads and severities, 3 s each."
    rows, classes = [], []
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        machine, rpm, fault = random_machine([seed, i, 1]), float(rng.uniform(700, 3000)), CLASSES[i % len(CLASSES)]
        sound = Sound(machine, rpm, RATE_HZ, slip=float(rng.uniform(0, 0.02)), jitter=float(rng.uniform(0.01, 0.02)), seed=[seed, i, 2])
        faults = {} if fault == "none" else {fault: float(np.exp(rng.uniform(np.log(0.2), np.log(3))))}
        x = sound.capture(0.0, int(3 * RATE_HZ), load=float(rng.uniform(0.3, 1.2)), faults=faults).samples[0]
        rows.append(features(sound.sensor.convert(x).astype(float), RATE_HZ, machine.bearing, rpm))
        classes.append(fault)
    return np.array(rows), np.array(classes)


@cache
def trained(count: int) -> RandomForestClassifier:
    x, y = generated(count, seed=2026)
    return RandomForestClassifier(300, min_samples_leaf=2, random_state=0).fit(x, y)


def accuracy_on_mfpt(count: int) -> dict[str, Any]:
    "What a classifier trained on `count` generated machines gets on generated ones that were held back, and on the twenty real records."
    forest = trained(count)
    x, y = generated(count // 4, seed=77)
    real = [(r, r.samples[0, :int(3 * RATE_HZ)].astype(float)) for r in mfpt.load(rate_hz=RATE_HZ)]
    said = forest.predict(np.array([features(s, RATE_HZ, r.bearing, r.rpm) for r, s in real]))
    pairs = Counter((r.fault, str(s)) for (r, _), s in zip(real, said, strict=True))
    return {"accuracy": float(np.mean([r.fault == s for (r, _), s in zip(real, said, strict=True)])),
            "accuracy on generated machines held back": round(float((forest.predict(x) == y).mean()), 3), "trained on machines": count,
            "wrong": {r.name: str(s) for (r, _), s in zip(real, said, strict=True) if r.fault != s},
            "is -> said": {f"{a} -> {b}": n for (a, b), n in sorted(pairs.items())}}
