"""The loop at decision level: the real controller, logbook, quarantine, policy, drift, attribution, promise and gate; what the edge and Kubeflow do is done in this process."""

import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from _loop_world import CHANNELS, DAY_NS, HOP_S, RATE_HZ, STREAM, UNITS, Plant, Track

import pdm.loop.drift as drift_
from pdm.config import Settings
from pdm.data.parts import SHARES, Windows
from pdm.data.spans import Span, moment_ns, which
from pdm.data.split import by_clock
from pdm.data.training import TrainingData
from pdm.errors import NotEnoughData
from pdm.loop.attribute import Looked, attribute, before_work, look
from pdm.loop.controller import Controller, Seen
from pdm.loop.drift import Reference, evaluate_drift
from pdm.loop.gate import gate
from pdm.loop.judged import choose_kind, judge
from pdm.loop.logbook import Logbook, Trigger
from pdm.loop.lookout import REFUTED_AT_A_LOOK
from pdm.loop.observed import Observed, watch
from pdm.loop.performance import promise, share
from pdm.loop.policy import Policy, parse_policy
from pdm.model.bundle import handed_on
from pdm.model.detector import Detector
from pdm.stream.records import Event

drift_._noticed = lambda line, first: {}  # when river's detectors would have spoken decides nothing, and takes a quarter of the time
LEARN_D, LIVE_D = 6.0, 6.0         # the first model learns so many days, and is at work from then on
PROMISED = 0.1                     # false alarms a day and machine
EVERY_H = 4.0
POLICY = """
default: {min_clean_windows: 800, min_clean_after_work: 150}
groups: [{name: fleet, share: 0.5, retraining: {name: m, kinds: [mahalanobis], false_alarms_per_day: 0.1}}]
"""                                # all else as it is shipped; so many windows are two days of three machines


def so_many(k: int, n: int) -> str:
    "A count in words, with its interval."
    return f"{k} of {n}, 95 % {s.low:.3f} to {s.high:.3f}" if (s := share(k, n)) else "no runs"


def fit(tracks: Mapping[str, Track], kind: str = "mahalanobis", hop_s: float = HOP_S, promised: float = PROMISED) -> Detector:
    "A detector of windows that are taken to be healthy, by asset."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Detector.fit({a: t.windows for a, t in tracks.items()}, RATE_HZ, list(CHANNELS), hop_s, {a: dict(t.conditions) for a, t in tracks.items()}, kind=kind,
                            false_alarms_per_day=promised, name="m")
    made.contract = made.contract.model_copy(update={"units": UNITS})  # told afterwards, so that the fit does not look at the sensors of windows that are known to be sound
    return made


def training_data(tracks: Mapping[str, Track], hop_s: float = HOP_S) -> TrainingData:
    "The same windows in the parts that the step `ingest` makes."
    names = tuple(sorted(next(iter(tracks.values())).conditions))
    parts: dict[str, dict[str, Windows]] = {}
    for a, t in tracks.items():
        try:
            split = by_clock(t.t_ns, SHARES, hop_s, windows_s := t.windows.shape[2] / RATE_HZ)
        except NotEnoughData:
            continue
        for part, at in split.items():
            parts.setdefault(part, {})[a] = Windows(t.windows[at], np.stack([t.conditions[n][at] for n in names], 1), t.t_ns[at])
    if "train" not in parts:
        raise NotEnoughData(f"no asset has windows enough of {windows_s:g} s")
    return TrainingData("m", "loop", "0" * 64, RATE_HZ, CHANNELS, UNITS, names, dict.fromkeys(tracks, hop_s), "", "", parts)


def tracks_of(data: TrainingData, *parts: str) -> dict[str, Track]:
    found = {}
    for a in data.parts[parts[0]]:
        w = [data.parts[p][a] for p in parts if a in data.parts.get(p, {})]
        conditions = np.concatenate([x.conditions for x in w])
        n = sum(map(len, w))
        found[a] = Track(np.concatenate([x.samples for x in w]), np.concatenate([x.t_ns for x in w]), dict(zip(data.condition_names, conditions.T, strict=True)), np.zeros(n), np.ones(n, bool))
    return found


