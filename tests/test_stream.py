"The edge runtime over real brokers: what each of them must do, and what the agent keeps when they fail."

import importlib.util
import threading
import time

import pytest

from pdm.errors import PartMissing
from pdm.process import find_program
from pdm.stream.broker import EmbeddedBroker, open_broker
from pdm.stream.mqtt import Mqtt, status_topic

BROKERS = [
    pytest.param("mosquitto", marks=pytest.mark.skipif(not find_program("mosquitto"), reason="mosquitto is not installed")),
    pytest.param("iotcore", marks=pytest.mark.skipif(not importlib.util.find_spec("iotcore"), reason="iotcore is not installed")),
]


@pytest.fixture(scope="module", params=BROKERS)
def broker(request):
    with EmbeddedBroker(kind=request.param) as b:
        yield b


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


def receive(client, n, seconds=5.0):
    "The next `n` messages, or what came of them."
    found, until = [], time.monotonic() + seconds
    while len(found) < n and time.monotonic() < until:
        found += client.receive(n - len(found), 0.1)
    return found


# ---- the broker contract: Kafka joins by a line in BROKERS and its client


def test_messages_arrive_in_order_with_their_properties(connect):
    sender, receiver = connect("sender"), connect("receiver", session_s=0)
    receiver.subscribe(["order/+/x"])
    for i in range(200):
        assert sender.publish(f"order/{i % 3}/x", bytes([i]) * 1000, properties=[("epoch", "7"), ("seq", str(i))])
    got = []
    while len(got) < 200 and (some := receive(receiver, 40, seconds=1)):
        receiver.ack(some)
        got += some
    assert [m.payload[0] for m in got] == list(range(200))
    assert [dict(m.properties) for m in got[:2]] == [{"epoch": "7", "seq": "0"}, {"epoch": "7", "seq": "1"}]
    assert got[4].topic == "order/1/x" and not got[4].retained


def test_a_window_of_four_megabytes_passes(connect):
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
    bound = 10 if broker.kind == "mosquitto" else 100  # iotcore has a bound of its own and takes none
    sender, receiver = connect("sender"), connect("receiver", session_s=0, receive_maximum=10)
    receiver.subscribe(["bounded"])
    for i in range(bound + 20):
        sender.publish("bounded", bytes([i]))
    first = receive(receiver, bound + 20, seconds=1)
    assert len(first) == bound
    receiver.ack(first)
    rest = receive(receiver, 10)
    assert [m.payload[0] for m in rest] == list(range(bound, bound + 10))


def test_a_retained_message_waits_for_its_subscriber(connect):
    connect("sender").publish("kept/1", b"old", retain=True)
    sender = connect("sender")
    sender.publish("kept/1", b"new", retain=True)
    late = connect("late")
    late.subscribe(["kept/+"])
    (got,) = receive(late, 1)
    assert (got.payload, got.retained) == (b"new", True)


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
    got = receive(again, 5)
    assert [m.payload[0] for m in got] == [2, 3, 4, 5, 6]
    again.ack(got)


def test_an_acknowledgement_from_an_earlier_connection_is_not_taken_for_a_new_message(broker, connect):
    sender, worker = connect("sender"), connect("stale", exact=True)
    worker.subscribe(["stale"])
    sender.publish("stale", b"a")
    (old,) = receive(worker, 1)
    up = threading.Event()
    worker.on_connect(up.set)
    worker._client.socket().shutdown(2)  # the network fails
    assert up.wait(5)
    (new,) = receive(worker, 1)
    worker.ack([old])
    assert new.payload == b"a" and new.token[0] is not old.token[0]
    worker.ack([new])


def test_the_status_of_a_client_tells_whether_it_lives(connect):
    watcher, client = connect("watcher"), connect("watched", exact=True)
    watcher.subscribe([status_topic("watched")])
    assert b"online" in receive(watcher, 1)[0].payload
    client.close()
    assert b"offline" in receive(watcher, 1)[0].payload


def test_clients_come_back_by_themselves_when_the_broker_does():
    with open_broker("embedded:") as broker:
        client = broker.client("patient", session_s=0)
        client.connect()
        try:
            client.subscribe(["after"])
            broker.restart()
            until = time.monotonic() + 10
            while not client.connected and time.monotonic() < until:
                time.sleep(0.05)
            assert client.publish("after", b"x")
            assert receive(client, 1)[0].payload == b"x"
        finally:
            client.close()


def test_processes_that_share_a_folder_share_its_broker(tmp_path):
    with open_broker("embedded:", tmp_path) as owner, open_broker("embedded:", tmp_path) as guest:
        assert owner.kind in ("mosquitto", "iotcore") and guest.kind == "remote"
        assert guest.url == owner.url
    with open_broker("embedded:", tmp_path) as owner:
        assert owner.kind != "remote"


def test_a_refused_login_names_the_setting():
    with pytest.raises(PartMissing, match="check broker_url"):
        Mqtt("mqtt://127.0.0.1:1", "nobody").connect(timeout_s=0.2)
