"""One alarm an asset, and its life: over several streams, by commands of people, through kills of the agent."""

import json
import subprocess
import sys
from contextlib import ExitStack
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import wait_for
from small_site import RATE_HZ, SAMPLES, STEP_NS, STREAM, T0_NS, Site, path_of, window

from pdm.config import load_assets
from pdm.errors import InvalidInput
from pdm.model.bundle import Contract
from pdm.serve.engine import InProcess
from pdm.signal.diagnose import diagnose
from pdm.stream.alarms import REASONS, Alarm, Command, events_of
from pdm.stream.broker import EmbeddedBroker
from pdm.stream.intake import Accepted, Batch
from pdm.stream.journal import Event, Journal, JournalReader
from pdm.stream.judge import Judge
from pdm.stream.sensor_client import SensorClient
from pdm.stream.versions import own

pytestmark = pytest.mark.timeout(120)
ASSET = path_of(0)
SLOW = "temperature"
ACTIONS = ["acknowledge", "shelve", "unshelve", "clear", "label", "maintenance_begin", "maintenance_end", "maintenance"]


# ---- the fold


def happenings():
    "Events as monitors and people bring them about, in any order."
    monitor = st.builds(lambda kind, severity: (kind, severity), st.sampled_from(["raised", "escalated", "diagnosed", "cleared"]), st.integers(2, 3))
    return st.lists(st.one_of(monitor, st.sampled_from(ACTIONS).map(lambda a: (a, 0))), max_size=40)


@settings(max_examples=200, deadline=None)
@given(happenings())
def test_every_alarm_is_in_one_of_the_six_states_and_survives_json(story):
    alarm, history = Alarm(ASSET), []
    for t, (kind, severity) in enumerate(story):
        if kind in ACTIONS:
            command = Command(asset=ASSET, action=kind, by="mia", reason="other", what="x", for_s=10)
            try:
                events = events_of(command, alarm, t)
            except InvalidInput:
                continue
        else:
            details = {"severity": severity, "reasons": ["r"], "fault": "outer_race"}
            events = [Event(ASSET, STREAM, "ep@1", kind, t, 7, t, details)]
        for e in events:
            alarm = alarm.after(e)
        history += events
        assert alarm.state in ("normal", "unacknowledged", "acknowledged", "returned", "shelved", "out_of_service")
        assert Alarm.from_state(json.loads(json.dumps(alarm.to_state()))) == alarm
    assert Alarm.of(ASSET, history) == alarm


def test_an_alarm_that_ended_unseen_waits_for_somebody_to_acknowledge_it():
    alarm = Alarm.of(ASSET, [Event(ASSET, STREAM, "ep@1", kind, t, 7, t, {"severity": 2, "reasons": []}) for t, kind in enumerate(["raised", "cleared"])])
    assert alarm.state == "returned"
    (e,) = events_of(Command(asset=ASSET, action="acknowledge", by="mia"), alarm, 5)
    assert alarm.after(e).state == "normal" and e.details == {"by": "mia"}


@pytest.mark.parametrize("fields,says", [
    ({"action": "shelve", "for_s": 60}, "a shelf has a time and a reason"),
    ({"action": "shelve", "reason": "nuisance"}, "a shelf has a time and a reason"),
    ({"action": "shelve", "reason": "nuisance", "for_s": 8 * 86400}, "less than or equal to 604800"),
    ({"action": "label", "reason": "whatever"}, "none of damage"),
    ({"action": "label", "reason": "damage"}, "no alarm that could be labelled"),
    ({"action": "maintenance_end"}, "no maintenance has begun"),
    ({"action": "maintenance"}, "say what was done"),
    ({"action": "acknowledge", "by": ""}, "at least 1 character"),
    ({"action": "acknowledge", "who": "mia"}, "who: Extra inputs"),
])
def test_a_command_that_makes_no_sense_says_what_was_expected(fields, says):
    with pytest.raises(InvalidInput, match=says):
        events_of(Command.read(json.dumps({"asset": ASSET, "by": "mia", **fields})), Alarm(ASSET), 0)