@dataclass
class Model:
    "A detector at work, and what it has been held against."
    detector: Detector
    since_ns: int
    references: dict[str, Reference]
    observed: dict[str, Observed]    # all that it will judge: monitors are causal, so this may be known early
    handed_on: frozenset[str] = frozenset()  # assets that it has not learnt, whose calibration is the one before's, moved


@dataclass
class Run:
    "What became of a plant."
    models: list[Model]
    actions: list[tuple[int, str, str, dict[str, Any]]] = field(default_factory=list)  # when, what, scope, outcome
    steps: list[Any] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)       # assets that a person was asked about
    causes: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    trained_on: dict[str, np.ndarray] = field(default_factory=dict)   # by asset: ends of the windows that reached a model

    def alarm(self, asset: str) -> tuple[np.ndarray, np.ndarray]:
        "When, and whether its alarm was on, under whichever model was at work."
        parts = []
        for m, after in zip(self.models, [*(n.since_ns for n in self.models[1:]), 2**62], strict=True):
            o = m.observed[asset].between(m.since_ns, after)
            parts.append((o.t_ns, o.alarm))
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def retrained(self, passed: bool | None = None) -> list[int]:
        return [t for t, what, _, outcome in self.actions if what == "retrain" and (passed is None or bool(outcome.get("passed")) == passed)]


def first_model(tracks: Mapping[str, Track], events: Mapping[str, tuple[Event, ...]] | None = None) -> Model:
    "The model that learned the first days."
    start = min(int(t.t_ns[0]) for t in tracks.values())
    live = start + round(LIVE_D * DAY_NS)
    detector = fit({a: t.cut(0, start + round(LEARN_D * DAY_NS)) for a, t in tracks.items()})
    return at_work(detector, tracks, live, start + round(0.6 * LEARN_D * DAY_NS), live, events)


def at_work(detector: Detector, tracks: Mapping[str, Track], since_ns: int, reference_ns: int, until_ns: int, events: Mapping[str, tuple[Event, ...]] | None = None,
            reference: Mapping[str, Track] | None = None) -> Model:
    "Put to work at a time; what it was calibrated on is the reference."
    seen, references = {}, {}
    for a, t in tracks.items():
        o = watch(detector, a, STREAM, t.windows, t.t_ns, t.conditions, (events or {}).get(a, ())) if reference is None else None
        past = o.between(reference_ns, until_ns) if o is not None else watch(detector, a, STREAM, reference[a].windows, reference[a].t_ns, reference[a].conditions) if a in (reference or {}) else None
        if past is not None and past.usable.any():
            references[a] = Reference.of(past)
        later = t.cut(since_ns, 2**62)
        seen[a] = o.between(since_ns) if o is not None else watch(detector, a, STREAM, later.windows, later.t_ns, later.conditions, tuple(e for e in (events or {}).get(a, ()) if e.t_ns >= since_ns))
    return Model(detector, since_ns, references, seen)


