"""The alarms of a machine are held against what was promised, and against what people found."""

import json
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from pdm.cli import app
from pdm.config import Settings
from pdm.errors import PartMissing
from pdm.loop.labels import Label
from pdm.loop.observed import Observed
from pdm.loop.performance import Episode, episodes_of, join, performance, poisson_interval, promise, share
from pdm.loop.proxies import ask_agent, engines
from pdm.model.bundle import Contract, Scored
from pdm.model.calibrate import calibrate
from pdm.model.monitor import Monitor
from pdm.stream.records import Event, Row
from pdm.stream.sinks import SqliteStore

NAME, HOP_S, DAY = "acme/bergen/hall/line2/pump", 600.0, 144
CONTRACT = Contract(name="pump", kind="mahalanobis", channels=("h",), units=("g",), rate_hz=1000, samples=8, embedding=1, training_data="0" * 64)


def record(seed=0):
    return calibrate(10 ** (np.random.default_rng(seed).normal(0, 1, 28 * DAY) / 20), HOP_S, asset=NAME)


def seen(db, rule, alarm=None, **more):
    n = len(db)
    no = np.zeros(n, bool)
    o = Observed(NAME, "vibration", "0" * 64, HOP_S, (np.arange(n) + 1) * round(HOP_S * 1e9), 10 ** (np.asarray(db) / 20), np.full(n, 10 ** (rule.threshold_db / 20)),
                 np.full(n, 0.5), no if alarm is None else alarm, np.full(n, "running"), no, no, no, np.zeros((n, 1), np.float32), {}, {})
    return replace(o, **more)


@pytest.mark.parametrize("seed", range(6))
def test_episodes_are_counted_as_the_monitor_counts_them(seed):
    rng, rule = np.random.default_rng(seed), record()
    rule = rule.model_copy(update={"quiet_s": 1800.0, "budget_db": 0.0, "adapt_s": 1e12})
    level = np.repeat(rng.choice([0.0, 0.0, 20.0], 120), rng.integers(1, 80, 120))  # quiet and loud stretches of minutes to half a day
    monitor, alarm, state = Monitor(rule, CONTRACT), [], []
    t_ns = (np.arange(len(level)) + 1) * round(HOP_S * 1e9)
    stops = rng.random(len(level)) < 0.05
    for x, t, stop in zip(10 ** (level / 20), t_ns, stops, strict=True):
        score = np.array([np.nan if stop else x], np.float32)  # what is no number says nothing
        v = monitor.update(Scored(score, score[:, None], np.zeros((1, 1), np.float32)), 0, int(t))
        alarm.append(v.alarm)
        state.append(v.state)
    o = seen(level, rule, np.array(alarm), state=np.array(state))
    p = promise(o, rule)
    assert monitor.episodes > 5 and p.episodes == monitor.episodes
    assert p.days == pytest.approx(monitor.running_s / 86_400)


def test_a_promise_that_is_kept_is_rarely_refuted_and_a_broken_one_is():
    rng, rule = np.random.default_rng(1), record()
    kept = [promise(seen(rng.normal(0, 1, 3 * DAY), rule), rule).refuted for _ in range(200)]
    broken = [promise(seen(rng.normal(3, 1, 3 * DAY), rule), rule).refuted for _ in range(20)]
    assert np.mean(kept) <= 0.05 and all(broken)


def test_time_that_is_excused_neither_counts_as_running_nor_for_its_alarms():
    rule, alarm = record(), np.zeros(10 * DAY, bool)
    alarm[2 * DAY : 6 * DAY] = True
    o = seen(np.where(alarm, 20.0, -20.0), rule, alarm)
    whole, span = promise(o, rule), (int(o.t_ns[2 * DAY - 1]), int(o.t_ns[6 * DAY]))
    rest = promise(o, rule, excused=[span])
    assert (whole.episodes, whole.refuted) == (4, True)
    assert (rest.episodes, rest.above, rest.refuted) == (0, 0, False)
    assert rest.days == pytest.approx(whole.days - 4, abs=0.02)


def test_windows_of_a_broken_sensor_or_beside_the_order_count_for_nothing():
    rule = record()
    o = seen(np.full(DAY, 20.0), rule)
    yes = np.ones(DAY, bool)
    for what in ({"broken": yes}, {"aside": yes}, {"state": np.full(DAY, "transient")}, {"score": np.full(DAY, np.nan)}):
        p = promise(replace(o, **what), rule)
        assert (p.days, p.counted, p.refuted, p.high) == (0.0, 0, False, np.inf)
    assert promise(o, rule).refuted


