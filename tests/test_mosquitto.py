"""The broker as it is shipped, closed to strangers: who comes in, who may say what, and what certificates that change cost (nothing).

Mosquitto takes a subscription that it will not serve, and a forbidden message with a word that some clients don't hear. So what counts is what arrives."""

import json
import shutil
import sys
import threading
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta

import pytest
from edge_broker import Door
from servers import wait_for
from small_site import RATE_HZ, SAMPLES, STREAM, Site, key_of, path_of, window

import pdm.pki
from pdm.data.window import MAX_PAYLOAD, AssetPath, decode_ack, encode, encode_ack, topic, user_properties
from pdm.errors import PartMissing
from pdm.pki import init, issue, revoke
from pdm.process import Child
from pdm.stream.alerts import TopicSink
from pdm.stream.bus import status_topic
from pdm.stream.journal import Event
from pdm.stream.mqtt import Mqtt
from pdm.stream.sensor_client import SensorClient

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]
FAN, OTHER, LINE = path_of(0), path_of(1), path_of(0).rpartition("/")[0]
READER = "acme/lyon/office/scada"  # as in sensors.acl


def of(asset, leaf, stream=STREAM):
    return topic(AssetPath.parse(asset), stream, leaf)


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    door = Door(tmp_path_factory.mktemp("door"))
    yield door
    door.close()


@pytest.fixture
def clients():
    "Makes connected clients that end with the test."
    with ExitStack() as stack:
        def make(url, client_id="somebody", topics=(), **options):
            bus = stack.enter_context(closing(Mqtt(url, client_id, **{"session_s": 0, "announce": False} | options)))
            bus.connect(30)
            bus.subscribe(topics)
            return bus

        yield make


@pytest.fixture
def spy(door, clients):
    "Sees every message."
    bus = clients(f"mqtt://127.0.0.1:{door.spy}", "spy", ["#"])
    assert bus.publish_wait("spy", b"ready")
    arrived(bus, "spy")
    return bus


def arrived(bus, last):
    "The topics of what has come, without what was kept from before, up to a message on the topic `last`."
    found = []
    while last not in found:
        got = bus.receive(100, 10)
        assert got, f"{last} has not come, only {found}"
        found += [m.topic for m in got if not m.retained]
        bus.ack(got)
    return found[: found.index(last)]


def knock(url, client_id="stranger"):
    "Want in, until something is said against it."
    bus = Mqtt(url, client_id, session_s=0, announce=False)
    bus._up.wait = lambda _seconds: wait_for(lambda: bus.refusal or bus.connected) is True
    with closing(bus):
        bus.connect()


# who comes in

def stranger(door, folder, name=FAN, port=None, **options):
    "The address for an identity of an authority of somebody else, of the same name."
    where = folder / "theirs"
    init(where)
    issue(where, name, **options)
    mine = where / ("assets" if "/" in name else "services") / name
    shutil.copy(door.identity(name) / "ca.crt", mine)  # it knows our broker
    return door.address(mine, port or door.sensors)


def without_certificate(door, _):
    return f"mqtts://127.0.0.1:{door.sensors}?ca={door.identity(FAN)}/ca.crt"


def of_another_authority(door, folder):
    return stranger(door, folder)


def expired(door, _):
    if not (door.pki / "assets" / path_of(7)).exists():
        issue(door.pki, path_of(7), days=30, now=datetime.now(UTC) - timedelta(days=31))
    return door.url(path_of(7))


def revoked(door, folder):
    kept = shutil.copytree(door.identity(path_of(8)), folder / "kept")
    knock_in = door.address(kept, door.sensors)
    knock(knock_in)  # so far it is let in
    revoke(door.pki, path_of(8), reason="stolen")
    door.carry()
    door.read_again()
    return knock_in


def sensor_at_the_services_door(door, _):
    return door.url(FAN, door.services)


