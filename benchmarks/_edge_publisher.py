"""The sensors of benchmarks/edge.py: one process, one connection, many streams. Its one argument is an order in JSON, its answer a line of JSON.

With a rate it is an open loop: window i is due at start + i / rate whatever has become of the others, and its latency counts from when it was due, not from
when there was time to send it. Without a rate it sends as fast as its streams have room.
"""

import json
import resource
import sys
import time

import numpy as np

from pdm.stream.sensor_client import SensorClient


def main(order: dict) -> dict:
    windows = np.load(order["windows"])
    rate, seconds = order["rate"], order["seconds"]
    with SensorClient(order["broker_url"], times=None) as client:
        streams = [client.open(path, order["stream"], order["rate_hz"], order["channels"], order["units"], window=order["window"]) for path in order["assets"]]
        due: list[list[int]] = [[] for _ in streams]  # when each window was due, ns since 1970, by seq
        start_ns, start = time.time_ns(), time.perf_counter()
        cpu = resource.getrusage(resource.RUSAGE_SELF)
        i, late = 0, 0.0
        while (passed := time.perf_counter() - start) < seconds:
            if rate:
                if (wait := i / rate - passed) > 0:
                    time.sleep(wait)
                late = max(late, -wait)
            n = i % len(streams)
            due[n].append(start_ns + round(i / rate * 1e9) if rate else time.time_ns())
            streams[n].send(windows[i % len(windows)])
            i += 1
        stop_ns = time.time_ns()
        client.flush(60)
        after = resource.getrusage(resource.RUSAGE_SELF)
        told = [[(seq, at) for seq, _, at in s.times] for s in streams]
        np.savez(order["out"], due=np.array([t for d in due for t in d], np.int64), stream=np.repeat(np.arange(len(streams)), [len(d) for d in due]),
                 seq=np.concatenate([np.arange(len(d)) for d in due]), told=np.array([(n, seq, at) for n, pairs in enumerate(told) for seq, at in pairs], np.int64).reshape(-1, 3))
        return {"sent": i, "start_ns": start_ns, "stop_ns": stop_ns, "resent": client.counts["resent"], "late_ms": 1e3 * late,
                "cpu_s": after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