# ---- several streams, one asset


@pytest.fixture
def pump(make_bundle, tmp_path):
    "An asset with a fast stream at two channels and a slow one: temperatures once a second, in tens."
    fast, slow = make_bundle(samples=SAMPLES, rate_hz=RATE_HZ), make_bundle(name="temperatures", samples=10, rate_hz=1.0, channels=("bearing", "winding"))
    site = Site(tmp_path / "site", fast, assets=1)
    record = site.record.model_copy(update={"model": slow.digest, "hop_s": 10.0, "spacing_s": 10.0, "gap_s": 600.0, "quiet_s": 60.0})
    (site.folder / "slow.json").write_text(record.to_json())
    streams = {STREAM: {"bundle": str(fast.path), "calibration": "rms.json"}, SLOW: {"bundle": str(slow.path), "calibration": "slow.json"}}
    site.write([{"path": ASSET, "streams": streams}])
    return site


def owned_of(site, journal):
    return own(load_assets(site.folder / "assets.yaml"), InProcess().load, journal)


class Told:
    "Windows straight to a judge, and what came of them."

    def __init__(self, owned, **options):
        self.judge = Judge(owned, diagnose, **options)
        self.contracts: dict[str, Contract] = {o.stream: o.version.model.contract for o in owned}
        self.rows, self.events, self.states, self.alarms, self.seq = [], [], {}, {}, {STREAM: 0, SLOW: 0}

    def hear(self, stream, level, n=1):
        from pdm.data.window import Window
        from pdm.stream.bus import Message

        c = self.contracts[stream]
        for _ in range(n):
            seq = self.seq[stream]
            self.seq[stream] += 1
            x = np.full((2, c.samples), level, np.float32) * np.where(np.arange(c.samples) % 2, 1, -1).astype(np.float32)
            w = Window(stream, 7, seq, 0, T0_NS + seq * round(c.samples / c.rate_hz * 1e9), c.rate_hz, c.channels, c.units, x)
            self.take(self.judge.judge(Batch(accepted=[Accepted((ASSET, stream), w, Message("t", b"raw"), w.t_ns, False, False)])))

    def take(self, group):
        self.rows += group.rows
        self.events += group.events
        self.states |= group.states
        self.alarms |= group.alarms

    @property
    def kinds(self):
        return [(e.kind, e.stream) for e in self.events if e.kind in ("raised", "escalated", "cleared")]


@pytest.fixture
def told(pump):
    with pump.journal() as journal:
        t = Told(owned_of(pump, journal))
        yield t
        t.judge.close()


def test_streams_of_an_asset_share_one_alarm_and_the_worst_speaks(told):
    told.hear(STREAM, 1.0, 3)
    told.hear(SLOW, 1.0, 3)
    told.hear(SLOW, 3.0, 3)       # +9.5 dB: above the threshold of 6
    told.hear(STREAM, 100.0, 3)   # far above
    told.hear(SLOW, 1.0, 8)
    assert told.kinds == [("raised", SLOW), ("escalated", STREAM)]
    alarm = told.judge.assets[ASSET].alarm
    assert alarm.active and alarm.severity == 3 and alarm.worst == STREAM and alarm.reasons[0].startswith(f"{STREAM}: +34.0 dB")
    last = told.rows[-1]
    assert last.stream == SLOW and not last.alarm and last.worst == STREAM and last.asset_severity == 3 and last.episode == alarm.episode and last.fault != "none"
    told.hear(STREAM, 1.0, 600)
    assert told.kinds[-1] == ("cleared", STREAM) and len({e.episode for e in told.events}) == 1
    assert told.rows[-1].episode is None and told.rows[-1].fault == "none"


