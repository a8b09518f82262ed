"A whole site of real parts in a folder, each of which can be killed, frozen or cut off while windows flow, and counted afterwards."

import json
import os
import random
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import onnx
import psutil
from edge_broker import Door
from graphs import rms_graph
from small_site import RATE_HZ, SAMPLES, STREAM, Site, path_of

from pdm.data.window import decode_ack, parse_topic
from pdm.errors import PartMissing
from pdm.model.bundle import Bundle, Contract, write_bundle
from pdm.process import Child
from pdm.serve.server import TritonServer, find_environment
from pdm.stream.broker import EmbeddedBroker, client_of
from pdm.stream.bus import Bus
from pdm.stream.journal import Row
from pdm.stream.runner import Cursor, DeadLetters

from .people import People
from .proxy import Proxy
from .stores import Archived, Influx, Postgres, Server, Sqlite, Store
from .tally import Sent, complete, ledger, tally

PATIENCE_S = 120.0  # that anything may take on a busy machine; nothing takes so long where all is well
POISON = 1e6        # a sample as large as that makes the model of `rms_bundle` fail


def rms_bundle(folder: Path) -> Bundle:
    "The bundle of a model that scores by RMS, and fails on a batch that holds a sample above `POISON`: it gathers from beyond the end of a tensor."
    model = onnx.load_from_string(rms_graph(2, SAMPLES, 1.0, 0))
    graph, node = model.graph, onnx.helper.make_node
    for n in graph.node:
        n.input[:] = ["drawn_gain" if i == "gain" else i for i in n.input]
    graph.initializer.append(onnx.helper.make_tensor("poison", onnx.TensorProto.FLOAT, [], [POISON]))
    for n in reversed([
        node("ReduceMax", ["window"], ["largest"], keepdims=0),
        node("Greater", ["largest", "poison"], ["poisoned"]),
        node("Cast", ["poisoned"], ["place"], to=onnx.TensorProto.INT64),
        node("Gather", ["gain", "place"], ["drawn_gain"]),
    ]):
        graph.node.insert(0, n)
    return write_bundle(folder, model.SerializeToString(), Contract(
        name="motor", kind="mahalanobis", channels=("h", "v"), units=("g", "g"), rate_hz=RATE_HZ, samples=SAMPLES, embedding=3, training_data="0" * 64))


