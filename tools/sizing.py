"""edge/SIZING.md from a result of `python benchmarks/edge.py sizing`: what was measured, and apart from it what follows for an Orin Nano under stated assumptions."""

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks/results/edge-sizing-2026-11-30.json"
PAGE = ROOT / "edge/SIZING.md"
STAND_INS = ("nginx",)  # what a site doesn't have
NODE = ("node-exporter",)
EVERY_S = (1, 10, 60)
SAMPLES = 480           # of a series in two hours, one every 15 s
CONNECTIONS = 1000      # max_connections in edge/mosquitto/mosquitto.conf
ASSETS, MARGIN = 200, 1.25  # requests hold what so many assets need, limits the most that was ever seen, by this margin
DAY_S, MIB = 86_400, 1 << 20

# An Orin Nano of 8 GB: assumed, in the order of the page
CORES = 6
SPEED = (0.25, 0.5)     # of one of its cores over one of the machine measured
FREE = (4.0, 5.0)       # cores that the way of a window has
AGENT_CORES = 1.0       # that the agent can use
TRITON = (1.0, 0.2)     # of its processor time here is left when the GPU computes


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(str(c) for c in line)} |" for line in lines)


def two(x: float) -> str:
    "Two digits that count, for what is no better known."
    if x <= 0:
        return "0"
    digits = 2 - len(str(int(x))) if x >= 1 else 1
    return f"{round(x, min(digits, 1)):,.0f}" if x >= 10 else f"{x:.1f}" if x >= 1 else f"{x:.2g}"


def size(n: float) -> str:
    "Bytes in words."
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= one:
            return f"{two(n / one)} {unit}"
    return f"{two(n)} B"


def span(low: float, high: float) -> str:
    return joined(two(low), two(high))


