"When the loop acts: what a policy may say, and what it makes of a past."

import json
import re
from pathlib import Path

import pytest

from pdm.config import Settings
from pdm.errors import InvalidConfig
from pdm.loop.logbook import Evaluated, Trigger
from pdm.loop.policy import Policy, load_policy, parse_policy, rule

HOUR, DAY = 3600 * 10**9, 86_400 * 10**9
EVERY = 4 * HOUR
START = 20_500 * DAY  # a Monday
FLEET = [f"acme/munich/hall-2/line-1/pump-{k}" for k in range(1, 5)]


def seen(t_ns: int, asset: str, cause: str = "drift", probability: float = 0.95, action: str = "retrain", **details) -> Evaluated:
    told = {"since_ns": START, "clean": 500, "refuted": True, "chance": 1e-4 if details.get("refuted", True) else 0.6, "model": "d" * 64} | details
    return Evaluated(t_ns, asset, cause != "none", cause, probability, action if cause == "drift" else {"sensor": "ask", "unknown": "ask"}.get(cause, "none"), f"{cause}, it seems", told)


def days(n: float, assets=FLEET, **how) -> list[Evaluated]:
    return [seen(START + k * EVERY, a, **how) for k in range(1, round(n * 6) + 1) for a in assets]


def fleet(policy: Policy, past, triggers=(), now_ns=None):
    found = rule(policy, past, triggers, now_ns or past[-1].t_ns)
    return next(d for d in found if d.scope == "fleet")


def ended(t_ns: int, scope: str = "fleet", action: str = "retrain", **more) -> Trigger:
    return Trigger(f"{action}-{t_ns}", t_ns, scope, action, {}, **({"state": "ended", "ended_ns": t_ns, "outcome": {"exit_code": 0}} | more))


# --- what may be said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("default: {coldown: 3 d}", "policy: default.coldown: there is no such key: did you mean 'cooldown'?"),
        ("default: {cooldown: soon}", "default.cooldown: 'soon' is no duration: write a number and one of"),
        ("default: {hold: yes}", "default.hold: say why, and until when"),
        ("default: {hold: {until: 2027-01-31}}", "default.hold.reason: Field required"),
        ("default: {maintenance_windows: [{days: [sunday]}]}", "got 'sunday'"),
        ("default: {budget_per_week: -1}", "default.budget_per_week: Input should be greater than or equal to 0"),
        ("default: {begins: 0.5, ends: 0.7}", "drift ends at a probability no higher than the one at which it begins"),
        ("assets: [{match: [a], ends: 0.9}]", "assets.0 in groups.fleet: drift ends at a probability no higher"),
        ("groups: [{name: Pumps}]", "groups.0.name: String should match pattern"),
        ("groups: []", "groups: Tuple should have at least 1 item"),
        ("groups: [{name: a, retraining: {per: hall}}]", "got 'hall'"),
        ("assets: [{match: [a], cooldown: 99 d}]", "policy: assets.0: cooldown is said of a model, which a group shares: say it in that group, or in default"),
        ("assets: [{match: [a], min_clean_windows: 5, refuted: false}]", "assets.0: refuted is said of a model"),
        ("assets: [{match: [a], share: 1}]", "assets.0: share is said of a model"),
        ("assets: [{match: [a], quarantine_days: 2}]", "assets.0: quarantine_days holds for all assets together: say it in default"),
        ("groups: [{name: a, false_drifts_per_year: 2}]", "groups.0: false_drifts_per_year holds for all assets together: say it in default"),
        ("default: [", "policy is not YAML"),
        ("5", "a policy is a map with default, groups and assets, got int"),
    ],
)
def test_a_slip_in_the_policy_is_told_with_its_place_and_what_was_meant(text, said):
    with pytest.raises(InvalidConfig, match=re.escape(said)):
        parse_policy(text)


