"Messages that no sender of ours would send, and windows that are sent again and again."

import random
import struct
from collections.abc import Iterator

import cbor2
import numpy as np
from small_site import RATE_HZ, SAMPLES, T0_NS, window

from pdm.data.window import MAX_PAYLOAD, AssetPath, encode, topic, user_properties

from .people import NUL
from .rig import POISON, Rig, wait_for
from .tally import Sent


def _without(message: bytes, key: str, **changes) -> bytes:
    "The payload with one key less, and others changed."
    fields = cbor2.loads(message)
    fields.pop(key, None)
    return cbor2.dumps(fields | changes)


def _malformed(draw: random.Random, epoch: int, stream: str) -> Iterator[tuple[str, bytes, str]]:
    "Forever: a kind of damage, the payload of the window whose turn it is, and the reason that it is refused with."
    seq = 0
    while True:
        w = window(seq, epoch=epoch, stream=stream)
        good = encode(w)
        nan = w.samples.copy()
        nan[0, draw.randrange(SAMPLES)] = draw.choice([np.nan, np.inf, -np.inf])
        kinds = [
            ("bytes", draw.randbytes(draw.randrange(1, 300)), "unreadable"),
            ("cut off", good[:draw.randrange(len(good))], "unreadable"),
            ("float64", _without(good, "", samples=cbor2.CBORTag(40, [[2, SAMPLES], cbor2.CBORTag(86, bytes(16 * SAMPLES))])), "unreadable"),
            ("a list", cbor2.dumps(["window"]), "unreadable"),
            ("no seq", _without(good, "seq"), "unreadable"),
            ("a later version", _without(good, "", v=2), "unsupported_version"),
            ("not a number", encode(window(seq, epoch=epoch, stream=stream, samples=nan)), "not_finite"),
            ("another rate", encode(window(seq, epoch=epoch, stream=stream, rate_hz=1.5 * RATE_HZ)), "wrong_rate"),
            ("other channels", encode(window(seq, epoch=epoch, stream=stream, channels=("h", "x"))), "wrong_channels"),
            ("too short", encode(window(seq, epoch=epoch, stream=stream, samples=np.ones((2, SAMPLES - 1), np.float32))), "wrong_shape"),
            ("a lie about its shape", _without(good, "", samples=cbor2.CBORTag(40, [[2, SAMPLES], cbor2.CBORTag(85, struct.pack("<f", 1.0))])), "wrong_shape"),
        ]
        yield ("too large", bytes(MAX_PAYLOAD + 1), "oversize") if seq % 100 == 99 else draw.choice(kinds)
        seq += 1


def malformed(rig: Rig, draw: random.Random, key: tuple[str, str], n: int = 200) -> int:
    "Send `n` messages that can't be taken, with their ids beside them, and `n` that nobody can tell the ids of. Returns the epoch of the former."
    epoch, (asset, stream) = draw.getrandbits(62), key
    where = topic(AssetPath.parse(asset), stream, "window")
    for seq, (_, payload, why) in zip(range(n), _malformed(draw, epoch, stream), strict=False):
        if rig.raw.publish(where, payload, properties=user_properties(window(seq, epoch=epoch))):
            rig.extra.append(Sent((asset, stream, epoch, seq), reasons=(why,)))
        rig.raw.publish(where, draw.randbytes(draw.randrange(1, 300)))
    return epoch


def invented(rig: Rig, draw: random.Random, n: int = 50) -> None:
    "Send whole windows of streams that do not exist, and noise on topics that no window can come on."
    asset = rig.keys[0][0]
    for _ in range(n):
        w = window(0, epoch=draw.getrandbits(62), stream=f"ghost-{draw.getrandbits(32)}")
        if rig.raw.publish(topic(AssetPath.parse(asset), w.stream, "window"), encode(w), properties=user_properties(w)):
            rig.extra.append(Sent((asset, w.stream, w.epoch, 0), reasons=("unknown_stream",)))
        rig.raw.publish(f"pdm/v1/{asset}/{chr(draw.randrange(0x100, 0x2000))}/window", draw.randbytes(20))


def poison(rig: Rig, draw: random.Random, key: tuple[str, str], n: int = 20) -> int:
    "Send windows of which every third makes the model fail. Returns their epoch."
    epoch, (asset, stream) = draw.getrandbits(62), key
    for seq in range(n):
        w = window(seq, epoch=epoch, stream=stream)
        bad = seq % 3 == 1
        if bad:
            w.samples[1, draw.randrange(SAMPLES)] = draw.choice([2 * POISON, 1e30])
        if rig.raw.publish(topic(AssetPath.parse(asset), stream, "window"), encode(w), properties=user_properties(w)):
            rig.extra.append(Sent((asset, stream, epoch, seq), None if bad else float(np.sqrt((w.samples.astype(float) ** 2).mean(1)).mean()),
                                  ("not_scored",) if bad else ()))
    return epoch


def unstorable(rig: Rig, draw: random.Random, key: tuple[str, str], n: int = 20) -> int:
    "Send windows of which every third is older than InfluxDB keeps, and every third has a condition whose name PostgreSQL can't hold. Returns their epoch."
    epoch, (asset, stream) = draw.getrandbits(62), key
    for seq in range(n):
        changes = [{}, {"t0_ns": T0_NS - 5 * 365 * 86_400 * 10**9 + seq}, {"conditions": {f"load{NUL}": 1.0}}][seq % 3]
        w = window(seq, epoch=epoch, stream=stream, **changes)
        if rig.raw.publish(topic(AssetPath.parse(asset), stream, "window"), encode(w), properties=user_properties(w)):
            rig.extra.append(Sent((asset, stream, epoch, seq), float(np.sqrt((w.samples.astype(float) ** 2).mean(1)).mean())))
    return epoch


def duplicates(rig: Rig, n: int = 50, times: int = 20) -> int:
    "Listen to `n` windows on their way, and send each of them again and again. Returns how many messages that made."
    ear = rig.broker.client(f"parrot-{len(rig.extra)}-{rig.kills}")
    ear.connect()
    try:
        ear.subscribe([topic(AssetPath.parse(asset), stream, "window") for asset, stream in rig.keys])
        heard = []
        wait_for(lambda: heard.extend(ear.receive(n, 0.5)) or len(heard) >= n, "windows to repeat")
        ear.ack(heard)
    finally:
        ear.close()
    return sum(rig.raw.publish(m.topic, m.payload, properties=m.properties) for _ in range(times) for m in heard)