def joined(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def resources(name: str) -> tuple[int, int]:
    "MiB that a pod of the base asks for, and its limit, of its one container."
    folder = ROOT / "edge/k3s" / ("node" if name in NODE else "base")
    for o in yaml.safe_load_all((folder / f"{name}.yaml").read_text()):
        if o["kind"] in ("Deployment", "StatefulSet", "DaemonSet"):
            held = next(c for c in o["spec"]["template"]["spec"]["containers"] if c["name"] == name)["resources"]
            return mebibytes(held["requests"]["memory"]), mebibytes(held["limits"]["memory"])
    raise ValueError(f"{folder.name}/{name}.yaml has no pod")


def mebibytes(quantity: str) -> int:
    return int(quantity[:-2]) * {"Mi": 1, "Gi": 1024}[quantity[-2:]]


def together() -> str:
    "MiB that all pods and the system ask for on a board."
    return re.search(r"\*\*together\*\* \| \*\*(\d+)\*\*", (ROOT / "edge/k3s/README.md").read_text())[1]


def journal_gb() -> float:
    "How large a site lets its journal grow."
    return float(re.search(r"PREDMAINT_JOURNAL_MAX_GB=(\S+)", (ROOT / "edge/k3s/base/settings.env").read_text())[1])


def queued() -> int:
    "MiB that the broker keeps for a client."
    return int(re.search(r"(?m)^max_queued_bytes (\d+)", (ROOT / "edge/mosquitto/mosquitto.conf").read_text())[1]) // MIB


def copies() -> int:
    "How many backups a site keeps."
    return int(re.search(r'/backups/state, "(\d+)"', (ROOT / "edge/k3s/base/backup.yaml").read_text())[1])


def volume(name: str) -> int:
    "Bytes that a claim asks for."
    claims = {o["metadata"]["name"]: o for o in yaml.safe_load_all((ROOT / "edge/k3s/base/volumes.yaml").read_text())}
    return mebibytes(claims[name]["spec"]["resources"]["requests"]["storage"]) * MIB


def most(t: Mapping[str, Any], name: str) -> float:
    "MiB, in all of the run."
    seen = [m["MiB"][name]["most"] for m in t["memory"].values()] + [t["a second version"]["MiB"][name]["most"], t["twice the load"]["memory, MiB"][name]]
    return max(seen + [t["without Triton"]["most"]] * (name == "agent"))


def now(t: Mapping[str, Any], name: str, assets: int) -> float:
    return t["memory"][str(assets)]["MiB"][name]["now"]


def pods(t: Mapping[str, Any]) -> list[str]:
    return [name for name in t["memory"][str(ASSETS)]["MiB"] if name not in STAND_INS]


def own_ms(row: Mapping[str, Any]) -> dict[str, float]:
    "Milliseconds of processor a window, of the parts that it goes through on a board."
    return {name: row["processor, ms a window"][name] for name in ("mosquitto", "agent", "triton", "sinks", "influxdb")}


def an_asset(t: Mapping[str, Any]) -> float:
    "MiB that one more costs the agent."
    few, many = list(t["memory"])[-2:]
    return (now(t, "agent", int(many)) - now(t, "agent", int(few))) / (int(many) - int(few))


def room(t: Mapping[str, Any]) -> int:
    "Assets that the agent's limit has room for, with the margin; in tens."
    limit = resources("agent")[1]
    return min(CONNECTIONS, int((ASSETS + (limit / MARGIN - now(t, "agent", ASSETS)) / an_asset(t)) // 10 * 10))


def assets_of(t: Mapping[str, Any], rate: float, every_s: float) -> str:
    "At half of the rate: the other half is for catching up."
    n = rate / 2 * every_s
    return two(n) if n < room(t) else f"{room(t)}\\*"


def on_the_board(row: Mapping[str, Any]) -> tuple[float, float]:
    "Windows a second of an Orin Nano, at least and at most, under the assumptions."
    ms, found = own_ms(row), []
    for speed, free, share in zip(SPEED, FREE, TRITON, strict=True):
        together = sum(ms.values()) - (1 - share) * ms["triton"]
        found.append(1e3 * speed * min(free / together, AGENT_CORES / ms["agent"]))
    return found[0], found[1]


def text(result: Mapping[str, Any]) -> str:
    "The page."
    return "\n\n".join([*measured(result), *kept(result["tables"]["sizing"]), *doubled(result["tables"]["sizing"]), *board(result["tables"]["sizing"])]) + "\n"


def measured(result: Mapping[str, Any]) -> list[str]:
    t, versions = result["tables"]["sizing"], result["versions"]
    m, windows = t["machine"], t["windows"]
    parts = ["<!-- Written by `python tools/sizing.py` from the result that it names; tests/test_sizing.py holds it to that and to the manifests. -->", "# How large a site may be",
             "> How many assets one board can have, what memory and disk they take, and what happens when twice as much comes: measured on a processor, and apart from that, "
             "under assumptions, what follows for a Jetson Orin Nano of 8 GB.",
             "## Measured",
             f"On {m['cores']} cores of an {m['processor']} ({result['machine']['processor']}, {m['memory, MiB'] / 1024:.0f} GiB), Python {versions['python']}, ONNX Runtime "
             f"{versions['onnxruntime']}, by `python benchmarks/edge.py sizing`, kept as `benchmarks/results/{RESULT.name}`. "
             f"The load average was {m['load before']:.1f} when the run began (it counts the minutes before; 1 is one busy core) and {result['machine']['load']:.1f} at its end (the run's own part is about 2).",
             "All programs of a site ran as processes: mosquitto with TLS, certificates and access lists as shipped, agent, sinks, updater, Triton with ONNX Runtime on the processor "
             "(conv_ae, one thread), Prometheus with the shipped rules, Alertmanager, node exporter; the sensors were one more process, on the same cores. Windows went to Triton in the "
             "message, as between pods. Not as on a site: **InfluxDB is 1.6.7 behind nginx**, where a site has InfluxDB 2, whose storage engine is the same and whose processes are not; "
             "**Grafana was not there**; no container, no K3s.",
             "### Windows a second",
             f"The limit is what gets through when senders push, with no more under way than the broker keeps for the agent. Sustained is the highest share of it (tried: 90 %, 75 %, 60 % …) at which an open loop on {t['twice the load']['streams']} "
             "assets has 99 of 100 acknowledgements within a second, counted from when the window was due, and InfluxDB no more than two seconds behind.",
             table(["window", "bytes", "limit", "sustained", "median, ms", "99 %, ms", "two idle cores, by processor time"],
                   [[name, f"{w['bytes on the wire']:,}", f"{w['limit, windows a second']:,}", f"{w['sustained, windows a second']:,}", f"{w['p50, ms']:.0f}", f"{w['p99, ms']:.0f}",
                     two(1e3 * m["cores"] / (sum(own_ms(w).values()) + w["processor, ms a window"]["sensors"]))] for name, w in windows.items()]),
             "The last column is arithmetic: both cores' time over the time that one window takes, the sensors' part included.",
             "**Assets of that machine**, at half of what it sustains, so that there is room to catch up after an outage:",
             table(["window", *(f"every {s} s" for s in EVERY_S)], [[name, *(assets_of(t, w["sustained, windows a second"], s) for s in EVERY_S)] for name, w in windows.items()]),
             f"\\* not for the processor's sake: so many the agent's memory limit has room for, with the margin below and {two(1024 * an_asset(t))} KiB an asset, which is what it keeps of "
             f"2 x 25.6 kHz for a diagnosis. A larger site gives it a larger limit, or an agent more; mosquitto takes {CONNECTIONS:,} connections (a line's gateway has one for many assets).",
             "**Processor time of one window**, ms:",
             table(["program", *windows], [[name, *(f"{w['processor, ms a window'][name]:.3f}" for w in windows.values())] for name in
                                           ("mosquitto", "agent", "triton", "sinks", "influxdb", "nginx", "prometheus", "sensors")]),
             "nginx stands in for a part of InfluxDB 2, and the sensors are not on a board. What Prometheus takes is by time, not by window.",
             "### Memory",
             "MiB resident (RSS, children included, what two processes map counted twice), 2 x 2560 windows, under load until the agent has of each asset the three seconds that it keeps. *Most* is the highest of each "
             "process in all of the run (VmHWM), with twice the load, a second version, and the agent without Triton. *Asked* and *limit* are those of `edge/k3s/base`."]
    counts = list(t["memory"])
    parts += [table(["pod", *(f"{n} asset{'s' * (n != '1')}" for n in counts), "most", "asked", "limit"],
                    [[name, *(f"{now(t, name, int(n)):.0f}" for n in counts), f"{most(t, name):.0f}", *resources(name)] for name in pods(t)]),
              f"tests/test_sizing.py: no pod asks for less than its processes had with {ASSETS} assets, and no limit is below {MARGIN:g} times the most that was seen."]
    second, alone = t["a second version"], t["without Triton"]
    more = [f"- **An asset more** costs the agent {two(1024 * an_asset(t))} KiB (from {counts[-2]} to {counts[-1]} of them).",
            f"- **A second version** in Triton, deployed as the updater does it and seen in the state *{second['state']}*: Triton has {second['MiB']['triton']['now']:.0f} MiB in place of "
            f"{now(t, 'triton', int(counts[1])):.0f}, the agent {second['MiB']['agent']['now']:.0f}, the updater at most {second['MiB']['updater']['most']:.0f}."
            + " Both were loaded; windows did not yet go to both." * (second["state"] == "parity"),
            f"- **Without Triton** the agent scores by itself, and has {alone['now']:.0f} MiB with {counts[-1]} assets.",
            "- **Prometheus** had " + ", ".join(f"{t['memory'][n]['Prometheus']['series']:,} series with {n}" for n in counts) + " assets. Its memory is that of a second one, which was given "
            f"what the programs had shown under load, page after page, until it had {SAMPLES} samples of a series, as many as two hours bring: "
            + ", ".join(str(t["memory"][n]["Prometheus"]["samples a series"]) for n in counts) + ".",
            "- **Not measured:** InfluxDB 2 (its figures in the manifests are set by hand; version 1, which was measured, is a lower bound), Grafana, and Prometheus while it makes "
            "blocks of what it has, every two hours."]
    return [*parts, "\n".join(more)]


def kept(t: Mapping[str, Any]) -> list[str]:
    d, n = t["disk"], list(t["memory"])
    day = DAY_S / 10  # windows of an asset
    journal, influx, raw = d["journal, bytes a window"], d["InfluxDB, bytes a window"], d["archive, bytes a window kept"]
    archived = raw * (0.01 + 0.001)
    prometheus = {k: p["block, bytes"] / p["samples"] * p["series"] * DAY_S / 15 for k, p in ((k, t["memory"][k]["Prometheus"]) for k in n)}

    def full(limit: float, a_day: float) -> str:
        return f"{two(limit / a_day)} days" if a_day else "never"

    rows = [["journal", f"{journal:,} a window", *(size(journal * day * int(k)) for k in n), f"{journal_gb():g} GB or 30 days: {full(journal_gb() * 1e9, journal * day * int(n[-1]))} at {n[-1]}"],
            ["InfluxDB", f"{influx:,.0f} a window", *(size(influx * day * int(k)) for k in n), f"{volume('influxdb') / 2**30:.0f} GiB or 90 days: "
             f"{full(volume('influxdb'), influx * day * int(n[-1]))} at {n[-1]}"],
            ["archive, where `archive_url` is set", f"{raw:,} a window kept", *(size(archived * day * int(k)) for k in n), f"50 GB or 90 days: {full(50e9, archived * day * int(n[-1]))} at {n[-1]}"],
            ["Prometheus", "by time", *(size(prometheus[k]) for k in n), f"4 GB or 30 days: {full(4e9, prometheus[n[-1]])} at {n[-1]}"]]
    return ["### Disk",
            f"Bytes that stay of a window of 2 x 2560, from {d['windows']:,} of them: the journal after it was tidied (all verdicts; raw windows have gone), InfluxDB's TSM files, "
            f"the archive after its nightly merging ({d['archive, windows']:,} windows kept). A day of so many assets with a window every 10 s is arithmetic from that; "
            "the archive takes its default share there, 1 % of the healthy windows and one in a thousand that looks suspicious. Prometheus: the block of two hours, by its samples; what it joins to larger ones "
            "takes less.",
            table(["what", "bytes", *(f"a day, {k} asset{'s' * (k != '1')}" for k in n), "kept: until full"], rows),
            f"The volume of the backups ({volume('backups') / 2**30:.0f} GiB) holds {copies()} copies of the journal and of InfluxDB as long as these two together are below "
            f"{volume('backups') / copies() / 1e9:.1f} GB; a larger site carries them away more often, or keeps fewer."]


def doubled(t: Mapping[str, Any]) -> list[str]:
    d = t["twice the load"]
    whole = d["sent"] == d["acknowledged"] == d["committed"] == d["distinct"] == d["in InfluxDB"]
    again, fits = "No window had to be sent twice.", d["with a W that fits"]
    if d["sent again"]:
        again = (f"{d['sent again']:,} times a window was sent again after five seconds without an acknowledgement: mosquitto keeps {queued()} MiB for the agent (`max_queued_bytes`, so that nobody fills "
                 f"it) and drops what is more. With W = {fits['W']}, {fits['acknowledged meanwhile, windows a second']:,} a second got through for {fits['for, s']:g} s, and "
                 + (f"{fits['sent again']:,} were sent again: still too many under way." if fits["sent again"] else "none was sent again: where many sensors push, give them that (setting `window`)."))
    return ["### Twice the load",
            f"{d['streams']} sensors of 2 x 2560 windows, W = {d['W']} as shipped: {d['offered, windows a second']:,} windows a second, twice of what is sustained, for {d['for, s']:g} s, then a twentieth of that.",
            f"- **It gets through** {d['acknowledged meanwhile, windows a second']:,} a second meanwhile. The rest waits where it comes from: `send` returns when there is a place among "
            f"the W, so the sensor's program is held up (with `window_full = \"drop_oldest\"` it would forget the oldest instead, counted).\n"
            f"- **Queues are bounded:** at most {d['most unacknowledged']:,} windows were under way, of W x streams = {d['W x streams']:,}; the others, at most "
            f"{d['most waiting in the sensor' + chr(39) + 's program']:,}, had not been sent. {again}\n"
            f"- **Age at the acknowledgement**, counted from when the window was due: median {d['age at acknowledgement, median, s']:g} s, {d['oldest, s']:g} s at most.\n"
            f"- **Memory**, the most: agent {d['memory, MiB']['agent']:.0f} MiB, mosquitto {d['memory, MiB']['mosquitto']:.0f}, Triton {d['memory, MiB']['triton']:.0f}, sinks {d['memory, MiB']['sinks']:.0f}.\n"
            f"- **InfluxDB** was {d['InfluxDB behind at most, rows']:,} rows behind at most, and had everything {d['InfluxDB has all after the last window, s']:g} s after the last acknowledgement.\n"
            f"- **Back to normal** {d['back to normal after, s']:g} s after the surge, with a tenth of what is sustained coming in.\n"
            f"- **Lost: {d['sent'] - d['distinct']:,}.** {d['sent']:,} sent, {d['acknowledged']:,} acknowledged, {d['committed']:,} verdicts, {d['in InfluxDB']:,} points in InfluxDB"
            + (": each once." if whole else ".")]


def board(t: Mapping[str, Any]) -> list[str]:
    windows = t["windows"]
    rates = {name: on_the_board(w) for name, w in windows.items()}
    rows = [[name, span(*rates[name]), *(joined(*(assets_of(t, r, s) for r in rates[name])) for s in EVERY_S), f"{two(1e3 * 64 / rates[name][1])} ms",
             f"{two(8e-6 * rates[name][1] * w['bytes on the wire'])} Mbit/s"] for name, w in windows.items()]
    return ["## Not measured: arithmetic for a Jetson Orin Nano of 8 GB",
            "Nobody who wrote this had one. What follows is the processor time above, put on another processor under these assumptions; it is as good as they are.",
            "\n".join([f"1. The board has {CORES} cores (Cortex-A78AE) at up to 1.5 GHz, 1.7 GHz in the mode MAXN SUPER (NVIDIA's data sheet of the module); lower power modes have fewer or slower ones.",
                       f"2. One of them does {SPEED[0]:g} to {SPEED[1]:g} of the work of a core measured above. Assumed, from clocks and the width of the cores; no benchmark of this code stands behind it.",
                       f"3. Linux, K3s, Prometheus, Grafana and the rest take {CORES - FREE[1]:g} to {CORES - FREE[0]:g} cores; a window's way has {FREE[0]:g} to {FREE[1]:g}. The sensors are elsewhere.",
                       f"4. The agent, which is Python, uses {AGENT_CORES:g} core and no more. Its limit in the manifests (2) is no bound then, nor is that of another pod (1 each).",
                       f"5. The GPU computes, so of Triton's processor time {TRITON[1]:.0%} to {TRITON[0]:.0%} is left. How long an engine takes is **unknown** until `verify_device.py engines` says so on the board: "
                       "the column *engine* is what it must not exceed, for a batch of 64, if the highest rate shall be reached.",
                       "6. InfluxDB 2 takes as much processor time as 1.6.7 did. The NVMe drive does not bind: one commit is for many windows.",
                       f"7. Memory: the manifests and the system ask for {together()} MiB of 7,620 (`edge/k3s/README.md`), with figures for Triton, its builder and the system that nobody has measured on a board either."]),
            table(["window", "windows a second", *(f"assets, every {s} s" for s in EVERY_S), "engine, 64 windows", "network, at most"], rows),
            "Assets are at half of the rate, and \\* is the agent's memory, as above. A site near these figures is measured before it is trusted: `verify_device.py site` on the board, "
            "then *Age of the newest window* and *Sinks behind by* of the dashboard Site health under its own load."]


def main() -> None:
    PAGE.write_text(text(json.loads(Path(sys.argv[1]).read_text() if len(sys.argv) > 1 else RESULT.read_text())))


if __name__ == "__main__":
    main()
