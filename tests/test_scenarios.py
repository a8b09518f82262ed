"""Every scenario of the package, generated small and held against its own truth; what YAML may not say; `predmaint synth` as a script sees it."""

import json
import subprocess
import sys
from collections import defaultdict
from functools import cache
from math import pi, sqrt

import numpy as np
import pyarrow.parquet as pq
import pytest

from pdm.cli import main
from pdm.data.archive import Archive
from pdm.data.life import repairs
from pdm.data.scenario import PROCESS, VIBRATION, Look, Scenario, load, names, parse, write
from pdm.data.sensing import SENSOR_FAULTS
from pdm.data.synth import SHAKEN, STRUCK, shaft_velocity, strike_orders
from pdm.data.window import AssetPath
from pdm.errors import InvalidConfig
from pdm.signal.spectrum import amplitude_spectrum, squared_envelope_spectrum

LOOKS = 60
G_M_S2 = 9.80665


@cache
def small(name: str) -> tuple[Scenario, list[Look]]:
    plant = load(name).with_looks(LOOKS)
    return plant, list(plant.stream())


def by_stream(looks: list[Look]) -> dict[tuple[str, str], list[Look]]:
    found = defaultdict(list)
    for look in looks:
        found[look.truth.asset, look.window.stream].append(look)
    return found


def declared(plant: Scenario, name: str):
    return dict(plant._named())[name]


def start_ns(plant: Scenario) -> int:
    return round(plant.start.timestamp() * 1e9)


def after_s(plant: Scenario, look: Look) -> float:
    return (look.window.t0_ns - start_ns(plant)) / 1e9


def row(look: Look, channel: str) -> np.ndarray:
    return look.window.samples[look.window.channels.index(channel)].astype(float)


every_scenario = pytest.mark.parametrize("name", names())


# --- the truth of each scenario ---

