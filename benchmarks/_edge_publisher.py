"""The sensors of benchmarks/edge.py: one process, one connection, many streams. Its one argument is an order in JSON, its answer a line of JSON.

With a rate it is an open loop: window i is due at start + i / rate whatever has become of the others, and its latency counts from when it was due, not from
when there was time to send it. With phases, each a rate and its seconds, all their windows are sent, however late. Without either it sends as fast
as its streams have room.
"""

import json
import resource
import sys
import time
from collections.abc import Iterator

import numpy as np

from pdm.stream.sensor_client import SensorClient


def due_s(order: dict, start: float) -> Iterator[float]:
    "When each window is due, seconds after the start."
    begin = 0.0
    for rate, seconds in order.get("phases", ()):
        yield from (begin + i / rate for i in range(round(rate * seconds)))
        begin += seconds
    i = 0
    while "phases" not in order and (passed := time.perf_counter() - start) < order["seconds"]:
        yield i / order["rate"] if order["rate"] else passed
        i += 1


def main(order: dict) -> dict:
    windows = np.load(order["windows"])
    with SensorClient(order["broker_url"], order.get("client_id", ""), times=None) as client:
        streams = [client.open(path, order["stream"], order["rate_hz"], order["channels"], order["units"], window=order["window"]) for path in order["assets"]]
        due: list[list[int]] = [[] for _ in streams]  # when each window was due, ns since 1970, by seq
        start_ns, start = time.time_ns(), time.perf_counter()
        cpu = resource.getrusage(resource.RUSAGE_SELF)
        sent, late = 0, 0.0
        for at in due_s(order, start):
            if (wait := at - (time.perf_counter() - start)) > 0:
                time.sleep(wait)
            late = max(late, -wait)
            n = sent % len(streams)
            due[n].append(start_ns + round(at * 1e9))
            streams[n].send(windows[sent % len(windows)])
            sent += 1
        stop_ns = time.time_ns()
        client.flush(60)
        after = resource.getrusage(resource.RUSAGE_SELF)
        np.savez(order["out"], due=np.array([t for d in due for t in d], np.int64), stream=np.repeat(np.arange(len(streams)), [len(d) for d in due]),
                 seq=np.concatenate([np.arange(len(d)) for d in due]),
                 told=np.array([(n, seq, at) for n, s in enumerate(streams) for seq, _, at in s.times], np.int64).reshape(-1, 3),
                 begun=np.array([begun for s in streams for _, begun, _ in s.times], np.int64))
        return {"sent": sent, "start_ns": start_ns, "stop_ns": stop_ns, "resent": client.counts["resent"], "late_ms": 1e3 * late,
                "cpu_s": after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
