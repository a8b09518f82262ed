"What was sent, what was acknowledged, and where it stands: exactly once everywhere, or the tally says what does not."

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pdm.stream.journal import Event, JournalReader, Row

from .people import Answer, Said
from .stores import Store

Key = tuple[str, str, int, int]  # asset, stream, epoch, seq


class Sent(NamedTuple):
    "A window that was handed to the bus."
    key: Key
    score: float | None = None         # that it shall get
    reasons: Collection[str] = ()      # why it may be refused; empty where it must be taken
    kept: bool = False                 # its sender keeps it until it is acknowledged; else only what was acknowledged counts


def ledger(file: Path) -> list[Sent]:
    "What a feeder's `send` has taken."
    lines = (line.rsplit(" ", 4) for line in file.read_text().splitlines()) if file.exists() else ()
    return [Sent((asset, stream, int(epoch), int(seq)), float(score), kept=True) for asset, stream, epoch, seq, score in lines]


def tally(
    sent: Iterable[Sent],
    acknowledged: Mapping[tuple[str, str, int], int],  # the highest seq that was acknowledged, by (asset, stream, epoch)
    journal: JournalReader,
    stores: Iterable[Store] = (),
    said: Iterable[Said] = (),                         # by people
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
    done = 0
    for key, score, why, kept in sent:
        covered = key[3] <= acknowledged.get(key[:3], -1)
        done += covered
        there, out = key in standing, key in refused
        if not (there or out) and (covered or kept):
            lost.append(("journal", key))
        if there and why or out and reasons[key] not in why:
            wrong.append((key, f"refused: {reasons[key]}" if out else "taken", f"expected {' or '.join(why) or 'a verdict'}"))
        if there and score is not None and abs(scores[key] - score) > 1e-3 * abs(score):
            wrong.append((key, f"score {scores[key]:g}", f"expected {score:g}"))
    for name, seq in acknowledged.items():
        if name not in marks or marks[name].watermark < seq:
            wrong.append((name, f"acknowledged up to {seq}", f"the journal says {marks[name].watermark if name in marks else 'nothing'}"))
    happened = journal.events()
    events = {(e.asset, e.stream, e.episode, e.kind, e.t_ns): e for e in happened}
    doubled += [("journal", k, n) for k, n in Counter((e.asset, e.stream, e.episode, e.kind, e.t_ns) for e in happened).items() if n > 1]
    heard = Counter((e.asset, e.kind, e.details.get("comment")) for e in happened)
    answers = Counter(c.answer.value for c in said)
    for *command, answer in said:
        n = heard[tuple(command)]
        lost += [("journal", command)] * (answer is Answer.DONE and n == 0)
        doubled += [("journal", command, n)] * (n > 1)
        wrong += [(command, "stands in the journal", "it was refused")] * (answer is Answer.REFUSED and n > 0)
    found = {}
    records: dict[tuple, Row | Event] = {(r.asset, r.stream, r.epoch, r.seq): r for r in rows} | events
    for store in stores:
        there = Counter({k: n for k, n in (store.keys() + store.events()).items() if len(k) == 5 or k[:2] in keys})
        out = store.refused()
        lost += [(store.name, k) for k, r in records.items() if k not in there and k not in out and store.wants(r)]
        doubled += [(store.name, k, n) for k, n in there.items() if n > 1]
        both += [(store.name, k) for k in out if k in there]
        wrong += [(k, f"stands in {store.name}", "it should not") for k in there if k not in records or not store.wants(records[k])]
        wrong += [(k, f"refused by {store.name}", "it can hold that") for k in out if k not in records or not store.refuses(records[k])]
        found[store.name] = {"windows": sum(len(k) == 4 for k in there), "events": sum(len(k) == 5 for k in there), "refused": len(out)}
    return {"sent": len(sent), "acknowledged": done, "journaled": len(standing), "refused": len(refused), "events": len(events),
            "commands": dict(answers), "late": sum("late" in r.flags for r in rows), "clock_suspect": sum("clock_suspect" in r.flags for r in rows),
            "engines": dict(Counter(r.engine for r in rows)), "stores": found, "lost": lost, "doubled": doubled, "both": both, "wrong": wrong}


def complete(t: Mapping[str, Any]) -> None:
    "Raises `AssertionError`, showing the first of everything that is missing, doubled or wrong."
    bad = {name: t[name] for name in ("lost", "doubled", "both", "wrong") if t[name]}
    if bad:
        text = "\n".join(f"{len(items)} {name}: " + "\n    ".join(map(str, ["", *items[:10]])) for name, items in bad.items())
        raise AssertionError(f"{text}\nof {({k: v for k, v in t.items() if k not in bad})}")