def asset_with_the_name_of_the_agent(door, folder):
    "An authority of assets that was stolen, and signs whatever name."
    where = folder / "stolen"
    shutil.copytree(door.pki / "authorities", where / "authorities")
    shutil.rmtree(where / "authorities" / "services")
    shutil.copytree(where / "authorities" / "assets", where / "authorities" / "services")  # `agent`, signed by it
    issue(where, "agent")
    shutil.copy(door.identity("agent") / "ca.crt", where / "services" / "agent")
    return door.address(where / "services" / "agent", door.services)


def service_at_the_sensors_door(door, _):
    return door.url("agent", door.sensors)


def the_brokers_own(door, _):
    return door.address(door.pki / "servers" / "mosquitto", door.services)


@pytest.mark.parametrize("who,why", [
    (without_certificate, "wants a certificate of ours"), (of_another_authority, "does not know the authority"), (expired, "has run out"), (revoked, "has been revoked"),
    (sensor_at_the_services_door, "does not know the authority"), (asset_with_the_name_of_the_agent, "does not know the authority"),
    (service_at_the_sensors_door, "does not know the authority"), (the_brokers_own, "unsuitable|unsupported"),
], ids=lambda v: getattr(v, "__name__", ""))
def test_who_may_not_in_is_refused_and_told_why(door, tmp_path, who, why):
    url = who(door, tmp_path)
    before = len(door.log)
    with pytest.raises(PartMissing, match=f"{why}|does it accept our certificate|does it want a certificate of ours"):  # the reason may be lost with the connection
        knock(url)
    theirs = "peer did not return a certificate" if who is without_certificate else "certificate verify failed"
    assert f"SSL routines::{theirs}" in wait_for(lambda: "SSL routines" in door.log[before:] and door.log[before:])  # and this is never lost
    knock(door.url(FAN))  # the broker is there, and lets in who may


def test_a_broker_of_another_site_is_not_believed(door, tmp_path):
    init(tmp_path / "theirs")
    ours = door.url(FAN).replace(f"ca={door.identity(FAN)}/ca.crt", f"ca={tmp_path}/theirs/authorities/services/ca.crt")
    with pytest.raises(PartMissing, match="does not prove to be the broker that we ask for"):
        knock(ours)


# who may say what

def forbidden_to_a_sensor():
    yield "window of another asset", of(OTHER, "window")
    for leaf in ("ack", "verdict", "alert", "status"):
        yield f"its own {leaf}", of(FAN, leaf)
    yield "ack of another asset", of(OTHER, "ack")
    yield "its asset's alert", of(FAN, "alert", "asset")
    yield "status of the agent", status_topic("predmaint-agent")
    yield "status of another sensor", status_topic(OTHER)
    yield "status of the client id that it asked for", status_topic("somebody")
    yield "anything else", "pdm/v1/anything"


@pytest.mark.parametrize("what", [t for _, t in forbidden_to_a_sensor()], ids=[name for name, _ in forbidden_to_a_sensor()])
def test_a_sensor_writes_its_own_windows_and_status_and_nothing_else(door, spy, clients, what):
    sensor = clients(door.url(FAN))
    sensor.publish(what, b"forged", retain=True)
    for allowed in (of(FAN, "window"), status_topic(FAN)):
        assert sensor.publish_wait(allowed, b"own")
    assert arrived(spy, status_topic(FAN)) == [of(FAN, "window")]
    assert not sensor.publish_wait(what, b"forged")  # and it is told


