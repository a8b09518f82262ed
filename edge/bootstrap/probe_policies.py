"""Can this kernel do what K3s makes network policies of? `python3 probe_policies.py iptables` says what it lacks, or nothing.

K3s' controller (kube-router) keeps addresses in sets of the kernel, and asks for them in its rules. Where one kind of set or rule is missing it does not
start, K3s goes on, and every policy is void. Sets are made here by netlink, since the program `ipset` need not be installed: K3s brings its own. All
of it happens in a network namespace of its own, and goes with it.
"""

import ctypes
import os
import socket
import struct
import subprocess
import sys

SETS = ("hash:ip", "hash:net", "hash:ip,port", "hash:net,port")
RULES = (
    "-m comment --comment x -m mark ! --mark 0x10000/0x10000 -m conntrack --ctstate NEW -m addrtype --dst-type LOCAL -j ACCEPT",
    "-j MARK --set-xmark 0x10000/0x10000",
    "-m set --match-set predmaint-0 src -j ACCEPT",
    "-m limit --limit 10/minute --limit-burst 10 -j NFLOG --nflog-group 100",
    "-j REJECT",
)
IPSET, CREATE, TYPE, ERROR = 6 << 8, 2, 13, 2  # include/uapi/linux/netfilter: nfnetlink.h, ipset/ip_set.h
PROTOCOL, SETNAME, TYPENAME, REVISION, FAMILY = 1, 2, 3, 4, 5
REQUEST, ACK = 1, 4


def attribute(kind: int, value: bytes | int) -> bytes:
    "Of a netlink message: length, kind, value, filled up to four bytes."
    data = bytes([value]) if isinstance(value, int) else value + b"\0"
    return struct.pack("=HH", 4 + len(data), kind) + data + b"\0" * (-len(data) % 4)


def ask(link: socket.socket, command: int, *attributes: bytes) -> dict[int, bytes]:
    "The attributes of the kernel's answer. Raises `OSError` with its error."
    body = struct.pack("=BBH", socket.AF_INET, 0, 0) + attribute(PROTOCOL, 6) + b"".join(attributes)
    link.send(struct.pack("=IHHII", 16 + len(body), IPSET | command, REQUEST | ACK, 1, 0) + body)
    found: dict[int, bytes] = {}
    while True:
        data = link.recv(65536)
        while data:
            length, kind = struct.unpack_from("=IH", data)
            if kind == ERROR:
                if code := struct.unpack_from("=i", data, 16)[0]:
                    raise OSError(-code, "")
                return found
            at = 20
            while at < length:
                size, name = struct.unpack_from("=HH", data, at)
                found[name & 0x3FFF] = data[at + 4 : at + size]
                at += size + -size % 4
            data = data[length + -length % 4 :]


def lacks(iptables: str) -> list[str]:
    "What this kernel can't do. Leaves this process in a network namespace of its own. Raises `OSError` where it gets none."
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x40000000):  # CLONE_NEWNET
        raise OSError(ctypes.get_errno(), f"a network namespace: {os.strerror(ctypes.get_errno())}")
    missing = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as link:  # netfilter
        for i, name in enumerate(SETS):
            try:
                kind = attribute(TYPENAME, name.encode()), attribute(FAMILY, socket.AF_INET)
                revision = ask(link, TYPE, *kind)[REVISION][0]
                ask(link, CREATE, attribute(SETNAME, f"predmaint-{i}".encode()), *kind, attribute(REVISION, revision))
            except OSError:
                missing.append(f"sets of the kind {name}")
    for rule in RULES:
        if subprocess.run([iptables, "-A", "FORWARD", *rule.split()], capture_output=True).returncode:
            missing.append(f"{iptables} {rule}")
    return missing


if __name__ == "__main__":
    try:
        print("; ".join(lacks(sys.argv[1])), end="")
    except OSError as e:
        print(e, end="")
