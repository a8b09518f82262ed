"""Replication into InfluxDB beside bare writes of the same lines, joined, to the same server, in the same run.

The bare side is the least that anyone could do: ready-made lines, one POST for each batch over a connection that stays open. Ours gets the
journal's records and makes the lines itself. Both go through the nginx that gives Debian's influxd 1.6.7 its /api/v2/write. Each round
writes new points, so that neither side overwrites.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import urllib3
from _bench import check, ratio

from pdm.errors import PartMissing
from pdm.process import find_program
from pdm.stream.influx import InfluxSink, Lines
from pdm.stream.journal import Row

_T0_NS = 1_767_225_600_000_000_000
_ASSETS = 50
_REQUEST = 5000  # lines in a request, on both sides


def records(first: int, n: int) -> list[Row]:
    "Verdicts as the journal gives them: two channels, their indicators, one condition."
    rng = np.random.default_rng(first)
    names = [f"{i}_{c}" for i in ("rms", "peak", "kurtosis", "crest", "velocity_rms") for c in "hv"]
    embedding = np.zeros(16, np.float32)
    return [Row(f"acme/lyon/hall-2/line-1/fan-{k % _ASSETS}", "vibration", 7, k, _T0_NS + k * 10**6, _T0_NS + k * 10**6, *x[:5].tolist(), False, 0, "running", "none",
                None, True, False, {"h": x[5].item(), "v": x[6].item()}, dict(zip(names, x[7:17].round(6).tolist(), strict=True)), {"speed_rpm": 1500.0},
                embedding, "ab" * 32, "triton", id=k + 1) for k, x in zip(range(first, first + n), rng.random((n, 17)), strict=True)]


def measure(rounds: int, rows: int) -> tuple[list[dict], dict]:
    "`rows` records a round and side."
    missing = [p for p in ("influxd", "nginx") if not find_program(p)]
    if missing:
        return [check("influx_ratio", None, ">= 0.7", f"{' and '.join(missing)} missing: apt-get install influxdb nginx-light")], {}
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from servers import Influx

    with tempfile.TemporaryDirectory() as folder:
        server = Influx(Path(folder) / "influx")
        try:
            return _measure(server, rounds, rows)
        except PartMissing as e:
            return [check("influx_ratio", None, ">= 0.7", str(e))], {}
        finally:
            server.close()


def _measure(server, rounds: int, rows: int) -> tuple[list[dict], dict]:
    sink = InfluxSink(server.url, server.token)
    sink.init()
    bare = urllib3.PoolManager()
    url = f"http://127.0.0.1:{server.port}/api/v2/write?org={server.org}&bucket={server.bucket}&precision=ns"
    times: dict[str, list[float]] = {"bare": [], "sink": [], "lines": []}
    first = 0

    def batches(size: int) -> list[list[Row]]:
        nonlocal first
        first += rows
        return [records(first - rows + i, min(size, rows - i)) for i in range(0, rows, size)]

    def bare_side() -> float:
        made, of = batches(_REQUEST), Lines().of
        since = time.perf_counter()
        bodies = ["\n".join([of(r) for r in batch]).encode() for batch in made]
        times["lines"].append(time.perf_counter() - since)
        since = time.perf_counter()
        for body in bodies:
            answer = bare.request("POST", url, body=body, headers={"Authorization": f"Token {server.token}"})
            if answer.status != 204:
                raise PartMissing(f"bare write refused: {answer.data[:200]!r}")
        return time.perf_counter() - since

    def sink_side() -> float:
        made = batches(sink.batch)
        since = time.perf_counter()
        for batch in made:
            sink.write(batch)
        return time.perf_counter() - since

    for n in range(rounds + 1):  # the first warms up; who begins changes, since the server compacts when it likes
        for name, side in [("bare", bare_side), ("sink", sink_side)][::-1 if n % 2 else 1]:
            times[name].append(side())
    times = {name: t[1:] for name, t in times.items()}
    stored = server.query("SELECT count(seq) FROM health")[0]["values"][0][1]
    sink.close()
    rate = {name: round(rows / statistics.median(t)) for name, t in times.items()}
    note = f"{rate['sink']} rows/s, bare {rate['bare']}; making the lines alone {rate['lines']}"
    return ([check("influx_ratio", ratio(times["bare"], times["sink"]), ">= 0.7", note)],
            {"influx": {"rows_per_second": rate, "bytes_a_row": len(Lines().of(records(0, 1)[0])), "stored": stored, "written": first}})


if __name__ == "__main__":
    import json

    print(json.dumps(measure(5, 20_000), indent=2))