@pytest.mark.parametrize("name,topics,others", [
    (f"{FAN}/{STREAM}", [of(FAN, "window")], [of(FAN, "window", "temperature"), of(FAN, "ack")]),      # one of two boxes on an asset
    (LINE, [of(OTHER, "window")], [of(FAN, "window"), of(OTHER, "window", "another"), of(OTHER, "ack")]),  # the gateway of a line, by its own lines
    ("acme/lyon/halle 2/ligne-1/éolienne %c", [of("acme/lyon/halle 2/ligne-1/éolienne %c", "window")], [of("acme/lyon/halle 2/ligne-1/somebody", "window")]),
    ("agent", [of(FAN, "ack"), of(FAN, "verdict"), status_topic("predmaint-agent")], [of(FAN, "window"), of(FAN, "alert", "asset"), status_topic(FAN)]),
    ("sinks", [of(FAN, "alert", "asset")], [of(FAN, "ack"), of(FAN, "window"), of(FAN, "verdict"), of(FAN, "alert"), status_topic("somebody")]),
    (READER, [status_topic(READER)], [of(FAN, "ack"), of(FAN, "window"), of(FAN, "verdict"), of(FAN, "alert", "asset"), status_topic("somebody"), status_topic("scada")]),
], ids=["box", "gateway", "odd name", "agent", "sinks", "reader"])
def test_each_identity_writes_what_is_its_own(door, spy, clients, name, topics, others):
    bus = clients(door.url(name))
    for t in others:
        assert not bus.publish_wait(t, b"forged")
    for t in topics:
        assert bus.publish_wait(t, b"own")
    assert arrived(spy, topics[-1]) == topics[:-1]


def test_a_service_that_is_in_no_list_can_neither_claim_an_asset_nor_listen(door, spy, clients, monkeypatch):
    monkeypatch.setattr(pdm.pki, "SERVICES", ("updater",))  # as once upon a time
    bus = clients(door.url("updater"), "scada", ["#"])
    for t in (status_topic("scada"), status_topic("predmaint-agent"), of(FAN, "ack"), of(FAN, "window"), of(FAN, "verdict"), of(FAN, "alert", "asset")):
        assert not bus.publish_wait(t, b"forged")
    for t in (of(FAN, "window"), of(FAN, "verdict"), status_topic("x")):
        assert spy.publish_wait(t, b"x")
    assert arrived(spy, status_topic("x")) == [of(FAN, "window"), of(FAN, "verdict")]
    assert bus.receive(10, 0.5) == []


def test_each_identity_hears_what_is_for_it(door, spy, clients):
    everything = [of(asset, leaf) for asset in (OTHER, FAN) for leaf in ("window", "ack", "verdict")] + [of(FAN, "alert", "asset"), status_topic("x")]
    expected = {FAN: {of(FAN, "ack"), of(FAN, "verdict")}, f"{FAN}/{STREAM}": {of(FAN, "ack"), of(FAN, "verdict")},
                LINE: {of(a, leaf) for a in (FAN, OTHER) for leaf in ("ack", "verdict")},
                "agent": {of(FAN, "window"), of(OTHER, "window"), status_topic("x")},
                READER: {of(FAN, "verdict"), of(OTHER, "verdict"), of(FAN, "alert", "asset"), status_topic("x")}}
    listeners = [(name, clients(door.url(name), f"listener-{i}", ["#"]), status_topic(name if "/" in name else "last")) for i, name in enumerate(expected)]
    sinks = clients(door.url("sinks"), "sinks", ["#"])
    for t in [*everything, *(own for *_, own in listeners)]:  # the last of these each may hear
        assert spy.publish_wait(t, b"x")
    for name, bus, own in listeners:
        assert set(arrived(bus, own)) & set(everything) == expected[name], name
    assert sinks.receive(100, 0.5) == []


def test_an_asset_cannot_forge_its_own_acknowledgement(door, clients):
    with SensorClient(door.url(FAN), FAN) as sensor:
        stream = sensor.open(FAN, STREAM, RATE_HZ, ["h", "v"], ["g", "g"])
        stream.send(window(0).samples)
        sensor.bus.publish(stream.ack_topic, encode_ack(stream.epoch, 0), retain=True)  # no agent has seen the window
        assert not sensor.bus.publish_wait(stream.ack_topic, encode_ack(stream.epoch, 0))
        assert sensor.counts["pending"] == 1
        agent = clients(door.url("agent"))
        assert agent.publish_wait(stream.ack_topic, encode_ack(stream.epoch, 0))  # what it waits for
        sensor.flush(10)
    late = clients(door.url(FAN), topics=[of(FAN, "ack")])
    assert agent.publish_wait(of(FAN, "ack"), b"last")
    found = late.receive(10, 10)
    assert [m.payload for m in found] == [b"last"]  # nothing forged was kept