def test_the_shipped_policy_says_what_holds_without_one_and_a_file_overrules_it(tmp_path):
    assert load_policy(Settings()) == Policy()
    (tmp_path / "policy.yaml").write_text("default: {cooldown: 2 d}\n")
    assert load_policy(Settings(policy=tmp_path / "policy.yaml")).default.cooldown == 2 * 86_400
    with pytest.raises(InvalidConfig, match="can't be read"):
        load_policy(Settings(policy=Path(tmp_path / "none.yaml")))


def test_an_asset_is_ruled_by_the_default_its_group_and_itself_in_that_order():
    policy = parse_policy("""
default: {sustained: 5, cooldown: 1 d}
groups: [{name: pumps, match: ["*/pump-*"], sustained: 4}]
assets: [{match: ["*/pump-1"], sustained: 2}, {match: ["*/line-9/*"], lasting: 2 d}]""")
    assert [policy.of_asset(a).sustained for a in FLEET[:2]] == [2, 4] and policy.of_asset("acme/x/y/z/fan").sustained == 5
    assert policy.group_of("acme/x/y/z/fan") is None and policy.of_asset("acme/a/b/line-9/pump-2").lasting == 2 * 86_400


# --- what comes of it


def test_sustained_harmful_drift_of_the_fleet_is_acted_on_once_it_has_lasted():
    assert not fleet(Policy(), days(0.4)).fired
    found = fleet(Policy(), days(1))
    assert (found.action, found.fired, found.assets, found.since_ns) == ("retrain", True, tuple(FLEET), START)
    assert re.fullmatch(r"[A-Za-z0-9][\w.-]{0,79}", found.trigger) and "4 of 4 machines have drifted" in found.sentence


def test_drift_that_breaks_no_promise_is_absorbed_unless_the_policy_wants_otherwise():
    benign = days(3, refuted=False, chance=0.5)
    assert (fleet(Policy(), benign).fired, fleet(Policy(), benign).action) == (False, "none") and "absorbed, nothing to do" in fleet(Policy(), benign).sentence
    assert fleet(parse_policy("default: {refuted: false}"), benign).fired


def test_one_broken_promise_among_many_may_be_chance_and_is_a_question_about_that_machine_where_it_is_not():
    many = [f"acme/munich/hall-2/line-1/pump-{k}" for k in range(40)]

    def alike(chance: float, which: list[str]) -> list[Evaluated]:
        return [seen(START + k * EVERY, a, refuted=a in which, chance=chance if a in which else 0.6) for k in range(1, 13) for a in many]

    assert not fleet(Policy(), alike(0.03, many[:1])).fired
    past = alike(0.0005, many[:1])
    alone = fleet(Policy(), past)
    assert (alone.action, alone.trigger) == ("ask", "") and alone.assets == (many[0],)
    moved = [{"name": "conditions", "says": "load moved", "log_odds": {"drift": 2.5}}]
    assert fleet(Policy(), [r._replace(details={**r.details, "evidence": moved}) for r in past]).trigger  # its own load says why
    assert fleet(Policy(), alike(0.0005, many[:2])).trigger


def test_where_drift_lasts_a_chance_of_one_in_twenty_over_the_machines_is_a_broken_promise():
    moved = [{"name": "conditions", "says": "load moved", "log_odds": {"drift": 2.5}}]
    for chance, action in ((0.01, "retrain"), (0.02, "none")):
        past = [seen(START + k * EVERY, a, refuted=False, chance=chance if a == FLEET[0] else 0.6, evidence=moved) for k in range(1, 13) for a in FLEET]
        assert fleet(Policy(), past).action == action


@pytest.mark.parametrize("cause", ["fault", "sensor", "unknown", "none"])
def test_nothing_but_drift_retrains(cause):
    found = rule(parse_policy("default: {refuted: false, sustained: 1, lasting: 0, min_clean_windows: 0}"), days(5, cause=cause), [], START + 5 * DAY)
    assert not any(d.trigger for d in found)
    asked = [d for d in found if d.action == "ask"]
    assert len(asked) == (4 if cause in ("sensor", "unknown") else 0) and not any(d.fired for d in asked)  # they were asked days ago


