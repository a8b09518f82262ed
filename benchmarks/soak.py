"""What the edge loses over a long run of kills: nothing, says the tally, or what it lost.

Real mosquitto, tritonserver, agent, sinks, InfluxDB, PostgreSQL, SQLite and archive, and two gateways as processes of their own, over a network that fails
as well; SIGKILL to one or some of them every few seconds, between other faults: cuts, silence, slow links, processes that stand still, storms of what
can't be read, scored or stored; and people who give commands all the while. `soak_windows` and `soak_kills` say how much that was, `soak_lost` how many
acknowledged windows, events and commands do not stand in the journal or in a store, `soak_duplicated` how many stand there twice, or both there and among
the dead letters.
"""

import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from _bench import arguments, check, report

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from faults import chaos
from faults.rig import Rig, rms_bundle


def main() -> None:
    args, started = arguments(__doc__ or "", windows=100_000, kills=200, seed=random.SystemRandom().randrange(10**6)), time.perf_counter()
    windows, kills = (min(args.windows, 1500), min(args.kills, 4)) if args.quick else (args.windows, args.kills)
    draw, done, folder = random.Random(args.seed), Counter[str](), Path(tempfile.mkdtemp(prefix="pdm-soak-"))
    print(f"--seed {args.seed}; what a failure leaves is in {folder}", file=sys.stderr, flush=True)
    with Rig(folder / "site", rms_bundle(folder), rate=150.0, seed=args.seed) as rig:
        rig.begin()
        for name, fault in chaos.deck(rig, draw, deadly=2):
            rig.progress(draw.randrange(1, 30))
            print(f"{time.perf_counter() - started:7.1f} s, {sum(rig.acknowledged().values()):7d} windows, {rig.kills:4d} kills: {name}", file=sys.stderr, flush=True)
            fault(rig, draw)
            done[name] += 1
            if rig.kills >= kills and sum(rig.acknowledged().values()) >= windows:
                break
        t, kills, parts = rig.settle(), rig.kills, list(rig.parts)
    bad = {name: t[name] for name in ("lost", "doubled", "both", "wrong")}
    if not any(bad.values()):
        shutil.rmtree(folder)
    checks = [
        check("soak_windows", t["acknowledged"], ">= 100000", "windows that were acknowledged, refused ones among them"),
        check("soak_kills", kills, ">= 200", f"SIGKILLs to {', '.join(parts)} and Triton's stubs"),
        check("soak_lost", len(bad["lost"]), "<= 0", "acknowledged, and in the journal or in a store it is not"),
        check("soak_duplicated", len(bad["doubled"]) + len(bad["both"]), "<= 0", "twice in one place, or both taken and refused"),
        check("soak_wrong", len(bad["wrong"]), "<= 0", "refused without a reason, taken in spite of one, or another score than was due"),
    ]
    tables = {"tally": {name: len(value) if isinstance(value, list) else value for name, value in t.items()}, "seed": args.seed,
              "faults": dict(done.most_common()), "what is not as it should be": {name: list(map(str, some[:20])) for name, some in bad.items()}}
    report("soak", started, checks, tables, args.quick)


if __name__ == "__main__":
    main()
