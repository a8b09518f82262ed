"The loop at work: what is asked for runs once, whoever races and whoever is killed; what is suspicious is held; a dry run leaves no trace."

import contextlib
import json
import multiprocessing
import os
import signal
import sqlite3
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from pdm.config import Settings
from pdm.data.archive import Archive
from pdm.data.scenario import parse
from pdm.data.spans import Span
from pdm.errors import InvalidInput, PartMissing
from pdm.loop.controller import Controller, Seen
from pdm.loop.labels import Label
from pdm.loop.logbook import Ask, Decided, Evaluated, Logbook
from pdm.loop.lookout import Standards
from pdm.loop.observed import Observed, watch
from pdm.loop.policy import parse_policy
from pdm.loop.quarantine import LOOP, resolve, spans_for, suspect
from pdm.model.detector import Detector
from pdm.stream.records import Event, Row

DAY, HOUR = 86_400 * 10**9, 3600 * 10**9
FLEET = [f"acme/munich/hall-2/line-1/pump-{k}" for k in range(1, 5)]
FORK = multiprocessing.get_context("spawn")


def made_up(asset: str, now_ns: int, alarms_ns: int | None = None, events: tuple = ()) -> Observed:
    t_ns = np.arange(0, now_ns, HOUR // 2, dtype=np.int64)
    n, alarm = len(t_ns), t_ns >= (now_ns if alarms_ns is None else alarms_ns)
    no = np.zeros(n, bool)
    return Observed(asset, "vibration", "d" * 64, 1800.0, t_ns, np.where(alarm, 2.0, 0.5), np.ones(n), np.where(alarm, 1e-4, 0.5), alarm, np.full(n, "running"),
                    no, no, no, np.zeros((n, 1), np.float32), {}, {}, events)  # fmt: skip


def look_at_a_warm_hall(now_ns, labels=(), spans=()):
    "Three drift from the fifth day on, and raise alarms that were not promised; one wears from the fourth."
    for k, asset in enumerate(FLEET):
        cause, since = ("fault", 4 * DAY) if k == 3 and now_ns > 4.5 * DAY else ("drift", 5 * DAY) if now_ns > 5 * DAY else ("none", None)
        told = SimpleNamespace(asset=asset, t_ns=now_ns, cause=cause, probability=0.95, evidence=(), excess_db=None, since_ns=since, sentence=f"{cause}, it seems",
                               action="retrain" if cause == "drift" else "none")  # fmt: skip
        broken = SimpleNamespace(refuted=cause == "drift", chance=0.01, chance_above=1e-6, episodes=3, days=0.5, allowed_per_day=1.0, above=3, counted=10)
        yield Seen(made_up(asset, now_ns, since), told, None, broken)


def loop_of(folder: Path, run, look=look_at_a_warm_hall, policy: str = "default: {min_clean_windows: 10}") -> Controller:
    settings = Settings(state_dir=folder, archive_url=f"file:{folder}/archive", archive_healthy_share=1.0)
    return Controller(settings, parse_policy(policy), Logbook(settings.logbook_file), run, look)


def asked(book: Logbook, *scopes: str) -> None:
    book.decide(lambda: [Ask(Decided(0, scope, "retrain", True, f"retrain-{scope}", "because")) for scope in scopes])


def told(folder: Path) -> list[list[str]]:
    file = folder / "runs.txt"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def tell(folder: Path, *words: object) -> None:
    with open(folder / "runs.txt", "a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def race(folder: Path, gate) -> None:
    "A controller among others: two weeks of turns."

    def run(trigger):
        tell(folder, "ran", trigger.id, os.getpid())
        time.sleep(0.05)
        return {"exit_code": 0}

    loop = loop_of(folder, run)
    gate.wait()
    for t_ns in range(3 * DAY, 17 * DAY, 4 * HOUR):
        loop.step(t_ns)


def decide_and_wait(folder: Path) -> None:
    "Asks for a run, and is killed before it begins it."
    loop = loop_of(folder, lambda trigger: {})
    for t_ns in range(3 * DAY, 7 * DAY, 4 * HOUR):
        if loop.decide(t_ns).triggers:
            break
    tell(folder, "claimed")
    time.sleep(60)


def begin_and_wait(folder: Path) -> None:
    "Begins the run, and is killed in the midst of it."

    def run(trigger):
        tell(folder, "began", trigger.id)
        time.sleep(60)
        return {"exit_code": 0}

    loop = loop_of(folder, run)
    for t_ns in range(3 * DAY, 7 * DAY, 4 * HOUR):
        loop.step(t_ns)


def killed(target, folder: Path, when: str) -> None:
    child = FORK.Process(target=target, args=(folder,))
    child.start()
    end = time.monotonic() + 60
    while when not in [line[0] for line in told(folder)]:
        assert time.monotonic() < end and child.is_alive(), "it never came so far"
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.join()


# --- once


def test_of_controllers_that_race_exactly_one_runs_each_trigger(tmp_path):
    gate = FORK.Barrier(3)
    children = [FORK.Process(target=race, args=(tmp_path, gate)) for _ in range(3)]
    for c in children:
        c.start()
    for c in children:
        c.join(120)
        assert c.exitcode == 0
    with Logbook(tmp_path / "loop.db") as book:
        triggers = book.triggers()
        ran = [name for _, name, _ in told(tmp_path)]
        assert len(triggers) == 2 and sorted(ran) == sorted(t.id for t in triggers), "one as the drift was sustained, one a week later, each run once"
        assert all(t.state == "ended" and t.starts == 1 for t in triggers)
        fired = [d for d in book.decisions() if d.trigger]
        assert sorted(d.trigger for d in fired) == sorted(ran)
        assert len(book.evaluations()) == len({(r.asset, r.t_ns) for r in book.evaluations()}) == 4 * 84


def test_a_controller_that_is_killed_between_decision_and_run_leaves_the_run_to_the_next(tmp_path):
    killed(decide_and_wait, tmp_path, "claimed")
    ran = []
    loop = loop_of(tmp_path, lambda trigger: ran.append(trigger) or {"exit_code": 0})
    before = loop.logbook.triggers(standing=True)
    assert [(t.state, t.starts) for t in before] == [("claimed", 0)]
    for t_ns in range(6 * DAY, 7 * DAY, 4 * HOUR):
        loop.step(t_ns)
    assert [t.id for t in ran] == [before[0].id] and ran[0].arguments == before[0].arguments
    assert [(t.state, t.starts) for t in loop.logbook.triggers()] == [("ended", 1)]


def test_a_controller_that_is_killed_in_a_run_has_the_same_trigger_run_again(tmp_path):
    killed(begin_and_wait, tmp_path, "began")
    ran = []
    loop = loop_of(tmp_path, lambda trigger: ran.append(trigger.id) or {"exit_code": 0})
    loop.step(7 * DAY)
    assert ran == [told(tmp_path)[0][1]] and [t.starts for t in loop.logbook.triggers()] == [2]


def test_what_cannot_be_reached_is_tried_again_after_longer_and_longer_pauses_and_not_for_ever(tmp_path):
    tries = []

    def away(trigger):
        tries.append(trigger.id)
        raise PartMissing("Kubeflow is away")

    often = loop_of(tmp_path / "often", away)
    for t_ns in range(5 * DAY + 4 * HOUR, 6 * DAY + 4 * HOUR, 4 * HOUR):
        often.decide(t_ns)
    for minute in range(60):
        often.carry_out(6 * DAY + minute * HOUR // 60)
    (trigger,) = often.logbook.triggers()
    assert (len(tries), trigger.state, trigger.outcome["reason"]) == (4, "waiting", "Kubeflow is away"), "at once, and after 5, 10 and 20 minutes"
    tries.clear()

    loop = loop_of(tmp_path, away)
    for t_ns in range(5 * DAY + 4 * HOUR, 8 * DAY, 4 * HOUR):
        loop.step(t_ns)
    trigger, later = sorted(loop.logbook.triggers(), key=lambda t: t.t_ns)
    assert tries.count(trigger.id) == 8 and trigger.outcome == {"exit_code": 2, "reason": "Kubeflow is away"}
    assert later.t_ns - trigger.t_ns >= DAY and set(tries) == {trigger.id, later.id}, "asked for anew a day later, and no week"


def test_a_run_that_breaks_in_a_way_nobody_thought_of_ends_with_its_reason_and_keeps_no_other_from_running(tmp_path, caplog):
    ran = []

    def breaks(trigger):
        ran.append(trigger.scope)
        raise MemoryError if trigger.scope == "first" else ValueError("shapes (3,) (4,)")

    loop = loop_of(tmp_path, breaks)
    asked(loop.logbook, "first", "second")
    loop.carry_out(DAY)
    loop.carry_out(2 * DAY)
    assert ran == ["first", "second"], "each once"
    assert [t.outcome for t in loop.logbook.triggers()] == [{"exit_code": 4, "reason": "MemoryError"}, {"exit_code": 4, "reason": "ValueError: shapes (3,) (4,)"}]
    assert "in breaks" in caplog.text, "where it broke is in the log"


def test_a_run_that_is_killed_each_time_is_begun_again_after_longer_and_longer_pauses_and_not_for_ever(tmp_path):
    class Killed(BaseException):
        pass

    tries = []

    def dies(trigger):
        tries.append(minute)
        raise Killed

    loop = loop_of(tmp_path, dies)
    loop.clock = lambda: 0
    asked(loop.logbook, "first")
    for minute in range(0, 2000, 5):
        with contextlib.suppress(Killed):
            loop.carry_out(DAY + minute * HOUR // 60)
    (trigger,) = loop.logbook.triggers()
    assert tries == [0, 5, 15, 35, 75, 155, 315, 635]
    assert (trigger.state, trigger.outcome["exit_code"]) == ("ended", 4) and "begun 8 times, and never came to an end" in trigger.outcome["reason"]


def test_pauses_begin_and_runs_end_when_they_are_over(tmp_path):
    passed, codes = [0], [2, 0]

    def takes_an_hour(trigger):
        passed[0] += HOUR
        return {"exit_code": codes.pop(0)}

    loop = loop_of(tmp_path, takes_an_hour)
    loop.clock = lambda: passed[0]
    asked(loop.logbook, "first")
    assert loop.carry_out(DAY) == [] and loop.logbook.triggers()[0].turned_ns == DAY + HOUR
    assert loop.carry_out(DAY + HOUR + HOUR // 60) == [] and len(codes) == 1, "a minute after it failed"
    (end,) = loop.carry_out(DAY + 2 * HOUR)
    assert end.ended_ns == loop.logbook.triggers()[0].ended_ns == DAY + 3 * HOUR


def test_a_gate_that_says_no_ends_the_run_and_its_reason_is_kept(tmp_path):
    loop = loop_of(tmp_path, lambda trigger: {"exit_code": 3, "reason": "it hears less"})
    for t_ns in range(5 * DAY + 4 * HOUR, 8 * DAY, 4 * HOUR):
        loop.step(t_ns)
    triggers = loop.logbook.triggers()
    assert {t.outcome["reason"] for t in triggers} == {"it hears less"}
    assert len(triggers) == 3 and all(later.t_ns - t.t_ns == DAY for t, later in zip(triggers, triggers[1:], strict=False)), "a day later there is more to learn from"


def test_a_mistake_in_a_turn_writes_nothing_of_it(tmp_path):
    loop = loop_of(tmp_path, lambda trigger: {})
    with pytest.raises(InvalidInput, match="was asked for already"):
        again = Ask(Decided(DAY, "fleet", "retrain", True, "retrain-1", "because"))
        loop.logbook.decide(lambda: [again])
        loop.logbook.decide(lambda: [Ask(Decided(DAY, "other", "none", False, "", "nothing")), again])
    assert [d.scope for d in loop.logbook.decisions()] == ["fleet"]


def test_rows_of_the_past_are_added_to_and_a_damaged_logbook_is_not_begun_anew(tmp_path):
    with Logbook(tmp_path / "loop.db") as book:
        held = book.hold(FLEET[0], DAY, None, "it whistles", "igor", DAY)
        for state in ("sound", "open", "kept"):
            book.turn(held.id, state, "hannah", "on second thoughts", 2 * DAY)
        assert [h.state for h in book.held()] == ["kept"]
    with sqlite3.connect(tmp_path / "loop.db") as db:
        assert db.execute("SELECT count(*) FROM held_turn").fetchone() == (3,)
    (tmp_path / "loop.db").write_bytes(b"\0" * 8192)
    with pytest.raises(PartMissing, match="damaged, or can't be written"):
        Logbook(tmp_path / "loop.db")
    assert (tmp_path / "loop.db").read_bytes() == b"\0" * 8192


@pytest.mark.parametrize("table", ["held", "evaluation"])
def test_damage_is_told_when_a_logbook_is_opened_and_in_what_grows_for_years_when_that_is_read(tmp_path, table):
    with Logbook(tmp_path / "loop.db") as book:
        book.add_evaluations([looked_at(t_ns) for t_ns in range(100)])
        book.hold(FLEET[0], DAY, None, "it whistles", "igor", DAY)
        size = book._db.execute("PRAGMA page_size").fetchone()[0]
        page = book._db.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", [table]).fetchone()[0]
    with open(tmp_path / "loop.db", "r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    if table == "held":
        with pytest.raises(PartMissing, match="damaged"):
            Logbook(tmp_path / "loop.db")
        return
    with Logbook(tmp_path / "loop.db") as book:
        assert len(book.held()) == 1
        with pytest.raises(PartMissing, match="damaged"):
            book.evaluations()


# --- held


def test_a_worn_machine_of_a_drifting_fleet_is_held_from_its_onset_and_its_run_is_told(tmp_path):
    ran = []
    loop = loop_of(tmp_path, lambda trigger: ran.append(trigger) or {"exit_code": 0})
    for t_ns in range(3 * DAY, 7 * DAY, 4 * HOUR):
        loop.step(t_ns)
    (run,) = ran
    spans = [Span.parse(s) for s in run.arguments["spans"]]
    assert [(s.asset, s.since_ns, s.until_ns) for s in spans if s.what == "held"] == [(FLEET[3], 4 * DAY, None)]
    assert {s.asset for s in spans if s.what == "sound"} == set(FLEET[:3]) and all(s.since_ns == 5 * DAY and s.until_ns == run.t_ns for s in spans if s.what == "sound")
    assert run.arguments["assets"] == [], "of everything that the archive holds"
    excused = json.loads(run.arguments["excused"])
    assert [e["champion"] for e in excused] == ["d" * 64] and set(excused[0]["streams"]) == {f"{a}/vibration" for a in FLEET[:3]}
    assert loop.logbook.held(state="open")[0].cause == "fault"


@pytest.mark.parametrize(("cause", "by", "since", "held"), [("fault", LOOP, 6 * DAY, True), ("unknown", LOOP, 6 * DAY, True), ("alarm", LOOP, 6 * DAY, True), ("sensor", LOOP, 6 * DAY, False),
                                                           ("fault", "igor", 6 * DAY, False), ("fault", LOOP, 4 * DAY, False)],
                         ids=["fault", "unknown", "alarm", "a sensor was sound before", "a person says since when", "it began before the drift"])
def test_a_machine_under_suspicion_teaches_nothing_since_its_group_drifted(tmp_path, cause, by, since, held):
    with Logbook(tmp_path / "log.db") as book:
        one = book.hold(FLEET[0], since, None, "so it seems", by, 7 * DAY, cause)
        told = [Span.parse(s) for s in spans_for(book, [], 5 * DAY, 7 * DAY)]
        assert told == [one.span, *([Span(FLEET[0], 5 * DAY - 12 * HOUR, None, "held")] if held else [])]
        book.turn(one.id, "kept", "igor", "damage", 7 * DAY)
        assert len(spans_for(book, [], 5 * DAY, 7 * DAY)) == len(told), "what somebody has found damaged teaches no more than what is suspected"
        book.turn(one.id, "free", LOOP, "it was nothing", 7 * DAY, 7 * DAY)
        assert spans_for(book, [], 5 * DAY, 7 * DAY) == []


def test_a_group_is_trained_on_its_own_machines_and_a_fleet_on_all(tmp_path):
    ran = []
    policy = "{default: {min_clean_windows: 10}, groups: [{name: front, match: ['*/pump-1', '*/pump-2']}, {name: rest}]}"
    loop = loop_of(tmp_path, lambda trigger: ran.append(trigger) or {"exit_code": 0}, policy=policy)
    for t_ns in range(3 * DAY, 7 * DAY, 4 * HOUR):
        loop.step(t_ns)
    assert {t.scope: t.arguments["assets"] for t in ran} == {"front": FLEET[:2], "rest": FLEET[2:]}


def test_a_label_and_work_on_the_machine_let_go_what_the_loop_held(tmp_path):
    said: list[Event] = []

    def look(now_ns, labels=(), spans=()):
        for s in look_at_a_warm_hall(now_ns):
            events = tuple(e for e in said if e.asset == s.observed.asset)
            yield Seen(made_up(s.observed.asset, now_ns, None, events), s.attribution, s.drift, s.promise)

    loop = loop_of(tmp_path, lambda trigger: {"exit_code": 0}, look)
    loop.step(5 * DAY)
    assert [h.state for h in loop.logbook.held()] == ["open"]
    said.append(Event(FLEET[3], "", "", "maintenance", 5 * DAY + HOUR, 0, -1, {"what": "bearing replaced", "by": "igor"}))
    loop.step(5 * DAY + 4 * HOUR)
    first = loop.logbook.held()[0]
    assert (first.state, first.until_ns, first.turned_by) == ("kept", 5 * DAY + HOUR, "igor")
    assert all(h.since_ns >= 5 * DAY + HOUR for h in loop.logbook.held()[1:]), "what was before is not held twice"

    other = loop_of(tmp_path / "other", lambda trigger: {"exit_code": 0})
    other.step(5 * DAY)
    other.logbook.add_labels([Label(FLEET[3], 5 * DAY, 5 * DAY, "false_alarm", by="hannah")], 5 * DAY)
    other.step(5 * DAY + 4 * HOUR)
    assert other.logbook.spans()[0].what == "sound"


def test_work_on_a_machine_that_is_still_called_faulty_opens_no_gap_in_what_is_held_and_the_loop_goes_on(tmp_path):
    ran, said = [], []

    def look(now_ns, labels=(), spans=()):
        for s in look_at_a_warm_hall(now_ns):
            yield Seen(made_up(s.observed.asset, now_ns, None, tuple(e for e in said if e.asset == s.observed.asset and e.t_ns < now_ns)), s.attribution, s.drift, s.promise)

    loop = loop_of(tmp_path, lambda trigger: ran.append(trigger) or {"exit_code": 0}, look)
    fires = 5 * DAY + 12 * HOUR
    said.append(Event(FLEET[3], "", "", "operation", fires - HOUR, 0, -1, {"what": "started"}))
    for t_ns in range(3 * DAY, 7 * DAY, 4 * HOUR):
        loop.step(t_ns)
    (run,) = ran
    assert run.t_ns == fires, "the look that is told of the work is the one that trains"
    spans = [Span.parse(s) for s in run.arguments["spans"]]
    assert [(s.since_ns, s.until_ns) for s in spans if s.what == "held"] == [(4 * DAY, fires - HOUR), (fires - HOUR, None), (5 * DAY - 12 * HOUR, None)]
    assert [(h.state, h.since_ns) for h in loop.logbook.held()] == [("kept", 4 * DAY), ("open", fires - HOUR)], "what began with the work is not ended by it"


def looked_at(t_ns: int, cause: str = "none", windows: int = 48) -> Evaluated:
    return Evaluated(t_ns, FLEET[0], cause != "none", cause, 0.9, "none", f"{cause}, it seems", {"windows": windows})


@pytest.mark.parametrize(
    ("runs", "days", "frees"),
    [(lambda d: True, range(17), True), (lambda d: d == 2, range(17), False), (lambda d: d % 7 < 5, range(17), True), (lambda d: True, (0, 16), False)],
    ids=["always", "stands still but for a day", "five days a week", "nobody looked"],
)
def test_time_frees_only_a_machine_that_was_seen_to_run_without_suspicion(tmp_path, runs, days, frees):
    with Logbook(tmp_path / "loop.db") as book:
        suspect(book, [looked_at(DAY, "unknown")])
        for t_ns in (DAY + d * DAY + k * 4 * HOUR for d in days for k in range(1, 7)):
            book.add_evaluations([looked_at(t_ns, windows=48 * runs(t_ns // DAY))])
            resolve(book, [], [], t_ns)
        assert [h.state for h in book.held()] == ["free" if frees else "open"]


def test_one_machine_is_calibrated_anew_after_work_with_its_windows_since_then_and_once(tmp_path):
    def look(now_ns, labels=(), spans=()):
        for k, asset in enumerate(FLEET):
            moved = k == 0 and now_ns > 4 * DAY
            told = SimpleNamespace(asset=asset, t_ns=now_ns, cause="drift" if moved else "none", probability=0.97, evidence=(), excess_db=None, since_ns=4 * DAY if moved else None,
                                   sentence="people worked on it", action="recalibrate" if moved else "none")  # fmt: skip
            yield Seen(made_up(asset, now_ns, 4 * DAY if moved else None), told, None, None)

    ran = []
    loop = loop_of(tmp_path, lambda trigger: ran.append(trigger) or {"exit_code": 0}, look, "")
    for t_ns in range(3 * DAY, 10 * DAY, 4 * HOUR):
        loop.step(t_ns)
    (run,) = ran
    assert (run.action, run.scope) == ("recalibrate", FLEET[0]) and run.t_ns >= 4 * DAY + 75 * HOUR, "150 windows of half an hour"
    told = run.arguments
    assert (told["asset"], told["stream"], told["model"], told["since"]) == (FLEET[0], "vibration", "d" * 64, "1970-01-05T00:00:00+00:00")
    assert [str(Span.parse(s)) for s in told["spans"]] == [str(Span(FLEET[0], 4 * DAY, run.t_ns, "sound"))]
    assert not loop.logbook.held(), "an alarm that drift explains is no suspicion"
    assert "sounds otherwise since the work" in told["why"], "the champion's alarms since then are no measure in the shadow"


def test_what_was_held_before_anybody_could_tell_is_free_once_work_explains_it(tmp_path):
    def look(now_ns, labels=(), spans=()):
        cause, action = ("none", "none") if now_ns <= 4 * DAY else ("unknown", "ask") if now_ns < 4 * DAY + 13 * HOUR else ("drift", "recalibrate")
        told = SimpleNamespace(asset=FLEET[0], t_ns=now_ns, cause=cause, probability=0.97, evidence=(), excess_db=None, since_ns=4 * DAY if cause != "none" else None, sentence=cause, action=action)
        yield Seen(made_up(FLEET[0], now_ns, 4 * DAY if cause != "none" else None), told, None, None)

    ran = []
    loop = loop_of(tmp_path, lambda trigger: ran.append(trigger) or {"exit_code": 0}, look, "")
    for t_ns in range(3 * DAY, 5 * DAY, 4 * HOUR):
        loop.step(t_ns)
    assert [(h.state, h.cause, h.turned_why) for h in loop.logbook.held()] == [("free", "unknown", "people worked on it, and it sounds otherwise since then")]
    for t_ns in range(5 * DAY, 8 * DAY, 4 * HOUR):
        loop.step(t_ns)
    assert [t.action for t in ran] == ["recalibrate"]


def test_of_what_is_released_up_to_a_day_the_rest_stays_held(tmp_path, monkeypatch):
    monkeypatch.setenv("PREDMAINT_STATE_DIR", str(tmp_path))
    assert shell("quarantine", "hold", FLEET[0], "--since", "2026-01-01", "--why", "it whistles").exit_code == 0
    assert shell("quarantine", "release", "1", "--until", "2026-01-03", "--why", "that was the fan", "--by", "hannah").exit_code == 0
    with Logbook(tmp_path / "loop.db") as book:
        assert [str(s) for s in book.spans()] == [f"{FLEET[0]} 2026-01-01T00:00:00+00:00 2026-01-03T00:00:00+00:00 sound", f"{FLEET[0]} 2026-01-03T00:00:00+00:00 - held"]
        with pytest.raises(InvalidInput, match="ends later than that"):
            book.turn(2, "sound", "hannah", "a slip", 2 * DAY, 3 * DAY)


def test_a_week_that_somebody_holds_becomes_no_reference(tmp_path):
    record = Detector.fit(np.random.default_rng(1).normal(size=(120, 1, 256)), rate_hz=256.0, channels=["h"], hop_s=1800.0, kind="mahalanobis").calibration
    o, held = made_up(FLEET[0], 20 * DAY), Span(FLEET[0], 0, 3 * DAY, "held")
    standards = Standards(Settings(state_dir=tmp_path), learn=False)
    made = standards._first_week(o, record, [held])
    assert made.t_ns[0] == 3 * DAY and standards._first_week(o, record, []).t_ns[0] == 0
    assert standards._first_week(o, record, [Span(FLEET[0], 0, None, "held")]) is None


def test_a_label_that_was_wrong_is_taken_back_by_its_author_and_what_it_kept_is_sound(tmp_path):
    def says(what: str, by: str = "hannah") -> Label:
        return Label(FLEET[0], 2 * DAY, 2 * DAY, what, by=by)

    with Logbook(tmp_path / "loop.db") as book:
        suspect(book, [looked_at(DAY, "unknown")])

        def after(labels: list[Label]) -> tuple:
            new = book.add_labels(labels, 3 * DAY)
            resolve(book, book.labels(), [], 3 * DAY)
            return new, [x.what for x in book.labels()], [h.state for h in book.held()]

        assert after([says("damage"), says("maintenance")]) == (2, ["damage", "maintenance"], ["kept"]), "what is said at once is said together"
        assert after([says("damage")]) == (0, ["damage", "maintenance"], ["kept"]), "the same again"
        assert after([says("false_alarm")]) == (1, ["false_alarm"], ["sound"])
        assert after([says("damage", "igor")])[1] == ["damage", "false_alarm"], "somebody else sees it otherwise"
        assert sorted(after([says("process")])[1]) == ["damage", "process"] and sorted(after([says("false_alarm")])[1]) == ["damage", "false_alarm"], "and back again"
        assert book._db.execute("SELECT count(*) FROM label").fetchone() == (6,), "nothing is taken out"


# --- looked back


def test_a_dry_run_leaves_no_trace_and_says_what_the_loop_did(tmp_path):
    loop = loop_of(tmp_path, lambda trigger: {"exit_code": 0})
    for t_ns in range(3 * DAY, 10 * DAY, 4 * HOUR):
        loop.step(t_ns)
    before = [len(x) for x in (loop.logbook.evaluations(), loop.logbook.decisions(), loop.logbook.triggers(), loop.logbook.held())]
    acted = [(t_ns, d.trigger) for t_ns, ds in loop.replay(0, 10 * DAY) for d in ds if d.trigger]
    assert acted == [(t.t_ns, t.id) for t in loop.logbook.triggers()] and len(acted) == 1
    anew = [(t_ns, d.scope) for t_ns, ds in loop.replay(0, 10 * DAY, anew=True) for d in ds if d.trigger]
    assert anew == [(acted[0][0], "fleet")]
    assert before == [len(x) for x in (loop.logbook.evaluations(), loop.logbook.decisions(), loop.logbook.triggers(), loop.logbook.held())]


# --- the whole, of a site that was made


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A hall whose history lies in a real store: two pumps drift together from the fifth day on. Its settings as environment variables."
    from pdm.data.training import gather
    from pdm.loop.act import references_of
    from pdm.model.detector import Detector
    from pdm.model.transport import gather as release_of
    from pdm.stream.sinks import SqliteStore

    home = tmp_path_factory.mktemp("site")
    start_ns = time.time_ns() - 8 * DAY
    plant = parse(yaml.safe_dump({
        "about": "pumps in a hall that gets warm", "duration": "8 d", "every": "1 h", "process": None, "vibration": {"samples": 512},
        "start": time.strftime("%Y-%m-%dT%H:00:00Z", time.gmtime(start_ns / 1e9)),
        "types": {"pump": {"rpm": 2950, "seed": 38, "machine": {"gear_teeth": 0, "noise_g": 0.15}}},
        "assets": [{"name": "pump", "type": "pump", "copies": 3, "duty": {"kind": "constant", "swing": 0.1},
                    "events": [{"kind": "new_duty", "at": "5 d", "duty": {"kind": "variable", "low": 0.5}}, {"kind": "ambient", "at": "5 d", "by": 14}]}]}))  # fmt: skip
    settings = Settings(state_dir=home / "state", archive_url=f"file:{home}/archive", archive_healthy_share=1.0)
    taken: dict[str, list] = {}
    with Archive(settings.archive_url) as archive:
        for one in plant.stream():
            taken.setdefault(str(one.path), []).append(one.window)
            archive.add(one.path, one.window, "healthy")
    data = gather(settings.archive_url, name="pump", until=time.strftime("%Y-%m-%dT%H:00", time.gmtime(start_ns / 1e9 + 4.9 * 86_400)))
    detector = Detector.fit(**data.fit_arguments(), kind="mahalanobis")
    bundle, _ = detector.export(settings.bundles_dir, revision=1)
    references_of(detector, data, release_of(bundle.path)[-1])
    rows = []
    for asset, windows in taken.items():
        causes = {k: np.array([w.conditions[k] for w in windows]) for k in data.condition_names}
        o = watch(detector, asset, "vibration", np.stack([w.samples for w in windows]), np.array([w.t_ns for w in windows]), causes)
        rows += [Row(asset, "vibration", 1, k, int(o.t_ns[k]), w.t0_ns, o.score[k], o.p_value[k], o.p_value[k], 0.0, o.threshold[k], bool(o.alarm[k]), 0, str(o.state[k]), "none",
                     None, True, bool(o.extrapolating[k]), {}, {n: float(v[k]) for n, v in o.indicators.items()}, {n: float(v[k]) for n, v in o.conditions.items()},
                     o.embedding[k], bundle.digest, "triton", id=len(rows) + k + 1) for k, w in enumerate(windows)]  # fmt: skip
    store = SqliteStore(settings.state_dir / "store.db")
    store.write(rows)
    store.close()
    return {"PREDMAINT_STATE_DIR": str(settings.state_dir), "PREDMAINT_ARCHIVE_URL": settings.archive_url, "PREDMAINT_PIPELINE_ROOT": f"file:{home}/runs",
            "PREDMAINT_ARCHIVE_HEALTHY_SHARE": "1", "PREDMAINT_TRACKING_URL": f"sqlite:{home}/mlflow.db"}  # fmt: skip


def shell(*words: str):
    from pdm.cli import app

    return CliRunner().invoke(app, list(words), catch_exceptions=False)


def test_predmaint_drift_looks_at_a_site_says_what_it_saw_and_makes_a_page_of_it(site, monkeypatch):
    for k, v in site.items():
        monkeypatch.setenv(k, v)
    seen = json.loads(shell("drift", "--json").output)
    assert {r["cause"] for r in seen["evaluations"]} == {"drift"} and len(seen["evaluations"]) == 3
    assert [d["scope"] for d in seen["decisions"]][0] == "fleet" and not any(d["trigger"] for d in seen["decisions"]), "one look is not sustained"
    page = Path(seen["report"].removeprefix("file:"))
    assert "held back" in page.read_text() and (page.parent / "plots").is_dir()
    assert "machines have drifted" in shell("drift", "--since", "1h").output or "no machine has drifted for long enough" in shell("drift", "--since", "1h").output
    assert json.loads(shell("quarantine", "list", "--json").output) == []


def test_retrain_explain_finds_the_day_on_which_it_would_have_acted_in_history_alone(site, monkeypatch, tmp_path):
    for k, v in site.items():
        monkeypatch.setenv(k, v)
    policy = tmp_path / "policy.yaml"
    policy.write_text("default: {refuted: false, min_clean_windows: 20}\n")
    monkeypatch.setenv("PREDMAINT_POLICY", str(policy))
    monkeypatch.setenv("PREDMAINT_LOOP_EVERY", "12")
    monkeypatch.setenv("PREDMAINT_STATE_DIR", site["PREDMAINT_STATE_DIR"])
    book = Path(site["PREDMAINT_STATE_DIR"]) / "loop.db"
    for ending in ("", "-wal", "-shm"):
        Path(f"{book}{ending}").unlink(missing_ok=True)  # nobody has looked yet
    told = json.loads(shell("retrain", "--explain", "--since", "4d", "--json").output)
    assert told["evaluations"] >= 7 and [d["action"] for d in told["decisions"] if d["fired"] and d["scope"] == "fleet"] == ["retrain"]
    with Logbook(book) as empty:
        assert not empty.evaluations() and not empty.decisions() and not empty.triggers()
