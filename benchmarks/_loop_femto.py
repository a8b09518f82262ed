"""Six real bearings, run to failure, with the loop on: is any detected later than with it off? And beside each a twin that was mounted anew while healthy, on which the loop must act.

A snapshot every 10 s is to these bearings what a window every 10 min is to a machine, so all times of the loop are a sixtieth of what they are on a plant: its day is 24 min. A bearing stands alone, under
a model of its own.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from _bench import check
from _loop_peers import PEERS, adaptive_alarm
from _loop_peers import run as run_peer
from _loop_run import EVERY_H, Loop, Model, Run, at_work, fit
from _loop_world import DAY_NS, Track

from pdm.data import femto
from pdm.data.run import Run as Recording
from pdm.errors import PartMissing
from pdm.loop.policy import Policy, parse_policy
from pdm.model.detector import Detector
from pdm.stream.records import Event

HOP_S, SIZES, FASTER, PROMISED, LOUDER = 10.0, (100, 300), 60, 1.0, 1.4
DAY = DAY_NS // FASTER          # 24 min, 144 snapshots
START_NS = 1_700_000_000 * 10**9
AFTER_WORK = 100                # clean windows before a new calibration: here it needs no parts for a gate, and so fewer than as shipped
ENOUGH = AFTER_WORK + 24        # snapshots between the remount and the end of what is healthy beyond doubt: these, and one look
NAMES = {"femto_loop_extra_delay_min": "<= 0", **{f"femto_loop_extra_delay_min_peer_{p}": ">= 0" for p in PEERS}, "femto_remount_acted": ">= 1",
         "femto_remount_extra_delay_min": f"<= {HOP_S / 60:.4f}"}


def policy() -> Policy:
    "As shipped, at the pace of these bearings."
    return parse_policy(f"""
