"""Challengers that must not pass the gate: trained on faulty windows, on the wrong channel, on what is no number, and models that never or always alarm. A sound one must."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from _bench import check
from _loop_peers import PEERS
from _loop_run import fit, so_many, tracks_of, training_data
from _loop_world import KINDS, RATE_HZ, Plant, Track
from onnx import numpy_helper

from pdm.data.inject import inject_fault
from pdm.data.spans import Span
from pdm.data.training import TrainingData
from pdm.loop.gate import gate
from pdm.loop.learned import above_db
from pdm.model.detector import Detector, _onnx_run

DAYS, SEEDS, FIRST = 5.0, 12, 16000
FOUND_SOUND = "one machine with a fault, found sound"
FAULTS = ("outer_race", "inner_race", "ball", "looseness", "imbalance", "misalignment")
SEVERITIES = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)  # the mildest is taken whose windows lie above the threshold by half: what the champion cannot hear, nobody can hold against a challenger


def heard_as(data: TrainingData, change: Callable[[np.ndarray], np.ndarray], assets: tuple[str, ...] = ()) -> TrainingData:
    "The same windows, as another sensor, or a machine in another state, gives them."
    return replace(data, parts={part: {a: replace(w, samples=np.ascontiguousarray(change(np.asarray(w.samples)), np.float32)) if not assets or a in assets else w for a, w in ws.items()}
                                for part, ws in data.parts.items()})


def learnt(data: TrainingData) -> Detector:
    return fit(tracks_of(data, "train"))


def answering(d: Detector, run: Callable[[dict[str, np.ndarray]], list[np.ndarray]]) -> Detector:
    return Detector(d.contract, d.calibration, run, d.onnx, None, d.calibrations.values(), d.examples)


def broken_weights(d: Detector) -> Detector:
    graph = onnx.load_from_string(d.onnx)
    weights = max((t for t in graph.graph.initializer if t.data_type == onnx.TensorProto.FLOAT), key=lambda t: np.prod(t.dims))
    weights.CopyFrom(numpy_helper.from_array(np.full(tuple(weights.dims), np.nan, np.float32), weights.name))
    return answering(d, _onnx_run(graph.SerializeToString()))


def _scored(d: Detector, change: Callable[[np.ndarray], np.ndarray]) -> Detector:
    def run(feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        score, *rest = d._run(feed)
        return [change(score), *rest]
    return answering(d, run)


def some_no_numbers(score: np.ndarray) -> np.ndarray:
    out = score.copy()
    out.reshape(-1)[::7] = np.nan
    return out


def always_alarms(d: Detector) -> Detector:
    records = [r.model_copy(update={"threshold_db": -60.0}) for r in d.calibrations.values()]
    return Detector(d.contract, records[-1], d._run, d.onnx, None, records, d.examples)


def poisons(seed: int, data: TrainingData, champion: Detector, plant: Plant) -> Iterator[tuple[str, str, Callable[[], Detector], TrainingData, TrainingData | None, tuple[Span, ...]]]:
    "What it is, of which fault, how it is made, the recent and the frozen set, and what was found sound."
    rng = np.random.default_rng([seed, 9])
    fault, rpm = FAULTS[seed % len(FAULTS)], float(KINDS[plant.kind]["rpm"])

    def worn(severity: float) -> Callable[[np.ndarray], np.ndarray]:
        return lambda x: inject_fault(x, RATE_HZ, fault, severity, plant.bearing, rpm, "benchmark", seed=seed).samples

    one, test = str(rng.choice(sorted(data.parts["train"]))), replace(data, parts={"test": data.parts["test"]})
    for severity in SEVERITIES:
        if np.mean(above_db(champion, test, one, heard_as(test, worn(severity), (one,)).parts["test"][one]) > 0) >= 0.5:
            break
    some, every = heard_as(data, worn(severity), (one,)), heard_as(data, worn(severity))
    name = f"{fault} {severity:g}"
    yield "one machine with a fault, gathered", name, lambda: learnt(some), some, None, ()
    yield FOUND_SOUND, name, lambda: learnt(some), some, None, (Span(one, 0, None, "sound"),)
    yield "one machine with a fault, held back since", name, lambda: learnt(some), data, None, ()
    yield "all machines with a fault", name, lambda: learnt(every), every, data, ()
    yield "all machines with a fault, held back since", name, lambda: learnt(every), data, None, ()
    swapped = heard_as(data, lambda x: x[:, ::-1])
    yield "channels mixed up", "", lambda: learnt(swapped), data, None, ()
    silent = heard_as(data, lambda x: 0.01 * np.random.default_rng(seed).standard_normal(x.shape))
    yield "a sensor that hangs loose", "", lambda: learnt(silent), data, None, ()
    yield "a sensor that hangs loose, still", "", lambda: learnt(silent), silent, data, ()
    yield "weights that are no numbers", "", lambda: broken_weights(champion), data, None, ()
    yield "some scores that are no numbers", "", lambda: _scored(champion, some_no_numbers), data, None, ()
    yield "says the same of all", "", lambda: _scored(champion, lambda s: np.full_like(s, 0.01)), data, None, ()
    yield "always healthy", "", lambda: _scored(champion, lambda s: np.float32(0.02) * s), data, None, ()
    yield "always in alarm", "", lambda: always_alarms(champion), data, None, ()


def tried(seed: int) -> list[dict[str, Any]]:
    "All poisons on one plant, and a sound challenger."
    plant = Plant(seed % len(KINDS), seed, DAYS)
    tracks: dict[str, Track] = {a: t[t.running] for a, t in plant.tracks().items()}
    data = training_data(tracks)
    champion = learnt(data)
    again = fit({a: t[slice(0, None if i else round(0.9 * len(t.t_ns)))] for i, (a, t) in enumerate(tracks_of(data, "train").items())})
    told = gate(again, champion, data, data, seed=seed)
    rows = [{"seed": seed, "what": "sound", "passed": told.passed, "by": [c.name for c in told.criteria if not c.passed]}]
    for what, how, make, recent, frozen, spans in poisons(seed, data, champion, plant):
        told = gate(make(), champion, recent, frozen, seed=seed, spans=spans)
        rows.append({"seed": seed, "what": what, "how": how, "passed": told.passed, "by": [c.name for c in told.criteria if not c.passed]})
    return rows


def measure(quick: bool) -> tuple[list[dict], dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [r for seed in range(FIRST, FIRST + (1 if quick else SEEDS)) for r in tried(seed)]
    return figures(rows)


def figures(rows: list[dict[str, Any]]) -> tuple[list[dict], dict[str, Any]]:
    sound, vouched, all_of = ([r for r in rows if r["what"] == "sound"], [r for r in rows if r["what"] == FOUND_SOUND], [r for r in rows if r["what"] not in ("sound", FOUND_SOUND)])
    through, n = [r for r in all_of if r["passed"]], len(all_of)
    checks = [check("poisoned_promoted_count", len(through), "<= 0", f"{so_many(len(through), n)}; " + (", ".join(f"{r['what']} {r['how']} (seed {r['seed']})" for r in through[:6]) or "each stopped")
                    + f"; of those that were stopped {sum(r['by'] == ['data'] for r in all_of)} by nothing else than that they were made of other windows than those shown")]
    checks += [check(f"poisoned_promoted_count_peer_{p}", n if p in ("any_drift", "weekly") else 0, ">= 0", "promotes whatever it has trained: there is no gate" if p in ("any_drift", "weekly") else "it never promotes")
               for p in PEERS]
    passed = sum(r["passed"] for r in vouched)
    checks.append(check("vouched_promoted_count", passed, "<= 0", f"the same fault of one machine, which somebody or the loop's attribution has called sound by mistake: {so_many(passed, len(vouched))}; ours: no target in the issue"))
    passed = sum(r["passed"] for r in sound)
    checks.append(check("sound_promoted_rate", passed / len(sound), ">= 0.9", f"the control, learnt on the same plant: {so_many(passed, len(sound))}; ours: no target in the issue"))
    kinds = {w: [r for r in rows if r["what"] == w] for w in dict.fromkeys(r["what"] for r in rows if r["what"] != "sound")}
    table = {w: {"tried": len(some), "passed": sum(r["passed"] for r in some), "stopped by": {c: k for c in dict.fromkeys(c for r in some for c in r["by"]) if (k := sum(c in r["by"] for r in some))}} for w, some in kinds.items()}
    return checks, {"poison": {**table, "sound": {"tried": len(sound), "stopped by": [r["by"] for r in sound if not r["passed"]]}, "faults": sorted({r["how"] for r in all_of if r["how"]})}}