def test_what_cannot_be_told_is_asked_when_it_appears_and_not_again():
    first, later = days(1 / 6, FLEET[:1], cause="unknown"), days(2 / 6, FLEET[:1], cause="unknown")
    assert [d.fired for d in rule(Policy(), first, [], first[-1].t_ns) if d.action == "ask"] == [True]
    assert [d.fired for d in rule(Policy(), later, [], later[-1].t_ns) if d.action == "ask"] == [False]


def test_hysteresis_goes_on_between_ends_and_begins_and_starts_anew_below():
    policy = Policy()
    goes_on = days(1)
    goes_on = [r._replace(probability=0.65) if r.t_ns > START + EVERY else r for r in goes_on]
    assert fleet(policy, goes_on).fired
    assert not fleet(policy, [r._replace(probability=0.65) for r in goes_on]).fired  # it never began
    dips = [r._replace(probability=0.5) if r.t_ns == START + 5 * EVERY else r for r in goes_on]
    assert not fleet(policy, dips).fired


def test_machines_of_which_no_test_says_that_they_changed_are_no_drift_of_the_fleet_whatever_they_alarm():
    policy = Policy()
    alarms = [r._replace(fired=r.asset == FLEET[0]) for r in days(1)]
    assert fleet(policy, days(1)).action == "retrain" and "1 of 4 machines has drifted" in fleet(policy, alarms).sentence and fleet(policy, alarms).action == "none"
    assert fleet(policy, [r._replace(fired=r.t_ns <= START + EVERY) for r in days(1)]).fired, "once they have, it goes on as long as it is likely"


def test_asking_often_by_hand_makes_nothing_sustained():
    often = [seen(START + EVERY + k * 60 * 10**9, a) for k in range(100) for a in FLEET]
    assert not fleet(parse_policy("default: {lasting: 0}"), often).fired


def test_a_long_silence_starts_anew():
    past = [r for r in days(3) if not START + EVERY < r.t_ns < START + 2.8 * DAY]
    assert not fleet(Policy(), past).fired and fleet(Policy(), days(3)).fired


def test_a_group_waits_for_the_stated_share_of_its_machines():
    past = [*days(2, FLEET[:1]), *days(2, FLEET[1:], cause="none")]
    assert not fleet(Policy(), past, now_ns=START + 2 * DAY).fired
    assert fleet(parse_policy("groups: [{name: fleet, share: 0.25}]"), past, now_ns=START + 2 * DAY).fired


def test_evidence_that_the_policy_names_must_have_spoken():
    policy = parse_policy("default: {evidence: [conditions]}")
    speaks = {"evidence": [{"name": "conditions", "says": "it got warm", "log_odds": {"drift": 2.0}}]}
    assert not fleet(policy, days(2)).fired and fleet(policy, days(2, **speaks)).fired


def test_who_is_out_of_proportion_to_its_group_is_asked_about_and_no_reason_to_retrain():
    past = [*days(2, FLEET[:3], refuted=False, chance=0.6), *days(2, FLEET[3:], apart=True)]
    found = rule(Policy(), sorted(past, key=lambda r: r.t_ns), [], START + 2 * DAY)
    assert not any(d.trigger for d in found) and [d.scope for d in found if d.action == "ask"] == FLEET[3:]


@pytest.mark.parametrize("apart, action", [({"apart": True}, "retrain"), ({"apart": True, "refuted": False}, "ask"), ({"refuted": False}, "ask")])
def test_a_machine_that_was_asked_about_and_alarms_is_company_for_another_one_that_does(apart, action):
    past = [*days(2, FLEET[:2], refuted=False), *days(2, FLEET[2:3]), *days(2, FLEET[3:], **apart)]
    assert fleet(Policy(), sorted(past, key=lambda r: r.t_ns)).action == action


