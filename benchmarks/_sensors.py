"""How often a broken sensor is caught, and a hot or shaking machine called a broken sensor. Shared part of detect.py.

A case is one window (of a vibration's wrong rate one capture of 3 s) of one sensor, broken by `break_sensor` at its usual size, and the sensor's healthy past: 40
windows of a wave, three days of readings. Limits were chosen on generated machines of other seeds and on FEMTO's bearings 1_1 and 1_2, which are
reported apart; all other real records were run while the rules were made, and no limit was set by them. What can't be told from such a window is listed under `not counted`, with what comes out and why.
"""

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import chain, count

import numpy as np
from _bench import check

from pdm.data import femto, mfpt
from pdm.data.capture import Sound, current_wave
from pdm.data.scenario import load, parse
from pdm.data.sensing import SENSOR_FAULTS, break_sensor
from pdm.data.synth import SHAKEN, STRUCK, random_machine
from pdm.errors import PartMissing
from pdm.signal.sensor import check_sensor
from pdm.signal.sensor_past import learn_sensor

RATE_HZ, SAMPLES, CAPTURE_S = 25_600.0, 2560, 3.0
TEST = 7919   # seed; limits were chosen on others
DUTIES = {"constant": "{kind: constant}", "swinging": "{kind: constant, swing: 0.2}", "shifts": "{kind: shifts, days: 7}",
          "cycles": "{kind: cycles, period: 2 h, share: 0.6}", "variable": "{kind: variable, low: 0.5, hold: 40 min}"}
READINGS = {  # quantity: column, columns beside it, least share of a change that reaches them: a current makes its power
    "temperature": (0, (1, 2), 0.1), "current": (3, (5,), 0.8), "speed": (6, (3, 4), 0.1)}
NOT_COUNTED = {
    ("current reading", "clipping"): "one standard deviation of ten readings is noise: nothing is cut off that a range could cut",
    ("temperature", "clipping"): "one standard deviation of ten readings is 0.15 K: nothing is cut off that a range could cut",
    ("speed", "clipping"): "one standard deviation of ten readings is 0.5 rpm",
    ("speed", "stuck"): "a governed shaft keeps its speed for hours, and its reading has steps of 1 rpm",
    ("speed", "spike"): "thirty standard deviations are 9 to 15 rpm, which a shaft can do, there and back",
    ("speed", "steps"): "12 rpm, which slip can do",
    ("speed", "drift"): "15 rpm, which slip can do",
    ("vibration", "wrong_rate, 0.1 s"): "at 6 % of it, no line and no resonance is sharp enough in a tenth of a second, without time stamps",
}


class Tally:
    "What was called what."

    def __init__(self) -> None:
        self.broken: defaultdict[tuple[str, str], Counter] = defaultdict(Counter)
        self.alone: defaultdict[tuple[str, str], Counter] = defaultdict(Counter)
        self.real: defaultdict[str, Counter] = defaultdict(Counter)

    def wrong(self, quantity: str, fault: str, values: np.ndarray, rate_hz: float, **known: object) -> None:
        "A broken sensor: with what is known of it, and without."
        name = quantity.split()[0]
        self.broken[quantity, fault][check_sensor(values, rate_hz, name, **known).fault] += 1
        self.alone[quantity, fault][check_sensor(values, rate_hz, name).ok] += 1

    def sound(self, source: str, quantity: str, values: np.ndarray, rate_hz: float, **known: object) -> None:
        "A sound one, on a machine that is well or not: neither way may find a fault."
        with_past, without = (check_sensor(values, rate_hz, quantity.split()[0], **k) for k in (known, {}))
        self.real[source][with_past.fault if without.ok else f"{without.fault}, without a past"] += 1


class Heard:
    "A generated machine, heard for a moment every ten seconds on two axes and in its current."

    def __init__(self, seed: int):
        self.rng, drawn = np.random.default_rng([TEST, seed]), random_machine([TEST, seed])
        rings = tuple(r if r.hz < 9000 else replace(r, hz=5000 + 0.3 * (r.hz - 9000)) for r in drawn.resonances)
        self.sound = Sound(replace(drawn, resonances=rings), self.rng.uniform(600, 3000), RATE_HZ, seed=[TEST, seed, 1])
        self.mains_hz, self.starts = drawn.hum_hz / 2, count(0, 10)

    def __call__(self, samples: int = SAMPLES, load: float | None = None, **how: object) -> dict[str, np.ndarray]:
        load = self.rng.uniform(0.4, 1.1) if load is None else load
        heard = self.sound.capture(float(next(self.starts)), samples, load=load, **how)
        drive = self.sound.drive if how.get("speed", (1.0, 1.0))[1] >= 0.02 else replace(self.sound.drive, rated_a=0.0)
        shaken = max((v for f, v in how.get("faults", {}).items() if f in SHAKEN), default=0.0)
        amps = current_wave(drive, heard, load, how.get("rate_hz", RATE_HZ), shaken, self.rng)
        return dict(zip("hv", self.sound.sensor.convert(heard.samples), strict=True)) | {"current": amps.astype(np.float32)}


