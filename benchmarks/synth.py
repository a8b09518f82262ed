"""How fast the generator is, how true, and what a classifier that saw nothing else makes of real bearings.

A second of signal is a second of one asset on two axes at 25.6 kHz, all of it: four parts of the bearing strike (one with a fault, three with
the faint marks that every bearing has), three resonances an axis, shaft, gear, hum, coloured noise, converter. One thread.
The plain loop makes the same samples: it takes all but the ringing from the same code, and adds the ringing strike by strike.
"""

import statistics
import time
import tracemalloc
from dataclasses import replace
from math import pi, sqrt
from unittest import mock

import numpy as np
from _bench import arguments, check, in_turn, ratio, report
from _realism import accuracy_on_mfpt
from threadpoolctl import threadpool_limits

from pdm.data import capture
from pdm.data.capture import Drive, Sound
from pdm.data.scenario import load
from pdm.data.synth import STRUCK, Resonance, random_machine
from pdm.errors import PartMissing
from pdm.signal.spectrum import envelope

RATE_HZ = 25_600.0
MACHINE = replace(random_machine(4), resonances=(Resonance(3100, 0.04), Resonance(5200, 0.03, 0.7), Resonance(9400, 0.02, 0.5)), faint=0.05,
                  gear_teeth=31, gear_g=0.05)
DRIVE = Drive(bars=36, slot_g=0.02, pwm_hz=4000, pwm_g=0.02)


def plain_ring_down(strikes_s, strikes_g, samples, rate_hz, resonances):
    "A plain loop over impacts, not a foolish one: each rings only until it has faded to a millionth."
    y, t = np.zeros(samples), np.arange(samples) / rate_hz
    for at, height in zip(strikes_s, strikes_g, strict=True):
        for r in resonances:
            w = 2 * pi * r.hz
            first = max(0, int(np.ceil(at * rate_hz)))
            last = min(samples, int((at + 14 / (w * r.damping)) * rate_hz))
            if last > first:
                since = t[first:last] - at
                y[first:last] += r.gain * height * np.exp(-r.damping * w * since) * np.sin(w * sqrt(1 - r.damping**2) * since)
    return y


def to_the_end(strikes_s, strikes_g, samples, rate_hz, resonances):
    "The loop as it is mostly written: each impact rings to the end of the record."
    y, t = np.zeros(samples), np.arange(samples) / rate_hz
    for at, height in zip(strikes_s, strikes_g, strict=True):
        first = max(0, int(np.ceil(at * rate_hz)))
        for r in resonances:
            w = 2 * pi * r.hz
            y[first:] += r.gain * height * np.exp(-r.damping * w * (t[first:] - at)) * np.sin(w * sqrt(1 - r.damping**2) * (t[first:] - at))
    return y


class Listener:
    "One asset, a second at a time."

    def __init__(self, ring_down=None, samples: int = 25_600):
        self.sound, self.k, self.samples, self.ring_down = Sound(MACHINE, 1480, RATE_HZ, drive=DRIVE, seed=1), 0, samples, ring_down

    def __call__(self) -> np.ndarray:
        patch = mock.patch.object(capture, "ring_down", self.ring_down or capture.ring_down)
        with patch:
            heard = self.sound.capture(self.k * self.samples / RATE_HZ, self.samples, faults={"inner_race": 1.0})
        self.k += 1
        return self.sound.sensor.convert(heard.samples)


def speed(quick: bool) -> tuple[list[dict], dict]:
    ours, loop, naive = Listener()(), Listener(plain_ring_down)(), Listener(to_the_end)()
    assert np.abs(ours - loop).max() < 0.005 and np.abs(ours - naive).max() < 0.005, "the loop does not make the same signal"
    rounds, seconds = (1, 0.05) if quick else (9, 2.0)
    taken = in_turn(rounds, seconds, ours=Listener(), loop=Listener(plain_ring_down), short=Listener(samples=2560))
    slow = in_turn(*(1, 0.05) if quick else (3, 0.5), naive=Listener(to_the_end), ours=Listener())
    factor = {name: statistics.median(1 / s for s in times) for name, times in taken.items()}
    windows = load("contiguous").model_copy(update={"duration": 2.0 if quick else 60.0, "process": None})
    start = time.perf_counter()
    n = sum(1 for _ in windows.stream())
    whole = n * 0.1 / (time.perf_counter() - start)
    table = {"seconds of signal a second": {"windows of 1 s": round(factor["ours"], 1), "windows of 0.1 s": round(factor["short"] / 10, 1),
                                            "scenario `contiguous`, three channels, windows of 0.1 s, with truth and sensor": round(whole, 1),
                                            "plain loop": round(factor["loop"], 1)},
             "loop that stops an impact when it has faded, over ours": round(ratio(taken["loop"], taken["ours"]), 1),
             "spread of ours": [round(1 / max(taken["ours"]), 1), round(1 / min(taken["ours"]), 1)]}
    return [check("synth_realtime_factor", factor["ours"], ">= 100", "two 25.6 kHz channels, one core, windows of 1 s"),
            check("synth_vs_loop_ratio", ratio(slow["naive"], slow["ours"]), ">= 20",
                  "windows of 1 s; the loop as it is mostly written, each impact rings to the end of the record, all else is shared. Against a "
                  f"loop that stops each impact when it has faded it is {ratio(taken['loop'], taken['ours']):.1f}")], table


