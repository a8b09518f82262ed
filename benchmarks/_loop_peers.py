"""What a plant has today, on the same windows as the loop: retraining on whatever has moved, retraining by the calendar, a threshold that follows, and nothing.

None of them asks why something moved, none holds windows back, and none has a gate: that is what they are here for.
"""

from collections.abc import Callable, Mapping

import numpy as np
from _loop_run import LIVE_D, Model, Run, at_work, fit
from _loop_world import DAY_NS, Track
from scipy import stats

from pdm.errors import NotEnoughData
from pdm.model.detector import Detector

PEERS = ("any_drift", "weekly", "adaptive", "none")
_NEW_D, _PAUSE_D, _WEEKLY_AT_D = 2.0, 3.0, 3.5  # learns the last two days; waits so long after that; the calendar's day, since the first model
_P, _SHARE = 0.05, 0.5    # drift is that half of the columns differ at 5 %, as a widely used library has it


def fired(model: Model, now_ns: int, span_ns: int = DAY_NS) -> bool:
    "Half of the columns of any machine's last day differ from its reference."
    for a, r in model.references.items():
        o = model.observed[a].between(now_ns - span_ns, now_ns)
        new, old = o.embedding[o.usable], r.values[:, [k for k, n in enumerate(r.names) if n.startswith("embedding/")]]
        if len(new) >= 20 and np.mean([stats.ks_2samp(old[:, k], new[:, k], method="asymp").pvalue < _P for k in range(new.shape[1])]) >= _SHARE:
            return True
    return False


def first_retraining(peer: str, model: Model, end_ns: int) -> int | None:
    "When it would retrain first."
    live, day = model.since_ns, DAY_NS
    if peer == "weekly":
        return live + round(_WEEKLY_AT_D * day)
    if peer != "any_drift":
        return None
    return next((t for t in range(live + day, end_ns + 1, day // 2) if fired(model, t)), None)


def run(peer: str, tracks: Mapping[str, Track], first: Model, most: int = 1, span_ns: int = DAY_NS, fit: Callable[[dict[str, Track]], Detector] = fit) -> Run:
    "What becomes of a plant; retrains at most so often."
    out, end = Run([first]), max(int(t.t_ns[-1]) for t in tracks.values())
    since = first.since_ns
    while peer in ("any_drift", "weekly") and len(out.models) <= most:
        model = out.models[-1]
        if peer == "weekly":
            at: int | None = first.since_ns + round((_WEEKLY_AT_D + 7 * (len(out.models) - 1)) * span_ns)
        else:
            at = next((t for t in range(since + span_ns, end + 1, span_ns // 2) if fired(model, t, span_ns)), None)
        if at is None or at > end:
            break
        new = {a: t.cut(at - round(_NEW_D * span_ns), at) for a, t in tracks.items()}
        new = {a: t[t.running] for a, t in new.items()}
        try:
            detector = fit(new)
        except NotEnoughData:
            break
        reference = {a: t[slice(round(0.6 * len(t.t_ns)), None)] for a, t in new.items()}
        out.models.append(at_work(detector, tracks, at, 0, 0, None, reference))
        out.actions.append((at, "retrain", "fleet", {"passed": True}))
        for a, t in new.items():
            out.trained_on[a] = np.concatenate([out.trained_on.get(a, np.zeros(0, np.int64)), t.t_ns])
        since = at + round((_PAUSE_D - 1) * span_ns)
    return out


def adaptive_alarm(model: Model, asset: str, days: float = 2.0, span_ns: int = DAY_NS) -> tuple[np.ndarray, np.ndarray]:
    "The first model's scores over the median and three deviations of the last days, three in a row."
    o = model.observed[asset]
    t, score, on = o.t_ns, np.log(np.maximum(o.score, 1e-9)), np.zeros(len(o), bool)
    for i in range(len(o)):
        past = score[(t >= t[i] - round(days * span_ns)) & (t < t[i]) & o.usable]
        if len(past) >= 50:
            middle = np.median(past)
            on[i] = o.usable[i] and score[i] > middle + 3 * max(1.4826 * np.median(np.abs(past - middle)), 1e-6)
    return t, on & np.r_[False, on[:-1]] & np.r_[False, False, on[:-2]]


__all__ = ["LIVE_D", "PEERS", "adaptive_alarm", "first_retraining", "run"]