def waves(tally: Tally, machine_seeds: range) -> None:
    "Two axes and a motor's current."
    for seed in machine_seeds:
        window = Heard(seed)
        healthy = [window() for _ in range(40)]
        names = {"h": "vibration", "v": "vibration", "current": "current"}
        known: dict[str, dict] = {c: {"past": learn_sensor(np.stack([w[c] for w in healthy]), RATE_HZ, q)} for c, q in names.items()}
        known["current"]["known_hz"] = window.mains_hz
        for fault, size in SENSOR_FAULTS.items():
            for _ in range(2):
                w = window(rate_hz=RATE_HZ * size) if fault == "wrong_rate" else window()
                for c, q in names.items():
                    label = "wrong_rate, 0.1 s" if (q, fault) == ("vibration", "wrong_rate") else fault
                    tally.wrong(q, label, break_sensor(w[c], fault, size, 1.0, window.rng), RATE_HZ, **known[c])
        for seconds in (1.0, CAPTURE_S):
            w = window(int(seconds * RATE_HZ), rate_hz=RATE_HZ * SENSOR_FAULTS["wrong_rate"])
            for c in "hv":
                tally.wrong("vibration", "wrong_rate" if seconds == CAPTURE_S else "wrong_rate, 1 s", w[c], RATE_HZ, **known[c])
        x, true_hz = window()["h"], RATE_HZ * SENSOR_FAULTS["wrong_rate"]
        tally.wrong("vibration", "wrong_rate, 0.1 s and time stamps", x, RATE_HZ, t_s=np.array([0.0, (SAMPLES - 1) / true_hz]))
        worn = [(f"{f} {v}", {"faults": {f: v}}) for f in (*STRUCK, *SHAKEN) for v in (0.3, 1.0, 2.0, 4.0)]
        other = [("load 0.05", {"load": 0.05}), ("load 1.6", {"load": 1.6}), ("cold and rough", {"rough": 1.6}), ("half speed", {"speed": (0.5, 0.5)}),
                 ("speeding up", {"speed": (0.3, 1.0)}), ("stopped", {"speed": (0.0, 0.0)}), ("healthy, 3 s", {"samples": int(CAPTURE_S * RATE_HZ)}),
                 ("worn, 3 s", {"samples": int(CAPTURE_S * RATE_HZ), "faults": {"inner_race": 2.0}})]
        for what, how in [*[("healthy", {})] * 20, *worn, *other]:
            source = "worn" if "faults" in how else "healthy" if what.startswith("healthy") else "another load or speed"
            for c, x in window(**how).items():
                tally.sound(f"generated waves, {source}", names[c], x, RATE_HZ, **known[c])


def _heat_history(causes: np.ndarray, every_s: float, tau_s: float) -> np.ndarray:
    "Running mean of speed x load, of a housing's time constant: a cause like speed and load [window]. Columns: speed, load, ambient, running seconds."
    found: list[float] = []
    heats = causes[:, 0] / 1480 * (1 + causes[:, 1]) / 2
    q = before = heats[0]
    for heat, running_s in zip(heats, causes[:, 3], strict=True):
        on_s = min(running_s, every_s)
        if on_s < every_s:  # it stood for the rest, and cools half as fast
            q *= np.exp(-(every_s - on_s) / tau_s / 2)
        q = heat + (q - heat) * np.exp(-on_s / tau_s) if on_s < every_s else q + (1 - np.exp(-every_s / tau_s)) * ((heat + before) / 2 - q)
        found.append(q)
        before = heat
    return np.array(found)