class Loop:
    "One plant, looked after from the first model on."
    def __init__(self, plant: Plant, tracks: Mapping[str, Track], first: Model, events: Mapping[str, tuple[Event, ...]] | None = None, policy: Policy | None = None,
                 every_h: float = EVERY_H, hop_s: float = HOP_S, promised: float = PROMISED, span_ns: int = DAY_NS):
        self.hop_s, self.promised, self.span_ns = hop_s, promised, span_ns  # other times go with the span, that is a day on a plant
        self.plant, self.tracks, self.events, self.every_h = plant, tracks, events or {}, every_h
        self.policy = policy or parse_policy(POLICY)
        self.run = Run([first])
        self.looked: dict[str, tuple[int, Looked]] = {}
        self.slip: Exception | None = None

    def go(self, until_ns: int | None = None) -> Run:
        "From the first model's start to the end."
        end = until_ns or max(int(t.t_ns[-1]) for t in self.tracks.values())
        step = round(self.every_h * 3600e9)
        with tempfile.TemporaryDirectory() as folder, Logbook(Path(folder) / "loop.db") as book:
            book._db.execute("PRAGMA synchronous = OFF")  # this one need not outlive a power cut
            controller = Controller(Settings(state_dir=Path(folder), loop_every=self.every_h), self.policy, book, self._act, self._look)
            for now in range(self.run.models[0].since_ns + self.span_ns, end + 1, step):
                turn = controller.step(now)
                if self.slip:  # a controller survives it; a benchmark must not
                    raise self.slip
                self.run.asked |= {d.scope for d in turn.decisions if d.action == "ask" and d.fired}
                self.run.steps.append(turn)
                for s in turn.seen:
                    self.run.causes.setdefault(s.attribution.asset, []).append((now, s.attribution.cause))
        return self.run

    # --- looking

    def _look(self, now_ns: int, labels: Any, spans: Any) -> list[Seen]:
        model = self.run.models[-1]
        observed = [o.between(None, now_ns) for o in model.observed.values()]
        observed = [o for o in observed if len(o)]
        found = evaluate_drift(observed, model.references, now_ns, self.every_h * 3600, self.policy.default.false_drifts_per_year, self.span_ns / 1e9)
        since = {a: min(d.since_ns or now_ns, now_ns - self.span_ns) for a, d in found.drifts.items()}
        promises = {o.asset: promise(o, model.detector.calibration_of(o.asset), since[o.asset], refuted=REFUTED_AT_A_LOOK) for o in observed}
        moved = [o.asset for o in observed if found.drifts[o.asset].fired or promises[o.asset].refuted or o.alarm[o.t_ns >= now_ns - self.span_ns].any()]
        held = {a: min(begun) for a in moved if (begun := [s.since_ns for s in spans if s.asset == a and s.what == "held" and s.covers(now_ns)])}
        for a in moved:
            if a not in self.looked or now_ns - self.looked[a][0] >= self.span_ns // 2:  # raw windows are looked at twice a day
                self.looked[a] = now_ns, self._raw(a, now_ns)
        looked = {a: self.looked[a][1] for a in moved}
        told = attribute(found, observed, model.references, promises, looked, held, self.span_ns / 1e9)
        return [Seen(o, told[o.asset], found.drifts[o.asset], promises[o.asset]) for o in observed]

    def _raw(self, asset: str, now_ns: int) -> Looked:
        t, first = self.tracks[asset], self.run.models[0]
        now, before = t.cut(now_ns - self.span_ns, now_ns), t.cut(0, first.since_ns)
        now, before = now[now.running], before[before.running]
        some = np.linspace(0, len(before.t_ns) - 1, min(60, len(before.t_ns))).astype(int)
        work = before_work(self.run.models[-1].observed[asset], first.since_ns, now_ns, self.span_ns)
        left = t.cut(*work) if work is not None else t[:0]
        left = left[left.running]
        return look(now.windows, CHANNELS, UNITS, RATE_HZ, before.windows[some], self.plant.bearing, now.conditions["speed_rpm"], before.conditions["speed_rpm"][some],
                    left.windows, left.conditions["speed_rpm"])

    # --- acting

    def _act(self, trigger: Trigger) -> dict[str, Any]:
        try:
            outcome = (self._retrain if trigger.action == "retrain" else self._recalibrate)(trigger)
        except Exception as e:
            self.slip = e
            raise
        self.run.actions.append((trigger.t_ns, trigger.action, trigger.scope, outcome))
        return outcome

    def _sound(self, trigger: Trigger, assets: list[str]) -> dict[str, Track]:
        "Windows that may be learnt: since it began, of the running machine, and not held."
        spans = [Span.parse(s) if isinstance(s, str) else s for s in trigger.arguments["spans"]]
        since = moment_ns(trigger.arguments["since"])
        found = {}
        for a in assets:
            t, o = self.tracks[a].cut(since, trigger.t_ns), self.run.models[-1].observed[a]
            known = np.isin(t.t_ns, o.t_ns[o.usable]) & np.array([which(spans, a, int(x)) != "held" for x in t.t_ns], bool)
            if known.sum() >= 20:
                found[a] = t[known]
        return found

    def _retrain(self, trigger: Trigger) -> dict[str, Any]:
        champion, now = self.run.models[-1], trigger.t_ns
        try:
            data = training_data(self._sound(trigger, list(self.tracks)), self.hop_s)
            challenger = self._challenger(champion.detector, data)
        except NotEnoughData as e:
            return {"exit_code": 1, "reason": str(e)}
        spans = [Span.parse(s) if isinstance(s, str) else s for s in trigger.arguments["spans"]]
        told = gate(challenger, champion.detector, data, seed=self.plant.seed, spans=spans)
        outcome = {"exit_code": 0 if told.passed else 3, "passed": told.passed, "probation": told.probation, "kind": "new" if challenger.contract.training_data != champion.detector.contract.training_data else "calibrated anew", "reason": "; ".join(f"{c.name}: {c.says}" for c in told.criteria if c.passed is False)}
        if told.passed:
            kept = {a: t[slice(round(0.6 * len(t.t_ns)), None)] for a, t in tracks_of(data, "train").items()}
            rest = tracks_of(data, *(p for p in ("validate", "test") if p in data.parts)) if len(data.parts) > 1 else {}
            reference = {a: Track(*(np.concatenate([getattr(k, f), getattr(rest[a], f)]) for f in ("windows", "t_ns")), {c: np.concatenate([k.conditions[c], rest[a].conditions[c]]) for c in k.conditions},
                                  np.zeros(0), np.zeros(0)) if a in rest else k for a, k in kept.items()}
            known = handed_on(champion.detector.calibrations.values(), challenger.calibrations.values())  # as the step `package` does
            challenger = challenger._with(challenger.calibration, [*challenger.calibrations.values(), *known])
            model = at_work(challenger, self.tracks, now, 0, 0, self.events, reference)
            self.run.models.append(replace(model, handed_on=frozenset(str(r.asset) for r in known)))
            for a, t in tracks_of(data, "train").items():
                self.run.trained_on[a] = np.concatenate([self.run.trained_on.get(a, np.zeros(0, np.int64)), t.t_ns])
        return outcome

    def _challenger(self, champion: Detector, data: TrainingData) -> Detector:
        "The champion, calibrated anew on what is new, or a new model: as the step `evaluate` chooses between them."
        train, again = tracks_of(data, "train"), champion
        for a, t in train.items():
            again = again.recalibrate(t.windows, dict(t.conditions), a)
        new = fit(train, hop_s=self.hop_s, promised=self.promised)
        part = "validate" if set(data.parts.get("validate", ())) == set(train) else "test"
        chosen = choose_kind({name: judge(d, data, part, self.plant.seed) for name, d in (("champion", again), ("mahalanobis", new))})
        return again if chosen["kind"] == "champion" else new

    def _recalibrate(self, trigger: Trigger) -> dict[str, Any]:
        champion, a, now = self.run.models[-1], trigger.scope, trigger.t_ns
        sound = self._sound(trigger, [a])
        if a not in sound:
            return {"exit_code": 1, "reason": "no clean windows"}
        t = sound[a]
        detector = champion.detector.recalibrate(t.windows, dict(t.conditions), a)
        model = Model(detector, now, dict(champion.references), {b: o.between(now) for b, o in champion.observed.items()}, champion.handed_on - {a})
        one = at_work(detector, {a: self.tracks[a]}, now, 0, 0, self.events, {a: t})
        model.references |= one.references
        model.observed |= one.observed
        for b, o in model.observed.items():
            if b != a:
                model.observed[b] = replace(o, model=one.observed[a].model)
        model.references = {b: replace(r, model=one.observed[a].model) for b, r in model.references.items()}
        self.run.models.append(model)
        return {"exit_code": 0, "passed": True}