@every_scenario
def test_windows_are_numbered_on_the_grid_and_carry_their_conditions(name):
    plant, looks = small(name)
    streams = by_stream(looks)
    assert {asset for asset, _ in streams} == set(plant.asset_names) and {s for _, s in streams} == {"vibration", "process"}
    apart = max(1, int(np.ceil(plant.process.samples / plant.process.rate_hz / plant.every - 1e-9)))
    for (asset, stream), mine in streams.items():
        step = apart if stream == "process" else 1
        assert [look.window.seq for look in mine] == [look.truth.seq for look in mine] == list(range(-(-LOOKS // step)))
        assert [after_s(plant, look) for look in mine] == pytest.approx([k * step * plant.every for k in range(len(mine))], abs=1e-6)
        spec, units = (plant.vibration, VIBRATION) if stream == "vibration" else (plant.process, PROCESS)
        assert len({look.window.epoch for look in mine}) == 1 and all(str(look.path) == f"{plant.path}/{asset}" for look in mine)
        for _, w, truth in mine:
            assert (w.stream, w.rate_hz, w.channels, w.units) == (stream, spec.rate_hz, spec.channels, tuple(units[c] for c in spec.channels))
            assert w.samples.shape == (len(spec.channels), spec.samples) and w.samples.dtype == np.float32 and np.isfinite(w.samples).all()
            assert (truth.asset, truth.stream, truth.t0_ns) == (asset, stream, w.t0_ns)
            assert w.conditions == {"speed_rpm": pytest.approx(truth.rpm, abs=0.06), "load": pytest.approx(truth.load, abs=1e-3),
                                    "ambient_c": pytest.approx(truth.ambient_c, abs=0.01), "running_s": pytest.approx(truth.running_s, abs=0.06)}
    ends = [look.window.t0_ns for look in looks]
    assert ends == sorted(ends) and len({look.window.epoch for look in looks}) == len(plant.asset_names)


@every_scenario
def test_a_machine_that_stands_is_silent_and_one_that_runs_is_not(name):
    plant, looks = small(name)
    for (asset, stream), mine in by_stream(looks).items():
        broken = {f.channel for f in declared(plant, asset).sensor_faults}
        if stream == "process":
            for look in mine:
                rpm = row(look, "speed_rpm")
                assert (look.truth.state == "stopped") == (rpm.max() < 1), look.truth
                assert look.truth.state != "running" or rpm.min() > 0, look.truth
                assert look.truth.rpm == pytest.approx(rpm.mean(), abs=1)
            continue
        channel = next(c for c in ("h", "v") if c not in broken)
        level = np.median([row(look, channel).std() for look in mine if look.truth.state == "running"])
        for look in mine:
            loud = row(look, channel).std() > 0.12 * level
            assert not loud or look.truth.state != "stopped", look.truth
            assert loud or look.truth.state != "running", look.truth
            assert (look.truth.state != "stopped") or (look.truth.load == look.truth.running_s == 0)


def _marks(x: np.ndarray) -> set[str]:
    "What stands out in a fast channel of a running machine, from its samples alone."
    middle, spread = np.median(x), 1.4826 * np.median(np.abs(x - np.median(x)))
    lone = np.abs(x[2:-2] - middle) > 20 * np.maximum(spread, np.abs(np.stack([x[:-4], x[1:-3], x[3:-1], x[4:]]) - middle).max(0) / 6)  # a knock rings on
    zeros = np.diff(np.flatnonzero(np.concatenate([[True], x != 0, [True]]))).max() - 1
    found = {"stuck": np.ptp(x) == 0, "dropout": np.ptp(x) > 0 and zeros > 50, "spike": spread > 0 and lone.any(),
             "clipping": np.ptp(x) > 0 and (x == x.max()).mean() > 0.05 and (x == x.min()).mean() > 0.05}
    return {kind for kind, there in found.items() if there}


@every_scenario
def test_a_sensor_is_broken_in_the_windows_that_say_so_on_that_channel_and_in_no_other(name):
    plant, looks = small(name)
    for (asset, stream), mine in by_stream(looks).items():
        levels = {c: np.median([row(look, c).std() for look in mine if look.truth.sensor == "ok"]) for c in ("h", "v") if stream == "vibration"}
        for look in mine:
            truth = look.truth
            expected = [f for f in declared(plant, asset).sensor_faults if f.at <= after_s(plant, look) + 1e-6 < f.at + f.lasts
                        and f.channel in look.window.channels]
            assert len(expected) < 2 and truth.sensor == (expected[0].kind if expected else "ok")
            assert truth.sensor_channel == ("" if not expected else "h v" if truth.sensor == "wrong_rate" else expected[0].channel)
            if stream == "process":
                off = np.abs(row(look, "bearing_de_c") - truth.temperature_c)
                if truth.sensor == "steps":
                    assert off.max() > 11 and off.min() < 1
                elif truth.sensor == "drift":
                    share = (after_s(plant, look) - expected[0].at) / expected[0].lasts
                    assert np.median(row(look, "bearing_de_c") - truth.temperature_c) == pytest.approx(expected[0].size * share, abs=0.3)
                else:
                    assert off.max() < 1, truth
                continue
            for channel in ("h", "v"):
                if truth.state == "running" and truth.fault == "none":
                    here = truth.sensor if channel in truth.sensor_channel.split() else "ok"
                    assert _marks(row(look, channel)) == ({here} - {"ok", "gain_loss", "wrong_rate"}), (truth, channel)
                    if here == "gain_loss":
                        assert row(look, channel).std() == pytest.approx(0.3 * levels[channel], rel=0.3)
                    elif here == "ok" and name == "sensor_faults":
                        assert row(look, channel).std() == pytest.approx(levels[channel], rel=0.3)


def test_a_wrong_sampling_rate_moves_every_line_by_the_same_share():
    plant = load("sensor_faults")
    plant = plant.model_copy(update={"vibration": plant.vibration.model_copy(update={"samples": 51_200}), "process": None}).with_looks(14)
    hum_hz, seen = plant.machine("motor_8").hum_hz, set()
    for look in plant.stream(["motor_8"]):
        hz, a = amplitude_spectrum(row(look, "h"), look.window.rate_hz)
        wrong = look.truth.sensor == "wrong_rate"
        there, not_there = (a[np.argmin(np.abs(hz - hum_hz / share))] for share in ((0.94, 1.0) if wrong else (1.0, 0.94)))
        assert there > 5 * not_there, look.truth
        seen.add(wrong)
    assert seen == {True, False}


@every_scenario
def test_faults_begin_at_their_onset_grow_and_end_with_their_repair(name):
    plant, looks = small(name)
    for (asset, _), mine in by_stream(looks).items():
        spec = declared(plant, asset)
        for look in mine:
            t, truth = after_s(plant, look), look.truth
            on = {w.fault: w for w in spec.wear if w.onset <= t + 1e-6 and not any(repairs(e, w) and e.at <= t + 1e-6 for e in spec.events)}
            assert truth.fault in (on or {"none"}) and (truth.severity > 0) == bool(on), truth
            assert truth.onset_ns == (start_ns(plant) + round(on[truth.fault].onset * 1e9) if on else None)
            assert not on or (truth.onset_ns <= truth.t0_ns and truth.severity <= on[truth.fault].peak * (1 + 1e-9))
            assert truth.failed == any(t + 1e-6 >= w.fails_s for w in on.values()) and (not truth.failed or truth.state == "stopped")
            assert truth.why == (truth.fault if on else truth.sensor if truth.sensor != "ok" else truth.state if truth.state != "running" else "healthy")
            struck = truth.fault in STRUCK
            orders = strike_orders(plant.machine(asset).bearing, truth.slip)
            assert 0 <= truth.slip <= 0.02 and truth.fault_hz == (pytest.approx(orders[truth.fault] * truth.rpm / 60) if struck else 0)
        for w in spec.wear:
            grown = [look.truth.severity for look in mine if look.truth.fault == w.fault]
            assert grown and max(grown) > 0.6 * w.peak or name == "contiguous"


@every_scenario
def test_events_are_told_once_in_each_stream_by_the_first_window_after_them(name):
    plant, looks = small(name)
    for (asset, stream), mine in by_stream(looks).items():
        told = {after_s(plant, look): look.truth.event for look in mine if look.truth.event}
        grid = np.array([after_s(plant, look) for look in mine])
        expected = {grid[np.argmax(grid >= e.at - 1e-6)]: e.kind for e in declared(plant, asset).events if e.at <= grid[-1]}
        assert told == expected, (asset, stream)


@every_scenario
def test_temperatures_lie_between_the_coldest_night_and_the_sum_of_all_heat(name):
    plant, looks = small(name)
    weather = plant.climate
    for (asset, _), mine in by_stream(looks).items():
        spec, thermal = declared(plant, asset), plant.types[declared(plant, asset).type].thermal
        warmer = sum(e.size for e in spec.events if e.kind == "ambient")
        load_ = max(d.load * (1 + d.swing) for d in [spec.duty, *(e.duty for e in spec.events if e.duty)]) * np.prod(
            [e.size for e in spec.events if e.kind == "load_step"])
        swing = weather.day_c + weather.year_c
        high = weather.mean_c + swing + warmer + thermal.rise_c * (0.5 + 0.5 * load_) + thermal.damage_c * sum(w.peak for w in spec.wear)
        for truth in (look.truth for look in mine):
            assert weather.mean_c - swing - 1e-6 <= truth.ambient_c <= weather.mean_c + swing + warmer + 1e-6
            assert weather.mean_c - swing <= truth.temperature_c <= high
            assert truth.temperature_c >= truth.ambient_c - 2 * swing
        if any(look.truth.state == "running" for look in mine):
            assert max(look.truth.temperature_c - look.truth.ambient_c for look in mine) > 0.3 * thermal.rise_c or name == "contiguous"


# --- what is heard of it ---

@cache
def listened(name: str, seconds: float, looks: int = 24) -> tuple[Scenario, dict[str, list[Look]]]:
    "Long windows of the assets that wear, while they run evenly."
    plant = load(name)
    fast = plant.vibration.model_copy(update={"samples": int(seconds * plant.vibration.rate_hz), "channels": ("h", "v")})
    worn = [a for a in plant.asset_names if declared(plant, a).wear]
    plant = plant.model_copy(update={"vibration": fast, "process": None}).with_looks(looks)
    found = defaultdict(list)
    for look in plant.stream(worn):
        if look.truth.state == "running":
            found[look.truth.asset].append(look)
    return plant, found


STRIKE = [(n, a) for n in names() if n != "contiguous" for a in load(n).asset_names if any(w.fault in STRUCK for w in declared(load(n), a).wear)]
SHAKE = [(n, a) for n in names() for a in load(n).asset_names if any(w.fault in SHAKEN for w in declared(load(n), a).wear)]


@pytest.mark.parametrize("name,asset", STRIKE)
def test_a_worn_bearing_shows_its_line_when_it_is_worn_and_not_before(name, asset):
    plant, found = listened(name, 6.0 if name in ("cage_healing", "inner_race_abrupt") else 2.0)
    looks, fault = found[asset], declared(plant, asset).wear[0].fault
    machine, order = plant.machine(asset), strike_orders(plant.machine(asset).bearing, 0.008)[fault]
    line, sick, speed = [], [], []
    for look in looks:
        hz, a = squared_envelope_spectrum(row(look, "h"), look.window.rate_hz, (0.85 * machine.resonances[0].hz, 1.15 * machine.resonances[0].hz))
        at = look.truth.fault_hz or order * look.truth.rpm / 60
        near, around = np.abs(hz - at) < max(0.012 * at, 2 * hz[1]), (np.abs(hz - at) < max(0.2 * at, 20 * hz[1])) & (hz > 2 * hz[1])
        line.append(a[near].max() / np.median(a[around]))
        sick.append(look.truth.severity)
        speed.append(look.truth.rpm)
        if look.truth.severity > 0.7 * max(look.truth.severity for look in looks):
            assert hz[near][a[near].argmax()] == pytest.approx(at, abs=0.006 * at + hz[1]), "at the truth's frequency"
    line, sick = np.array(line), np.array(sick)
    well, ill = line[sick == 0], line[sick > 0.7 * sick.max()]
    assert len(well) >= 3 and len(ill) >= 1 and max(sick) > 0.3
    assert np.median(ill) > 2.5 * np.median(well) and ill.min() > np.median(well), (well.round(1), ill.round(1))


@pytest.mark.parametrize("name,asset", SHAKE)
def test_a_shaken_shaft_shows_its_severity_in_mm_s_at_its_orders(name, asset):
    plant, found = listened(name, 2.0)
    machine, grown = plant.machine(asset), []
    for look in found[asset]:
        hz, a = amplitude_spectrum(row(look, "h"), look.window.rate_hz)
        shaft_hz = look.truth.rpm / 60
        expected = shaft_velocity(machine, {look.truth.fault: look.truth.severity})
        for order in (1.0, 2.0):
            near = np.abs(hz - order * shaft_hz) < 1.5
            mm_s = 1000 * G_M_S2 * sqrt((a[near] ** 2).sum() / 1.5) / sqrt(2) / (2 * pi * order * shaft_hz)  # a line's energy under the Hann window
            assert mm_s == pytest.approx(expected[order], rel=0.1, abs=0.05), (look.truth.fault, look.truth.severity, order)
        grown.append(look.truth.severity)
    assert min(grown) == 0 and max(grown) > 0.6


@pytest.mark.parametrize("name,asset", SHAKE)
def test_the_process_stream_hears_a_shaken_shaft_too(name, asset):
    _, looks = small(name)
    mine = by_stream(looks)[asset, "process"]
    velocity = {s: [row(look, "velocity_mm_s").mean() for look in mine if (look.truth.severity > 0.5) is s] for s in (True, False)}
    worst = max(mine, key=lambda look: look.truth.severity)
    assert np.median(velocity[True]) > 1.5 * np.median(velocity[False]) and row(worst, "velocity_mm_s").mean() > 7.1 * worst.truth.severity


def test_windows_that_touch_make_one_recording_whose_envelope_peaks_where_the_truth_says():
    plant = load("contiguous").model_copy(update={"process": None})
    looks = [look for look in plant.stream() if after_s(plant, look) >= 30]
    x = np.concatenate([row(look, "h") for look in looks])
    r, truth = plant.machine("motor_1").resonances[0], looks[0].truth
    assert len(x) == 30 * 25_600 and truth.fault == "outer_race"
    hz, a = squared_envelope_spectrum(x, 25_600.0, (0.8 * r.hz, 1.2 * r.hz))
    near = np.abs(hz - truth.fault_hz) < 0.1 * truth.fault_hz
    assert hz[near][a[near].argmax()] == pytest.approx(truth.fault_hz, rel=0.005)
    pulses = np.concatenate([row(look, "tacho") for look in looks]) > 2.5
    rises = np.flatnonzero(np.diff(pulses.astype(int)) > 0)
    assert np.diff(rises) / 25_600 == pytest.approx(60 / 1480, abs=1.5 / 25_600), "no turn is lost or doubled at a seam"


@pytest.mark.parametrize("with_process", [False, True])
def test_the_speed_of_the_truth_is_the_speed_in_the_window_also_while_it_changes(with_process):
    plant = load("contiguous")
    plant = plant.model_copy(update={"duration": 40.0, "seed": 3, **({} if with_process else {"process": None})})
    looks = [look for look in plant.stream() if look.window.stream == "vibration"]
    rises, last, at = [], True, []
    for look in looks:
        pulses = row(look, "tacho") > 2.5
        edges = np.flatnonzero(np.diff(np.concatenate([[last], pulses]).astype(int)) > 0)
        rises += list(after_s(plant, look) + edges / 25_600)
        last = pulses[-1]
    at = np.array(rises)
    measured = np.interp([after_s(plant, look) + 0.05 for look in looks], (at[1:] + at[:-1]) / 2, 60 / np.diff(at))
    true = np.array([look.truth.rpm for look in looks])
    ramp = (measured > 200) & (np.arange(len(looks)) < 395) & (true > 0)
    assert ramp.sum() > 200 and np.abs(true - measured)[ramp].max() < 0.03 * 1480
    stands = np.array([after_s(plant, look) + 0.1 < at[0] - 2 for look in looks])
    assert stands.sum() > 50 and (true[stands] < 100).all(), "what stands has no speed"
    assert {look.truth.state for look, still in zip(looks, stands, strict=True) if still} <= {"stopped", "transient"}


def _sides(name: str, asset: str, stream: str = "vibration") -> tuple[list[Look], list[Look]]:
    "Looks before and well after the one event of an asset."
    plant, looks = small(name)
    at = declared(plant, asset).events[0].at
    mine = by_stream(looks)[asset, stream]
    return [look for look in mine if after_s(plant, look) < at], [look for look in mine if after_s(plant, look) > at + 3600]


def test_a_remount_changes_the_level_and_nothing_else():
    before, after = _sides("maintenance", "motor_2")
    for channel in ("h", "v"):
        loud = [np.median([row(look, channel).std() for look in side]) for side in (before, after)]
        assert loud[1] / loud[0] == pytest.approx(1.6, rel=0.08)
    velocity = [np.median([row(look, "velocity_mm_s") for look in side]) for side in _sides("maintenance", "motor_2", "process")]
    assert velocity[1] / velocity[0] == pytest.approx(1.6, rel=0.05)
    assert {(look.truth.fault, look.truth.sensor, look.truth.state, look.truth.load) for look in before + after} == {("none", "ok", "running", 1.0)}


def test_a_load_step_is_in_the_conditions_and_in_the_current():
    before, after = _sides("maintenance", "motor_3", "process")
    assert {look.window.conditions["load"] for look in before} == {1.0} and {look.window.conditions["load"] for look in after} == {1.5}
    amps = [np.median([row(look, "current_a") for look in side]) for side in (before, after)]
    assert amps[1] / amps[0] == pytest.approx(np.hypot(0.33, 0.94 * 1.5) / np.hypot(0.33, 0.94), rel=0.02)
    warmer = [np.mean([look.truth.temperature_c for look in side]) for side in (before, after)]
    assert warmer[1] - warmer[0] == pytest.approx(0.25 * 40, abs=1.5)


def test_a_heat_wave_is_in_the_conditions_and_in_the_bearing():
    before, after = _sides("maintenance", "motor_5", "process")
    for what in (lambda look: look.window.conditions["ambient_c"], lambda look: row(look, "bearing_de_c").mean()):
        assert np.mean([what(look) for look in after]) - np.mean([what(look) for look in before]) == pytest.approx(12, abs=1.5)


def test_a_new_duty_stops_at_night():
    before, after = _sides("maintenance", "motor_4")
    assert {look.truth.state for look in before} == {"running"} and {"running", "stopped"} <= {look.truth.state for look in after}


def test_a_bearing_swap_changes_the_bearing_and_ends_its_fault():
    before, after = _sides("maintenance", "motor_1")
    assert len({look.truth.slip for look in before}) == len({look.truth.slip for look in after}) == 1 and before[0].truth.slip != after[0].truth.slip
    plant, looks = small("inner_race_abrupt")
    mine = by_stream(looks)["pump_1", "vibration"]
    failed = [look for look in mine if look.truth.failed]
    healed = [look for look in mine if after_s(plant, look) > 7 * 86_400]
    assert failed and max(after_s(plant, look) for look in failed) < 7 * 86_400 <= after_s(plant, healed[0]) + plant.every
    assert {(look.truth.fault, look.truth.failed) for look in healed} == {("none", False)} and healed[-1].truth.state == "running"
    assert healed[0].truth.running_s < plant.every + 1 and healed[-1].truth.temperature_c > healed[0].truth.temperature_c


def test_mornings_are_cold_and_loud_and_nobodys_fault():
    plant = load("warm_up").model_copy(update={"duration": 3 * 86_400.0, "every": 900.0})
    looks = [look for look in plant.stream(["press_1"]) if look.window.stream == "vibration" and look.truth.state == "running"]
    rms = {early: np.mean([row(look, "h").std() for look in looks if (look.truth.running_s < 1200) is early]) for early in (True, False)}
    assert rms[True] > 1.2 * rms[False] and {look.truth.why for look in looks} == {"healthy"}


def test_a_converter_follows_its_speed_in_current_and_tacho():
    _, looks = small("variable_speed")
    steady = [look for look in looks if look.window.stream == "vibration" and look.truth.state == "running"]
    rpm = np.array([look.truth.rpm for look in steady])
    assert rpm.min() < 0.6 * 1480 and rpm.max() > 0.9 * 1480
    fan = [look.truth for look in steady if look.truth.asset == "fan_1"]
    assert [t.load for t in fan] == pytest.approx([(t.rpm / 1480) ** 2 for t in fan], rel=0.02), "a fan's load goes with the square"
    assert {round(look.truth.load, 6) for look in steady if look.truth.asset == "conveyor_1"} == {1.0}


def test_seasons_go_up_and_down_and_the_bearing_with_them():
    _, looks = small("seasons")
    mine = [look for look in by_stream(looks)["pump_1", "process"]]
    month = np.array([look.window.t0_ns for look in mine]) / 86_400e9 % 365.25 // 30.5
    by_month = {m: np.mean([look.truth.temperature_c for look, k in zip(mine, month, strict=True) if k == m]) for m in (0, 6)}
    assert by_month[6] - by_month[0] > 14


def test_assets_of_a_fleet_differ_a_little_and_from_the_first_day_on():
    _, looks = small("fleet")
    levels = [np.median([row(look, "h").std() for look in mine[:15]]) for (_, stream), mine in by_stream(looks).items() if stream == "vibration"]
    assert len(levels) == 10 and 0.03 < np.std(np.log(levels)) < 0.4


# --- all of them together ---

def test_the_scenarios_of_the_package_cover_everything_that_the_generator_can_do():
    truths = [look.truth for name in names() for look in small(name)[1]]
    specs = [declared(plant, a) for plant in map(load, names()) for a in plant.asset_names]
    assert {t.fault for t in truths} == {"none", *STRUCK, *SHAKEN}
    assert {t.sensor for t in truths} == {"ok", *SENSOR_FAULTS}
    assert {e for t in truths for e in t.event.split()} == {"bearing_swap", "realign", "remount", "load_step", "new_duty", "ambient"}
    assert {t.state for t in truths} == {"running", "stopped", "transient"} and {t.failed for t in truths} == {True, False}
    assert {w.kind for s in specs for w in s.wear} == {"slow", "abrupt", "bursty", "healing"}
    assert {d.kind for s in specs for d in [s.duty, *(e.duty for e in s.events if e.duty)]} == {"constant", "shifts", "cycles", "variable"}
    types = [kind for plant in map(load, names()) for kind in plant.types.values()]
    assert any(k.built.gear_teeth for k in types) and any(k.drive.pwm_hz for k in types) and any(k.drive.slot_g for k in types)
    assert {c for n in names() for c in load(n).vibration.channels} == set(VIBRATION)
    assert all(len(load(n).about.split()) > 8 for n in names()) and len({load(n).about for n in names()}) == len(names())


def test_every_wear_has_a_long_healthy_life_before_it():
    for plant in (load(n) for n in names() if n != "contiguous"):
        for w in (w for a in plant.assets for w in a.wear):
            assert w.onset >= 0.2 * plant.duration, plant.about


def test_fewer_looks_show_the_same_plant_and_the_same_events():
    plant = load("inner_race_abrupt")
    few, more = ({after_s(plant, look): look.truth for look in plant.with_looks(n).stream()} for n in (20, 40))
    assert len(few) == 20 and set(few) <= set(more)
    for at, truth in few.items():
        assert (truth.fault, truth.state, truth.failed, truth.slip) == (more[at].fault, more[at].state, more[at].failed, more[at].slip)
        assert truth.severity == pytest.approx(more[at].severity) and truth.temperature_c == pytest.approx(more[at].temperature_c, abs=1.5)
    assert plant.with_looks(10**6) is plant


# --- YAML ---

PLAIN = """about: a test
duration: 2 d
every: 1 h
types: {{m: {{{kind}}}}}
assets: [{{name: a, type: m{asset}}}]
{more}
"""


def plain(kind="", asset="", more="") -> str:
    return PLAIN.format(kind=kind, asset=f", {asset}" if asset else "", more=more)


def test_the_plain_one_is_right():
    assert parse(plain()).looks == 48 and parse(plain(more="start: 2026-03-01T06:00:00")).start.utcoffset().total_seconds() == 0


@pytest.mark.parametrize("text,says", [
    ("- a", "a scenario is a map with about, duration, every, types and assets, got list"),
    ("", "got NoneType"),
    ("a: [", "is not YAML: .* line 1"),
    ("about: x", "duration: Field required; every: Field required"),
    (plain(more="1: 2"), "1"),
    (plain(more="duratoin: 3 d"), "duratoin: there is no such key: did you mean 'duration'"),
    (plain(more="duration: a while"), "duration: 'a while' is no duration: write a number"),
    (plain(more="duration: 10 min"), "600 s hold no window"),
    (plain(more="every: 1 ms"), r"every: a window lasts 0\.1 s"),
    (plain(more="vibration: null\nprocess: null"), "`vibration` or a `process` stream"),
    (plain(more="vibration: {channels: [x]}"), "vibration.channels.0: .*got 'x'"),
    (plain(more="vibration: {channels: []}"), "vibration.channels"),
    (plain(more="process: {channels: []}"), "process.channels"),
    (plain(more="vibration: {channels: [h, h]}"), "vibration.channels"),
    (plain(more="vibration: {rate_hz: .inf}"), "vibration.rate_hz"),
    (plain(more="start: 2026-02-30"), "day is out of range"),
    (plain(more="seed: -1"), "seed: .*greater than or equal to 0"),
    (plain(more="path: a/b"), "five levels"),
    (plain(more="assets: []"), "assets: at least one"),
    (plain(more="assets: [{name: a, type: m}, {name: a, type: m}]"), "each with a name of its own"),
    (plain(more="assets: [{name: a, type: motr}]").replace("{m:", "{motor:"), "asset a: there is no type 'motr': did you mean 'motor'"),
    (plain("rpm: 0"), "types.m.rpm: .*greater than 0"),
    (plain("rpm: .inf"), "types.m.rpm"),
    (plain("rpn: 3"), "types.m.rpn: there is no such key: did you mean 'rpm'"),
    (plain("sensor: {rnge_g: 2}"), "types.m.sensor: there is no 'rnge_g': did you mean 'range_g'"),
    (plain("sensor: {range_g: 0}"), "types.m.sensor.*range_g"),
    (plain("sensor: {bits: 0}"), "types.m.sensor.*bits"),
    (plain("machine: {teeth: 3}"), "did you mean 'gear_teeth'"),
    (plain("machine: {noise_g: .nan}"), "types.m: .*noise_g is nan"),
    (plain("machine: {load_zone: 0}"), "types.m: .*load zone > 0"),
    (plain("thermal: {tau: 0 s}"), "types.m.thermal.tau"),
    (plain("bearing: {balls: 2, ball_diameter_mm: 3, pitch_diameter_mm: 9}"), "types.m.bearing: a bearing has at least 3 balls, got 2"),
    (plain("bearing: {balls: 9}"), "types.m.bearing.ball_diameter_mm: Field required"),
    (plain(asset="duty: {kind: shift}"), "'constant', 'shifts', 'cycles', 'variable'"),
    (plain(asset="duty: {kind: shifts, from_h: 8, to_h: 7}"), "a shift ends after it begins: from_h 8, to_h 7"),
    (plain(asset="duty: {kind: cycles, period: 0}"), "period"),
    (plain(asset="duty: {kind: variable, hold: 0}"), "hold"),
    (plain(asset="wear: [{fault: outer, onset: 1 d}]"), "assets.0.wear.0.fault: .*'outer_race'.* got 'outer'"),
    (plain(asset="wear: [{fault: cage, onset: 3 d}]"), "asset a, wear: something begins after 259200 s, the scenario ends after 172800 s"),
    (plain(asset="wear: [{fault: cage, onset: -1 d}]"), "'-1 d' is no duration"),
    (plain(asset="events: [{kind: new_duty, at: 1 d}]"), "`new_duty` takes a `duty`"),
    (plain(asset="events: [{kind: realign, at: 1 d, by: 2}]"), "`realign` takes no `by`"),
    (plain(asset="events: [{kind: load_step, at: 1 d, by: 4}]"), "`by` is a factor"),
    (plain(asset="events: [{kind: load_step, at: 1 d, by: 0}]"), "`by` is a factor"),
    (plain(asset="events: [{kind: remount, at: 1 d, by: 0}]"), "`by` is a factor"),
    (plain(asset="events: [{kind: ambient, at: 1 d, by: .nan}]"), "by"),
    (plain(asset="sensor_faults: [{channel: hh, kind: stuck, at: 1 d}]"), "asset a: no stream has a channel 'hh': did you mean 'h'"),
    (plain(asset="sensor_faults: [{channel: winding_c, kind: wrong_rate, at: 1 d}]"), "`wrong_rate` is a fault of a fast channel"),
    (plain(asset="sensor_faults: [{channel: h, kind: wrong_rate, at: 1 d, size: -1}]"), "size"),
    (plain(asset="sensor_faults: [{channel: h, kind: wrong_rate, at: 1 d, size: 0}]"), "size"),
    (plain(asset="sensor_faults: [{channel: h, kind: drift, at: 1 d, size: .nan}]"), "size"),
    (plain(asset="copies: 0"), "assets.0.copies"),
])
def test_what_a_scenario_may_not_say_is_refused_with_its_place(text, says):
    with pytest.raises(InvalidConfig, match=f"(?s)^plant.yaml.*{says}"):
        parse(text, "plant.yaml")


def test_a_scenario_that_is_not_there_is_missed_by_name(tmp_path):
    with pytest.raises(InvalidConfig, match="there is no scenario 'heelthy': did you mean 'healthy'"):
        load("heelthy")
    (tmp_path / "plant.yaml").write_text(plain())
    assert load(tmp_path / "plant.yaml") == parse(plain())
    (tmp_path / "plant.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidConfig, match="plant.yaml"):
        load(tmp_path / "plant.yaml")


def test_an_asset_that_is_not_there_is_missed_by_name():
    with pytest.raises(InvalidConfig, match="there is no asset pump; there are motor_1, motor_2, motor_3"):
        next(load("healthy").stream(["motor_1", "pump"]))


# --- the command line ---

def predmaint(*args, cwd):
    return subprocess.run([sys.executable, "-m", "pdm.cli", *map(str, args)], capture_output=True, text=True, cwd=cwd)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synth")
    done = predmaint("synth", "--scenario", "inner_race_abrupt", "--windows", 30, "--seed", 5, "--out", "plant", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_synth_writes_what_the_scenario_streams(written):
    folder, told = written
    plant = load(folder / "plant" / "scenario.yaml")
    assert plant == load("inner_race_abrupt").model_copy(update={"seed": 5}).with_looks(30)
    assert told == {"scenario": "inner_race_abrupt", "windows": 60, "assets": ["pump_1"], "days": 10.0, "seed": 5, "archive": "file:plant/windows",
                    "truth": "plant/truth.parquet"}
    streamed = list(plant.stream())
    stored = {(w.stream, w.seq): (path, w) for path, w in Archive(f"file:{folder / 'plant/windows'}").read()}
    assert len(stored) == len(streamed) == 60
    for look in streamed:
        path, w = stored[look.window.stream, look.window.seq]
        assert path == look.path and (w.samples == look.window.samples).all() and w.conditions == pytest.approx(look.window.conditions)
        assert (w.epoch, w.t0_ns, w.channels, w.units) == (look.window.epoch, look.window.t0_ns, look.window.channels, look.window.units)
    rows = pq.read_table(folder / "plant" / "truth.parquet").to_pylist()
    assert rows == [vars(look.truth) for look in streamed]


def test_what_synth_wrote_can_be_trained_on_and_holds_no_fault(written):
    folder, _ = written
    truth = [t for t in pq.read_table(folder / "plant" / "truth.parquet").to_pylist() if t["stream"] == "vibration"]
    healthy = [t["seq"] for t in truth if t["state"] == "running" and t["fault"] == "none" and t["sensor"] == "ok"]
    archive = Archive(f"file:{folder / 'plant/windows'}")
    found = [w for _, w in archive.read(AssetPath.parse("synthetic/plant/hall/line/pump_1"), "vibration", why="healthy")]
    assert [w.seq for w in found] == healthy and {w.samples.shape for w in found} == {(2, 2560)} and 10 < len(healthy) < 30
    assert [w.seq for _, w in archive.read(stream="vibration", why="inner_race")] == [t["seq"] for t in truth if t["fault"] == "inner_race"]


def test_a_second_run_into_a_full_folder_is_refused_and_changes_nothing(written):
    folder, _ = written
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*")}
    done = predmaint("synth", "--scenario", "healthy", "--windows", 4, "--out", "plant", cwd=folder)
    assert done.returncode == 1 and "plant is not empty: name a new folder" in done.stderr and "Traceback" not in done.stderr
    assert {f: f.stat().st_mtime_ns for f in folder.rglob("*")} == before


@pytest.mark.parametrize("args,says", [
    (("--scenario", "healthy", "--out", "taken"), "taken"),
    (("--scenario", "healthy"), "--out DIR"),
    (("--scenario", "heelthy", "--out", "new"), "did you mean 'healthy'"),
    (("--scenario", "healthy", "--out", "new", "--windows", "0"), "--windows"),
    (("--scenario", "healthy", "--out", "new", "--seed", "-1"), "--seed"),
], ids=["file", "nowhere", "unknown", "none", "seed"])
def test_synth_refuses_with_one_and_a_sentence(tmp_path, monkeypatch, capsys, args, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(SystemExit) as end:
        main(["synth", *args])
    assert end.value.code == 1 and says in capsys.readouterr().err and [f.name for f in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("args", [(), ("--json",)])
def test_synth_without_arguments_lists_the_scenarios(tmp_path, args):
    done = predmaint("synth", *args, cwd=tmp_path)
    assert done.returncode == 0 and all(name in done.stdout for name in names())
    if args:
        assert json.loads(done.stdout) == {name: load(name).about for name in names()}


def test_write_tells_its_progress_and_keeps_every_window_of_a_day(tmp_path):
    told = []
    plant = load("contiguous").model_copy(update={"duration": 6.0})
    assert write(plant, tmp_path / "new", lambda done, total: told.append((done, total))) == 61
    assert [done for done, _ in told] == list(range(1, 62))
    assert sum(1 for _ in Archive(f"file:{tmp_path / 'new/windows'}").read()) == 61
