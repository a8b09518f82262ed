"""What the edge loses over a long run of kills: nothing, says the tally, or what it lost.

Real mosquitto, tritonserver, agent, sinks and stores, and two gateways as processes of their own, all behind a network that fails as well; SIGKILL to one
or some of them every few seconds, between other faults: cuts, silence, slow links, processes that stand still, storms of what can't be read. `soak_windows`
and `soak_kills` say how much that was, `soak_lost` how many acknowledged windows do not stand in the journal or in a store, `soak_duplicated` how many
stand there twice, or both there and among the dead letters.
"""

import random
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
    draw, done = random.Random(args.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder, Rig(Path(folder, "site"), rms_bundle(Path(folder)), rate=150.0, seed=args.seed) as rig:
        rig.begin()
        deadly = chaos.kills(rig)
        others = {name: fault for name, fault in chaos.faults(rig).items() if name not in deadly}
        while rig.kills < kills or sum(rig.acknowledged().values()) < windows:
            rig.progress(draw.randrange(1, 30))
            name, fault = draw.choice(list((deadly if draw.random() < 0.8 else others).items()))
            done[name] += 1
            fault(rig, draw)
            print(f"{time.perf_counter() - started:7.1f} s, {sum(rig.acknowledged().values()):7d} windows, {rig.kills:4d} kills: {name}", file=sys.stderr, flush=True)
        t, kills = rig.settle(), rig.kills
    checks = [
        check("soak_windows", t["acknowledged"], ">= 100000", "windows that were acknowledged, refused ones among them"),
        check("soak_kills", kills, ">= 200", "SIGKILLs to gateways, broker, Triton and its stubs, agent, sinks, stores"),
        check("soak_lost", len(t["lost"]), "<= 0", "acknowledged, and in the journal or in a store it is not"),
        check("soak_duplicated", len(t["doubled"]) + len(t["both"]), "<= 0", "twice in one place, or both taken and refused"),
    ]
    tables = {"tally": {name: len(value) if isinstance(value, list) else value for name, value in t.items()}, "seed": args.seed,
              "faults": dict(done.most_common()), "what is not as it should be": {name: list(map(str, t[name][:20])) for name in ("lost", "doubled", "both", "wrong")}}
    report("soak", started, checks, tables, args.quick)


if __name__ == "__main__":
    main()
