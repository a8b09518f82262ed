"A small site for the tests of the edge: asset records round a real bundle whose graph scores by RMS, and an agent as a process."

import json
import os
import secrets
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import yaml
from pydantic import SecretStr

from pdm.config import Settings, load_settings
from pdm.data.window import AssetPath, Window, encode, topic, user_properties
from pdm.model.bundle import Bundle, CalibrationRecord
from pdm.process import Child, free_port
from pdm.stream.broker import EmbeddedBroker
from pdm.stream.bus import Message
from pdm.stream.journal import Journal, JournalReader

RATE_HZ, SAMPLES, STREAM = 1024.0, 128, "vibration"
STEP_NS = round(SAMPLES / RATE_HZ * 1e9)
T0_NS = 1_767_225_600_000_000_000


def path_of(i: int) -> str:
    return f"acme/lyon/hall-2/line-1/fan-{i}"


def key_of(i: int) -> tuple[str, str]:
    return path_of(i), STREAM


def window(seq: int, epoch: int = 7, oldest: int = 0, level: float = 1.0, **changes) -> Window:
    "Noise of the given RMS; the same for the same seq."
    x = np.random.default_rng(seq).normal(0, level, (2, SAMPLES)).astype(np.float32)
    fields = dict(stream=STREAM, epoch=epoch, seq=seq, oldest=oldest, t0_ns=T0_NS + seq * STEP_NS, rate_hz=RATE_HZ, channels=("h", "v"), units=("g", "g"), samples=x)
    return Window(**(fields | changes))


def message(w: Window, i: int = 0, payload: bytes | None = None, properties: bool = True) -> Message:
    return Message(topic(AssetPath.parse(path_of(i)), w.stream, "window"), encode(w) if payload is None else payload, user_properties(w) if properties else ())


def as_text(value: object) -> str:
    "A setting as the environment holds it."
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return json.dumps(value) if isinstance(value, list | tuple | dict) else str(value)


def forget_acks(broker: EmbeddedBroker) -> None:
    "Take away the acknowledgements that the test before has left on the same broker; when this returns they are gone."
    if broker.kind == "tansu":
        return  # one for each test
    with closing(broker.client(f"clean-{secrets.token_hex(6)}", session_s=0)) as bus:
        bus.connect()
        for i in range(2):
            bus.publish(topic(AssetPath.parse(path_of(i)), STREAM, "ack"), b"", retain=True)
        assert bus.publish_wait("clean", b"")  # the broker takes what one client sends in its order


class Hand:
    "A bus that delivers what the test gives it and keeps what it is told."
    client_id, failure, connected, waiting = "hand", "", True, 0

    def __init__(self):
        self.unread, self.told, self.callbacks = [], [], []

    def connect(self, timeout_s=10.0): ...
    def subscribe(self, topics): ...
    def ack(self, messages): ...
    def close(self): ...

    def on_connect(self, callback):
        self.callbacks.append(callback)

    def publish(self, topic, payload, **_):
        self.told.append((topic, payload))
        return True

    def receive(self, limit, timeout_s):
        if self.unread:
            return self.unread.pop(0)
        time.sleep(0.01)
        return []

    def topics(self, leaf):
        return [p for t, p in self.told if t.endswith(leaf)]


class Site:
    "Asset records and bundle in a folder, and what an agent leaves there."

    def __init__(self, folder: Path, bundle: Bundle, assets: int = 2):
        self.folder, self.bundle, self.metrics_port = folder, bundle, free_port()
        self.agent_id = f"agent-{secrets.token_hex(6)}"  # of an agent in this process: never one whose session a broker still keeps
        folder.mkdir(parents=True, exist_ok=True)
        hop_s = bundle.contract.samples / bundle.contract.rate_hz
        self.record = CalibrationRecord(model=bundle.digest, hop_s=hop_s, scores_db=tuple(np.linspace(-2, 2, 99).tolist()), centre_db=0.0,
                                        threshold_db=6.0, confirmations=3, spacing_s=hop_s, exceedance=0.05, false_alarms_per_day=1.0,
                                        supported=True, quiet_s=60, gap_s=60)
        (folder / "rms.json").write_text(self.record.to_json())
        records = [{"path": path_of(i), "streams": {STREAM: {"bundle": str(bundle.path), "calibration": "rms.json", "bearing": "one"}},
                    "bearings": {"one": {"balls": 9, "ball_diameter_mm": 7.94, "pitch_diameter_mm": 39.04}}} for i in range(assets)]
        self.write(records)

    def write(self, records: list[dict]) -> None:
        "The asset records, in place of those that were there."
        (self.folder / "assets.yaml").write_text(yaml.safe_dump({"assets": records}))

    def settings(self, broker_url: str, **changes) -> Settings:
        return load_settings(**({"broker_url": broker_url, "engine_url": "inprocess:", "state_dir": self.folder / "data", "assets": self.folder / "assets.yaml",
                                 "metrics_port": self.metrics_port} | changes))

    @property
    def journal_file(self) -> Path:
        return self.folder / "data" / "journal.db"

    def journal(self) -> Journal:
        return Journal(self.journal_file)

    def reader(self) -> JournalReader:
        return JournalReader(self.journal_file)

    def metrics(self) -> str:
        try:
            return urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=2).read().decode()
        except (URLError, OSError):
            return ""

    def service(self, name: str, broker_url: str, through: Sequence[str | Path] = (), **changes) -> Child:
        "`agent` or `sinks` as a process of its own, perhaps started by another program."
        s = self.settings(broker_url, **changes)
        env = {f"PREDMAINT_{k.upper()}": as_text(getattr(s, k)) for k in {"broker_url", "engine_url", "state_dir", "assets", "metrics_port", *changes}}
        code = f"from pdm.config import load_settings; from pdm.stream.{name} import main; main(load_settings())"
        return Child([*through, sys.executable, "-c", code], self.folder / f"{name}.log", env={**os.environ, **env}, name=name)

    def agent(self, broker_url: str, **changes) -> Child:
        "An agent that takes windows by now."
        return self.wait_ready(self.service("agent", broker_url, **changes))

    def wait_ready(self, agent: Child) -> Child:
        return agent.wait_ready(lambda: "pdm_agent_ready 1.0" in self.metrics(), 30)

    def log(self, name: str = "agent") -> str:
        return (self.folder / f"{name}.log").read_text()
