"""Does the loop know a fault from drift? Generated plants of twelve kinds, at decision level: hop 10 min, kind `mahalanobis`, the real drift, promise, attribution, quarantine,
policy and gate; no Kubeflow and no Triton. Seeds from 15000 on were never used in development. Peers see the same windows in the same run.

    drift    worlds that change for all machines; harmful where the promise breaks without action, else benign
    mixed    the same worlds, in which one machine wears out as well. Paired with the world without: its twin must be silent, and the model that the loop made of that world, which has
             never seen the fault, says from when on the fault can be heard there at all. What that one hears and the loop's model does not was absorbed
    base     nothing changes but one machine: a fault, a broken sensor, or a step that nobody can explain
    healthy  90 days in which nothing happens
    femto    six real bearings, run to failure: is any detected later with the loop? And a remount that it must act on
    poison   challengers that must not pass the gate

Each part writes a line for each of its runs to results/loop-runs.jsonl, and goes on from there with --resume.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from _bench import RESULTS, arguments, check, report
from _loop_peers import PEERS, adaptive_alarm, first_retraining
from _loop_peers import run as run_peer
from _loop_run import LIVE_D, PROMISED, Loop, Model, Run, first_model, so_many
from _loop_world import ASSETS, DAY_NS, FAULTS, KINDS, SENSORS, Plant, Track, wear, world_change
from scipy import stats

from pdm.loop.observed import watch
from pdm.loop.performance import REFUTED, poisson_interval, promise

PARTS = ("drift", "base", "healthy", "femto", "poison")  # `mixed` comes with `drift`
DAYS = 14.0
CHANGE_D = 7.0
HOP_NS = 600 * 10**9


def _start(tracks: dict[str, Track]) -> int:
    return min(int(t.t_ns[0]) for t in tracks.values())


def _with(model: Model, tracks: dict[str, Track]) -> Model:
    "The same detector at work on other windows of some assets."
    from _loop_world import STREAM
    seen = {a: watch(model.detector, a, STREAM, t.windows, t.t_ns, t.conditions).between(model.since_ns) for a, t in tracks.items()}
    return replace(model, observed={**model.observed, **seen})


def _alarm_after(r: Run | tuple[np.ndarray, np.ndarray], asset: str, since_ns: int) -> list[int]:
    t, on = r.alarm(asset) if isinstance(r, Run) else r
    return t[on & (t >= since_ns)].tolist()


def _live(r: Run) -> int | None:
    "Since when a model that saw the new world judges."
    return r.models[1].since_ns if len(r.models) > 1 else None


def _false_alarms(r: Run, since_ns: int) -> dict[str, float]:
    "Of the last model: episodes in running days, over all machines, and whether any promise is refuted. The calibration of a machine that was held back from it is handed on, and promises nothing."
    m = r.models[-1]
    told = {a: promise(o, m.detector.calibration_of(a), max(since_ns, m.since_ns), refuted=REFUTED / ASSETS) for a, o in m.observed.items()}
    own, lent = ([p for a, p in told.items() if (a not in m.handed_on) == has] for has in (True, False))
    return {"episodes": sum(p.episodes for p in own), "days": sum(p.days for p in own), "refuted": any(p.refuted for p in own), "lent": len(lent), "lent_episodes": sum(p.episodes for p in lent)}


def drift(seed: int) -> list[dict[str, Any]]:
    "A world, and two machines that wear out in it, one at a time."
    rng = np.random.default_rng([seed, 1])
    at_d = CHANGE_D + float(rng.uniform(0, 0.5))
    plant = Plant(seed % len(KINDS), seed, DAYS, world_change(rng, seed % len(KINDS), at_d))
    tracks = plant.tracks()
    first, start = first_model(tracks), _start(tracks)
    change, end = start + round(at_d * DAY_NS), max(int(t.t_ns[-1]) for t in tracks.values())
    broken = {a for a, o in first.observed.items() if promise(o, first.detector.calibration_of(a), change, refuted=REFUTED / ASSETS).refuted}
    alone = Loop(plant, tracks, first).go()
    row: dict[str, Any] = {"part": "drift", "seed": seed, "kind": plant.kind, "events": [e["kind"] for e in plant.events], "harmful": bool(broken),
                           "acted": len(alone.models) > 1, "fired": bool(alone.retrained()),
                           "kinds": [x[3].get("kind") for x in alone.actions], "reasons": [x[3].get("reason", "")[:200] for x in alone.actions], "asked": len(alone.asked),
                           "asked_of_it": any(d.action == "ask" and d.fired and broken & {d.scope, *d.assets} for step in alone.steps if step.t_ns >= change for d in step.decisions)}
    if row["acted"]:
        live = alone.models[1].since_ns
        row |= {"delay_d": (live - change) / DAY_NS, "after": _false_alarms(alone, live)}
    row["without"] = _false_alarms(Run([first]), alone.models[1].since_ns if row["acted"] else change)
    peers = {p: run_peer(p, tracks, first) for p in PEERS if p != "adaptive" and (seed % 2 or p != "weekly")}
    for p, r in peers.items():
        row[f"peer_{p}"] = {"acted": bool(r.retrained()), **({"after": _false_alarms(r, r.models[1].since_ns)} if len(r.models) > 1 else {})}
    rows = [row]
    for k in range(2 + seed % 2):
        rng = np.random.default_rng([seed, 2, k])
        who, onset_d = int(rng.integers(ASSETS)), float(rng.uniform(LIVE_D + 0.3, at_d + 3.0))
        fault = wear(rng, onset_d, float(rng.uniform(3.0, 5.0)))
        mixed, asset, onset = plant.but((who, "wear", fault)), plant.asset(who), start + round(onset_d * DAY_NS)
        worn = {**tracks, **mixed.tracks([who])}
        model = _with(first, {asset: worn[asset]})
        with_loop = Loop(mixed, worn, model).go()
        told: dict[str, Any] = {"part": "mixed", "seed": seed, "k": k, "kind": plant.kind, "fault": fault["fault"], "how": fault["kind"], "onset_after_change_d": onset_d - at_d,
                                "harmful": row["harmful"]}
        told["causes"] = sorted({c for t, c in with_loop.causes.get(asset, []) if t >= onset})
        learnt = worn[asset].severity[np.isin(worn[asset].t_ns, with_loop.trained_on.get(asset, np.zeros(0, np.int64)))]
        told |= {"learnt_worn": int((learnt > 0).sum()), "learnt_severity": float(learnt.max(initial=0.0))}
        told |= _still(with_loop, alone, asset, onset, end, ideal := _hearing(alone, worn, asset))
        for p in PEERS:
            if p == "adaptive":
                told[f"peer_{p}"] = _still(adaptive_alarm(model, asset), adaptive_alarm(first, asset), asset, onset, end, ideal)
            elif k == 0 and seed % 2:  # these learn again, which takes longer than all else
                told[f"peer_{p}"] = _still(run_peer(p, worn, model), peers[p], asset, onset, end, _hearing(peers[p], worn, asset))
        rows.append(told)
    return rows


def _still(r: Any, pair: Any, asset: str, onset: int, end: int, ideal: Any) -> dict[str, Any]:
    "Once the new model is live and the fault has begun: does the machine stand in alarm, while its twin without the fault is silent? Can it be heard there at all?"
    live = _live(r) if isinstance(r, Run) else None
    pair_live = _live(pair) if isinstance(pair, Run) else None
    since = max(onset, live or onset, pair_live or onset)
    twin = set(_alarm_after(pair, asset, since))
    own, heard = ([t for t in _alarm_after(x, asset, since) if t not in twin] for x in (r, ideal))
    return {"live": live is not None, "alarmed": bool(own), "heard": bool(_alarm_after(ideal, asset, since)), "twin_silent": len(twin) <= 0.01 * (end - since) / HOP_NS,
            "delay_h": (own[0] - since) / 3600e9 if own else None, "heard_h": (heard[0] - since) / 3600e9 if heard else None,
            "alarm_share": len(own) * HOP_NS / (end + HOP_NS - own[0]) if own else 0.0, "heard_share": len(heard) * HOP_NS / (end + HOP_NS - heard[0]) if heard else 0.0}


def _hearing(r: Run, worn: Mapping[str, Track], asset: str) -> Run:
    "The same models, on a machine that wears out: they have not learnt of it."
    return Run([_with(m, {asset: worn[asset].cut(m.since_ns if k else 0, 2**62)}) for k, m in enumerate(r.models)])  # the first was there before


def base(seed: int) -> list[dict[str, Any]]:
    "One machine changes, the world does not."
    rng = np.random.default_rng([seed, 3])
    plant = Plant(seed % len(KINDS), seed, DAYS)
    tracks = plant.tracks()
    first, rows = first_model(tracks), []
    start, who = _start(tracks), int(rng.integers(ASSETS))
    at_d = CHANGE_D + float(rng.uniform(0, 1))
    sensor = SENSORS[seed % len(SENSORS)]
    fates = {"fault": ("wear", wear(rng, at_d, float(rng.uniform(3, 6)))), "sensor": ("sensor_faults", {"channel": str(rng.choice(["h", "v"])), "kind": sensor, "at": f"{at_d} d", "lasts": "5 d"}),
             "unknown": ("events", {"kind": "remount", "at": f"{at_d} d", "by": float(rng.choice([rng.uniform(0.4, 0.6), rng.uniform(1.6, 2.5)]))})}
    for part, (what, how) in fates.items():
        mine = plant.but((who, what, how))
        changed = {**tracks, **mine.tracks([who])}
        asset, at = plant.asset(who), start + round(at_d * DAY_NS)
        model = _with(first, {asset: changed[asset]})
        r = Loop(mine, changed, model).go()
        o = model.observed[asset]
        causes = {c for t, c in r.causes.get(asset, []) if t >= at}
        rows.append({"part": part, "seed": seed, "kind": plant.kind, "what": how.get("fault") or how["kind"], "retrained": len(r.retrained()), "asked": asset in r.asked, "causes": sorted(causes),
                     "noticed": "none" not in causes or len(causes) > 1, "alarm": bool(o.alarm[o.t_ns >= at].any()), "sensor_alarm": "sensor" in causes or bool(o.broken[o.t_ns >= at].any()),
                     **{f"peer_{p}": {"retrained": int(first_retraining(p, model, int(o.t_ns[-1])) is not None)} for p in PEERS}})
    return rows


def healthy(seed: int, days: float = 90.0) -> list[dict[str, Any]]:
    "Nothing happens for a quarter of a year."
    plant = Plant(seed % len(KINDS), seed, LIVE_D + days)
    tracks = plant.tracks()
    first = first_model(tracks)
    r, end = Loop(plant, tracks, first).go(), max(int(t.t_ns[-1]) for t in tracks.values())
    wrong = 0
    t, until = first.since_ns, end
    while (t := first_retraining("any_drift", Model(first.detector, t, first.references, first.observed), until) or until + 1) <= until:
        wrong, t = wrong + 1, t + 2 * DAY_NS  # its reference stays: a retraining would give it another one
    years = ASSETS * days / 365.25
    return [{"part": "healthy", "seed": seed, "kind": plant.kind, "asset_years": years, "retrained": len(r.retrained()), "passed": len(r.retrained(True)), "asked": len(r.asked), "alarms": _false_alarms(Run([first]), first.since_ns),
             "peer_any_drift": {"retrained": wrong}, "peer_weekly": {"retrained": int(days // 7)}, "peer_adaptive": {"retrained": 0}, "peer_none": {"retrained": 0}}]


# --- figures

def _rate(rows: list[dict[str, Any]], yes: Callable[[dict[str, Any]], bool]) -> tuple[float | None, str]:
    k, n = sum(map(yes, rows)), len(rows)
    return (k / n if n else None), so_many(k, n)


def figures(rows: list[dict[str, Any]]) -> tuple[list[dict], dict[str, Any]]:
    "Checks and tables of what was run."
    of = {p: [r for r in rows if r["part"] == p] for p in ("drift", "mixed", "fault", "sensor", "unknown", "healthy")}
    harmful, benign = [r for r in of["drift"] if r["harmful"]], [r for r in of["drift"] if not r["harmful"]]
    checks, tables = [], dict[str, Any]()
    if of["drift"]:
        value, note = _rate(harmful, lambda r: r["acted"])
        delays = [r["delay_d"] for r in harmful if r["acted"]]
        checks.append(check("drift_retrained_rate", value, ">= 0.95", f"harmful drift acted on: {note}; median delay {np.median(delays) if delays else np.nan:.2f} d; "
                            f"of the others, a person was asked about a machine whose promise was broken in {sum(r['asked_of_it'] for r in harmful if not r['acted'])}"))
        needless = sum(r["fired"] for r in benign)
        checks.append(check("benign_retrained_count", needless, "<= 0", f"benign drift for which a retraining was begun, {so_many(needless, len(benign))}; ours: no target in the issue"))
        after = [r["after"] for r in of["drift"] if r.get("after")]
        broken, episodes, days = sum(a["refuted"] for a in after), sum(a["episodes"] for a in after), sum(a["days"] for a in after)
        low, high = poisson_interval(episodes, days)
        chance = float(stats.poisson.sf(episodes - 1, PROMISED * days)) if episodes else 1.0
        checks.append(check("false_alarms_after_per_day", episodes / days if days else None, f"<= {PROMISED}", f"{episodes} episodes in {days:.0f} machine days under new models, 95 % {low:.3f} to {high:.3f}; chance "
                            f"{chance:.2g} where {PROMISED} a day are kept; single promises refuted in {broken} of {len(after)} runs. Aside: {sum(a['lent'] for a in after)} machines that were held back, to which nothing is promised, with {sum(a['lent_episodes'] for a in after)} alarms"))
        without = [r["without"] for r in harmful]
        tables["false alarms a machine day in harmful drift, without the loop"] = round(sum(w["episodes"] for w in without) / max(sum(w["days"] for w in without), 1e-9), 3)
        for p in ("any_drift", "none"):
            value, note = _rate(harmful, lambda r, p=p: r[f"peer_{p}"]["acted"])
            checks.append(check(f"drift_retrained_rate_peer_{p}", value, ">= 0", note))
        checks += [check("drift_retrained_rate_peer_weekly", 1.0, ">= 0", "it retrains whatever happens"), check("drift_retrained_rate_peer_adaptive", 0.0, ">= 0", "it never retrains")]
    for part in ("fault", "sensor", "unknown"):
        if some := of[part]:
            n = sum(r["retrained"] > 0 for r in some)
            checks.append(check(f"{part}_retrained_count", n, "<= 0", so_many(n, len(some))))
            for p in PEERS:
                n = sum(r[f"peer_{p}"]["retrained"] > 0 for r in some)
                checks.append(check(f"{part}_retrained_count_peer_{p}", n, ">= 0", so_many(n, len(some))))
    if of["sensor"]:
        value, note = _rate(of["sensor"], lambda r: r["sensor_alarm"])
        checks.append(check("sensor_alarm_rate", value, ">= 0.95", note))
        tables["sensor alarm by fault"] = {s: so_many(sum(r["sensor_alarm"] for r in mine), len(mine)) for s in SENSORS if (mine := [r for r in of["sensor"] if r["what"] == s])}
    if of["unknown"]:
        value, note = _rate(of["unknown"], lambda r: r["asked"])
        checks.append(check("unknown_asked_rate", value, ">= 1", note))
    if of["fault"]:
        tables["fault alone, causes named"] = {c: sum(c in r["causes"] for r in of["fault"]) for c in ("fault", "unknown", "drift", "sensor", "none")}
    if mixed := of["mixed"]:
        for suffix, all_of in (("", mixed), *((f"_peer_{p}", [r[f"peer_{p}"] for r in mixed if f"peer_{p}" in r]) for p in PEERS)):
            asked = [r for r in all_of if (r["live"] or suffix in ("_peer_adaptive", "_peer_none")) and r["heard"]]  # these two never have another model
            value, note = _rate(asked, lambda r: r["alarmed"] and r["twin_silent"])
            loud = sum(not r["twin_silent"] for r in asked)
            checks.append(check(f"mixed_still_alarmed_rate{suffix}", value, ">= 0" if suffix else ">= 0.95",
                                f"{note}; the twin is not silent in {loud} (1 % of its windows is silence). Of {len(all_of)} runs a new model is live in {sum(r['live'] for r in all_of)}, and heard can the fault be in these"))
            kept = [r["alarmed"] and (r["heard_h"] is None or (r["delay_h"] - r["heard_h"]) * 3600e9 <= 1.01 * HOP_NS) for r in asked]
            checks.append(check(f"mixed_delay_kept_rate{suffix}", float(np.mean(kept)) if kept else None, ">= 0" if suffix else ">= 0.95",
                                f"{so_many(sum(kept), len(kept))}: no more than one window later than a model that has never seen the fault"))
        asked = [r for r in mixed if r["live"] and r["heard"]]
        tables["mixed: later than a model that has never seen the fault, h"] = {f"{q:.0%}": round(float(np.quantile(late, q)), 2) for q in (0.5, 0.9, 1.0)} if (late := [r["delay_h"] - r["heard_h"] for r in asked if r["alarmed"] and r["heard_h"] is not None]) else {}
        tables["mixed by fault"] = {f: so_many(sum(r["alarmed"] and r["twin_silent"] for r in mine), len(mine)) for f in FAULTS if (mine := [r for r in asked if r["fault"] == f])}
        tables["mixed: share of the time in alarm from the first one on, median: with the loop, of a model that has never seen the fault"] = [round(float(np.median([r[x] for r in asked])), 3) for x in ("alarm_share", "heard_share")] if asked else []
        tables["mixed: runs that learnt windows of a worn machine; greatest severity learnt, of 0.95"] = [sum(r["learnt_worn"] > 0 for r in mixed), round(max(r["learnt_severity"] for r in mixed), 3)]
        tables["mixed: no new model; of them heard, alarmed"] = [len(still := [r for r in mixed if not r["live"]]), sum(r["heard"] for r in still), sum(r["heard"] and r["alarmed"] for r in still)]
    if of["healthy"]:
        years = sum(r["asset_years"] for r in of["healthy"])
        for suffix, n in (("", sum(r["retrained"] for r in of["healthy"])), *((f"_peer_{p}", sum(r[f"peer_{p}"]["retrained"] for r in of["healthy"])) for p in PEERS)):
            low, high = poisson_interval(n, years)
            checks.append(check(f"needless_retrains_per_asset_year{suffix}", n / years, ">= 0" if suffix else "<= 1", f"{n} in {years:.1f} asset-years, 95 % {low:.2f} to {high:.2f}"))
        tables["healthy: asked needlessly"] = f"{sum(r['asked'] for r in of['healthy'])} machines of {ASSETS * len(of['healthy'])}"
    return checks, tables


JOBS: dict[str, tuple[Callable[[int], list[dict[str, Any]]], int]] = {"drift": (drift, 60), "base": (base, 60), "healthy": (healthy, 12)}


def _job(part: str, seed: int) -> list[dict[str, Any]]:
    warnings.simplefilter("ignore")
    return [{**r, "job": [part, seed]} for r in JOBS[part][0](seed)]


def _aside(name: str, quick: bool) -> tuple[list[dict], dict[str, Any]]:
    return import_module(f"_loop_{name}").measure(quick)


def run(pool: Executor, parts: list[str], seeds: dict[str, list[int]], file: Path) -> Iterator[list[dict[str, Any]]]:
    "Runs that are not in the file yet, beside each other; each is written as it ends."
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    yield done
    known = {tuple(r["job"]) for r in done}
    shares = sorted((k / len(seeds[p]), p, s) for p in parts for k, s in enumerate(seeds[p]))  # of each part the same share, however far it comes
    todo = [(p, s) for _, p, s in shares if (p, s) not in known]
    for future in as_completed([pool.submit(_job, *what) for what in todo]):
        rows = future.result()
        with file.open("a") as out:
            out.writelines(json.dumps(r, default=float) + "\n" for r in rows)
        print(f"{len(known) + 1} {rows[0]['job']}", file=sys.stderr)
        known.add(tuple(rows[0]["job"]))
        yield rows


def main() -> None:
    resume = "--resume" in sys.argv
    sys.argv = [a for a in sys.argv if a != "--resume"]
    args, since = arguments(__doc__ or "", PARTS, seed=15000, jobs=2), time.perf_counter()
    parts = args.parts or list(PARTS)
    file = RESULTS / ("loop-runs-quick.jsonl" if args.quick else "loop-runs.jsonl")
    RESULTS.mkdir(exist_ok=True)
    if not resume:
        file.unlink(missing_ok=True)
    seeds = {p: list(range(args.seed, args.seed + (1 if args.quick else n))) for p, (_, n) in JOBS.items()}
    generated = [p for p in parts if p in JOBS and not (args.quick and p == "healthy")]
    with ProcessPoolExecutor(args.jobs) as pool:
        aside = [pool.submit(_aside, name, args.quick) for name in ("poison", "femto") if name in parts]  # first, so that none of them is left over for one process at the end
        rows = [r for some in run(pool, generated, seeds, file) for r in some] if generated else []
        checks, tables = figures(rows)
        for more, table in (a.result() for a in aside):
            checks, tables = [*checks, *more], tables | table
    report("loop", since, checks, tables, args.quick)


if __name__ == "__main__":
    main()
