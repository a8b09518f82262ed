"""What retraining costs: a step over the bare call, whole runs for 1, 10 and 100 assets on this machine, a run from the cache, and what follows for 10,000.

The plant is generated, each asset with the same number of windows; runs are by Kubeflow's local runner, as `predmaint retrain` does it."""

import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from _bench import arguments, check, in_turn, part, report

from pdm.config import load_settings
from pdm.data.training import gather
from pdm.errors import CheckFailed, PartMissing
from pdm.loop.pipeline import run_local
from pdm.loop.steps import run_step

PARTS = ("overhead", "assets", "cache")
PROMISED = {"overhead": ["step_overhead_s <= 5"], "assets": ["seconds_per_asset_1 <= 120", "seconds_per_asset_100 <= 5"], "cache": ["cached_rerun_ratio <= 0.5"]}
SHARD = 50       # assets that share a model
POD_S = 30       # assumed: what Kubernetes takes to start a pod, that a laptop doesn't
PODS = 7         # tasks of a shard one after the other
AT_ONCE = 20     # shards at once on the cluster, as the pipeline says
args = arguments(__doc__, PARTS, windows=200)


def plant(folder: Path, assets: int) -> str:
    "A source of so many pumps."
    file = folder / f"pumps_{assets}.yaml"
    file.write_text(f"about: pumps\nduration: 20 days\nevery: 1 h\nprocess: null\ntypes: {{pump: {{rpm: 1480}}}}\nassets: [{{name: pump, type: pump, copies: {assets}}}]\n")
    return f"scenario:{file}?windows={args.windows}"


def measured(call: Callable[[], dict]) -> tuple[dict, float, float]:
    "Its outcome, seconds, and the most memory that this process and its children had (PSS, MB of 10^6 bytes) while it ran."
    most, over = 0.0, threading.Event()

    def look() -> None:
        nonlocal most
        while not over.wait(0.5):
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # it has ended
                    continue
            most = max(most, total / 1e6)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    since = time.perf_counter()
    outcome = call()
    seconds = time.perf_counter() - since
    over.set()
    thread.join()
    return outcome, seconds, most


def retrain(folder: Path, assets: int, trigger: str) -> tuple[float, float]:
    "Seconds and megabytes of a run."
    outcome, seconds, most = measured(lambda: run_local(load_settings(state_dir=folder / f"state-{assets}", tracking_url="sqlite:"), {
        "source": plant(folder, assets), "name": "pump", "most_assets": SHARD, "kinds": ["mahalanobis"], "windows_per_asset": args.windows}, trigger))
    if outcome["exit_code"]:
        raise CheckFailed(f"the run for {assets} assets ended with {outcome['exit_code']}: {outcome['reason']}; its log is {outcome['log']}")
    return seconds, most


def not_quick() -> None:
    if args.quick:
        raise PartMissing("a whole run is not quick: tests/test_pipeline.py has some")


def main() -> None:
    started, checks, seconds, tables = time.perf_counter(), [], {}, {}
    wanted = args.parts or PARTS
    folder = Path(tempfile.mkdtemp())
    try:
        if "overhead" in wanted:
            with part("overhead", PROMISED["overhead"], checks, seconds):
                source = plant(folder, 1)
                times = in_turn(1 if args.quick else 5, 0, step=lambda: run_step("ingest", {"source": source}, folder / "step"),
                                bare=lambda: gather(source, windows_per_asset=400).save(folder / "bare"))
                over = [a - b for a, b in zip(times["step"], times["bare"], strict=True)]
                tables["overhead_s"] = {"step": [round(t, 2) for t in times["step"]], "bare": [round(t, 2) for t in times["bare"]], "over": [round(t, 2) for t in over]}
                checks.append(check("step_overhead_s", statistics.median(over), "<= 5", "the step ingest over gather and save in a process that has its libraries: a kernel, "
                                    "papermill, and loading the libraries again"))
        if "assets" in wanted:
            with part("assets", PROMISED["assets"], checks, seconds):
                not_quick()
                runs = {n: retrain(folder, n, "cold") for n in (1, 10, 100)}
                tables["assets"] = {n: {"seconds": round(s, 1), "seconds_per_asset": round(s / n, 2), "most_mb": round(mb)} for n, (s, mb) in runs.items()}
                checks.append(check("seconds_per_asset_1", runs[1][0], "<= 120", "a whole run, from look to promote"))
                checks.append(check("seconds_per_asset_100", runs[100][0] / 100, "<= 5", f"shards of {SHARD}, beside each other on this machine's cores"))
                each = (runs[10][0] - runs[1][0]) / 9
                shard_s = runs[1][0] + (SHARD - 1) * each + PODS * POD_S
                shards = 10_000 / SHARD
                tables["estimate_10000"] = {
                    "an asset more, seconds": round(each, 2), "a shard, seconds": round(shard_s), "shards": shards, "at once": AT_ONCE,
                    "hours": round(shards / AT_ONCE * shard_s / 3600, 2), "core_hours": round(shards * (shard_s - PODS * POD_S) / 3600, 1),
                    "arithmetic": f"a shard = run for 1 asset + {SHARD - 1} × ((run for 10 − run for 1) / 9) + {PODS} pods × {POD_S} s to start (assumed); "
                                  f"hours = 10,000 / {SHARD} / {AT_ONCE} × that; a pod is taken to be as fast as this machine"}
        if "cache" in wanted:
            with part("cache", PROMISED["cache"], checks, seconds):
                not_quick()
                cold, _ = retrain(folder, 3, "cold")
                again = [retrain(folder, 3, f"again-{i}")[0] for i in range(3)]
                tables["cache_s"] = {"cold": round(cold, 1), "again": [round(t, 1) for t in again]}
                checks.append(check("cached_rerun_ratio", statistics.median(again) / cold, "<= 0.5",
                                    "look, package, gate, promote and record look at the world, and are never cached"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report("pipeline", started, checks, {**tables, "seconds": seconds}, args.quick)


if __name__ == "__main__":
    main()
