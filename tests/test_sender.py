"""The sensor's side: what an outbox holds, what outlives a killed sender, and a recording published as if live."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from servers import wait_for
from small_site import RATE_HZ, SAMPLES, STREAM, Site, forget_acks, key_of, path_of

from pdm.config import load_assets
from pdm.data.window import AssetPath, Window, decode, encode, topic, user_properties
from pdm.errors import InvalidConfig, InvalidInput, PartMissing
from pdm.process import Child
from pdm.serve.engine import InProcess
from pdm.signal.diagnose import diagnose
from pdm.stream.agent import Agent
from pdm.stream.broker import EmbeddedBroker
from pdm.stream.buffer import Buffer
from pdm.stream.journal import Mark
from pdm.stream.outbox import Outbox, tell_oldest
from pdm.stream.replay import play
from pdm.stream.sensor_client import SensorClient
from pdm.stream.versions import own

pytestmark = pytest.mark.timeout(120)

TOPIC = topic(AssetPath.parse(path_of(0)), STREAM, "window")


def fill(box, n=1):
    "Add windows whose content tells which ones they are: no two are the same."
    added = []
    for _ in range(n):
        x = np.frombuffer(os.urandom(32), np.uint8).astype(np.float32).reshape(1, 32)
        w = Window(STREAM, box.epoch, box.next_seq, box.oldest_then, 0, RATE_HZ, ("h",), ("g",), x)
        added.append(box.add(encode(w), user_properties(w), 0))
    return added


def forget(buffer):
    "End as a killed process does: nothing is tidied up, the kernel lets go of the files."
    buffer._disks.clear()
    buffer._db.close()
    os.close(buffer._proof)


class Far:
    "The agent as far as a sender can see it: what it dealt with, and what it counts as lost."

    def __init__(self):
        self.marks, self.content, self.lost = {}, {}, 0

    def get(self, p):
        w = decode(p.payload)
        assert user_properties(w) == list(map(tuple, p.properties))
        mark = self.marks.setdefault(w.epoch, Mark(w.epoch, watermark=w.oldest - 1))
        self.lost += mark.forgo(w.oldest)
        first = self.content.setdefault((w.epoch, w.seq), w.samples.tobytes())
        assert first == w.samples.tobytes(), "one number, two contents"
        mark.add(w.seq)

    def acks(self):
        return [(epoch, mark.watermark) for epoch, mark in self.marks.items()]


ACTIONS = st.lists(st.one_of(
    st.sampled_from(["add", "add", "add", "deliver", "lose", "ack", "kill", "reboot", "tear", "wait"])), max_size=60)


@given(actions=ACTIONS, full=st.sampled_from(["refuse", "drop_oldest"]), window=st.integers(1, 6))
@example(actions=["add", "kill", "add", "deliver", "tear", "tear", "add"], full="refuse", window=2)  # the same old copy twice
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_happens_no_number_has_two_contents_and_everything_is_delivered_or_counted(actions, full, window, tmp_path_factory, monkeypatch):
    folder, boot = tmp_path_factory.mktemp("buffer"), [0]
    monkeypatch.setattr("pdm.stream.buffer.boot_id", lambda: f"boot-{boot[0]}")
    far, now, added, dropped = Far(), 0.0, {}, 0
    buffer = Buffer(folder)
    box = buffer.outbox(TOPIC, window, 1.0, full)
    older = None  # a copy of the file from before

    def hand_over(lost):
        for p in box.due(now):
            box.handed_over(p, now)
            if not lost:
                far.get(p)

    for action in actions:
        now += 0.1
        if action == "add" and not box.full:
            held = set(box.pending)
            (p,) = fill(box)
            assert (p.epoch, p.seq) not in added
            dropped += len(held - set(box.pending))
            added[p.epoch, p.seq] = decode(p.payload).samples.tobytes()
            box.behind = True
        elif action in ("deliver", "lose"):
            hand_over(action == "lose")
        elif action == "ack":
            for ack in far.acks():
                box.acknowledge(*ack, now)
        elif action == "wait":
            now += 100
        elif action in ("kill", "reboot", "tear"):
            held = set(box.pending)
            if action == "tear" and older is not None:
                forget(buffer)
                shutil.copyfile(older, buffer.path)
            else:
                older = folder / "older"
                forget(buffer)
                shutil.copyfile(buffer.path, older)
            boot[0] += action == "reboot"
            buffer = Buffer(folder)
            epoch, next_seq = box.epoch, box.next_seq
            box = buffer.outbox(TOPIC, window, 1.0, full)
            if action == "kill":
                assert (box.epoch, box.next_seq) == (epoch, next_seq) or not next_seq
                assert held <= set(box.pending)
            elif action == "reboot":
                assert box.epoch != epoch and held <= set(box.pending)
            for key in held - set(box.pending):  # gone with the end of the file
                added.pop(key)
        assert len([key for key in box.pending if key[0] == box.epoch]) <= max(window, 1) or full == "drop_oldest"
    for _ in range(200):  # and then all is well, or nearly
        now += 100
        hand_over(False)
        for ack in far.acks():
            box.acknowledge(*ack, now)
        if not box.pending:
            break
    assert not box.pending, "not everything gets acknowledged"
    assert {k: v for k, v in far.content.items() if k in added} == {k: v for k, v in added.items() if k in far.content}
    assert len(set(added) - set(far.content)) <= dropped
    buffer.close()


def test_the_same_epoch_goes_on_after_a_kill_and_after_a_clean_end(tmp_path):
    buffer = Buffer(tmp_path)
    box = buffer.outbox(TOPIC)
    fill(box, 5)
    box.acknowledge(box.epoch, 4)
    forget(buffer)
    again = Buffer(tmp_path)
    second = again.outbox(TOPIC)
    assert (second.epoch, second.next_seq, len(second.pending), second.begun) == (box.epoch, 5, 0, False)
    fill(second, 2)
    again.close()
    last = Buffer(tmp_path)
    third = last.outbox(TOPIC)
    assert (third.epoch, third.next_seq, [p.seq for p in third.due(0)]) == (box.epoch, 7, [5, 6])
    last.close()


def test_a_boot_ends_every_epoch_also_of_a_stream_that_is_opened_only_later(tmp_path, monkeypatch):
    buffer = Buffer(tmp_path)
    boxes = {name: buffer.outbox(name) for name in ("a", "b")}
    for box in boxes.values():
        fill(box, 3)
    forget(buffer)
    monkeypatch.setattr("pdm.stream.buffer.boot_id", lambda: "the next one")
    for name in ("a", "b"):  # one life each
        life = Buffer(tmp_path)
        box = life.outbox(name)
        assert box.begun and box.epoch != boxes[name].epoch and box.next_seq == 0
        assert [(p.epoch, p.seq) for p in box.due(0)] == [(boxes[name].epoch, i) for i in range(3)]
        forget(life)


@pytest.mark.parametrize("damage", ["zeros", "half", "garbage", "empty", "gone", "proof gone", "no tables", "log gone"])
def test_a_damaged_buffer_begins_a_new_epoch_and_keeps_what_is_readable(tmp_path, damage, caplog):
    buffer = Buffer(tmp_path / "a")
    box = buffer.outbox(TOPIC, window=200)
    for _ in range(100):
        w = Window(STREAM, box.epoch, box.next_seq, box.oldest_then, 0, RATE_HZ, ("h",), ("g",), np.random.default_rng(box.next_seq).normal(size=(1, 4096)))
        box.add(encode(w), user_properties(w), 0)
    contents = {p.seq: p.payload for p in box.pending.values()}
    if damage != "log gone":
        forget(buffer)
    folder = tmp_path / "b"
    shutil.copytree(tmp_path / "a", folder)
    file = folder / "outbox.db"
    size = file.stat().st_size
    if damage == "zeros":
        with open(file, "r+b") as f:
            f.seek(size // 2 // 16384 * 16384)
            f.write(bytes(16384 * 3))
    elif damage == "half":
        os.truncate(file, size // 2)
    elif damage == "garbage":
        file.write_bytes(os.urandom(5000))
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "gone":
        file.unlink()
    elif damage == "proof gone":
        (folder / "outbox.proof").unlink()
    elif damage == "no tables":
        db = sqlite3.connect(file)
        db.executescript("DROP TABLE pending; DROP TABLE epoch")
        db.close()
    else:
        assert (folder / "outbox.db-wal").stat().st_size > 0
        (folder / "outbox.db-wal").unlink()
        forget(buffer)
    again = Buffer(folder)
    second = again.outbox(TOPIC, window=200)
    assert second.begun and second.epoch != box.epoch and second.next_seq == 0
    assert "new epoch" in caplog.text
    assert all(p.payload == contents[p.seq] and p.epoch == box.epoch for p in second.pending.values())
    assert len(second.pending) >= {"zeros": 40, "half": 1, "proof gone": 100, "log gone": 0}.get(damage, 0)
    fill(second)
    far = Far()
    for now in np.arange(0, 100_000, 100.0):
        for p in second.due(now):
            second.handed_over(p, now)
            far.get(p)
        for ack in far.acks():
            second.acknowledge(*ack, now)
    assert not second.pending
    again.close()
    Buffer(folder).close()


def test_a_window_whose_bits_have_turned_is_not_sent(tmp_path):
    buffer = Buffer(tmp_path)
    box = buffer.outbox(TOPIC)
    payload = fill(box, 3)[1].payload
    forget(buffer)
    db = sqlite3.connect(buffer.path)
    db.execute("UPDATE pending SET payload = ? WHERE seq = 1", (payload[:-30] + bytes(4) + payload[-26:],))
    db.commit()
    db.close()
    again = Buffer(tmp_path)
    second = again.outbox(TOPIC)
    assert second.begun and [(p.epoch, p.seq) for p in second.pending.values()] == [(box.epoch, 0), (box.epoch, 2)]
    again.close()


def test_two_senders_on_one_buffer_are_refused(tmp_path, plant):
    with SensorClient(plant.url, buffer_dir=tmp_path), pytest.raises(InvalidConfig, match="in use by another sender"):
        SensorClient(plant.url, buffer_dir=tmp_path)
    SensorClient(plant.url, buffer_dir=tmp_path).close()


def test_a_full_disk_refuses_the_window_and_takes_the_next_one_later(tmp_path):
    buffer = Buffer(tmp_path)
    box = buffer.outbox(TOPIC)
    fill(box, 2)
    pages = buffer._db.execute("PRAGMA page_count").fetchone()[0]
    buffer._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(PartMissing, match="takes no window"):
        for _ in range(2000):
            fill(box)
    n = box.next_seq
    assert len(box.pending) == n
    buffer._db.execute("PRAGMA max_page_count = 1000000")
    assert fill(box)[0].seq == n
    forget(buffer)
    again = Buffer(tmp_path)
    assert [p.seq for p in again.outbox(TOPIC).pending.values()] == list(range(n + 1))
    again.close()


def test_an_outbox_asks_again_with_its_oldest_window_only_and_ever_more_rarely():
    box = Outbox(window=8, resend_s=5, draw=lambda: 0.0)
    fill(box, 8)
    box.behind = True
    sent = []
    for now in range(0, 400):
        for p in box.due(now):
            box.handed_over(p, now)
            sent.append((now, p.seq))
    assert [s for s in sent if s[0]] == [(5, 0), (15, 0), (35, 0), *((t, 0) for t in range(75, 400, 40))]


def test_what_is_told_anew_keeps_its_samples_also_as_int16():
    w = Window(STREAM, 7, 5, 2, 0, RATE_HZ, ("h",), ("g",), np.linspace(-1, 1, 64).reshape(1, 64), {"speed_rpm": 1500.0})
    box = Outbox(epoch=7, next_seq=5)
    p = box.add(encode(w, 0.001), user_properties(w), 0)
    tell_oldest(p)
    told = decode(p.payload)
    assert told.oldest == 5 and dict(p.properties)["oldest"] == "5"
    assert np.array_equal(told.samples, decode(encode(w, 0.001)).samples) and told.conditions == w.conditions


# ---- over a real broker


@pytest.fixture(scope="module")
def plant():
    with EmbeddedBroker() as b:
        yield b


@pytest.fixture
def site(make_bundle, tmp_path):
    return Site(tmp_path / "site", make_bundle(samples=SAMPLES, rate_hz=RATE_HZ))


@pytest.fixture
def edge(plant, site):
    "A function that starts an agent in this process; what was acknowledged before is cleared."
    with ExitStack() as stack:
        forget_acks(plant)

        def start():
            journal = stack.enter_context(site.journal())
            agent = Agent(plant.client(site.agent_id), journal, own(load_assets(site.folder / "assets.yaml"), InProcess().load, journal), diagnose)
            stack.callback(agent.stop)
            agent.start()
            return agent

        yield start


def rows(site, i=0):
    with site.reader() as reader:
        return [(r.epoch, r.seq) for r in reader.verdicts(*key_of(i))]


SENDER = """
import os, sys, numpy as np
from pdm.stream.sensor_client import SensorClient
def say(what): os.write(1, f"{what}\\n".encode())  # a line at once: a kill never leaves half of one
url, folder, path, stream, n = sys.argv[1:]
client = SensorClient(url, buffer_dir=folder, resend_s=0.5)
out = client.open(path, stream, 1024.0, ["h", "v"], ["g", "g"])
say(f"epoch {out.epoch} {out.outbox.next_seq} {out.restored}")
while out.outbox.next_seq < int(n):
    seq = out.outbox.next_seq
    out.send(np.random.default_rng(seq).normal(0, 1, (2, 128)), t0_ns=1767225600000000000 + seq * 125000000)
    say(f"sent {seq}")