def test_streams_that_promise_more_than_their_asset_may_have_are_not_supported(pump, caplog):
    content = yaml.safe_load((pump.folder / "assets.yaml").read_text())
    for budget, supported in ((2.0, True), (1.9, False)):
        pump.write([content["assets"][0] | {"false_alarms_per_day": budget}])
        with pump.journal() as journal, caplog.at_level("WARNING", logger="pdm"):
            caplog.clear()
            t = Told(owned_of(pump, journal))
        t.hear(SLOW, 1.0)
        t.judge.close()
        assert t.rows[0].supported is supported
        assert ("calibrate each of the 2 for 0.95 a day" in caplog.text) is not supported


def test_a_restart_goes_on_with_the_assets_alarm_and_its_streams(pump, told):
    told.hear(SLOW, 3.0, 3)
    told.hear(STREAM, 100.0, 3)
    with pump.reader() as journal:
        owned = owned_of(pump, journal)
        for o in owned:
            o.recall(json.loads(json.dumps(told.states[o.key][1])))
        again = Told(owned, alarms={ASSET: Alarm.from_state(told.alarms[ASSET])})
    again.seq = dict(told.seq)
    again.hear(SLOW, 3.0)
    again.hear(STREAM, 1.0, 600)
    again.judge.close()
    assert again.kinds == []  # the slow stream still is in alarm
    assert again.rows[-1].episode == told.rows[-1].episode


def test_work_on_a_machine_counts_for_nothing_and_begins_its_monitor_anew(told):
    told.hear(STREAM, 100.0, 3)
    for action, level, n in (("maintenance_begin", 500.0, 50), ("maintenance_end", 1.0, 3)):
        told.take(told.judge.command(Command(asset=ASSET, action=action, by="mia", what="bearing replaced"))[0])
        before = told.judge.owned[ASSET, STREAM].version.monitor.to_state()
        told.hear(STREAM, level, n)
        if action == "maintenance_begin":
            assert told.judge.owned[ASSET, STREAM].version.monitor.to_state() == before
    kinds = [e.kind for e in told.events if e.kind != "diagnosed"]
    assert kinds == ["raised", "maintenance_began", "maintenance_ended", "cleared"]
    assert {r.flags for r in told.rows[3:53]} == {("maintenance",)} and told.rows[-1].flags == () and not told.rows[-1].alarm
    told.hear(STREAM, 100.0, 3)
    assert told.kinds[-1] == ("raised", STREAM) and told.events[-1].episode != told.events[0].episode


def test_a_shelf_is_left_when_its_time_is_over(pump):
    now = [10**18]
    with pump.journal() as journal:
        t = Told(owned_of(pump, journal), now_ns=lambda: now[0])
    t.take(t.judge.command(Command(asset=ASSET, action="shelve", by="mia", reason="nuisance", for_s=60))[0])
    t.hear(STREAM, 100.0, 3)
    raised = next(e for e in t.events if e.kind == "raised")
    assert raised.details["shelved"] is True and not t.judge.news
    now[0] += 60 * 10**9
    assert t.judge.news
    t.take(t.judge.judge(Batch()))
    assert [e.kind for e in t.events[-2:]] == ["unshelved", "escalated"] and "shelved" not in t.events[-1].details  # who was not called then is called now
    assert t.judge.assets[ASSET].alarm.state == "unacknowledged"
    t.judge.close()


# ---- over the page and the command line, through an agent that is killed


def predmaint(site, *args):
    env = {"PREDMAINT_METRICS_PORT": str(site.metrics_port), "PATH": "", "HOME": str(site.folder)}
    return subprocess.run([sys.executable, "-m", "pdm.cli", "alarms", *args], capture_output=True, text=True, env=env, cwd=site.folder)


def ask(site, content=None, token=""):
    body = None if content is None else json.dumps(content).encode()
    with urlopen(Request(f"http://127.0.0.1:{site.metrics_port}/alarms", body, {"Authorization": f"Bearer {token}"}), timeout=10) as answer:
        return json.load(answer)