def wait_for(true: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S, pause_s: float = 0.05) -> Any:
    "What `true` says, as soon as it says something."
    end = time.monotonic() + timeout_s
    while not (found := true()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(pause_s)
    return found


def has_triton() -> bool:
    "Whether Triton's environment is here."
    try:
        find_environment()
    except PartMissing:
        return False
    return True


class Part(Protocol):
    "Something of a site that can die."
    name: str

    def start(self) -> None:
        "Start it, for the first time or again, and return when it works or surely will."

    def kill(self) -> None:
        "SIGKILL to it and to all that belongs to it."

    def stop(self) -> None:
        "End it for good."

    @property
    def alive(self) -> bool: ...

    @property
    def pid(self) -> int: ...


class Process:
    "A part that is a child process of ours."
    child: Child | None = None

    def __init__(self, name: str, make: Callable[[], Child], ready: Callable[[Child], Child] = lambda child: child):
        self.name, self._make, self._ready = name, make, ready

    def begin(self) -> None:
        "Start it, and don't wait for what it waits for."
        self.child = self._make()

    def start(self) -> None:
        self.begin()
        self._ready(self.child)

    def kill(self) -> None:
        if self.child is not None:
            self.child.kill()

    def stop(self) -> None:
        if self.child is not None:
            self.child.stop()

    @property
    def alive(self) -> bool:
        return self.child is not None and self.child.alive

    @property
    def pid(self) -> int:
        return self.child.pid if self.child is not None else 0


class Broker:
    "The embedded broker, on the same port in each of its lives, and open to everybody."
    name = "broker"

    def __init__(self, folder: Path):
        self._folder = folder
        self.embedded: EmbeddedBroker | None = None
        self.alive = False

    def start(self) -> None:
        if self.embedded is None:
            self.embedded = EmbeddedBroker(self._folder)
        else:
            self.embedded.restart()
        self.alive = True

    def kill(self) -> None:
        self.alive = False
        self.embedded.kill()

    def stop(self) -> None:
        if self.embedded is not None:
            self.embedded.close()

    @property
    def pid(self) -> int:
        return self.embedded.pid

    @property
    def address(self) -> str:
        "Where everybody connects."
        return self.embedded.url.removeprefix("mqtt://")

    sensors = services = address  # where those of each kind do

    def url(self, who: str, link: Proxy) -> str:
        "For a sensor or a service that goes over this link."
        return f"mqtt://{link.address}"

    def client(self, client_id: str) -> Bus:
        "Of somebody who may read and write everything."
        return client_of(f"mqtt://{self.address}", client_id, session_s=0)


class Guarded(Broker):
    "The broker as a site has it, edge/mosquitto: two doors with certificates and access lists, and what it keeps on disk."

    def __init__(self, folder: Path):
        self._folder = folder
        self.door: Door | None = None
        self.alive = False

    def start(self) -> None:
        if self.door is None:
            self._folder.mkdir()
            self.door = Door(self._folder)
            with (self.door.config / "sensors.acl").open("a") as file:  # what a gateway may write is named, stream by stream
                file.write(f"user {path_of(0).rpartition('/')[0]}\n" + "".join(f"topic write pdm/v1/{path_of(i)}/{STREAM}/window\n" for i in range(20)))
            self.door.read_again()
        else:
            self.door.start()
        self.alive = True

    def kill(self) -> None:
        self.alive = False
        self.door.child.kill()

    def stop(self) -> None:
        if self.door is not None:
            self.door.close()

    @property
    def pid(self) -> int:
        return self.door.child.pid

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.door.spy}"

    @property
    def sensors(self) -> str:
        return f"127.0.0.1:{self.door.sensors}"

    @property
    def services(self) -> str:
        return f"127.0.0.1:{self.door.services}"

    def url(self, who: str, link: Proxy) -> str:
        return self.door.url(who, link.port)


class Triton:
    "A tritonserver behind a proxy, since each of its lives has another address; `repository` is always the folder of the present one."
    name = "triton"

    def __init__(self, folder: Path, link: Proxy):
        self.repository, self._nowhere, self._link, self._log = folder / "repository", folder / "nowhere", link, folder / "triton.log"
        self._nowhere.mkdir(parents=True)
        self.server: TritonServer | None = None

    def start(self) -> None:
        self.server = TritonServer(log=self._log)
        self._link.target = self.server.address
        self._point_to(self.server.repository)

    def kill(self) -> None:
        self._point_to(self._nowhere)
        os.kill(self.server.pid, signal.SIGKILL)
        wait_for(lambda: not self.server.alive, "Triton's guardian to clear up")
        self.server.stop()

    def kill_stubs(self) -> None:
        "SIGKILL to the processes that execute the models: the server goes on without them, and says that all is well."
        for child in psutil.Process(self.server.pid).children(recursive=True):
            child.kill()

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop()

    @property
    def alive(self) -> bool:
        return self.server is not None and self.server.alive

    @property
    def pid(self) -> int:
        return self.server.pid

    def _point_to(self, folder: Path) -> None:
        aside = self.repository.with_suffix(".new")
        aside.symlink_to(folder)
        aside.replace(self.repository)


def _shared_out(stores: Sequence[Store]) -> dict[str, list[Store]]:
    "Who feeds which store: a service knows one of each kind."
    kinds = [[s for s in stores if name in s.settings] for name in ("tsdb_url", "warehouse_url", "archive_url")]
    return {"sinks" if i == 0 else f"sinks-{i + 1}": [some[i] for some in kinds if len(some) > i] for i in range(max(map(len, kinds)))}


