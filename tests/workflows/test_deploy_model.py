"""An approved model goes the whole way that deploy-model.yml sends it: from a message to what runs at two sites, and back where one says no.

Real: the workflow's own steps, git, PostgreSQL, tritonserver, agents and updaters, each site's updater a process of its own. Stand-ins, named as such:
the actions of others (`stand_ins`), GitHub's issues, a loop of `git pull` in place of Flux, and a bus in the test's hand in place of a broker."""

import json
import os
import re
import subprocess
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from on_this_machine import run_act
from test_rollout import Line, keys, signed
from warehouse_servers import postgres_programs, shared_postgres

from pdm.errors import PartMissing
from pdm.loop.release import put_beside
from pdm.model.bundle import load_bundle
from pdm.model.transport import push
from pdm.process import Child
from pdm.serve.engine import InProcess
from pdm.serve.triton import TritonEngine
from pdm.stream.postgres import PostgresSink
from pdm.stream.reports import Reporter
from pdm.stream.rollout import read_wanted

__all__ = ["keys"]
pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]
PASSED = {"passed": True, "probation": False, "criteria": [{"name": "promise", "passed": True, "says": "no alarm in 12 days"}]}


class Issues:
    "Stands in for GitHub: it keeps issues."

    def __init__(self):
        self.open, hub = [], self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(200, hub.open)

            def do_POST(self):
                said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                hub.open.append(said | {"html_url": f"{self.path}/{len(hub.open) + 1}", "token": self.headers["Authorization"]})
                self.answer(201, hub.open[-1])

            def answer(self, status, body):
                text = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


class Plant:
    "Two sites, each a ring; their repository, their warehouse, and where their bundles lie."

    def __init__(self, folder, make_bundle, keys, engines):
        self.folder, self.keys, self.issues, self.runs = folder, keys, Issues(), 0
        self.released = folder / "released"
        self.warehouse = shared_postgres(next(iter(postgres_programs()))).new_database(f"deploy_{uuid.uuid4().hex[:8]}")
        PostgresSink(self.warehouse).init()
        self.remote = folder / "repositories/acme/sites"
        subprocess.run(["git", "init", "-q", "--bare", "-b", "main", self.remote], check=True)
        self.hand = self.clone("hand")
        rings = {"canary": ["acme/lyon"], "rest": ["acme/oslo"]}
        (self.hand / "predmaint.toml").write_text(f'bundle_url = "file:{self.released}"\nrelease_api = "http://127.0.0.1:{self.issues.http.server_port}"\n'
                                                  f'[rings]\n{"".join(f"{ring} = {json.dumps(sites)}{chr(10)}" for ring, sites in rings.items())}')
        for ring in rings:
            (self.hand / "rings" / ring).mkdir(parents=True)
            (self.hand / "rings" / ring / "desired").write_text("# one line a type of asset\n")
            (self.hand / "rings" / ring / "release.pub").write_bytes((keys / "release.pub").read_bytes())
        self.git("add", ".")
        self.git("commit", "-qm", "Two sites")
        self.git("push", "-q", "origin", "HEAD:main")
        self.stop, self.lines, self.trouble = threading.Event(), [], []
        self.children, self.threads = [], []
        for (ring, (site,)), engine in zip(rings.items(), engines, strict=True):
            self.lines.append(line := Line(folder / ring, make_bundle))
            line.start(engine)
            env = {**os.environ, **{f"PREDMAINT_{k}": str(v) for k, v in {
                "STATE_DIR": line.settings.state_dir, "ASSETS": line.settings.assets, "BUNDLE_URL": f"file:{self.released}", "TRUSTED_KEYS": json.dumps([str(keys / "release.pub")]),
                "ENGINE_URL": "embedded:" if isinstance(engine, TritonEngine) else "inprocess:", "SHADOW_WINDOWS": 40, "PROBATION_MINUTES": 0.02, "ROLLOUT_FREE_MB": 1,
                "UPDATER_METRICS_PORT": 0}.items()}}
            self.children.append(Child([sys.executable, "-c", "from pdm.cli import main; main()", "triton", "run"], folder / f"{ring}.log", env=env, name="updater"))
            self.threads.append(Reporter(line.file, PostgresSink(self.warehouse), lambda site=site: [site], "agent", self.stop).start())
            for work in (self.flux, self.feed):
                threading.Thread(target=self.guarded, args=(work, ring, line), daemon=True).start()

    def clone(self, name):
        subprocess.run(["git", "clone", "-q", self.remote, self.folder / name], check=True, capture_output=True)
        return self.folder / name

    def git(self, *words):
        name = {"GIT_AUTHOR_NAME": "hand", "GIT_AUTHOR_EMAIL": "hand@localhost", "GIT_COMMITTER_NAME": "hand", "GIT_COMMITTER_EMAIL": "hand@localhost"}
        return subprocess.run(["git", "-C", self.hand, *words], check=True, capture_output=True, text=True, env=os.environ | name).stdout

    def guarded(self, work, *what):
        try:
            work(*what)
        except Exception as e:  # noqa: BLE001 (told by `close`)
            self.trouble.append(e)

    def flux(self, ring, line):
        "Stands in for Flux: what stands in Git comes into the file that the updater reads."
        here = self.clone(f"flux-{ring}")
        while not self.stop.wait(0.3):
            subprocess.run(["git", "-C", here, "pull", "-q"], check=True, capture_output=True)
            if (text := (here / "rings" / ring / "desired").read_text()) != (line.settings.desired_file.read_text() if line.settings.desired_file.exists() else ""):
                line.settings.desired_file.write_text(text)

    def feed(self, ring, line):
        while not self.stop.wait(0.05):
            line.send(2, level=1.3)

    def close(self):
        self.stop.set()
        for child in self.children:
            child.stop()
        for reporter in self.threads:
            reporter.stop()
        time.sleep(0.5)  # what the threads are at ends before what they speak to
        for line in self.lines:
            line.stop()
            line.rollout.close()
        self.issues.close()
        assert not self.trouble, self.trouble

    def approve(self, gain, key="release", gate=PASSED):
        "A bundle that is released as the loop does it; its digest."
        line = self.lines[0]
        digest = line.release(gain)
        if gate:
            put_beside(load_bundle(line.bundles / digest), gate=gate)
        push((line.bundles / signed(line, digest, self.keys / key)), f"file:{self.released}")
        return digest

    def run(self, **told):
        "deploy-model.yml, started as GitHub would."
        self.runs += 1
        by_hand = "ring" not in told
        return run_act(self.folder / f"run-{self.runs}", "deploy", "workflow_dispatch" if by_hand else "repository_dispatch",
                       {"inputs": told} if by_hand else {"action": "model-approved", "client_payload": told},
                       env={"REPOSITORIES": self.remote.parents[1]}, secrets={"SITES_APP_KEY": "none", "PREDMAINT_WAREHOUSE_URL": self.warehouse},
                       variables={"SITES_APP_CLIENT_ID": "1", "SITES_OWNER": "acme", "SITES_REPOSITORY": "sites", "DEPLOY_WAIT": "180s"}, workflow="deploy-model.yml")

    def stands(self, ring):
        self.git("pull", "-q")
        return [f"{w.digest}{' rollback' if w.rollback else ''}" for w in read_wanted(self.hand / "rings" / ring / "desired")]

    def runs_at(self, n):
        r = self.lines[n].rollout.running().get("motor")
        return r.digest if r else "as installed"