@pytest.mark.parametrize("own, others, action", [(4.0, 3.4, "retrain"), (4.0, 2.0, "ask"), (1.0, 0.2, "ask"), (4.0, None, "ask"), (None, 4.0, "ask")])
def test_the_only_one_that_alarms_is_no_question_where_it_has_moved_no_further_than_the_others(own, others, action):
    def excess(db):
        return {} if db is None else {"excess_db": db}

    past = [*days(2, FLEET[:3], refuted=False, **excess(others)), *days(2, FLEET[3:], **excess(own))]
    assert fleet(Policy(), sorted(past, key=lambda r: r.t_ns)).action == action


# --- what keeps it from being done


def test_a_machine_on_hold_counts_for_nothing_and_where_all_that_moved_are_held_nothing_is_done():
    def held(*names: str, more: str = "", **hold: str) -> Policy:
        said = json.dumps([{"match": [f"*/{n}" for n in names], "hold": hold or {"reason": "on loan"}}])
        return parse_policy(f"assets: {said}\n{more}")

    past = days(3)
    every = fleet(held("pump-*"), past)
    assert (every.action, every.trigger, every.assets) == ("none", "", ()) and "on hold, and not counted: pump-1 (on loan; it has drifted)" in every.sentence
    some = fleet(held("pump-1"), past)
    assert some.trigger and some.assets == tuple(FLEET[1:]) and "3 of 3 machines have drifted" in some.sentence and "pump-1 (on loan; it has drifted)" in some.sentence
    assert fleet(held("pump-1", more="default: {min_clean_windows: 1600}"), past).reasons == ("1500 clean windows since then, and 1600 are wanted",)
    assert fleet(held("pump-*", reason="on loan", until="2026-02-01"), past).trigger, "that was over long ago"
    two = sorted([*days(3, FLEET[:2]), *days(3, FLEET[2:], cause="none")], key=lambda r: r.t_ns)
    assert fleet(Policy(), two).trigger and not fleet(held("pump-1"), two).trigger, "one of three is no half"
    assert fleet(held("pump-3"), two).assets == tuple(FLEET[:2]), "two of three"
    moved = sorted([*days(3, FLEET[:1]), *days(3, FLEET[1:], cause="none")], key=lambda r: r.t_ns)
    alone = fleet(held("pump-1", more="groups: [{name: fleet, share: 0.1}]"), moved)
    assert not alone.trigger and "pump-1 (on loan; it has drifted)" in alone.sentence

def test_cooldown_budget_hold_windows_and_clean_data_are_each_named_as_what_it_waits_for():
    past, now = days(12), START + 12 * DAY
    last = ended(now - 2 * DAY)
    for text, triggers, said in (
        ("default: {cooldown: 7 d}", [last], "the next may be at"),
        ("default: {cooldown: 0, budget_per_week: 2}", [ended(now - 4 * DAY), last], "2 runs in a week, and 2 may be"),
        ("default: {hold: {reason: the line is rebuilt}}", [], "it is on hold (the line is rebuilt)"),
        ("default: {maintenance_windows: [{days: [mon], from_h: 5, to_h: 6}]}", [], "the maintenance window opens at 2026-03-02 05:00"),
        ("default: {min_clean_windows: 5000}", [], "2000 clean windows since then, and 5000 are wanted"),
        ("default: {cooldown: 0}", [ended(now - 2 * DAY, state="started", ended_ns=None)], "a run is going on"),
    ):
        found = fleet(parse_policy(text), past, triggers, now)
        assert (found.action, found.fired, found.trigger) == ("retrain", False, "") and any(said in r for r in found.reasons), (text, found)
    assert fleet(parse_policy("default: {hold: {reason: holidays, until: 2026-02-01}}"), past, [], now).fired  # 16 February
    assert fleet(Policy(), past, [ended(now - 8 * DAY)], now).fired
    for code in (1, 2, 3, 4):  # what changed nothing costs a day, and no week
        assert [fleet(Policy(), past, [ended(now - round(d * DAY), outcome={"exit_code": code})], now).fired for d in (0.9, 1.1)] == [False, True]
    refused = [ended(now - d * DAY, outcome={"exit_code": 3}) for d in (7, 6, 5, 4, 3, 2, 1)]
    assert fleet(Policy(), past, refused[1:], now).fired, "each day there is more to learn from"
    assert "3 runs in a week, and 3 may be" in fleet(parse_policy("default: {budget_per_week: 3}"), past, refused[4:], now).reasons


