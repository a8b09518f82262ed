"""Early and small: how small a fault is still found when every method is allowed the same number of false alarms. A part of detect.py.

Generated machines run at three loads in turn; every method learns on the same healthy windows of 2 x 2560 samples and is told the load (pdm as a condition,
the peers as a further column). Thresholds are set on separate healthy windows to the same counted rate, one window in a hundred. Then faults of the family
`benchmark` (another slip, another spread, another resonance than the families that pdm itself chooses and gates by) are injected into further healthy windows.
White noise is added to some machines, down to -12 dB (signal over noise). The area is the mean detection over ten severities, evenly spaced in decibels.
"""

import numpy as np
from _bench import check
from _peers import PEERS

import pdm
from pdm.data import mfpt
from pdm.data.capture import Sound
from pdm.data.inject import inject_fault
from pdm.data.synth import STRUCK, random_machine
from pdm.errors import PartMissing
from pdm.model.train import KINDS

RATE_HZ, SAMPLES = 25_600.0, 2560
LOADS, NOISE_DB = (0.4, 0.8, 1.2), (None, 0.0, -6.0, -12.0)  # None: as the machine is
SEVERITIES = np.geomspace(0.05, 2.0, 10)                     # RMS of the fault over that of the healthy signal
FALSE = 0.01                                                 # of the healthy windows


