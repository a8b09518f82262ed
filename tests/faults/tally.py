"What was sent, what was acknowledged, and where it stands: exactly once everywhere, or the tally says what does not."

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pdm.stream.journal import JournalReader

Key = tuple[str, str, int, int]  # asset, stream, epoch, seq


class Sent(NamedTuple):
    "A window that was handed to the bus."
    key: Key
    score: float | None = None         # that it shall get
    reasons: Collection[str] = ()      # why it may be refused; empty where it must be taken
    kept: bool = False                 # its sender lived until everything was acknowledged; else only what was acknowledged counts


class Store(Protocol):
    "A destination of the journal, as somebody sees it who only looks."
    name: str

    def keys(self) -> Counter[Key]:
        "How often each window stands there."

    def events(self) -> Counter[tuple]:
        "The same of the events, by (asset, stream, episode, kind, t_ns)."

    def refused(self) -> set[Key]:
        "The windows that it did not take, each with a reason in its sink's dead letters."


def ledger(
    file: Path,
    forgotten: Collection[tuple[str, str, int]] = (),  # epochs whose sender died and took its memory along
) -> list[Sent]:
    "What a feeder's `send` has taken."
    lines = (line.rsplit(" ", 4) for line in file.read_text().splitlines()) if file.exists() else ()
    keys = (((asset, stream, int(epoch), int(seq)), float(score)) for asset, stream, epoch, seq, score in lines)
    return [Sent(key, score, kept=key[:3] not in forgotten) for key, score in keys]


def tally(
    sent: Iterable[Sent],
    acknowledged: Mapping[tuple[str, str, int], int],  # the highest seq that was acknowledged, by (asset, stream, epoch)
    journal: JournalReader,
    stores: Iterable[Store] = (),
) -> dict[str, Any]:
    "Counts, and under `lost`, `doubled`, `both` and `wrong` what stands where it should not, or does not stand where it should."
    sent = list(sent)
    keys = {s.key[:2] for s in sent}
    rows = [r for key in sorted(keys) for r in journal.verdicts(*key)]
    standing = Counter((r.asset, r.stream, r.epoch, r.seq) for r in rows)
    scores = {(r.asset, r.stream, r.epoch, r.seq): r.score for r in rows}
    letters = [d for d in journal.dead_letters() if d.epoch is not None]
    refused = Counter((d.asset, d.stream, d.epoch, d.seq) for d in letters)
    reasons = {(d.asset, d.stream, d.epoch, d.seq): d.reason for d in letters}
    marks = journal.marks()
    lost: list[tuple] = []
    doubled = [("journal", k, n) for k, n in standing.items() if n > 1] + [("dead letters", k, n) for k, n in refused.items() if n > 1]
    both = [k for k in standing if k in refused]
    wrong: list[tuple] = []
    done = left = 0
    for key, score, why, kept in sent:
        covered = key[3] <= acknowledged.get(key[:3], -1)
        done += covered
        there, out = key in standing, key in refused
        if not (there or out):
            if covered or kept:
                lost.append(("journal", key))
            left += not covered
        if there and why or out and reasons[key] not in why:
            wrong.append((key, f"refused: {reasons[key]}" if out else "taken", f"expected {' or '.join(why) or 'a verdict'}"))
        if there and score is not None and abs(scores[key] - score) > 1e-3 * abs(score):
            wrong.append((key, f"score {scores[key]:g}", f"expected {score:g}"))
    for name, seq in acknowledged.items():
        if name not in marks or marks[name].watermark < seq:
            wrong.append((name, f"acknowledged up to {seq}", f"the journal says {marks[name].watermark if name in marks else 'nothing'}"))
    events = {(e.asset, e.stream, e.episode, e.kind, e.t_ns) for e in journal.events()}
    found = {}
    for store in stores:
        there, said = Counter({k: n for k, n in store.keys().items() if k[:2] in keys}), store.events()
        refused_there = store.refused()
        lost += [(store.name, k) for k in standing if k not in there and k not in refused_there]
        lost += [(store.name, k) for k in events - set(said)]
        doubled += [(store.name, k, n) for k, n in (there + said).items() if n > 1]
        both += [(store.name, k) for k in refused_there if k in there]
        wrong += [(k, f"stands in {store.name}", "it is not in the journal") for k in there if k not in standing]
        found[store.name] = len(there)
    return {"sent": len(sent), "acknowledged": done, "journaled": len(standing), "refused": len(refused), "forgotten": left, "events": len(events),
            "late": sum("late" in r.flags for r in rows), "clock_suspect": sum("clock_suspect" in r.flags for r in rows),
            "engines": dict(Counter(r.engine for r in rows)), "stores": found, "lost": lost, "doubled": doubled, "both": both, "wrong": wrong}


def complete(t: Mapping[str, Any]) -> None:
    "Raises `AssertionError`, showing the first of everything that is missing, doubled or wrong."
    bad = {name: t[name] for name in ("lost", "doubled", "both", "wrong") if t[name]}
    if bad:
        text = "\n".join(f"{len(items)} {name}: " + "\n    ".join(map(str, ["", *items[:10]])) for name, items in bad.items())
        raise AssertionError(f"{text}\nof {({k: v for k, v in t.items() if k not in bad})}")