def test_after_a_run_only_what_is_seen_of_the_new_model_counts():
    policy = parse_policy("default: {cooldown: 0}")
    past, now = days(3), START + 3 * DAY
    assert not fleet(policy, past, [ended(now - EVERY)], now).fired
    assert fleet(policy, past, [ended(START + DAY)], now).fired


def test_what_was_seen_of_another_model_is_no_evidence_against_this_one():
    past = [r._replace(details={**r.details, "model": "e" * 64}) if r.t_ns > START + 1.8 * DAY else r for r in days(2)]
    assert not fleet(Policy(), past).fired and fleet(Policy(), days(2)).fired


def test_one_machine_is_recalibrated_after_work_once_it_has_run_for_long_enough():
    def ask(clean, triggers=(), text=""):
        past = days(2, FLEET[:1], action="recalibrate", clean=clean, refuted=False)
        return next(d for d in rule(parse_policy(text), past, triggers, past[-1].t_ns) if d.scope == FLEET[0])

    assert (ask(200).action, ask(200).fired) == ("recalibrate", True) and not ask(10).fired
    assert not ask(200, [ended(START + DAY, FLEET[0], "recalibrate")]).fired  # once for one work
    assert ask(200, [ended(START - DAY, FLEET[0], "recalibrate")]).fired      # that was another one
    assert not ask(200, text="assets: [{match: ['*/pump-1'], hold: {reason: on loan}}]").fired
    past = days(2, FLEET[:1], action="recalibrate")
    assert not fleet(Policy(), past).fired  # and it is no reason to retrain


def test_a_recalibration_that_failed_for_want_of_data_is_tried_again_a_day_later():
    past = days(3, FLEET[:1], action="recalibrate", clean=500)
    for ago, fires in ((EVERY, False), (1.5 * DAY, True)):
        failed = ended(round(past[-1].t_ns - ago), FLEET[0], "recalibrate", outcome={"exit_code": 1, "reason": "too few windows"})
        assert next(d for d in rule(Policy(), past, [failed], past[-1].t_ns) if d.scope == FLEET[0]).fired == fires


def test_a_refused_recalibration_is_tried_again_a_day_later_and_after_the_second_a_person_is_asked_once():
    past = days(6, FLEET[:1], action="recalibrate", clean=500)

    def ask(hours: int, *tries: Trigger):
        now = START + hours * HOUR
        return next(d for d in rule(Policy(), [r for r in past if r.t_ns <= now], tries, now) if d.scope == FLEET[0])

    refused = {"outcome": {"exit_code": 3, "reason": "it hears less"}}
    first, second = ended(START + DAY, FLEET[0], "recalibrate", **refused), ended(START + 2 * DAY, FLEET[0], "recalibrate", **refused)
    assert ask(44, first).reasons and "it failed at" in ask(44, first).sentence and ask(48, first).trigger
    found = ask(52, first, second)
    assert (found.action, found.fired, found.trigger, found.assets) == ("ask", True, "", (FLEET[0],)) and "2 new calibrations" in found.sentence and "it hears less" in found.sentence
    later = ask(120, first, second)
    assert (later.action, later.fired, later.trigger) == ("ask", False, "") and "asked before" in later.sentence
    broke = ended(START + DAY, FLEET[0], "recalibrate", outcome={"exit_code": 4, "reason": "MemoryError"})
    assert ask(48, broke).trigger