def test_limits_of_a_rate_are_the_exact_ones():
    assert poisson_interval(0, 1.0) == pytest.approx((0, 3.6889), abs=1e-4)     # Garwood's table
    assert poisson_interval(5, 2.0) == pytest.approx((1.6235 / 2, 11.6683 / 2), abs=1e-4)


HOUR = 3_600_000_000_000


def alarm(raised_h, cleared_h=None, asset=NAME):
    return Episode(asset, f"{asset}@{raised_h * HOUR}", raised_h * HOUR, None if cleared_h is None else cleared_h * HOUR)


def label(what, since_h, until_h=None, asset=NAME, **more):
    return Label(asset, since_h * HOUR, (since_h if until_h is None else until_h) * HOUR, what, **more)


def test_an_alarm_is_right_wrong_or_unknown_as_people_found():
    episodes = [alarm(100, 110), alarm(1000, 1010), alarm(2000, 2010), alarm(3000, 3010, "acme/bergen/hall/line2/fan")]
    labels = [label("damage", 90, 160, fault="ball"), label("inspected_healthy", 1030), label("damage", 3005)]
    judged, findings = join(episodes, labels)
    assert [e.true for e in judged] == [True, False, None, None]
    assert [(f.what, f.episode) for f in findings] == [("damage", episodes[0].id), ("damage", None)]
    assert (findings[0].delay_s, findings[0].lead_s) == (10 * 3600, 60 * 3600)


def test_who_names_the_alarm_has_the_last_word_and_a_false_one_detects_nothing():
    episode = alarm(100, 110)
    judged, (finding,) = join([episode], [label("damage", 120), label("false_alarm", 100, 110, episode=episode.id)])
    assert judged[0].true is False and finding.episode is None


def test_a_damage_counts_before_an_inspection_that_found_nothing():
    judged, _ = join([alarm(100, 110)], [label("damage", 130), label("inspected_healthy", 140)])
    assert judged[0].true is True


@pytest.mark.parametrize("found_h,told", [(110 + 23, True), (110 + 25, False), (100 - 47, True), (100 - 49, False)])
def test_an_alarm_far_from_a_finding_says_nothing_of_it(found_h, told):
    _, (finding,) = join([alarm(100, 110)], [label("failure", found_h)], before_s=24 * 3600, after_s=48 * 3600)
    assert (finding.episode is not None) is told and finding.delay_s is None