client.flush(30)
say(f"counts {client.counts}")
client.close()
"""


def test_a_kill_of_the_sender_loses_no_window_and_doubles_none(plant, site, edge, tmp_path):
    edge()
    log = tmp_path / "sender.log"
    log.touch()
    args = [sys.executable, "-c", SENDER, plant.url, tmp_path / "buffer", path_of(0), STREAM]

    def said(what):
        return [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith(what)]

    for more in (150, 350, 600):
        before, enough = len(said("epoch")), len(said("sent")) + more
        sender = Child([*args, str(10**9)], log, name="sender")  # however late the kill comes, it has not sent everything
        wait_for(lambda before=before, enough=enough: len(said("epoch")) > before and len(said("sent")) >= enough)
        sender.kill()
    total = max(said("sent")) + 900
    with Child([*args, str(total)], log, name="sender"):
        wait_for(lambda: "counts" in log.read_text(), 60)
    lines = log.read_text().splitlines()
    begun = [line.split()[1:] for line in lines if line.startswith("epoch")]
    assert len(begun) == 4 and len({epoch for epoch, *_ in begun}) == 1, "the epoch goes on"
    assert "'epochs_begun': 0" in lines[-1] and "'pending': 0" in lines[-1]
    found = rows(site)
    assert set(said("sent")) <= {seq for _, seq in found}
    assert len(found) == len(set(found)) and sorted(seq for _, seq in found) == list(range(total))


def test_leftovers_of_a_damaged_buffer_reach_the_journal_under_their_own_epoch(plant, site, edge, tmp_path):
    with SensorClient(plant.url, buffer_dir=tmp_path / "buffer") as client:
        old = client.open(path_of(0), STREAM, RATE_HZ, ["h", "v"], ["g", "g"])
        for i in range(10):
            old.send(np.full((2, SAMPLES), i / 10), t0_ns=(1 + i) * 125_000_000)
    (tmp_path / "buffer" / "outbox.proof").unlink()
    with sqlite3.connect(tmp_path / "buffer" / "outbox.db") as db:
        db.execute("DELETE FROM pending WHERE seq IN (3, 4)")  # and with a gap
    db.close()
    edge()
    with SensorClient(plant.url, buffer_dir=tmp_path / "buffer", resend_s=0.2) as client:
        new = client.open(path_of(0), STREAM, RATE_HZ, ["h", "v"], ["g", "g"])
        for i in range(5):
            new.send(np.full((2, SAMPLES), i / 10), t0_ns=(20 + i) * 125_000_000)
        client.flush(20)
        assert client.counts["restored"] == 8 and client.counts["epochs_begun"] == 1 and client.counts["acknowledged"] == 13
    assert new.epoch != old.epoch
    assert {(old.epoch, s) for s in (0, 1, 2, 5, 6, 7, 8, 9)} | {(new.epoch, s) for s in range(5)} <= set(rows(site))


def test_what_was_dropped_is_counted_and_a_stream_that_then_stops_is_still_acknowledged(plant, site, edge):
    with SensorClient(plant.url, resend_s=0.2) as client:
        out = client.open(path_of(0), STREAM, RATE_HZ, ["h", "v"], ["g", "g"], window=4, full="drop_oldest")
        for i in range(10):
            out.send(np.zeros((2, SAMPLES)), t0_ns=(1 + i) * 125_000_000)
        assert client.counts["dropped"] == 6
        edge()
        client.flush(20)
        assert client.counts["acknowledged"] == 4
    assert {seq for _, seq in rows(site)} == {6, 7, 8, 9}


def test_a_full_outbox_that_refuses_counts_it(plant):
    with SensorClient(plant.url) as client:
        out = client.open(path_of(1), "nobody", RATE_HZ, ["h"], ["g"], window=2)
        for _ in range(2):
            out.send(np.zeros((1, 8)))
        for _ in range(3):
            with pytest.raises(PartMissing, match="is an agent running"):
                out.send(np.zeros((1, 8)), timeout_s=0.01)
        assert client.counts["refused"] == 3 and client.counts["sent"] == 2 == client.counts["pending"]
        with pytest.raises(InvalidConfig, match="open already"):
            client.open(path_of(1), "nobody", RATE_HZ, ["h"], ["g"])


def test_of_the_delivery_times_only_the_last_are_kept_unless_all_are_asked_for(plant, site, edge):
    edge()
    with SensorClient(plant.url, times=3) as few, SensorClient(plant.url, times=None) as all_of_them:
        streams = [c.open(path_of(i), STREAM, RATE_HZ, ["h", "v"], ["g", "g"]) for i, c in enumerate((few, all_of_them))]
        for _ in range(10):
            for s in streams:
                s.send(np.zeros((2, SAMPLES)))
        few.flush(20)
        all_of_them.flush(20)
        assert [[seq for seq, *_ in s.times] for s in streams] == [[7, 8, 9], list(range(10))]
    with SensorClient(plant.url) as client:
        assert client.open(path_of(1), "nobody", RATE_HZ, ["h"], ["g"]).times.maxlen == 1000


def test_what_waits_in_vain_says_whether_agent_broker_or_a_twin_is_why():
    def complaints(client, out):
        for call in (lambda: out.send(np.zeros((1, 8)), timeout_s=0.01), lambda: client.flush(0.01),
                     lambda: play(out, np.zeros((1, 1, 8)), step_s=0.1, speed=0, patience_s=0.01)):
            with pytest.raises(PartMissing) as e:
                call()
            yield str(e.value)

    with EmbeddedBroker() as broker, SensorClient(broker.client("gateway", session_s=0)) as client:
        out = client.open(path_of(1), "nobody", RATE_HZ, ["h"], ["g"], window=1)
        out.send(np.zeros((1, 8)))
        assert all("is an agent running" in said for said in complaints(client, out))
        broker.kill()
        wait_for(lambda: not client.bus.connected)
        for said in complaints(client, out):
            assert "no connection to the broker" in said and "agent" not in said
        broker.restart()
        wait_for(lambda: client.bus.connected)
        with SensorClient(broker.client("gateway", session_s=0)) as twin:
            wait_for(lambda: client.bus.failure or twin.bus.failure)
            assert not twin.bus.failure and all("used by another client" in said for said in complaints(client, out))


def test_a_window_that_the_disk_refuses_is_counted_as_refused(plant, tmp_path):
    with SensorClient(plant.url, buffer_dir=tmp_path) as client:
        out = client.open(path_of(1), "nobody", RATE_HZ, ["h"], ["g"], window=5000)
        pages = client._buffer._db.execute("PRAGMA page_count").fetchone()[0]
        client._buffer._db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(PartMissing, match="takes no window"):
            for _ in range(2000):
                out.send(np.zeros((1, 32)))
        counts = client.counts
        assert counts["refused"] == 1 and counts["sent"] == counts["pending"] == out.outbox.next_seq


def test_many_threads_may_send_on_the_same_streams(plant, site, edge):
    edge()
    with SensorClient(plant.url) as client:
        streams = [client.open(path_of(i), STREAM, RATE_HZ, ["h", "v"], ["g", "g"], window=8) for i in range(2)]
        seqs, lock = [], threading.Lock()

        def run(k):
            for _ in range(40):
                seq = streams[k % 2].send(np.full((2, SAMPLES), 0.1))
                with lock:
                    seqs.append((k % 2, seq))

        threads = [threading.Thread(target=run, args=(k,)) for k in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        client.flush(20)
        assert sorted(seqs) == [(i, seq) for i in range(2) for seq in range(120)]
    assert [len(set(rows(site, i))) for i in range(2)] == [120, 120]


def test_ten_rows_of_eight_slow_values_go_the_same_way(plant, make_bundle, tmp_path):
    names, units = tuple(f"t{i}" for i in range(8)), ("C",) * 8
    slow = Site(tmp_path / "slow", make_bundle(channels=names, units=units, samples=10, rate_hz=1.0))
    with slow.journal() as journal, SensorClient(plant.url) as client:
        agent = Agent(plant.client("slow-agent", session_s=0), journal, own(load_assets(slow.folder / "assets.yaml"), InProcess().load, journal), diagnose)
        agent.start()
        try:
            out = client.open(path_of(0), STREAM, 1.0, names, units, scale=0.01)
            for i in range(30):
                out.send(np.random.default_rng(i).normal(60, 5, (8, 10)), t0_ns=1_767_225_600_000_000_000 + i * 10**10)
            client.flush(20)
        finally:
            agent.stop()
        assert [r.seq for r in journal.verdicts(*key_of(0))] == list(range(30)) and not journal.dead_letters()


# ---- predmaint replay


def predmaint(*args, env=None, **options):
    return subprocess.Popen([sys.executable, "-m", "pdm.cli", *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, **(env or {})}, **options)


@pytest.fixture
def recording(tmp_path):
    file = tmp_path / "fan.npy"
    np.save(file, np.random.default_rng(0).normal(0, 1, (2, SAMPLES * 20)).astype(np.float32))
    return ["replay", file, "--asset", path_of(0), "--stream", STREAM, "--rate-hz", RATE_HZ, "--channels", "h,v", "--units", "g", "--length", SAMPLES]


def test_a_replay_ends_when_everything_is_acknowledged(plant, site, edge, recording):
    edge()
    p = predmaint(*recording, "--speed", 0, "--repeat", 2, "--condition", "speed_rpm=1500", "--broker-url", plant.url, "--json")
    out, err = p.communicate(timeout=60)
    assert p.returncode == 0, err
    said = json.loads(out)
    assert (said["of"], said["sent"], said["acknowledged"], said["lost"], said["dropped"]) == (40, 40, 40, 0, 0)
    assert len(set(rows(site))) == 40
    with site.reader() as reader:
        assert {r.conditions["speed_rpm"] for r in reader.verdicts(*key_of(0))} == {1500.0}
        assert not any(r.flags for r in reader.verdicts(*key_of(0)))


def test_a_replay_without_an_agent_says_so(plant, recording):
    p = predmaint(*recording, "--speed", 0, "--broker-url", plant.url, "--timeout", 4, "--json")
    out, err = p.communicate(timeout=60)
    assert p.returncode == 2 and "is an agent running" in err and "20 windows are lost" in err and "Traceback" not in err
    assert json.loads(out)["lost"] == 20


def test_a_replay_that_is_interrupted_keeps_its_windows_for_the_next(plant, site, edge, recording, tmp_path):
    listener = plant.client("listener", session_s=0)
    listener.connect()
    listener.subscribe([topic(AssetPath.parse(path_of(0)), STREAM, "window")])
    p = predmaint(*recording, "--speed", 0.05, "--broker-url", plant.url, "--buffer", tmp_path / "buffer", "--json")
    assert listener.receive(1, 30)  # it has begun
    listener.close()
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    first = json.loads(out)
    assert p.returncode == 0 and first["stopped"] and 0 < first["kept"] == first["sent"] < 20 and first["lost"] == 0, err
    edge()
    p = predmaint(*recording, "--speed", 0, "--broker-url", plant.url, "--buffer", tmp_path / "buffer", "--json")
    out, err = p.communicate(timeout=60)
    second = json.loads(out)
    assert p.returncode == 0 and second["restored"] == first["kept"] and second["epochs_begun"] == 0, err
    assert len(set(rows(site))) == 20 + first["sent"]


def test_a_replay_of_nonsense_is_the_users_turn(recording, tmp_path):
    with pytest.raises(InvalidInput):
        play(None, np.zeros((1, 2, 8)), step_s=1, speed=-1)
    p = predmaint(*recording, "--condition", "fast", "--broker-url", "mqtt://127.0.0.1:1")
    assert p.communicate(timeout=60)[1].startswith("predmaint: --condition 'fast'") and p.returncode == 1
