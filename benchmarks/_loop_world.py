"""The plants of loop.py: twelve kinds of machine, three of each, and what happens to them. All windows of a plant are made once and held in memory."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pdm.data.scenario import Scenario
from pdm.signal.kinematics import Bearing

HOP_S, RATE_HZ, CHANNELS, UNITS, STREAM = 600.0, 25_600.0, ("h", "v"), ("g", "g"), "vibration"
CAUSES = ("speed_rpm", "load", "ambient_c")  # what the detector is told beside a window
DAY_NS = 86_400 * 10**9
ASSETS = 3

CONSTANT, FAN, MILL = {"kind": "constant", "swing": 0.1}, {"kind": "variable", "low": 0.7, "hold": "1700 s"}, {"kind": "variable", "low": 0.8, "fan": False, "hold": "2300 s"}
KINDS: tuple[dict[str, Any], ...] = (
    {"rpm": 1480, "seed": 2, "machine": {"gear_teeth": 0}, "duty": CONSTANT},
    {"rpm": 2950, "seed": 38, "machine": {"gear_teeth": 0, "noise_g": 0.15, "strike_g": 1.8}, "duty": {**CONSTANT, "swing": 0.2}},
    {"rpm": 990, "seed": 7, "machine": {"gear_teeth": 0}, "duty": FAN},
    {"rpm": 1480, "seed": 29, "machine": {"gear_teeth": 23}, "duty": {**CONSTANT, "swing": 0.15}},
    {"rpm": 1480, "seed": 11, "machine": {"gear_teeth": 0}, "duty": MILL},
    {"rpm": 2950, "seed": 5, "machine": {"gear_teeth": 0}, "duty": CONSTANT},
    {"rpm": 1480, "seed": 13, "machine": {"gear_teeth": 0, "knocks_per_s": 0}, "duty": {"kind": "cycles", "period": "5 h", "share": 0.7}},
    {"rpm": 2950, "seed": 17, "machine": {"gear_teeth": 31}, "duty": FAN},
    {"rpm": 740, "seed": 19, "machine": {"gear_teeth": 0}, "duty": CONSTANT},
    {"rpm": 1480, "seed": 23, "machine": {"gear_teeth": 0, "noise_g": 0.2}, "duty": MILL},
    {"rpm": 2950, "seed": 31, "machine": {"gear_teeth": 0, "noise_g": 0.1}, "duty": {"kind": "shifts", "from_h": 2, "to_h": 22, "days": 7}},
    {"rpm": 1480, "seed": 37, "machine": {"gear_teeth": 0, "strike_g": 1.5}, "duty": {**CONSTANT, "swing": 0.25}},
)
FAULTS = ("outer_race", "inner_race", "ball", "cage", "imbalance", "misalignment", "looseness")
SENSORS = ("dropout", "spike", "clipping", "steps", "gain_loss", "drift", "wrong_rate", "stuck")


@dataclass(frozen=True, eq=False)
class Track:
    "One asset's windows, and what is true of them."
    windows: np.ndarray              # float32 [n, channel, sample]
    t_ns: np.ndarray                 # int64 [n], their ends
    conditions: Mapping[str, np.ndarray]
    severity: np.ndarray             # float [n], of the fault
    running: np.ndarray              # bool [n]

    def cut(self, since_ns: int, until_ns: int) -> "Track":
        a, b = np.searchsorted(self.t_ns, [since_ns, until_ns])
        return self[slice(a, b)]

    def __getitem__(self, which: slice | np.ndarray) -> "Track":
        return Track(self.windows[which], self.t_ns[which], {k: v[which] for k, v in self.conditions.items()}, self.severity[which], self.running[which])


@dataclass(frozen=True)
class Plant:
    "A scenario, whose assets can be exchanged for the same ones with another fate."
    kind: int
    seed: int
    days: float
    events: tuple[dict[str, Any], ...] = ()                              # of all assets
    own: tuple[tuple[int, str, dict[str, Any]], ...] = ()                # asset, `events`, `wear` or `sensor_faults`, and what

    @property
    def scenario(self) -> Scenario:
        kind = dict(KINDS[self.kind])
        duty = kind.pop("duty")
        assets: list[dict[str, Any]] = [{"name": f"m{i}", "type": "m", "duty": duty, "events": list(self.events), "wear": [], "sensor_faults": []} for i in range(ASSETS)]
        for i, what, how in self.own:
            assets[i][what] = [*assets[i][what], how]
        return Scenario(about="loop", duration=f"{self.days} d", every="10 min", process=None, types={"m": kind}, assets=assets, seed=self.seed)

    @cached_property
    def bearing(self) -> Bearing:
        return self.scenario.types["m"].built.bearing

    def asset(self, i: int) -> str:
        return f"{self.scenario.path}/m{i}"

    def tracks(self, only: Sequence[int] = tuple(range(ASSETS))) -> dict[str, Track]:
        "Windows by asset. Those of an asset do not depend on what happens to the others."
        out: dict[str, list[Any]] = {}
        for look in self.scenario.stream([f"m{i}" for i in only]):
            out.setdefault(str(look.path), []).append((look.window.samples, look.window.t_ns, look.window.conditions, look.truth.severity, look.truth.state == "running"))
        return {a: Track(np.stack([r[0] for r in rows]), np.array([r[1] for r in rows]), {c: np.array([r[2][c] for r in rows]) for c in CAUSES},
                         np.array([r[3] for r in rows]), np.array([r[4] for r in rows])) for a, rows in out.items()}

    def but(self, *own: tuple[int, str, dict[str, Any]]) -> "Plant":
        return dataclasses.replace(self, own=(*self.own, *own))


def world_change(rng: np.random.Generator, kind: int, at_d: float) -> tuple[dict[str, Any], ...]:
    "What changes for all machines at once: another duty, more load, heat, a batch of sensors with another gain, or two of these."
    duties = [{"kind": "variable", "low": float(rng.uniform(0.35, 0.55)), "hold": "1900 s"}, {"kind": "variable", "low": float(rng.uniform(0.5, 0.65)), "fan": False, "hold": "1300 s"},
              {"kind": "constant", "load": float(rng.uniform(1.4, 1.8)), "swing": 0.2}]
    choices = [{"kind": "new_duty", "at": f"{at_d} d", "duty": duties[rng.integers(len(duties))]}, {"kind": "load_step", "at": f"{at_d} d", "by": float(rng.uniform(1.3, 1.9))},
               {"kind": "ambient", "at": f"{at_d} d", "by": float(rng.uniform(6, 14))}, {"kind": "remount", "at": f"{at_d} d", "by": float(rng.choice([rng.uniform(0.5, 0.75), rng.uniform(1.3, 1.8)]))}]
    some = rng.permutation(len(choices))[: 1 + int(rng.random() < 0.5)]
    return tuple(choices[k] for k in some)


def wear(rng: np.random.Generator, onset_d: float, lasts_d: float) -> dict[str, Any]:
    return {"fault": str(rng.choice(FAULTS)), "onset": f"{onset_d} d", "lasts": f"{lasts_d} d", "peak": 0.95, "kind": str(rng.choice(["slow", "slow", "abrupt", "bursty"]))}
