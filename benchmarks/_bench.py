"""What the benchmarks share: A B A B measurement, and one JSON object in the shape of the design's section 9."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from pdm.errors import PartMissing

RESULTS = Path(__file__).resolve().parent / "results"
_COMPARE = {">=": float.__ge__, "<=": float.__le__}


def arguments(description: str, parts: Sequence[str] = (), **options: int | str) -> argparse.Namespace:
    "What the command line says: `--quick`, parts by name, and numbers or words, each with its default."
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if parts:
        parser.add_argument("parts", nargs="*", type=str, metavar="part", help=f"only these: {', '.join(parts)}")
    parser.add_argument("--quick", action="store_true", help="does it run? (figures mean nothing)")
    for name, default in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"default {default or 'none'}")
    args = parser.parse_args()
    if unknown := [p for p in getattr(args, "parts", []) if p not in parts]:
        parser.error(f"no part {', '.join(unknown)}: choose from {', '.join(parts)}")
    return args


def in_turn(rounds: int, seconds: float, **work: Callable[[], object]) -> dict[str, list[float]]:
    "Seconds per call of each piece of work, once per round: A B A B …, each for about `seconds`, after one call to warm up."
    for call in work.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            n, start = 0, time.perf_counter()
            while (passed := time.perf_counter() - start) < seconds or n == 0:
                call()
                n += 1
            times[name].append(passed / n)
    return times


def spread(times: list[float]) -> dict[str, float]:
    "Median and range, in milliseconds."
    return {"median_ms": round(1e3 * statistics.median(times), 4), "min_ms": round(1e3 * min(times), 4), "max_ms": round(1e3 * max(times), 4)}


def ratio(over: list[float], under: list[float]) -> float:
    "Median over the rounds of the ratio within a round."
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def check(name: str, value: float | None, target: str, note: str = "") -> dict:
    "A figure beside its target, met or not; `None` where it could not be measured, with the reason in `note`."
    met = None if value is None else _COMPARE[target.split()[0]](float(value), float(target.split()[1]))
    return {"name": name, "value": None if value is None else round(value, 4), "target": target, "met": met, "note": note}


@contextmanager
def part(name: str, promised: Sequence[str], checks: list[dict], seconds: dict[str, float]) -> Iterator[None]:
    "One part of a benchmark: how long it took, and its checks (such as `ratio >= 0.9`) without a figure where something is not here."
    since = time.perf_counter()
    try:
        yield
    except PartMissing as e:
        checks += [check(figure, None, target, str(e)) for figure, target in (what.split(maxsplit=1) for what in promised)]
    seconds[name] = round(time.perf_counter() - since, 1)


def report(name: str, started: float, checks: list[dict], tables: dict, quick: bool) -> None:
    "Print the result and write it to benchmarks/results/NAME.json. It reports; it does not judge."
    packages = ("numpy", "onnxruntime", "torch", "tritonclient")
    result = {"benchmark": name, "quick": quick, "seconds": round(time.perf_counter() - started, 1),
              "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0], "system": platform.platform()},
              "versions": {"python": sys.version.split()[0], **{p: version(p) for p in packages}}, "checks": checks, "tables": tables}
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)