@pytest.fixture(scope="module")
def plant(make_bundle, keys, tmp_path_factory):
    if not postgres_programs():
        pytest.skip("apt-get install postgresql")
    try:
        triton = TritonEngine("embedded:")
    except PartMissing as e:
        pytest.skip(f"make triton-env ({e})")
    made = Plant(tmp_path_factory.mktemp("plant"), make_bundle, keys, [triton, InProcess()])
    yield made
    made.close()


def test_an_approved_model_is_looked_at_and_goes_from_the_canary_to_the_other_ring(plant):
    new = plant.approve(1.02)
    done = plant.run(digest=new)
    assert done.returncode == 0, done.stdout[-4000:]
    assert plant.stands("canary") == plant.stands("rest") == [new]
    assert plant.runs_at(0) == plant.runs_at(1) == new
    assert "agrees with ONNX Runtime on 100.0%" in done.stdout and "canary: settled" in done.stdout
    assert re.search("rest: (promoted|settled)", done.stdout), "its probation may be over before it is asked"
    assert "acme/lyon" not in done.stdout and not plant.issues.open  # a public log names no site
    commits = plant.git("log", "--format=%h")
    assert plant.run(digest=new).returncode == 0 and plant.git("log", "--format=%h") == commits  # a rerun repeats nothing


def test_a_bundle_that_a_stranger_signed_or_the_gate_refused_is_written_nowhere_and_an_issue_says_why(plant):
    before = {ring: plant.stands(ring) for ring in ("canary", "rest")}
    for digest, why in ((plant.approve(1.03, key="stranger"), "release.pub: "), (plant.approve(1.04, gate=PASSED | {"passed": False, "criteria": [
            {"name": "faults", "passed": False, "says": "it is deaf to outer races"}]}), "it is deaf to outer races")):
        done = plant.run(digest=digest, ring="canary", sites=["acme/lyon"], name="motor")
        assert done.returncode != 0 and why not in done.stdout
        issue = plant.issues.open[-1]
        assert issue["title"] == f"Not released: motor {digest[:12]} in canary" and why in issue["body"] and issue["token"] == "Bearer stand-in-token"
    assert {ring: plant.stands(ring) for ring in before} == before


def test_a_model_that_its_canary_rolls_back_is_taken_back_in_git_and_an_issue_says_why(plant):
    before, ran = plant.stands("canary"), plant.runs_at(0)
    loud = plant.approve(1.7)  # quiet on the windows that go with it, where all engines agree; at the site, which is louder, it raises alarms that the champion does not
    done = plant.run(digest=loud, ring="canary", sites=["acme/lyon"], name="motor", rollback=False)
    assert done.returncode != 0 and "canary: refused" in done.stdout and "canary: taken back" in done.stdout, plant.issues.open
    assert plant.stands("canary") == ([f"{before[0].split()[0]} rollback"] if before else []) and plant.runs_at(0) == ran
    issue = plant.issues.open[-1]
    assert issue["title"] == f"Not released: motor {loud[:12]} in canary" and "canary refused it (acme/lyon: " in issue["body"] and "acme/lyon" not in done.stdout
    assert plant.git("log", "-1", "--format=%an: %s").strip() == f"predmaint: motor {loud[:12]} is taken back from canary: canary refused"