def memory(quick: bool) -> tuple[list[dict], dict]:
    "Peak of what Python allocates while a scenario is streamed, over its tenth and its whole length."
    plant = load("healthy")
    plant = plant.model_copy(update={"duration": 86_400.0 * (0.5 if quick else 14), "vibration": plant.vibration.model_copy(update={"samples": 25_600})})
    peaks = {}
    for name, share in (("warm-up", 0.02), ("a tenth", 0.1), ("all", 1.0)):
        tracemalloc.start()
        for _ in plant.model_copy(update={"duration": plant.duration * share}).stream(["motor_1"]):
            pass
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return [check("synth_memory_growth_ratio", peaks["all"] / peaks["a tenth"], "<= 1.1",
                  "peak of ten times the duration over the peak of once, windows of 1 s")], {"peak, kB": {k: round(v / 1e3) for k, v in peaks.items()}}


def peak_error_pct(seed: int, fault: str, cage_turns: float) -> float:
    "How far the envelope spectrum's peak lies from the truth's mean frequency, on a random machine at a random speed."
    rng = np.random.default_rng([5, seed])
    m = replace(random_machine([99, seed]), faint=0.0, knocks_per_s=0.0, gear_teeth=0)
    sound = Sound(m, rng.uniform(500, 3600), RATE_HZ, slip=rng.uniform(0, 0.02), jitter=rng.uniform(0.01, 0.02), seed=[5, seed, 1])
    true_hz = sound.fault_hz(fault, 1.0)
    x = sound.capture(0.0, int(cage_turns / sound.fault_hz("cage", 1.0) * RATE_HZ), faults={fault: 3.0}).samples[0].astype(float)
    r = m.resonances[0]
    e = envelope(x, RATE_HZ, 0.7 * r.hz, 1.3 * r.hz) ** 2
    block = max(1, int(RATE_HZ / (40 * true_hz)))  # the spectrum is evaluated on a fine grid, for which fewer samples do
    e = e[:len(e) // block * block].reshape(-1, block).mean(1)
    t = (np.arange(len(e)) * block + (block - 1) / 2) / RATE_HZ
    grid = true_hz * (1 + np.linspace(-0.03, 0.03, 1201))
    weighted = (e - e.mean()) * np.hanning(len(e))
    amplitude = [abs(weighted @ np.exp(-2j * pi * f * t)) for f in grid]
    return abs(grid[int(np.argmax(amplitude))] / true_hz - 1) * 100


def kinematics(quick: bool) -> tuple[list[dict], dict]:
    machines = 1 if quick else 30
    turns = {"outer_race": 20, "inner_race": 20, "ball": 20, "cage": 200}
    errors = {fault: [peak_error_pct(s, fault, turns[fault]) for s in range(machines)] for fault in STRUCK}
    table = {fault: {"cage turns": turns[fault], "median": round(statistics.median(e), 3), "worst": round(max(e), 3)} for fault, e in errors.items()}
    return [check("envelope_peak_error_pct", max(max(e) for e in errors.values()), "<= 0.5",
                  f"worst of {machines} random machines and speeds, four faults, slip 0-2 %, jitter 1-2 %; the cage strikes once a turn, so it "
                  "takes 200 turns until its jitter averages out")], {"envelope peak error, %": table}


def realism(quick: bool) -> tuple[list[dict], dict]:
    try:
        found = accuracy_on_mfpt(20 if quick else 600)
    except PartMissing as e:
        return [check("synth_to_mfpt_accuracy", None, ">= 0.8", f"not measured: {e}")], {}
    return [check("synth_to_mfpt_accuracy", found["accuracy"], ">= 0.8",
                  "20 real records, three classes, by a classifier that saw generated machines only; the target is ours")], found


if __name__ == "__main__":
    args, started = arguments(__doc__ or ""), time.perf_counter()
    checks: list[dict] = []
    tables: dict = {}
    with threadpool_limits(1):
        for part in (speed, memory, kinematics, realism):
            more, table = part(args.quick)
            checks += more
            tables[part.__name__] = table
    report("synth", started, checks, tables, args.quick)
