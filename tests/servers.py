"""Real servers for tests: each on free ports of this machine, killed and started again on the same ones, and gone with the test.

What is not installed is skipped, with the command that brings it."""

import http.server
import json
import os
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode, urlsplit
from urllib.request import Request, urlopen

import psutil
import pytest

from pdm.process import Child, find_program, free_port


def need(package: str, *programs: str) -> list[Path]:
    "Where these programs are; skips the test where one is missing."
    found = [find_program(p) for p in programs]
    if None in found:
        pytest.skip(f"apt-get install {package}")
    return found


def wait_for(true: Callable[[], Any], timeout_s: float = 30) -> Any:
    "What `true` says, as soon as it says something."
    end = time.monotonic() + timeout_s
    while not (found := true()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def alive(process: psutil.Process, name: str = "") -> bool:
    "Whether it runs, and its name begins so; it may end while it is looked at."
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE and process.name().startswith(name)
    except psutil.NoSuchProcess:
        return False


def answers(url: str, codes: tuple[int, ...] = (200, 204)) -> bool:
    try:
        return urlopen(url, timeout=1).status in codes
    except (URLError, OSError):
        return False


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


class Influx:
    "influxd 1.x from apt behind nginx, which gives it /api/v2/write and asks for a token: what InfluxDB 1.8, 2 and 3 have by themselves."

    org, bucket, token = "plant", "pdm", "edge-token"

    def __init__(self, folder: Path, retention: str | None = None):
        self.influxd, self.nginx = need("influxdb nginx-light", "influxd", "nginx")
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.port, self.inner, rpc = free_port(), free_port(), free_port()
        (folder / "influx.toml").write_text(
            f'bind-address = "127.0.0.1:{rpc}"\nreporting-disabled = true\n[meta]\ndir = "{folder}/meta"\n[data]\ndir = "{folder}/data"\n'
            f'wal-dir = "{folder}/wal"\nquery-log-enabled = false\n[monitor]\nstore-enabled = false\n'
            f'[http]\nbind-address = "127.0.0.1:{self.inner}"\nlog-enabled = false\n')
        (folder / "nginx.conf").write_text(influx_proxy(str(folder), self.inner, f"127.0.0.1:{self.port}", self.token, "user root;" if os.geteuid() == 0 else ""))
        self.children: list[Child] = []
        self.start()
        if retention is not None:
            self.query(f'CREATE DATABASE "{self.bucket}" WITH DURATION {retention} REPLICATION 1')

    @property
    def url(self) -> str:
        return f"influxdb://127.0.0.1:{self.port}/{self.org}/{self.bucket}"

    def start(self):
        self.children = [
            Child([self.influxd, "-config", self.folder / "influx.toml"], self.folder / "influxd.log")
            .wait_ready(lambda: answers(f"http://127.0.0.1:{self.inner}/ping")),
            Child([self.nginx, "-p", self.folder, "-e", "stderr", "-c", self.folder / "nginx.conf"], self.folder / "nginx.log")
            .wait_ready(lambda: answers(f"http://127.0.0.1:{self.port}/health"))]

    def kill(self):
        "SIGKILL to both."
        for child in reversed(self.children):
            child.kill()

    def close(self):
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def query(self, q: str) -> list[dict]:
        "The series that InfluxQL finds; past the proxy."
        body = urlencode({"q": q, "db": self.bucket, "epoch": "ns"}).encode()
        result = json.load(urlopen(f"http://127.0.0.1:{self.inner}/query", body, timeout=10))["results"][0]
        assert "error" not in result, result["error"]
        return result.get("series", [])


class RunningInflux:
    "An InfluxDB 2 that somebody else runs, and a bucket of its own in it. A test that would kill the server skips."

    def __init__(self, url: str, hours: int):
        self.address, self.token = url.rstrip("/"), os.environ["PREDMAINT_TEST_INFLUX_TOKEN"]
        self.org, self.bucket = "plant", f"pdm-{uuid.uuid4().hex}"
        self.port = urlsplit(url).port
        (org,) = self._ask("GET", f"/api/v2/orgs?org={self.org}")["orgs"]
        made = self._ask("POST", "/api/v2/buckets", {"orgID": org["id"], "name": self.bucket, "retentionRules": [{"type": "expire", "everySeconds": hours * 3600}]})
        self._id = made["id"]

    def _ask(self, method: str, path: str, body: dict | None = None) -> dict:
        asked = Request(self.address + path, None if body is None else json.dumps(body).encode(), {"Authorization": f"Token {self.token}"}, method=method)
        with urlopen(asked, timeout=10) as answer:
            return json.loads(answer.read() or b"{}")

    @property
    def url(self) -> str:
        return f"influxdb://{urlsplit(self.address).netloc}/{self.org}/{self.bucket}"

    def kill(self):
        pytest.skip("PREDMAINT_TEST_INFLUX_URL: a server that runs already is not killed")

    def close(self):
        self._ask("DELETE", f"/api/v2/buckets/{self._id}")

    def query(self, q: str) -> list[dict]:
        "The series that InfluxQL finds."
        result = self._ask("GET", f"/query?{urlencode({'q': q, 'db': self.bucket, 'epoch': 'ns'})}")["results"][0]
        assert "error" not in result, result["error"]
        return result.get("series", [])


def influx(folder: Path, hours: int) -> Influx | RunningInflux:
    "A store that keeps what is not older than `hours`: in the server of PREDMAINT_TEST_INFLUX_URL where that is set, or in one of its own."
    url = os.environ.get("PREDMAINT_TEST_INFLUX_URL")
    return RunningInflux(url, hours) if url else Influx(folder, retention=f"{hours}h")


class Registry:
    "docker-registry from apt: an OCI registry, which asks for a login where it is told to."

    user, password = "edge", "secret"
    _hashed = "$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a"  # bcrypt

    def __init__(self, folder: Path, login: bool = False):
        (program,) = need("docker-registry", "docker-registry")
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        config = {"version": "0.1", "storage": {"filesystem": {"rootdirectory": str(folder / "data")}}, "http": {"addr": f"127.0.0.1:{self.port}"},
                  "log": {"level": "error"}}
        if login:
            (folder / "htpasswd").write_text(f"{self.user}:{self._hashed}\n")
            config["auth"] = {"htpasswd": {"realm": "edge", "path": str(folder / "htpasswd")}}
        (folder / "config.yml").write_text(json.dumps(config))
        self.child = Child([program, "serve", folder / "config.yml"], folder / "registry.log")
        self.child.wait_ready(lambda: listens(self.port))

    @property
    def url(self) -> str:
        return f"oci://127.0.0.1:{self.port}/plant/bundles"

    def close(self):
        self.child.stop()


class Mlflow:
    "A tracking server with its model registry, in SQLite."

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.child = Child([sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination",
                            folder / "artifacts", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"], folder / "mlflow.log",
                           {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"})  # its job runners are four processes more
        self.child.wait_ready(lambda: answers(f"http://127.0.0.1:{self.port}/health"), timeout_s=120)

    @property
    def url(self) -> str:
        return f"mlflow+http://127.0.0.1:{self.port}/fan_motor"

    def close(self):
        self.child.stop()


class Alerts:
    "Alertmanager as far as its API for senders goes: alerts by their labels, and no to one that it can't read."

    refuses = "e/s/a/l/refused"

    def __init__(self):
        self.alerts: dict[str, dict] = {}
        self.port = free_port()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                alerts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                good = self.path == "/api/v2/alerts" and all(a["labels"]["asset"] != server.refuses for a in alerts)
                if good:
                    server.take(alerts)
                self.send_response(200 if good else 400)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.http = http.server.HTTPServer(("127.0.0.1", self.port), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,))
        self.thread.start()

    def take(self, alerts: list[dict]) -> None:
        self.alerts.update((json.dumps(a["labels"], sort_keys=True), a) for a in alerts)

    def kill(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


_NGINX = """
daemon off; master_process off; pid %(folder)s/nginx.pid; %(user)s error_log stderr crit;
events { worker_connections 256; }
http {
  access_log off; client_max_body_size 50m; client_body_buffer_size 16m;
  client_body_temp_path %(folder)s/t1; proxy_temp_path %(folder)s/t2; fastcgi_temp_path %(folder)s/t3; uwsgi_temp_path %(folder)s/t4; scgi_temp_path %(folder)s/t5;
  upstream influx1 { server 127.0.0.1:%(inner)d; keepalive 16; }
  map $arg_bucket $v1db { default $arg_bucket; "~^(?<d>[^%%/]+)(?:%%2[Ff]|/)(?<r>.+)$" $d; }
  map $arg_bucket $v1rp { default "autogen"; "~^(?<d2>[^%%/]+)(?:%%2[Ff]|/)(?<r2>.+)$" $r2; }
  map $arg_precision $v1p { default n; ns n; us u; ms ms; s s; }
  map $http_authorization $okauth { default 0; "Token %(token)s" 1; }
  proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Authorization "";
  server {
    listen %(listen)s;
    location = /api/v2/write {
      if ($okauth = 0) { return 401 '{"code":"unauthorized","message":"unauthorized access"}'; }
      rewrite ^ /write?db=$v1db&rp=$v1rp&precision=$v1p? break; proxy_pass http://influx1; }
    location = /query { if ($okauth = 0) { return 401 '{"error":"unauthorized access"}'; } proxy_pass http://influx1; }
    location = /ping { proxy_pass http://influx1; }
    location = /metrics { proxy_pass http://influx1; }
    location = /health { default_type application/json; return 200 '{"name":"influxdb","status":"pass"}'; }
    location / { default_type application/json; return 404 '{"error":"not found"}'; }
  }
}
"""


def influx_proxy(folder: str, inner: int, listen: str, token: str, user: str = "") -> str:
    "nginx.conf of what gives InfluxDB 1 on the port `inner` the way to write that 2 and 3 have; `folder` is for its own files."
    return _NGINX % {"folder": folder, "inner": inner, "listen": listen, "token": token, "user": user}