def test_labels_that_follow_one_another_are_one_finding_until_somebody_has_worked_on_the_machine():
    labels = [label("damage", 100), label("failure", 150, fault="cage"), label("maintenance", 160, 170), label("damage", 180)]
    _, findings = join([], labels)
    assert [(f.what, f.fault, f.since_ns // HOUR, f.until_ns // HOUR) for f in findings] == [("failure", "cage", 100, 150), ("damage", "", 180, 180)]


def test_alarms_of_an_asset_with_many_streams_are_counted_once_and_come_back_under_one_name():
    told = (Event(NAME, "vibration", "a@1", "raised", 1, 1, 0), Event(NAME, "vibration", "a@1", "cleared", 5, 1, 1), Event(NAME, "vibration", "a@1", "raised", 7, 1, 2),
            Event(NAME, "current", "a@9", "raised", 9, 1, 3), Event(NAME, "current", f"{NAME}@{-3}", "cleared", 3, 1, 0))
    o = replace(seen(np.zeros(3), record()), events=told)
    assert [(e.id, e.raised_ns, e.cleared_ns) for e in episodes_of([o, replace(o, stream="current")])] == [("a@1", 1, None), (f"{NAME}@-3", 3, 3), ("a@9", 9, None)]


def test_what_is_known_to_be_a_fault_is_no_false_alarm():
    rule, on = record(), np.zeros(10 * DAY, bool)
    on[2 * DAY : 3 * DAY] = on[6 * DAY : 9 * DAY] = True
    o = seen(np.where(on, 20.0, -20.0), rule, on)
    t = {k: int(o.t_ns[i]) for k, i in {"a": 2 * DAY, "b": 3 * DAY, "c": 6 * DAY, "d": 9 * DAY}.items()}
    o = replace(o, events=tuple(Event(NAME, "vibration", f"{NAME}@{t[r]}", kind, t[k], 1, 0) for k, r, kind in (
        ("a", "a", "raised"), ("b", "a", "cleared"), ("c", "c", "raised"), ("d", "c", "cleared"))))
    before = performance([o], (), {(NAME, "vibration"): rule})
    after = performance([o], [Label(NAME, t["d"], t["d"], "damage")], {(NAME, "vibration"): rule}, before_s=3600)
    assert (before.promises[0].episodes, before.precision, before.recall) == (4, None, None)
    assert [e.true for e in after.episodes] == [None, True]
    assert (after.promises[0].episodes, after.recall.value, after.lead_s) == (1, 1.0, (3 * 86_400,) * 3)
    assert after.proxies[0].in_alarm == pytest.approx(0.4, abs=0.01)


def test_a_rate_comes_with_wilsons_interval():
    assert share(0, 0) is None
    s = share(8, 10)
    assert (s.value, s.low, s.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert share(10, 10).low == pytest.approx(0.7225, abs=1e-4)


@pytest.fixture
def site(tmp_path, make_bundle, monkeypatch):
    "A fan with three weeks in the store: an alarm that stood for six hours on the tenth day, and windows of which some were scored in process."
    bundle, rule = make_bundle(), record()
    name = "acme/lyon/hall-2/line-1/fan-1"
    (tmp_path / "record.json").write_text(rule.model_copy(update={"model": bundle.digest, "asset": name}).to_json())
    (tmp_path / "assets.yaml").write_text(f"assets: [{{path: {name}, streams: {{vibration: {{bundle: {bundle.path}, calibration: record.json}}}}}}]")
    for key, value in {"STATE_DIR": tmp_path, "ASSETS": tmp_path / "assets.yaml", "ENGINE_URL": "grpc://triton:8001", "METRICS_PORT": 1}.items():
        monkeypatch.setenv(f"PREDMAINT_{key}", str(value))
    now, step, episode = time.time_ns(), round(HOP_S * 1e9), f"{name}@1"
    since = now - 21 * DAY * step
    rng, loud = np.random.default_rng(3), range(10 * DAY, 10 * DAY + 36)
    rows = [Row(name, "vibration", 1, n, since + n * step, since + n * step, 10 ** ((20 if n in loud else rng.normal()) / 20), 0.5, 0.5, 0.0, 10 ** (rule.threshold_db / 20),
                n in loud, 0, "running", "none", episode if n in loud else None, True, False, {"h": 1.0}, {}, {}, np.zeros(2, np.float32), bundle.digest,
                "inprocess" if n % 10 == 0 else "triton", committed_ns=since + n * step) for n in range(21 * DAY)]
    told = [Event(name, "vibration", episode, kind, since + n * step, 1, n, {}, committed_ns=since + n * step) for kind, n in (("raised", loud[0]), ("cleared", loud[-1] + 1))]
    store = SqliteStore(tmp_path / "store.db")
    store.write([*rows, *told])
    store.close()
    return told[0].t_ns


def test_a_finding_that_is_imported_late_turns_a_false_alarm_into_one_that_was_right(site, tmp_path):
    def shown(*words):
        done = CliRunner().invoke(app, [*words, "--json"])
        assert done.exception is None, done.exception
        return json.loads(done.stdout)

    before = shown("performance")
    assert (before["promises"][0]["episodes"], before["precision"], before["recall"]) == (1, None, None)
    assert before["scored_in_process"] == {"acme/lyon/hall-2/line-1/fan-1": pytest.approx(0.1, abs=0.001)} and "no agent answers" in before["agent"]["away"]
    found = pd.Timestamp(site + 2 * 86_400 * 10**9, unit="ns", tz="UTC")
    (tmp_path / "orders.csv").write_text(f"asset,time,what,fault\nfan-1,{found.isoformat()},damage,outer_race\n")
    assert shown("labels", "import", str(tmp_path / "orders.csv"))["new"] == 1
    after = shown("performance")
    assert (after["promises"][0]["episodes"], after["precision"]["value"], after["recall"]["value"]) == (0, 1.0, 1.0)
    assert after["lead_s"][0] == pytest.approx(2 * 86_400, abs=1)
    assert "outer_race" in CliRunner().invoke(app, ["labels", "list"]).stdout
    told = CliRunner().invoke(app, ["performance"])
    assert told.exception is None and "fan-1" in told.stdout and "stands" in told.stdout


def test_a_store_or_an_agent_that_is_away_is_named(tmp_path):
    settings = Settings(state_dir=tmp_path)
    with pytest.raises(PartMissing, match="predmaint sinks"):
        engines(settings, 0)
    with pytest.raises(PartMissing, match="no agent answers"):
        ask_agent(settings.model_copy(update={"metrics_port": 1}))