def test_a_sender_with_a_certificate_of_another_machine_is_told_what_is_wrong(door):
    with SensorClient(door.url(OTHER), OTHER) as sensor:
        stream, own = (sensor.open(asset, STREAM, RATE_HZ, ["h", "v"], ["g", "g"]) for asset in (FAN, OTHER))
        stream.send(window(0).samples)
        wait_for(lambda: "does not take" in stream.silence)
        with pytest.raises(PartMissing, match=f"does not take {of(FAN, 'window')} from us .Not authorized.: is it what our certificate or login allows"):
            sensor.flush(0.1)
        assert own.silence == "is an agent running for this asset?"  # and the other stream is not


def test_an_alarm_that_the_broker_does_not_take_counts_as_not_told(door, spy, tmp_path):
    raised = Event(FAN, STREAM, "fan-0@7", "raised", 5, 7, 0, {"severity": 2, "score": 1.5})
    sink = TopicSink(door.url(READER), tmp_path, "site-alerts")
    with pytest.raises(PartMissing, match="may we write to"):
        sink.write([raised])
    sink.close()
    sink = TopicSink(door.url("sinks"), tmp_path, "site-alerts")
    sink.write([raised])
    sink.close()
    assert arrived(spy, of(FAN, "alert", "asset")) == []


# a site at work

@pytest.fixture(scope="module")
def site(door, make_bundle, tmp_path_factory):
    "Asset records, and an agent as a process behind the services' door."
    site = Site(tmp_path_factory.mktemp("site"), make_bundle(samples=SAMPLES, rate_hz=RATE_HZ))
    with site.agent(door.url("agent")):
        yield site


class Sender:
    "A sensor that sends all the time, from a thread of its own."

    def __init__(self, door, site, name=FAN):
        self.site = site
        self.client = SensorClient(door.url(name), name, resend_s=0.5)
        self.stream = self.client.open(FAN, STREAM, RATE_HZ, ["h", "v"], ["g", "g"], window=16)
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        while not self.ending.is_set():
            self.stream.send(window(self.stream.sent).samples)
            self.ending.wait(0.005)

    def more(self, n=30):
        "Wait until so many more windows have been acknowledged."
        until = self.stream.acknowledged + n
        wait_for(lambda: self.stream.acknowledged >= until)

    def end(self):
        "Send no more. Every window stands in the journal once."
        self.ending.set()
        self.thread.join()
        self.client.flush(30)
        with self.site.reader() as journal:
            seqs = sorted(r.seq for r in journal.verdicts(*key_of(0)) if r.epoch == self.stream.epoch)
        assert seqs == list(range(self.stream.sent))
        counts = self.client.counts
        assert (counts["acknowledged"], counts["dropped"], counts["pending"]) == (self.stream.sent, 0, 0)

    def close(self):
        self.ending.set()
        self.thread.join(10)
        self.client.close()


@pytest.fixture
def sender(door, site):
    sender = Sender(door, site)
    yield sender
    sender.close()


def test_the_windows_of_a_sensor_are_judged_and_acknowledged(sender, door, clients):
    verdicts = clients(door.url(READER), topics=["pdm/v1/+/+/+/+/+/+/verdict"])
    sender.more()
    assert json.loads(next(m for m in verdicts.receive(1000, 10) if m.topic == of(FAN, "verdict")).payload)["epoch"] == sender.stream.epoch
    sender.end()


@pytest.mark.parametrize("who", [OTHER, READER], ids=["sensor", "reader"])
def test_who_wants_the_client_id_of_the_agent_and_claims_its_assets_does_not_disturb_it(sender, door, site, clients, who):
    before = site.log().count("lost the broker")
    thief = clients(door.url(who), "predmaint-agent", topics=["#"], session_s=3600)
    sender.more()
    assert thief.connected and not any(m.topic.endswith("/window") for m in thief.receive(100, 0.2))  # nothing of the agent's session
    claim = {"state": "online", "claim": "held", "assets": [FAN], "since_ns": 0, "run": "x"}
    for name in ("predmaint-agent", "scada", who):
        thief.publish_wait(status_topic(name), json.dumps(claim).encode())  # the last one is its own, and not an agent's
    sender.more()
    sender.end()
    assert site.log().count("lost the broker") == before and "since before" not in site.log()


