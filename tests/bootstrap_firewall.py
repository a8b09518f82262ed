"""Hold the installer's firewall against real packets: `bootstrap_firewall.py firewall.sh FOLDER_OF_RULES`, in a network namespace of its own (test_bootstrap.py).

Four neighbours have a namespace each and try this machine's ports, one of them by an interface that is left open; a fifth is a pod behind the bridge cni0, to which a port is forwarded as Kubernetes
does it. What got through goes to the standard output as JSON."""

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from socket import create_server, socket

PORTS = [22, 6443, 8883, 9090]
NEIGHBOURS = {"admin": "10.20.0", "sensor": "10.30.0", "stranger": "10.40.0", "usb": "10.50.0", "pod": "10.42.0"}
LINKS = {"usb": "l4tbr0", "pod": "cni0"}
TRY = """
import socket, sys
got = []
for port in map(int, sys.argv[2:]):
    try:
        socket.create_connection((sys.argv[1], port), timeout=0.3).close()
        got.append(port)
    except OSError:
        pass
print(got)
"""
HOLD = """
import socket, sys
s = socket.create_connection((sys.argv[1], 22), timeout=2)
s.sendall(b"a"); s.recv(1); print("begun", flush=True)
sys.stdin.readline()
s.sendall(b"b"); print(s.recv(1) == b"b", flush=True)
"""
LISTEN = "import socket\ns = socket.create_server(('0.0.0.0', 1883), backlog=50)\nprint('begun', flush=True)\nwhile True: s.accept()"


def sh(*words: object) -> str:
    return subprocess.run([str(w) for w in words], check=True, capture_output=True, text=True).stdout


def began(*words: object) -> subprocess.Popen[str]:
    "A process that has said its first line."
    child = subprocess.Popen([str(w) for w in words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline().strip() == "begun"
    return child


def echo(server: socket) -> None:
    def serve(connection):
        while data := connection.recv(100):
            connection.sendall(data)

    while True:
        threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()


def main(script: Path, rules: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        firewall = Path(folder) / "firewall.sh"
        firewall.write_text(script.read_text().replace("/etc/predmaint", str(rules)))
        pids, children = {}, []
        sh("ip", "link", "set", "lo", "up")
        for name, net in NEIGHBOURS.items():
            link = LINKS.get(name, name)
            child = began("unshare", "--net", "sh", "-c", "echo begun; exec sleep 600")
            children.append(child)
            pids[name] = child.pid
            sh("ip", "link", "add", link, "type", "veth", "peer", "name", f"to-{link}", "netns", child.pid)
            sh("ip", "address", "add", f"{net}.1/24", "dev", link)
            sh("ip", "link", "set", link, "up")
            sh("nsenter", "-t", child.pid, "-n", "sh", "-c",
               f"ip address add {net}.5/24 dev to-{link}; ip link set to-{link} up; ip link set lo up; ip route add default via {net}.1")

        def inside(name: str, code: str, *words: object) -> list[str]:
            return ["nsenter", "-t", str(pids[name]), "-n", sys.executable, "-c", code, *map(str, words)]

        def reach(*ports: int) -> dict[str, list[int]]:
            children = {n: subprocess.Popen(inside(n, TRY, f"{NEIGHBOURS[n]}.1", *ports), stdout=subprocess.PIPE, text=True) for n in NEIGHBOURS if n != "pod"}
            return {n: json.loads(child.communicate(timeout=60)[0]) for n, child in children.items()}

        for port in PORTS:
            threading.Thread(target=echo, args=(create_server(("0.0.0.0", port), backlog=50),), daemon=True).start()  # noqa: S104 (in a namespace of its own)
        said: dict[str, object] = {"before": reach(*PORTS)}
        held = began(*inside("admin", HOLD, "10.20.0.1"))
        sh("bash", firewall, "start")
        said["during"] = reach(*PORTS)
        said["held"] = held.communicate("\n", timeout=20)[0] == "True\n"
        sh("bash", firewall, "start")
        said["twice"] = reach(*PORTS)
        said["jumps"] = sh("iptables", "-t", "mangle", "-S", "PREROUTING").count("-j PREDMAINT")

        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        pod = began(*inside("pod", LISTEN))
        sh("iptables", "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "8883", "-j", "DNAT", "--to-destination", "10.42.0.5:1883")
        said["forwarded"] = {n: got == [8883] for n, got in reach(8883).items() if n != "admin"}
        sh("iptables", "-t", "nat", "-F")
        sh("bash", firewall, "stop")
        sh("bash", firewall, "stop")
        said["after"] = reach(*PORTS)
        print(json.dumps(said))
        for child in [*children, pod, held]:
            child.kill()


main(*map(Path, sys.argv[1:]))
