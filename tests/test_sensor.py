"""What a sensor's check must say of broken sensors, and must not say of hot and shaking machines."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pdm
from pdm.data.capture import Sound, current_wave
from pdm.data.sensing import SENSOR_FAULTS, break_sensor
from pdm.data.synth import STRUCK, random_machine
from pdm.data.window import Window
from pdm.errors import InvalidConfig, InvalidWindow, NotEnoughData
from pdm.signal.sensor_past import learn_sensor
from pdm.stream.asset import Owned, Version
from pdm.stream.bus import Message
from pdm.stream.intake import Accepted, Batch
from pdm.stream.judge import Judge

RATE_HZ, SAMPLES = 25_600.0, 2560


class Machine:
    "A generated machine, heard now and again, and what its sensors showed while it was well."

    def __init__(self, seed: int):
        self.rng = np.random.default_rng([31, seed])
        machine = replace(random_machine([31, seed]), knocks_per_s=0.5)
        rings = tuple(replace(r, hz=min(r.hz, 9000.0)) for r in machine.resonances)
        self.sound, self.now_s = Sound(replace(machine, resonances=rings), 1480, RATE_HZ, seed=[31, seed]), 0.0
        healthy = [self.hear() for _ in range(40)]
        self.pasts = {q: learn_sensor(np.stack([h[q] for h in healthy]), RATE_HZ, q) for q in ("vibration", "current")}

    def hear(self, samples: int = SAMPLES, load: float | None = None, **how) -> dict[str, np.ndarray]:
        self.now_s += 10.0
        load = self.rng.uniform(0.5, 1.1) if load is None else load
        heard = self.sound.capture(self.now_s, samples, load=load, **how)
        amps = current_wave(self.sound.drive, heard, load, how.get("rate_hz", RATE_HZ), 0.0, self.rng)
        return {"vibration": self.sound.sensor.convert(heard.samples)[0], "current": amps.astype(np.float32)}

    def check(self, values: np.ndarray, quantity: str = "vibration", **known):
        return pdm.check_sensor(values, RATE_HZ, quantity, past=self.pasts[quantity], **known)


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine(1)


@pytest.mark.parametrize("quantity", ["vibration", "current"])
@pytest.mark.parametrize("fault", [f for f in SENSOR_FAULTS if f != "wrong_rate"])
def test_a_wave_of_a_broken_sensor_is_caught_and_named(machine, quantity, fault):
    for seed in range(5):
        broken = break_sensor(machine.hear()[quantity], fault, SENSOR_FAULTS[fault], 1.0, np.random.default_rng(seed))
        assert machine.check(broken, quantity).fault == fault


@pytest.mark.parametrize("how", [{}, {"load": 0.05}, {"load": 1.6}, {"rough": 1.8}, {"speed": (0.2, 1.0)}, {"speed": (0.0, 0.0)},
                                 *({"faults": {f: s}} for f in (*STRUCK, "looseness", "misalignment") for s in (1.0, 4.0))], ids=str)
def test_a_machine_that_is_worn_or_runs_otherwise_is_no_broken_sensor(machine, how):
    heard = machine.hear(**how)
    for quantity in heard:
        if how.get("speed") != (0.0, 0.0) or quantity == "vibration":
            assert machine.check(heard[quantity], quantity).fault == "none"
            assert pdm.check_sensor(heard[quantity], RATE_HZ, quantity).ok


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2559), st.floats(2, 400), st.floats(0.01, 0.2))
def test_a_single_strike_is_no_spike_wherever_it_falls(at, height, damping):
    since = np.maximum(0, np.arange(SAMPLES) - at) / RATE_HZ
    strike = np.where(np.arange(SAMPLES) >= at, height * np.exp(-damping * 2 * np.pi * 4000 * since) * np.cos(2 * np.pi * 4000 * since), 0.0)
    assert pdm.check_sensor(strike + 0.1 * np.random.default_rng(at).standard_normal(SAMPLES), RATE_HZ, "vibration").ok


def test_a_wrong_rate_shows_in_3_s_of_vibration_in_the_mains_and_in_time_stamps(machine):
    slow = machine.hear(int(3 * RATE_HZ), rate_hz=0.94 * RATE_HZ)["vibration"]
    assert machine.check(slow).fault == "wrong_rate"
    assert machine.check(slow[:SAMPLES], t_s=np.array([0.0, (SAMPLES - 1) / (0.94 * RATE_HZ)])).fault == "wrong_rate"
    amps, mains_hz = machine.hear(rate_hz=0.94 * RATE_HZ)["current"], machine.sound.machine.hum_hz / 2
    assert machine.check(amps, "current", known_hz=mains_hz).fault == "wrong_rate"


def test_a_right_rate_is_not_called_wrong(machine):
    assert machine.check(machine.hear(int(3 * RATE_HZ), faults={"inner_race": 2.0})["vibration"]).ok
    right = machine.hear()
    assert machine.check(right["vibration"], t_s=np.arange(SAMPLES) / RATE_HZ * 1.005).ok  # half a per cent: clocks differ
    assert machine.check(right["current"], "current", known_hz=machine.sound.machine.hum_hz / 2).ok


class Motor:
    "Readings of two bearings and a winding, ten at a time, that follow load and hall."

    def __init__(self, seed: int = 0, n: int = 300):
        rng = np.random.default_rng(seed)
        self.load, self.hall_c = rng.uniform(0.4, 1.1, n), 20 + 5 * np.sin(np.arange(n) / 23)
        rise = (20 + 20 * self.load)[:, None] + 0.2 * rng.standard_normal((n, 1))
        self.bearing, *others = (self.hall_c[:, None] + k * rise + 0.15 * rng.standard_normal((n, 10)) for k in (1.0, 0.8, 1.4))
        self.beside, self.causes = np.stack(others, 1), np.stack([self.load, self.hall_c], 1)
        self.past = learn_sensor(self.bearing[:200], 1.0, "temperature", self.beside[:200], self.causes[:200])

    def check(self, i: int, more_c: float = 0.0, reaching: float = 0.0, **other):
        known = {"beside": self.beside[i] + reaching * more_c, "causes": self.causes[i]} | other
        return pdm.check_sensor(self.bearing[i] + more_c, 1.0, past=self.past, **known)


def test_a_drifting_thermometer_is_told_from_a_hot_bearing():
    motor = Motor()
    assert {motor.check(i).fault for i in range(200, 300)} == {"none"}
    assert {motor.check(i, 15.0).fault for i in range(200, 300)} == {"drift"}
    for share in (0.1, 0.2, 0.5, 1.0):
        answers = [motor.check(i, more_c, share) for i in range(200, 300) for more_c in (8.0, 15.0, 40.0)]
        assert all(a.ok and not a.spans and a.fault in ("none", "undetermined") for a in answers)


def test_what_the_past_has_not_seen_is_undetermined():
    motor = Motor()
    assert motor.check(250, 15.0, causes=np.array([2.5, 20.0])).fault == "undetermined"


def test_readings_that_stick_or_vanish_are_found_in_ten_of_them():
    motor = Motor()
    stuck, gone = np.full(10, motor.bearing[250, 0]), np.where(np.arange(10) < 3, 0.0, motor.bearing[250])
    assert pdm.check_sensor(stuck, 1.0).ok
    assert pdm.check_sensor(stuck, 1.0, past=motor.past).fault == "stuck"
    assert pdm.check_sensor(gone, 1.0).fault == "dropout"


def test_a_coarse_reading_that_rests_is_not_stuck():
    coarse = np.round(40 + 0.15 * np.random.default_rng(7).standard_normal((60, 10)))
    assert all(pdm.check_sensor(x, 1.0, past=learn_sensor(coarse, 1.0)).ok for x in coarse)
    assert pdm.check_sensor(np.round(12.3 + 0 * coarse[0], 1), 1.0, "current").ok


def test_a_past_must_be_of_that_sensor_and_long_enough(machine):
    with pytest.raises(NotEnoughData, match="at least 20 windows"):
        learn_sensor(np.zeros((19, 10)), 1.0)
    with pytest.raises(InvalidWindow, match="finite"):
        learn_sensor(np.full((30, 10), np.nan), 1.0)
    with pytest.raises(InvalidWindow, match="beside"):
        learn_sensor(np.zeros((30, 10)), 1.0, beside=np.zeros((30, 10)))
    with pytest.raises(InvalidConfig, match="the past is of a vibration"):
        pdm.check_sensor(np.zeros(2560), RATE_HZ, "current", past=machine.pasts["vibration"])


def test_a_broken_sensor_raises_no_machine_alarm():
    import pdm

    rng = np.random.default_rng(0)
    healthy = rng.normal(size=(160, 2, 1024)).astype(np.float32)
    det = pdm.Detector.fit(healthy[:120], 6400.0, ["h", "v"], 10.0, kind="mahalanobis", units=["g", "g"])
    louder = 4 * healthy[120:]
    gone = np.where(np.arange(1024) < 300, 0, louder).astype(np.float32)
    monitor = det.monitor()
    assert {(v.alarm, v.state, v.sensor) for v in map(monitor.step, gone)} == {(False, "unknown", "h dropout")}
    verdicts = [monitor.step(w) for w in louder]
    assert verdicts[-1].alarm and {v.sensor for v in verdicts} == {"none"}
    monitor = det.monitor()
    verdicts = [monitor.step(np.clip(4 * w, -6, 6)) for w in louder]  # so loud that the converter clips: told, and an alarm
    assert verdicts[-1].alarm and {v.sensor for v in verdicts} == {"h clipping"}


def test_windows_of_a_broken_sensor_are_not_trained_on():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(160, 1, 1024)).astype(np.float32)
    x[20:40, :, 100:600] = 0
    det = pdm.Detector.fit(x, 6400.0, ["h"], 10.0, kind="mahalanobis", units=["g"])
    assert det.report["windows_of_broken_sensors"] == 20 and det.report["windows_trained_on"] == 76
    x[:] = 0.25
    with pytest.raises(NotEnoughData, match="left out for broken sensors"):
        pdm.Detector.fit(x, 6400.0, ["h"], 10.0, kind="mahalanobis", units=["g"])


def test_a_loose_contact_is_told_once_and_not_again_after_a_restart():
    rng = np.random.default_rng(0)
    x = 3 * rng.normal(size=(60, 1, 1024)).astype(np.float32)
    det = pdm.Detector.fit(x[:1].repeat(120, 0) / 3 + 0.1 * rng.normal(size=(120, 1, 1024)), 6400.0, ["h"], 10.0, kind="mahalanobis", units=["g"])
    x[::2, :, 200:500] = 0

    def owner():
        return Owned("e/s/a/l/fan-1", "vibration", Version(det, "ab" * 32, det.monitor(), "calibration"))

    def told(owned, numbers):
        accepted = []
        for i in numbers:
            w = Window("vibration", 7, i, 0, 10_000_000_000 * i, 6400.0, ("h",), ("g",), x[i])
            accepted.append(Accepted(owned.key, w, Message("topic", b""), w.t_ns, False, False))
        judge = Judge([owned], pdm.diagnose)
        try:
            return judge.judge(Batch(accepted=accepted))
        finally:
            judge.close()

    first = owner()
    group = told(first, range(30))
    assert [(e.kind, e.seq, e.details) for e in group.events if e.kind == "sensor_fault"] == [("sensor_fault", 0, {"sensor": "h dropout"})]
    assert [("sensor_fault" in r.flags) for r in group.rows] == [i % 2 == 0 for i in range(30)]
    second = owner()
    second.recall(group.states[first.key][1])
    assert not [e for e in told(second, range(30, 60)).events if e.kind == "sensor_fault"]