def _hears(pid: int, number: int) -> bool:
    "Whether a process does something of its own about a signal; before that it would die of it."
    caught = next(line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def _signal(family: Iterable[psutil.Process], number: int) -> None:
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


class Witness:
    "Hears every acknowledgement that the agent publishes, straight from the broker."

    def __init__(self, bus: Bus):
        self.acknowledged: dict[tuple[str, str, int], int] = {}  # highest seq by (asset, stream, epoch)
        self._bus, self._done = bus, threading.Event()
        bus.connect(PATIENCE_S)
        bus.subscribe(["pdm/v1/+/+/+/+/+/+/ack"])
        self._thread = threading.Thread(target=self._listen, name="witness", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while not self._done.is_set():
            messages = self._bus.receive(256, 0.1)
            for m in messages:
                path, stream, _ = parse_topic(m.topic)
                epoch, seq = decode_ack(m.payload)
                key = (str(path), stream, epoch)
                self.acknowledged[key] = max(seq, self.acknowledged.get(key, -1))
            self._bus.ack(messages)

    def count(self, keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int]:
        "How many windows of each stream were acknowledged, over all epochs."
        known = dict(self.acknowledged)
        return {k: sum(seq + 1 for key, seq in known.items() if key[:2] == k) for k in keys}

    def close(self) -> None:
        self._done.set()
        self._thread.join(5)
        self._bus.close()


class Rig:
    "The site. Windows flow from `begin` to `settle`; what is counted after that is everything since the start."

    def __init__(self,
        folder: Path,
        bundle: Bundle,
        triton: bool | None = None,  # whether there is one, else the model runs inside the agent; without it where it is installed
        feeders: int = 2,          # processes that send
        streams: int = 2,          # of each
        rate: float = 300.0,       # windows a second of each feeder, where nothing holds it up
        seed: int = 0,
        stores: Sequence[type[Server]] = (Influx, Postgres),  # besides SQLite and the archive, where they are installed
        broker: type[Broker] = Broker,
        **settings: Any,           # of the agent and the sinks
    ):
        self.folder, self.seed, self._settings, self._stack = folder, seed, settings, ExitStack()
        self.site = Site(folder, bundle, assets=feeders * streams + 1)
        self.keys = [(path_of(i), STREAM) for i in range(feeders * streams + 1)]  # the last one is fed by tests alone
        self.links: dict[str, Proxy] = {}
        self.parts: dict[str, Part] = {}
        self._dead = DeadLetters(folder / "data" / "refused.db")
        archive = Archived(self._dead, folder / "archive")
        self.stores: list[Store] = [Sqlite(self._dead, folder / "data" / "store.db"), archive]
        self._archive = archive.settings          # the agent has to know of it: it decides what is kept
        self.extra: list[Sent] = []               # what tests have sent themselves
        self.kills = 0
        self._with_triton = has_triton() if triton is None else triton
        self.broker = broker(folder / "broker")
        self._feeders, self._per_feeder, self._rate, self._servers = feeders, streams, rate, [s for s in stores if not s.missing()]
        self.people = People(self.site, [path for path, _ in self.keys], seed)

    # ---- life

    def __enter__(self) -> "Rig":
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        broker = self._add(self.broker)
        self._link("sensors-broker", broker.sensors)
        services = self._link("agent-broker", broker.services)
        settings = {"sinks_metrics_port": 0, **self._settings}
        for kind in self._servers:
            self.stores.append(store := self._add(kind(self._dead, self.folder / kind.name)))
            store.reached_by(self._link(f"sinks-{store.name}", store.address))
        if self._with_triton:
            triton = Triton(self.folder / "triton", self._link("agent-triton", "127.0.0.1:1"))
            self._add(triton)
            settings |= {"engine_url": f"grpc://{self.links['agent-triton'].address}", "triton_repository": triton.repository}
        self.witness = Witness(broker.client("witness"))
        self._stack.callback(self.witness.close)
        self.raw: Bus = broker.client("stranger")  # for messages that no sender of ours would send
        self.raw.connect()
        self._stack.callback(self.raw.close)
        for name, stores in _shared_out(self.stores).items():
            leading = {k: v for store in stores for k, v in store.settings.items()}
            self._add(Process(name, lambda leading=leading: self.site.service("sinks", broker.url("sinks", services), **(settings | leading))))
        self._add(Process("agent", lambda: self.site.service("agent", broker.url("agent", services), **settings, **self._archive), self.site.wait_ready))
        for i in range(self._feeders):
            self.parts[f"sensor-{i}"] = part = Process(f"sensor-{i}", lambda i=i: self._feeder(i))
            self._stack.callback(part.stop)

    def _add(self, part):
        self._stack.callback(part.stop)
        part.start()
        self.parts[part.name] = part
        return part

    def _link(self, name: str, target: str) -> Proxy:
        self.links[name] = proxy = Proxy(target)
        self._stack.callback(proxy.close)
        return proxy

    def _feeder(self, i: int) -> Child:
        streams = self.keys[i * self._per_feeder:(i + 1) * self._per_feeder]
        line = streams[0][0].rpartition("/")[0]  # whose gateway it is
        order = {"broker_url": self.broker.url(line, self.links["sensors-broker"]), "client_id": f"gateway-{i}", "streams": streams,
                 "ledger": str(self._ledger(i)), "buffer": str(self.folder / f"buffer-{i}"), "stop": str(self.folder / "stop"), "window": 64,
                 "resend_s": 1.0, "rate": self._rate, "seed": self.seed * 100 + i, "jumps": 0.002, "alarms": 0.002}
        tests = Path(__file__).parents[1]
        return Child([sys.executable, "-m", "faults.feeder", json.dumps(order)], self.folder / f"sensor-{i}.log", name=f"sensor-{i}",
                     env={"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])})

    def _ledger(self, i: int) -> Path:
        return self.folder / f"sensor-{i}.ledger"

    # ---- what flows

    @property
    def sensors(self) -> list[Part]:
        return [part for name, part in self.parts.items() if name.startswith("sensor-")]

    def begin(self) -> None:
        "Let the feeders send."
        (self.folder / "stop").unlink(missing_ok=True)
        for part in self.sensors:
            part.start()
        self.people.begin()
        self.progress()

    def acknowledged(self) -> dict[tuple[str, str], int]:
        "How many windows of each fed stream were acknowledged so far."
        return self.witness.count(self.keys[:-1])

    def progress(self, least: int = 10) -> None:
        "Wait until that many more windows of every fed stream are acknowledged."
        before = self.acknowledged()

        def behind() -> dict:
            self.still_well()
            return {k: now - before[k] for k, now in self.acknowledged().items() if now < before[k] + least}

        try:
            wait_for(lambda: not behind(), "progress")
        except AssertionError as e:
            raise AssertionError(f"{e}: {behind()} of {least} windows\n{self.last_words()}") from None

    def kill(self, *names: str, pause: Callable[[], None] = lambda: None) -> None:
        "Kill these parts at once, pause, and start them again, servers first."
        for name in names:
            self.parts[name].kill()
            self.kills += 1
        pause()
        for name, part in self.parts.items():
            if name in names:
                part.start()

    def power_cut(self, draw: random.Random, off: Callable[[], None] = lambda: None) -> float:  # seconds from the first start to the first verdict
        "Kill everything at once; and later start it again, in any order and without a hand."
        parts = [*self.parts.values()]
        with ThreadPoolExecutor(len(parts)) as at_once:
            list(at_once.map(lambda part: part.kill(), parts))
        self.kills += len(parts)
        off()
        with self.site.reader() as journal:
            last, since = journal.last_id(), time.monotonic()
            for part in draw.sample(parts, len(parts)):
                part.begin() if isinstance(part, Process) else part.start()
            wait_for(lambda: self.still_well() or journal.read(last, 1, (Row,)), "the first verdict", pause_s=0.01)
            return time.monotonic() - since

    def reload(self, name: str) -> None:
        "Have a service read its settings anew."
        pid = self.parts[name].pid
        wait_for(lambda: _hears(pid, signal.SIGHUP), f"{name} to hear signals")
        os.kill(pid, signal.SIGHUP)

    @contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        "A part that stands still, with all that belongs to it."
        first = psutil.Process(self.parts[name].pid)
        first.suspend()  # then it makes no more children
        family = [first, *first.children(recursive=True)]
        try:
            _signal(family, signal.SIGSTOP)
            yield
        finally:
            _signal(family, signal.SIGCONT)

    @contextmanager
    def no_room(self, name: str) -> Iterator[None]:
        "A part that can't make any file longer than it almost is: what a full disk does, but for the error's number."
        pid = self.parts[name].pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (2**16, hard))
        try:
            yield
        finally:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))

    def alive(self) -> dict[str, bool]:
        return {name: part.alive for name, part in self.parts.items()}

    def still_well(self) -> None:
        "Raises `AssertionError` where a part has died that nobody killed."
        dead = [name for name, alive in self.alive().items() if not alive]
        assert not dead, f"{', '.join(dead)} died by itself\n{self.last_words()}"

    def last_words(self, lines: int = 6) -> str:
        "The ends of all logs."
        return "\n".join(f"--- {log.name}\n" + "\n".join(line[:400] for line in log.read_text(errors="replace").splitlines()[-lines:])
                         for log in sorted(self.folder.glob("*.log")))

    def metric(self, name: str) -> float:
        "A number of the agent's metrics page, 0 while it says nothing; labels belong to the name."
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.site.metrics(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    # ---- what came of it

    def sent(self) -> list[Sent]:
        return [s for i in range(self._feeders) for s in ledger(self._ledger(i))] + self.extra

    def so_far(self) -> dict[str, Any]:
        "The tally of what is acknowledged by now, in the journal alone."
        acknowledged = dict(self.witness.acknowledged)  # before we look
        with self.site.reader() as journal:
            return tally([s._replace(kept=False) for s in self.sent()], acknowledged, journal)

    def settle(self) -> dict[str, Any]:
        "Stop sending, wait until everything has arrived, and count."
        (self.folder / "stop").touch()
        self.people.end()
        try:
            for part in self.sensors:
                if part.child is not None:
                    wait_for(lambda part=part: not part.alive, f"{part.name} to have everything acknowledged")
                    assert part.child.stop() == 0, f"{part.name} failed\n{self.last_words()}"
            with self.site.reader() as journal:
                last, t = -1, {}
                while journal.last_id() != last:  # a fault was named, or a shelf's time was over, while we counted
                    last = journal.last_id()
                    self._carry_over(last)
                    t = tally(self.sent(), self.witness.acknowledged, journal, self.stores, self.people.said)
                return t
        except AssertionError as e:
            raise AssertionError(f"{e}; parts: {self.alive()}\n{self.last_words()}") from None

    def _carry_over(self, last: int) -> None:
        "Wait until every sink has dealt with all up to this id. If one does not, the tally says what is missing."
        self.reload("sinks")  # which wakes one that rests
        for store in self.stores:
            with suppress(AssertionError):
                wait_for(lambda store=store: Cursor(self.folder / "data" / "cursors" / store.name).done >= last, f"{store.name} to have everything")

    def check(self) -> dict[str, Any]:
        "The tally, once everything has arrived, and nothing in it is missing, doubled or wrong."
        t = self.settle()
        complete(t)
        agent = self.parts["agent"]
        assert agent.alive, f"the agent died\n{self.last_words()}"
        return t

