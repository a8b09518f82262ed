"""The manifests of an overlay as pods of podman.

Podman 4 plays a Pod as Kubernetes would, but knows no Services, StatefulSets, DaemonSets, projected volumes or probes without systemd. What it lacks is
mapped here, and nowhere else:

| Kubernetes | here |
|---|---|
| Deployment, StatefulSet, DaemonSet | a Pod of its template, with restartPolicy Always |
| Service `name` | each pod has an address that is known beforehand, and knows the others by `hostAliases` |
| PersistentVolumeClaim, ConfigMap, Secret, projected, emptyDir | folders of this machine; what fsGroup would do, chown does |
| `envFrom` a ConfigMap | `env` |
| probes | `Cluster.wait_ready` asks what the readiness probe would ask |
| NetworkPolicy, PriorityClass, PodDisruptionBudget | nothing: tests/test_edge_manifests.py reads them |

The images of others come from Debian's packages (`SERVERS`): mosquitto, Prometheus, Alertmanager and node exporter as they are, InfluxDB 1 behind nginx, which
gives it `/api/v2/write` as InfluxDB 2 has it; Alertmanager is told its addresses in its file, since 0.25 reads them from no other. Grafana is in no package: its
pod is left out.
"""

import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import kustomized
import pytest
from edge_images import base, image, podman, run, settings
from servers import answers, influx_proxy

USER = 65532
SERVERS, PACKAGES = "localhost/predmaint-servers:under-test", "mosquitto influxdb influxdb-client nginx-light prometheus prometheus-alertmanager prometheus-node-exporter"
LEFT_OUT = {"grafana"}
_KEEP = {"io.podman.annotations.init.container.type": "always"}  # podman 4.3 now and then can't remove an init container that has just ended
_INFLUX = """set -eu
influxd -config /stand-in/influx.toml & influxd=$!
trap 'kill $influxd $nginx' TERM
nginx -p /tmp -e stderr -c /stand-in/nginx.conf & nginx=$!
until influx -port 8087 -execute 'CREATE DATABASE health'; do sleep 0.2; done  # which InfluxDB 2 does when it sets itself up
wait $influxd
"""
COMMANDS = {"prometheus": ["prometheus"], "alertmanager": ["prometheus-alertmanager"], "node-exporter": ["prometheus-node-exporter"], "influxdb": ["sh", "/stand-in/run.sh"]}


def images() -> dict[str, str]:
    "The images of all pods by the name that they have in the base, built if need be: ours, and for all others the one with Debian's servers. Skips the test where pods can't be reached."
    if os.geteuid() != 0:
        pytest.skip("pods of a podman that is not root's have no address which this machine reaches: run this as root")
    ours = {f"predmaint-{name}": image(name) for name in ("agent", "sinks", "updater", "triton")}
    if run("podman", "image", "exists", SERVERS, **settings()).returncode:
        containerfile = f"FROM {base()}\nRUN apt-get -qq update && apt-get -qq install -y --no-install-recommends {PACKAGES} >/dev/null && rm -r /var/lib/apt/lists\n"
        certificates = ["--volume=/etc/ssl/certs:/etc/ssl/certs:ro"] * Path("/etc/ssl/certs").is_dir()
        with tempfile.NamedTemporaryFile("w", suffix=".Containerfile") as file:
            file.write(containerfile)
            file.flush()
            podman("build", "-q", "--pull=never", "--network=host", *certificates, "-t", SERVERS, "-f", file.name, "/etc/ssl")
    return ours