default: {{lasting: {8 * 3600 // FASTER} s, cooldown: {7 * 86400 // FASTER} s, budget_per_week: {3 * FASTER}, min_clean_after_work: {AFTER_WORK}, quarantine_days: {14 / FASTER}, false_drifts_per_year: {FASTER}}}
groups: [{{name: fleet, share: 0.5, retraining: {{name: m, kinds: [mahalanobis], false_alarms_per_day: {PROMISED}}}}}]
""")


@dataclass(frozen=True, eq=False)
class Case:
    "One bearing, what was learnt of it, and whether it is mounted anew."
    run: Recording
    n: int                      # snapshots that the first model learns
    remount: int | None = None  # snapshot from which on both axes are louder

    seed = 0                    # of what the gate puts into windows

    @property
    def asset(self) -> str:
        return f"femto/rig/cell/line/{self.run.name}"

    @property
    def bearing(self) -> Any:
        return self.run.bearing

    @property
    def healthy_end(self) -> int:
        assert self.run.healthy_end is not None
        return self.run.healthy_end

    @property
    def onset(self) -> int:
        assert self.run.onset is not None
        return self.run.onset

    def t_ns(self, k: int | np.ndarray) -> Any:
        "When a snapshot ends."
        return START_NS + (np.asarray(k, np.int64) + 1) * round(HOP_S * 1e9)

    @cached_property
    def tracks(self) -> dict[str, Track]:
        x, n = self.run.snapshots, len(self.run.snapshots)
        if self.remount is not None:
            x = x.copy()
            x[self.remount:] *= np.float32(LOUDER)
        return {self.asset: Track(x, self.t_ns(np.arange(n)), {"speed_rpm": np.full(n, self.run.rpm, float)}, (np.arange(n) >= self.onset).astype(float), np.ones(n, bool))}

    @cached_property
    def events(self) -> dict[str, tuple[Event, ...]]:
        if self.remount is None:
            return {}
        return {self.asset: (Event(self.asset, "", "", "maintenance", int(self.t_ns(self.remount)) - 1, 0, -1, {"what": "sensors mounted anew", "by": "rig"}),)}

    @cached_property
    def first(self) -> Model:
        detector = learn({self.asset: self.tracks[self.asset][slice(0, self.n)]})
        live = int(self.t_ns(self.n))
        return at_work(detector, self.tracks, live, int(self.t_ns(round(0.6 * self.n))), live, self.events)

    def twin(self) -> "Case":
        return replace(self, remount=(self.n + self.healthy_end) // 2)

    @cached_property
    def with_loop(self) -> Run:
        return Loop(self, self.tracks, self.first, self.events, policy(), EVERY_H / FASTER, HOP_S, PROMISED, DAY).go()  # type: ignore[arg-type]

    @cached_property
    def any_drift(self) -> Run:
        return run_peer("any_drift", self.tracks, self.first, most=10**6, span_ns=DAY, fit=learn)

    def with_peer(self, peer: str) -> tuple[np.ndarray, np.ndarray, int]:
        "Snapshots that it saw, whether it was in alarm, and how often it learnt anew."
        if peer == "adaptive":
            return self.alarm(*adaptive_alarm(self.first, self.asset, span_ns=DAY), 0)
        r = self.any_drift if peer == "any_drift" else run_peer(peer, self.tracks, self.first, most=10**6, span_ns=DAY, fit=learn)
        return self.alarm(*r.alarm(self.asset), len(r.models) - 1)

    def alarm(self, t_ns: np.ndarray, on: np.ndarray, changes: int) -> tuple[np.ndarray, np.ndarray, int]:
        return (t_ns - START_NS) // round(HOP_S * 1e9) - 1, on, changes


def learn(tracks: dict[str, Track]) -> Detector:
    return fit(tracks, hop_s=HOP_S, promised=PROMISED)


def delay_min(case: Case, at: np.ndarray, on: np.ndarray, since: int | None = None) -> float:
    "From the onset to the first snapshot in alarm from then on; where there is none, to the end."
    since = case.onset if since is None else since
    found = at[on & (at >= since)]
    return ((int(found[0]) if len(found) else len(case.run.snapshots)) - case.onset) * HOP_S / 60


def false_alarms(case: Case, at: np.ndarray, on: np.ndarray, since: int) -> tuple[int, float]:
    "Alarms that began while it was healthy beyond doubt, and the hours of that."
    begins = at[np.flatnonzero(np.diff(np.r_[False, on].astype(int)) == 1)]
    return int(((begins >= since) & (begins < case.healthy_end)).sum()), max(case.healthy_end - since, 0) * HOP_S / 3600


def looked_at(run: Recording, n: int) -> dict[str, Any]:
    "One bearing with the loop on and off, the peers, and its twin."
    case = Case(run, n)
    row, on = compared(case)
    return {**row, "twin": mounted_anew(case, *on)}


def compared(case: Case) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    "With the loop on and off and with the peers; and the snapshots that the loop saw, with its alarm."
    off = case.alarm(*Run([case.first]).alarm(case.asset), 0)
    told = case.with_loop
    on = case.alarm(*told.alarm(case.asset), len(told.models) - 1)
    row: dict[str, Any] = {"off": delay_min(case, *off[:2]), "extra": delay_min(case, *on[:2]) - delay_min(case, *off[:2]), "changes": on[2],
                           "extra_from_healthy_end": delay_min(case, *on[:2], case.healthy_end) - delay_min(case, *off[:2], case.healthy_end),
                           "false": false_alarms(case, *off[:2], case.n)[0], "causes": sorted({c for _, c in told.causes.get(case.asset, [])}), "asked": case.asset in told.asked}
    for peer in PEERS:
        at, alarm, changes = case.with_peer(peer)
        row[f"peer_{peer}"] = {"extra": delay_min(case, at, alarm) - row["off"], "changes": changes, "false": false_alarms(case, at, alarm, case.n)[0]}
    return row, on[:2]


def mounted_anew(case: Case, on_at: np.ndarray, on: np.ndarray) -> dict[str, Any]:
    "Its twin, against the same bearing with the loop and no remount."
    twin = case.twin()
    assert twin.remount is not None
    told = twin.with_loop
    at, alarm, _ = twin.alarm(*told.alarm(case.asset), 0)
    acted = [t for t, what, _, outcome in told.actions if what == "recalibrate" and outcome.get("passed") and t < twin.t_ns(twin.onset)]
    since = int((acted[0] - START_NS) // round(HOP_S * 1e9)) if acted else twin.remount
    without = twin.alarm(*Run([twin.first]).alarm(case.asset), 0)
    return {"at": twin.remount, "enough": twin.healthy_end - twin.remount >= ENOUGH, "acted_after": since - twin.remount if acted else None, "retrained": len(told.retrained()),
            "extra": delay_min(twin, at, alarm) - delay_min(case, on_at, on),
            "false": false_alarms(twin, at, alarm, since)[0], "false_without": false_alarms(twin, *without[:2], twin.remount)[0],
            "in_alarm": round(float(alarm[(at >= since) & (at < twin.healthy_end)].mean()), 3) if since < twin.healthy_end else None,
            "in_alarm_without": round(float(without[1][(without[0] >= twin.remount) & (without[0] < twin.healthy_end)].mean()), 3),
            "causes": sorted({c for t, c in told.causes.get(case.asset, []) if t >= twin.t_ns(twin.remount)}), "why": [d.sentence for turn in told.steps for d in turn.decisions if d.action == "recalibrate"][-1:]}


def cases(quick: bool) -> Iterator[tuple[Recording, int]]:
    for name in ("Bearing3_1",) if quick else tuple(femto.LEARNING):
        run = femto.load([name])[0]
        for n in SIZES:
            if run.healthy_end is not None and n < run.healthy_end and (n == 100 or run.name != "Bearing3_1"):
                yield run, n


def measure(quick: bool, tell: Callable[[str, dict[str, Any]], None] = lambda name, row: None) -> tuple[list[dict], dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for run, n in cases(quick):
                name = f"{run.name.removeprefix('Bearing')} n={n}"
                rows[name] = looked_at(run, n)
                tell(name, rows[name])
    except PartMissing as e:
        return [check(name, None, target, f"not measured: {e}") for name, target in NAMES.items()], {}
    return figures(rows)


def figures(rows: dict[str, dict[str, Any]]) -> tuple[list[dict], dict[str, Any]]:
    worst = max(rows, key=lambda k: rows[k]["extra"])
    changes = sum(r["changes"] for r in rows.values())
    checks = [check("femto_loop_extra_delay_min", rows[worst]["extra"], "<= 0", f"the worst of {len(rows)} ({worst}); the loop changed {changes} models; "
                    f"from the end of the healthy part on: {max(r['extra_from_healthy_end'] for r in rows.values()):.1f}")]
    for p in PEERS:
        worst = max(rows, key=lambda k: rows[k][f"peer_{p}"]["extra"])
        mine = [r[f"peer_{p}"] for r in rows.values()]
        checks.append(check(f"femto_loop_extra_delay_min_peer_{p}", rows[worst][f"peer_{p}"]["extra"], ">= 0",
                            f"the worst of {len(rows)} ({worst}); {sum(m['extra'] > 0 for m in mine)} later than with nothing done; learnt anew {sum(m['changes'] for m in mine)} times; {sum(m['false'] for m in mine)} false alarms, "
                            f"{sum(r['false'] for r in rows.values())} with nothing done"))
    enough = [r["twin"] for r in rows.values() if r["twin"]["enough"]]
    acted = [t for t in enough if t["acted_after"] is not None]
    note = "no bearing has healthy time enough left"
    if enough:
        note = f"calibrated anew on {len(acted)} of {len(enough)} bearings with healthy time enough left; in alarm {np.mean([t['in_alarm_without'] for t in enough]):.1%} of the healthy time after the remount without"
    if acted:
        note += f", {np.mean([t['in_alarm'] for t in acted if t['in_alarm'] is not None]):.1%} with, from a median {np.median([t['acted_after'] for t in acted]) * HOP_S / 60:.0f} min after it on"
    checks.append(check("femto_remount_acted", len(acted) / len(enough) if enough else None, NAMES["femto_remount_acted"], note))
    name, late = "femto_remount_extra_delay_min", max((t["extra"] for t in acted), default=None)
    checks.append(check(name, late, NAMES[name], "the worst of those, against the same bearing with the loop and no remount; ours: no target in the issue"))
    return checks, {"femto": rows}