def healthy_windows(sound: Sound, machine_rms: np.ndarray | None, noise_db: float | None, count: int, start_s: float, rng: np.random.Generator
                    ) -> tuple[np.ndarray, np.ndarray]:
    "Windows 10 s apart, the loads in turn, with white noise so far over the machine's own signal; and the loads."
    loads = np.array([LOADS[i // 5 % 3] for i in range(count)]) * rng.lognormal(0, 0.02, count)
    x = np.stack([sound.capture(start_s + 10.0 * i, SAMPLES, load=float(loads[i])).samples for i in range(count)]).astype(np.float64)
    if noise_db is not None:
        own = x.std((0, 2), keepdims=True) if machine_rms is None else machine_rms
        x += own * 10 ** (-noise_db / 20) * rng.standard_normal(x.shape)
    return x.astype(np.float32), loads


def rates(score: np.ndarray, threshold: float) -> float:
    return float((score > threshold).mean())


def machine_curves(seed: int, noise_db: float | None, sizes: tuple[int, int, int], kinds: tuple[str, ...], severities: np.ndarray, epochs: int) -> tuple[dict[str, np.ndarray], str]:
    "Detection [fault, severity] of each method on one machine; and the kind that auto chose."
    learn, separate, test = sizes
    rng = np.random.default_rng([seed, 1])
    machine, rpm = random_machine([seed, 2]), float(rng.uniform(1200, 3000))
    sound = Sound(machine, rpm, RATE_HZ, seed=[seed, 3])
    x, load = healthy_windows(sound, None, noise_db, learn + separate + test, 0.0, rng)
    part = np.split(np.arange(len(x)), [learn, learn + separate])
    scorers = {}
    for kind in kinds:
        det = pdm.Detector.fit(x[part[0]], RATE_HZ, ["h", "v"], 10.0, conditions={"load": load[part[0]]}, kind=kind, epochs=epochs,
                               calibration=x[part[1]], calibration_conditions={"load": load[part[1]]})
        scorers[f"pdm {kind}"] = lambda w, c, det=det: det.score(w, {"load": c[:, 0]})
        if kind == "auto":
            chosen = det.contract.kind
    for name, fit in PEERS.items():
        scorers[name] = fit(x[part[0]], load[part[0], None])
    thresholds = {name: float(np.quantile(s(x[part[1]], load[part[1], None]), 1 - FALSE)) for name, s in scorers.items()}
    found = {name: np.zeros((len(STRUCK), len(severities))) for name in scorers}
    for i, fault in enumerate(STRUCK):
        for j, severity in enumerate(severities):
            faulty = inject_fault(x[part[2]], RATE_HZ, fault, float(severity), machine.bearing, rpm, "benchmark", seed=100 * seed + 10 * i + j).samples
            for name, s in scorers.items():
                found[name][i, j] = rates(s(faulty, load[part[2], None]), thresholds[name])
    return found, chosen


def on_mfpt(kinds: tuple[str, ...], faults: int | None, epochs: int) -> dict[str, dict[str, float]]:
    "Real seeded faults: learnt on one baseline, threshold on the second, faults of all records; the third baseline counts what it costs."
    records = [r.at_rate(mfpt.COMMON_RATE_HZ) for r in mfpt.load()]
    cut = {r.name: np.ascontiguousarray(r.samples[0][:len(r.samples[0]) // 2048 * 2048].reshape(-1, 1, 2048), np.float32) for r in records}
    first, second, third = [r.name for r in records if r.fault == "none"]
    faulty = [r.name for r in records if r.fault != "none"][:faults]
    detectors = {k: pdm.Detector.fit(cut[first], mfpt.COMMON_RATE_HZ, ["x"], 2048 / mfpt.COMMON_RATE_HZ, kind=k, calibration=cut[second], epochs=epochs) for k in kinds}
    scorers = {f"pdm {k}": (lambda w, c, d=d: d.score(w)) for k, d in detectors.items()}
    scorers |= {name: fit(cut[first], None) for name, fit in PEERS.items()}
    table = {}
    for name, s in scorers.items():
        threshold = float(np.quantile(s(cut[second], None), 1 - FALSE))
        table[name] = {"faults found": round(float(np.mean([rates(s(cut[f], None), threshold) for f in faulty])), 3),
                       "false on the third baseline": round(rates(s(cut[third], None), threshold), 3)}
    return table


def measure(quick: bool) -> tuple[list[dict], dict]:
    kinds = ("auto", "mahalanobis") if quick else ("auto", *KINDS)
    machines, noise_db, severities, epochs = (1, (0.0,), SEVERITIES[::5], 1) if quick else (8, NOISE_DB, SEVERITIES, 60)
    sizes = (100, 50, 5) if quick else (300, 400, 45)
    sums: dict[str, list[np.ndarray]] = {}
    chosen: dict[str, int] = {}
    for m in range(machines):
        found, kind = machine_curves(2000 + m, noise_db[m % len(noise_db)], sizes, kinds, severities, epochs)
        chosen[kind] = chosen.get(kind, 0) + 1
        for name, curve in found.items():
            sums.setdefault(name, []).append(curve)
    curves = {name: np.stack(c) for name, c in sums.items()}  # [machine, fault, severity]
    area = {name: float(c.mean()) for name, c in curves.items()}
    peer = max((n for n in area if n in PEERS), key=lambda n: area[n])
    apart = curves["pdm auto"].mean((1, 2)) - curves[peer].mean((1, 2))
    table = {name: {"area": round(area[name], 3),
                    "by noise, dB": {str(n): round(float(c[i::len(noise_db)].mean()), 3) for i, n in enumerate(noise_db)},
                    "by fault": {f: round(float(v), 3) for f, v in zip(STRUCK, c.mean((0, 2)), strict=True)},
                    "by severity": {f"{s:.2g}": round(float(v), 3) for s, v in zip(severities, c.mean((0, 1)), strict=True)}}
             for name, c in sorted(curves.items(), key=lambda item: -area[item[0]])}
    note = f"{machines} machines, three loads, four faults, ten severities, one false window in a hundred for all"
    checks = [check("small_fault_area", area["pdm auto"], f">= {max(area[n] for n in PEERS):.4f}",
                    f"{note}; auto chose {chosen}; over {peer} by {apart.mean():.3f} +- {apart.std() / max(1, len(apart)) ** 0.5:.3f} (machines)"),
              check("small_fault_best_peer_area", area[peer], f"<= {area['pdm auto']:.4f}", peer)]
    tables: dict = {"detection of small faults": table}
    try:
        tables["MFPT's seeded faults"] = on_mfpt(kinds[-1:] if quick else kinds, 1 if quick else None, epochs)
    except PartMissing as e:
        tables["MFPT's seeded faults"] = {"not measured": str(e)}
    return checks, tables