def _readings(duty: str, seed: int, days: float, more: str = "") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "Process windows [window, channel, sample], causes [window, c], and the windows in which it runs."
    looks = list(parse(f"about: sensors\nduration: {days} d\nevery: 10 min\nvibration: null\nseed: {seed}\ntypes:\n  motor: {{rpm: 1480, seed: {seed}}}\n"
                       f"assets:\n  - {{name: m, type: motor, duty: {duty}{more}}}\n").stream())
    names = ("speed_rpm", "load", "ambient_c", "running_s")
    c = np.array([[look.window.conditions[n] for n in names] for look in looks])
    causes = np.column_stack([c[:, :3], *[_heat_history(c, 600.0, tau_s) for tau_s in (600, 1500, 4000)]])
    return np.array([look.window.samples for look in looks], float), causes, np.flatnonzero([look.truth.state == "running" for look in looks])


def readings(tally: Tally, seeds: range, cases: int, most: int) -> dict:
    "A bearing's temperature, a current and a speed once a second, ten at a time, on five duties. And real heat, as far as it reaches the neighbours."
    reached: defaultdict[str, Counter] = defaultdict(Counter)
    for seed in seeds:
        for number, (name, duty) in enumerate(list(DUTIES.items())[:most]):
            rng, born = np.random.default_rng([TEST, seed, number]), TEST + 10 * seed + number
            x, causes, running = _readings(duty, born, 5)
            past, now = running[running < 432], running[running >= 432]
            wear = ", wear: [{fault: outer_race, onset: 3 d, lasts: 2 d, peak: 2.5}], events: [{kind: load_step, at: 4 d, by: 1.5}]"
            worn, worn_causes, worn_running = _readings(duty, born, 5, wear)
            for quantity, (column, others, reaches) in READINGS.items():
                learned = learn_sensor(x[past, column], 1.0, quantity, x[past][:, others], causes[past], reaches)
                well, ill = ([{"past": learned, "beside": r[list(others)], "causes": c} for r, c in zip(rows, why, strict=True)]
                             for rows, why in ((x, causes), (worn, worn_causes)))
                label = quantity if quantity != "current" else "current reading"

                for fault, size in SENSOR_FAULTS.items():
                    for i in rng.choice(now, cases) if fault != "wrong_rate" else ():
                        y = break_sensor(x[i, column], fault, size, 1.0, rng, first=x[i - 6, column])
                        tally.wrong(label, fault, y, 1.0, **well[i])
                for i in now:
                    tally.sound(f"generated readings, healthy, {name}", quantity, x[i, column], 1.0, **well[i])
                for i in worn_running[worn_running >= 432]:
                    tally.sound("generated readings, worn and hot, a load step", quantity, worn[i, column], 1.0, **ill[i])
                for share in (0.05, 0.1, 0.2, 0.5, 0.8) if quantity == "temperature" else ():
                    for i, hot in zip(rng.choice(now, 4 * cases), rng.uniform(5, 80, 4 * cases), strict=True):
                        k = well[i] | {"beside": x[i][list(others)] + share * hot}
                        reached[f"{share:g}"][check_sensor(x[i, column] + hot, 1.0, quantity, **k).fault] += 1
                        if share >= reaches:  # else what was assumed does not hold: shown, not counted
                            tally.sound("generated readings, one bearing hot by 5 to 80 K", quantity, x[i, column] + hot, 1.0, **k)
    return {share: dict(c) for share, c in reached.items()}


def scenarios(tally: Tally, quick: bool) -> dict:
    "The plants that come with the package, each sensor learned on its first healthy looks. By truth: window caught, of how many, or called though sound."
    table: dict[str, dict] = {}
    plants = {"sensor_faults": 250, "inner_race_abrupt": 400, "warm_up": 400, "shaft": 200, "gearbox": 200, "maintenance": 200, "variable_speed": 250, "fleet": 100}
    for name, looks in list(plants.items())[:1 if quick else None]:
        plant = load(name).with_looks(50 if quick else looks)
        first: defaultdict[tuple[str, str], list] = defaultdict(list)
        pasts: dict[tuple[str, str], object] = {}
        for look in plant.stream():
            w, truth = look.window, look.truth
            for c, channel in enumerate(w.channels):
                quantity = {"h": "vibration", "v": "vibration", "current": "current"}.get(channel) or ("temperature" if channel.endswith("_c") else None)
                if quantity is None:
                    continue
                key, x = (truth.asset, channel), w.samples[c]
                if key not in pasts:
                    if truth.why == "healthy":
                        first[key].append(x)
                        if len(first[key]) == (20 if quick else 40):
                            pasts[key] = learn_sensor(np.stack(first.pop(key)), w.rate_hz, quantity)
                    continue
                hit = [f for f, where in zip(truth.sensor.split(), truth.sensor_channel.split(), strict=False) if where == channel or f == "wrong_rate"]
                if hit:
                    row = table.setdefault(f"{name}, {quantity}, {hit[0]}", {"windows": 0, "caught": 0})
                    row["windows"] += 1
                    row["caught"] += not check_sensor(x, w.rate_hz, quantity, past=pasts[key]).ok
                else:
                    tally.sound(f"scenario {name}", quantity, x, w.rate_hz, past=pasts[key])
    return table