class Cluster:
    "An overlay's pods, on a network of their own. `start`, then `close`, which leaves nothing."

    def __init__(self,
        folder: Path,
        overlay: Path,
        images: Mapping[str, str],              # of our programs, by the name in the base
        secrets: Mapping[str, Mapping[str, bytes]],
        more: Mapping[str, Path] | None = None,  # other folders of this machine, by where updater and agent see them
    ):
        self.folder, self.subnet, self.name = folder, f"10.177.{os.getpid() % 256}", f"predmaint-{os.getpid()}"  # as good as free: two runs at once don't meet
        self._objects, self._secrets, self._more = kustomized.rendered(overlay), secrets, dict(more or {})
        self._maps = {re.sub("-[a-z0-9]{10}$", "", o["metadata"]["name"]): o["data"] for o in self._objects if o["kind"] == "ConfigMap"}
        self.templates = {o["metadata"]["name"]: o["spec"]["template"]["spec"] for o in self._objects
                          if o["kind"] in ("Deployment", "StatefulSet", "DaemonSet") and o["metadata"]["name"] not in LEFT_OUT}
        self.address = {name: f"{self.subnet}.{10 + i}" for i, name in enumerate(sorted(self.templates))}
        self._images = images

    @property
    def gateway(self) -> str:
        "This machine, as the pods see it."
        return f"{self.subnet}.1"

    def volume(self, claim: str) -> Path:
        "The folder that a claim has become."
        return self.folder / "claims" / claim

    def start(self) -> None:
        podman("network", "create", "--disable-dns", "--subnet", f"{self.subnet}.0/24", self.name)
        self.power_up()

    def power_up(self) -> None:
        for name in sorted(self.templates, key=lambda n: n == "agent"):  # podman waits for init containers, and the agent's waits for the updater
            self.play(name)

    def play(self, name: str) -> None:
        "Start a pod, as the manifest says."
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(self._pod(name), indent=1))
        done = run("podman", "kube", "play", "--network", self.name, "--ip", self.address[name], file, **settings())
        assert done.returncode == 0, f"{name}: {done.stderr[-2000:]}\n{self.logs(name)[-2000:]}"

    def kill(self, name: str) -> None:
        "SIGKILL to all that runs in a pod; its containers go with it."
        podman("pod", "kill", "--signal", "KILL", self._named(name))
        podman("pod", "rm", "--force", "--time", "0", self._named(name))

    def power_cut(self) -> None:
        "SIGKILL to all pods at once; their claims stay, as they are at that moment."
        names = [self._named(name) for name in self.templates]
        podman("pod", "kill", "--signal", "KILL", *names)
        podman("pod", "rm", "--force", "--time", "0", *names)

    def logs(self, name: str) -> str:
        told = [run("podman", "logs", f"{self._named(name)}-{c['name']}", **settings()) for c in [*self.templates[name].get("initContainers", []), *self.templates[name]["containers"]]]
        return "\n".join(t.stdout + t.stderr for t in told)

    def execute(self, name: str, container: str, *command: str) -> subprocess.CompletedProcess:
        return run("podman", "exec", f"{self._named(name)}-{container}", *command, **settings())

    def wait_ready(self, *names: str, timeout_s: float = 90) -> None:
        "Until each pod's readiness probes say yes; all pods without names."
        end = time.monotonic() + timeout_s
        for name in names or self.templates:
            for c in self.templates[name]["containers"]:
                while c.get("readinessProbe") and not self.ready(name, c):
                    assert time.monotonic() < end, f"{name} is not ready after {timeout_s:g} s:\n{self.logs(name)[-3000:]}"
                    time.sleep(0.2)

    def ready(self, name: str, container: Mapping, probe: str = "readinessProbe") -> bool:
        "What a probe of a container says now."
        asked = container[probe]
        if "exec" in asked:
            return self.execute(name, container["name"], *asked["exec"]["command"]).returncode == 0
        port = next(p["containerPort"] for p in container["ports"] if p["name"] == asked["httpGet"]["port"])
        return answers(f"http://{self.address[name]}:{port}{asked['httpGet']['path']}", (200,))

    def close(self) -> None:
        podman("pod", "rm", "--force", "--time", "2", "--ignore", *map(self._named, self.templates))
        if self.name in podman("network", "ls", "--format", "{{.Name}}").split():
            podman("network", "rm", self.name)

    def left(self) -> list[str]:
        "What is still there of it."
        pods = podman("pod", "ps", "--format", "{{.Name}}").split()
        return [n for n in pods if n.startswith(self.name)] + [n for n in podman("network", "ls", "--format", "{{.Name}}").split() if n == self.name]

    # the mapping

    def _named(self, name: str) -> str:
        return f"{self.name}-{name}"

    def _pod(self, name: str) -> dict:
        spec = json.loads(json.dumps(self.templates[name]))
        for key in ("priorityClassName", "enableServiceLinks", "automountServiceAccountToken"):
            spec.pop(key, None)
        user = spec["securityContext"].get("runAsUser", 0)
        volumes = {v["name"]: self._folder(name, v, user) for v in spec.pop("volumes", [])}
        for c in [*spec.get("initContainers", []), *spec["containers"]]:
            self._container(name, c, volumes)
        spec["volumes"] = [{"name": n, "hostPath": {"path": str(path)}} for n, path in volumes.items()]
        spec["hostAliases"] = [{"ip": ip, "hostnames": [other]} for other, ip in self.address.items()]
        spec["restartPolicy"] = "Always"
        return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": self._named(name), "annotations": _KEEP}, "spec": spec}

    def _container(self, name: str, c: dict, volumes: dict[str, Path]) -> None:
        image = c["image"].partition("@")[0].rpartition("/")[2].rpartition(":")[0]
        c["image"], c["imagePullPolicy"] = self._images.get(image, SERVERS), "Never"
        for key in ("ports", "startupProbe", "readinessProbe", "livenessProbe"):
            c.pop(key, None)
        c["env"] = [*({"name": k, "value": v} for e in c.pop("envFrom", []) for k, v in self._map(e["configMapRef"]["name"]).items()), *c.get("env", [])]
        if image not in self._images and "command" not in c:
            c["command"] = COMMANDS[name]
        more = self._more if name in ("agent", "updater") else {}
        more |= {"/stand-in": self._influx()} if name == "influxdb" else {}
        for i, (path, folder) in enumerate(more.items()):
            volumes[f"more-{i}"] = folder
            c["volumeMounts"].append({"name": f"more-{i}", "mountPath": path, "readOnly": True})

    def _map(self, name: str) -> dict[str, str]:
        return self._maps[re.sub("-[a-z0-9]{10}$", "", name)]

    def _folder(self, pod: str, volume: dict, user: int) -> Path:
        "The folder for a volume of a pod, filled."
        if "hostPath" in volume:
            return Path(volume["hostPath"]["path"])
        if "persistentVolumeClaim" in volume:
            path = self.volume(volume["persistentVolumeClaim"]["claimName"])
            fresh = not path.exists()
        else:
            path, fresh = self.folder / "volumes" / pod / volume["name"], True
        path.mkdir(parents=True, exist_ok=True)
        for name, content in self._files(volume).items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_bytes(content)
        if fresh:
            for p in [path, *path.rglob("*")]:
                os.chown(p, user, user)
        return path

    def _files(self, volume: dict) -> dict[str, bytes]:
        if "configMap" in volume:
            data, items = self._map(volume["configMap"]["name"]), volume["configMap"].get("items")
            data = {i["path"]: data[i["key"]] for i in items} if items else data
            return {k: self._for_debian(v).encode() for k, v in data.items()}
        files: dict[str, bytes] = {}
        for s in [volume.get("secret"), *(source["secret"] for source in volume.get("projected", {}).get("sources", []))]:
            if s is not None:
                keys = self._secrets.get(s.get("secretName") or s["name"])
                assert keys is not None or s.get("optional"), f"no secret {s}"
                items = {i["key"]: i["path"] for i in s["items"]} if "items" in s else {k: k for k in keys or {}}
                files |= {path: keys[key] for key, path in items.items() if keys and key in keys}
        return files

    def _for_debian(self, text: str) -> str:
        "Alertmanager 0.25 knows no `url_file`."
        keys = self._secrets["alertmanager"]
        return re.sub(r"url_file: /run/secrets/alertmanager/(\S+)", lambda m: f"url: {keys[m[1]].decode()}", text)

    def _influx(self) -> Path:
        "The configuration of the stand-in for InfluxDB 2."
        folder = self.folder / "stand-in"
        folder.mkdir(exist_ok=True)
        data = "/var/lib/influxdb2"
        (folder / "influx.toml").write_text(
            f'bind-address = "127.0.0.1:8088"\nreporting-disabled = true\n[meta]\ndir = "{data}/meta"\n[data]\ndir = "{data}/data"\nwal-dir = "{data}/wal"\n'
            'query-log-enabled = false\n[monitor]\nstore-enabled = false\n[http]\nbind-address = "127.0.0.1:8087"\nlog-enabled = false\n')
        (folder / "run.sh").write_text(_INFLUX)
        (folder / "nginx.conf").write_text(influx_proxy("/tmp", inner=8087, listen="0.0.0.0:8086", token=self._secrets["influxdb"]["token"].decode()))
        return folder