def test_a_renewed_certificate_of_the_broker_is_taken_up_and_no_window_is_lost(sender, door):
    before = door.shown()
    for restart in (False, True):
        issue(door.pki, "mosquitto")
        door.carry()
        (door.restart if restart else door.read_again)()
        now = door.shown()
        assert now != before and now == (door.pki / "servers/mosquitto/tls.crt").read_text()
        before = now
        sender.more()
    sender.end()
    assert revoke(door.pki, "mosquitto", old=True, reason="replaced")


def test_renewed_certificates_of_a_sensor_and_of_the_agent_are_taken_up_and_no_window_is_lost(sender, door):
    sender.more()
    for name in (FAN, "agent"):
        issue(door.pki, name)  # its files are new; its connection is not
        sender.more()
        revoke(door.pki, name, old=True, reason="replaced")
    door.carry()
    door.restart()  # both come back, and with the old certificates could not
    sender.more()
    sender.end()


def test_a_revoked_sensor_is_out_at_its_next_connection(door, site, tmp_path):
    "Mosquitto does not look at those who are in: a restart puts them out."
    kept = shutil.copytree(door.identity(OTHER), tmp_path / "kept")
    with SensorClient(door.address(kept, door.sensors), OTHER, resend_s=0.5) as thief:
        stream = thief.open(OTHER, STREAM, RATE_HZ, ["h", "v"], ["g", "g"])
        revoke(door.pki, OTHER, reason="stolen")
        door.carry()
        door.read_again()
        stream.send(window(0).samples)
        thief.flush(30)
        door.restart()
        stream.send(window(1).samples)
        wait_for(lambda: "revoked" in stream.silence or "does it accept our certificate" in stream.silence)
        with pytest.raises(PartMissing, match="there is no connection to the broker, which is tried again"):
            thief.flush(0.1)


def test_an_acknowledgement_is_kept_over_a_restart_of_the_broker(door, clients):
    asset = path_of(5)
    agent = clients(door.url("agent"))
    agent.publish(of(asset, "ack"), encode_ack(7, 41), retain=True)
    assert agent.publish_wait(of(asset, "verdict"), b"{}")
    door.child.stop()
    door.start()
    (kept,) = clients(door.url(asset), topics=[of(asset, "ack")]).receive(10, 10)
    assert decode_ack(kept.payload) == (7, 41) and kept.retained


def test_a_window_that_is_too_long_is_a_dead_letter_and_one_beyond_the_limit_ends_its_connection(sender, door, site, clients):
    sender.more()  # the agent is there
    box = clients(door.url(f"{FAN}/{STREAM}"))
    w = window(0, epoch=99)
    assert box.publish(of(FAN, "window"), encode(w) + bytes(MAX_PAYLOAD), properties=user_properties(w))
    with site.reader() as journal:
        wait_for(lambda: any(d.reason == "oversize" for d in journal.dead_letters()))
    box.publish(of(FAN, "window"), bytes(2 * MAX_PAYLOAD + 1))
    wait_for(lambda: not box.connected)
    sender.more()
    sender.end()


_SILENT = """
import socket, sys, time
held = [socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=10) for _ in range(1200)]
print("full", flush=True)
time.sleep(100)
"""
_LOUD = """
import contextlib, socket, ssl, sys
context, refused = ssl.create_default_context(cafile=sys.argv[2]), 0
for i in range(2000):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=10) as raw:
        if i % 4 == 0:
            raw.sendall(bytes(range(256)) * 16)
            raw.recv(100)
        else:
            with context.wrap_socket(raw, server_hostname="127.0.0.1") as s:
                s.sendall(bytes((0x10, 0)))
                assert s.recv(100) == b"", "a stranger got an answer"
    refused += 1
print("refused", refused, flush=True)
"""


