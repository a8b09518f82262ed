"""A gateway as a process of its own: it sends windows of some streams until it is told to stop, and may be killed at any moment.

    python -m faults.feeder '{"broker_url": …, "streams": [["acme/lyon/…/fan-0", "vibration"]], "ledger": "file", "stop": "file", …}'

Each window that `send` took stands in the ledger as a line `asset stream epoch seq score`, written before anything else happens. Where the
file `stop` is, it waits until everything is acknowledged, and ends.
"""

import json
import os
import random
import sys
import time
from itertools import count
from pathlib import Path

import numpy as np
from small_site import RATE_HZ, SAMPLES, STEP_NS, T0_NS

from pdm.errors import PartMissing
from pdm.stream.sensor_client import SensorClient

HOUR_NS = 3_600_000_000_000
_NOISE = np.random.default_rng(0).normal(size=(64, 2, SAMPLES))
_NOISE /= np.sqrt((_NOISE**2).mean(axis=2, keepdims=True))


def samples(n: int, loud: bool) -> tuple[np.ndarray, float]:
    "Noise, and the score that it shall get: its RMS, which hardly any two windows have in common."
    level = (0.8 + 0.4 * (n * 0.6180339887 % 1)) * (20 if loud else 1)
    x = (level * _NOISE[n % len(_NOISE)]).astype(np.float32)
    return x, float(np.sqrt((x.astype(float) ** 2).mean(axis=1)).mean())


def connect(order: dict) -> SensorClient:
    "To the broker, as soon as there is one."
    while True:
        try:
            return SensorClient(order["broker_url"], order["client_id"], resend_s=order["resend_s"], buffer_dir=order["buffer"])
        except PartMissing:
            continue


def main(order: dict) -> None:
    stop, draw = Path(order["stop"]), random.Random(order["seed"] + os.getpid())
    ledger = os.open(order["ledger"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    client = connect(order)
    streams = [client.open(asset, name, RATE_HZ, ["h", "v"], ["g", "g"], window=order["window"]) for asset, name in order["streams"]]
    start = Path(order["ledger"]).read_bytes().count(b"\n")
    jump_ns, loud_until, since = 0, [-1] * len(streams), time.monotonic()
    for n in count():
        for i, s in enumerate(streams):
            if draw.random() < order["jumps"]:
                jump_ns = draw.choice([-HOUR_NS, 0, HOUR_NS])
            if draw.random() < order["alarms"]:
                loud_until[i] = n + 12
            number = start + n * len(streams) + i
            x, score = samples(number, n < loud_until[i])
            while not stop.exists():
                try:
                    seq = s.send(x, t0_ns=T0_NS + number // len(streams) * STEP_NS + jump_ns, timeout_s=0.2)
                except PartMissing:  # W windows are under way
                    continue
                os.write(ledger, f"{s.path} {s.stream} {s.epoch} {seq} {score:.6g}\n".encode())
                break
        if stop.exists():
            break
        time.sleep(max(0.0, since + n * len(streams) / order["rate"] - time.monotonic()))
    while True:
        try:
            client.flush(1.0)
            break
        except PartMissing:
            continue
    client.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
