"""What verify_device.py looks at beside the engines: the machine, the cluster, the services, the certificates, and a window's way through all of it.

Services are found by `kubectl` at their addresses in the cluster, which a node reaches; where there is none, or something else is meant, an address is
given by name. Nothing is changed, but for the windows of the test asset, which go the way of all windows.
"""

import ctypes
import json
import math
import os
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import psutil

from pdm.data.window import AssetPath, topic
from pdm.errors import CheckFailed, PdmError
from pdm.model.bundle import Bundle

CANARY = Path(__file__).parent.parent / "triton/canary.py"
NAMESPACES = ("predmaint", "predmaint-node")
PORTS = {"triton": 8000, "prometheus": 9090, "alertmanager": 9093, "grafana": 3000, "influxdb": 8086, "mosquitto": 8883}
FREE_SHARE, FREE_MB, HOT_C, OFF_S, DAYS = 0.15, 300, 85.0, 1.0, 14  # below, below, above, above, below: failed. Disk and temperature as the warnings DiskFull and BoardHot
GPU = "nvidia.com/gpu"
# In a pod of the sinks: a part that they may reach, and one that they may not
REACH = """
import json, socket
reached = {}
for name, port in (("influxdb", 8086), ("mosquitto", 8884)):
    try:
        socket.create_connection((name, port), timeout=3).close()
        reached[name] = True
    except OSError:
        reached[name] = False
print(json.dumps(reached))
"""
# In Triton's container: devices that it has, and may not open
CLOSED = """
import os, stat
for top, _, files in os.walk("/dev"):
    for path in (os.path.join(top, f) for f in files):
        kind = os.lstat(path)
        if stat.S_ISCHR(kind.st_mode) and not os.access(path, os.R_OK | os.W_OK):
            print(f"{path} (group {kind.st_gid})")
"""
FIRING = 'count by (alertname, severity, asset) (ALERTS{alertstate="firing"})'
PRESSURE = ("MemoryPressure", "DiskPressure", "PIDPressure", "NetworkUnavailable")


class NotRun(Exception):
    "What a check lacks here."


def kubectl(*words: str) -> dict:
    "What the cluster has, from its JSON. Raises `NotRun` where there is no cluster to ask."
    return json.loads(run_kubectl(*words, "-o", "json"))


def run_kubectl(*words: str) -> str:
    "What kubectl says. Raises `NotRun` where there is no cluster to ask, and `CheckFailed`."
    program = shutil.which("kubectl") or shutil.which("k3s")
    if program is None:
        raise NotRun("no kubectl on this machine")
    command = [program, *(["kubectl"] if program.endswith("k3s") else []), "--request-timeout=10s", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        raise CheckFailed(f"kubectl {' '.join(words[:4])}: no answer within 30 s") from None
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2]
        if "localhost:8080" in done.stderr or "permission denied" in done.stderr:  # kubectl without a configuration, or without the right to read it
            raise NotRun("kubectl reaches no cluster (on the node, run this as root)")
        raise CheckFailed(f"kubectl {' '.join(words[:4])}: {why}")
    return done.stdout


def get(
    url: str,
    *names: str,                  # down to what is meant, in the JSON that stands there; without names nothing is looked for
    otherwise: str | None = None,  # what comes back where that is not there
) -> Any:
    "What stands at an address. Raises `CheckFailed` where nobody answers, or says something else."
    try:
        with urlopen(url, timeout=10) as answer:  # noqa: S310 (each caller says http://)
            said = answer.read().decode(errors="replace")
    except HTTPError as e:
        raise CheckFailed(f"{url} answers {e.code}: {e.read(200).decode(errors='replace').strip()}") from None
    except (URLError, OSError) as e:
        raise CheckFailed(f"{url}: {getattr(e, 'reason', e)}") from None
    try:
        found: Any = json.loads(said) if names else None
        for name in names:
            found = found[name]
    except (ValueError, TypeError, LookupError):
        if otherwise is not None:
            return otherwise
        raise CheckFailed(f"{url}: expected JSON with {'.'.join(names)}, got {said.strip()[:100]!r}: is it another service?") from None
    return found