def test_a_flood_of_strangers_costs_no_window(sender, door, clients, tmp_path):
    "Connections that say nothing until the door is full, then thousands that come without a certificate, or with noise."
    sender.more(1)
    door.identity(path_of(6))
    before = door.log.count("max_connections exceeded")
    with Child([sys.executable, "-c", _SILENT, str(door.sensors)], tmp_path / "silent.log") as silent:
        wait_for(lambda: "full" in silent.log.read_text())
        wait_for(lambda: door.log.count("max_connections exceeded") > before + 100)  # the door takes 1,000
        sender.more()  # who is in stays in
        assert clients(door.url("agent"), "another").connected  # and the services' door is another one
    with Child([sys.executable, "-c", _LOUD, str(door.sensors), door.identity(FAN) / "ca.crt"], tmp_path / "loud.log") as loud:
        while loud.alive:
            sender.more()
        assert loud.log.read_text() == "refused 2000\n"
    assert clients(door.url(path_of(6))).connected  # who may comes in again
    sender.end()


@pytest.fixture
def own_door(tmp_path):
    "A broker that a test may spoil."
    door = Door(tmp_path / "own")
    yield door
    door.close()


def test_a_sensor_that_wants_to_fill_the_memory_costs_the_others_nothing_and_a_restart_comes_up(own_door, clients):
    agent = clients(own_door.url("agent"), topics=[of(OTHER, "window")])
    good, greedy = clients(own_door.url(OTHER)), clients(own_door.url(FAN), topics=[status_topic(FAN)])
    # it acknowledges nothing, so what it sends to itself waits for it
    for size, times in ((4_000_000, 60), (400_000, 60), (40_000, 100), (2_000, 1000)):  # kept under more and more names, more than the limit together
        for i in range(times):
            greedy.publish(of(FAN, "window", f"s{size}-{i}"), bytes(size), retain=True)
            if size == 4_000_000:
                greedy.publish(status_topic(FAN), bytes(size), retain=True)
        for stream in ("vibration", "temperature", "current", "process"):
            greedy.publish(of(FAN, "window", stream), bytes(size), retain=True)
        greedy.publish_wait(status_topic(FAN), b"last", 30)
    assert good.publish_wait(of(OTHER, "window"), bytes(20_000))
    assert [len(m.payload) for m in agent.receive(10, 10)] == [20_000] and "out of memory" not in own_door.log
    own_door.child.stop()
    own_door.start()
    wait_for(lambda: good.connected and good.publish_wait(of(OTHER, "window"), bytes(20_000)))


def test_a_state_that_can_not_be_loaded_is_put_aside_at_the_next_start(own_door, clients):
    assert clients(own_door.url(FAN)).publish_wait(of(FAN, "window"), b"x")  # it is at work, and saves when it is told to end
    own_door.child.stop()
    state = own_door.folder / "data" / "mosquitto.db"
    state.write_bytes(state.read_bytes()[:20] + b"\xff" * 100)
    with pytest.raises(PartMissing):
        own_door.start()
    own_door.start()
    assert (state.with_suffix(".db.aside")).read_bytes()[-100:] == b"\xff" * 100
    assert clients(own_door.url(FAN)).publish_wait(of(FAN, "window"), b"x")


def test_an_access_list_that_was_changed_is_taken_up_without_a_connection_lost(own_door, clients):
    board = "acme/lyon/office/board"
    sensor, listener = clients(own_door.url(FAN)), clients(own_door.url(board), topics=[of(FAN, "window")])
    assert sensor.publish_wait(of(FAN, "window"), b"before")
    with (own_door.config / "sensors.acl").open("a") as file:
        file.write(f"user {board}\ntopic read {of(FAN, 'window')}\n")
    own_door.read_again()
    assert sensor.publish_wait(of(FAN, "window"), b"after")
    assert [m.payload for m in listener.receive(10, 10)] == [b"after"]
