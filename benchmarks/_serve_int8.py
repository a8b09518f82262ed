"""INT8 and FP16 against FP32 on the CPU: size, speed, and whether the alarms stay the same. A part of serve.py.

The data are MFPT's real records. The network is trained on the first baseline, calibrated on the second, and reduced with windows of the first; what is compared
is of neither: the third baseline, all 17 faults, and the third baseline with faults put into it, whose scores spread evenly over 12 dB about the threshold
(`pdm.serve.parity`). The last is the hard part: a real fault scores so high that no rounding hides it. Nothing is tuned on any of this.

ONNX Runtime has no kernels of 16 bits for this CPU and computes FP16 in 32 between casts: its speed says nothing of a GPU's.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from _bench import check, in_turn, ratio, spread

import pdm
from pdm.data import mfpt
from pdm.errors import PartMissing
from pdm.model.detector import EXAMPLES
from pdm.serve.engine import InProcessModel
from pdm.serve.parity import compare, score_db
from pdm.serve.precision import reduced

LENGTH = 2048


def _windows(record) -> np.ndarray:
    "Windows [n, 1, sample], side by side."
    x = record.samples[0].astype(np.float32)
    return x[: len(x) // LENGTH * LENGTH].reshape(-1, 1, LENGTH)


def int8_rows(quick: bool) -> tuple[list[dict], dict]:
    "Checks and tables."
    name, target = "int8_parity_alarm_agreement", ">= 0.99"
    try:
        records = {r.name: r.at_rate(mfpt.COMMON_RATE_HZ) for r in mfpt.load()}
    except PartMissing as e:
        return [check(name, None, target, f"not measured: {e}")], {}
    first, second, third = (_windows(records[f"baseline_{k}"]) for k in (1, 2, 3))
    faults = np.concatenate([_windows(r) for r in records.values() if r.fault != "none"])
    detector = pdm.Detector.fit(first, mfpt.COMMON_RATE_HZ, ["x"], LENGTH / mfpt.COMMON_RATE_HZ, kind="conv_ae", calibration=second,
                                epochs=2 if quick else 60, progress=False)
    ranges = first[np.linspace(0, len(first) - 1, min(EXAMPLES, len(first))).astype(int)]
    with tempfile.TemporaryDirectory() as folder:
        bundle, _ = detector.export(folder)
        models, sizes = {"fp32": InProcessModel(bundle)}, {"fp32": bundle.onnx.stat().st_size}
        for precision in ("fp16", "int8"):
            path = Path(folder, f"{precision}.onnx")
            path.write_bytes(reduced(bundle.onnx.read_bytes(), precision, ranges))
            models[precision], sizes[precision] = InProcessModel(bundle, graph=path), path.stat().st_size

        threshold, real = detector.calibration.threshold_db, np.concatenate([third, faults])
        reference, parity, agreement = score_db(models["fp32"].infer(real)), {}, {}
        for precision in ("fp16", "int8"):
            found = compare(models["fp32"], models[precision], third, None, [detector.calibration])
            same = (score_db(models[precision].infer(real)) > threshold) == (reference > threshold)
            agreement[precision] = {"real windows": round(float(same.mean()), 4), "straddling": round(found.agreement, 4)}
            parity[precision] = json.loads(found.to_json())
        one, batch = third[:1], np.resize(third, (32, *third.shape[1:]))
        rounds, seconds = (1, 0.02) if quick else (9, 0.5)
        times = {size: in_turn(rounds, seconds, **{p: lambda m=m, w=w: m.infer(w) for p, m in models.items()})
                 for size, w in (("batch 1", one), ("batch 32", batch))}

    worst = min(agreement["int8"].values())
    note = (f"the smaller of real windows ({len(real)}, {len(faults)} of them with faults) and windows whose scores straddle the threshold "
            f"({parity['int8']['healthy']} healthy, {parity['int8']['faulty']} with faults put in); median error on healthy windows {parity['int8']['shift_db']:.3f} dB")
    tables = {"int8: bytes of the graph": sizes, "int8: agreement of alarms": agreement, "int8: parity": parity,
              **{f"int8: {size}, ms": {p: spread(t) for p, t in of.items()} for size, of in times.items()},
              "int8: speed over fp32": {size: {p: round(ratio(of["fp32"], of[p]), 3) for p in ("fp16", "int8")} for size, of in times.items()}}
    return [check(name, worst, target, note)], tables