def days_left(certificate: bytes) -> float:
    "How long a certificate (PEM) is valid from now on, days. Raises `NotRun` without the library that reads it."
    try:
        from cryptography import x509
    except ImportError:
        raise NotRun("pip install 'predmaint[pki]' (cryptography reads certificates)") from None
    return (x509.load_pem_x509_certificate(certificate).not_valid_after_utc - datetime.now(UTC)).total_seconds() / 86400


def _job(pod: dict) -> str:
    "The id of the Job that a pod is an attempt of; of others nothing."
    return next((o["uid"] for o in pod["metadata"].get("ownerReferences", ()) if o["kind"] == "Job"), "")


class Site:
    "The checks, in order. Each returns what it found, raises `NotRun` for what it lacks, and `CheckFailed` where it fails."

    def __init__(self,
        bundle: Bundle | None = None,                 # whose windows the test asset sends
        addresses: dict[str, str] | None = None,      # name of a service → host:port, in place of the cluster's
        data: str | Path = "/var/lib/predmaint",      # where data lie
        broker: str = "",                             # mqtts://…?ca=…&cert=…&key=… as the test asset; "{mosquitto}" stands for the broker's address
        asset: str = "",                              # the test asset, enterprise/site/area/line/asset, known to the agent
        stream: str = "vibration",                    # of it
        certificates: Iterable[str | Path] = (),      # files, and folders of `predmaint pki`
        wait_s: float = 30.0,                         # for an acknowledgement and a verdict
    ):
        self.bundle, self.addresses, self.data, self.broker, self.asset, self.stream = bundle, dict(addresses or {}), Path(data), broker, asset, stream
        self.certificates, self.wait_s = [Path(c) for c in certificates], wait_s
        self._services: dict[str, str] | NotRun | None = None

    def checks(self) -> dict[str, Callable[[], dict]]:
        return {"disk": self.disk, "memory": self.memory, "temperature": self.temperature, "clock": self.clock, "node": self.node, "pods": self.pods, "gpu": self.gpu,
                "network policies": self.policies, "triton's canary": self.triton, "prometheus": self.prometheus, "alertmanager": self.alertmanager, "grafana": self.grafana,
                "influxdb": self.influxdb, "certificates": self.valid, "a window's way": self.window}

    # the machine

    def disk(self) -> dict:
        at = next(p for p in (self.data, *self.data.parents) if p.exists())
        total, _, free = shutil.disk_usage(at)
        if free < FREE_SHARE * total:
            raise CheckFailed(f"{free / 1e9:.1f} of {total / 1e9:.0f} GB are free at {at}: see what grew (du -xh --max-depth=3 {at}), or shorten retentions")
        return {"at": str(at), "free_gb": round(free / 1e9, 1), "total_gb": round(total / 1e9, 1)}

    def memory(self) -> dict:
        m = psutil.virtual_memory()
        if m.available >> 20 < FREE_MB:
            raise CheckFailed(f"{m.available >> 20} of {m.total >> 20} MB are available: see who takes them (ps aux --sort -rss)")
        return {"available_mb": m.available >> 20, "total_mb": m.total >> 20, "swapped_mb": psutil.swap_memory().used >> 20}

    def temperature(self) -> dict:
        zones = {}
        for zone in sorted(Path("/sys/class/thermal").glob("thermal_zone*")):
            try:
                zones[(zone / "type").read_text().strip()] = int((zone / "temp").read_text()) / 1000
            except (OSError, ValueError):  # a zone whose part is switched off can't be read
                continue
        if not zones:
            raise NotRun("this machine says no temperature")
        name = max(zones, key=lambda n: zones[n])
        if zones[name] > HOT_C:
            raise CheckFailed(f"{name} has {zones[name]:.0f} °C, the limit is {HOT_C:.0f}: look at the fan, the dust and the cabinet")
        return {"hottest": name, "celsius": zones[name], "zones": len(zones)}

    def clock(self) -> dict:
        "As the kernel sees it (adjtimex), which whoever keeps the time tells it."
        timex = (ctypes.c_long * 32)()  # modes, offset, freq, maxerror, esterror, status, …: man adjtimex
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex))
        if state < 0:
            raise NotRun(f"the kernel does not say: {os.strerror(ctypes.get_errno())}")
        unsynchronised, off_s = state == 5 or timex[5] & 0x40, timex[3] / 1e6
        if unsynchronised or off_s > OFF_S:
            raise CheckFailed(f"the clock is not held by a time server{'' if unsynchronised else f', and may be off by {off_s:.1f} s'}: see timedatectl, and NTP_SERVERS in site.env")
        return {"off_by_at_most_s": off_s}

    # the cluster

    def node(self) -> dict:
        nodes = kubectl("get", "nodes")["items"]
        found = {n["metadata"]["name"]: {c["type"]: c for c in n["status"]["conditions"]} for n in nodes}
        wrong = [f"{name}: {kind} is {c['status']} ({c.get('message', '')})" for name, conditions in found.items() for kind, c in conditions.items()
                 if (kind == "Ready" and c["status"] != "True") or (kind in PRESSURE and c["status"] != "False")]
        if wrong or not found:
            raise CheckFailed("; ".join(wrong) or "there is no node")
        return {n["metadata"]["name"]: n["status"]["nodeInfo"]["kubeletVersion"] for n in nodes}

    def pods(self) -> dict:
        pods = [p for namespace in NAMESPACES for p in kubectl("-n", namespace, "get", "pods")["items"]]
        wrong, restarts = [], 0
        done = {_job(p) for p in pods if p["status"].get("phase") == "Succeeded"}
        for p in pods:
            name, status = p["metadata"]["name"], p["status"]
            states = status.get("containerStatuses", [])
            restarts += sum(s["restartCount"] for s in states)
            ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", []))
            tried_again = status.get("phase") == "Failed" and _job(p) and _job(p) in done
            if status.get("phase") != "Succeeded" and not ready and not tried_again:
                why = [w["reason"] for s in states for w in s["state"].values() if w.get("reason")]
                wrong.append(f"{name} is {status.get('phase')} ({', '.join(why) or 'not ready'})")
        if wrong or not pods:
            raise CheckFailed("; ".join(wrong) or "there are none: kubectl apply -k edge/k3s/overlays/…")
        return {"pods": len(pods), "restarts": restarts}

    def gpu(self) -> dict:
        "As many as pods ask for are offered by the node; and Triton may open what it was handed."
        pods = [p for namespace in NAMESPACES for p in kubectl("-n", namespace, "get", "pods")["items"] if p["status"].get("phase") not in ("Succeeded", "Failed")]
        asked = sum(int(c.get("resources", {}).get("limits", {}).get(GPU, 0)) for p in pods for c in p["spec"]["containers"])
        if not asked:
            raise NotRun("no pod asks for a GPU")
        offered = sum(int(n["status"].get("allocatable", {}).get(GPU, 0)) for n in kubectl("get", "nodes")["items"])
        if offered < asked:
            raise CheckFailed(f"pods ask for {asked} {GPU}, and the node offers {offered}: kubectl -n predmaint-node logs daemonset/device-plugin; is "
                              "/etc/nvidia-container-runtime/config.toml in its mode csv (install.sh --check)?")
        closed = run_kubectl("-n", NAMESPACES[0], "exec", "deployment/triton", "-c", "triton", "--", "python3", "-c", CLOSED).split("\n")[:-1]
        return {"asked": asked, "offered": offered, "closed_to_triton": closed}

    def policies(self) -> dict:
        "What no policy allows is refused, what one allows is not; and on the node its rules are seen."
        written = sum(len(kubectl("-n", namespace, "get", "networkpolicies")["items"]) for namespace in NAMESPACES)
        if not written:
            raise CheckFailed("there are none: kubectl apply -k edge/k3s/overlays/…")
        found: dict[str, Any] = {"written": written}
        if os.geteuid() == 0 and (self.data / "k3s").exists() and (program := shutil.which("iptables-save")):
            rules = subprocess.run([program, "-t", "filter"], capture_output=True, text=True, timeout=30, check=True).stdout
            found["chains"] = sum(line.startswith((":KUBE-ROUTER-", ":KUBE-NWPLCY-")) for line in rules.splitlines())
            if not found["chains"]:
                raise CheckFailed(f"{written} are written, and none is in iptables: everybody reaches everybody. See journalctl -u k3s | grep -i 'network policy', and install.sh --check")
        reached = json.loads(run_kubectl("-n", NAMESPACES[0], "exec", "deployment/sinks", "--", "python", "-c", REACH))
        if reached["mosquitto"]:
            raise CheckFailed("sinks reach mosquitto:8884, which no policy allows: policies are not in force. See journalctl -u k3s | grep -i 'network policy', and install.sh --check")
        if not reached["influxdb"]:
            raise CheckFailed("sinks do not reach influxdb:8086, which their policy allows: is it there (kubectl -n predmaint get pods)?")
        return found | {"refused": "sinks to mosquitto:8884"}

    def address(self, name: str) -> str:
        "host:port of a service. Raises `NotRun` where nobody says it."
        if name in self.addresses:
            return self.addresses[name]
        if self._services is None:
            try:
                items = kubectl("-n", NAMESPACES[0], "get", "services")["items"]
                self._services = {s["metadata"]["name"]: s["spec"]["clusterIP"] for s in items}
            except (NotRun, CheckFailed) as e:
                self._services = NotRun(str(e))
        if isinstance(self._services, NotRun):
            raise NotRun(f"{self._services}, and no --address {name}=host:port")
        if name not in self._services:
            raise CheckFailed(f"namespace {NAMESPACES[0]} has no service {name}")
        host = self._services[name]
        return f"[{host}]:{PORTS[name]}" if ":" in host else f"{host}:{PORTS[name]}"

    # the services

    def triton(self) -> dict:
        address = self.address("triton")
        done = subprocess.run([sys.executable, "-I", CANARY, "--address", address, "--timeout", "20"], capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise CheckFailed(done.stderr.strip().rpartition("\n")[2])
        return {"address": address}

    def prometheus(self) -> dict:
        base = f"http://{self.address('prometheus')}"
        targets = get(f"{base}/api/v1/targets?state=active", "data", "activeTargets")
        down = [f"{t['labels']['job']} at {t['scrapeUrl']} ({t['lastError'] or 'not asked yet'})" for t in targets if t["health"] != "up"]
        if down or not targets:
            raise CheckFailed("; ".join(down) or "it has no targets")
        firing = [r["metric"] for r in get(f"{base}/api/v1/query?{urlencode({'query': FIRING})}", "data", "result")]
        if critical := sorted({m["alertname"] for m in firing if m.get("severity") == "critical" and "asset" not in m}):  # a machine in alarm is no fault of the site
            raise CheckFailed(f"{', '.join(critical)} {'is' if len(critical) == 1 else 'are'} firing: see the runbooks")
        return {"targets": len(targets), "firing": sorted({m["alertname"] for m in firing})}

    def alertmanager(self) -> dict:
        base = f"http://{self.address('alertmanager')}"
        get(f"{base}/-/ready")
        return {"version": get(f"{base}/api/v2/status", "versionInfo", "version")}

    def grafana(self) -> dict:
        url = f"http://{self.address('grafana')}/api/health"
        if (database := get(url, "database")) != "ok":
            raise CheckFailed(f"its database is {database}")
        return {"version": get(url, "version", otherwise="")}

    def influxdb(self) -> dict:
        url = f"http://{self.address('influxdb')}/health"
        if get(url, "status") != "pass":
            raise CheckFailed(get(url, "message", otherwise="it is not well, and does not say why"))
        return {"version": get(url, "version", otherwise="")}

    def valid(self) -> dict:
        "What the broker shows, and the files that were named."
        files = [f for c in self.certificates for f in ([c] if c.is_file() else sorted(c.rglob("*.crt")))]
        if gone := [str(c) for c in self.certificates if not c.exists()]:
            raise CheckFailed(f"{', '.join(gone)} is not there")
        left = {str(f): days_left(f.read_bytes()) for f in files}
        try:
            host, _, port = self.address("mosquitto").rpartition(":")
            left["the broker's"] = days_left(ssl.get_server_certificate((host.strip("[]"), int(port)), timeout=10).encode())
        except NotRun as e:
            if not left:
                raise NotRun(f"{e}; no --certificates") from None
        except OSError as e:
            raise CheckFailed(f"the broker shows no certificate at {host}:{port}: {e}") from None
        soon = {name: days for name, days in left.items() if days < DAYS}
        if soon:
            raise CheckFailed("; ".join(f"{name} {'has run out' if d < 0 else f'runs out in {d:.0f} days'}" for name, d in soon.items())
                              + ": predmaint pki issue … --renew-before 30")
        return {"certificates": len(left), "first_to_run_out_in_days": math.floor(min(left.values()))}

    # all of it

    def window(self) -> dict:
        "The test asset's window through broker and agent to its verdict, as any sensor's."
        if not self.broker or not self.asset or self.bundle is None:
            raise NotRun("no " + ", ".join(n for n, v in (("--broker", self.broker), ("--asset", self.asset), ("--bundle", self.bundle)) if not v))
        from pdm.stream.broker import client_of
        from pdm.stream.sensor_client import SensorClient

        contract, examples = self.bundle.contract, self.bundle.examples()
        if examples is None:
            raise NotRun("this bundle has no example windows")
        url = self.broker.replace("{mosquitto}", self.address("mosquitto")) if "{mosquitto}" in self.broker else self.broker
        begin = time.monotonic()
        # One connection for both, by the name in the certificate: the broker makes that the client's, so that a second one would take its place
        bus = _Listening(client_of(url, self.asset, session_s=0), topic(AssetPath.parse(self.asset), self.stream, "verdict"))
        try:
            with closing(SensorClient(bus, timeout_s=self.wait_s)) as client:
                bus.subscribe([bus.wanted])
                stream = client.open(self.asset, self.stream, contract.rate_hz, contract.channels, contract.units)
                conditions = {} if examples[1] is None else {c.name: float(v) for c, v in zip(contract.conditions, examples[1][0], strict=True)}
                seq = stream.send(examples[0][0], conditions=conditions, timeout_s=self.wait_s)
                while not stream.acknowledged and time.monotonic() < begin + self.wait_s:
                    time.sleep(0.02)
                if not stream.acknowledged:
                    raise CheckFailed(f"not acknowledged within {self.wait_s:.0f} s: {stream.silence}")
                acknowledged_s = time.monotonic() - begin
                verdict = bus.verdict(stream.epoch, seq, begin + self.wait_s)
        except PdmError as e:
            raise CheckFailed(str(e)) from e
        if verdict is None:
            raise CheckFailed(f"acknowledged after {acknowledged_s:.2f} s, but no verdict within {self.wait_s:.0f} s: does the agent know {self.asset}, and did it refuse "
                              "the window (predmaint quarantine, pdm_dead_letters_total)?")
        return {"acknowledged_s": round(acknowledged_s, 3), "verdict_s": round(time.monotonic() - begin, 3), "engine": verdict["engine"],
                "score": verdict["score"], "state": verdict["state"], "model": verdict["model"]}


class _Listening:
    "A connection whose verdicts are kept aside for us, while its acknowledgements go to the client that reads it."

    def __init__(self, bus: Any, wanted: str):
        self._bus, self.wanted, self._verdicts, self._came = bus, wanted, list[dict](), threading.Condition()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    def receive(self, limit: int, timeout_s: float) -> list:
        messages = self._bus.receive(limit, timeout_s)
        verdicts = [m for m in messages if m.topic == self.wanted]
        self._bus.ack(verdicts)
        with self._came:
            self._verdicts += [json.loads(m.payload) for m in verdicts]
            self._came.notify_all()
        return [m for m in messages if m.topic != self.wanted]

    def verdict(self, epoch: int, seq: int, until: float) -> dict | None:
        "On this window, or on a later one of the same life."
        def found() -> dict | None:
            return next((v for v in self._verdicts if v["epoch"] == epoch and v["seq"] >= seq), None)

        with self._came:
            while (v := found()) is None and (left := until - time.monotonic()) > 0:
                self._came.wait(left)
            return v