def recorded(tally: Tally, quick: bool) -> list[str]:
    "Real bearings to the end of their lives. Returns what could not be had."
    missing = []
    try:
        for run in femto.load(["Bearing3_1"] if quick else None):
            chosen = " (limits were chosen on it)" if run.name.startswith("Bearing1") else ""
            for x in run.snapshots.swapaxes(0, 1):
                past = learn_sensor(x[:100], run.rate_hz, "vibration")
                for snapshot in x[::100 if quick else 1]:
                    tally.sound(f"FEMTO {run.name}{chosen}", "vibration", snapshot, run.rate_hz, past=past)
    except PartMissing as e:
        missing.append(f"FEMTO: {e}")
    try:
        records = {r.name: r for r in mfpt.load()}
    except PartMissing as e:
        return [*missing, f"MFPT: {e}"]
    for r in list(records.values())[::10 if quick else 1]:
        n = round(0.1 * r.rate_hz)
        for healthy in ("baseline_1",) if r.rate_hz > 50_000 else ("OuterRaceFault_vload_7", "InnerRaceFault_vload_1"):  # the rig at its greatest and at no load
            rows = [x.samples[0][:x.samples.shape[1] // n * n].reshape(-1, n) for x in (records[healthy], r)]
            past = learn_sensor(rows[0], r.rate_hz, "vibration")
            for x in chain(rows[1][::20 if quick else 1], r.samples):
                tally.sound(f"MFPT {r.fault}", "vibration", x, r.rate_hz, past=past)
    return missing


def measure(quick: bool) -> tuple[list[dict], dict]:
    "The two checks, and tables: by quantity and type, by source."
    tally = Tally()
    waves(tally, range(1 if quick else 24))
    reached = readings(tally, range(1 if quick else 3), 2 if quick else 20, 1 if quick else 5)
    plants = scenarios(tally, quick)
    missing = recorded(tally, quick)
    calls = {"none", "undetermined"}
    rows: dict[str, dict] = {"counted": {}, "not counted": {}}
    caught = cases = 0
    for (quantity, fault), named in sorted(tally.broken.items()):
        n, right = sum(named.values()), sum(v for k, v in named.items() if k not in calls)
        kind = "not counted" if (quantity, fault) in NOT_COUNTED or "," in fault else "counted"
        row = {"cases": n, "caught": right, "named right": named[fault.split(",")[0]], "caught without a past": tally.alone[quantity, fault][False],
               "called": dict(named)}
        if kind == "counted":
            caught, cases = caught + right, cases + n
        elif (quantity, fault) in NOT_COUNTED:
            row["why"] = NOT_COUNTED[quantity, fault]
        rows[kind][f"{quantity}, {fault}"] = row
    real = {source: {"windows": sum(c.values()), "called a sensor fault": sum(v for k, v in c.items() if k not in calls), "undetermined": c["undetermined"],
                     "called": {k: v for k, v in c.items() if k != "none"}} for source, c in sorted(tally.real.items())}
    false, windows = sum(r["called a sensor fault"] for r in real.values()), sum(r["windows"] for r in real.values())
    note = "" if not missing else f"; not measured: {'; '.join(missing)}"
    return [check("sensor_fault_recall", caught / cases, ">= 1", f"{caught} of {cases} broken sensors, eight types on waves of vibration and current and on "
                  "readings of temperature, current and speed; with the sensor's healthy past"),
            check("sensor_false_calls", float(false), "<= 0", f"of {windows} windows of sound sensors, on machines healthy, worn to the end, hot, starting, at other "
                  f"loads; real records among them{note}")], {
        "broken": rows, "sound": real, "one bearing really hotter, by the share that reaches its neighbours (0.1 is assumed)": reached,
        "scenarios, one window, no neighbours": plants}
