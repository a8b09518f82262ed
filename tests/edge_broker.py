"The broker of a site as it is shipped: edge/mosquitto with its paths and ports put where a test may write, and certificates of `predmaint pki`."

import os
import re
import shutil
import signal
import socket
import ssl
from pathlib import Path

from servers import listens, need

from pdm.pki import init, issue
from pdm.process import Child, free_port

CONFIG = Path(__file__).resolve().parent.parent / "edge" / "mosquitto"


def shipped(moved: dict[str, str]) -> str:
    "mosquitto.conf with some of its text replaced, which must be there."
    text = (CONFIG / "mosquitto.conf").read_text()
    for old, new in moved.items():
        assert old in text, f"mosquitto.conf has no {old!r} any more"
        text = text.replace(old, new)
    return text


class Door:
    "A mosquitto with the two doors of a site, and a third one for the test: who looks through it sees every message."

    def __init__(self, folder: Path, more: str = ""):
        (self.program,) = need("mosquitto", "mosquitto")
        self.folder, self.config, self.pki, self.certs = folder, folder / "config", folder / "pki", folder / "certs"
        shutil.copytree(CONFIG, self.config)
        lists = self.config / "sensors.acl"
        lists.write_text(re.sub("(?m)^#   (?=user|topic)", "", lists.read_text()) + more)  # the lines that a site may add: its gateway, and who listens
        self.sensors, self.services, self.spy = free_port(), free_port(), free_port()
        init(self.pki)
        issue(self.pki, "mosquitto", ["127.0.0.1"])
        self.carry()
        (folder / "data").mkdir()
        text = shipped({"\nlistener 8883\n": f"\nlistener {self.sensors} 127.0.0.1\n", "\nlistener 8884\n": f"\nlistener {self.services} 127.0.0.1\n",
                        "acl_file /mosquitto/config": f"acl_file {self.config}", "file /mosquitto/certs": f"file {self.certs}",
                        "persistence_location /mosquitto/data": f"persistence_location {folder}/data"})
        root = "user root\n" if os.geteuid() == 0 else ""  # or it would become `mosquitto`, who may not write here
        (folder / "mosquitto.conf").write_text(f"{text}{root}listener {self.spy} 127.0.0.1\nallow_anonymous true\n")
        script = (CONFIG / "start.sh").read_text()
        for place in ("/mosquitto/data", "/mosquitto/config"):
            assert place in script
        (folder / "start.sh").write_text(script.replace("/mosquitto/data", f"{folder}/data").replace("/mosquitto/config", str(folder)).replace("exec mosquitto", f"exec {self.program}"))
        self.start()

    def start(self):
        self.child = Child(["sh", self.folder / "start.sh"], self.folder / "mosquitto.log")
        self.child.wait_ready(lambda: listens(self.sensors) and listens(self.services))

    def restart(self):
        "As a power cut does."
        self.child.kill()
        self.start()

    def carry(self):
        "Bring the server's folder to the broker, as a renewed secret does."
        shutil.copytree(self.pki / "servers" / "mosquitto", self.certs, dirs_exist_ok=True)

    def read_again(self):
        "SIGHUP; when this returns it has: a signal is looked for after each round of events, and a handshake takes several."
        os.kill(self.child.pid, signal.SIGHUP)
        self.shown()

    @property
    def log(self) -> str:
        return (self.folder / "mosquitto.log").read_text()

    def identity(self, name: str, **options) -> Path:
        "The folder with a certificate for an asset or a service, which is made unless it is there."
        where = self.pki / ("assets" if "/" in name else "services") / name
        if not (where / "tls.crt").exists():
            issue(self.pki, name, **options)
        return where

    def url(self, name: str, port: int = 0) -> str:
        "The address for an identity, at its own door unless another port is named."
        return self.address(self.identity(name), port or (self.sensors if "/" in name else self.services))

    @staticmethod
    def address(where: Path, port: int) -> str:
        return f"mqtts://127.0.0.1:{port}?ca={where}/ca.crt&cert={where}/tls.crt&key={where}/tls.key"

    def shown(self) -> str:
        "The certificate that the sensors' door shows now, PEM."
        where = self.identity("e/s/a/l/looker")
        context = ssl.create_default_context(cafile=where / "ca.crt")
        context.load_cert_chain(where / "tls.crt", where / "tls.key")
        with socket.create_connection(("127.0.0.1", self.sensors)) as raw, context.wrap_socket(raw, server_hostname="127.0.0.1") as s:
            return ssl.DER_cert_to_PEM_cert(s.getpeercert(True))

    def close(self):
        self.child.stop()