def test_what_people_say_of_an_alarm_is_journaled_and_outlives_a_kill(pump):
    with EmbeddedBroker() as broker, ExitStack() as stack:
        agent = pump.agent(broker.url)
        stack.callback(lambda: agent.stop())
        client = stack.enter_context(SensorClient(broker.url))
        stream = client.open(ASSET, STREAM, RATE_HZ, ["h", "v"], ["g", "g"])
        for n in range(6):
            stream.send(window(n, level=100.0).samples, t0_ns=T0_NS + n * STEP_NS)
        client.flush(20)
        wait_for(lambda: [a["state"] for a in ask(pump)] == ["unacknowledged"])  # the page is told after the sender
        done = predmaint(pump, "ack", "fan-0", "--by", "mia", "--comment", "on my way", "--json")
        assert done.returncode == 0 and json.loads(done.stdout)["state"] == "acknowledged", done.stderr
        agent.kill()
        agent = pump.agent(broker.url)
        assert [a["state"] for a in ask(pump)] == ["acknowledged"]
        assert predmaint(pump, "shelve", "fan-0", "--for", "8h", "--reason", "nuisance").stdout.strip() == f"{ASSET} is shelved"
        assert "shelved" in predmaint(pump, "list").stdout
        assert predmaint(pump, "label", "fan-0", "--reason", "damage", "--fault", "outer_race", "--by", "mia").returncode == 0
        again = predmaint(pump, "ack", "fan-0")
        assert again.returncode == 1 and "there is nothing to acknowledge" in again.stderr
        for args, says in ((("ack", "fan-9"), "is none of"), (("shelve", "fan-0", "--for", "8 h", "--reason", "nuisance"), "expected a number and s, m, h or d"),
                           (("label", "fan-0", "--reason", "damage", "--episode", "x@1"), "'x@1' is no alarm of fan-0"), (("maintenance", "fan-0", "start"), "expected begin, end, done")):
            done = predmaint(pump, *args)
            assert done.returncode == 1 and says in done.stderr, done.stderr
        assert agent.stop() == 0
        with pump.reader() as journal:
            said = [(e.kind, e.details.get("by"), e.details.get("reason")) for e in journal.events(ASSET) if "by" in e.details]
            assert said[0] == ("acknowledged", "mia", None) and said[1][::2] == ("shelved", "nuisance") and said[2] == ("labelled", "mia", "damage")
            assert journal.alarms()[ASSET]["label"] == "damage"
        away = predmaint(pump, "list")
        assert away.returncode == 2 and "start `predmaint agent`" in away.stderr


def test_only_who_has_the_token_changes_an_alarm(pump):
    with EmbeddedBroker() as broker:
        agent = pump.agent(broker.url, api_token="s3cret")
        try:
            assert [a["state"] for a in ask(pump)] == ["normal"]
            for token in ("", "guess"):
                with pytest.raises(HTTPError) as refused:
                    ask(pump, {"asset": ASSET, "action": "maintenance_begin", "by": "mallory"}, token)
                assert refused.value.code == 403
            assert ask(pump, {"asset": ASSET, "action": "maintenance_begin", "by": "mia"}, "s3cret")["state"] == "out_of_service"
        finally:
            agent.stop()


def test_every_reason_has_a_sentence():
    assert all(REASONS.values()) and {"damage", "false_alarm", "sensor"} <= set(REASONS)


def test_an_alarm_is_told_from_events_as_a_journal_of_schema_1_has_them(tmp_path):
    from pdm.stream.journal import Group

    with Journal(tmp_path / "journal.db") as journal:
        journal.commit([Group(events=[Event(ASSET, STREAM, "ep@1", "raised", 5, 7, 3, {"severity": 2, "score": 1.5}),
                                      Event(ASSET, STREAM, "ep@1", "diagnosed", 6, 7, 4, {"fault": "outer_race"})])])
    with JournalReader(tmp_path / "journal.db") as reader:
        alarm = Alarm.of(ASSET, reader.events(ASSET))
    assert (alarm.state, alarm.fault, alarm.severity) == ("unacknowledged", "outer_race", 2)
